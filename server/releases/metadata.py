"""TUF documents of a repository: read, changed, signed, judged. Pure; the only module of the server that imports `tuf`.

A `Draft` is a repository with changes on top that may still wait for signatures. Who decides what to change, and when, is
`publisher.py`; what people do with keys is `ceremony.py`.
"""

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from securesystemslib.exceptions import Error as SigningError
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]  # public, but without __all__
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, but without __all__
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
    VerificationResult,
)
from tuf.api.serialization.json import JSONSerializer

from protocol.constants import metadata_bytes_max
from protocol.director import DIRECTOR_KEYS_MAX
from protocol.errors import MissingKeyError, RequestError, TrustError
from protocol.release import DIRECTOR_ROLE, role_paths
from protocol.trust import TIME_FIELD, Target
from server.ports import Repository

TOP_ROLES: Final = ("root", "targets", "snapshot", "timestamp")

NAME_FIELD: Final = "x-whimbrel-name"
"""What people call a key; beside the key in the document that lists it. Nothing depends on it."""

_DAY_MS: Final = 86_400_000
LIFETIME_MS: Final = {
    "timestamp": 7 * _DAY_MS,
    "snapshot": 14 * _DAY_MS,
    "artifacts": 90 * _DAY_MS,
    "director": 90 * _DAY_MS,
    "releases": 90 * _DAY_MS,
    "targets": 365 * _DAY_MS,
    "root": 365 * _DAY_MS,
}
"""How long a document is valid: the shorter, the more often its key is used, and the sooner a freeze shows."""

_SPEC_VERSION: Final = "1.0.31"
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_SERIALIZER: Final = JSONSerializer(compact=True)

_Document = TypeVar("_Document", Root, Targets, Snapshot, Timestamp)


class KeyInfo(Struct, frozen=True, kw_only=True):
    """A public key as people see it."""

    name: str
    keyid: str
    scheme: str


class Standing(Struct, frozen=True, kw_only=True):
    """Who has signed a document, who could, and how many signatures it still needs."""

    role: str
    version: int
    expires_ms: int
    threshold: int
    signed: tuple[KeyInfo, ...]
    unsigned: tuple[KeyInfo, ...]
    missing: int  # of a root: of its own keys or of those before, whichever lacks more


