"""What a page about a run shows beyond the counted figures, noted while the run goes on. It reads; it changes nothing.

Bounded in every direction: curves get coarser when they get long, and single devices are dropped evenly when they
change too often.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from device.states import RESTING, State
from simulator.loop import US_PER_MS, US_PER_S
from simulator.models import FACTORY
from simulator.results import FleetRecording, Moment, Tracks, UpdateTimes, VersionSpread, WaveOutcome

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice
    from simulator.world import World

MOMENTS_MAX: Final = 4_000
"""Beyond it every second one is dropped, and half as many are taken from then on."""

STEP_US: Final = 20 * US_PER_MS
"""Between two moments at first: a small fleet is updated within a second or two."""

STEP_BEFORE_US: Final = US_PER_S
"""Likewise, at the least, before the first rollout."""

DOTS_MAX: Final = 4_000
"""Devices whose changes are kept: as many dots as a screen shows apart."""

CHANGES_MAX: Final = 200_000
"""Of these devices; about a megabyte in the page. Beyond it every second device is dropped."""

CURVE_POINTS: Final = 1_000
_DOWN: Final = "down"
_UNDER_WAY: Final = frozenset(state.value for state in State if state not in RESTING)


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
        self._tried: dict[str, _Firsts] = {}
        self._committed: dict[str, _Firsts] = {}
        self._asked: dict[int, tuple[str, int]] = {}
        self._times_us: dict[str, array[int]] = {}
        self._at_ms: array[int] = array("Q")
        self._device: array[int] = array("L")
        self._label: array[int] = array("B")

    def begin(self, world: "World") -> None:
        """All devices are there, without power."""
        self._world = world
        count = len(world.devices)
        self._stride = -(-count // self._dots_max)
        self._now = bytearray([self._label_of(_DOWN)]) * count
        self._counts[self._now[0]] = count
        self._changed_us = 0
        self._latest = self._load()
        self._add_moment()

    def entered(self, device: "SimulatedDevice", state: str) -> None:
        """A device is in another state."""
        number, now_us = self._place(device), self._world.loop.now_us
        if state == State.IDLE.value:
            version = self._version_on(device)
            if version != FACTORY and self._firsts(self._committed, version).add(number, now_us):
                self._took(device, version, now_us)
            state = f"{state} {version}"
        elif state in _UNDER_WAY and device.agent is not None and device.agent.record.update is not None:
            version = device.agent.record.update.desired.version
            if self._asked.get(number, ("", 0))[0] != version:
                self._asked[number] = (version, now_us)
            if state == State.TRIAL.value:
                self._firsts(self._tried, version).add(number, now_us)
        self._put(number, self._label_of(state))

    def _place(self, device: "SimulatedDevice") -> int:
        """Which device of this world it is, counted from 0."""
        return device.number - self._world.scenario.first_device

    def _version_on(self, device: "SimulatedDevice") -> str:
        """The version whose files are in the active slot of the durable record."""
        _, digest = device.seen.files[0]
        return self._world.behaviours[digest].version

    def _took(self, device: "SimulatedDevice", version: str, now_us: int) -> None:
        asked, asked_us = self._asked.pop(self._place(device), ("", 0))
        if asked == version:
            self._times_us.setdefault(device.kind.name, array("Q")).append(now_us - asked_us)

    def finish(self) -> FleetRecording:
        """Everything, as a value."""
        self._latest = self._load()
        self._changed_us = self._world.loop.now_us
        self._add_moment()
        for moment in self._moments:
            moment.counts.extend([0] * (len(self._labels) - len(moment.counts)))
        everybody = [time_us for times_us in self._times_us.values() for time_us in times_us]
        by_kind = sorted(self._times_us.items())
        return FleetRecording(
            labels=list(self._labels),
            moments=self._moments,
            versions=[
                self._spread(version) for version in sorted(self._tried.keys() | self._committed.keys())
            ],
            waves=_waves(self._world),
            times=[_times(kind, times_us) for kind, times_us in [("", everybody), *by_kind] if times_us],
            tracks=Tracks(
                stride=self._stride,
                kinds=[device.kind.name for device in self._world.devices[:: self._stride]],
                at_ms=self._at_ms.tolist(),
                device=self._device.tolist(),
                label=self._label.tolist(),
            ),
        )

    def _firsts(self, table: "dict[str, _Firsts]", version: str) -> "_Firsts":
        return table.setdefault(version, _Firsts(len(self._now)))

    def _spread(self, version: str) -> VersionSpread:
        return VersionSpread(
            version=version,
            tried=self._firsts(self._tried, version).curve(),
            committed=self._firsts(self._committed, version).curve(),
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
        step_us = self._step_us if self._world.rollouts else max(self._step_us, STEP_BEFORE_US)
        if now_us - self._changed_us >= step_us and self._changed_us > self._last_us:
            self._add_moment()  # as it was until now
        self._now[number] = label
        self._counts[before] -= 1
        self._counts[label] += 1
        self._changed_us, self._latest = now_us, self._load()
        if now_us - self._last_us >= step_us:
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


class _Firsts:
    """When each device did something for the first time."""

    def __init__(self, devices: int) -> None:
        self._devices = bytearray(devices)
        self._instants_us: array[int] = array("Q")

    def add(self, number: int, instant_us: int) -> bool:
        """A device does it, instants come in order; whether it had not done it before."""
        if self._devices[number]:
            return False
        self._devices[number] = 1
        self._instants_us.append(instant_us)
        return True

    def curve(self) -> list[tuple[float, int]]:
        """Instants in seconds, and devices so far, at every thousandth of the fleet and at the end."""
        fleet, reached = len(self._devices), len(self._instants_us)
        counts = {-(-fleet * part // CURVE_POINTS) for part in range(1, CURVE_POINTS + 1)}
        return [
            (self._instants_us[count - 1] / US_PER_S, count)
            for count in sorted({1, reached} | counts)
            if 1 <= count <= reached
        ]


def _times(kind: str, times_us: Sequence[int]) -> UpdateTimes:
    ordered, count = sorted(times_us), len(times_us)
    kept = min(count, CURVE_POINTS)
    values_s = [ordered[part * count // kept - 1] / US_PER_S for part in range(1, kept + 1)]
    return UpdateTimes(kind=kind, updates=count, values_s=values_s)


def _waves(world: "World") -> list[WaveOutcome]:
    outcomes = []
    for rollout, plan in world.rollouts:
        campaign = world.server.coordinator.campaigns.get(rollout)
        members = [] if campaign is None else list(campaign.members.values())
        for wave in [] if campaign is None else [each.name for each in campaign.record.plan]:
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
