"""Scales and sub-scales. SPEC section 6.11."""

import functools
from typing import Final, NamedTuple

from protocol.delta.context_tables import SCALE_OUTCOMES, SCALE_SCORE, SCALE_SPREADS
from protocol.delta.reference.arithmetic import (
    HALF_STEP,
    STEP,
    clamp,
    log2_of,
    order16,
    quotient,
    unorder16,
    wide,
)
from protocol.delta.reference.expect import LOG_UNITS, SPREAD_SHIFT, learn_score
from protocol.delta.reference.numbers import code_number, code_steps
from protocol.delta.reference.run import Context
from protocol.delta.reference.state import NUMBER_COUNTERS, UNKNOWN

_SIGN: Final = 0x8000
_INFINITY: Final = 0x7C00
_BFLOAT_INFINITY: Final = 0x7F80
_HALF_RANGE: Final = 65535
_POSITION_LIMIT: Final = 1 << 29
_EXPECT_LIMIT: Final = 15 * 256


# --- The lattice: half-precision scales that come from a bfloat16 maximum divided by 127, 8 or 16 --------------------


class Lattice(NamedTuple):
    """Both directions of what a quantizer does to a block's maximum.

    Attributes:
        maximum_of: From the magnitude of a scale to the bits of the maximum; 0 where there is none.
        scale_of: From the bits of the maximum to the magnitude of the scale.
    """

    maximum_of: list[int]
    scale_of: list[int]


def _round_shift(value: int, shift: int, *, is_more: bool) -> int:
    """To the nearest, halves to even; `is_more`: the value is a little more than it says."""
    if shift <= 0:
        return value << -shift
    half, rest, result = 1 << (shift - 1), value & ((1 << shift) - 1), value >> shift
    return result + (rest > half or (rest == half and (is_more or result & 1 == 1)))


def _half_from_maximum(bits: int, divisor: int) -> int:
    """Return half-precision bits of float(maximum / divisor), rounded twice as a quantizer does it. Not negative, finite."""
    exponent, mantissa = bits >> 7, bits & 127
    mantissa, exponent = (mantissa | 128, exponent) if exponent else (mantissa, 1)
    if mantissa == 0:
        return 0
    exact, rest = divmod(mantissa << 40, divisor)
    power = exponent - 134 - 40 + exact.bit_length() - 24
    single = _round_shift(exact, exact.bit_length() - 24, is_more=rest != 0)
    drop = -24 - power if power + 13 < -24 else 13  # 11 bits, and no unit below 2**-24
    half = _round_shift(single, drop, is_more=False)
    if half >> 10 == 0:
        return half  # subnormal
    is_next = half >> 11  # a mantissa that was rounded up to the next power of two
    field = power + drop + 25 + is_next
    return _INFINITY if field > 30 else field << 10 | (0 if is_next else half & 1023)


@functools.cache
def lattice(divisor: int) -> Lattice:
    """Return the lattice of a divisor."""
    maximum_of, scale_of = [-1] * _SIGN, [_INFINITY] * _SIGN
    for bits in range(_BFLOAT_INFINITY):
        half = scale_of[bits] = _half_from_maximum(bits, divisor)
        if half < _INFINITY and maximum_of[half] < 0:
            maximum_of[half] = bits
    return Lattice([max(bits, 0) for bits in maximum_of], scale_of)


def _wide_maximum(bits: int) -> int:
    """Return the value of bfloat16 bits in units of 2**-24."""
    exponent = bits >> 7
    power = (exponent or 1) - 134 + 24
    mantissa = bits & 127 | 128 if exponent else bits & 127
    if power >= 0:
        return mantissa << min(power, 40)
    return 0 if power < -40 else mantissa >> -power


class Scale(NamedTuple):
    """A scale, times its divisor, in units of 2**-24.

    Attributes:
        rung: Its magnitude: bits of the maximum, or of the half itself.
        is_negative: Its sign.
        step: Its value.
        unit: From this rung to the next.
    """

    rung: int
    is_negative: int
    step: int
    unit: int


