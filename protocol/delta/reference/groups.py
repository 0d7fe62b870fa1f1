"""Codes that share a step: whether they are the expected ones, and by how much they are not. SPEC section 6.11."""

from typing import Final

from protocol.delta.context_tables import CHANGE, OFFSETS, SPREADS
from protocol.delta.reference.arithmetic import clamp, log2_of
from protocol.delta.reference.coder import ONE
from protocol.delta.reference.expect import expect, learn, learn_quiet
from protocol.delta.reference.grid import expect_grid
from protocol.delta.reference.numbers import code_steps
from protocol.delta.reference.run import Context, Group
from protocol.delta.reference.state import CHANCES, GRID_MAX, UNKNOWN

_PLACES: Final = OFFSETS * SPREADS
_GRID_ROW: Final = GRID_MAX + 1
_AROUND: Final = 3
"""Counters of activity for whether the codes before and above changed."""

_ACTIVITY: Final = 4 * 2 * _AROUND
"""Counters of activity in a class of odds."""

_FREQUENT: Final = 13 * _ACTIVITY
"""From this class of odds on changes nearby say nothing."""


def _chance_class(probability: int) -> int:
    """Classes of odds, an octave each."""
    return clamp(((log2_of(probability) - log2_of(ONE - probability)) >> 8) + 14, 0, CHANCES - 1)


_CHANCE_ROWS: Final = tuple(_ACTIVITY * _chance_class(probability) for probability in CHANGE)


def code_group(x: Context, g: Group) -> list[int]:
    """Code a group, and learn from it; returns its codes."""
    t, count = x.tensor, len(g.old)
    if x.is_moving and t.unit == UNKNOWN and g.new_step:
        t.unit = clamp(log2_of(g.new_step) // 256 - 8, -8, 30)
    expect(x, g)
    if x.has_grid:
        expect_grid(x, g)
    busy = t.busy[g.column >> 4]
    chance = 1 + sum(map(CHANGE.__getitem__, g.place)) if x.is_sparse else 0
    if x.is_sparse and _code_quiet(x, g, chance, t.is_left_busy + 2 * (busy & 1)):
        values, codes = [0] * count, g.expected
        t.above[g.column : g.column + count] = values
        t.before_change = t.last_change if count == 1 else 0
        t.last_change = t.is_left_busy = 0
        learn_quiet(x, g, chance)
    else:
        values = _code_values(x, g)
        codes = [code + value for code, value in zip(g.expected, values, strict=True)]
        t.is_left_busy = int(any(values))
        learn(x, g, values)
    t.busy[g.column >> 4] = (busy & ~1) | t.is_left_busy
    return codes


def _code_quiet(x: Context, g: Group, chance: int, around: int) -> int:
    """Code whether all codes are as expected; `chance` is the sum of the probabilities that they are not."""
    chance = clamp((log2_of(chance) * 3 >> 8) - 24, 0, 63)
    is_same = g.old_step == g.new_step and g.old_offset == g.new_offset
    at = x.model.quiet + (chance * 2 + is_same) * 4 + around
    return x.coder.code(at, g.wanted == g.expected)


def _code_values(x: Context, g: Group) -> list[int]:
    """Code by how many codes each new code is not the expected one."""
    t, m, code_one, code_two = x.tensor, x.model, x.coder.code, x.coder.code_two
    above, column = t.above, g.column
    low, high, grid = g.low, g.high, g.grid if x.has_grid else None
    change_row, edge_row, activity_row = m.change, m.change + _PLACES, m.activity
    wanted = [new - code for new, code in zip(g.wanted, g.expected, strict=True)] if g.wanted else None
    values: list[int] = []
    changes, last, before, value = 0, t.last_change, t.before_change, 0
    for j, (place, code) in enumerate(zip(g.place, g.expected, strict=True)):
        change = (change_row if low < code < high else edge_row) + place
        chance = _CHANCE_ROWS[place]
        if grid and (found := grid[j]):
            change = m.grid + found[1] * _GRID_ROW + found[0]
            chance = _ACTIVITY * clamp(found[1] // 2 - 5, 0, CHANCES - 1)
        if wanted:
            value = wanted[j]
        if chance >= _FREQUENT:
            is_changed = code_one(change, value != 0)
        else:
            around = (min(changes, 3) * 2 + above[column + j]) * _AROUND + last + before
            is_changed = code_two(change, activity_row + chance + around, 2, value != 0)
        before = last
        if is_changed:
            values.append(_code_change(x, g, j, value))
            changes += 1
            last = 1
        else:
            values.append(0)
            last = 0
        above[column + j] = last
    t.last_change, t.before_change = last, before
    return values


def _code_change(x: Context, g: Group, j: int, value: int) -> int:
    """Code by how many codes the new code is not the expected one; 0 is excluded."""
    coder, m = x.coder, x.model
    code, side, place = g.expected[j], g.side[j], g.place[j]
    up = int(code < g.high)
    if g.low < code < g.high:
        found = g.grid[j] if x.has_grid else None
        near = m.grid_near + found[2] * _GRID_ROW + found[0] if found else m.near + place
        up = int(coder.code(near, side == (value > 0)) == side)
    more = m.more + ((0 if side == up else SPREADS) + place % SPREADS) * 16
    steps = code_steps(coder, more, g.high - code if up else code - g.low, abs(value))
    return steps if up else -steps
