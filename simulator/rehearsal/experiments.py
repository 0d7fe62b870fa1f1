"""What each step runs: the simulator, or real files. Each gives figures by name; how they are told stands in the step."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

from msgspec.structs import replace

from simulator import estimate
from simulator.estimate_check import (
    Comparison,
    compare_quickly,
    intermittent_scenario,
    outage_scenario,
    plan_of,
    reconnects_in_worst_second,
    run,
    updated_s,
)
from simulator.faults import draw_faults
from simulator.fleet import run_fleet
from simulator.population import mixed_population
from simulator.rehearsal.models import delta_sizes, disk_costs
from simulator.results import FleetResult
from simulator.scenario import DeviceKind, Faults, Model, ReleasePlan, Scenario, Server

Figures = dict[str, float]

MODEL: Final = Model(bytes=2 << 20)
SCALES: Final = {"n10": 10, "n10k": 10_000, "n10m": 10_000_000}
SCALES_ONLINE_HOURS: Final = 2.0
BAD_SHARE: Final = 0.05
CANARY: Final = 20
ROLLOUT_SEEDS: Final = 100
FAULT_SEEDS: Final = 5


def worst_links() -> Figures:
    """One release on a fleet whose links differ a hundredfold."""
    result = run(
        Scenario(
            devices=100, population=mixed_population(), model=MODEL, releases=(_release(100),), bin_s=1.0
        )
    )
    times = result.completion_s
    p50_s, p95_s = times[len(times) // 2], times[len(times) * 95 // 100]
    figures = {"p50_s": p50_s, "p95_s": p95_s, "last_s": times[-1], "ratio": p95_s / p50_s}
    for name, totals in result.kinds.items():
        figures[f"{name}_devices"] = totals.devices
        figures[f"{name}_mb"] = totals.down_bytes / totals.devices / 1e6
    figures["delta_mb"] = _delta_bytes(result) / 1e6
    figures["metered_mb"] = result.kinds["modem"].metered_bytes / 1e6
    return figures


def envelope() -> Figures:
    """The calculator against the simulator."""
    figures: Figures = {}
    for each in compare_quickly():
        _note(figures, each.name.replace(" ", "_"), each)
    result = run(intermittent_scenario(1_000, 12_000))
    plan = plan_of(result.scenario, result)
    busy_s = estimate.busy_seconds(plan, plan.delta_bytes)
    figures["busy_s"] = busy_s
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        reckoned_h = estimate.elapsed_hours(plan, busy_s, share)
        figures[f"{name}_estimated_min"] = reckoned_h * 60
        figures[f"{name}_simulated_min"] = updated_s(result, share) / 60
    return figures


def power_cuts() -> Figures:
    """Power cuts before any effect and in any disk operation, against the same fleet without."""
    scenario = Scenario(devices=60, model=MODEL, releases=(_release(60),))
    faults = Faults(end_s=900.0, crash_effect=0.02, crash_disk=0.001, power_s=300.0)
    quiet, result = run(scenario), run_fleet(replace(scenario, faults=faults))
    cuts = sum(count for name, count in result.faults.items() if name.startswith("power."))
    return {
        "devices": 60,
        "cuts": cuts,
        "cuts_per_device": cuts / 60,
        "at_effect": result.faults.get("power.at_effect", 0),
        "at_disk": result.faults.get("power.at_disk", 0),
        "checks": result.checks,
        "updated": result.versions.get("v2", 0),
        "broken": 0 if result.failure is None else 1,
        "median_extra_percent": 100 * (result.down_bytes_per_device[1] / quiet.down_bytes_per_device[1] - 1),
        "largest_times": result.down_bytes_per_device[3] / quiet.down_bytes_per_device[3],
    }


def delivery() -> Figures:
    """The same delta out of the broker's cache, and by a reply to every device."""
    scenario = Scenario(devices=100, model=MODEL, releases=(_release(100),), bin_s=1.0)
    cached = run(scenario)
    replies = run(replace(scenario, server=Server(retained_bytes_max=1)))
    answered = replies.server.counters["chunks_answered"]
    published = cached.server.counters["chunks_cached"]
    return {
        "devices": 100,
        "delta_mb": _delta_bytes(cached) / 1e6,
        "cached_publishes": published,
        "reply_publishes": answered,
        "times": answered / published,
        "cached_server_mb": cached.server.counters["bytes_published"] / 1e6,
        "reply_server_mb": replies.server.counters["bytes_answered"] / 1e6,
        "cached_s": updated_s(cached, 1.0),
        "reply_s": updated_s(replies, 1.0),
        "cached_in_mb": cached.broker.bytes_in / 1e6,
        "reply_in_mb": replies.broker.bytes_in / 1e6,
        "retained_mb": cached.broker.retained_bytes_peak / 1e6,
    }