def scale_from(x: Context, half: int) -> Scale:
    """Return what half-precision bits say."""
    rung = half & (_SIGN - 1)
    if x.has_lattice:
        rung = lattice(x.shape.divisor).maximum_of[rung]
    return _scale_at(x.shape.divisor, rung, half >> 15, has_lattice=x.has_lattice)


def scale_bits(x: Context, scale: Scale) -> int:
    """Return the half-precision bits of a scale."""
    half = lattice(x.shape.divisor).scale_of[scale.rung] if x.has_lattice else scale.rung
    return half | _SIGN if scale.is_negative else half


@functools.lru_cache(1 << 12)
def _scale_at(divisor: int, rung: int, is_negative: int, *, has_lattice: bool) -> Scale:
    if has_lattice:
        step = _wide_maximum(rung)
        unit = _wide_maximum(rung + 1) - step
    else:
        step = wide(rung) * divisor
        unit = 1 if rung == _SIGN - 1 else wide(rung + 1) * divisor - step
    return Scale(rung, is_negative, -step if is_negative else step, unit)


# --- One scale for a block: coded just before its codes, from what its largest weight may have done ------------------


def _find_maximum(top: int, old: list[int]) -> tuple[int, int]:
    """Return which old code decided the scale, and how many others could decide the new one (a class of 0 to 11)."""
    if top == 127:
        sizes = [abs(code) for code in old]
        most = max(sizes)
        at = sizes.index(most)
        sizes[at] = -1
        return at, min(most - max(sizes), 11)
    # Codes end one earlier on the upper side: the last one may have been cut.
    sizes = [top if code == top - 1 else abs(code) for code in old]
    at = old.index(-top) if -top in old else sizes.index(max(sizes))
    others = old.count(-top) + old.count(top - 1) - (old[at] in {-top, top - 1})
    return at, min(others, 11)


def _expect_change(x: Context, before: Scale, code: int, column: int) -> int:
    """Return by how much the rung is expected to change, in units of 1/256."""
    t = x.tensor
    if t.unit == UNKNOWN or not before.unit:
        return 0
    if x.directions:
        drift = x.directions.at(t, column)
    elif x.has_drift:
        drift = (t.drift * (t.drift_mean[column] >> 4)) >> 14
    else:
        return 0
    drift = quotient(drift * 256, x.shape.divisor)
    drift = drift << t.unit if t.unit > 0 else drift >> -t.unit
    if (code < 0) != before.is_negative:
        drift = -drift
    return clamp(quotient(drift, before.unit), -_EXPECT_LIMIT, _EXPECT_LIMIT)


