"""Everything wired together: one loop, one broker, one server, a fleet; what an operator does; and the end of a run."""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from device import effects
from device.states import RESTING, Trigger
from protocol.ids import FleetId, digest_of
from protocol.release import Release, encode_release, parse_delta_target
from protocol.topics import Topics
from server.broker.limits import BrokerLimits, BrokerStatistics
from server.operations import RolloutPlan
from server.ports import Record
from server.rollouts.evidence import Rules
from server.rollouts.records import RolloutRecord
from server.rollouts.states import FINAL as ROLLOUT_ENDS
from server.rollouts.states import RolloutState
from server.rollouts.waves import parse_waves
from simulator.attacker import Attacker
from simulator.broker import VirtualBroker
from simulator.checks.liveness import Liveness
from simulator.checks.safety import PromiseBrokenError, SafetyChecks
from simulator.clock import START_MS
from simulator.device import SimulatedDevice
from simulator.disk import Interned
from simulator.engine import Behaviour, Fingerprints
from simulator.faults import FaultInjector
from simulator.hours import DailyHours
from simulator.loop import US_PER_S, Loop
from simulator.models import FACTORY, FAMILY, FLEET, contents_of, release_of
from simulator.population import make_devices
from simulator.recording import Recorder
from simulator.results import Sample
from simulator.scenario import ReleasePlan, Scenario
from simulator.schedule import boot_instants_us, duty_cycle
from simulator.server import SimulatedServer
from simulator.streams import Stream
from simulator.trace import Trace
from simulator.trust import RememberedTrust

TICK_US: Final = US_PER_S
"""How often the operator looks."""

SAMPLES_MAX: Final = 1_000
"""Beyond it every second sample is dropped, and half as many are taken from then on."""

RETRY_S: Final = 30.0
"""Between two rollouts of the last good release while a fleet converges."""

OPERATOR_S: Final = 600.0
"""Until somebody looks at a rollout that has paused itself."""

MENDING_S: Final = 60.0
"""Within which everything is mended after the faults."""

SCRAPS_BYTES: Final = 100_000
"""Room that a full disk has left: for records, not for an update."""

RESTING_STATES: Final = frozenset(state.value for state in RESTING)


