"""The statistics of rollouts, with fewer of them."""

import json
import random

import pytest
from msgspec.structs import replace

from benchmarks.rollout_stats import FLEET, PLAN, RULES, Row, lines_of, main, measure, play, promises, wilson
from server.rollouts.waves import parse_waves


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Bad rates end soon; of the good one only a few."""
    counts = {0.01: 30, 0.2: 400, 1.0: 200}
    return [
        measure(rate, rule, count if rule == "tests" else 30, seed=2)
        for rate, count in counts.items()
        for rule in RULES
    ]


def test_what_is_promised_is_kept(rows: list[Row]) -> None:
    kept = promises(rows)
    assert len(kept) == 3
    assert [promise.text for promise in kept if not promise.is_kept] == []


def test_the_rules_stop_where_their_thresholds_say(rows: list[Row]) -> None:
    by = {(row.rate, row.rule): row for row in rows}
    assert by[1.0, "share"].failed_median == 10
    assert by[1.0, "count"].failed_max == 1
    assert by[0.01, "count"].stopped == 30  # within a thousand devices a failure is as good as certain
    assert by[0.01, "tests"].asked_median == FLEET
    assert len(lines_of(rows)) == 1 + len(rows)


def test_a_rollout_ends_when_it_is_stopped_or_has_asked_everybody() -> None:
    rng = random.Random(5)
    plan = parse_waves(PLAN)
    played = [play(RULES["tests"](300, plan), 0.05, 300, 5, rng) for _ in range(100)]
    assert {each.asked for each in played if not each.is_stopped} == {300}
    assert sum(each.is_stopped for each in played) > 50


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert measure(0.1, "tests", 20, seed=3) == measure(0.1, "tests", 20, seed=3)
    assert measure(0.1, "tests", 20, seed=3) != measure(0.1, "tests", 20, seed=4)


def test_a_promise_that_is_not_kept_is_told(rows: list[Row]) -> None:
    (row,) = [row for row in rows if (row.rate, row.rule) == (0.01, "count")]
    (promise,) = promises([replace(row, rule="tests")])
    assert not promise.is_kept


def test_intervals_are_those_of_wilson() -> None:
    low, high = wilson(0, 10_000)
    assert low == 0
    assert high == pytest.approx(0.000384, rel=0.01)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_the_command_prints_what_can_be_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--exact", "--json", "--fleet", "300"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["stopped_at_1_percent"] < 0.001
    assert found["median_at_20_percent"] == 18