class Draft:
    """A repository that is being changed.

    Args:
        repository: What is published.
        pending: Documents on top of it that wait for signatures, by role.

    Raises:
        TrustError: A document cannot be read.
    """

    def __init__(self, repository: Repository, pending: Mapping[str, bytes]) -> None:
        self.current = dict(repository.documents.delegated) | {"root": repository.roots[-1]}
        if repository.documents.timestamp:  # or else it is new, and nothing below root is signed yet
            self.current["targets"] = repository.documents.targets
        self.data = {**self.current, **pending}
        self.changed: set[str] = set()
        self.root = parse(Root, self.data["root"])
        self.documents = {role: parse(Targets, data) for role, data in self.data.items() if role != "root"}
        self.documents.setdefault("targets", Targets(1, _SPEC_VERSION, _EPOCH))

    @property
    def targets(self) -> Targets:
        """The top of all targets."""
        return self.documents["targets"]

    # --- reading

    def roles(self) -> list[str]:
        """Every role that has keys."""
        return [*TOP_ROLES, *delegations_of(self.targets)]

    def role(self, name: str) -> Role:
        """Keys and threshold of a role.

        Raises:
            RequestError: There is no such role.
        """
        role = self.root.roles.get(name) or delegations_of(self.targets).get(name)
        if role is None:
            raise RequestError(
                f"there is no role {name[:80]!r}", hint=f"known are {', '.join(self.roles())[:300]}"
            )
        return role

    def keys(self, name: str) -> list[Key]:
        """Keys that sign for a role."""
        keys = self._keys_beside(name)
        return [keys[keyid] for keyid in self.role(name).keyids if keyid in keys]

    def signers_of(self, role: str) -> set[str]:
        """Ids of the keys whose signature under a changed document counts; under a root those of the one before as well (5.3.4)."""
        keyids = set(self.role(role).keyids)
        return (
            keyids | set(parse(Root, self.current["root"]).roles["root"].keyids) if role == "root" else keyids
        )

    def role_for(self, path: str) -> str | None:
        """Which role lists a path; None while nobody does."""
        delegations = delegations_of(self.targets)
        for name, role in delegations.items():
            if role.is_delegated_path(path):
                return name
        return None if delegations.keys() - {DIRECTOR_ROLE} else "targets"

    def version(self, role: str) -> int:
        """Of a document as it is published; 0 for a new one."""
        data = self.current.get(role)
        return 0 if data is None else version_of(data)

    def standing(self, role: str, data: bytes | None = None) -> Standing:
        """How far a document is signed.

        Args:
            role: Whose.
            data: The document; None takes the one of this draft.
        """
        names = self.role(role)
        data = self.data[role] if data is None else data
        metadata = _read(data)
        delegator = self.root if role in TOP_ROLES else self.targets
        results = [delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)]
        if role == "root":
            before = parse(Root, self.current["root"])
            if before.version != metadata.signed.version:
                results.append(
                    before.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
                )
        return _standing(role, metadata, names.threshold, results)

    def files(self) -> Iterator[tuple[str, str, str]]:
        """Role, path and SHA-256 of every target."""
        for role, document in self.documents.items():
            for path, file in document.targets.items():
                yield role, path, str(file.hashes.get("sha256"))

    def listed(self, role: str) -> set[str]:
        """Targets of a role, with their digests so that a change shows; nothing for roles that list none."""
        if role not in self.documents:
            return set()
        files = self.documents[role].targets
        return {f"{path} {files[path].hashes.get('sha256', '')[:12]}" for path in files}

    def digest(self, path: str) -> str | None:
        """SHA-256 of a target; None if nobody lists it."""
        for document in self.documents.values():
            if path in document.targets:
                return str(document.targets[path].hashes.get("sha256"))
        return None

    # --- changing

    def put(self, target: Target) -> None:
        """List a target with the role that its path is delegated to; nothing changes if it is there already."""
        role = self.role_for(target.path)
        assert role is not None, "whoever lists a release has seen to its role"
        file = TargetFile(
            target.length,
            {"sha256": target.digest},
            target.path,
            {"custom": msgspec.to_builtins(target.custom)},
        )
        if self.documents[role].targets.get(target.path) != file:
            self.documents[role].targets[target.path] = file
            self.changed.add(role)

    def drop(self, path: str) -> None:
        """List a target no longer; unknown ones are ignored."""
        for role, document in self.documents.items():
            if document.targets.pop(path, None) is not None:
                self.changed.add(role)

    def renew(self, role: str) -> None:
        """Give a document a new life."""
        self.role(role)
        self.changed.add(role)

    def assign(self, name: str, keys: Iterable[Key], threshold: int) -> None:
        """Say who signs for a role from now on; a role of ours that is new is delegated.

        Raises:
            RequestError: The threshold cannot be reached, or the keys cannot sign for the role.
            ReleaseError: There can be no role of that name.
        """
        found = {key.keyid: key for key in keys}
        if not 1 <= threshold <= len(found):
            raise RequestError(
                f"role {name}: a threshold of {threshold} cannot be reached with {len(found)} key(s)",
                hint="name more keys, or give a --threshold",
            )
        if name == DIRECTOR_ROLE:
            _check_director(found.values(), threshold)
        if name in TOP_ROLES:
            self.root.roles[name] = Role(list(found), threshold)
            used = {keyid for role in self.root.roles.values() for keyid in role.keyids}
            everything = self.root.keys | found
            self.root.keys = {keyid: everything[keyid] for keyid in everything if keyid in used}
            self.changed.add("root")
            return
        paths = list(role_paths(name))
        if self.targets.delegations is None:
            self.targets.delegations = Delegations({}, {})
        roles = delegations_of(self.targets)
        roles[name] = DelegatedRole(name, list(found), threshold, terminating=True, paths=paths)
        used = {keyid for role in roles.values() for keyid in role.keyids}
        everything = self.targets.delegations.keys | found
        self.targets.delegations = Delegations(
            {keyid: everything[keyid] for keyid in everything if keyid in used}, roles
        )
        self.changed.add("targets")
        self._open(name, roles[name])

    def _open(self, name: str, role: DelegatedRole) -> None:
        """A document for a role that has none yet; it takes over what its delegator has listed until now."""
        if name in self.documents:
            return
        moved = {path: file for path, file in self.targets.targets.items() if role.is_delegated_path(path)}
        for path in moved:
            del self.targets.targets[path]
        self.documents[name] = Targets(1, _SPEC_VERSION, _EPOCH, moved)
        self.changed.add(name)

    # --- signing

    def sign(self, signers: Mapping[str, Signer], now_ms: int) -> dict[str, bytes]:
        """Sign what was changed, and what keys of the new documents no longer cover, with the keys that are here.

        Args:
            signers: By key id.
            now_ms: Start of the documents' life.

        Returns:
            What is not published yet, by role; it may lack signatures.

        Raises:
            RequestError: A document would pass its size limit.
        """
        for role in ("root", "targets", *delegations_of(self.targets)):
            is_pending = self.data.get(role) != self.current.get(role)
            if role in self.changed:
                self._sign_anew(role, signers, now_ms)
            elif is_pending:
                self._sign_more(role, signers)
            elif self.standing(role).missing:
                self._sign_anew(role, signers, now_ms)
        self.changed.clear()
        order = sorted(self.data, key=lambda role: (role != "root", role != "targets", role))
        return {role: self.data[role] for role in order if self.data[role] != self.current.get(role)}

    def _sign_anew(self, role: str, signers: Mapping[str, Signer], now_ms: int) -> None:
        document: Any = self.root if role == "root" else self.documents[role]
        document.version = self.version(role) + 1
        document.expires = expires(role, now_ms)
        keyids = self.signers_of(role)
        self.data[role] = sign(role, document, [signers[keyid] for keyid in signers if keyid in keyids])

    def _sign_more(self, role: str, signers: Mapping[str, Signer]) -> None:
        for key in self.standing(role).unsigned:
            if key.keyid in signers:
                self.data[role] = add_signature(role, self.data[role], signers[key.keyid])

    def _keys_beside(self, name: str) -> dict[str, Key]:
        if name in TOP_ROLES:
            return dict(self.root.keys)
        return dict(self.targets.delegations.keys) if self.targets.delegations is not None else {}


