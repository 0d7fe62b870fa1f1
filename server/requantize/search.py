"""Which price makes a delta as long as its budget. Pure: what makes and codes files is passed in."""

import math
from collections.abc import Callable
from typing import Final

from protocol.errors import RequestError

ROUNDS_MAX: Final = 12
"""Files that are coded to find the price of a budget; where the curve is smooth, three or four do."""

BUDGET_USED_MIN: Final = 0.96
"""A file that takes less of its budget is not the best one for it yet."""

_PRICE_RANGE: Final = (1e-40, 1e10)
_SLOPE: Final = -0.8
"""How the logarithm of bytes falls with that of the price, before two files say so themselves."""

_SLOPE_MAX: Final = -0.2
_NEAR: Final = 0.1
"""Between the logarithms of bytes: from here on the secant through the ends of a bracket is better than its middle."""

_MARGIN: Final = 0.05
"""Share of a bracket that a guess keeps away from its ends."""


class SmallBudgetError(RequestError):
    """No file of so few bytes was found."""


def price_of_budget(budget: int, floor: int, first: float, bytes_at: Callable[[float], int]) -> float:
    """A price at which the delta has at most `budget` bytes, and nearly as many.

    Args:
        budget: In bytes.
        floor: Bytes of a delta without a changed code: what is sent whatever the price.
        first: Price to begin with.
        bytes_at: Length of the delta at a price; falls with it, nearly always.

    Raises:
        SmallBudgetError: There is no room for a changed code, or no price was found.
    """
    if floor >= budget:
        raise SmallBudgetError(
            f"what is no code takes {floor:,} bytes, the budget is {budget:,}", hint="allow more"
        )
    points: dict[float, int] = {}
    price = first
    for _ in range(ROUNDS_MAX):
        points[price] = bytes_at(price)
        if BUDGET_USED_MIN * budget <= points[price] <= budget:
            return price
        price = _next_price({each: max(1, count - floor) for each, count in points.items()}, budget - floor)
        if price in points:
            break
    within = [each for each in points if points[each] <= budget]
    if not within:
        raise SmallBudgetError(
            f"no file was found whose delta has at most {budget:,} bytes; the smallest has {min(points.values()):,}",
            hint="allow more",
        )
    return min(within)


def _next_price(points: dict[float, int], budget: int) -> float:
    """By the secant of bytes over price, both as logarithms, and between the nearest ones that are known; by their middle where it creeps."""
    aim = math.log(budget * (1 + BUDGET_USED_MIN) / 2)
    known = sorted((math.log(price), math.log(count)) for price, count in points.items())
    cheap = [point for point in known if point[1] > aim]  # and too long
    dear = [point for point in known if point[1] <= aim]
    if cheap and dear:
        (x1, y1), (x2, y2) = cheap[-1], dear[0]
        # 0: no code changes, a file that tells nothing of the slope.
        if y2 <= 0 or _creeps(list(points.values())[-2:], aim):
            return math.exp((x1 + x2) / 2)
        margin = _MARGIN * (x2 - x1)
        guess = x1 + (aim - y1) * (x2 - x1) / (y2 - y1)
        return math.exp(min(max(guess, x1 + margin), x2 - margin))
    x, y = cheap[-1] if cheap else dear[0]
    slope = _SLOPE
    if len(known) > 1:
        slope = min(_SLOPE_MAX, (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0]))
    low, high = (math.log(each) for each in _PRICE_RANGE)
    return math.exp(min(max(x + 1.1 * (aim - y) / slope, low), high))


def _creeps(counts: list[int], aim: float) -> bool:
    """Whether the last two files were both too long or both short enough, and the last one is not near: at a cliff the secant keeps one end, and hardly moves."""
    if len(counts) < 2:
        return False
    before, last = (math.log(count) - aim for count in counts)
    return before * last > 0 and abs(last) > _NEAR
