"""The server's decisions: what each device should run, which deltas are built, what the broker retains. Pure.

`handle(event, now_ms)` returns orders; see `effects.py` for their contract. Nothing here waits, reads a clock or opens
anything, so a simulator can run a thousand of these in virtual time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from protocol.chunks import chunk_count
from protocol.director import DESIRED_LIFE_MS
from protocol.errors import MessageError
from protocol.ids import DeviceId, Digest
from protocol.messages import ChunkRequest, KeyRequest, decode_window
from protocol.release import Release
from server.effects import (
    AnswerChunks,
    AnswerKeys,
    AnswerMetadata,
    CacheBlob,
    Effect,
    PublishDesired,
    PublishMetadata,
    Save,
    SignMetadata,
    UncacheBlob,
)
from server.events import (
    BlobsRemoved,
    BlobUncached,
    BrokerConnected,
    DeadlineReached,
    DeltaBuilt,
    DeltaFailed,
    Event,
    LabelsChanged,
    LinkReceived,
    MetadataChanged,
    ReportReceived,
    RequestReceived,
    RolloutOrdered,
    RolloutRequested,
    SigningFailed,
    Started,
)
from server.fleet.history import event_of
from server.fleet.registry import (
    DeviceRecord,
    Registry,
    is_news,
    is_waited_for,
    next_desired_sequence,
    runs,
)
from server.ports import CacheEntry, CacheRemoval
from server.releases.catalog import Catalog
from server.releases.delta_garbage import head_releases
from server.releases.delta_planner import plan_cache
from server.releases.delta_stock import GRACE_MS, DeltaStock
from server.releases.entitlement import readable_blobs
from server.rollouts.campaign import Campaign, Invitation, Sighting
from server.rollouts.records import UNDECIDED
from server.rollouts.states import ACTIVE
from server.rollouts.steering import Steering

RETAINED_BYTES_MAX: Final = 512 << 20
"""Default budget of retained chunks: they are the broker's memory."""

WISH_PERIOD_MS: Final = DESIRED_LIFE_MS * 2 // 7
"""Wishes that nobody has answered are signed anew that often: a server may be off for five days before one of them ends."""


@dataclass(frozen=True, slots=True)
class CoordinatorLimits:
    """What the coordinator may use.

    Attributes:
        retained_bytes_max: Bytes of chunks that the broker is asked to retain.
        devices_max: Devices that are taken notice of; any client of the broker can invent one.
        delta_grace_ms: How long a delta stays that nobody needs.
        keeps_history: Whether what becomes of each device is saved, for people to look at.
    """

    retained_bytes_max: int = RETAINED_BYTES_MAX
    devices_max: int = 200_000
    delta_grace_ms: int = GRACE_MS
    keeps_history: bool = False