def _check_director(keys: Iterable[Key], threshold: int) -> None:
    """What a director signs has one signature, which devices check without TUF."""
    if threshold != 1:
        raise RequestError("one key signs a wish of the director", hint="use --threshold 1")
    if len(keys := list(keys)) > DIRECTOR_KEYS_MAX:
        raise RequestError(f"the director would have {len(keys)} keys, allowed are {DIRECTOR_KEYS_MAX}")
    for key in keys:
        if key.keytype != "ed25519":
            raise RequestError(
                f"key {key_info(key).name} is no Ed25519 key, and the director's have to be",
                hint="make one with `whimbrel keys make`",
            )


# --- documents --------------------------------------------------------------------------------------------------


def first_root(keys: Mapping[str, Key], now_ms: int) -> Root:
    """A root document with one key for each role."""
    root = Root(1, _SPEC_VERSION, expires("root", now_ms), consistent_snapshot=False)
    for role in TOP_ROLES:
        root.add_key(keys[role], role)
    return root


def snapshot_of(version: int, documents: Mapping[str, bytes], now_ms: int) -> Snapshot:
    """A snapshot of all targets documents, by role."""
    meta = {
        f"{role}.json": MetaFile.from_data(parse(Targets, data).version, data, ["sha256"])
        for role, data in documents.items()
    }
    return Snapshot(version, _SPEC_VERSION, expires("snapshot", now_ms), meta)


def timestamp_of(version: int, snapshot: bytes, now_ms: int) -> Timestamp:
    """A timestamp over a snapshot."""
    meta = MetaFile.from_data(parse(Snapshot, snapshot).version, snapshot, ["sha256"])
    return Timestamp(version, _SPEC_VERSION, expires("timestamp", now_ms), meta, {TIME_FIELD: now_ms})


def delegations_of(targets: Targets) -> dict[str, DelegatedRole]:
    """Roles that targets delegates to, in the order in which they are searched."""
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return dict(targets.delegations.roles)