def attack() -> Figures:
    """Somebody with the broker's credentials replays what was signed before and spoils chunks."""
    plans = (_release(60), ReleasePlan(version="v3", canary_count=60, failures_max=60, changed_share=0.3))
    scenario = Scenario(devices=60, model=MODEL, releases=plans, keep_alive_s=120)
    faults = Faults(end_s=900.0, replay_s=1.0, poison=0.1)
    quiet, result = run(scenario), run_fleet(replace(scenario, faults=faults))
    return {
        "devices": 60,
        "replays": result.faults.get("attack.replay", 0),
        "poisoned": result.faults.get("network.poison", 0),
        "checks": result.checks,
        "unsigned": 0 if result.failure is None else 1,
        "newest": result.versions.get("v3", 0),
        "extra_percent": 100 * (result.down_bytes / quiet.down_bytes - 1),
    }


def canaries() -> Figures:
    """A release that answers wrongly on one tier of the fleet, rolled out from a hundred seeds."""
    population = (DeviceKind(weight=1 - BAD_SHARE), DeviceKind(name="old", tier="old", weight=BAD_SHARE))
    caught, harmed = 0, []
    for seed in range(1, ROLLOUT_SEEDS + 1):
        plan = ReleasePlan(canary_count=CANARY, kind="wrong", bad_tiers=("old",))
        scenario = Scenario(
            devices=100, seed=seed, population=population, model=Model(bytes=64 << 10), releases=(plan,)
        )
        outcome = run(scenario).rollouts[0]
        caught += outcome.state == "stopped" and sum(outcome.counts.values()) <= CANARY
        harmed.append(outcome.counts.get("rolled_back", 0))
    return {
        "seeds": ROLLOUT_SEEDS,
        "canary": CANARY,
        "bad_percent": 100 * BAD_SHARE,
        "caught_percent": 100 * caught / ROLLOUT_SEEDS,
        "formula_percent": 100 * estimate.canary_detects(BAD_SHARE, CANARY),
        "harmed_most": max(harmed),
        "harmed_mean": sum(harmed) / len(harmed),
        **{f"needed_{percent}": estimate.canary_needed(percent / 100, 0.95) for percent in (1, 2, 5, 10)},
        "needed_tenth": estimate.canary_needed(0.001, 0.95),
    }


def everything_fails() -> Figures:
    """A broker that dies under a thousand devices, and five fleets with faults of every kind."""
    outage_s = 20.0
    storm = run(outage_scenario(1_000, outage_s))
    figures: Figures = {
        "outage_s": outage_s,
        "devices": 1_000,
        "storm": reconnects_in_worst_second(storm, 120.0),
        "storm_estimated": estimate.reconnects_per_s(1_000, outage_s),
        "storm_60_estimated": estimate.reconnects_per_s(1_000, 60.0),
        "storm_large_estimated": estimate.reconnects_per_s(10_000_000, 60.0),
        "fleets": FAULT_SEEDS,
        "faults": 0,
        "checks": 0,
        "broken": 0,
        "updated": 0,
    }
    for seed in range(1, FAULT_SEEDS + 1):
        plan = ReleasePlan(canary_count=40, failures_max=40, wave_timeout_s=600.0)
        scenario = Scenario(
            devices=40, seed=seed, releases=(plan,), faults=draw_faults(seed, 900.0), keep_alive_s=120
        )
        result = run_fleet(scenario)
        figures["faults"] += sum(result.faults.values())
        figures["checks"] += result.checks
        figures["broken"] += result.failure is not None
        figures["updated"] += result.versions.get("v2", 0)
    return figures


EXPERIMENTS: Final[Mapping[str, Callable[[], Figures]]] = {
    "worst-links": worst_links,
    "envelope": envelope,
    "power-cuts": power_cuts,
    "delta-sizes": delta_sizes,
    "delivery": delivery,
    "attack": attack,
    "canaries": canaries,
    "everything-fails": everything_fails,
    "disk-costs": disk_costs,
}
"""By the name that a step gives."""


@lru_cache(maxsize=1)
def scale_figures() -> Figures:
    """What the calculator says of three fleets that are online for two hours a day; every step may quote it."""
    plans = {
        key: estimate.FleetPlan(devices=devices, online_hours=SCALES_ONLINE_HOURS)
        for key, devices in SCALES.items()
    }
    figures = {
        f"{key}_{line.name}": line.value for key, plan in plans.items() for line in estimate.estimate(plan)
    }
    for key, plan in plans.items():
        figures[f"{key}_file_percent_bytes"] = figures[f"{key}_full_update_bytes"] * plan.devices / 100
    units = {"mb": 1e6, "gb": 1e9, "tb": 1e12}
    scaled = {
        f"{name.removesuffix('bytes')}{unit}": value / factor
        for name, value in figures.items()
        if name.endswith("_bytes")
        for unit, factor in units.items()
    }
    return {**figures, **scaled}


def _release(devices: int) -> ReleasePlan:
    """A release that everybody is asked for at once and that nobody's failure stops."""
    return ReleasePlan(canary_count=devices, failures_max=devices, changed_share=0.3)


def _delta_bytes(result: FleetResult) -> int:
    return min(result.delta_bytes.values())


def _note(figures: Figures, name: str, comparison: Comparison) -> None:
    figures[f"{name}_estimated"] = comparison.estimated
    figures[f"{name}_simulated"] = comparison.simulated
