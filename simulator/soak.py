"""Seeds one after the other: small fleets, several releases, every fault at rates of its own; anything found is shrunk."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from simulator.faults import draw_faults
from simulator.fleet import run_fleet
from simulator.population import mixed_population
from simulator.results import Failure, FleetResult
from simulator.scenario import Model, ReleasePlan, Scenario
from simulator.shrink import shrink

FAULTS_END_S: Final = 2_400.0
"""Time for several releases under faults."""


def soak_scenario(seed: int, devices: int) -> Scenario:
    """The scenario of one seed: two good releases, a bad one that has to be stopped, and a good one again."""

    def plan(version: str) -> ReleasePlan:
        return ReleasePlan(version=version, failures_max=devices, wave_timeout_s=600.0, canary_count=4)

    bad = ReleasePlan(version="bad", kind="wrong", failures_max=3, wave_timeout_s=600.0, canary_count=4)
    return Scenario(
        name="soak",
        seed=seed,
        devices=devices,
        population=mixed_population(),
        model=Model(bytes=192 << 10),
        releases=(plan("v2"), plan("v3"), bad, plan("v4")),
        faults=draw_faults(seed, FAULTS_END_S),
        keep_alive_s=120,
    )


class SeedResult(Struct, frozen=True, kw_only=True):
    """What came of one seed."""

    seed: int
    digest: str
    failure: Failure | None
    updates: int
    faults: dict[str, int]
    checks: int
    events: int
    excused: int


def run_seed(seed: int, devices: int) -> SeedResult:
    """Run the scenario of a seed."""
    result = run_fleet(soak_scenario(seed, devices))
    return SeedResult(
        seed=seed,
        digest=result.trace_digest,
        failure=result.failure,
        updates=result.updates,
        faults=result.faults,
        checks=result.checks,
        events=result.events,
        excused=result.excused,
    )


def run_seeds(seeds: Iterable[int], devices: int, workers: int) -> Iterator[SeedResult]:
    """Run seeds, several at a time; results in the order of the seeds."""
    if workers == 1:
        yield from (run_seed(seed, devices) for seed in seeds)
        return
    # A fresh interpreter each: nothing of this process is in theirs.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(run_seed, devices=devices), seeds)


def explain(scenario: Scenario, failure: Failure, command: str) -> FleetResult:
    """Shrink a failing scenario, and tell the story of the device involved."""
    small = shrink(scenario, failure, run_fleet)
    again = run_fleet(small)
    device = again.failure.device if again.failure is not None else -1
    told = run_fleet(small, follow=device, command=command)
    return replace(told, shrunk=small)


def total_faults(results: Iterable[SeedResult]) -> Counter[str]:
    """Faults of all seeds, by kind."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.faults)
    return total