def parse(kind: type[_Document], data: bytes) -> _Document:
    """Our own document, as it was stored.

    Raises:
        TrustError: It is none of that kind.
    """
    signed = _read(data).signed
    if not isinstance(signed, kind):
        raise TrustError(f"stored {kind.type} document is a {signed.type}", hint="restore the database")
    return signed


def expires(role: str, now_ms: int) -> dt.datetime:
    """When a document ends that is signed now; TUF counts in whole seconds."""
    return _EPOCH + dt.timedelta(seconds=(now_ms + lifetime_ms(role)) // 1000)


def lifetime_ms(role: str) -> int:
    """How long documents of a role live."""
    return LIFETIME_MS[role.partition(".")[0]]


def milliseconds(instant: dt.datetime) -> int:
    """Since 1970."""
    return (instant - _EPOCH) // dt.timedelta(milliseconds=1)


def root_standing(roots: Sequence[bytes], at: int) -> Standing:
    """How one root of a chain is signed: by its own keys, and by those of the one before (5.3.4)."""
    metadata = _read(roots[at])
    root = parse(Root, roots[at])
    before = parse(Root, roots[at - 1]) if at else None
    result = root.get_root_verification_result(before, metadata.signed_bytes, metadata.signatures)
    return _standing("root", metadata, root.roles["root"].threshold, [result.first, result.second])


def _standing(
    role: str, metadata: Metadata[Any], threshold: int, results: Sequence[VerificationResult]
) -> Standing:
    signed = {keyid: key for result in results for keyid, key in result.signed.items()}
    unsigned = {keyid: key for result in results for keyid, key in result.unsigned.items()}
    return Standing(
        role=role,
        version=metadata.signed.version,
        expires_ms=milliseconds(metadata.signed.expires),
        threshold=threshold,
        signed=tuple(key_info(key) for key in signed.values()),
        unsigned=tuple(key_info(key) for key in unsigned.values()),
        missing=max(result.missing for result in results),
    )


def version_of(data: bytes) -> int:
    """Version of a document of any role."""
    return int(_read(data).signed.version)


def expires_ms(data: bytes) -> int:
    """When a document ends, milliseconds since 1970."""
    return milliseconds(_read(data).signed.expires)


def key_info(key: Key) -> KeyInfo:
    """What people want to know of a key."""
    name = key.unrecognized_fields.get(NAME_FIELD)
    return KeyInfo(name=name if isinstance(name, str) else key.keyid[:8], keyid=key.keyid, scheme=key.scheme)


# --- signatures -------------------------------------------------------------------------------------------------


def sign(role: str, document: Any, signers: Iterable[Signer]) -> bytes:
    """A new document with the signatures of all signers.

    Raises:
        RequestError: It passes its size limit.
        MissingKeyError: A signer cannot sign.
    """
    metadata = Metadata(document)
    for signer in signers:
        _add_signature(metadata, signer)
    return _written(role, metadata)


def add_signature(role: str, data: bytes, signer: Signer) -> bytes:
    """A document with one more signature.

    Raises:
        MissingKeyError: The signer cannot sign.
    """
    metadata = _read(data)
    _add_signature(metadata, signer)
    return _written(role, metadata)


def _add_signature(metadata: Metadata[Any], signer: Signer) -> None:
    try:
        metadata.sign(signer, append=True)
    except (RepositoryError, SigningError, OSError, ValueError) as error:
        name = key_info(signer.public_key).name
        raise MissingKeyError(f"key {name} cannot sign: {error}", hint="is its device connected?") from error


def _read(data: bytes) -> Metadata[Any]:
    try:
        return Metadata.from_bytes(data)
    except RepositoryError as error:
        raise TrustError(f"stored document: {error}", hint="restore the database") from error


def _written(role: str, metadata: Metadata[Any]) -> bytes:
    data = metadata.to_bytes(_SERIALIZER)
    if len(data) > metadata_bytes_max(role):
        raise RequestError(
            f"{role} document of {len(data)} bytes, allowed are {metadata_bytes_max(role)}",
            hint="too many releases or deltas are published at once: retire old deltas",
        )
    return data
