import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from server.scorecard.statistics import (
    binomial_cdf,
    clustered_mean,
    divergences,
    holm,
    paired,
    quantile,
    wilson,
)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (3, 10), (0, 50), (50, 50), (3571, 14042)])
def test_the_interval_of_a_share_is_wilsons(right: int, count: int) -> None:
    direct = stats.binomtest(right, count).proportion_ci(method="wilson")
    found = wilson(right, count)
    assert found.value == right / count
    assert (found.low, found.high) == pytest.approx((direct.low, direct.high), abs=1e-12)


@pytest.mark.parametrize(("gained", "lost", "count"), [(0, 0, 5), (3, 9, 40), (40, 12, 14042), (7, 7, 14)])
def test_the_test_of_a_change_is_mcnemars_exact_one(gained: int, lost: int, count: int) -> None:
    direct = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert paired(gained, lost, count).p_value == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize(
    ("up", "down"), [(0.05, 0.05), (0.02, 0.1), (0.2, 0.15), (0.01, 0.01), (0.3, 0.05), (0.0, 0.1)]
)
def test_the_interval_of_a_change_holds_the_true_one_as_often_as_it_promises(up: float, down: float) -> None:
    count = 40
    outcomes = np.array(
        [each for each in itertools.product(range(count + 1), repeat=2) if sum(each) <= count]
    )
    others = count - outcomes.sum(axis=1, keepdims=True)
    chances = stats.multinomial.pmf(np.hstack([outcomes, others]), count, [up, down, 1 - up - down])
    changes = [paired(int(gained), int(lost), count).difference for gained, lost in outcomes]
    held = [change.low <= up - down <= change.high for change in changes]
    covered = float(chances[held].sum())
    assert covered >= 0.94


def test_a_change_that_no_question_shows_is_still_uncertain() -> None:
    change = paired(0, 0, 30).difference
    assert change.value == 0
    assert change.low < -0.05
    assert change.high > 0.05


def test_many_groups_are_not_many_findings() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("share", "count"), [(0.5, 9), (0.95, 200), (0.99, 500), (0.99, 100), (0.99, 368), (0.99, 367)]
)
def test_a_quantile_lies_between_values_that_hold_it_with_95_percent(share: float, count: int) -> None:
    values = [float(each) for each in range(1, count + 1)]  # a value is its rank
    found = quantile(values, share)
    assert found.value == math.ceil(share * count)
    if found.low is not None:
        assert stats.binom.cdf(found.low - 1, count, share) <= 0.025
        assert stats.binom.cdf(found.low, count, share) > 0.025 or found.low == found.value
    if found.high is not None:
        assert 1 - stats.binom.cdf(found.high - 1, count, share) <= 0.025
    assert (found.high is None) == (share == 0.99 and count < 368)


def test_a_single_latency_bounds_nothing() -> None:
    found = quantile([7.0], 0.5)
    assert (found.value, found.low, found.high) == (7.0, None, None)


def test_sums_of_a_binomial_distribution() -> None:
    for count, share in ((1, 0.5), (40, 0.025), (1000, 0.99)):
        for successes in (0, count // 3, count - 1, count):
            assert binomial_cdf(successes, count, share) == pytest.approx(
                stats.binom.cdf(successes, count, share), abs=1e-10
            )


def test_divergence_is_that_of_kullback_and_leibler_over_all_of_the_vocabulary() -> None:
    rng = np.random.default_rng(1)
    before, now = (rng.normal(0, 8, (5, 49_152)).astype(np.float32) for _ in range(2))
    direct = special.rel_entr(
        special.softmax(before.astype(np.float64), axis=1), special.softmax(now.astype(np.float64), axis=1)
    ).sum(axis=1)
    assert divergences(before, now) == pytest.approx(direct, rel=1e-9)
    assert divergences(before, before) == pytest.approx(np.zeros(5), abs=1e-12)
    assert divergences(before, before + np.float32(3)) == pytest.approx(np.zeros(5), abs=1e-6)


def test_the_mean_over_texts_is_drawn_by_text() -> None:
    rng = np.random.default_rng(3)
    texts = [
        rng.exponential(scale, 200) for scale in rng.exponential(1.0, 40)
    ]  # positions of a text are alike
    found = clustered_mean([float(text.sum()) for text in texts], [len(text) for text in texts])
    everything = np.concatenate(texts)
    assert found.value == pytest.approx(everything.mean())
    means = np.array([text.mean() for text in texts])
    half = 1.96 * means.std(ddof=1) / math.sqrt(len(texts))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    as_if_independent = 1.96 * everything.std() / math.sqrt(len(everything))
    assert found.high - found.low > 5 * as_if_independent
