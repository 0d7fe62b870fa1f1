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
from protocol.ids import Digest
from protocol.messages import ChunkRequest, Desired, decode_window
from protocol.release import Release
from server.effects import (
    AnswerChunks,
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
    LinkReceived,
    MetadataChanged,
    ReportReceived,
    RequestReceived,
    RolloutRequested,
    SigningFailed,
    Started,
)
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
from server.rollouts.campaign import Campaign, MemberRecord, canary_rank
from server.rollouts.states import ACTIVE, FINAL, RolloutState, RolloutTrigger

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
    """

    retained_bytes_max: int = RETAINED_BYTES_MAX
    devices_max: int = 200_000
    delta_grace_ms: int = GRACE_MS


class Coordinator:
    """Decides for one fleet.

    Args:
        limits: What it may use.
    """

    def __init__(self, limits: CoordinatorLimits | None = None) -> None:
        self.limits = limits or CoordinatorLimits()
        self.registry = Registry()
        self.campaigns: dict[str, Campaign] = {}
        self.deltas = DeltaStock(self.registry, self._heads, self.limits.delta_grace_ms)
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
            MetadataChanged: self._on_metadata,
            SigningFailed: self._on_signing_failed,
            DeltaBuilt: self._on_built,
            DeltaFailed: self._on_build_failed,
            BlobUncached: self._on_uncached,
            BlobsRemoved: self._on_removed,
            DeadlineReached: self._on_deadline,
        }

    @property
    def catalog(self) -> Catalog:
        """What is signed."""
        return self.deltas.catalog

    def handle(self, event: Event, now_ms: int) -> tuple[Effect, ...]:
        """Take in what happened; returns what to do, in order."""
        self._effects = []
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
        members: dict[str, list[MemberRecord]] = {}
        for member in event.members:
            members.setdefault(member.rollout, []).append(member)
        for record in event.rollouts:
            if record.state not in FINAL or members.get(record.id):
                self.campaigns[record.id] = Campaign(record, members.get(record.id, ()))
        self.cached = {entry.name: entry.length for entry in event.cached}
        self._advance_all(now_ms)
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
        update = event.report.update
        campaign = self.campaigns.get(update.rollout) if update else None
        if update and campaign and self._is_credible(campaign, record):
            member = campaign.observe(event.device, update, now_ms)
            if member:
                self._effects.append(Save(member))
                self._advance(campaign, now_ms)
        self._reconsider(before, record, now_ms)

    def _is_credible(self, campaign: Campaign, device: DeviceRecord) -> bool:
        """A commit counts only with the measured files of the release."""
        update = device.report.update if device.report else None
        if update is None or update.outcome != "committed":
            return True
        release = self.catalog.release(campaign.record.family, campaign.record.version)
        return release is not None and runs(device, release)

    def _reconsider(self, before: DeviceRecord, record: DeviceRecord, now_ms: int) -> None:
        """What a device runs has changed: it may be new to a rollout, or have got there on another way."""
        files = [device.report.files if device.report else None for device in (before, record)]
        if (before.family, before.version, files[0]) == (record.family, record.version, files[1]):
            return
        for campaign in self._active():
            if campaign.record.family != record.family:
                continue
            member = campaign.members.get(record.device)
            if member is not None and member.status == "asked" and runs(record, self._release(campaign)):
                self._effects.append(Save(campaign.count_committed(record.device, now_ms)))
            if member is None or member.status != campaign.members[record.device].status:
                self._advance(campaign, now_ms)

    def _on_link(self, event: LinkReceived, now_ms: int) -> None:
        before = self.registry.get(event.device)
        if before.is_online != event.is_online and not self._is_full(before):
            self._put_device(
                msgspec.structs.replace(
                    before,
                    is_online=event.is_online,
                    seen_ms=now_ms if event.is_online else before.seen_ms,
                )
            )

    def _on_request(self, event: RequestReceived, now_ms: int) -> None:  # noqa: ARG002 - handlers have one shape
        request = event.request
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
        self._advance(campaign, now_ms)

    def _on_metadata(self, event: MetadataChanged, now_ms: int) -> None:
        self._is_refreshing = False
        self._refresh_ms = 0
        self._effects.append(PublishMetadata())
        is_new_director = event.catalog.director != self.catalog.director
        self._effects += self.deltas.follow(event.catalog)
        if is_new_director:  # what the old key signed no longer counts
            self._wish_again([device for device in self.registry if device.desired_sequence], now_ms)
        self._advance_all(now_ms)

    def _on_signing_failed(self, event: SigningFailed, now_ms: int) -> None:
        self._is_refreshing = False
        self._refresh_ms = event.retry_at_ms
        self.deltas.signing_failed(event)
        self._advance_all(now_ms)

    def _on_built(self, event: DeltaBuilt, now_ms: int) -> None:
        self._effects += self.deltas.built(event)
        self._advance_all(now_ms)

    def _on_build_failed(self, event: DeltaFailed, now_ms: int) -> None:
        self.deltas.build_failed(event)
        self._advance_all(now_ms)

    def _on_uncached(self, event: BlobUncached, now_ms: int) -> None:  # noqa: ARG002 - handlers have one shape
        if self._leaving.pop(event.name, None) is not None:
            self._effects.append(Save(CacheRemoval(name=event.name)))

    def _on_removed(self, event: BlobsRemoved, now_ms: int) -> None:  # noqa: ARG002 - handlers have one shape
        self._effects += self.deltas.removed(event)

    def _on_deadline(self, _: DeadlineReached, now_ms: int) -> None:
        for campaign in self._active():
            expired = campaign.expire(now_ms)
            if expired:
                self._effects += [Save(member) for member in expired]
                self._advance(campaign, now_ms)
        self._effects += self.deltas.collect(now_ms)
        self._refresh_if_due(now_ms)
        if self._wishes_ms is not None and self._wishes_ms <= now_ms:
            self._wish_again([device for device in self.registry if is_waited_for(device)], now_ms)

    def _wish_again(self, devices: Iterable[DeviceRecord], now_ms: int) -> None:
        """Publish wishes that were published before: what is signed for them has a life."""
        self._effects += [PublishDesired(device.device, device.desired) for device in devices]
        self._wishes_ms = now_ms + WISH_PERIOD_MS

    # Rollouts

    def _active(self) -> list[Campaign]:
        return [campaign for campaign in self.campaigns.values() if campaign.state in ACTIVE]

    def _advance_all(self, now_ms: int) -> None:
        for campaign in list(self.campaigns.values()):
            if campaign.state not in FINAL:
                self._advance(campaign, now_ms)

    def _advance(self, campaign: Campaign, now_ms: int) -> None:
        """Move a rollout on as far as it goes."""
        before = None
        while campaign.state is not before and campaign.state not in FINAL:
            before = campaign.state
            if before in ACTIVE and not self._is_signed(campaign):
                self._stop(campaign, now_ms, "its release is no longer in the signed metadata")
                return
            match campaign.state:
                case RolloutState.CREATED:
                    self._take_up(campaign, now_ms)
                case RolloutState.PREPARING:
                    self._begin(campaign, now_ms)
                case RolloutState.CANARY:
                    self._judge_canary(campaign, now_ms)
                case RolloutState.REST:
                    self._judge_rest(campaign, now_ms)

    def _take_up(self, campaign: Campaign, now_ms: int) -> None:
        record = campaign.record
        if self.catalog.release(record.family, record.version) is None:
            self._move(campaign, RolloutTrigger.STOP, now_ms, "its release is not published")
            return
        for other in self._active():
            if other.record.family == record.family:
                reason = f"rollout {other.record.id} of the same family was still under way"
                self._move(campaign, RolloutTrigger.STOP, now_ms, reason)
                return
        self._move(campaign, RolloutTrigger.PREPARE, now_ms)

    def _begin(self, campaign: Campaign, now_ms: int) -> None:
        devices = self.registry.of_family(campaign.record.family)
        if devices and len(self._ready(campaign, devices, now_ms)) == len(devices):
            self._move(campaign, RolloutTrigger.BEGIN, now_ms)
            self._ask_canaries(campaign, now_ms)

    def _ask_canaries(self, campaign: Campaign, now_ms: int) -> None:
        """Ask the next few devices, those first whose tier the release is for."""
        release = self._release(campaign)

        def rank(device: DeviceRecord) -> tuple[bool, bytes]:
            tier = device.report.tier if device.report else ""
            is_foreign = bool(release.resources.tiers and tier and tier not in release.resources.tiers)
            return is_foreign, canary_rank(campaign.record.id, device.device)

        candidates = self._candidates(campaign)
        for device in candidates:
            if runs(device, release):  # no trial, so no proof: it takes no canary's place
                self._effects.append(Save(campaign.count_committed(device.device, now_ms)))
        waiting = sorted((device for device in candidates if not runs(device, release)), key=rank)
        self._ask(campaign, waiting[: campaign.record.canary_count], now_ms)

    def _judge_canary(self, campaign: Campaign, now_ms: int) -> None:
        if self._stop_if_failing(campaign, now_ms) or not campaign.is_wave_decided:
            return
        if not self._candidates(campaign):
            self._move(campaign, RolloutTrigger.FINISH, now_ms)
            self._plan_cache()
        elif campaign.has_proof:
            self._move(campaign, RolloutTrigger.WIDEN, now_ms)
        else:
            self._ask_canaries(campaign, now_ms)

    def _judge_rest(self, campaign: Campaign, now_ms: int) -> None:
        if self._stop_if_failing(campaign, now_ms):
            return
        candidates = self._candidates(campaign)
        if candidates:
            # Devices that arrive late may need deltas of their own; those that do not are asked at once.
            self._ask(campaign, self._ready(campaign, candidates, now_ms), now_ms)
            candidates = self._candidates(campaign)
        if campaign.is_wave_decided and not candidates:
            self._move(campaign, RolloutTrigger.FINISH, now_ms)
            self._plan_cache()

    def _stop_if_failing(self, campaign: Campaign, now_ms: int) -> bool:
        failures = campaign.failures()
        if failures <= campaign.record.failures_max:
            return False
        reason = f"{failures} failed in the {campaign.wave} wave, allowed are {campaign.record.failures_max}"
        self._stop(campaign, now_ms, reason)
        return True

    def _stop(self, campaign: Campaign, now_ms: int, reason: str) -> None:
        """Ask nobody else, and let devices that have not begun keep what they run."""
        self._move(campaign, RolloutTrigger.STOP, now_ms, reason)
        for member in campaign.withdraw(now_ms):
            self._effects.append(Save(member))
            self._withdraw(campaign, self.registry.get(member.device))
        self._plan_cache()

    def _withdraw(self, campaign: Campaign, device: DeviceRecord) -> None:
        """Let a device that has not begun keep what it runs."""
        desired = None
        sequence = next_desired_sequence(device)
        if device.version:
            desired = Desired(
                sequence=sequence,
                rollout=campaign.record.id,
                family=campaign.record.family,
                version=device.version,
            )
        self._put_device(msgspec.structs.replace(device, desired=desired, desired_sequence=sequence))
        self._effects.append(PublishDesired(device.device, desired))

    def _ask(self, campaign: Campaign, devices: Iterable[DeviceRecord], now_ms: int) -> None:
        """Ask devices: first everything durable, then the chunks that they need, then the requests."""
        requests = []
        release = self._release(campaign)
        for device in devices:
            if runs(device, release):
                self._effects.append(Save(campaign.count_committed(device.device, now_ms)))
                continue
            sequence = next_desired_sequence(device)
            desired = Desired(
                sequence=sequence,
                rollout=campaign.record.id,
                family=campaign.record.family,
                version=campaign.record.version,
            )
            self._effects.append(Save(campaign.ask(device.device, sequence, now_ms)))
            self._put_device(msgspec.structs.replace(device, desired=desired, desired_sequence=sequence))
            requests.append(PublishDesired(device.device, desired))
        if requests:
            self._plan_cache()
            self._effects += requests

    def _move(self, campaign: Campaign, trigger: RolloutTrigger, now_ms: int, reason: str = "") -> None:
        self._effects.append(Save(campaign.move(trigger, now_ms, reason)))

    def _release(self, campaign: Campaign) -> Release:
        release = self.catalog.release(campaign.record.family, campaign.record.version)
        assert release is not None, "a rollout whose release has left the metadata was stopped"
        return release

    def _is_signed(self, campaign: Campaign) -> bool:
        return self.catalog.release(campaign.record.family, campaign.record.version) is not None

    def _candidates(self, campaign: Campaign) -> list[DeviceRecord]:
        if self.registry.count(campaign.record.family) == len(campaign.members):
            return []  # the usual case once the last wave is under way, and the cheap one
        devices = self.registry.of_family(campaign.record.family)
        return [device for device in devices if device.device not in campaign.members]

    # Deltas

    def _heads(self) -> list[Release]:
        return head_releases(self.catalog, (campaign.record for campaign in self.campaigns.values()))

    def _ready(self, campaign: Campaign, devices: list[DeviceRecord], now_ms: int) -> list[DeviceRecord]:
        """Devices for which nothing is left to build or sign; starts what is."""
        ready, effects = self.deltas.ready(self._release(campaign), devices, now_ms)
        self._effects += effects
        return ready

    def _refresh_if_due(self, now_ms: int) -> None:
        if not self._is_refreshing and (self._refresh_ms or self.catalog.refresh_ms) <= now_ms:
            self._is_refreshing = True
            self._effects.append(SignMetadata())

    # The broker's cache

    def _plan_cache(self) -> None:
        """Compare what the waves under way need with what the broker retains, within the budget."""
        needs = (
            self.deltas.graph.artifacts(release, self.registry.get(device).report)
            for campaign in self._active()
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

    def _is_full(self, record: DeviceRecord) -> bool:
        return record.seen_ms == 0 and len(self.registry) >= self.limits.devices_max
