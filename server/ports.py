"""What the server's core needs from the world: ports with their contracts, and the records that cross them.

No adapter is imported here. Records are versioned by the store's schema and named independently of their classes.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from protocol.delta.format import Profile
from protocol.ids import DeviceId, Digest, Family, Version
from protocol.messages import KeyAnswer
from protocol.release import (
    ChunkTree,
    DeltaName,
    Encryption,
    InPlaceNeeds,
    Release,
    ReleaseFile,
    delta_target,
)
from protocol.trust import Documents, Target
from server.alerts.records import Trace
from server.audit import Act
from server.fleet.history import DeviceEvent
from server.fleet.registry import DeviceRecord
from server.rollouts.records import Decision, Labels, MemberRecord, Order, RolloutRecord


class StoredBlob(Struct, frozen=True, kw_only=True):
    """A blob that is complete and durable in the blob store, with the tree over its chunks."""

    digest: Digest
    length: int
    tree: ChunkTree


class DeltaSize(Struct, frozen=True, kw_only=True):
    """What building a delta showed.

    Attributes:
        length: Of the delta, which is the same once it is encrypted.
        memory_bytes: That its decoder declares.
        in_place: What it takes where its base is rewritten; None if it was not made for that.
    """

    length: int
    memory_bytes: int
    in_place: InPlaceNeeds | None


class EncryptedBlob(Struct, frozen=True, kw_only=True):
    """An artifact as it travels, and how it is encrypted."""

    blob: StoredBlob
    encryption: Encryption


class Repository(Struct, frozen=True, kw_only=True):
    """Everything that was signed: all versions of root, oldest first, and the newest of the other documents."""

    roots: tuple[bytes, ...]
    documents: Documents


class ReleaseRecord(Struct, frozen=True, kw_only=True):
    """A release that was added; devices learn of it once it is published."""

    release: Release
    added_ms: int
    published_ms: int | None = None
    is_encrypted: bool = False  # its files, and deltas from and to them, travel encrypted


class DeltaRefusal(Struct, frozen=True, kw_only=True):
    """A delta that was built and is not worth sending; never built again."""

    base: Digest
    result: Digest
    profile: Profile = Profile.SMALL
    is_encrypted: bool = False
    length: int

    @property
    def name(self) -> DeltaName:
        """Which delta."""
        return DeltaName(self.base, self.result, self.profile, self.is_encrypted)

    @property
    def path(self) -> str:
        """Of the target that it would have been."""
        return delta_target(*self.name)


class IdleDelta(Struct, frozen=True, kw_only=True):
    """A delta that nobody needs; kept until its blobs are gone."""

    path: str  # of its target
    since_ms: int  # when that was noticed
    blob: StoredBlob


class IdleDeltaRemoval(Struct, frozen=True, kw_only=True):
    """A delta is needed again, or it is gone."""

    path: str


class ContentKeyRecord(Struct, frozen=True, kw_only=True):
    """The key of an encrypted artifact."""

    blob: Digest  # the artifact as it travels
    locked: bytes  # see `adapters/vault.py`


class ContentKeyRemoval(Struct, frozen=True, kw_only=True):
    """An artifact is gone, and with it the use of its key."""

    blob: Digest


class CacheEntry(Struct, frozen=True, kw_only=True):
    """A blob whose chunks the broker was told to retain."""

    name: Digest
    length: int


class CacheRemoval(Struct, frozen=True, kw_only=True):
    """The broker confirmed that it retains no chunk of this blob any more."""

    name: Digest


Record = (
    DeviceRecord
    | DeviceEvent
    | RolloutRecord
    | MemberRecord
    | Decision
    | Order
    | DeltaRefusal
    | IdleDelta
    | IdleDeltaRemoval
    | CacheEntry
    | CacheRemoval
)


KeyChange = ContentKeyRecord | ContentKeyRemoval
"""What no coordinator decides: keys never come near it."""


class Clock(Protocol):
    """Wall-clock time."""

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        ...


class BlobStore(Protocol):
    """Byte strings by name; what is there is complete and never changes."""

    def put(self, data: bytes) -> StoredBlob:
        """Store `data` and the index blobs of its chunk tree; durable on return.

        Raises:
            StorageError: The folder cannot be written.
        """
        ...

    def put_file(self, path: Path) -> StoredBlob:
        """Like `put`, for the bytes of a file, in bounded memory."""
        ...

    def describe(self, digest: Digest) -> StoredBlob:
        """Read a blob from end to end.

        Raises:
            StorageError: It is not there, or its bytes no longer have that digest.
        """
        ...

    def read_chunk(self, name: Digest, index: int) -> bytes:
        """Payload of one chunk of a data or index blob.

        Raises:
            StorageError: There is no such chunk.
        """
        ...

    def remove(self, name: Digest) -> None:
        """Remove a blob; none of that name is no error.

        Raises:
            StorageError: The folder cannot be written.
        """
        ...

    def path(self, name: Digest) -> Path:
        """Where a blob lies, for worker processes that read it."""
        ...


class Records(Protocol):
    """What a coordinator has written, and begins with. The simulator's server keeps it in memory, with the same answers."""

    def save(self, records: Sequence[Record]) -> None:
        """Write all records in one transaction; a record replaces the one with its key, the last of several counts.

        A rollout is created otherwise: the record of one that there is not is dropped.
        """
        ...

    def devices(self) -> list[DeviceRecord]:
        """Every device that ever reported, in the order of their names."""
        ...

    def rollouts(self) -> list[RolloutRecord]:
        """Every rollout, oldest first."""
        ...

    def members(self, rollout: str | None = None) -> list[MemberRecord]:
        """What rollouts asked of devices, and what came of it; in the order of rollouts and devices by name."""
        ...

    def refusals(self) -> list[DeltaRefusal]:
        """Deltas that are not worth sending, in any order."""
        ...

    def idle_deltas(self) -> list[IdleDelta]:
        """Deltas that nobody needs, in the order of their paths."""
        ...

    def cached(self) -> list[CacheEntry]:
        """Blobs that a broker may retain, in any order."""
        ...

    def create_rollout(self, make: Callable[[int, list[RolloutRecord]], RolloutRecord]) -> RolloutRecord:
        """Store a new rollout in a transaction; `make` gets its number and all rollouts so far."""
        ...

    def order_rollout(
        self, rollout: str, make: Callable[[RolloutRecord | None, list[Order]], Order]
    ) -> Order:
        """Store an order in a transaction that excludes every other one; `make` gets the rollout and the orders so far."""
        ...

    def orders(self, rollout: str | None = None) -> list[Order]:
        """What operators ordered, by the name of the rollout, oldest first."""
        ...

    def decisions(self, rollout: str) -> list[Decision]:
        """What was decided about a rollout, oldest first."""
        ...


