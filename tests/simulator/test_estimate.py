"""The formulas beside worked cases, beside chance, and beside the simulator."""

import json
import random
from itertools import pairwise

import pytest
from msgspec.structs import replace

from device.reconnect import Backoff
from protocol.chunks import chunk_count
from simulator import estimate
from simulator.cli import main
from simulator.estimate import FleetPlan
from simulator.estimate_check import Comparison, compare_quickly

SOMETIMES = FleetPlan(online_hours=6.0, sessions_per_day=12.0, link_kb_per_s=20.0)


def test_the_figures_of_an_always_online_fleet_agree_with_the_simulator() -> None:
    comparisons = list(compare_quickly())
    assert {each.name for each in comparisons} >= {"update_bytes", "online_s", "reports", "retained_bytes"}
    for each in comparisons:
        assert each.is_within, f"{each.name}: {each.ratio:.2f}"


def test_a_comparison_is_off_in_both_directions() -> None:
    def ratio(estimated: float) -> Comparison:
        return Comparison(situation="s", name="n", estimated=estimated, simulated=100.0, tolerance=0.25)

    assert [ratio(value).is_within for value in (79.0, 81.0, 124.0, 126.0)] == [False, True, True, False]


def test_bytes_grow_with_loss_and_by_less_than_a_twentieth_otherwise() -> None:
    assert 1.02 < estimate.on_air_bytes(4e6, 0.0) / 4e6 < 1.05
    assert estimate.on_air_bytes(4e6, 0.5) == pytest.approx(2 * estimate.on_air_bytes(4e6, 0.0))


def test_a_file_of_one_chunk_needs_no_index() -> None:
    assert estimate.chunks_of(60_000) == 1
    assert estimate.chunks_of(4e6) == chunk_count(4_000_000) + 1


def test_hours_are_what_drawing_stretches_by_chance_gives() -> None:
    busy_s, rng = 3_000.0, random.Random(1)
    on_s, off_s = 1_800.0, 5_400.0
    useful = [max(0.0, rng.expovariate(1 / on_s) - rng.uniform(0, 60)) for _ in range(100_000)]
    mean_useful_s = sum(useful) / len(useful)

    def elapsed_s() -> float:
        waits = int(rng.random() >= 0.25)
        at = rng.expovariate(1 / mean_useful_s)
        while at < busy_s:
            waits += 1
            at += rng.expovariate(1 / mean_useful_s)
        return busy_s + sum(rng.expovariate(1 / (off_s + 30)) for _ in range(waits))

    drawn = sorted(elapsed_s() for _ in range(20_000))
    for share in (0.25, 0.5, 0.95):
        hours = estimate.elapsed_hours(SOMETIMES, busy_s, share)
        assert hours == pytest.approx(drawn[int(share * len(drawn))] / 3_600, rel=0.05)


def test_who_is_always_online_waits_for_the_transfer_only() -> None:
    assert estimate.elapsed_hours(FleetPlan(), 7_200.0, 0.95) == 2.0


def test_a_wave_takes_as_long_as_the_broker_needs_for_it() -> None:
    plan = FleetPlan(broker_mb_per_s=1.0)
    line_h = 1_000 * estimate.update_bytes(plan.delta_bytes, 0.01) / 1e6 / 3_600
    assert estimate.wave_hours(plan, 1_000, plan.delta_bytes) == pytest.approx(line_h)
    assert estimate.wave_hours(replace(plan, site_devices=10), 1_000, plan.delta_bytes) == pytest.approx(
        line_h / 10
    )


@pytest.mark.parametrize("outage_s", [5.0, 60.0])
def test_a_storm_is_what_the_devices_own_jitter_makes(outage_s: float) -> None:
    arrivals = []
    for seed in range(20_000):
        backoff, at = Backoff(random.Random(seed)), 0.0
        while at < outage_s:
            at += backoff.wait_s()
        arrivals.append(at - outage_s)
    worst = max(sum(second <= each < second + 1 for each in arrivals) for second in range(60))
    assert estimate.reconnects_per_s(20_000, outage_s) == pytest.approx(worst, rel=0.2)


def test_longer_outages_make_flatter_storms() -> None:
    peaks = [estimate.reconnects_per_s(1_000, outage_s) for outage_s in (2.0, 8.0, 32.0, 128.0)]
    assert all(before >= after for before, after in pairwise(peaks))
    assert estimate.reconnects_per_s(1_000, 86_400.0) == pytest.approx(1_000 / 30, rel=0.15)


def test_many_interruptions_join_the_exact_sum_without_a_jump() -> None:
    useful_s = SOMETIMES.online_hours / SOMETIMES.sessions_per_day * 3_600 - 30
    below, above = (estimate.elapsed_hours(SOMETIMES, count * useful_s, 0.5) for count in (198, 203))
    assert below < above < 1.05 * below


def test_canaries_that_are_needed_do_detect() -> None:
    for share in (0.001, 0.05, 0.5, 1.0):
        needed = estimate.canary_needed(share, 0.95)
        assert estimate.canary_detects(share, needed) >= 0.95
        assert needed == 1 or estimate.canary_detects(share, needed - 1) < 0.95


def test_every_figure_shows_its_working_and_its_unit() -> None:
    lines = estimate.estimate(FleetPlan(devices=10_000_000, site_devices=50, online_hours=2.0))
    assert len({line.name for line in lines}) == len(lines)
    for line in lines:
        assert line.value >= 0
        assert line.working


def test_slow_links_are_warned_of() -> None:
    names = [line.name for line in estimate.estimate(FleetPlan(link_kb_per_s=4.0))]
    assert "chunk_s" in names
    assert "chunk_s" not in [line.name for line in estimate.estimate(FleetPlan())]


def test_the_command_prints_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["estimate", "--devices", "1000", "--model-mb", "91.7", "--delta-percent", "3.95"]
    assert main(options) == 0
    assert "91.7 MB x 3.95 % = 3.62 MB" in capsys.readouterr().out
    assert main([*options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["devices"] == 1000
    assert document["values"]["delta_bytes"] == pytest.approx(91.7e6 * 0.0395)
    assert {line["name"] for line in document["lines"]} == set(document["values"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "0"], "--devices: "),
        (["--online-hours", "25"], "--online-hours: "),
        (["--delta-percent", "nan"], "--delta-percent: "),
        (["--outage-s", "0"], "--outage-s: "),
    ],
)
def test_what_cannot_be_is_refused_by_its_option(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
