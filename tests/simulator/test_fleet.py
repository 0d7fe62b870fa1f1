"""Fleets in virtual time: what a user of the simulator would notice."""

import os

import msgspec
import pytest

from device.agent import Agent
from device.executor import Executor
from server.broker.core import BrokerCore
from server.coordinator import Coordinator
from server.releases.publisher import Publisher
from simulator.checks.safety import PromiseBrokenError
from simulator.faults import draw_faults
from simulator.fleet import run_fleet
from simulator.results import FleetResult
from simulator.scenario import DeviceKind, Faults, Link, Model, ReleaseKind, ReleasePlan, Scenario
from simulator.shrink import shrink
from simulator.soak import run_seed, soak_scenario
from simulator.trace import Trace
from simulator.world import World
from tests.defects.__main__ import seeds_needed
from tests.defects.planted import DEFECTS, commit_before_trial
from tests.determinism.__main__ import digests

SMALL = Model(bytes=128 << 10)
PATIENT = ReleasePlan(failures_max=1_000, wave_timeout_s=600.0)


def fleet(devices: int = 60, seed: int = 1, **fields: object) -> FleetResult:
    given: dict[str, object] = {"model": SMALL, **fields}
    return run_fleet(Scenario(devices=devices, seed=seed, **given))  # type: ignore[arg-type]  # a test's keyword arguments


def kept(result: FleetResult) -> FleetResult:
    assert result.failure is None, result.failure
    return result


def test_a_fleet_takes_a_release_through_canaries_and_the_rest() -> None:
    result = kept(fleet(200))
    assert result.versions == {"v2": 200}
    assert [rollout.state for rollout in result.rollouts] == ["finished"]
    assert result.rollouts[0].counts == {"committed": 200}
    assert len(result.completion_s) == result.updates == 200
    assert result.faults == {}
    assert result.samples[0].states == {"down": 200}
    assert result.down_bytes > 200 * min(result.delta_bytes.values())


def test_the_code_that_decides_is_the_code_that_runs_live() -> None:
    world = World(Scenario(devices=1, model=SMALL), Trace())
    world.run()
    member = world.devices[0]
    parts = (
        member.agent,
        member.executor,
        world.server.coordinator,
        world.server.publisher,
        world.broker.core,
    )
    assert [type(part) for part in parts] == [Agent, Executor, Coordinator, Publisher, BrokerCore]


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first, again, other = (
        fleet(30, seed, faults=draw_faults(7, 600.0), releases=(PATIENT,)) for seed in (3, 3, 4)
    )
    replayed = msgspec.structs.replace(again, wall_s=0.0, cpu_s=0.0, peak_memory_bytes=0)
    assert msgspec.structs.replace(first, wall_s=0.0, cpu_s=0.0, peak_memory_bytes=0) == replayed
    assert first.trace_digest != other.trace_digest


def test_a_run_does_not_depend_on_the_order_of_hashes() -> None:
    first, second = (digests(5, 2, 24, hash_seed) for hash_seed in ("1", "4711"))
    assert list(first) == [5, 6]
    assert first == second


@pytest.mark.parametrize("kind", ["wrong", "slow", "hungry", "crashes", "hangs", "unloadable", "kills"])
def test_a_bad_release_is_taken_back_and_its_rollout_stops(kind: ReleaseKind) -> None:
    plan = ReleasePlan(version="bad", kind=kind, canary_count=5, wave_timeout_s=900.0)
    result = kept(fleet(60, releases=(plan,), faults=Faults(end_s=1.0)))
    assert result.rollouts[0].state == "stopped"
    assert result.versions == {"v1": 60}
    tried = sum(count for status, count in result.rollouts[0].counts.items() if status != "withdrawn")
    assert tried <= 5


def test_a_release_that_is_bad_on_one_tier_only_is_taken_back_there() -> None:
    kinds = (DeviceKind(name="pi", tier="pi"), DeviceKind(name="nano", tier="nano"))
    plan = ReleasePlan(version="v2", kind="wrong", bad_tiers=("nano",), canary_count=6, failures_max=100)
    result = kept(fleet(40, population=kinds, releases=(plan,)))
    assert result.versions == {"v1": result.kinds["nano"].devices, "v2": result.kinds["pi"].devices}