class Store(Records, Protocol):
    """The truth: every answer comes from what was committed, every write is durable on return and excludes every other one."""

    def save(self, records: Sequence[Record | KeyChange | Trace]) -> None:
        """As `Records.save`, content keys and what is noted or told among them."""
        ...

    def device_events(self, device: DeviceId, count_max: int) -> list[DeviceEvent]:
        """What became of a device lately, oldest first."""
        ...

    def forget_device_events(self, before_ms: int) -> None:
        """Drop what is older than `before_ms`."""
        ...

    def content_key(self, blob: Digest) -> ContentKeyRecord | None:
        """The key of an encrypted artifact."""
        ...

    def has_content_keys(self) -> bool:
        """Whether there are any."""
        ...

    def releases(self) -> list[ReleaseRecord]:
        """Every release, in the order in which they were added."""
        ...

    def release(self, family: Family, version: Version) -> ReleaseRecord | None:
        """One release."""
        ...

    def add_release(self, record: ReleaseRecord, traces: Sequence[Trace] = ()) -> None:
        """Store a draft, and `traces` with it; a draft of the same name is replaced.

        Raises:
            AlreadyPublishedError: A published release has this name.
        """
        ...

    def repository(self) -> Repository | None:
        """What was signed last; None before `init`."""
        ...

    def sign(
        self,
        update: Callable[[Repository], Repository],
        *published: ReleaseRecord,
        traces: Sequence[Trace] = (),
    ) -> Repository:
        """Replace the repository by `update(repository)` in one transaction that excludes every other signer.

        Args:
            update: Signs; what it raises leaves everything as it was.
            published: Releases that become published in the same transaction.
            traces: What is noted and told with it, unless nothing changes.

        Raises:
            AlreadyPublishedError: One of them has been published before.
        """
        ...

    def create_rollout(
        self,
        make: Callable[[int, list[RolloutRecord]], RolloutRecord],
        act: Callable[[RolloutRecord], Act] | None = None,
    ) -> RolloutRecord:
        """Store a new rollout and what is noted of it in a transaction; `make` gets its number and all rollouts so far."""
        ...

    def order_rollout(
        self,
        rollout: str,
        make: Callable[[RolloutRecord | None, list[Order]], Order],
        act: Callable[[Order], Act] | None = None,
    ) -> Order:
        """Store an order and what is noted of it in a transaction that excludes every other one; `make` gets the rollout and the orders so far."""
        ...

    def label(self, labels: Labels, acts: Sequence[Act] = ()) -> None:
        """Replace the labels of a device."""
        ...

    def labels(self) -> list[Labels]:
        """The labels of all devices that have some."""
        ...

    def changes(self) -> int:
        """Grows with every release that is published and every rollout, order or label, by any process."""
        ...

    def close(self) -> None:
        """Release the database."""
        ...


