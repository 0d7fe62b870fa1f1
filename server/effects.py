"""What the coordinator orders.

Effects are ordered, and `Save` is a barrier: what stands behind it happens only once the record is durable. A driver
may join the effects of several events, as long as every save of an event is durable before anything else of it
happens.
"""

from dataclasses import dataclass

from protocol.ids import DeviceId, Digest
from protocol.messages import Desired
from protocol.release import DeltaName, ReleaseFile
from protocol.trust import Target
from server.ports import Record


@dataclass(frozen=True, slots=True)
class Save:
    """Make a record durable before the effects behind this one."""

    record: Record


@dataclass(frozen=True, slots=True)
class PublishDesired:
    """Retain what a device should run; None takes the message away."""

    device: DeviceId
    desired: Desired | None


@dataclass(frozen=True, slots=True)
class PublishMetadata:
    """Retain the newest signed documents."""


@dataclass(frozen=True, slots=True)
class CacheBlob:
    """Let the broker retain all chunks of a blob."""

    name: Digest
    chunk_count: int


@dataclass(frozen=True, slots=True)
class UncacheBlob:
    """Let the broker forget the chunks of a blob; answered by `BlobUncached`."""

    name: Digest
    chunk_count: int


@dataclass(frozen=True, slots=True)
class AnswerChunks:
    """Send chunks to one device."""

    device: DeviceId
    name: Digest
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnswerMetadata:
    """Send the signed documents to one device."""

    device: DeviceId
    root_version: int
    roles: tuple[str, ...] = ()
    nonce: bytes = b""  # of a device that asks for the time, too


@dataclass(frozen=True, slots=True)
class AnswerKeys:
    """Send content keys to one device, if it has a certificate to wrap them for; with no artifacts, that it may not have them."""

    device: DeviceId
    blobs: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class BuildDelta:
    """Build a delta, and encrypt it where its name says so; answered by `DeltaBuilt` or `DeltaFailed`.

    The files are those of releases that hold base and result: they may describe the tensors of these two.
    """

    name: DeltaName
    base_files: tuple[ReleaseFile, ...] = ()
    result_files: tuple[ReleaseFile, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveBlobs:
    """Remove the blobs of a delta that is not signed any more; answered by `BlobsRemoved` once they are gone."""

    path: str  # of the target that it was
    names: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class SignMetadata:
    """Sign changed targets, or with nothing changed what expires soon; answered by `MetadataChanged` or `SigningFailed`."""

    added: tuple[Target, ...] = ()
    retired: tuple[str, ...] = ()
    deltas: tuple[DeltaName, ...] = ()  # those in `added`


Effect = (
    Save
    | PublishDesired
    | PublishMetadata
    | CacheBlob
    | UncacheBlob
    | AnswerChunks
    | AnswerMetadata
    | AnswerKeys
    | BuildDelta
    | RemoveBlobs
    | SignMetadata
)
