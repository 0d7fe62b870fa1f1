"""Intervals beside the same by SciPy, and what they promise."""

import numpy as np
import pytest
from scipy import stats

from server.requantize.figures import BLOCK_TOKENS, blocks, difference, figures, share_of_gain
from server.requantize.readings import Reading
from server.requantize.texts import RUN_TOKENS
from server.scorecard.statistics import clustered_ratio
from tests.server.requantize.readings import COUNT, reading


def by_blocks(values: np.ndarray) -> np.ndarray:
    return np.array([block.sum() for block in blocks(values)])


def test_blocks_hold_every_token_once_and_none_spans_two_runs() -> None:
    values = np.arange(COUNT, dtype=np.float64)
    found = blocks(values)
    assert np.concatenate(found).tolist() == values.tolist()
    runs = [{int(value) // (RUN_TOKENS - 1) for value in block} for block in found]
    assert all(len(run) == 1 for run in runs)
    assert all(abs(len(block) - BLOCK_TOKENS) <= 1 for block in found)


def test_the_interval_of_a_difference_is_that_of_a_paired_bootstrap_over_blocks() -> None:
    one, other = reading(1, 3.0, 0.20, 0.2, noise=0.3), reading(2, 3.0, 0.21, 0.2, noise=0.3)
    values = np.subtract(one.kl, other.kl)
    sizes = np.array([len(block) for block in blocks(values)])
    direct = stats.bootstrap(
        (by_blocks(values), sizes),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = difference("kl", one, other)
    assert found.value == pytest.approx(values.mean())
    width = direct.high - direct.low
    assert (found.low, found.high) == pytest.approx((direct.low, direct.high), abs=0.06 * width)


def test_pairing_takes_out_what_is_hard_for_every_file() -> None:
    one, other = reading(1, 3.0, 0.20, 0.2), reading(2, 3.0, 0.21, 0.2)
    paired, alone = difference("kl", one, other), figures(one).kl
    assert paired.high < 0
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_a_share_of_the_gain_is_that_of_the_sums() -> None:
    installed, plain, chosen = (reading(seed, nll, 0.2, 0.2) for seed, nll in ((1, 3.0), (2, 2.7), (3, 2.72)))
    found = share_of_gain(chosen, installed, plain)
    assert found is not None
    whole, part = np.subtract(installed.nll, plain.nll), np.subtract(installed.nll, chosen.nll)
    assert found.value == pytest.approx(part.sum() / whole.sum())
    direct = stats.bootstrap(
        (by_blocks(part), by_blocks(whole)),
        lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = direct.high - direct.low
    assert (found.low, found.high) == pytest.approx((direct.low, direct.high), abs=0.06 * width)
    assert share_of_gain(plain, installed, plain) == clustered_ratio([1.0], [1.0])


def test_where_nothing_was_gained_there_is_no_share_of_it() -> None:
    installed, plain = reading(1, 3.0, 0.2, 0.2), reading(2, 3.0001, 0.2, 0.2)
    assert share_of_gain(plain, installed, plain) is None
    assert figures(plain, installed, plain).gain is None


def test_an_interval_holds_the_true_difference_about_as_often_as_it_promises() -> None:
    draws = np.random.default_rng(11)
    held = 0
    rounds = 120
    for _ in range(rounds):
        noise = draws.normal(0, 1, COUNT + 20)
        values = np.convolve(noise, np.ones(21) / 21, "valid")  # neighbours say much of each other
        found = difference("kl", reading_of(values + 10.1), reading_of(np.full(COUNT, 10.0)))
        held += found.low <= 0.1 <= found.high
    assert held / rounds >= 0.88  # 0.95 less what 120 rounds leave open and 64 blocks promise too much


def reading_of(kl: np.ndarray) -> Reading:
    return Reading(nll=tuple(kl), kl=tuple(kl), same=(True,) * len(kl))
