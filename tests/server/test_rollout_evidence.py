"""The tests by which rollouts are judged: what they promise, computed exactly where that can be done."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rollout_stats import chances_of_stopping
from protocol.errors import RequestError
from protocol.messages import LatencySummary, TrialEvidence, UpdateReport
from server.rollouts.evidence import (
    ALTERNATIVES,
    EProcess,
    Evidence,
    Outcome,
    RateTest,
    Rules,
    median_bound,
    share,
)
from server.rollouts.latency import LatencyTest, control_bounds
from server.rollouts.records import Control

GOOD, BAD, APART, OPEN = Outcome.GOOD, Outcome.BAD, Outcome.APART, Outcome.OPEN


def _test(*outcomes: tuple[str, Outcome], rules: Rules | None = None) -> RateTest:
    test = RateTest(rules or Rules())
    for stratum, outcome in outcomes:
        test.evidence.settle(test.evidence.ask(stratum), outcome)
    return test


def _stops_at(devices: int) -> int:
    """Failures of so many devices of one tier, the failures at the end, at which a rollout stops."""
    for failed in range(1, devices + 1):
        if _test(*[("pi", GOOD)] * (devices - failed), *[("pi", BAD)] * failed).is_failing:
            return failed
    raise AssertionError("never")


def test_a_release_that_is_as_good_as_asked_for_is_stopped_less_than_once_in_a_thousand_rollouts() -> None:
    assert 0 < chances_of_stopping(0.01, 1_000)[-1] <= 0.001


def test_a_bad_release_is_stopped_by_few_devices() -> None:
    assert chances_of_stopping(1.0, 5)[2] == 1
    assert chances_of_stopping(0.2, 20)[20] > 0.5
    assert chances_of_stopping(0.05, 600)[-1] > 0.98


@pytest.mark.parametrize(
    ("failed", "devices"), [(3, 5), (4, 10), (4, 20), (6, 50), (8, 100), (11, 200), (17, 500)]
)
def test_the_plain_mixture_has_the_limits_that_were_computed_for_it(failed: int, devices: int) -> None:
    process = EProcess(0.01, ALTERNATIVES)
    assert process.value(failed, devices) >= 1_000 > process.value(failed - 1, devices)


def test_failures_that_stop_a_rollout_of_one_tier() -> None:
    assert [_stops_at(devices) for devices in (2, 5, 10, 20, 50, 100, 200)] == [2, 3, 4, 4, 6, 8, 11]


def test_a_tier_that_fails_is_found_among_many_devices_that_do_not() -> None:
    good = [("pi", GOOD)] * 100
    assert not _test(*good, *[("old", BAD)] * 2).is_failing
    test = _test(*good, *[("old", BAD)] * 3)
    assert test.is_failing
    finding = test.evidence.finding()
    assert (finding.stratum, finding.failed, finding.asked) == ("old", 3, 3)


def test_the_weights_of_any_number_of_tiers_are_a_half() -> None:
    assert math.isclose(sum(share(number) for number in range(1, 10_000)), 0.5, rel_tol=1e-3)


def test_fast_failures_do_not_bias_the_test_and_late_successes_change_nothing() -> None:
    test = RateTest(Rules())
    for _ in range(200):
        test.evidence.ask("pi")
    for position in (0, 60, 120):  # all that have answered are failures: of two hundred that is little
        test.evidence.settle(position, BAD)
    assert not test.is_failing
    before = test.evidence.finding()
    for position in range(1, 200):
        if position not in {60, 120}:
            test.evidence.settle(position, GOOD)
    assert test.evidence.finding() == before


def test_early_successes_do_not_outvote_those_that_were_asked_before() -> None:
    test = RateTest(Rules())
    for _ in range(103):
        test.evidence.ask("pi")
    for position in range(3, 103):
        test.evidence.settle(position, GOOD)
    for position in range(3):  # the slow ones answer at last
        test.evidence.settle(position, BAD)
    assert test.is_failing


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from([GOOD, BAD, APART])), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_evidence_does_not_depend_on_the_order_of_answers_and_never_falls_by_one(
    outcomes: list[tuple[str, Outcome]], rng: random.Random
) -> None:
    evidence = Evidence(EProcess(0.01, ALTERNATIVES))
    for stratum, _ in outcomes:
        evidence.ask(stratum)
    order = list(range(len(outcomes)))
    rng.shuffle(order)
    before = 0.0
    for position in order:
        evidence.settle(position, outcomes[position][1])
        assert evidence.finding().odds >= before * (1 - 1e-12)
        before = evidence.finding().odds
    plain = _test(*outcomes).evidence
    assert (evidence.finding(), evidence.failed, evidence.counted) == (
        plain.finding(),
        plain.failed,
        plain.counted,
    )
    assert evidence.strata() == plain.strata()


def test_a_device_that_speaks_after_all_takes_its_failure_back() -> None:
    test = _test(*[("pi", BAD)] * 3)
    before = test.is_failing
    test.evidence.settle(0, GOOD)
    test.evidence.settle(1, APART)
    assert (before, test.is_failing) == (True, False)
    assert (test.evidence.failed, test.evidence.counted) == (1, 2)


def test_wald_accepts_after_112_devices_without_a_failure() -> None:
    assert _test().proof_needs() == 112
    assert not _test(*[("pi", GOOD)] * 111).is_proved
    assert _test(*[("pi", GOOD)] * 112).is_proved
    one = _test(*[("pi", GOOD)] * 112, ("pi", BAD))
    assert not one.is_proved
    assert one.proof_needs() == 39


def test_one_failure_is_plausible_among_forty_and_not_among_thirty() -> None:
    assert _test(*[("pi", GOOD)] * 40, ("pi", BAD)).is_plausible
    assert not _test(*[("pi", GOOD)] * 30, ("pi", BAD)).is_plausible


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.01), (0.0, 0.05), (0.01, 1.0), (0.05, 0.05)])
def test_rates_that_cannot_be_told_apart_are_refused(low: float, high: float) -> None:
    with pytest.raises(RequestError):
        Rules(acceptable=low, unacceptable=high).checked()


def test_a_bound_of_a_median_needs_enough_values() -> None:
    values = [float(value) for value in range(1, 31)]
    assert median_bound(values[:10], 0.0005) is None  # 2^-10 is more
    assert median_bound(values[:11], 0.0005) == 11
    assert median_bound(values, 0.025) == 21  # of thirty, as tables of the sign test have it
    assert median_bound([], 0.5) is None


def _measured(latency_ms: float) -> UpdateReport:
    latency = LatencySummary(p50_ms=latency_ms, p95_ms=latency_ms, p99_ms=2 * latency_ms)
    evidence = TrialEvidence(prompts_passed=1, prompts_total=1, latency=latency)
    return UpdateReport(rollout="r1", sequence=1, version="2", outcome="committed", evidence=evidence)


def _latency_test(latencies_ms: list[float], tier: str = "pi") -> LatencyTest:
    test = LatencyTest(Rules(), [Control(tier="pi", devices=40, p50_ms=10.0, p99_ms=20.0)])
    for position, latency_ms in enumerate(latencies_ms):
        test.ask(tier)
        test.settle(position, "committed", _measured(latency_ms))
    return test


def test_a_release_that_is_slower_than_its_controls_is_found() -> None:
    assert _latency_test([13.0] * 12).finding() is None
    slow = _latency_test([13.0] * 20).finding()
    assert slow is not None
    assert (slow.tier, slow.slower, slow.measured) == ("", 20, 20)
    assert slow.odds >= slow.limit == 4_000


def test_a_release_that_is_as_fast_and_a_tier_without_controls_are_not() -> None:
    assert _latency_test([12.0] * 200).finding() is None
    assert _latency_test([11.0, 14.0] * 100).finding() is None
    assert _latency_test([100.0] * 200, tier="jetson").finding() is None


def test_control_groups_are_bounds_and_small_ones_are_left_out() -> None:
    measured = [LatencySummary(p50_ms=float(each), p95_ms=50.0, p99_ms=2.0 * each) for each in range(1, 41)]
    bounds = control_bounds(Rules(), {"pi": measured, "jetson": measured[:8]})
    assert set(bounds) == {"pi"}
    count, p50_ms, p99_ms = bounds["pi"]
    assert count == 40
    assert 20 < p50_ms < 40
    assert p99_ms == 2 * p50_ms
