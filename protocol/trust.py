"""Which targets a device may believe in: python-tuf's verification, with version floors that survive a lost cache.

Bytes and a trusted time in, verified targets or an error out; no files, no clock. The workflow is that of the TUF
specification 1.0.34, section 5; the numbers below cite it. What python-tuf does not do, and this module adds:

- floors: versions seen before, from the caller's own durable record. With the cache of metadata lost, an older and
  still unexpired repository would otherwise be accepted (5.4.3 and 5.5.5 compare with the cache only);
- a caller's clock: python-tuf takes the time of the machine, which a device without a clock battery does not know;
- one key under two ids counts once (4.3: "only one unique key"): python-tuf counts ids.

What of section 5 is deliberately not here:

- 5.3.8, 5.4.5, 5.5.7, 5.6.6 (persist): the caller keeps the root and the floors. Timestamp, snapshot and targets are not kept:
  they are small, are only looked at when an update is asked for, and expired copies must never be in the way of new ones;
- 5.3.12 (consistent snapshots): documents arrive as a set and not by name from a mirror; a set that is torn does not verify;
- 5.4.3.1, equal versions: a timestamp that was seen before is verified like a new one, since nothing was kept of it;
- 5.6.7 below the first level, hash bins (TAP 15) and `path_hash_prefixes`: this protocol delegates once, by path (SPEC 8.1).

The only module that imports `tuf` on a device. `TrustedMetadataSet` is internal to python-tuf, so its version is pinned
to a minor release; the tests would notice a change.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct
from msgspec.structs import replace
from securesystemslib.signer import Signature  # type: ignore[attr-defined]  # public, but without __all__
from tuf.api import exceptions
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, but without __all__
    DelegatedRole,
    Role,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from protocol.constants import DELEGATED_MAX, metadata_bytes_max
from protocol.director import DIRECTOR_KEYS_MAX, KEY_BYTES
from protocol.errors import ExpiredMetadataError, RollbackAttackError, TopicError, TrustError
from protocol.ids import Digest, parse_digest
from protocol.release import DIRECTOR_ROLE, ArtifactCustom

ROOT_ROTATIONS_MAX: Final = 256
"""Roots that one refresh walks through (5.3.3): a device that was offline for years still arrives."""

TIME_FIELD: Final = "x-whimbrel-time-ms"
"""When a timestamp was signed, milliseconds since 1970 (SPEC 8.3): the only time that a device without a clock can believe."""

VERSION_MAX: Final = 1 << 63
"""A higher version would not fit into the durable record. A thief may sign it; nobody has to believe it."""

_TIME_MAX_MS: Final = 253_370_764_800_000
"""The year 9999, where dates end; whatever a broken clock says."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

logging.getLogger("tuf").setLevel(logging.ERROR)  # its debug lines repeat what the errors say


class DelegatedFloor(Struct, frozen=True, kw_only=True):
    """Lowest acceptable version of a delegated role, and for which keys that holds."""

    role: str
    version: int
    keys: tuple[str, ...]  # fingerprints, see `_fingerprint`


class Floors(Struct, frozen=True, kw_only=True):
    """Lowest versions, and the earliest time, still acceptable. They only grow, but for keys that were rotated (5.3.11, see `follow`)."""

    root: int = 1
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0
    time_ms: int = 0  # the latest instant that a timestamp was signed for: it is at least as late as that
    delegated: tuple[DelegatedFloor, ...] = ()  # by role; empty in records of older agents

    def numbers(self) -> dict[str, int]:
        """Every floor by name, for whoever compares two records."""
        top = {name: getattr(self, name) for name in ("root", "timestamp", "snapshot", "targets", "time_ms")}
        return top | {floor.role: floor.version for floor in self.delegated}


class Documents(Struct, frozen=True, kw_only=True):
    """Signed documents as they came, not yet believed."""

    roots: tuple[bytes, ...] = ()  # successors of the trusted root, in order
    timestamp: bytes
    snapshot: bytes
    targets: bytes
    delegated: tuple[tuple[str, bytes], ...] = ()  # of roles that targets delegates to, by name


