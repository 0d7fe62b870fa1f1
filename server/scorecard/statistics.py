"""Shares, differences, quantiles and divergences, each with what its sample size allows one to say. Pure; standard methods, cited."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct

CONFIDENCE: Final = 0.95

RESAMPLES: Final = 2_000
"""Of a bootstrap: the ends of a 95 % interval are then the 50th value from either side."""

Outcome = Literal["better", "same", "worse", "undecided"]
"""How one stands to another, beyond a margin; `same`: no worse."""

_Floats = npt.NDArray[np.float64]


class Interval(Struct, frozen=True, kw_only=True):
    """An estimate and what holds the true value with 95 % confidence."""

    value: float
    low: float
    high: float


class Quantile(Struct, frozen=True, kw_only=True):
    """A quantile of a sample. An end is None where the sample is too small to bound it with 95 % confidence."""

    value: float
    low: float | None
    high: float | None


class Paired(Struct, frozen=True, kw_only=True):
    """Two models on the same questions.

    Attributes:
        count: Questions that both answered.
        gained: Wrong before, right now.
        lost: Right before, wrong now.
        difference: Share of right answers, now less before.
        p_value: Of no difference: McNemar's test, exact, two-sided.
    """

    count: int
    gained: int
    lost: int
    difference: Interval
    p_value: float


def outcome(low: float, high: float, margin: float) -> Outcome:
    """Say what an interval of a difference decides.

    Args:
        low: End of the interval of one less another, larger being better for the one.
        high: Likewise.
        margin: How much is no difference; 0 for exact figures.
    """
    if low > margin:
        return "better"
    if low >= -margin:
        return "same"
    return "worse" if high < -margin else "undecided"


def wilson(right: int, count: int) -> Interval:
    """A share with its score interval (Wilson 1927).

    Args:
        right: How many of them.
        count: Of how many, at least 1.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = 0.0 if right == 0 else (middle - half) / scale  # where rounding would leave 1e-17
    high = 1.0 if right == count else (middle + half) / scale
    return Interval(value=share, low=low, high=high)


def paired(gained: int, lost: int, count: int) -> Paired:
    """Compare two models on the same questions: only those count on which one is right and the other wrong.

    The interval is the adjusted Wald interval of Bonett and Price (2012): half an answer is added in each direction, twice. It holds
    what it promises from some twenty questions on.

    Args:
        gained: Wrong before, right now.
        lost: Right before, wrong now.
        count: Questions that both answered, at least 1.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Paired(
        count=count,
        gained=gained,
        lost=lost,
        difference=Interval(
            value=(gained - lost) / count,
            low=max(-1.0, up - down - half),
            high=min(1.0, up - down + half),
        ),
        p_value=min(1.0, 2 * binomial_cdf(min(gained, lost), gained + lost, 0.5)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979), so that one among fifty is not taken for a finding."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def binomial_cdf(successes: int, count: int, share: float) -> float:
    """Probability of at most so many successes; `share` is above 0 and below 1."""
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(share)
        + (count - k) * math.log1p(-share)
        for k in range(successes + 1)
    ]
    return min(1.0, math.fsum(math.exp(each) for each in logs))


def quantile(values: Sequence[float], share: float) -> Quantile:
    """A quantile by nearest rank, between two order statistics that hold the true one with 95 % confidence.

    The ranks come from the binomial distribution (Conover 1999, section 3.2); no shape is assumed. With few values there is no upper one for
    a high quantile: p99 needs 368 of them.

    Args:
        values: At least one.
        share: Between 0 and 1, for example 0.99.
    """
    ordered = sorted(values)
    count = len(ordered)
    rank = max(1, math.ceil(share * count))
    tail = (1 - CONFIDENCE) / 2
    # P(X_(r) > q) = P(at most r - 1 values are below q); the largest r for which that stays within the tail.
    low = next((r for r in range(rank, 0, -1) if binomial_cdf(r - 1, count, share) <= tail), None)
    high = next((r for r in range(rank, count + 1) if 1 - binomial_cdf(r - 1, count, share) <= tail), None)
    return Quantile(
        value=ordered[rank - 1],
        low=None if low is None else ordered[low - 1],
        high=None if high is None else ordered[high - 1],
    )


def log_softmax(logits: npt.NDArray[np.float32]) -> _Floats:
    """Natural log-probabilities of the last axis, in double precision."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    shifted: _Floats = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return shifted


def divergences(before: npt.NDArray[np.float32], now: npt.NDArray[np.float32]) -> _Floats:
    """Kullback-Leibler divergence KL(before || now) of each row, in nats, over all of the vocabulary.

    Args:
        before: Logits of shape (positions, vocabulary).
        now: Likewise.
    """
    first, second = log_softmax(before), log_softmax(now)
    summed: _Floats = (np.exp(first) * (first - second)).sum(axis=-1)
    return np.maximum(summed, 0.0)  # rounding can leave -1e-17


def clustered_mean(sums: Sequence[float], counts: Sequence[int], seed: int = 0) -> Interval:
    """Mean over positions of several texts; the bootstrap draws texts, since positions of one text depend on each other.

    Percentiles of `RESAMPLES` means (Efron and Tibshirani 1993, chapter 13; Field and Welsh 2007 for clusters).

    Args:
        sums: Of the values of each text.
        counts: Positions of each text; at least one in all.
        seed: Of the draws.
    """
    return clustered_ratio(sums, counts, seed)


def clustered_ratio(
    numerators: Sequence[float], denominators: Sequence[float] | Sequence[int], seed: int = 0
) -> Interval:
    """Ratio of two sums over the same clusters, for example of two gains on the same texts; the bootstrap draws clusters, as above.

    It means something where the sum of the denominators is far from 0, so that hardly any draw has none: those are left out.

    Args:
        numerators: Of each cluster.
        denominators: Likewise; their sum is above 0.
        seed: Of the draws.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    sums = below[drawn].sum(axis=1)
    ratios = above[drawn].sum(axis=1)[sums > 0] / sums[sums > 0]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Interval(value=float(above.sum() / below.sum()), low=float(low), high=float(high))