class World:
    """A fleet and all around it.

    Args:
        scenario: What it is like.
        trace: Takes note of every step.
        recorder: Takes note of what a page shows.
    """

    def __init__(self, scenario: Scenario, trace: Trace, recorder: Recorder | None = None) -> None:
        self.scenario = scenario
        self.trace = trace
        self.recorder = recorder
        self.loop = Loop()
        self.topics = Topics(FleetId(FLEET))
        self.trust = RememberedTrust()
        self.interned = Interned()
        self.fingerprints = Fingerprints()
        self.checks = SafetyChecks(self)
        self.faults = FaultInjector(self, scenario)
        self.fault_stream = Stream(scenario.seed, "fault", "notice")
        self.clock_start_ms = START_MS
        self.contents = contents_of(scenario)
        self.releases: dict[str, Release] = {
            version: release_of(version, data, scenario.model) for version, data in self.contents.items()
        }
        self.behaviours: dict[str, Behaviour] = {}
        self.signed: set[str] = set()
        self.descriptions: set[str] = {digest_of(encode_release(each)) for each in self.releases.values()}
        self.states: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.completion_s: list[float] = []
        self.updates = 0
        self.rollouts: list[tuple[str, ReleasePlan]] = []
        self._paused_us: int | None = None
        self._resumed: set[tuple[str, int]] = set()  # rollouts and waves that somebody went on with
        self.is_over = False
        self.not_converged = 0
        self.excused = 0
        self.message_faults = self.disk_faults = self.effect_faults = False
        self.attacker = Attacker(self)
        self.broker = VirtualBroker(self.loop, _limits(scenario), scenario.broker.bytes_per_s)
        self.broker_past = BrokerStatistics()
        self.server = SimulatedServer(self)
        self._publish(FACTORY, "good", ())
        self.server.start()
        self.devices: list[SimulatedDevice] = []
        self.devices = make_devices(self)
        self._factory()
        self._sample_us = int(scenario.bin_s * US_PER_S)
        self._plans = list(scenario.releases)
        self._next_us: int | None = int(self._plans[0].at_s * US_PER_S)  # None: a rollout goes on
        self._goal: Liveness | None = None
        self._deadline_us = self._retry_us = 0
        self._running = Counter({FACTORY: scenario.devices})

    # Life

    def begin(self) -> None:
        """Switch everything on."""
        for device, boot_us in zip(self.devices, boot_instants_us(self.scenario), strict=True):
            self.loop.at(boot_us, device.switch_on)
            self._follow(device, duty_cycle(self.scenario, device.number, device.kind.link))
            if device.kind.link.online_hours is not None:
                DailyHours(self, device).begin()
        self.message_faults = self._any("drop", "cut", "duplicate", "delay", "poison")
        self.disk_faults = self._any("storage", "crash_disk")
        self.effect_faults = self._any("crash_effect")
        self.faults.begin()
        if self.recorder is not None:
            self.recorder.begin(self)
        self.loop.at(TICK_US, self._tick)
        self.loop.at(0, self._sample)

    def run(self) -> None:
        """Run to the end.

        Raises:
            PromiseBrokenError: A check failed, or the fleet did not converge in time.
        """
        self.begin()
        if not self.loop.run(int(self.scenario.duration_s * US_PER_S), lambda: self.is_over):
            raise PromiseBrokenError(9, -1, f"the run is not over after {self.scenario.duration_s:.0f} s")

    def _publish(self, version: str, kind: str, bad_tiers: tuple[str, ...]) -> None:
        release, data = self.releases[version], self.contents[version]
        digest = release.files[0].sha256
        self.behaviours[digest] = Behaviour(version, kind, frozenset(bad_tiers))  # type: ignore[arg-type]  # a checked literal
        self.signed.add(digest)
        self.server.publish(version, data, release)
        self.trace.note(self.loop.now_us, -1, f"{version} is published")

    def _factory(self) -> None:
        root = self.server.store.repository.roots[0]
        release, content = self.releases[FACTORY], self.contents[FACTORY]
        for device in self.devices:
            device.install_factory(release, content, root)
        self.states["down"] = len(self.devices)
        self.factory_disk_bytes = 1 << 20
        if self.devices:
            disk = self.devices[0].disk
            self.factory_disk_bytes = disk.capacity_bytes - disk.free_bytes() + SCRAPS_BYTES

    def _any(self, *names: str) -> bool:
        return self.faults.is_active and any(getattr(self.scenario.faults, name) for name in names)

    # The operator

    def _tick(self) -> None:
        """Look how things stand once a second."""
        now_us = self.loop.now_us
        if self.rollouts:
            self._see_to_pause()
        if self._goal is not None:
            self._converge(self._goal)
        elif self._is_idle():
            if self._plans:
                self._follow_plans(now_us)
            elif not self.faults.is_active and self._are_resting():
                self._aim()
        if not self.is_over:
            self.loop.after(TICK_US, self._tick)

    def _follow_plans(self, now_us: int) -> None:
        """No rollout goes on: publish the next release, once its time has come."""
        if self._next_us is None:
            self._next_us = now_us + int(self._plans[0].at_s * US_PER_S)
        elif now_us >= self._next_us:
            self._next_us = None
            plan = self._plans.pop(0)
            self._publish(plan.version, plan.kind, plan.bad_tiers)
            self._roll_out(plan)

    def _roll_out(self, plan: ReleasePlan) -> None:
        is_tested = plan.judged_by == "tests"
        rollout = self.server.roll_out(
            FAMILY,
            plan.version,
            canary_count=max(1, min(plan.canary_count, len(self.devices))),
            wave_timeout_ms=int(plan.wave_timeout_s * 1_000),
            failures_max=None if is_tested else plan.failures_max,
            plan=RolloutPlan(
                waves=parse_waves(plan.waves, [int(plan.soak_s * 1_000)]) if plan.waves else (),
                rules=Rules() if is_tested else None,
                in_flight_max=plan.in_flight_max or None,
                pace_per_minute=plan.pace_per_minute or None,
                from_version=plan.from_version,
            ),
        )
        self.rollouts.append((rollout, plan))
        self.trace.note(self.loop.now_us, -1, f"rollout {rollout} of {plan.version}")

    def _see_to_pause(self) -> None:
        """A rollout has paused itself: somebody looks at it after a while, and goes on; at the second time, past its wave."""
        record = self.server.rollout(self.rollouts[-1][0])
        if record.state is not RolloutState.PAUSED or not self.server.is_up:
            self._paused_us = None
            return
        if self._paused_us is None:
            self._paused_us = self.loop.now_us
        elif self.loop.now_us >= self._paused_us + int(OPERATOR_S * US_PER_S):
            self._paused_us = None
            is_again = (record.id, record.wave) in self._resumed
            self._resumed.add((record.id, record.wave))
            may_promote = record.wave < len(record.plan) - 1
            self.server.order(record.id, "promote" if is_again and may_promote else "resume")

    def _is_idle(self) -> bool:
        """Whether the last rollout is over; one that nobody takes up since the server is down is not."""
        return not self.rollouts or self.server.rollout(self.rollouts[-1][0]).state in ROLLOUT_ENDS

    def _are_resting(self) -> bool:
        return sum(self.states[state] for state in RESTING_STATES) == len(self.devices)

    def _aim(self) -> None:
        """Everything was rolled out and no fault is left: now everybody has to get to the last good release."""
        good = [plan for plan in self.scenario.releases if plan.kind == "good"]
        if not good:
            self.is_over = True
            return
        self._goal = Liveness(self, self.releases[good[-1].version])
        self._retry_us = self.loop.now_us
        self._deadline_us = self.loop.now_us + int(self.scenario.liveness_s * US_PER_S)
        self._plans = [good[-1]]
        if not self.scenario.faults.end_s:
            self._deadline_us = self.loop.now_us  # without faults nothing is tried again
        self._converge(self._goal)

    def _converge(self, goal: Liveness) -> None:
        if not self._is_idle() or not self._are_resting():
            if self.loop.now_us >= self._deadline_us:
                self._give_up(goal)
            return
        missing = goal.missing()
        self.excused = goal.excused()
        if not missing:
            self.is_over = True
        elif self.loop.now_us >= self._deadline_us:
            self._give_up(goal)
        elif self.loop.now_us >= self._retry_us:
            self._retry_us = self.loop.now_us + int(RETRY_S * US_PER_S)
            count = len(self.devices)
            plan = ReleasePlan(
                version=self._plans[0].version,
                canary_count=count,
                failures_max=count,
                wave_timeout_s=self._plans[0].wave_timeout_s,
            )
            self._roll_out(plan)

    def _give_up(self, goal: Liveness) -> None:
        missing = goal.missing()
        self.not_converged = len(missing)
        self.is_over = True
        if missing and (self.scenario.faults.end_s or self._should_have_finished()):
            first = missing[0]
            raise PromiseBrokenError(
                9,
                first.number,
                f"{len(missing)} devices do not run the last good release; the first is {first.state}"
                f" with {first.version or 'nothing'}",
            )

    def _should_have_finished(self) -> bool:
        """Whether the last good release was rolled out to the end: then everybody has it."""
        good = [rollout for rollout, plan in self.rollouts if plan.kind == "good"]
        return bool(good) and self.server.rollout(good[-1]).state.value == "finished"

    # What happens to the world

    def crash_broker(self, down_us: int) -> None:
        """The broker dies, and comes back empty."""
        self.trace.note(self.loop.now_us, -1, "broker crashes")
        self._keep_statistics()
        self.broker.crash()
        self.loop.after(down_us, self._restart_broker)

    def _restart_broker(self) -> None:
        if not self.broker.is_up:
            self.trace.note(self.loop.now_us, -1, "broker restarts")
            self.broker.restart()

    def crash_server(self) -> None:
        """The server dies, and comes back with its store."""
        self.trace.note(self.loop.now_us, -1, "server crashes")
        self.server.crash()
        self.loop.after(self.faults.server_down_us() or US_PER_S, self._restart_server)

    def _restart_server(self) -> None:
        if not self.server.is_up:
            self.trace.note(self.loop.now_us, -1, "server restarts")
            self.server.start()

    def link_fails(self, device: SimulatedDevice, end_us: int) -> None:
        """A device has no link until an instant."""
        self.trace.note(self.loop.now_us, device.number, "link down")
        device.transport.link_changed(is_up=False)
        self.loop.at(end_us, self._link_returns, device)

    def _link_returns(self, device: SimulatedDevice) -> None:
        self.trace.note(self.loop.now_us, device.number, "link up")
        device.transport.link_changed(is_up=True)

    def _follow(self, device: SimulatedDevice, changes: Iterator[tuple[int, bool]]) -> None:
        """Let a link come and go, one change after the other."""
        change = next(changes, None)
        if change is not None:
            instant_us, is_up = change
            self.loop.at(instant_us, self._change_link, device, is_up, changes)

    def _change_link(
        self,
        device: SimulatedDevice,
        is_up: bool,  # noqa: FBT001 - an argument of a scheduled action
        changes: Iterator[tuple[int, bool]],
    ) -> None:
        device.transport.link_changed(is_up=is_up)
        self._follow(device, changes)

    def power_was_cut(self, device: SimulatedDevice) -> None:
        """A device lost its power: it comes back after a while."""
        self.loop.after(self.faults.down_us(), device.switch_on)

    def heal(self) -> None:
        """No fault is left: repair what does not repair itself."""
        self.message_faults = self.disk_faults = self.effect_faults = False
        self._restart_broker()
        self._restart_server()
        for device in self.devices:
            device.disk.capacity_bytes = device.kind.disk_bytes
            device.disk.is_read_only = False
            device.clock.offset_ms = 0
            if device.clock.is_wrong:
                self.loop.after(self._mending_us(), device.restart)
            if not device.kind.link.comes_and_goes:
                device.transport.link_changed(is_up=True)
            self.loop.after(self._mending_us(), device.switch_on)

    def _mending_us(self) -> int:
        """Nobody mends a whole fleet at one instant."""
        return int(self.fault_stream.uniform(0, MENDING_S) * US_PER_S)

    # What is noted

    def count(self, fault: str) -> None:
        """A fault happened by itself."""
        self.faults.counts[fault] += 1

    def entered(self, device: SimulatedDevice, state: str) -> None:
        """A device goes to another state than the one it was in."""
        self.states[device.state] -= 1
        self.states[state] += 1
        if self.recorder is not None:
            self.recorder.entered(device, state)

    def moved(self, device: SimulatedDevice, effect: effects.Trace) -> None:
        """A device took a transition."""
        if effect.row.trigger is Trigger.COMMITTED:
            self.updates += 1
            first = next((plan.version for plan in self.scenario.releases if plan.kind == "good"), "")
            if effect.version == first:
                self._running[first] += 1
                self.faults.progressed(self._running[first] / len(self.devices))
            update = None if device.agent is None else device.agent.record.update
            if update is not None:
                self.completion_s.append(max(0, device.clock.now_ms() - update.started_ms) / 1_000)

    def saved(self, records: list[Record]) -> None:
        """The server made records durable."""
        for record in records:
            if isinstance(record, RolloutRecord):
                text = f"rollout {record.id} is {record.state.value} {record.reason}"
                self.trace.note(self.loop.now_us, -1, text)

    def _sample(self) -> None:
        self.samples.append(
            Sample(
                at_s=self.loop.now_us / US_PER_S,
                states={state: count for state, count in sorted(self.states.items()) if count},
                connections=self.broker.core.statistics.connections_now,
                broker_bytes=self.broker.bytes_out,
                server_events=self.server.events_handled,
                updated=self.updates,
            )
        )
        if len(self.samples) >= SAMPLES_MAX:
            del self.samples[1::2]
            self._sample_us *= 2
        if not self.is_over:
            self.loop.after(self._sample_us, self._sample)

    def broker_statistics(self) -> BrokerStatistics:
        """Counters over all lives of the broker."""
        self._keep_statistics()
        self.broker.core.statistics = BrokerStatistics()
        return self.broker_past

    def _keep_statistics(self) -> None:
        past, now = self.broker_past, self.broker.core.statistics
        for name in BrokerStatistics.__slots__:
            before, value = getattr(past, name), getattr(now, name)
            setattr(past, name, max(before, value) if name.endswith("_peak") else before + value)

    def delta_lengths(self) -> dict[str, int]:
        """Length of each signed delta, by its versions."""
        names = {digest: behaviour.version for digest, behaviour in self.behaviours.items()}
        lengths = {}
        for path, target in sorted(self.server.coordinator.catalog.targets.items()):
            name = parse_delta_target(path)
            if name is not None:
                label = (
                    f"{names.get(name.base, '?')}-{names.get(name.result, '?')} {name.profile.name.lower()}"
                )
                lengths[label] = target.length
        return lengths


def _limits(scenario: Scenario) -> BrokerLimits:
    broker = scenario.broker
    return BrokerLimits(
        connections_max=broker.connections_max,
        sessions_max=broker.connections_max,
        retained_messages_max=broker.retained_messages_max,
        unsent_bytes_max=broker.unsent_bytes_max,
        queue_messages_max=broker.queue_messages_max,
        inflight_max=broker.inflight_max,
    )
