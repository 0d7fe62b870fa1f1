"""Which targets a device may believe in: python-tuf's verification, with version floors that survive a lost cache.

Bytes and a trusted time in, verified targets or an error out; no files, no clock. The workflow is that of the TUF
specification, section 5; the numbers below cite it. What python-tuf does not do, and this module adds:

- floors: versions seen before, from the caller's own durable record. With the cache of metadata lost, an older and
  still unexpired repository would otherwise be accepted (5.4.3 and 5.5.5 compare with the cache only);
- a caller's clock: python-tuf takes the time of the machine, which a device without a clock battery does not know.

The only module that imports `tuf` on a device. `TrustedMetadataSet` is internal to python-tuf, so its version is pinned
to a minor release; the tests would notice a change.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct
from tuf.api import exceptions
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from protocol.constants import METADATA_BYTES_MAX
from protocol.errors import ExpiredMetadataError, RollbackAttackError, TrustError
from protocol.ids import Digest, parse_digest
from protocol.release import ArtifactCustom

ROOT_ROTATIONS_MAX: Final = 256
"""Roots that one refresh walks through (5.3.3): a device that was offline for years still arrives."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

logging.getLogger("tuf").setLevel(logging.ERROR)  # its debug lines repeat what the errors say


class Floors(Struct, frozen=True, kw_only=True):
    """Lowest versions still acceptable. They only grow."""

    root: int = 1
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0


class Documents(Struct, frozen=True, kw_only=True):
    """Signed documents as they came, not yet believed."""

    roots: tuple[bytes, ...] = ()  # successors of the trusted root, in order
    timestamp: bytes
    snapshot: bytes
    targets: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A file that trusted keys have signed for: its exact length and digest, and how its chunks are checked."""

    path: str
    length: int
    digest: Digest
    custom: ArtifactCustom


@dataclass(frozen=True, slots=True)
class Verified:
    """Metadata that passed every check.

    Attributes:
        root: The newest trusted root document, to be kept as the next start of trust.
        floors: What the durable record has to hold before anything is done with the targets.
        targets: By path.
    """

    root: bytes
    floors: Floors
    targets: dict[str, Target]


def check_root(root: bytes) -> int:
    """Version of a root document that is its own proof; the start of trust comes from a person or an installer.

    Raises:
        TrustError: Not a root document, or not signed by its own keys.
    """
    return _start(root, 0).root.version


def verify(root: bytes, documents: Documents, floors: Floors, now_ms: int) -> Verified:
    """Verify a complete set of documents.

    Args:
        root: The newest root document that is already trusted.
        documents: What arrived.
        floors: From the durable record.
        now_ms: Trusted time, milliseconds since 1970; fixed for the whole refresh (5.1).

    Raises:
        RollbackAttackError: A version is below its floor.
        ExpiredMetadataError: The newest document of a role is past its date.
        TrustError: Anything else: signatures, hashes, sizes, versions, shapes.
    """
    _check_sizes(documents)
    trusted = _start(root, now_ms)
    newest_root = _walk_roots(trusted, root, documents.roots)
    try:
        # 5.4: signature, then expiry. The cached timestamp is not loaded first: the floors stand for it (5.4.3).
        timestamp = trusted.update_timestamp(documents.timestamp)
        _check_floor("timestamp", timestamp.version, floors.timestamp)
        _check_floor("snapshot", timestamp.snapshot_meta.version, floors.snapshot)
        # 5.5: hash and version from the timestamp, signature, expiry. 5.5.5 (listed roles never go back) is the
        # floor of targets below, since this repository has no other role yet.
        snapshot = trusted.update_snapshot(documents.snapshot)
        _check_floor("targets", snapshot.meta["targets.json"].version, floors.targets)
        # 5.6: hash and version from the snapshot, signature, expiry.
        targets = trusted.update_targets(documents.targets)
    except exceptions.ExpiredMetadataError as error:
        raise ExpiredMetadataError(
            f"metadata: {error}", hint="publish again, or correct the device's clock"
        ) from error
    except (exceptions.RepositoryError, KeyError) as error:
        raise TrustError(f"metadata: {error}") from error
    return Verified(
        root=newest_root,
        floors=Floors(
            root=max(trusted.root.version, floors.root),
            timestamp=timestamp.version,
            snapshot=snapshot.version,
            targets=targets.version,
        ),
        targets={path: _target(path, file) for path, file in targets.targets.items()},
    )


def _start(root: bytes, now_ms: int) -> TrustedMetadataSet:
    if len(root) > METADATA_BYTES_MAX["root"]:
        raise TrustError(f"root of {len(root)} bytes, allowed are {METADATA_BYTES_MAX['root']}")
    try:
        trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
    except exceptions.RepositoryError as error:
        raise TrustError(f"root: {error}") from error
    trusted.reference_time = _EPOCH + timedelta(milliseconds=now_ms)
    return trusted


def _walk_roots(trusted: TrustedMetadataSet, root: bytes, successors: tuple[bytes, ...]) -> bytes:
    """5.3: every root is signed by a threshold of its predecessor's keys and of its own; expiry counts at the end."""
    for successor in successors[:ROOT_ROTATIONS_MAX]:
        try:
            trusted.update_root(successor)
        except exceptions.RepositoryError as error:
            raise TrustError(f"root: {error}") from error
        root = successor
    return root


def _check_sizes(documents: Documents) -> None:
    sized = [
        ("timestamp", documents.timestamp),
        ("snapshot", documents.snapshot),
        ("targets", documents.targets),
    ]
    for role, data in sized + [("root", data) for data in documents.roots]:
        if len(data) > METADATA_BYTES_MAX[role]:
            raise TrustError(f"{role} of {len(data)} bytes, allowed are {METADATA_BYTES_MAX[role]}")


def _check_floor(role: str, version: int, floor: int) -> None:
    if version < floor:
        raise RollbackAttackError(
            f"{role} version {version} is older than {floor}, which this device has seen"
        )


def _target(path: str, file: Any) -> Target:
    """A target with our custom fields; signed, but a mistake of the signer is still an error and not a crash."""
    try:
        custom = msgspec.convert(file.custom, ArtifactCustom)
        return Target(path, int(file.length), parse_digest(file.hashes["sha256"]), custom)
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise TrustError(f"target {path[:200]}: {error}") from error