class Coordinator:
    """Decides for one fleet.

    Args:
        limits: What it may use.
    """

    def __init__(self, limits: CoordinatorLimits | None = None) -> None:
        self.limits = limits or CoordinatorLimits()
        self.registry = Registry()
        self.deltas = DeltaStock(self.registry, self._heads, self.limits.delta_grace_ms)
        self.rollouts = Steering(self.registry, self.deltas, self._put_device, self._plan_cache)
        self.cached: dict[Digest, int] = {}  # lengths of blobs that the broker should retain
        self._leaving: dict[Digest, int] = {}  # lengths of blobs that it should forget
        self._is_refreshing = False
        self._refresh_ms = 0
        self._wishes_ms: int | None = None  # when those that wait are signed anew
        self._effects: list[Effect] = []
        self._handlers: dict[type[Any], Callable[[Any, int], None]] = {
            Started: self._on_started,
            BrokerConnected: self._on_connected,
            ReportReceived: self._on_report,
            LinkReceived: self._on_link,
            RequestReceived: self._on_request,
            RolloutRequested: self._on_rollout,
            RolloutOrdered: self._on_order,
            LabelsChanged: self._on_labels,
            MetadataChanged: self._on_metadata,
            SigningFailed: self._on_signing_failed,
            DeltaBuilt: self._on_built,
            DeltaFailed: self._on_build_failed,
            BlobUncached: self._on_uncached,
            BlobsRemoved: self._on_removed,
            DeadlineReached: self._on_deadline,
        }

    @property
    def campaigns(self) -> dict[str, Campaign]:
        """Rollouts by name: all that go on, and those that ever asked anybody."""
        return self.rollouts.campaigns

    @property
    def catalog(self) -> Catalog:
        """What is signed."""
        return self.deltas.catalog

    def handle(self, event: Event, now_ms: int) -> tuple[Effect, ...]:
        """Take in what happened; returns what to do, in order."""
        self._effects = self.rollouts.effects = []
        self._handlers[type(event)](event, now_ms)
        return tuple(self._effects)

    def deadline(self) -> int | None:
        """When `DeadlineReached` is due, if nothing happens before."""
        deadlines = [campaign.deadline() for campaign in self.campaigns.values()]
        deadlines += [self.deltas.deadline(), self._wishes_ms]
        if not self._is_refreshing:
            deadlines.append(self._refresh_ms or self.catalog.refresh_ms)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    # Events

    def _on_started(self, event: Started, now_ms: int) -> None:
        self._effects += self.deltas.start(event.catalog, event.refusals, event.idle, now_ms)
        self.registry.load(event.devices)
        for labels in event.labels:
            self.registry.label(labels.device, labels.labels)
        self.rollouts.load(event.rollouts, event.members)
        self.cached = {entry.name: entry.length for entry in event.cached}
        self.rollouts.advance_all(now_ms)
        for order in event.orders:
            self.rollouts.obey(order, now_ms)
        self._plan_cache()
        self._refresh_if_due(now_ms)

    def _on_connected(self, _: BrokerConnected, now_ms: int) -> None:
        """The broker may be new, or have lost its memory: everything that it should hold is sent again."""
        self._effects.append(PublishMetadata())
        self._effects += [UncacheBlob(name, chunk_count(length)) for name, length in self._leaving.items()]
        self._effects += [CacheBlob(name, chunk_count(length)) for name, length in self.cached.items()]
        self._wish_again([device for device in self.registry if device.desired_sequence], now_ms)

    def _on_report(self, event: ReportReceived, now_ms: int) -> None:
        before = self.registry.get(event.device)
        if event.report.device != event.device or not is_news(before, event.report) or self._is_full(before):
            return
        record = msgspec.structs.replace(before, report=event.report, seen_ms=now_ms)
        self._put_device(record)
        self._tell(before, record, now_ms)
        update = event.report.update
        campaign = self.campaigns.get(update.rollout) if update else None
        if update and campaign and self._is_credible(campaign, record):
            seen = Sighting(event.report.state, is_empty=not event.report.version)
            member = campaign.observe(event.device, update, now_ms, seen)
            if member:
                self._effects.append(Save(member))
                self.rollouts.advance(campaign, now_ms)
        self._reconsider(before, record, now_ms)
        self._speak_above(event.device)

    def _speak_above(self, device: DeviceId) -> None:
        """Ask again for what a rollout under way wants: somebody else has asked since, and the device ignores numbers below that one.

        Nothing else is repeated: a server whose store is older than its devices must not lead them back by itself.
        """
        record = self.registry.get(device)
        if record.report is None or record.report.desired_sequence <= record.desired_sequence:
            return
        campaign = self.campaigns.get(record.desired.rollout) if record.desired is not None else None
        member = campaign.members.get(device) if campaign is not None else None
        if record.desired is None or campaign is None or campaign.state not in ACTIVE or member is None:
            return
        if member.status in UNDECIDED:
            sequence = next_desired_sequence(record)
            desired = msgspec.structs.replace(record.desired, sequence=sequence)
            self._put_device(msgspec.structs.replace(record, desired=desired, desired_sequence=sequence))
            self._effects.append(PublishDesired(device, desired))

    def _is_credible(self, campaign: Campaign, device: DeviceRecord) -> bool:
        """A commit counts only with the measured files of the release."""
        update = device.report.update if device.report else None
        return update is None or update.outcome != "committed" or self._has(device, campaign)

    def _has(self, device: DeviceRecord, campaign: Campaign) -> bool:
        release = self.catalog.release(campaign.record.family, campaign.record.version)
        return release is not None and runs(device, release)

    def _reconsider(self, before: DeviceRecord, record: DeviceRecord, now_ms: int) -> None:
        """What a device runs has changed: it may be new to a rollout, or have got there on another way."""
        files = [device.report.files if device.report else None for device in (before, record)]
        if (before.family, before.version, files[0]) == (record.family, record.version, files[1]):
            return
        for campaign in self.rollouts.active():
            if campaign.record.family != record.family:
                continue
            member = campaign.members.get(record.device)
            if member is not None and member.status == "asked" and self._has(record, campaign):
                invited = Invitation(record.device, record.tier, record.version)
                self._effects.append(Save(campaign.count_committed(invited, now_ms)))
            if member is None or member.status != campaign.members[record.device].status:
                self.rollouts.advance(campaign, now_ms)

    def _on_link(self, event: LinkReceived, now_ms: int) -> None:
        before = self.registry.get(event.device)
        if before.is_online != event.is_online and not self._is_full(before):
            record = msgspec.structs.replace(
                before, is_online=event.is_online, seen_ms=now_ms if event.is_online else before.seen_ms
            )
            self._put_device(record)
            self._tell(before, record, now_ms)

    def _on_request(self, event: RequestReceived, now_ms: int) -> None:  # noqa: ARG002 - handlers have one shape
        request = event.request
        if isinstance(request, KeyRequest):
            readable = readable_blobs(self.deltas.graph, self.registry.get(event.device))
            is_readable = readable.issuperset(request.blobs)
            blobs = tuple(Digest(blob) for blob in request.blobs) if is_readable else ()
            self._effects.append(AnswerKeys(event.device, blobs))
            return
        if not isinstance(request, ChunkRequest):
            self._effects.append(
                AnswerMetadata(event.device, request.root_version, request.roles, request.nonce)
            )
            return
        count = self.catalog.blob_chunks(Digest(request.blob))
        if count is None:
            return  # not signed, or no longer: a device that follows the metadata does not ask for it
        try:
            chunks = tuple(index for index in decode_window(request) if index < count)
        except MessageError:
            return  # a device that cannot spell its request cannot read an answer about that either
        if chunks:
            self._effects.append(AnswerChunks(event.device, Digest(request.blob), chunks))

    def _on_rollout(self, event: RolloutRequested, now_ms: int) -> None:
        if event.rollout.id in self.campaigns:
            return
        campaign = self.campaigns[event.rollout.id] = Campaign(event.rollout)
        self.rollouts.advance(campaign, now_ms)

    def _on_order(self, event: RolloutOrdered, now_ms: int) -> None:
        self.rollouts.obey(event.order, now_ms)

    def _on_labels(self, event: LabelsChanged, now_ms: int) -> None:
        for labels in event.labels:
            self.registry.label(labels.device, labels.labels)
        for campaign in self.rollouts.active():
            self.rollouts.advance(campaign, now_ms)

    def _on_metadata(self, event: MetadataChanged, now_ms: int) -> None:
        self._is_refreshing = False
        self._refresh_ms = 0
        self._effects.append(PublishMetadata())
        is_new_director = event.catalog.director != self.catalog.director
        self._effects += self.deltas.follow(event.catalog)
        if is_new_director:  # what the old key signed no longer counts
            self._wish_again([device for device in self.registry if device.desired_sequence], now_ms)
        self.rollouts.advance_all(now_ms)

    def _on_signing_failed(self, event: SigningFailed, now_ms: int) -> None:
        self._is_refreshing = False
        self._refresh_ms = event.retry_at_ms
        self.deltas.signing_failed(event)
        self.rollouts.advance_all(now_ms)

    def _on_built(self, event: DeltaBuilt, now_ms: int) -> None:
        self._effects += self.deltas.built(event)
        self.rollouts.advance_all(now_ms)

    def _on_build_failed(self, event: DeltaFailed, now_ms: int) -> None:
        self.deltas.build_failed(event)
        self.rollouts.advance_all(now_ms)

    def _on_uncached(self, event: BlobUncached, now_ms: int) -> None:  # noqa: ARG002 - handlers have one shape
        if self._leaving.pop(event.name, None) is not None:
            self._effects.append(Save(CacheRemoval(name=event.name)))

    def _on_removed(self, event: BlobsRemoved, now_ms: int) -> None:  # noqa: ARG002 - handlers have one shape
        self._effects += self.deltas.removed(event)

    def _on_deadline(self, _: DeadlineReached, now_ms: int) -> None:
        self.rollouts.look_at_clock(now_ms)
        self._effects += self.deltas.collect(now_ms)
        self._refresh_if_due(now_ms)
        if self._wishes_ms is not None and self._wishes_ms <= now_ms:
            self._wish_again([device for device in self.registry if is_waited_for(device)], now_ms)

    def _wish_again(self, devices: Iterable[DeviceRecord], now_ms: int) -> None:
        """Publish wishes that were published before: what is signed for them has a life."""
        self._effects += [PublishDesired(device.device, device.desired) for device in devices]
        self._wishes_ms = now_ms + WISH_PERIOD_MS

    # Deltas

    def _heads(self) -> list[Release]:
        return head_releases(self.catalog, (campaign.record for campaign in self.campaigns.values()))

    def _refresh_if_due(self, now_ms: int) -> None:
        if not self._is_refreshing and (self._refresh_ms or self.catalog.refresh_ms) <= now_ms:
            self._is_refreshing = True
            self._effects.append(SignMetadata())

    # The broker's cache

    def _plan_cache(self) -> None:
        """Compare what the waves under way need with what the broker retains, within the budget."""
        needs = (
            self.deltas.graph.artifacts(release, self.registry.get(device).report)
            for campaign in self.rollouts.active()
            if (release := self.catalog.release(campaign.record.family, campaign.record.version))
            for device in campaign.undecided
        )
        planned = plan_cache(needs, self.limits.retained_bytes_max)
        for name in [name for name in self.cached if name not in planned]:
            length = self._leaving[name] = self.cached.pop(name)
            self._effects.append(UncacheBlob(name, chunk_count(length)))
        for name, length in planned.items():
            if name not in self.cached:
                self._leaving.pop(name, None)
                self.cached[name] = length
                self._effects.append(Save(CacheEntry(name=name, length=length)))
                self._effects.append(CacheBlob(name, chunk_count(length)))

    # Devices

    def _put_device(self, record: DeviceRecord) -> None:
        self.registry.put(record)
        self._effects.append(Save(record))

    def _tell(self, before: DeviceRecord, record: DeviceRecord, now_ms: int) -> None:
        if self.limits.keeps_history and (event := event_of(before, record, now_ms)) is not None:
            self._effects.append(Save(event))

    def _is_full(self, record: DeviceRecord) -> bool:
        return record.seen_ms == 0 and len(self.registry) >= self.limits.devices_max
