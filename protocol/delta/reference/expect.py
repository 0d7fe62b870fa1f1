"""Where each new code of a group is expected, how far from certain that is, and what an outcome teaches. SPEC section 6.11."""

from typing import Final

from protocol.delta.context_tables import INFORMATION, OFFSET_CLASS, OFFSETS, PULL, RATE, SCORE, SPREADS
from protocol.delta.reference.arithmetic import HALF_STEP, STEP, clamp, log2_of, quotient, ratio_of
from protocol.delta.reference.blocks import Kind
from protocol.delta.reference.coder import PROBABILITY_BITS
from protocol.delta.reference.run import Context, Group
from protocol.delta.reference.state import SPREAD_LIMIT, SPREAD_UNITS, UNKNOWN, Tensor

SPREAD_SHIFT: Final = SPREAD_UNITS - 1
"""A class is half an octave."""

LOG_UNITS: Final = 1 << (SPREAD_UNITS - 8)
"""A unit of `log2_of`."""

RATIO_LIMIT: Final = 64 * STEP
PLACES: Final = OFFSETS * SPREADS
_SPREAD_ZERO: Final = 22 << SPREAD_SHIFT  # class 22 is a spread of one step
_SHIFT_LIMIT: Final = 4096 * STEP
_MEAN_LIMIT: Final = 16 * STEP
_WEIGHT_MAX: Final = 400 * 16
_STEP_UNITS_MAX: Final = 1 << 22
_SCORE_BITS: Final = 8
_OCTAVE_SCORE: Final = 23  # a score of 1/256 per neper is that many units of 2**-12 octaves
_ROW_MOVE_LIMIT: Final = 1 << SPREAD_UNITS
_ROW_WEIGHT_MAX: Final = 1 << 28
_CHANGE_LIMIT: Final = 1 << 15
_DRIFT_LIMIT: Final = 1 << 60
_OCTAVES: Final = tuple(_OCTAVE_SCORE * score for score in SCORE)
_SQUARES: Final = tuple(score * score >> 12 for score in SCORE)


def expect(x: Context, g: Group) -> None:
    """Fill in all that is known of a group before its codes."""
    t = x.tensor
    _expect_ratio(x, g)
    g.mean = _expect_moves(x, g)
    g.level = t.row_spread - log2_of(g.new_step) * LOG_UNITS
    old, ratio, shift, base = g.old, g.ratio, g.shift, g.level + _SPREAD_ZERO
    place = [(spread + base) >> SPREAD_SHIFT for spread in t.spread[g.column : g.column + len(old)]]
    if min(place) < 0 or max(place) >= SPREADS:
        place = [clamp(level, 0, SPREADS - 1) for level in place]
    g.place = place
    if g.ratios:
        positions = [code * column + shift for code, column in zip(old, g.ratios, strict=True)]
        if g.mean:
            positions = [position + move for position, move in zip(positions, g.mean, strict=True)]
    elif g.mean:
        positions = [code * ratio + shift + move for code, move in zip(old, g.mean, strict=True)]
    elif ratio != STEP or shift:
        positions = [code * ratio + shift for code in old]
    else:
        g.expected, g.side = old, [1] * len(old)  # in the middle of its cell, as most codes of most files
        return
    low, high = g.low, g.high
    expected, side = [], []
    for j, position in enumerate(positions):
        code = (position + HALF_STEP) >> 16
        if code < low:
            code = low
        elif code > high:
            code = high
        expected.append(code)
        offset = position - code * STEP
        side.append(1 if offset >= 0 else 0)
        distance = -offset if offset < 0 else offset
        place[j] += OFFSET_CLASS[distance >> 6 if distance < HALF_STEP else HALF_STEP >> 6] * SPREADS
    g.expected, g.side = expected, side


def _expect_ratio(x: Context, g: Group) -> None:
    if x.shape.kind is Kind.PLAIN:
        g.ratio, g.shift = x.gain, clamp(x.offset, -_SHIFT_LIMIT, _SHIFT_LIMIT)
        if x.has_scales:
            ratios = x.tensor.drift_mean[g.column : g.column + len(g.old)]
            g.ratios = [ratio + STEP for ratio in ratios]
    elif x.shape.kind is Kind.INDEXED:
        g.ratio, g.shift = STEP, 0
    else:
        g.ratio = ratio_of(g.old_step, g.new_step, RATIO_LIMIT)
        g.shift = ratio_of(g.old_offset - g.new_offset, g.new_step, _SHIFT_LIMIT)


def _expect_moves(x: Context, g: Group) -> list[int]:
    t = x.tensor
    if not g.new_step or t.unit == UNKNOWN:
        return []
    if x.directions:
        return x.directions.moves(t, g.column, g.new_step)
    if not x.has_drift:
        return []
    step = abs(g.new_step)
    factor = quotient(t.drift << 8 + max(t.unit, 0), step) >> max(-t.unit, 0)
    scale = clamp(factor, -HALF_STEP, HALF_STEP)
    low, high = -_MEAN_LIMIT, _MEAN_LIMIT
    moves = [(mean * scale) >> 10 for mean in t.drift_mean[g.column : g.column + len(g.old)]]
    if min(moves) < low or max(moves) > high:
        moves = [clamp(move, low, high) for move in moves]
    return moves


def _outcome(side: int, value: int) -> int:
    """Row of SCORE and PULL: as expected; one to the nearer side; one to the other; two, three, more."""
    steps = abs(value)
    if steps == 1:
        return 1 if side == (value > 0) else 2
    return min(steps + 1, 5) if steps else 0


