"""Every MQTT topic of the protocol, and nowhere else a topic is spelled (SPEC section 4).

    wb1.<fleet>/md/<document>                  signed metadata, retained
    wb1.<fleet>/dev/<id>/desired               what a device should run, retained
    wb1.<fleet>/dev/<id>/report                what a device does run, retained
    wb1.<fleet>/dev/<id>/link                  the device's Will, retained
    wb1.<fleet>/dev/<id>/chunk                 answers to chunk requests
    wb1.<fleet>/dev/<id>/metadata              answers to metadata requests
    wb1.<fleet>/b/<digest>.<group>/<chunk>     chunks, retained
    wb1.<fleet>/req/<shard>/<id>               requests
    wb1.<fleet>/dev/<id>/renewal               a device asks for its next certificate
    wb1.<fleet>/dev/<id>/certificate           the answer
    wb1.<fleet>/enroll/claim.<claim>/request   a claim is made good: asks for a first certificate
    wb1.<fleet>/enroll/claim.<claim>/answer    the answer, retained

The three levels that differ between artifacts come first, because brokers index retained topics by them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol.constants import FLEET_TOPIC_PREFIX, GROUP_CHUNKS
from protocol.errors import TopicError
from protocol.ids import (
    ClaimId,
    DeviceId,
    Digest,
    FleetId,
    parse_claim_id,
    parse_device_id,
    parse_digest,
    parse_family,
)
from protocol.release import ARTIFACTS_ROLE, DIRECTOR_ROLE, releases_role

REQUEST_SHARDS: Final = 16
"""Requests are spread over topics, since three brokers grant `$share` and deliver nothing (SPEC section 4.4)."""

CLAIM_PREFIX: Final = "claim."
"""Before the number of a claim, as a topic level and as a name on the broker: no device id has a dot (SPEC section 10.2)."""

_DOCUMENTS: Final = ("timestamp", "snapshot", "targets", ARTIFACTS_ROLE, DIRECTOR_ROLE)


@dataclass(frozen=True, slots=True)
class ReportTopic:
    """`dev/<id>/report`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class LinkTopic:
    """`dev/<id>/link`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """`req/<shard>/<id>`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class DesiredTopic:
    """`dev/<id>/desired`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class ChunkAnswerTopic:
    """`dev/<id>/chunk`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class MetadataAnswerTopic:
    """`dev/<id>/metadata`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class KeysTopic:
    """`dev/<id>/keys`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class RenewalTopic:
    """`dev/<id>/renewal`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class CertificateTopic:
    """`dev/<id>/certificate`."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class ClaimRequestTopic:
    """`enroll/claim.<claim>/request`."""

    claim: ClaimId


@dataclass(frozen=True, slots=True)
class ClaimAnswerTopic:
    """`enroll/claim.<claim>/answer`."""

    claim: ClaimId


@dataclass(frozen=True, slots=True)
class ChunkTopic:
    """`b/<digest>.<group>/<chunk>`."""

    blob: Digest
    index: int


@dataclass(frozen=True, slots=True)
class MetadataTopic:
    """`md/<document>`: `root.<version>`, `timestamp`, `snapshot`, `targets`, or the name of a delegated role."""

    document: str


Topic = (
    ReportTopic
    | LinkTopic
    | RequestTopic
    | DesiredTopic
    | ChunkAnswerTopic
    | MetadataAnswerTopic
    | KeysTopic
    | RenewalTopic
    | CertificateTopic
    | ClaimRequestTopic
    | ClaimAnswerTopic
    | ChunkTopic
    | MetadataTopic
)