@dataclass(frozen=True, slots=True)
class Target:
    """A file that trusted keys have signed for: its exact length and digest, and how its chunks are checked."""

    path: str
    length: int
    digest: Digest
    custom: ArtifactCustom


@dataclass(frozen=True, slots=True)
class Followed:
    """A root that proved to be the successor of the trusted one.

    Attributes:
        root: To be kept as the next start of trust.
        floors: What the durable record has to hold before that.
    """

    root: bytes
    floors: Floors


@dataclass(frozen=True, slots=True)
class VerifiedFiles:
    """As `Verified`, with targets as python-tuf has them (`tuf.api.metadata.TargetFile`)."""

    root: bytes
    floors: Floors
    files: dict[str, Any]
    until_ms: int
    director: tuple[bytes, ...] | None


@dataclass(frozen=True, slots=True)
class Verified:
    """Metadata that passed every check.

    Attributes:
        root: The newest trusted root document, to be kept as the next start of trust.
        floors: What the durable record has to hold before anything is done with the targets.
        targets: By path.
        until_ms: When the first of the documents ends.
        director: Keys that may say which of the releases a device should run (Ed25519, 32 bytes each); None where targets names no director,
            nothing where none of those that it names could sign such a wish.
    """

    root: bytes
    floors: Floors
    targets: dict[str, Target]
    until_ms: int
    director: tuple[bytes, ...] | None = None


def check_root(root: bytes) -> int:
    """Version of a root document that is its own proof; the start of trust comes from a person or an installer (5.2).

    Raises:
        TrustError: Not a root document, not signed by a threshold of its own keys, or one key counts twice.
    """
    return _start(root, 0).root.version


def follow(root: bytes, successor: bytes, floors: Floors) -> Followed:
    """Take one step along the chain of roots (5.3.3 to 5.3.9).

    A device keeps every step that it could verify, whatever becomes of the documents that came with it: so one that was
    away for years arrives in several goes. Expiry does not matter on the way (5.3.6).

    Args:
        root: The newest trusted root document.
        successor: What claims to be the next one.
        floors: From the durable record.

    Raises:
        TrustError: Not signed by a threshold of the keys of both, not the next version, or no root document.
    """
    trusted = _start(root, 0)
    before = trusted.root
    _check_size("root", successor)
    try:
        after = trusted.update_root(successor)  # 5.3.4, 5.3.5
    except exceptions.RepositoryError as error:
        raise TrustError(f"root: {error}") from error
    _check_root_keys(after)
    if after.version <= floors.root:
        return Followed(successor, floors)  # taken before, and the document lost: the floors are younger
    return Followed(successor, replace(_after_rotation(floors, before, after), root=after.version))


def verify(
    root: bytes,
    documents: Documents,
    floors: Floors,
    now_ms: int,
    roles: Collection[str] | None = None,
) -> Verified:
    """Verify a complete set of documents.

    Args:
        root: The newest root document that is already trusted.
        documents: What arrived.
        floors: From the durable record.
        now_ms: What the device takes for the time, milliseconds since 1970; fixed for the whole refresh (5.1). A clock that is
            behind what was signed does not count: metadata that is known to have expired stays so.
        roles: Delegated roles whose targets are wanted; None for all that targets delegates to.

    Raises:
        RollbackAttackError: A version is below its floor, or a role is no longer listed.
        ExpiredMetadataError: The newest document of a role is past its date.
        TrustError: Anything else: signatures, hashes, sizes, versions, shapes.
    """
    verified = verify_files(root, documents, floors, now_ms, roles)
    targets = {path: _target(path, file) for path, file in verified.files.items()}
    return Verified(verified.root, verified.floors, targets, verified.until_ms, verified.director)


