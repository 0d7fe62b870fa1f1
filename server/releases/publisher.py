"""Signing: keys and bytes in, signed TUF documents out.

Who signs for what is read from the documents themselves: root names the keys of the top roles, targets those of `artifacts`, of the
`director` and of one role per model family (SPEC section 8.1). A new repository has one key for each of them here; `whimbrel keys` takes
root, targets and families to thresholds of keys that live elsewhere. Snapshots are not "consistent" in TUF's sense, since
documents are not fetched by name from a mirror but delivered as one set.

Nothing leaves this module that `protocol.trust` would refuse.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
from securesystemslib.signer import Signer  # type: ignore[attr-defined]  # public, but without __all__

from protocol.errors import MissingKeyError, RequestError
from protocol.ids import parse_family
from protocol.release import ARTIFACTS_ROLE, DIRECTOR_ROLE, releases_role
from protocol.trust import Documents, Floors, Target, verify
from server.ports import Repository
from server.releases.director import Director
from server.releases.metadata import (
    TOP_ROLES,
    Draft,
    delegations_of,
    expires_ms,
    first_root,
    lifetime_ms,
    sign,
    snapshot_of,
    timestamp_of,
    version_of,
)
from server.releases.signers import signer_of

ROLES: Final = (*TOP_ROLES, "artifacts", "releases", "director")
"""Keys of a new repository by name; `releases` signs for every family until other keys do."""

REFRESH_SHARE: Final = 3
"""A document is signed again when less than a third of its life is left: a server may be off for days."""


@dataclass(frozen=True, slots=True)
class Published:
    """A repository that passed the verification of a device.

    Attributes:
        repository: The signed documents.
        targets: What they say, by path; without families whose documents have expired.
        refresh_ms: When some document should be signed again.
    """

    repository: Repository
    targets: dict[str, Target]
    refresh_ms: int


class Publisher:
    """Signs with the keys that are there.

    Args:
        keys: Signers, or private keys (PKCS #8 PEM, not encrypted), by name. The names of `ROLES` count for a new
            repository only; after that a key signs for the roles that list it. A missing one is an error once needed.
    """

    def __init__(self, keys: Mapping[str, bytes | Signer]) -> None:
        self._named = {
            name: signer_of(name, key) if isinstance(key, bytes) else key for name, key in keys.items()
        }
        self._signers: dict[str, Signer] = {
            signer.public_key.keyid: signer for signer in self._named.values()
        }

    def create(self, now_ms: int) -> Published:
        """A new repository without targets: one key for each role, all of them here.

        Raises:
            MissingKeyError: A role has no key.
        """
        keys = {role: self._key_named(role).public_key for role in ROLES}
        root = sign("root", first_root(keys, now_ms), [self._key_named("root")])
        empty = Repository(roots=(root,), documents=Documents(timestamp=b"", snapshot=b"", targets=b""))
        draft = Draft(empty, {})
        draft.assign(ARTIFACTS_ROLE, [keys["artifacts"]], 1)
        draft.assign(DIRECTOR_ROLE, [keys["director"]], 1)
        return self._complete(empty, draft.sign(self._signers, now_ms), now_ms)

    def publish(
        self, repository: Repository, added: Iterable[Target], retired: Iterable[str], now_ms: int
    ) -> Published:
        """Sign changed targets, and snapshot and timestamp over them.

        Args:
            repository: What was signed last.
            added: Targets to add or replace.
            retired: Paths of targets to drop; unknown ones are ignored.
            now_ms: Start of the documents' life.

        Raises:
            MissingKeyError: A role has to sign, and too few of its keys are here.
            RequestError: A document would pass its size limit, or nobody signs for a family.
        """
        return self._complete(repository, self.prepare(repository, {}, added, retired, now_ms), now_ms)

    def prepare(
        self,
        repository: Repository,
        pending: Mapping[str, bytes],
        added: Iterable[Target],
        retired: Iterable[str],
        now_ms: int,
    ) -> dict[str, bytes]:
        """As `publish`, but only as far as the keys that are here go.

        Args:
            repository: What was signed last.
            pending: Documents that wait for signatures; those that change lose the signatures that they have.
            added: Targets to add or replace.
            retired: Paths of targets to drop.
            now_ms: Start of the documents' life.

        Returns:
            Documents by role, to be signed by others, then given to `submit`.

        Raises:
            RequestError: As for `publish`.
        """

        def change(draft: Draft) -> None:
            for path in retired:
                draft.drop(path)
            self.list_targets(draft, added)

        return self.change(repository, pending, change, now_ms)

    def change(
        self,
        repository: Repository,
        pending: Mapping[str, bytes],
        change: Callable[[Draft], None],
        now_ms: int,
    ) -> dict[str, bytes]:
        """Change whatever `change` wants, and sign as far as the keys that are here go; as `prepare`."""
        draft = Draft(repository, pending)
        change(draft)
        return draft.sign(self._signers, now_ms)

    def list_targets(self, draft: Draft, targets: Iterable[Target]) -> None:
        """List targets in a draft.

        Raises:
            RequestError: Nobody signs for the family of a release.
        """
        for target in targets:
            self._ensure_role(draft, target.path)
            draft.put(target)

    def submit(
        self, repository: Repository, pending: Mapping[str, bytes], added: Iterable[Target], now_ms: int
    ) -> Published:
        """Publish documents that others have signed.

        Args:
            repository: What was signed last.
            pending: Documents by role.
            added: Targets that are signed here besides.
            now_ms: Start of the life of what is signed here.

        Raises:
            MissingKeyError: Signatures are missing.
            RequestError: A document was made for another version of the repository.
        """
        return self._complete(repository, self.prepare(repository, pending, added, (), now_ms), now_ms)

    def refresh(self, repository: Repository, now_ms: int) -> Published:
        """Sign again what expires soon; the same repository when nothing does.

        Root, targets and families are followed by a new version with the same keys where enough of these are here; where
        they are not, people have to (`whimbrel keys renew`).

        Raises:
            MissingKeyError: Snapshot or timestamp have to be signed, and too few of their keys are here.
        """
        due = {role for role, at_ms in self._refresh_times(repository).items() if at_ms <= now_ms}
        if renewed := due - {"snapshot", "timestamp"}:

            def renew(draft: Draft) -> None:
                for role in renewed:
                    draft.renew(role)

            return self._complete(repository, self.change(repository, {}, renew, now_ms), now_ms)
        if "snapshot" in due:
            return self._complete(repository, {}, now_ms)
        if "timestamp" in due:
            documents = repository.documents
            timestamp = self._timestamp(Draft(repository, {}), documents, documents.snapshot, now_ms)
            documents = msgspec.structs.replace(documents, timestamp=timestamp)
            repository = msgspec.structs.replace(repository, documents=documents)
        return self.checked(repository, now_ms)

    def renew(self, repository: Repository, role: str, now_ms: int) -> Published:
        """Sign a new version of a document that says the same.

        Raises:
            MissingKeyError: Too few of its keys are here.
        """
        return self._complete(
            repository, self.change(repository, {}, lambda draft: draft.renew(role), now_ms), now_ms
        )

    def checked(self, repository: Repository, now_ms: int) -> Published:
        """Verify a repository as a device would that starts from its first root.

        A family whose document has expired stops nobody but its own devices, and is left out.

        Raises:
            TrustError: A device would refuse it.
        """
        documents = msgspec.structs.replace(repository.documents, roots=repository.roots[1:])
        current = [role for role, data in documents.delegated if expires_ms(data) > now_ms]
        verified = verify(repository.roots[0], documents, Floors(), now_ms, current)
        return Published(repository, verified.targets, min(self._refresh_times(repository).values()))

    def due_elsewhere(self, repository: Repository, now_ms: int) -> dict[str, int]:
        """Roles that people have to sign again soon, since too few of their keys are here, and when their documents end."""
        draft = Draft(repository, {})
        ends = {
            role: expires_ms(draft.data[role])
            for role in ("root", "targets", *delegations_of(draft.targets))
            if not self.can_sign(draft, role)
        }
        return {
            role: at_ms
            for role, at_ms in ends.items()
            if at_ms - lifetime_ms(role) // REFRESH_SHARE <= now_ms
        }

    def can_sign(self, draft: Draft, role: str) -> bool:
        """Whether enough keys of a role are here."""
        here = sum(key.keyid in self._signers for key in draft.keys(role))
        return here >= draft.role(role).threshold

    def director(self, repository: Repository) -> Director:
        """What the keys that are here may sign for single devices."""
        return Director(repository, lambda key: self._signers.get(key.keyid))

    def holds(self, keyid: str) -> bool:
        """Whether a key signs here."""
        return keyid in self._signers

    # --- parts

    def _complete(self, repository: Repository, pending: Mapping[str, bytes], now_ms: int) -> Published:
        """Put documents in the place of older ones, and sign snapshot and timestamp over all of them."""
        draft = Draft(repository, pending)
        for role, data in pending.items():
            version, before = version_of(data), draft.version(role)
            if version != before + 1:
                raise RequestError(
                    f"{role} version {version} waits for signatures, but {before} is published",
                    hint="drop it with `whimbrel keys drop` and begin anew",
                )
            if missing := draft.standing(role).missing:
                raise MissingKeyError(
                    f"role {role} lacks {missing} signature(s)",
                    hint=f"put {role}.pem back into the folder keys, or sign with `whimbrel keys sign`",
                )
        roots = (*repository.roots, pending["root"]) if "root" in pending else repository.roots
        before_snapshot = repository.documents.snapshot
        snapshot = self._sign_online(
            draft,
            "snapshot",
            snapshot_of(
                version_of(before_snapshot) + 1 if before_snapshot else 1,
                {role: data for role, data in draft.data.items() if role != "root"},
                now_ms,
            ),
        )
        documents = Documents(
            timestamp=self._timestamp(draft, repository.documents, snapshot, now_ms),
            snapshot=snapshot,
            targets=draft.data["targets"],
            delegated=tuple(
                (role, data) for role, data in sorted(draft.data.items()) if role not in {"root", "targets"}
            ),
        )
        return self.checked(Repository(roots=roots, documents=documents), now_ms)

    def _timestamp(self, draft: Draft, before: Documents, snapshot: bytes, now_ms: int) -> bytes:
        version = version_of(before.timestamp) + 1 if before.timestamp else 1
        return self._sign_online(draft, "timestamp", timestamp_of(version, snapshot, now_ms))

    def _sign_online(self, draft: Draft, role: str, document: object) -> bytes:
        if not self.can_sign(draft, role):
            raise MissingKeyError(
                f"the key of role {role} is missing", hint=f"put {role}.pem back into the folder keys"
            )
        keyids = [key.keyid for key in draft.keys(role)]
        return sign(role, document, [self._signers[keyid] for keyid in keyids if keyid in self._signers])

    def _ensure_role(self, draft: Draft, path: str) -> None:
        """The first release of a family is signed with the key that a new repository has for all families."""
        if draft.role_for(path) is not None:
            return
        family = parse_family(path.split("/")[1])
        signer = self._named.get("releases")
        if signer is None:
            raise RequestError(
                f"nobody signs for releases of {family} yet",
                hint=f"run `whimbrel keys assign {releases_role(family)} BUILDER.pub APPROVER.pub --threshold 2`",
            )
        draft.assign(releases_role(family), [signer.public_key], 1)

    def _refresh_times(self, repository: Repository) -> dict[str, int]:
        """When each role should sign again that can."""
        draft = Draft(repository, {})
        documents = repository.documents
        signed = {"timestamp": documents.timestamp, "snapshot": documents.snapshot}
        for role in ("root", "targets", *delegations_of(draft.targets)):
            if self.can_sign(draft, role):
                signed[role] = draft.data[role]
        return {role: expires_ms(data) - lifetime_ms(role) // REFRESH_SHARE for role, data in signed.items()}

    def _key_named(self, role: str) -> Signer:
        signer = self._named.get(role)
        if signer is None:
            raise MissingKeyError(
                f"the key of role {role} is missing", hint=f"put {role}.pem back into the folder keys"
            )
        return signer