def test_every_kind_of_fault_is_injected_and_the_fleet_converges() -> None:
    faults = Faults(
        end_s=900.0, drop=0.3, cut=0.01, duplicate=0.5, delay=0.05, poison=0.1, storage=0.01,
        crash_effect=0.005, crash_disk=0.005, power_s=600.0, partition_s=200.0, clock_s=300.0, clock_unset=0.1,
        broker_s=300.0, forget_s=200.0, server_s=300.0, replay_s=30.0, disk_full=0.1,
    )  # fmt: skip
    result = kept(fleet(40, faults=faults, releases=(PATIENT,), keep_alive_s=60))
    injected = {kind for kind, count in result.faults.items() if count}
    assert injected >= {
        "attack.replay", "broker.crash", "broker.forget", "clock.step", "clock.unset", "disk.error", "disk.full",
        "network.cut", "network.delay", "network.drop", "network.duplicate", "network.link_down",
        "network.partition", "network.poison", "power.at_disk", "power.at_effect", "power.cut", "server.crash",
    }  # fmt: skip
    assert result.versions == {"v2": 40}
    assert result.virtual_s >= 900.0


def test_a_broker_that_dies_in_the_middle_of_a_rollout_costs_time_only() -> None:
    slow = DeviceKind(link=Link(down_bytes_per_s=4_000, up_bytes_per_s=4_000, spread=4.0))
    faults = Faults(end_s=3_600.0, broker_progress=0.3)
    result = kept(fleet(60, population=(slow,), faults=faults, releases=(PATIENT,)))
    assert result.faults == {"broker.crash": 1}
    assert result.versions == {"v2": 60}


def test_retained_messages_that_are_lost_again_and_again_cost_time_only() -> None:
    result = kept(fleet(60, faults=Faults(end_s=600.0, forget_s=1.0), releases=(PATIENT,)))
    assert result.faults["broker.forget"] > 100
    assert result.versions == {"v2": 60}
    assert result.server.counters.get("chunks_answered", 0) + result.server.counters.get(
        "metadata_answered", 0
    )


def test_a_fleet_that_lost_its_broker_comes_back_spread_out() -> None:
    result = kept(fleet(300, faults=Faults(end_s=400.0, broker_at=(100.0,), broker_down_s=30.0)))
    sizes = [sample.connections for sample in result.samples if 130.0 <= sample.at_s <= 200.0]
    assert sizes[0] < 150
    assert sizes[-1] == 301


def test_a_device_at_a_slow_shared_line_waits_for_its_neighbours() -> None:
    def completion(site_devices: int) -> float:
        link = Link(site_devices=site_devices, site_bytes_per_s=10_000)
        return kept(fleet(30, population=(DeviceKind(link=link),))).completion_s[-1]

    assert completion(30) > 3 * completion(1)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_planted_on_purpose_is_found(name: str) -> None:
    count, detail = seeds_needed(name, 10)
    assert 0 < count <= 10, detail


def test_a_failure_is_shrunk_and_fails_in_the_same_way() -> None:
    with commit_before_trial():
        scenario = soak_scenario(1, 40)
        failure = run_fleet(scenario).failure
        assert failure is not None
        small = shrink(scenario, failure, run_fleet)
        again = run_fleet(small)
    assert small.devices < 5
    assert small.faults == Faults(end_s=scenario.faults.end_s)
    assert again.failure is not None
    assert again.failure.promise == failure.promise


def test_a_run_that_does_not_end_in_time_is_a_failure() -> None:
    failure = fleet(5, duration_s=60.0).failure
    assert failure is not None
    assert (failure.promise, failure.at_s) == (9, 60.0)


def test_the_story_of_a_device_is_told_without_changing_the_run() -> None:
    plain = fleet(10)
    told = run_fleet(plain.scenario, follow=3)
    assert told.trace_digest == plain.trace_digest
    assert any("device 3: committing committed idle" in line for line in told.story)
    assert not any("device 4:" in line for line in told.story)


def test_a_broken_promise_names_itself() -> None:
    error = PromiseBrokenError(4, 7, "late")
    assert (error.promise, error.device, str(error)) == (4, 7, "promise 4: late")


@pytest.mark.slow
def test_seeds_with_every_fault_keep_the_promises() -> None:
    for seed in range(1, 1 + int(os.environ.get("WHIMBREL_SOAK_SEEDS", "8"))):
        result = run_seed(seed, 30)
        assert result.failure is None, (seed, result.failure)


@pytest.mark.slow
def test_the_cost_of_a_device_does_not_grow_with_the_fleet() -> None:
    small, large = (kept(fleet(count)) for count in (500, 2_000))
    assert large.events / 2_000 < 1.2 * small.events / 500
    assert large.cpu_s / 2_000 < 2.0 * small.cpu_s / 500