def learn(x: Context, g: Group, values: list[int]) -> None:
    """Let columns and the row learn by how much each code was not the expected one."""
    t = x.tensor
    rows = g.place[:]
    for j, value in enumerate(values):
        if value:
            rows[j] += PLACES * _outcome(g.side[j], value)
    _learn_spreads(t, g.column, rows)
    _learn_moves(x, g, values, rows)


def learn_quiet(x: Context, g: Group, chance: int) -> None:
    """Learn from a group that is as expected: its row only, from the sum of the probabilities that it is not."""
    score = -(chance >> (PROBABILITY_BITS - _SCORE_BITS))
    _learn_row_spread(x.tensor, score * _OCTAVE_SCORE, 0)
    _learn_moves(x, g, [0] * len(g.place), g.place)


def _learn_moves(x: Context, g: Group, values: list[int], rows: list[int]) -> None:
    t = x.tensor
    if x.directions:
        if g.new_step:
            pull = [_pull(row, side, value) for row, side, value in zip(rows, g.side, values, strict=True)]
            information = sum(map(INFORMATION.__getitem__, g.place))
            x.directions.observe(t, g.column, g.new_step, g.mean, pull, information)
    elif x.has_drift:
        if t.unit != UNKNOWN:
            _learn_drift(t, g, values)
        _learn_row_drift(t)


def _learn_spreads(t: Tensor, column: int, rows: list[int]) -> None:
    """Move the columns' spreads by the scores of the outcomes, and the row's by their sum."""
    spread, weight, octaves, squares, rate = t.spread, t.weight, _OCTAVES, _SQUARES, RATE
    total = information = 0
    for at, row in enumerate(rows, column):
        octave, square = octaves[row], squares[row]
        total += octave
        information += square
        known = weight[at] + square
        if known > _WEIGHT_MAX:  # noqa: PLR1730 - a call costs more
            known = _WEIGHT_MAX
        weight[at] = known
        moved = spread[at] + (octave * rate[known >> 4] >> 16)
        spread[at] = (
            moved if -SPREAD_LIMIT <= moved <= SPREAD_LIMIT else clamp(moved, -SPREAD_LIMIT, SPREAD_LIMIT)
        )
    _learn_row_spread(t, total, information)


def learn_score(t: Tensor, column: int, score: int) -> None:
    """Move the spreads of a column and of the row by one score."""
    information = score * score >> 12
    t.weight[column] = known = min(t.weight[column] + information, _WEIGHT_MAX)
    moved = t.spread[column] + (_OCTAVE_SCORE * score * RATE[known >> 4] >> 16)
    t.spread[column] = clamp(moved, -SPREAD_LIMIT, SPREAD_LIMIT)
    _learn_row_spread(t, _OCTAVE_SCORE * score, information)


def _learn_row_spread(t: Tensor, total: int, information: int) -> None:
    t.row_weight = clamp(t.row_weight + information, 0, _ROW_WEIGHT_MAX)
    move = clamp(quotient(total * 16, t.row_weight + 32), -_ROW_MOVE_LIMIT, _ROW_MOVE_LIMIT)
    t.row_spread = clamp(t.row_spread + move, -SPREAD_LIMIT, SPREAD_LIMIT)


def _pull(row: int, side: int, value: int) -> int:
    is_up = value > 0 if row >= 3 * PLACES else side
    return PULL[row] if is_up else -PULL[row]


def _learn_drift(t: Tensor, g: Group, values: list[int]) -> None:
    rows, at = min(t.row + 2, 200), g.column
    step = clamp(t.in_units(abs(g.new_step) * 16), 0, _STEP_UNITS_MAX)
    tracked = t.drift_mean[at : at + len(values)]
    changes = {0: 0}
    learned = []
    for still, expected, value, mean in zip(_still(g), g.expected, values, tracked, strict=True):
        codes = expected + value - still
        if codes not in changes:
            changes[codes] = clamp(codes * step >> 4, -_CHANGE_LIMIT, _CHANGE_LIMIT)
        change = changes[codes]
        miss = change * 16 - mean
        learned.append(mean + (miss // rows if miss >= 0 else -(-miss // rows)))
        if mean := mean >> 4:
            t.drift_xy += change * mean
            t.drift_xx += mean * mean
    t.drift_mean[at : at + len(values)] = learned


def _still(g: Group) -> list[int]:
    """Return the codes that would be expected if nothing moved."""
    if not g.mean:
        return g.expected
    ratio, base, low, high = g.ratio, g.shift + HALF_STEP, g.low, g.high
    if ratio == STEP and not g.shift:
        return g.old
    return [clamp((code * ratio + base) >> 16, low, high) for code in g.old]


def _learn_row_drift(t: Tensor) -> None:
    xx = t.drift_xx = clamp(t.drift_xx, 0, _DRIFT_LIMIT)
    xy = t.drift_xy = clamp(t.drift_xy, -_DRIFT_LIMIT, _DRIFT_LIMIT)
    while abs(xy) >> 44 or xx >> 44:
        xx >>= 1
        xy = quotient(xy, 2)
    if xx == 0:
        t.drift = t.mean_drift
    else:
        t.drift = clamp(quotient(xy * (5 << 14) + t.mean_drift * xx, 6 * xx), -(2 << 14), 2 << 14)
