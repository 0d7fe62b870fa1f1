"""Signing: keys and bytes in, signed TUF documents out. The only module of the server that imports `tuf`.

Roles are root, targets, snapshot and timestamp, with keys of their own and a threshold of one each; a later root
document can raise thresholds or delegate, and everything here reads what the current root says. Snapshots are not
"consistent" in TUF's sense, since documents are not fetched by name from a mirror but delivered as one set.

Nothing leaves this module that `protocol.trust` would refuse.
"""

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # public, but without __all__
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, but without __all__
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from protocol.constants import METADATA_BYTES_MAX
from protocol.errors import MissingKeyError, RequestError, TrustError
from protocol.trust import Documents, Floors, Target, verify
from server.ports import Repository

Role = Literal["root", "targets", "snapshot", "timestamp"]
ROLES: Final[tuple[Role, ...]] = ("root", "targets", "snapshot", "timestamp")

_DAY_MS: Final = 86_400_000
LIFETIME_MS: Final[dict[Role, int]] = {
    "timestamp": 7 * _DAY_MS,
    "snapshot": 14 * _DAY_MS,
    "targets": 90 * _DAY_MS,
    "root": 365 * _DAY_MS,
}
"""How long a document is valid: the shorter, the more often its key is used, and the sooner a freeze shows."""

REFRESH_SHARE: Final = 3
"""A document is signed again when less than a third of its life is left: a server may be off for days."""

_SPEC_VERSION: Final = "1.0.31"
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_SERIALIZER: Final = JSONSerializer(compact=True)

_Signed = TypeVar("_Signed", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True, slots=True)
class Published:
    """A repository that passed the verification of a device.

    Attributes:
        repository: The signed documents.
        targets: What they say, by path.
        refresh_ms: When some document should be signed again.
    """

    repository: Repository
    targets: dict[str, Target]
    refresh_ms: int