def verify_files(
    root: bytes,
    documents: Documents,
    floors: Floors,
    now_ms: int,
    roles: Collection[str] | None = None,
) -> VerifiedFiles:
    """As `verify`, of a repository whose targets need not be artifacts of ours.

    Raises:
        TrustError: As `verify`.
    """
    _check_sizes(documents)
    for successor in documents.roots[:ROOT_ROTATIONS_MAX]:
        followed = follow(root, successor, floors)
        root, floors = followed.root, followed.floors
    trusted = _start(root, min(max(now_ms, floors.time_ms), _TIME_MAX_MS))
    # A kept document that is gone: its successors have to come first, or the world before a rotation would be back.
    if trusted.root.version < floors.root:
        raise RollbackAttackError(
            f"root version {trusted.root.version} is older than {floors.root}, which this device has seen"
        )
    try:
        # 5.3.10 and 5.4: expiry of the root; signatures, expiry. The cached timestamp is not loaded first: the floors stand
        # for it (5.4.3).
        timestamp = trusted.update_timestamp(documents.timestamp)
        _check_floor("timestamp", timestamp.version, floors.timestamp)
        _check_floor("snapshot", timestamp.snapshot_meta.version, floors.snapshot)
        # 5.5: hash from the timestamp, signatures, version, expiry. 5.5.5 is `_check_listed` and the floors below.
        snapshot = trusted.update_snapshot(documents.snapshot)
        _check_listed(snapshot, floors)
        # 5.6: hash from the snapshot, signatures, version, expiry.
        targets = trusted.update_targets(documents.targets)
        loaded = _load_delegated(trusted, targets, documents, floors, roles)
        director = _director(targets)
    except exceptions.ExpiredMetadataError as error:
        raise ExpiredMetadataError(
            f"metadata: {error}", hint="publish again, or correct the device's clock"
        ) from error
    except (exceptions.RepositoryError, KeyError) as error:
        raise TrustError(f"metadata: {error}") from error
    seen = Floors(
        root=trusted.root.version,
        timestamp=timestamp.version,
        snapshot=snapshot.version,
        targets=targets.version,
        time_ms=max(floors.time_ms, _signed_time_ms(timestamp)),
        delegated=_delegated_floors(floors, targets, loaded),
    )
    ends = [document.expires for document in (trusted.root, timestamp, snapshot, targets, *loaded.values())]
    return VerifiedFiles(root, seen, _found_targets(targets, loaded), _milliseconds(min(ends)), director)


def verify_time(root: bytes, statement: bytes, signatures: Mapping[str, str]) -> None:
    """Check that a threshold of the keys of `timestamp` has signed what time it is (`director.time_statement`).

    Args:
        root: The newest trusted root document.
        statement: What must have been signed.
        signatures: Hexadecimal, by key id.

    Raises:
        TrustError: They have not.
    """
    given = {keyid: Signature(keyid, signature) for keyid, signature in signatures.items()}
    try:
        _start(root, 0).root.verify_delegate("timestamp", statement, given)
    except exceptions.RepositoryError as error:
        raise TrustError(f"time: {error}") from error


