"""The formulas of `estimate` beside the simulator: the same situation reckoned and run, and the ratio of the two."""

from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct

from simulator import estimate
from simulator.estimate import FleetPlan
from simulator.fleet import run_fleet
from simulator.results import FleetResult
from simulator.scenario import DeviceKind, Faults, Link, Model, ReleasePlan, Scenario, Server

DELTA: Final = ReleasePlan(changed_share=0.3, canary_count=1_000)
"""Everybody is asked at once, so that waves do not blur what is compared."""

RELEASE_S: Final = 120.0


class Comparison(Struct, frozen=True, kw_only=True):
    """One figure, both ways."""

    situation: str
    name: str
    estimated: float
    simulated: float
    tolerance: float  # of the ratio, either way

    @property
    def ratio(self) -> float:
        """What was reckoned, in units of what was simulated."""
        return self.estimated / self.simulated if self.simulated else float("inf")

    @property
    def is_within(self) -> bool:
        """Whether the ratio is within the tolerance."""
        return 1 / (1 + self.tolerance) <= self.ratio <= 1 + self.tolerance


def compare_all() -> Iterator[Comparison]:
    """Run every situation; some seconds each.

    Raises:
        AssertionError: A promise was broken in a run, which is a defect of Whimbrel and not of a formula.
    """
    for situation in (_always_online, _by_request, _intermittent, _slow_link, _outage):
        yield from situation()


def compare_quickly() -> Iterator[Comparison]:
    """The situation that takes least time, for a test."""
    yield from _always_online()


def plan_of(scenario: Scenario, result: FleetResult) -> FleetPlan:
    """The plan that describes a scenario with one kind of device, with the delta that its server signed."""
    link = scenario.population[0].link
    online_h = 24.0 * link.on_s / (link.on_s + link.off_s) if link.on_s else 24.0
    delta = min(result.delta_bytes.values())
    return FleetPlan(
        devices=scenario.devices,
        model_mb=scenario.model.bytes / 1e6,
        delta_percent=100 * delta / scenario.model.bytes,
        link_kb_per_s=link.down_bytes_per_s / 1e3,
        loss_percent=100 * link.loss,
        latency_ms=link.latency_ms + link.jitter_ms / 2,
        online_hours=online_h,
        sessions_per_day=86_400 / (link.on_s + link.off_s) if link.on_s else 1.0,
        outage_s=scenario.faults.broker_down_s,
    )


def run(scenario: Scenario) -> FleetResult:
    """Run a scenario in which nothing may go wrong."""
    result = run_fleet(scenario)
    assert result.failure is None, result.failure
    return result


def updated_s(result: FleetResult, share: float) -> float:
    """Seconds from the first request of the first rollout until `share` of the devices have committed."""
    begun_s = result.rollouts[0].begun_s
    assert begun_s is not None
    wanted = share * result.scenario.devices
    instants = (sample.at_s for sample in result.samples if sample.updated >= wanted)
    return next(instants, result.virtual_s) - begun_s


def reconnects_in_worst_second(result: FleetResult, from_s: float) -> int:
    """Largest rise of the number of connections from one sample to the next; the samples have to be a second apart."""
    pairs = zip(result.samples, result.samples[1:], strict=False)
    return max(after.connections - before.connections for before, after in pairs if before.at_s >= from_s)


