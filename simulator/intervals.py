"""Means with their confidence, from few runs: Student's distribution, without a library for it."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, median, stdev
from typing import Final

from msgspec import Struct

CONFIDENCE: Final = 0.95


class Summary(Struct, frozen=True, kw_only=True):
    """Some numbers, summed up. The interval holds the mean of all seeds with 95 % confidence; None for less than two."""

    count: int
    mean: float
    median: float
    low: float | None
    high: float | None


def summary_of(values: Sequence[float]) -> Summary:
    """Sum up at least one number."""
    mean = fmean(values)
    half = half_width(values)
    return Summary(
        count=len(values),
        mean=mean,
        median=median(values),
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
    )


def half_width(values: Sequence[float]) -> float | None:
    """Half of the interval that holds the mean with 95 % confidence; None for fewer than two numbers."""
    count = len(values)
    return student_t(CONFIDENCE, count - 1) * stdev(values) / math.sqrt(count) if count > 1 else None


def student_t(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 0.3 %.

    Args:
        confidence: Between 0 and 1.
        degrees: Of freedom, at least 1.

    The expansion is formula 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical Functions.
    """
    upper = (1 + confidence) / 2
    if degrees == 1:
        return math.tan(math.pi * (upper - 0.5))
    if degrees == 2:
        return (2 * upper - 1) * math.sqrt(2 / (4 * upper * (1 - upper)))
    z = NormalDist().inv_cdf(upper)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return z + math.fsum(term / float(degrees**power) for power, term in enumerate(terms, start=1))