class Publisher:
    """Signs for the roles whose keys are there.

    Args:
        keys: Private keys (PKCS #8 PEM, Ed25519) by role; a role may be missing, it is an error only once needed.
    """

    def __init__(self, keys: Mapping[Role, bytes]) -> None:
        self._signers: dict[Role, CryptoSigner] = {role: _signer(role, pem) for role, pem in keys.items()}

    def create(self, now_ms: int) -> Published:
        """A new repository without targets.

        Raises:
            MissingKeyError: A role has no key.
        """
        root = Root(1, _SPEC_VERSION, _expires("root", now_ms), consistent_snapshot=False)
        for role in ROLES:
            root.add_key(self._signer(role).public_key, role)
        targets = Targets(1, _SPEC_VERSION, _expires("targets", now_ms))
        return self._complete((self._sign("root", root),), targets, None, now_ms)

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
            MissingKeyError: A role that has to sign has no key.
            RequestError: A document would pass its size limit.
        """
        targets = _parse(Targets, repository.documents.targets)
        for path in retired:
            targets.targets.pop(path, None)
        for target in added:
            targets.targets[target.path] = TargetFile(
                target.length,
                {"sha256": target.digest},
                target.path,
                {"custom": msgspec.to_builtins(target.custom)},
            )
        targets.version += 1
        targets.expires = _expires("targets", now_ms)
        return self._complete(repository.roots, targets, repository.documents, now_ms)

    def refresh(self, repository: Repository, now_ms: int) -> Published:
        """Sign again what expires soon; the same repository when nothing does.

        A root that expires soon is followed by a new version with the same keys, where the root key is here.

        Raises:
            MissingKeyError: A role that has to sign has no key.
        """
        due = {role for role, at_ms in self._refresh_times(repository).items() if at_ms <= now_ms}
        if "root" in due:
            repository = self._renew_root(repository, now_ms)
        if "targets" in due:
            return self.publish(repository, (), (), now_ms)
        if "snapshot" in due:
            targets = _parse(Targets, repository.documents.targets)
            return self._complete(
                repository.roots, targets, repository.documents, now_ms, repository.documents.targets
            )
        if due & {"timestamp", "root"}:
            snapshot = _parse(Snapshot, repository.documents.snapshot)
            timestamp = self._timestamp(snapshot, repository.documents, now_ms)
            documents = msgspec.structs.replace(repository.documents, timestamp=timestamp)
            repository = msgspec.structs.replace(repository, documents=documents)
        return self.checked(repository, now_ms)

    def checked(self, repository: Repository, now_ms: int) -> Published:
        """Verify a repository as a device would that starts from its first root.

        Raises:
            TrustError: A device would refuse it.
        """
        documents = msgspec.structs.replace(repository.documents, roots=repository.roots[1:])
        verified = verify(repository.roots[0], documents, Floors(), now_ms)
        return Published(repository, verified.targets, min(self._refresh_times(repository).values()))

    def _complete(
        self,
        roots: tuple[bytes, ...],
        targets: Targets,
        previous: Documents | None,
        now_ms: int,
        signed_targets: bytes | None = None,
    ) -> Published:
        signed_targets = signed_targets or self._sign("targets", targets)
        version = _parse(Snapshot, previous.snapshot).version + 1 if previous else 1
        meta = {"targets.json": MetaFile.from_data(targets.version, signed_targets, ["sha256"])}
        snapshot = Snapshot(version, _SPEC_VERSION, _expires("snapshot", now_ms), meta)
        signed_snapshot = self._sign("snapshot", snapshot)
        timestamp = self._timestamp(snapshot, previous, now_ms, signed_snapshot)
        documents = Documents(timestamp=timestamp, snapshot=signed_snapshot, targets=signed_targets)
        return self.checked(Repository(roots=roots, documents=documents), now_ms)

    def _timestamp(
        self,
        snapshot: Snapshot,
        previous: Documents | None,
        now_ms: int,
        signed_snapshot: bytes | None = None,
    ) -> bytes:
        assert signed_snapshot or previous
        data = signed_snapshot or (previous.snapshot if previous else b"")
        version = _parse(Timestamp, previous.timestamp).version + 1 if previous else 1
        meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
        return self._sign("timestamp", Timestamp(version, _SPEC_VERSION, _expires("timestamp", now_ms), meta))

    def _renew_root(self, repository: Repository, now_ms: int) -> Repository:
        root = _parse(Root, repository.roots[-1])
        root.version += 1
        root.expires = _expires("root", now_ms)
        return msgspec.structs.replace(repository, roots=(*repository.roots, self._sign("root", root)))

    def _refresh_times(self, repository: Repository) -> dict[Role, int]:
        """When each role should sign again; root only where its key is, since it is meant to be kept elsewhere."""
        documents = repository.documents
        signed: dict[Role, Any] = {
            "timestamp": _parse(Timestamp, documents.timestamp),
            "snapshot": _parse(Snapshot, documents.snapshot),
            "targets": _parse(Targets, documents.targets),
        }
        if "root" in self._signers:
            signed["root"] = _parse(Root, repository.roots[-1])
        return {
            role: (document.expires - _EPOCH) // dt.timedelta(milliseconds=1)
            - LIFETIME_MS[role] // REFRESH_SHARE
            for role, document in signed.items()
        }

    def _sign(self, role: Role, signed: _Signed) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(self._signer(role))
        data = metadata.to_bytes(_SERIALIZER)
        if len(data) > METADATA_BYTES_MAX[role]:
            raise RequestError(
                f"{role} document of {len(data)} bytes, allowed are {METADATA_BYTES_MAX[role]}",
                hint="too many releases or deltas are published at once: retire old deltas",
            )
        return data

    def _signer(self, role: Role) -> CryptoSigner:
        signer = self._signers.get(role)
        if signer is None:
            raise MissingKeyError(
                f"the key of role {role} is missing", hint=f"put {role}.pem back into the folder keys"
            )
        return signer


def _parse(kind: type[_Signed], data: bytes) -> _Signed:
    """Our own document, as it was stored."""
    try:
        signed = Metadata.from_bytes(data).signed
    except RepositoryError as error:
        raise TrustError(f"stored {kind.type} document: {error}", hint="restore the database") from error
    if not isinstance(signed, kind):
        raise TrustError(f"stored {kind.type} document is a {signed.type}", hint="restore the database")
    return signed


def _expires(role: Role, now_ms: int) -> dt.datetime:
    """TUF counts in whole seconds."""
    return _EPOCH + dt.timedelta(seconds=(now_ms + LIFETIME_MS[role]) // 1000)


def _signer(role: Role, pem: bytes) -> CryptoSigner:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise MissingKeyError(
            f"the key of role {role} cannot be read: {error}", hint="restore it from a backup"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise MissingKeyError(f"the key of role {role} is no Ed25519 key", hint="restore it from a backup")
    return CryptoSigner(key)