def code_scale(x: Context, before: Scale, new_half: int, old: list[int]) -> Scale:
    """Code a block's scale. `new_half` is of no meaning to a reader; a writer's lies on the lattice where that is said."""
    coder, m, t = x.coder, x.model, x.tensor
    at, rivals = _find_maximum(x.shape.divisor, old)
    column = x.in_row % x.columns
    log_unit = log2_of(before.unit) + log2_of(x.shape.divisor)
    level = t.spread[column + at] + t.row_spread - log_unit * LOG_UNITS
    spread = clamp((level >> SPREAD_SHIFT) + 10, 0, SCALE_SPREADS - 1)
    position = _expect_change(x, before, old[at], column + at)
    expected = (position + 128) >> 8
    offset = position - expected * 256
    side = offset >= 0
    place = (spread * 8 + min(abs(offset) >> 4, 7)) * 6 + min(rivals, 5)
    busy = t.busy[column >> 4]
    history = spread * 64 + t.scale_last * 16 + t.scale_before * 4 + (busy >> 1 & 3)
    value = is_negative = 0
    if coder.is_encoder:
        after = scale_from(x, new_half)
        value, is_negative = after.rung - before.rung - expected, after.is_negative
    change = m.scale_change + place * 2 + (t.scale_last > 0)
    if coder.code_two(change, m.scale_history + history, 3, value != 0):
        near = coder.code(m.scale_near + place, side == (value > 0))
        wanted = abs(value)
        size = code_steps(coder, m.scale_more + (spread * 2 + near) * 16, 16, wanted)
        if size == 16:
            size += code_number(coder, m.scale_far, wanted - 16) & 65535
        value = size if near == side else -size
    else:
        value = 0
    # A scale's unit is finer than the codes' step, so its move says more about row and column than any code.
    learn_score(t, column + at, SCALE_SCORE[spread * SCALE_OUTCOMES + min(abs(value), SCALE_OUTCOMES - 1)])
    value += expected
    t.scale_before = t.scale_last
    t.scale_last = 3 if value < -2 or value > 2 else abs(value)
    t.busy[column >> 4] = (busy & 1) | t.scale_last << 1
    direction = 0 if value == 0 else 1 if value < 0 else 2
    flips = coder.code(m.scale_flip + direction * 12 + rivals, is_negative != before.is_negative)
    rung, sign = before.rung + value & _SIGN - 1, int(before.is_negative != flips)
    return _scale_at(x.shape.divisor, rung, sign, has_lattice=x.has_lattice)


# --- Scales of larger blocks, and their sub-scales -------------------------------------------------------------------


def code_half(x: Context, which: int, old: int, new: int) -> int:
    """Code a half-precision number, the scale or the offset of a block; returns its bits."""
    t = x.tensor
    context = which * 8 + t.half_last[which] * 2 + (t.half_before[which] > 0)
    at = x.model.half + context * NUMBER_COUNTERS
    coded = code_number(x.coder, at, order16(new) - order16(old))
    difference = clamp(coded, -_HALF_RANGE, _HALF_RANGE)
    size = abs(difference)
    t.half_before[which] = t.half_last[which]
    t.half_last[which] = 0 if size == 0 else 1 if size < 3 else 2 if size < 12 else 3
    return unorder16(order16(old) + difference)


def code_subs(
    x: Context, which: int, old: list[int], new: list[int], ratio: int, limits: tuple[int, int]
) -> list[int]:
    """Code the sub-scales of a block, or its sub-minima. Each is expected to balance what the scale did.

    Args:
        x: Of the run.
        which: 0 for sub-scales, 1 for sub-minima.
        old: Those of the base.
        new: Those of the result; of no meaning to a reader.
        ratio: From the old scale to the new one, units of 2**-16.
        limits: The lowest and the highest.
    """
    last, found = 0, []
    for before, after in zip(old, new, strict=True):
        value = _code_sub(x, which * 4, before * ratio, after, limits, last * 2 + (ratio != STEP))
        expected, change = value
        last = 0 if change == 0 else min(last + 1, 2)
        found.append(expected + change)
    return found


def _code_sub(
    x: Context, row: int, position: int, wanted: int, limits: tuple[int, int], context: int
) -> tuple[int, int]:
    """Return the expected sub-scale, and how many steps from it the new one is."""
    coder, m = x.coder, x.model
    low, high = limits
    position = clamp(position, -_POSITION_LIMIT, _POSITION_LIMIT)
    expected = clamp((position + HALF_STEP) >> 16, low, high)
    offset = clamp(position - expected * STEP, -HALF_STEP, HALF_STEP)
    distance, side = abs(offset), offset >= 0
    place = row + (0 if distance < 2048 else 1 if distance < 8192 else 2 if distance < 16384 else 3)
    value = wanted - expected
    if not coder.code(m.sub_change + place * 6 + context, value != 0):
        return expected, 0
    up = expected < high
    if low < expected < high:
        up = coder.code(m.sub_near + place, side == (value > 0)) == side
    limit = high - expected if up else expected - low
    size = code_steps(coder, m.sub_more + row * 4, limit, abs(value))
    return expected, size if up else -size
