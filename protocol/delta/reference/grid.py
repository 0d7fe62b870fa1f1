"""Weights that were bfloat16: only some points of their old cell are possible. SPEC section 6.11."""

import functools
from dataclasses import dataclass
from typing import Final

from protocol.delta.context_tables import GRID_SPREADS, LOGISTIC, SHARPNESS
from protocol.delta.reference.arithmetic import clamp, log2_of
from protocol.delta.reference.expect import LOG_UNITS
from protocol.delta.reference.run import Context, Group
from protocol.delta.reference.state import GRID_CHANCES, GRID_MAX, LEANS, SPREAD_UNITS

_TAIL_LOW, _TAIL_HIGH = -16 * 8, 32 * 8
_POINTS: Final = 7  # a bfloat16 number has that many bits below its highest
_CERTAIN: Final = 1 << 20


@functools.cache
def _tails() -> list[list[int]]:
    """Return the sums, over all points from x / 8 on, of the probability of a move by more than x / 8 - 1/2, for each class of b."""
    size = _TAIL_HIGH - _TAIL_LOW + 1
    tails = []
    for sharpness in SHARPNESS:
        tail = [0] * (size + 8)
        for x in range(_TAIL_HIGH, _TAIL_LOW - 1, -1):
            distance = ((8 * x - 32) * sharpness) >> 16
            here = LOGISTIC[min(abs(distance), 1024)]
            tail[x - _TAIL_LOW] = (_CERTAIN - here if distance < 0 else here) + tail[x + 8 - _TAIL_LOW]
        tails.append(tail)
    return tails


def _ceil_shift(value: int, shift: int) -> int:
    return -(-value >> shift)


def _mean_tail(tail: list[int], start: int, count: int) -> int:
    first = clamp(start, _TAIL_LOW, _TAIL_HIGH) - _TAIL_LOW
    last = clamp(start + count * 8, _TAIL_LOW, _TAIL_HIGH) - _TAIL_LOW
    return clamp((tail[first] - tail[last]) // count, 1, _CERTAIN)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of a group, times 2**`shift`, with as many bits as fit."""

    old: int
    new: int
    log_new: int
    sign: int
    divisor: int


def _steps(x: Context, g: Group) -> _Steps | None:
    divisor = x.shape.divisor or 1
    old, new = abs(g.old_step), abs(g.new_step)
    if not old or not new or (g.old_step < 0) != (g.new_step < 0):
        return None
    if abs(log2_of(old) - log2_of(new)) > 4 * 256:
        return None
    shift = 30 - log2_of(old) // 256
    from_step = (old << shift if shift > 0 else old >> -shift) // divisor
    to_step = (new << shift if shift > 0 else new >> -shift) // divisor
    return _Steps(from_step, to_step, log2_of(to_step), -1 if g.old_step < 0 else 1, divisor)


def expect_grid(x: Context, g: Group) -> None:
    """Fill in what the grid says of a group whose codes are expected already."""
    steps = _steps(x, g)
    g.grid = [None] * len(g.old)
    if steps is None:
        return
    g.side = g.side[:]
    spread = x.tensor.spread
    for j, code in enumerate(g.old):
        old = code * steps.sign
        point = (abs(old) * steps.old).bit_length() - 1 - _POINTS  # log2 of the distance of points
        if not old or point < 1 or steps.old >> point > GRID_MAX:
            continue
        first, last = _candidates(steps, old, point)
        if not 1 <= last - first + 1 <= GRID_MAX:
            continue
        expected, mean = g.expected[j] * steps.sign, g.mean[j] * steps.sign if g.mean else 0
        level = spread[g.column + j] + g.level
        up, down = _chances(steps, point, first, last, expected, mean, level)
        total = clamp(up + down, 2, _CERTAIN - 2)
        chance = clamp(((log2_of(total) - log2_of(_CERTAIN - total)) >> 7) + 38, 0, GRID_CHANCES - 1)
        lean = min(abs(log2_of(up) - log2_of(down)) >> 7, LEANS - 1)
        g.grid[j] = (last - first + 1, chance, lean)
        g.side[j] = int((up >= down) == (steps.sign > 0))


def _candidates(steps: _Steps, old: int, point: int) -> tuple[int, int]:
    """Return the first and the last point that give the old code."""
    low, high, slack = (2 * old - 1) * steps.old, (2 * old + 1) * steps.old, steps.old >> 12
    if steps.divisor == 127 and old >= 127:
        high = 254 * steps.old + (steps.old >> 6)
    if steps.divisor == 127 and old <= -127:
        low = -254 * steps.old - (steps.old >> 6)
    return _ceil_shift(low - slack, point + 1), (high + slack) >> (point + 1)


def _chances(
    steps: _Steps, point: int, first: int, last: int, expected: int, mean: int, level: int
) -> tuple[int, int]:
    """Return the probabilities that the weight has moved above, and below, the expected code's cell."""
    above = _ceil_shift((2 * expected + 1) * steps.new, point + 1)
    below = _ceil_shift((2 * expected - 1) * steps.new, point + 1)
    move = (mean * steps.new) >> (13 + point)
    level += (steps.log_new - point * 256) * LOG_UNITS
    b = clamp((level * 6 >> SPREAD_UNITS) + 29, 0, GRID_SPREADS - 1)
    tail, count = _tails()[b], last - first + 1
    return _mean_tail(tail, (above - last) * 8 - move, count), _mean_tail(
        tail, (first - below + 1) * 8 + move, count
    )
