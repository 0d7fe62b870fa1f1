"""Moves rollouts on: whom they ask next, whom they let go, what operators ordered. Pure; returns effects like the coordinator.

`decisions.py` says what is to be done, `states.py` what may be; here it is done. What is durable first stands first in the effects.
"""

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from protocol.ids import DeviceId
from protocol.messages import Desired, LatencySummary
from protocol.release import Release
from server.effects import Effect, PublishDesired, Save
from server.fleet.registry import DeviceRecord, Registry, next_desired_sequence, runs
from server.releases.catalog import Catalog
from server.releases.delta_stock import DeltaStock
from server.rollouts import decisions
from server.rollouts.campaign import Campaign, Invitation
from server.rollouts.decisions import Step, Verdict, Waiting
from server.rollouts.latency import control_bounds
from server.rollouts.records import Control, MemberRecord, Numbers, Order, RolloutRecord
from server.rollouts.states import ACTIVE, FINAL, RolloutState, RolloutTrigger, may
from server.rollouts.waves import point, rank

PACE_STEP_MS: Final = 1_000
"""A pace is kept in steps of a second: nobody needs a timer for each device."""

_TRIGGERS: Final = {
    "pause": RolloutTrigger.PAUSE,
    "resume": RolloutTrigger.RESUME,
    "promote": RolloutTrigger.PROMOTE,
    "abort": RolloutTrigger.ABORT,
}
_DONE: Final = {"pause": "paused", "resume": "resumed", "promote": "promoted", "abort": "aborted"}


class _Queue:
    """Devices that a wave may still ask, in order.

    Attributes:
        key: What it was made from; another one makes it anew.
        ready: Can be asked at once.
        unready: Wait for a delta.
        spare: Match as well, and belong to a later share: for a wave that is extended.
    """

    def __init__(self, key: tuple[int, ...]) -> None:
        self.key = key
        self.ready: list[DeviceId] = []
        self.unready: list[DeviceId] = []
        self.spare: list[DeviceId] = []


