"""The fewest bytes that are good enough: a search over budgets. Pure; each trial is a file that is made and measured by the caller.

More bytes give a better file, so the budgets are halved on a scale of ratios. Trials are few, since each takes a minute: the search ends within
`RATIO` of the fewest bytes, which is less than the next model moves them. Beyond the new weights (extrapolation) a smaller file may do; each
further setting has to be good enough at clearly fewer bytes than the best one before, or costs one trial.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

RATIO: Final = 1.15
"""Between the found budget and one that is too small."""

TRIALS_MAX: Final = 12
"""Of one setting: enough for a ratio of 10^11 between the ends, where files are smaller than 4 GB."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A file that was made and measured.

    Attributes:
        budget_bytes: What its delta was allowed to weigh.
        extrapolation: With which it was made.
        delta_bytes: What it weighs.
        is_enough: Whether it keeps what has to be kept.
    """

    budget_bytes: int
    extrapolation: float
    delta_bytes: int
    is_enough: bool


def fewest_bytes(
    attempt: Callable[[int, float], Trial], low: int, high: int, extrapolations: Sequence[float] = (0.0,)
) -> Trial | None:
    """Search the smallest budget with which a file is good enough.

    Args:
        attempt: Makes and measures a file of a budget in bytes, and an extrapolation.
        low: A budget of which nothing is expected; at least 1.
        high: The largest one that makes sense: what the plain file's delta weighs.
        extrapolations: Settings that are tried, in this order.

    Returns:
        The best trial; None where not even `high` is enough.
    """
    best: Trial | None = None
    for extrapolation in extrapolations:
        top = high
        if best is not None:
            top = int(best.delta_bytes / RATIO)
            if top <= low or not (first := attempt(top, extrapolation)).is_enough:
                continue
            best = first
        found = _halved(attempt, low, top, extrapolation, is_known=best is not None)
        if found is not None and (best is None or found.delta_bytes < best.delta_bytes):
            best = found
    return best


def _halved(
    attempt: Callable[[int, float], Trial], low: int, high: int, extrapolation: float, *, is_known: bool
) -> Trial | None:
    best: Trial | None = None
    for _ in range(TRIALS_MAX):
        if high <= low * RATIO:
            break
        trial = attempt(round(math.sqrt(low * high)), extrapolation)
        if trial.is_enough:
            best = trial
            high = min(trial.budget_bytes, max(low, trial.delta_bytes))
        else:
            low = trial.budget_bytes
    if best is None and not is_known:
        last = attempt(high, extrapolation)
        return last if last.is_enough else None
    return best