class Topics:
    """The topics of one fleet.

    Args:
        fleet: Name of the fleet; the first level of every topic.
    """

    def __init__(self, fleet: FleetId) -> None:
        self._first = f"{FLEET_TOPIC_PREFIX}.{fleet}"

    def metadata(self, document: str) -> str:
        """Topic of a signed document: `timestamp`, `snapshot`, `targets`, `root.<version>`, or a delegated role."""
        return f"{self._first}/md/{document}"

    def root(self, version: int) -> str:
        """Topic of one version of the root document; every version stays."""
        return self.metadata(f"root.{version}")

    def desired(self, device: DeviceId) -> str:
        """What `device` should run."""
        return f"{self._first}/dev/{device}/desired"

    def report(self, device: DeviceId) -> str:
        """What `device` last said about itself."""
        return f"{self._first}/dev/{device}/report"

    def link(self, device: DeviceId) -> str:
        """Whether the broker believes `device` to be connected; a hint only."""
        return f"{self._first}/dev/{device}/link"

    def chunk_answer(self, device: DeviceId) -> str:
        """Where answers to chunk requests of `device` arrive."""
        return f"{self._first}/dev/{device}/chunk"

    def metadata_answer(self, device: DeviceId) -> str:
        """Where answers to metadata requests of `device` arrive."""
        return f"{self._first}/dev/{device}/metadata"

    def keys(self, device: DeviceId) -> str:
        """Where content keys for `device` arrive, wrapped."""
        return f"{self._first}/dev/{device}/keys"

    def renewal(self, device: DeviceId) -> str:
        """Where `device` asks for its next certificate."""
        return f"{self._first}/dev/{device}/renewal"

    def certificate(self, device: DeviceId) -> str:
        """Where answers to that arrive."""
        return f"{self._first}/dev/{device}/certificate"

    def claim_request(self, claim: ClaimId) -> str:
        """Where a claim is made good."""
        return f"{self._first}/enroll/{CLAIM_PREFIX}{claim}/request"

    def claim_answer(self, claim: ClaimId) -> str:
        """What came of it."""
        return f"{self._first}/enroll/{CLAIM_PREFIX}{claim}/answer"

    def chunk(self, blob: Digest, index: int) -> str:
        """Topic of one chunk."""
        return f"{self._first}/b/{blob}.{index // GROUP_CHUNKS}/{index}"

    def chunk_group(self, blob: Digest, group: int) -> str:
        """Filter for the chunks `group * GROUP_CHUNKS` up to the next group."""
        return f"{self._first}/b/{blob}.{group}/+"

    def request(self, device: DeviceId) -> str:
        """Where `device` asks for what no cache has."""
        return f"{self._first}/req/{request_shard(device)}/{device}"

    def server_filters(self, shards: tuple[int, ...] = tuple(range(REQUEST_SHARDS))) -> tuple[str, ...]:
        """Filters of a server that answers the requests of `shards`."""
        reports = (f"{self._first}/dev/+/report", f"{self._first}/dev/+/link")
        return reports + tuple(f"{self._first}/req/{shard}/+" for shard in shards)

    def identity_filters(self) -> tuple[str, ...]:
        """Filters of a server that issues certificates."""
        return f"{self._first}/dev/+/renewal", f"{self._first}/enroll/+/request"

    def parse(self, topic: str) -> Topic:
        """Take a topic apart.

        Raises:
            TopicError: It is none of this fleet's topics.
        """
        levels = topic.split("/")
        if levels[0] == self._first and len(levels) in {3, 4}:
            parsed = _parse_levels(levels[1:])
            if parsed is not None:
                return parsed
        raise TopicError(f"topic {topic[:200]!r} is none of {self._first}")


def request_shard(device: DeviceId) -> int:
    """The shard that `device` sends its requests to; stable, spread evenly by SHA-256."""
    return hashlib.sha256(device.encode()).digest()[0] % REQUEST_SHARDS


_DEVICE_TOPICS: Final[dict[str, Callable[[DeviceId], Topic]]] = {
    "report": ReportTopic,
    "link": LinkTopic,
    "desired": DesiredTopic,
    "chunk": ChunkAnswerTopic,
    "metadata": MetadataAnswerTopic,
    "keys": KeysTopic,
    "renewal": RenewalTopic,
    "certificate": CertificateTopic,
}


def _parse_levels(levels: list[str]) -> Topic | None:
    match levels:
        case ["dev", device, leaf] if leaf in _DEVICE_TOPICS:
            return _DEVICE_TOPICS[leaf](parse_device_id(device))
        case ["enroll", claim, "request"] if claim.startswith(CLAIM_PREFIX):
            return ClaimRequestTopic(parse_claim_id(claim.removeprefix(CLAIM_PREFIX)))
        case ["enroll", claim, "answer"] if claim.startswith(CLAIM_PREFIX):
            return ClaimAnswerTopic(parse_claim_id(claim.removeprefix(CLAIM_PREFIX)))
        case ["req", shard, device] if shard == str(request_shard(DeviceId(device))):
            return RequestTopic(parse_device_id(device))
        case ["b", blob_group, index] if (
            index.isascii() and index.isdigit() and len(index) <= len(str(1 << 32))
        ):
            blob, _, group = blob_group.partition(".")
            if group == str(int(index) // GROUP_CHUNKS):
                return ChunkTopic(parse_digest(blob), int(index))
        case ["md", document] if document in _DOCUMENTS or _is_root(document) or _is_releases(document):
            return MetadataTopic(document)
    return None


def _is_releases(document: str) -> bool:
    family = document.removeprefix("releases.")
    return family != document and releases_role(parse_family(family)) == document


def _is_root(document: str) -> bool:
    version = document.removeprefix("root.")
    return (
        version != document and version.isascii() and version.isdigit() and len(version) <= len("2147483647")
    )
