"""What can happen to the coordinator: nouns in."""

from dataclasses import dataclass, field

from protocol.ids import ClaimId, DeviceId, Digest
from protocol.messages import CertificateRequest, Report, Request
from protocol.release import DeltaName, Encryption, InPlaceNeeds
from server.fleet.registry import DeviceRecord
from server.ports import CacheEntry, DeltaRefusal, IdleDelta, StoredBlob
from server.releases.catalog import Catalog
from server.rollouts.records import Labels, MemberRecord, Order, RolloutRecord


@dataclass(frozen=True, slots=True)
class Started:
    """The server begins; what the store knows. Always the first event."""

    catalog: Catalog
    devices: list[DeviceRecord]
    rollouts: list[RolloutRecord]
    members: list[MemberRecord]
    refusals: list[DeltaRefusal]
    idle: list[IdleDelta]
    cached: list[CacheEntry]
    labels: list[Labels] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)  # that no server has answered


@dataclass(frozen=True, slots=True)
class BrokerConnected:
    """A connection to a broker that may have forgotten everything."""


@dataclass(frozen=True, slots=True)
class ReportReceived:
    """A device said something about itself."""

    device: DeviceId
    report: Report


@dataclass(frozen=True, slots=True)
class LinkReceived:
    """The broker said something about a device's connection."""

    device: DeviceId
    is_online: bool


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A device asks for chunks, for metadata or for keys."""

    device: DeviceId
    request: Request


@dataclass(frozen=True, slots=True)
class RolloutRequested:
    """An operator wants a rollout; it is in the store already."""

    rollout: RolloutRecord


@dataclass(frozen=True, slots=True)
class RolloutOrdered:
    """An operator wants something done with a rollout; it is in the store already."""

    order: Order


@dataclass(frozen=True, slots=True)
class LabelsChanged:
    """An operator has labelled devices; it is in the store already."""

    labels: list[Labels]


@dataclass(frozen=True, slots=True)
class MetadataChanged:
    """Something was signed: a release by an operator, deltas by this server, or a refresh."""

    catalog: Catalog


@dataclass(frozen=True, slots=True)
class SigningFailed:
    """Deltas could not be signed; whole files go out instead."""

    deltas: tuple[DeltaName, ...]
    retry_at_ms: int


@dataclass(frozen=True, slots=True)
class DeltaBuilt:
    """A delta is in the blob store."""

    name: DeltaName
    blob: StoredBlob
    memory_bytes: int  # what a device needs to apply it
    in_place: InPlaceNeeds | None = None  # and what to apply it to the base itself
    encryption: Encryption | None = None  # of the blob


@dataclass(frozen=True, slots=True)
class DeltaFailed:
    """A delta could not be built."""

    name: DeltaName
    detail: str


@dataclass(frozen=True, slots=True)
class BlobUncached:
    """The broker confirmed that it retains no chunk of a blob any more."""

    name: Digest


@dataclass(frozen=True, slots=True)
class BlobsRemoved:
    """The blobs of a delta that is not signed any more are gone from the blob store."""

    path: str


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """`Coordinator.deadline()` has passed."""


Event = (
    Started
    | BrokerConnected
    | ReportReceived
    | LinkReceived
    | RequestReceived
    | RolloutRequested
    | RolloutOrdered
    | LabelsChanged
    | MetadataChanged
    | SigningFailed
    | DeltaBuilt
    | DeltaFailed
    | BlobUncached
    | BlobsRemoved
    | DeadlineReached
)


@dataclass(frozen=True, slots=True)
class ClaimUsed:
    """A claim is made good.

    Attributes:
        claim: Its number.
        topic: On which the request arrived.
        request: What is asked for.
    """

    claim: ClaimId
    topic: str
    request: CertificateRequest


@dataclass(frozen=True, slots=True)
class RenewalRequested:
    """A device asks for its next certificate.

    Attributes:
        device: Which.
        topic: On which the request arrived.
        request: What is asked for.
    """

    device: DeviceId
    topic: str
    request: CertificateRequest


IdentityEvent = ClaimUsed | RenewalRequested
"""What the coordinator does not hear of: `enrolment.py` sees to it."""