def _always_online() -> Iterator[Comparison]:
    link = Link(down_bytes_per_s=100_000, up_bytes_per_s=50_000, loss=0.01)
    scenario = Scenario(
        devices=50, population=(DeviceKind(link=link),), model=Model(bytes=2 << 20), releases=(DELTA,)
    )
    result = run(scenario)
    plan = plan_of(scenario, result)
    report = _reporter("always online", 0.05)
    loss = plan.loss_percent / 100
    yield report(
        "update_bytes", estimate.update_bytes(plan.delta_bytes, loss), result.down_bytes / plan.devices
    )
    online_s = result.completion_s[len(result.completion_s) // 2]
    yield report("online_s", estimate.busy_seconds(plan, plan.delta_bytes), online_s, 0.25)
    messages = (result.broker.messages_out - result.server.counters["messages_received"]) / plan.devices
    chunks = estimate.chunks_of(plan.delta_bytes)
    yield report("messages to a device", chunks + estimate.DOCUMENT_MESSAGES, messages)
    reports = result.server.counters["messages_received"] / plan.devices
    yield report("reports", estimate.REPORT_MESSAGES, reports)
    retained = plan.delta_bytes + plan.devices * estimate.RETAINED_PER_DEVICE_BYTES
    yield report("retained_bytes", retained, result.broker.retained_bytes_peak, 0.1)
    cached = chunks + estimate.DESCRIPTION_MESSAGES
    yield report("cached_publishes", cached, result.server.counters["chunks_cached"], 0.1)


def _by_request() -> Iterator[Comparison]:
    scenario = Scenario(
        devices=50, model=Model(bytes=2 << 20), releases=(DELTA,), server=Server(retained_bytes_max=1)
    )
    result = run(scenario)
    plan = plan_of(scenario, result)
    answers = (estimate.chunks_of(plan.delta_bytes) + estimate.DESCRIPTION_MESSAGES) * plan.devices
    report = _reporter("nothing cached", 0.1)
    yield report("reply_publishes", answers, result.server.counters["chunks_answered"])
    yield report("reply bytes", plan.delta_bytes * plan.devices, result.server.counters["bytes_answered"])


def _intermittent() -> Iterator[Comparison]:
    result = run(intermittent_scenario(1_000, 12_000))
    scenario = result.scenario
    plan = plan_of(scenario, result)
    busy_s = estimate.busy_seconds(plan, plan.delta_bytes)
    report = _reporter("online for 5 of 25 minutes", 0.25)
    for name, share in (("p50_hours", 0.5), ("p95_hours", 0.95)):
        yield report(name, estimate.elapsed_hours(plan, busy_s, share), updated_s(result, share) / 3_600)


def _slow_link() -> Iterator[Comparison]:
    """A chunk takes 16 s: a device that did not know its link would ask again, and get it more than once."""
    result = run(intermittent_scenario(25, 4_000))
    plan = plan_of(result.scenario, result)
    reckoned = estimate.update_bytes(plan.delta_bytes, plan.loss_percent / 100)
    report = _reporter("4 KB/s", 0.10)
    yield report("update_bytes", reckoned, result.down_bytes / plan.devices)


def intermittent_scenario(devices: int, bytes_per_s: int) -> Scenario:
    """Devices that have a link for 5 of 25 minutes. The release comes after ten such times, when they no longer go in step."""
    link = Link(
        down_bytes_per_s=bytes_per_s, up_bytes_per_s=bytes_per_s, latency_ms=150.0, on_s=300.0, off_s=1_200.0
    )
    release = ReleasePlan(at_s=15_000.0, changed_share=0.3, canary_count=1_000, wave_timeout_s=864_000.0)
    return Scenario(
        devices=devices,
        population=(DeviceKind(link=link),),
        model=Model(bytes=2 << 20),
        releases=(release,),
        bin_s=30.0,
    )


def _outage() -> Iterator[Comparison]:
    for outage_s in (5.0, 20.0, 60.0):
        result = run(outage_scenario(1_000, outage_s))
        reckoned = estimate.reconnects_per_s(1_000, outage_s)
        report = _reporter(f"a broker is away for {outage_s:.0f} s", 0.35)
        yield report("storm_per_s", reckoned, reconnects_in_worst_second(result, RELEASE_S))


def outage_scenario(devices: int, outage_s: float) -> Scenario:
    """The broker dies once, before a small release, and is away for a set time; counted second by second."""
    return Scenario(
        devices=devices,
        faults=Faults(end_s=RELEASE_S + outage_s + 90.0, broker_at=(RELEASE_S,), broker_down_s=outage_s),
        releases=(ReleasePlan(at_s=RELEASE_S + outage_s + 100.0, canary_count=devices),),
        bin_s=1.0,
    )


def _reporter(situation: str, usual: float) -> Callable[..., Comparison]:
    def report(name: str, estimated: float, simulated: float, tolerance: float = usual) -> Comparison:
        return Comparison(
            situation=situation,
            name=name,
            estimated=float(estimated),
            simulated=float(simulated),
            tolerance=tolerance,
        )

    return report
