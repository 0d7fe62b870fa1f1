"""What people do with keys and signatures, as plain calls: one person at a time, each with a key of their own.

Whatever changes root, targets or the releases of a family is a set of documents that waits in the folder `pending` until none
lacks a signature, and is then published at once. Those documents are signed in place, or carried to where a key is and back.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from msgspec import Struct
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]  # public, but without __all__

from protocol.errors import RequestError, TrustError
from server.adapters.blobs import write_file
from server.adapters.pending import PendingFolder, read_document
from server.home import Home, opened
from server.ports import Repository
from server.releases.metadata import (
    TOP_ROLES,
    Draft,
    KeyInfo,
    Standing,
    add_signature,
    delegations_of,
    expires_ms,
    key_info,
    lifetime_ms,
    version_of,
)
from server.releases.publisher import REFRESH_SHARE
from server.signing import change_signed, read_waiting

KEYID_CHARS_MIN: Final = 6
"""So much of an id names a key, unless two begin alike."""


class KeyStatus(Struct, frozen=True, kw_only=True):
    """A key of a role."""

    key: KeyInfo
    is_here: bool  # it signs on this machine without anybody being asked


class RoleStatus(Struct, frozen=True, kw_only=True):
    """Who signs for a role."""

    role: str
    threshold: int
    keys: tuple[KeyStatus, ...]
    version: int
    expires_ms: int
    is_automatic: bool  # enough keys are here: the server signs it again by itself
    is_due: bool  # less than a third of its life is left


class Waiting(Struct, frozen=True, kw_only=True):
    """A document that lacks signatures, or waits for others that do."""

    standing: Standing
    changes: list[str]  # what is different from what is published, for whoever signs


class Status(Struct, frozen=True, kw_only=True):
    """All roles, and what waits for signatures."""

    roles: list[RoleStatus]
    pending: list[Waiting]


def status(folder: Path) -> Status:
    """Who signs for what, and what waits for whom.

    Raises:
        RequestError: There is no repository, or what waits cannot be read.
    """
    with opened(folder) as home:
        publisher, now_ms = home.publisher(), home.clock.now_ms()
        repository = _repository(home)
        draft = Draft(repository, {})
        documents = draft.data | {
            "snapshot": repository.documents.snapshot,
            "timestamp": repository.documents.timestamp,
        }
        roles = [
            RoleStatus(
                role=role,
                threshold=draft.role(role).threshold,
                keys=tuple(
                    KeyStatus(key=key_info(key), is_here=publisher.holds(key.keyid))
                    for key in draft.keys(role)
                ),
                version=version_of(documents[role]),
                expires_ms=expires_ms(documents[role]),
                is_automatic=publisher.can_sign(draft, role),
                is_due=expires_ms(documents[role]) - lifetime_ms(role) // REFRESH_SHARE <= now_ms,
            )
            for role in draft.roles()
        ]
        waiting, after = read_waiting(home)
        pending = [
            Waiting(standing=after.standing(role), changes=_changes(draft, after, role))
            for role in sorted(waiting, key=_order)
        ]
        return Status(roles=roles, pending=pending)


def assign(folder: Path, role: str, keys: Iterable[Key], threshold: int) -> list[Standing]:
    """Say which keys sign for a role from now on, and how many of them have to.

    Returns:
        What waits for signatures; nothing if it is published.

    Raises:
        RequestError: The threshold cannot be reached, or two keys are the same.
        ReleaseError: There can be no such role.
    """
    keys = list(keys)
    if len({key.keyid for key in keys}) != len(keys):
        raise RequestError(f"role {role}: one key is named twice", hint="a threshold counts different keys")
    named = ", ".join(f"{key_info(key).name} ({key.keyid[:8]})" for key in keys)
    text = f"{threshold} of {len(keys)}: {named}"
    return _changed(folder, "keys.assign", role, lambda draft: draft.assign(role, keys, threshold), text)


def rotate(folder: Path, old: str, new: Key, role: str = "") -> list[Standing]:
    """Put one key in the place of another, in every role that it signs for or in one.

    Args:
        folder: The server's.
        old: Name or id of the key that goes.
        new: The key that comes.
        role: Only in this role.

    Raises:
        RequestError: No role has that key.
    """

    def change(draft: Draft) -> None:
        for name, key in _roles_with(draft, old, role):
            keys = [new if other.keyid == key.keyid else other for other in draft.keys(name)]
            draft.assign(name, keys, draft.role(name).threshold)

    text = f"{key_info(new).name} ({new.keyid[:8]}) in its place" + (f" in {role}" if role else "")
    return _changed(folder, "keys.rotate", old, change, text)


def revoke(folder: Path, old: str, role: str = "") -> list[Standing]:
    """Take a key away from every role that it signs for, or from one.

    Raises:
        RequestError: No role has that key, or a threshold could no longer be reached.
    """

    def change(draft: Draft) -> None:
        for name, key in _roles_with(draft, old, role):
            keys = [other for other in draft.keys(name) if other.keyid != key.keyid]
            threshold = draft.role(name).threshold
            if len(keys) < threshold:
                raise RequestError(
                    f"role {name} needs {threshold} key(s) and would have {len(keys)}",
                    hint="`whimbrel keys rotate` puts another key in its place",
                )
            draft.assign(name, keys, threshold)

    return _changed(folder, "keys.revoke", old, change, f"from {role}" if role else "")


def renew(folder: Path, role: str) -> list[Standing]:
    """Give a document a new life; it says the same.

    Raises:
        RequestError: There is no such document.
    """
    if role in {"snapshot", "timestamp"}:
        raise RequestError(f"the server signs {role} by itself")
    return _changed(folder, "keys.renew", role, lambda draft: draft.renew(role))


def sign_pending(folder: Path, signer: Signer) -> tuple[list[str], list[Standing]]:
    """Add one person's signature to every document that waits for it.

    Args:
        folder: The server's.
        signer: The person's key.

    Returns:
        Roles that were signed, and what still waits; nothing if all is published.

    Raises:
        RequestError: Nothing waits for this key.
    """
    key = key_info(signer.public_key)
    with opened(folder) as home, home.attempting("keys.sign", key.name):
        pending = PendingFolder(folder)
        waiting, draft = read_waiting(home)
        wanted = {role: {key.keyid for key in draft.standing(role).unsigned} for role in waiting}
        signed = [role for role, keyids in wanted.items() if signer.public_key.keyid in keyids]
        if not signed:
            raise RequestError(
                f"nothing waits for a signature of {key.name}", hint="see `whimbrel keys list`"
            )
        for role in signed:
            waiting[role] = add_signature(role, waiting[role], signer)
        pending.write(waiting)
        act = home.act("keys.sign", ", ".join(signed), f"by {key.name} ({key.keyid[:8]})")
        return signed, change_signed(home, act)


def sign_file(path: Path, signer: Signer) -> None:
    """Add a signature to a document anywhere, without a repository.

    Raises:
        RequestError: The file is no signed document.
    """
    role = path.name.removesuffix(".json")
    try:
        write_file(path, add_signature(role, read_document(path), signer))
    except TrustError as error:
        raise RequestError(
            f"{path}: {error.message}", hint="it should be a document from `pending`"
        ) from error


def publish(folder: Path) -> list[Standing]:
    """Publish what waits, once nothing lacks a signature.

    Returns:
        What still waits; nothing if it is published.

    Raises:
        RequestError: Nothing waits.
    """
    with opened(folder) as home:
        waiting = read_waiting(home)[0]
        if not waiting:
            raise RequestError("nothing waits for signatures")
        return change_signed(home, home.act("keys.publish", ", ".join(sorted(waiting))))


def drop(folder: Path) -> list[str]:
    """Give up everything that waits for signatures.

    Returns:
        The roles.
    """
    with opened(folder) as home:
        pending = PendingFolder(folder)
        roles = pending.roles()
        pending.write({})
        if roles:
            home.store.save([home.act("keys.drop", ", ".join(roles))])
        return roles


def _changed(
    folder: Path, what: str, on: str, change: Callable[[Draft], None], text: str = ""
) -> list[Standing]:
    with opened(folder) as home, home.attempting(what, on):
        return change_signed(home, home.act(what, on, text), change)


def _repository(home: Home) -> Repository:
    repository = home.store.repository()
    assert repository is not None, "an open folder has been signed"
    return repository


def _changes(before: Draft, after: Draft, role: str) -> list[str]:
    """What one waiting document would change."""
    lines: list[str] = []
    if role in {"root", "targets"}:
        names = TOP_ROLES if role == "root" else delegations_of(after.targets)
        for name in names:
            old, new = (_signers_text(draft, name) for draft in (before, after))
            if old != new:
                lines.append(f"{name}: {new}, was {old}" if old else f"{name}: {new}, new")
    listed_before, listed = (draft.listed(role) for draft in (before, after))
    lines += [f"lists {path}" for path in sorted(listed - listed_before)]
    lines += [f"no longer lists {path}" for path in sorted(listed_before - listed)]
    return lines or ["says the same again"]


def _signers_text(draft: Draft, role: str) -> str:
    if role not in draft.roles():
        return ""
    keys = draft.keys(role)
    names = ", ".join(f"{key_info(key).name} ({key.keyid[:8]})" for key in keys)
    return f"{draft.role(role).threshold} of {len(keys)}: {names}"


def _roles_with(draft: Draft, text: str, only: str) -> list[tuple[str, Key]]:
    """Roles that a key signs for, and the key.

    Raises:
        RequestError: There is none, or more than one such key.
    """
    roles = [only] if only else draft.roles()
    found = [(role, key) for role in roles for key in draft.keys(role) if _is_named(key, text)]
    keyids = {key.keyid for _, key in found}
    if not found:
        where = f"role {only}" if only else "any role"
        raise RequestError(f"no key {text[:80]!r} signs for {where}", hint="see `whimbrel keys list`")
    if len(keyids) > 1:
        raise RequestError(
            f"{len(keyids)} keys are called {text[:80]!r}",
            hint=f"give the id of one: {', '.join(sorted(keyids))}",
        )
    return found


def _is_named(key: Key, text: str) -> bool:
    is_id = len(text) >= KEYID_CHARS_MIN and key.keyid.startswith(text)
    return is_id or key_info(key).name == text


def _order(role: str) -> tuple[bool, bool, str]:
    """Root, targets, then the others by name."""
    return role != "root", role != "targets", role