class Transport(Protocol):
    """The way to the broker. Everything is sent in the order of the calls, except answers, which overtake.

    While there is no connection, what is handed over is dropped: the coordinator sends the whole state again once it
    hears `BrokerConnected`.
    """

    @property
    def is_connected(self) -> bool:
        """Whether the broker accepted us and our subscriptions."""
        ...

    def publish_desired(self, device: DeviceId, payload: bytes) -> None:
        """Retain what a device should run, signed or not; nothing takes the message away."""
        ...

    def publish_documents(self, repository: Repository) -> None:
        """Retain all signed documents, in an order in which a reader of the stream can verify them."""
        ...

    def cache_blob(self, name: Digest, chunk_count: int) -> None:
        """Retain all chunks of a blob; they are read while they are sent."""
        ...

    def uncache_blob(self, name: Digest, chunk_count: int) -> None:
        """Take the chunks of a blob away; `BlobUncached` follows when the broker confirmed it."""
        ...

    def answer_chunks(self, device: DeviceId, name: Digest, chunks: Iterable[int]) -> None:
        """Send chunks to one device, paced; a chunk that already waits for it is not queued twice."""
        ...

    def answer_metadata(self, device: DeviceId, bundle: bytes) -> None:
        """Send the signed documents to one device."""
        ...

    def answer_keys(self, device: DeviceId, answer: KeyAnswer) -> None:
        """Send wrapped content keys to one device, or why there are none."""
        ...


class DeltaBuilder(Protocol):
    """Builds deltas outside this process; `DeltaBuilt` or `DeltaFailed` follows for every call of `build`."""

    def build(
        self,
        name: DeltaName,
        base_files: Sequence[ReleaseFile] = (),
        result_files: Sequence[ReleaseFile] = (),
    ) -> None:
        """Start, or queue, one build.

        Args:
            name: Base and result.
            base_files: Of a release that holds the base: an ONNX model describes the tensors of the file beside it.
            result_files: Likewise for the result.
        """
        ...


__all__ = [
    "BlobStore",
    "CacheEntry",
    "CacheRemoval",
    "Clock",
    "ContentKeyRecord",
    "ContentKeyRemoval",
    "Decision",
    "DeltaBuilder",
    "DeltaRefusal",
    "DeviceRecord",
    "EncryptedBlob",
    "IdleDelta",
    "IdleDeltaRemoval",
    "Labels",
    "MemberRecord",
    "Order",
    "Record",
    "Records",
    "ReleaseRecord",
    "Repository",
    "RolloutRecord",
    "Store",
    "StoredBlob",
    "Target",
    "Transport",
]
