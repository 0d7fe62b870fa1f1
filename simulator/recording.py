"""What a page about a run shows beyond the counted figures, noted while the run goes on. It reads; it changes nothing.

Bounded in every direction: curves get coarser when they get long, and single devices are dropped evenly when they
change too often.
"""

from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final

from device import effects
from device.states import State, Trigger
from simulator.loop import US_PER_MS, US_PER_S
from simulator.models import FACTORY
from simulator.results import FleetRecording, Moment, Tracks, VersionSpread, WaveOutcome

if TYPE_CHECKING:
    from simulator.world import World

MOMENTS_MAX: Final = 2_000
"""Beyond it every second one is dropped, and half as many are taken from then on."""

STEP_US: Final = 20 * US_PER_MS
"""Between two moments at first: a small fleet is updated within a second or two."""

DOTS_MAX: Final = 4_000
"""Devices whose changes are kept: as many dots as a screen shows apart."""

CHANGES_MAX: Final = 200_000
"""Of these devices; about a megabyte in the page. Beyond it every second device is dropped."""

CURVE_POINTS: Final = 1_000
_PERCENTILES: Final = (50, 95, 99)
_DOWN: Final = "down"


class Recorder:
    """Notes what happens to a fleet.

    Args:
        dots_max: Devices whose changes are kept.
        changes_max: Changes of them that are kept.
    """

    def __init__(self, *, dots_max: int = DOTS_MAX, changes_max: int = CHANGES_MAX) -> None:
        self._dots_max = dots_max
        self._changes_max = changes_max
        self._labels: dict[str, int] = {}
        self._counts: list[int] = []
        self._moments: list[Moment] = []
        self._step_us = STEP_US
        self._tried: dict[str, array[int]] = {}
        self._tried_by: dict[str, bytearray] = {}
        self._committed: dict[str, array[int]] = {}
        self._times_us: dict[str, array[int]] = {}
        self._asked: dict[int, tuple[str, int]] = {}
        self._at_ms: array[int] = array("Q")
        self._device: array[int] = array("L")
        self._label: array[int] = array("B")

    def begin(self, world: "World") -> None:
        """All devices are there, without power, with the factory's version."""
        self._world = world
        count = len(world.devices)
        self._stride = -(-count // self._dots_max)
        self._versions = [FACTORY] * count
        self._now = bytearray([self._label_of(_DOWN)]) * count
        self._counts[self._now[0]] = count
        self._changed_us = 0
        self._latest = self._load()
        self._add_moment()

    def entered(self, number: int, state: str) -> None:
        """A device is in another state."""
        text = f"{state} {self._versions[number]}" if state == State.IDLE.value else state
        self._put(number, self._label_of(text))

    def moved(self, number: int, effect: effects.Trace) -> None:
        """A device took a transition; `entered` has been called for it."""
        version, now_us = effect.version, self._world.loop.now_us
        _, trigger, target = effect.row
        if trigger is Trigger.REQUESTED and self._asked.get(number, ("", 0))[0] != version:
            self._asked[number] = (version, now_us)
        if target is State.TRIAL:
            has_tried = self._tried_by.setdefault(version, bytearray(len(self._now)))
            if not has_tried[number]:
                has_tried[number] = 1
                self._tried.setdefault(version, array("Q")).append(now_us)
        if trigger is Trigger.COMMITTED:
            self._versions[number] = version
            self._committed.setdefault(version, array("Q")).append(now_us)
            asked, asked_us = self._asked.pop(number, ("", 0))
            if asked == version:
                kind = self._world.devices[number].kind.name
                self._times_us.setdefault(kind, array("Q")).append(now_us - asked_us)
            self.entered(number, target.value)

    def finish(self) -> FleetRecording:
        """Everything, as a value."""
        self._latest = self._load()
        self._changed_us = self._world.loop.now_us
        self._add_moment()
        width = len(self._labels)
        for moment in self._moments:
            moment.counts.extend([0] * (width - len(moment.counts)))
        return FleetRecording(
            labels=list(self._labels),
            moments=self._moments,
            versions=[
                VersionSpread(
                    version=version,
                    tried=self._curve(self._tried.get(version)),
                    committed=self._curve(self._committed.get(version)),
                )
                for version in sorted(self._tried.keys() | self._committed.keys())
            ],
            waves=_waves(self._world),
            times_s={kind: _percentiles(times) for kind, times in sorted(self._times_us.items())},
            tracks=Tracks(
                stride=self._stride,
                kinds=[device.kind.name for device in self._world.devices[:: self._stride]],
                at_ms=self._at_ms.tolist(),
                device=self._device.tolist(),
                label=self._label.tolist(),
            ),
        )

    def _label_of(self, text: str) -> int:
        index = self._labels.get(text)
        if index is None:
            index = self._labels[text] = len(self._labels)
            self._counts.append(0)
        return index

    def _put(self, number: int, label: int) -> None:
        before = self._now[number]
        if before == label:
            return
        now_us = self._world.loop.now_us
        if now_us - self._changed_us >= self._step_us and self._changed_us > self._last_us:
            self._add_moment()  # as it was until now
        self._now[number] = label
        self._counts[before] -= 1
        self._counts[label] += 1
        self._changed_us, self._latest = now_us, self._load()
        if now_us - self._last_us >= self._step_us:
            self._add_moment()
        if number % self._stride == 0:
            self._at_ms.append(now_us // US_PER_MS)
            self._device.append(number // self._stride)
            self._label.append(label)
            if len(self._label) > self._changes_max:
                self._thin_out()

    def _load(self) -> tuple[int, int, int]:
        world = self._world
        connections = world.broker.core.statistics.connections_now
        return connections, world.broker.bytes_out, world.server.events_handled

    def _add_moment(self) -> None:
        connections, broker_bytes, server_events = self._latest
        self._last_us = self._changed_us
        self._moments.append(
            Moment(
                at_s=self._changed_us / US_PER_S,
                counts=self._counts.copy(),
                connections=connections,
                broker_bytes=broker_bytes,
                server_events=server_events,
            )
        )
        if len(self._moments) >= MOMENTS_MAX:
            del self._moments[1::2]
            self._step_us *= 2

    def _thin_out(self) -> None:
        """Keep every second of the devices whose changes are kept."""
        kept = [index for index, device in enumerate(self._device) if device % 2 == 0]
        self._at_ms = array("Q", (self._at_ms[index] for index in kept))
        self._label = array("B", (self._label[index] for index in kept))
        self._device = array("L", (self._device[index] // 2 for index in kept))
        self._stride *= 2

    def _curve(self, instants_us: "array[int] | None") -> list[tuple[float, int]]:
        if instants_us is None:
            return []
        devices, reached = len(self._now), len(instants_us)
        counts = {-(-devices * part // CURVE_POINTS) for part in range(1, CURVE_POINTS + 1)}
        return [
            (instants_us[count - 1] / US_PER_S, count)
            for count in sorted({1, reached} | counts)
            if count <= reached
        ]


def _percentiles(times_us: "array[int]") -> list[float]:
    ordered = sorted(times_us)
    return [ordered[(len(ordered) - 1) * share // 100] / US_PER_S for share in _PERCENTILES]


def _waves(world: "World") -> list[WaveOutcome]:
    outcomes = []
    for rollout, plan in world.rollouts:
        campaign = world.server.coordinator.campaigns.get(rollout)
        members = [] if campaign is None else list(campaign.members.values())
        for wave in ("canary", "rest"):
            asked = [member for member in members if member.wave == wave and member.sequence]
            if not asked:
                continue
            decided = [member.decided_ms for member in asked if member.decided_ms is not None]
            begun_ms = min(member.asked_ms for member in asked)
            is_decided = len(decided) == len(asked)
            outcomes.append(
                WaveOutcome(
                    rollout=rollout,
                    version=plan.version,
                    wave=wave,
                    asked=len(asked),
                    begun_s=(begun_ms - world.clock_start_ms) / 1_000,
                    ended_s=(max(decided) - world.clock_start_ms) / 1_000 if is_decided else None,
                    counts=dict(Counter(member.status for member in asked).most_common()),
                    codes=dict(Counter(member.code for member in asked if member.code).most_common()),
                )
            )
    return outcomes