def is_signed(key: bytes, statement: bytes, signature: bytes) -> bool:
    """Whether a director's statement (`director.desired_statement`) was signed with this key (Ed25519, RFC 8032)."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_time_ms(timestamp: Timestamp) -> int:
    """When a timestamp says that it was signed; 0 if it does not say so. Nothing is taken from the device's own clock.

    Later than its own end it cannot have been, or a mistake would keep this device from everything that is signed afterwards.
    """
    signed_ms = timestamp.unrecognized_fields.get(TIME_FIELD)
    if type(signed_ms) is not int:
        return 0
    return min(signed_ms, _milliseconds(timestamp.expires))


def _milliseconds(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(milliseconds=1)


# --- the chain of roots -----------------------------------------------------------------------------------------


def _start(root: bytes, now_ms: int) -> TrustedMetadataSet:
    _check_size("root", root)
    try:
        trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
    except exceptions.RepositoryError as error:
        raise TrustError(f"root: {error}") from error
    _check_root_keys(trusted.root)
    trusted.reference_time = _EPOCH + timedelta(milliseconds=now_ms)
    return trusted


def _check_root_keys(root: Root) -> None:
    for name, role in root.roles.items():
        _fingerprints(name, role, root.keys)


def _after_rotation(floors: Floors, before: Root, after: Root) -> Floors:
    """5.3.11: whoever had stolen keys may have signed version 2^63, and no honest one would ever be newer.

    Keys of timestamp or snapshot that changed in any way let both floors go, as the specification has it, and the floor of time
    with them: the same thief may have signed a year that never comes. The floor of
    targets stays, which is stricter: a floor is only ever taken from a document that its own keys signed, so the
    online keys cannot have raised it. It goes once the keys that are left of those before are below the threshold, so
    that nothing that was signed under the old root would be accepted anyway. Floors of delegated roles have their own keys.
    """

    def keys(root: Root, name: str) -> frozenset[str]:
        return _fingerprints(name, root.roles[name], root.keys)

    if any(keys(before, name) != keys(after, name) for name in ("timestamp", "snapshot")):
        floors = replace(floors, timestamp=0, snapshot=0, time_ms=0)
    if not _counts(keys(before, "targets"), keys(after, "targets"), after.roles["targets"]):
        floors = replace(floors, targets=0)
    return floors


def _counts(before: Collection[str], after: frozenset[str], role: Role) -> bool:
    """Whether what the keys before have signed could be accepted now: only then a floor that they set has to hold."""
    return len(after.intersection(before)) >= role.threshold


def _fingerprints(name: str, role: Role, keys: Mapping[str, Any]) -> frozenset[str]:
    """Which keys sign for a role, whatever their ids.

    Raises:
        TrustError: A key is listed under two ids, and would count twice towards the threshold (4.3, 5.3.4).
    """
    found = [_fingerprint(keys[keyid]) for keyid in role.keyids if keyid in keys]
    if len(set(found)) != len(found):
        raise TrustError(f"role {name[:80]} lists one key under two ids")
    return frozenset(found)


def _fingerprint(key: Any) -> str:
    """16 hexadecimal digits for the key itself; its id is only a name that the signer chose, its scheme a way to use it."""
    public = "".join(str(key.keyval.get("public", "")).split()).lower()  # however it is spelled
    return hashlib.sha256(public.encode()).hexdigest()[:16]


# --- delegations ------------------------------------------------------------------------------------------------


def _delegations(targets: Targets) -> dict[str, DelegatedRole]:
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return dict(targets.delegations.roles)


def _delegate_keys(name: str, targets: Targets) -> frozenset[str]:
    assert targets.delegations is not None
    return _fingerprints(name, _delegations(targets)[name], targets.delegations.keys)


def _director(targets: Targets) -> tuple[bytes, ...] | None:
    """Keys of the director; a wish has one signature, so a higher threshold is never reached."""
    role = _delegations(targets).get(DIRECTOR_ROLE)
    if role is None or targets.delegations is None:
        return None
    _delegate_keys(DIRECTOR_ROLE, targets)
    if role.threshold != 1:
        return ()
    found = (targets.delegations.keys.get(keyid) for keyid in role.keyids)
    keys = (_public_bytes(key) for key in found if key is not None and key.keytype == "ed25519")
    return tuple(key for key in keys if len(key) == KEY_BYTES)[:DIRECTOR_KEYS_MAX]


def _public_bytes(key: Any) -> bytes:
    try:
        return bytes.fromhex(
            key.keyval["public"]
        )  # a text: a key that says something else is refused when it is read
    except ValueError:
        return b""


def _load_delegated(
    trusted: TrustedMetadataSet,
    targets: Targets,
    documents: Documents,
    floors: Floors,
    roles: Collection[str] | None,
) -> dict[str, Targets]:
    """5.6.7 for one level: hash and version from the snapshot, a threshold of the keys that targets names, expiry."""
    given = dict(documents.delegated)
    known = {floor.role: floor for floor in floors.delegated}
    _check_floor("targets", targets.version, floors.targets)
    loaded: dict[str, Targets] = {}
    for name, role in _delegations(targets).items():
        if roles is not None and name not in roles:
            continue
        keys = _delegate_keys(name, targets)
        data = given.get(name)
        if data is None:
            raise TrustError(f"the document of role {name[:80]} is missing")
        document = trusted.update_delegated_targets(data, name, "targets")
        floor = known.get(name)
        is_kept = floor is not None and _counts(floor.keys, keys, role)
        _check_floor(name, document.version, floor.version if floor is not None and is_kept else 0)
        loaded[name] = document
    return loaded


def _delegated_floors(
    floors: Floors, targets: Targets, loaded: Mapping[str, Targets]
) -> tuple[DelegatedFloor, ...]:
    """Floors of what was loaded, and those from before of what was not."""
    delegated = {floor.role: floor for floor in floors.delegated}
    for name, document in loaded.items():
        keys = _delegate_keys(name, targets)
        delegated[name] = DelegatedFloor(role=name, version=document.version, keys=tuple(sorted(keys)))
    return tuple(delegated[name] for name in sorted(delegated))


def _found_targets(targets: Targets, loaded: Mapping[str, Targets]) -> dict[str, Any]:
    """What the search of 5.6.7 would find for each path: targets itself first, then its delegations in order."""
    found = dict(targets.targets)
    for name, document in loaded.items():
        for path, file in document.targets.items():
            if path not in found and _speaks_for(name, path, targets, loaded):
                found[path] = file
    return found


def _speaks_for(name: str, path: str, targets: Targets, loaded: Mapping[str, Targets]) -> bool:
    """Whether the search for `path` gets to role `name`: the path is delegated to it, and nobody before it ends the search."""
    for other in _delegations(targets).values():
        if not other.is_delegated_path(path):
            continue
        if other.name == name:
            return True
        if other.terminating or other.name not in loaded:
            return False  # 5.6.7.2.1; or what stands there is not known
    return False


# --- checks -----------------------------------------------------------------------------------------------------


def _check_sizes(documents: Documents) -> None:
    """5.3.3, 5.4.1, 5.5.1, 5.6.1: nothing is parsed that is longer than a signer of ours would make it."""
    _check_size("timestamp", documents.timestamp)
    _check_size("snapshot", documents.snapshot)
    _check_size("targets", documents.targets)
    if len(documents.delegated) > DELEGATED_MAX:
        raise TrustError(f"{len(documents.delegated)} delegated documents, allowed are {DELEGATED_MAX}")
    for role, data in documents.delegated:
        _check_size(role, data)


def _check_size(role: str, data: bytes) -> None:
    bytes_max = metadata_bytes_max(role)
    if len(data) > bytes_max:
        raise TrustError(f"{role[:80]} of {len(data)} bytes, allowed are {bytes_max}")


def _check_listed(snapshot: Snapshot, floors: Floors) -> None:
    """5.5.5: what was listed must continue to be, or a role could be made to disappear together with its floor.

    Of targets this needs no check of its own: without it, 5.6 fails.
    """
    for floor in floors.delegated:
        if f"{floor.role}.json" not in snapshot.meta:
            raise RollbackAttackError(
                f"snapshot version {snapshot.version} no longer lists {floor.role}, which this device has seen"
            )


def _check_floor(role: str, version: int, floor: int) -> None:
    """5.4.3, 5.5.5."""
    if version > VERSION_MAX:
        raise TrustError(f"{role} has a version of more than 63 bits")
    if version < floor:
        raise RollbackAttackError(
            f"{role} version {version} is older than {floor}, which this device has seen"
        )


def _target(path: str, file: Any) -> Target:
    """A target with our custom fields; signed, but a mistake of the signer is still an error and not a crash."""
    try:
        custom = msgspec.convert(file.custom, ArtifactCustom)
        return Target(path, int(file.length), parse_digest(file.hashes["sha256"]), custom)
    except (msgspec.ValidationError, KeyError, TopicError) as error:
        raise TrustError(f"target {path[:200]}: {error}") from error