class Steering:
    """All rollouts of a server.

    Args:
        registry: Devices.
        deltas: What is built and signed.
        put_device: Keeps a device's record, and has it saved.
        plan_cache: Looks again at what the broker should retain.
    """

    def __init__(
        self,
        registry: Registry,
        deltas: DeltaStock,
        put_device: Callable[[DeviceRecord], None],
        plan_cache: Callable[[], None],
    ) -> None:
        self.campaigns: dict[str, Campaign] = {}
        self.effects: list[Effect] = []  # replaced by the coordinator with its own
        self._registry = registry
        self._deltas = deltas
        self._put_device = put_device
        self._plan_cache = plan_cache
        self._queues: dict[str, _Queue] = {}

    def load(self, rollouts: Iterable[RolloutRecord], members: Iterable[MemberRecord]) -> None:
        """Take over what the store knows."""
        by_rollout: dict[str, list[MemberRecord]] = {}
        for member in members:
            by_rollout.setdefault(member.rollout, []).append(member)
        for record in rollouts:
            if record.state not in FINAL or by_rollout.get(record.id):
                self.campaigns[record.id] = Campaign(record, by_rollout.get(record.id, ()))

    def active(self) -> list[Campaign]:
        """Rollouts that have their family for themselves."""
        return [campaign for campaign in self.campaigns.values() if campaign.state in ACTIVE]

    def advance_all(self, now_ms: int) -> None:
        """Move every rollout on; what is signed or built may have changed."""
        self._queues.clear()
        for campaign in list(self.campaigns.values()):
            if campaign.state not in FINAL:
                self.advance(campaign, now_ms)

    def advance(self, campaign: Campaign, now_ms: int) -> None:
        """Move a rollout on as far as it goes."""
        before = None
        while campaign.record is not before and campaign.state not in FINAL:
            before = campaign.record
            if before.state in ACTIVE and not self._is_signed(campaign):
                self._stop(campaign, now_ms, "its release is no longer in the signed metadata")
                return
            match campaign.state:
                case RolloutState.CREATED:
                    self._take_up(campaign, now_ms)
                case RolloutState.PREPARING:
                    self._begin(campaign, now_ms)
                case RolloutState.RUNNING:
                    self._run(campaign, now_ms)
                case RolloutState.PAUSED:
                    self._follow(campaign, decisions.danger(campaign), now_ms)

    def look_at_clock(self, now_ms: int) -> None:
        """Some deadline has passed: members may be overdue, a soak or a pause between requests over."""
        for campaign in self.active():
            off = frozenset(member.device for member in campaign.overdue(now_ms) if self._is_off(member))
            expired = campaign.expire(now_ms, off)
            self.effects += [Save(member) for member in expired]
            is_awake = campaign.wake_ms is not None and campaign.wake_ms <= now_ms
            if is_awake:
                campaign.wake_ms = None
            if expired or is_awake:
                self.advance(campaign, now_ms)

    def _is_off(self, member: MemberRecord) -> bool:
        device = self._registry.get(member.device)
        return not device.is_online and device.seen_ms <= member.asked_ms

    # From created to running

    def _take_up(self, campaign: Campaign, now_ms: int) -> None:
        record = campaign.record
        release = self._catalog.release(record.family, record.version)
        if release is None:
            self._stop(campaign, now_ms, "its release is not published")
            return
        for other in self.active():
            if other.record.family == record.family:
                self._stop(
                    campaign, now_ms, f"rollout {other.record.id} of the same family was still under way"
                )
                return
        campaign.amend(release_sha256=self._catalog.description(release).digest)
        self._save(campaign.move(RolloutTrigger.PREPARE, now_ms))

    def _begin(self, campaign: Campaign, now_ms: int) -> None:
        devices = [
            device
            for device in self._registry.of_family(campaign.record.family)
            if self._takes_part(campaign, device)
        ]
        if not devices or len(self._ready(campaign, devices, now_ms)) != len(devices):
            return
        if campaign.record.rules is not None:
            campaign.amend(controls=self._controls(campaign, devices))
        campaign.move(RolloutTrigger.BEGIN, now_ms)
        plan = ", ".join(wave.size_text for wave in campaign.record.plan)
        text = f"{len(devices)} devices are there, every delta is signed; waves: {plan}"
        numbers: Numbers = {"devices": len(devices), "control_groups": len(campaign.record.controls)}
        self._decide(campaign, "begin", now_ms, text, numbers)

    def _controls(self, campaign: Campaign, devices: Iterable[DeviceRecord]) -> tuple[Control, ...]:
        """What the trials of the versions before measured, tier by tier."""
        rules = campaign.record.rules
        assert rules is not None, "only asked where there are rules"
        tiers: dict[str, list[LatencySummary]] = {}
        for device in devices:
            report = device.report
            update = None if report is None else report.update
            if (
                report is not None
                and update is not None
                and update.outcome == "committed"
                and update.version == report.version != campaign.record.version
                and update.evidence is not None
                and update.evidence.latency is not None
            ):
                tiers.setdefault(report.tier, []).append(update.evidence.latency)
        bounds = control_bounds(rules, tiers)
        return tuple(
            Control(tier=tier, devices=count, p50_ms=p50_ms, p99_ms=p99_ms)
            for tier, (count, p50_ms, p99_ms) in bounds.items()
        )

    # Waves

    def _run(self, campaign: Campaign, now_ms: int) -> None:
        if self._follow(campaign, decisions.danger(campaign), now_ms):
            return
        queue = self._queue(campaign, now_ms)
        wanted = self._wanted(campaign, queue)
        if wanted:
            room = self._room(campaign, now_ms)
            self._ask(campaign, self._take(campaign, queue, min(wanted, room), now_ms), now_ms)
            wanted = self._wanted(campaign, queue)
        if wanted or not campaign.is_decided:
            return
        verdict = decisions.end_of_wave(campaign, self._waiting(campaign, queue), now_ms)
        if verdict.step is Step.WAIT:
            campaign.wake_ms = verdict.wait_ms
        else:
            self._follow(campaign, verdict, now_ms)

    def _wanted(self, campaign: Campaign, queue: _Queue) -> int:
        """Devices that the wave under way has yet to ask."""
        left = len(queue.ready) + len(queue.unready)
        if not left:
            return 0
        wave, extended = campaign.wave, campaign.record.extended
        if wave.is_proof and campaign.rates is not None:
            return min(left, campaign.rates.proof_needs())
        if wave.count is None:
            return left
        return min(left, max(0, wave.count + extended - campaign.asked_count))

    def _room(self, campaign: Campaign, now_ms: int) -> int:
        """How many may be asked now, by what is in flight and by the pace; sets the alarm for the next."""
        record = campaign.record
        room = len(self._registry)
        if record.in_flight_max is not None:
            room = min(room, record.in_flight_max - campaign.in_flight)
        if record.pace_per_minute is not None:
            per_step = max(1, record.pace_per_minute * PACE_STEP_MS // 60_000)
            step_ms = max(PACE_STEP_MS, 60_000 // record.pace_per_minute)
            last_ms = campaign.last_asked_ms
            if last_ms is not None and now_ms < last_ms + step_ms:
                campaign.wake_ms = last_ms + step_ms
                return 0
            campaign.wake_ms = now_ms + step_ms if room > per_step else None
            room = min(room, per_step)
        return max(0, room)

    def _take(self, campaign: Campaign, queue: _Queue, count: int, now_ms: int) -> list[DeviceRecord]:
        """The next devices in order; those that wait for a delta are looked at again."""
        if queue.unready:
            unready = [self._registry.get(device) for device in queue.unready]
            ready = {device.device for device in self._ready(campaign, unready, now_ms)}
            if ready:
                fresh = [device for device in queue.unready if device in ready]
                queue.unready = [device for device in queue.unready if device not in ready]
                queue.ready = self._sorted(campaign, queue.ready + fresh)
        taken = [self._registry.get(device) for device in queue.ready[:count]]
        is_short = len(taken) < len(queue.ready) and not all(device.is_online for device in taken)
        if is_short and campaign.wave.percent is not None:
            # A hint, and for the order only: who is not connected would keep a place from somebody who is.
            devices = (self._registry.get(device) for device in queue.ready)
            taken = sorted(devices, key=lambda device: not device.is_online)[:count]
        if taken:
            chosen = {device.device for device in taken}
            queue.ready = [device for device in queue.ready if device not in chosen]
        return taken

    def _queue(self, campaign: Campaign, now_ms: int) -> _Queue:
        """Devices that the wave may still ask; made anew when the fleet, the wave or its size has changed."""
        record = campaign.record
        versions = self._registry.version_changes if record.from_version else 0
        key = (record.wave, record.extended, self._registry.changes, versions)
        queue = self._queues.get(record.id)
        if queue is not None and queue.key == key:
            return queue
        queue = self._queues[record.id] = _Queue(key)
        release = self._release(campaign)
        if self._registry.count(record.family) == len(campaign.members):
            return queue
        fresh = self._candidates(campaign)
        for device in fresh:
            if runs(device, release):  # no trial, so no proof: it takes no canary's place
                self.effects.append(Save(campaign.count_committed(_invitation(device), now_ms)))
        fresh = [device for device in fresh if device.device not in campaign.members]
        matching = [device for device in fresh if self._matches(campaign, device)]
        order = self._sorted(campaign, [device.device for device in matching])
        within = [device for device in order if self._is_within(campaign, device)]
        if record.current.count is not None:
            queue.ready = within  # a few: they do not wait for deltas that others need
            return queue
        if record.current.percent is not None:
            outside = [device for device in order if not self._is_within(campaign, device)]
            surplus = sum(not self._is_within(campaign, member.device) for member in campaign.asked_in_wave())
            more = max(0, record.extended - surplus)
            within, queue.spare = within + outside[:more], outside[more:]
        ready = self._ready(campaign, [self._registry.get(device) for device in within], now_ms)
        known = {device.device for device in ready}
        queue.ready = [device for device in within if device in known]
        queue.unready = [device for device in within if device not in known]
        return queue

    def _waiting(self, campaign: Campaign, queue: _Queue) -> Waiting:
        left = len(queue.ready) + len(queue.unready) + len(queue.spare)
        wave = campaign.wave
        members_match = not (wave.tiers or wave.labels) or any(
            self._matches(campaign, self._registry.get(device)) for device in campaign.members
        )
        return Waiting(left, len(self._candidates(campaign)), members_match)

    def _candidates(self, campaign: Campaign) -> list[DeviceRecord]:
        """Devices of the family that take part and are no members yet."""
        return [
            device
            for device in self._registry.of_family(campaign.record.family)
            if device.device not in campaign.members and self._takes_part(campaign, device)
        ]

    def _takes_part(self, campaign: Campaign, device: DeviceRecord) -> bool:
        return not campaign.record.from_version or device.version == campaign.record.from_version

    def _matches(self, campaign: Campaign, device: DeviceRecord) -> bool:
        return campaign.wave.matches(device.tier, self._registry.labels(device.device))

    def _is_within(self, campaign: Campaign, device: DeviceId) -> bool:
        wave = campaign.wave
        return wave.percent is None or wave.holds(point(rank(campaign.record.id, device)))

    def _sorted(self, campaign: Campaign, devices: Iterable[DeviceId]) -> list[DeviceId]:
        """In the order of asking: those last that would refuse, since the release is for other tiers."""
        record, tiers = campaign.record, self._release(campaign).resources.tiers
        if record.rules is None and record.wave > 0:
            return list(devices)  # all at once, in the order in which they appeared

        def key(device: DeviceId) -> tuple[bool, bytes]:
            tier = self._registry.get(device).tier
            return bool(tiers and tier and tier not in tiers), rank(record.id, device)

        return sorted(devices, key=key)

    # Carrying out

    def _follow(self, campaign: Campaign, verdict: Verdict | None, now_ms: int) -> bool:
        """Do what a verdict says; whether there was one."""
        if verdict is None:
            return False
        text, numbers = verdict.text, verdict.numbers
        match verdict.step:
            case Step.STOP:
                self._stop(campaign, now_ms, text, numbers)
            case Step.PAUSE:
                campaign.move(RolloutTrigger.PAUSE, now_ms, text)
                self._decide(campaign, "pause", now_ms, text, numbers)
            case Step.EXTEND:
                wave = campaign.wave
                size = wave.count or max(1, len(campaign.asked_in_wave()))
                campaign.amend(extended=campaign.record.extended + size)
                self._decide(campaign, "extend", now_ms, text, numbers | {"more": size})
            case Step.WIDEN:
                passed = campaign.wave.name
                campaign.move(RolloutTrigger.WIDEN, now_ms)
                following = f"{text}; next is the {campaign.wave.name} wave ({campaign.wave.size_text})"
                self._decide(campaign, "widen", now_ms, following, numbers | {"passed": passed})
            case Step.FINISH:
                campaign.move(RolloutTrigger.FINISH, now_ms)
                self._decide(campaign, "finish", now_ms, text, numbers)
                self._plan_cache()
        return True

    def obey(self, order: Order, now_ms: int) -> None:
        """Do what an operator ordered, or note why that is not possible any more."""
        campaign = self.campaigns.get(order.rollout)
        refusal = _refusal(campaign, order)
        if campaign is not None and refusal:
            self._decide(campaign, "refuse", now_ms, f"{order.action} by {order.by}: {refusal}", order=order)
        elif campaign is not None:
            trigger = _TRIGGERS[order.action]
            why = f": {order.reason}" if order.reason else ""
            text = f"{_DONE[order.action]} by {order.by}{why}"
            if trigger is RolloutTrigger.ABORT:
                self._stop(campaign, now_ms, text, trigger=trigger, order=order)
            else:
                if campaign.state is RolloutState.PAUSED:
                    campaign.amend(lost_accepted=len(campaign.lost), is_slow_accepted=_is_slow(campaign))
                campaign.move(trigger, now_ms, text if trigger is RolloutTrigger.PAUSE else "")
                if trigger is RolloutTrigger.PROMOTE:
                    text += f"; the {campaign.wave.name} wave ({campaign.wave.size_text}) begins at once"
                self._decide(campaign, order.action, now_ms, text, order=order)
                self.advance(campaign, now_ms)
        answer = msgspec.structs.replace(order, answer=refusal or "done", answered_ms=now_ms)
        self.effects.append(Save(answer))

    def _decide(
        self,
        campaign: Campaign,
        action: str,
        now_ms: int,
        text: str,
        numbers: Numbers | None = None,
        *,
        order: Order | None = None,
    ) -> None:
        by, reason = ("", "") if order is None else (order.by, order.reason)
        decision = campaign.decide(action, now_ms, text, numbers, by=by, reason=reason)
        self._save(campaign.record)
        self.effects.append(Save(decision))

    def _stop(
        self,
        campaign: Campaign,
        now_ms: int,
        reason: str,
        numbers: Numbers | None = None,
        *,
        trigger: RolloutTrigger = RolloutTrigger.STOP,
        order: Order | None = None,
    ) -> None:
        """Ask nobody else, and let devices that have not begun keep what they run."""
        campaign.move(trigger, now_ms, reason)
        self._decide(campaign, trigger.value, now_ms, reason, numbers, order=order)
        for member in campaign.withdraw(now_ms):
            self.effects.append(Save(member))
            self._withdraw(campaign, self._registry.get(member.device))
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
        self.effects.append(PublishDesired(device.device, desired))

    def _ask(self, campaign: Campaign, devices: Iterable[DeviceRecord], now_ms: int) -> None:
        """Ask devices: first everything durable, then the chunks that they need, then the requests."""
        requests = []
        for device in devices:
            sequence = next_desired_sequence(device)
            desired = Desired(
                sequence=sequence,
                rollout=campaign.record.id,
                family=campaign.record.family,
                version=campaign.record.version,
            )
            self.effects.append(Save(campaign.ask(_invitation(device), sequence, now_ms)))
            self._put_device(msgspec.structs.replace(device, desired=desired, desired_sequence=sequence))
            requests.append(PublishDesired(device.device, desired))
        if requests:
            self._plan_cache()
            self.effects += requests

    def _save(self, record: RolloutRecord) -> None:
        self.effects.append(Save(record))

    @property
    def _catalog(self) -> Catalog:
        return self._deltas.catalog

    def _release(self, campaign: Campaign) -> Release:
        release = self._catalog.release(campaign.record.family, campaign.record.version)
        assert release is not None, "a rollout whose release has left the metadata was stopped"
        return release

    def _is_signed(self, campaign: Campaign) -> bool:
        """Whether the very description that the rollout was taken up with is signed: the same bytes from canary to fleet."""
        release = self._catalog.release(campaign.record.family, campaign.record.version)
        wanted = campaign.record.release_sha256
        return release is not None and wanted in {"", self._catalog.description(release).digest}

    def _ready(self, campaign: Campaign, devices: list[DeviceRecord], now_ms: int) -> list[DeviceRecord]:
        """Devices for which nothing is left to build or sign; starts what is."""
        ready, effects = self._deltas.ready(self._release(campaign), devices, now_ms)
        self.effects += effects
        return ready


def _refusal(campaign: Campaign | None, order: Order) -> str:
    """Why an order cannot be carried out; nothing if it can."""
    if campaign is None or campaign.state in FINAL:
        return "the rollout is over"
    if not may(campaign.state, _TRIGGERS[order.action]):
        return f"the rollout is {campaign.state}"
    if order.action == "promote" and campaign.is_last_wave:
        return "its last wave is under way"
    return ""


def _is_slow(campaign: Campaign) -> bool:
    return campaign.record.is_slow_accepted or (
        campaign.latency is not None and campaign.latency.finding() is not None
    )


def _invitation(device: DeviceRecord) -> Invitation:
    return Invitation(device.device, device.tier, device.version, device.is_online)
