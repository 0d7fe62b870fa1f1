"""Whole words: floating-point numbers, and integers that nobody scales. SPEC section 6.11."""

from typing import Final

import numpy as np

from protocol.delta.layouts import Array
from protocol.delta.reference.arithmetic import STEP, clamp, quotient, ratio_of
from protocol.delta.reference.blocks import Kind
from protocol.delta.reference.numbers import code_number
from protocol.delta.reference.run import Context
from protocol.delta.reference.state import NUMBER_COUNTERS, WORD_LEVELS, WORDS

_LEVEL_UNITS: Final = 16  # a bit of a difference's length
_ROWS_MAX: Final = 1 << 24
_SCALE_RATIO_LIMIT: Final = 4 * STEP
"""Within what drift keeps in the same place."""


def code_words(x: Context, old: bytes | memoryview, new: bytes | memoryview) -> bytes:
    """Code a run of words; `new` is of no meaning to a reader."""
    width = x.shape.layout.codes.width
    is_float, sign = x.shape.kind is Kind.FLOAT, 1 << (width - 1)
    before = np.frombuffer(old, f"<u{width // 8}")
    ordered = _ordered(before, sign, is_float=is_float).tolist()
    exponents = (
        ((before & (sign - 1)) >> (width - 1 - x.shape.exponent_bits)).tolist()
        if is_float
        else [0] * len(before)
    )
    wanted = (
        _ordered(np.frombuffer(new, before.dtype), sign, is_float=is_float).tolist()
        if x.coder.is_encoder
        else ordered
    )
    first = x.in_row
    found = [
        word + _code_word(x, exponent, _wrapped(after - word, sign))
        for word, exponent, after in zip(ordered, exponents, wanted, strict=True)
    ]
    mask = 2 * sign - 1
    words = np.array([word & mask for word in found], before.dtype)
    after = _unordered(words, sign, is_float=is_float)
    if x.has_scales and is_float:
        for at, scales in enumerate(zip(before.tolist(), after.tolist(), strict=True), first):
            x.tensor.drift_mean[at % x.row_codes % x.columns] = _scale_ratio(*scales) - STEP
    return after.tobytes()


def _scale_ratio(before: int, after: int) -> int:
    """Return the ratio of an old scale to a new one, whatever their signs, in units of 2**-16."""
    old, new = before >> 23 & 255, after >> 23 & 255
    powers = clamp(max(old, 1) - max(new, 1), -16, 16)
    mantissa = (before & 0x7FFFFF) | (old > 0) << 23, (after & 0x7FFFFF) | (new > 0) << 23
    return ratio_of(mantissa[0] << max(powers, 0), mantissa[1] << max(-powers, 0), _SCALE_RATIO_LIMIT)


def _ordered(words: Array, sign: int, *, is_float: bool) -> Array:
    return np.where(words & sign, ~words, words | sign) if is_float else words


def _unordered(words: Array, sign: int, *, is_float: bool) -> Array:
    return np.where(words & sign, words ^ sign, ~words) if is_float else words


def _wrapped(difference: int, sign: int) -> int:
    """Return the difference of two words as a signed number of as many bits."""
    return (difference + sign & 2 * sign - 1) - sign


def _class(level: int, exponent: int) -> int:
    return clamp(quotient(level - exponent * _LEVEL_UNITS, _LEVEL_UNITS) + 3, 0, 2 * WORD_LEVELS - 1)


def _code_word(x: Context, exponent: int, wanted: int) -> int:
    """Code by how much a word is not the old one."""
    t = x.tensor
    column = x.in_row % x.columns
    if x.in_row == 0:
        t.row = min(t.row + 1, _ROWS_MAX)
    x.in_row = (x.in_row + 1) % x.row_codes
    running, tracked = _class(t.word_level, exponent), t.spread[column]
    level = (running + (_class(tracked, exponent) if t.row > 0 else running)) // 4
    kind = WORD_LEVELS if x.shape.kind is Kind.FLOAT else 0
    difference = code_number(x.coder, WORDS + (kind + level) * NUMBER_COUNTERS, wanted)
    now_level = (difference.bit_length() + exponent) * _LEVEL_UNITS
    t.word_level += quotient(now_level - t.word_level, 8)
    t.spread[column] = tracked + quotient(now_level - tracked, 4) if t.row > 0 else now_level
    return difference
