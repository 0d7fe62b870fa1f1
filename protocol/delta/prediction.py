"""Where a new code is expected, from the old code and the scales of both versions, in integers only.

Floating point could round differently on another processor and the decoder would lose step, so half-precision scales
are widened to integers in units of 2**-24 and ratios are fixed-point numbers. Integer division rounds down, for negative
numbers too. SPEC section 6.8 states the same arithmetic.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import Array, BlockLayout, Formula

NO_BASE_CLASS = 15
"""Context class of values that have no counterpart in the base."""

TOWARDS_UPPER = 0x80
"""Set in a context when the expected value lies above the middle of its code's cell."""

GAIN_SHIFT = 16
_PLAIN_SHIFT = 16
# d * sub-scale needs up to 48 bits, so fewer fraction bits fit below 2**63.
_SUBSCALED_SHIFT = 12
_RATIO_LIMIT = 1 << 6  # a scale that changed more than 64-fold predicts nothing
_OFFSET_LIMIT = 1 << 12

# The distance from the middle of the cell, in 1/512 of the step (rounded up), gives the class: 0 only where it is
# exactly zero, then by powers of two. A change is likely near the border of a cell and rare near its middle.
_CLASS_OF_DISTANCE = np.array([0, *(int(distance).bit_length() for distance in range(1, 257))], np.uint8)

Int64 = npt.NDArray[np.int64]


def widen_half(bits: Array) -> Int64:
    """Return half-precision numbers as integers in units of 2**-24; infinities and NaN as very large ones."""
    value = bits.astype(np.int64)
    exponent = (value >> 10) & 31
    mantissa = value & 1023
    mantissa = np.where(exponent > 0, mantissa | 1024, mantissa) << np.maximum(exponent - 1, 0)
    widened: Int64 = np.where(value & 0x8000, -mantissa, mantissa)
    return widened


def _steps(layout: BlockLayout, fields: Mapping[str, Array]) -> tuple[Int64, Int64]:
    """Return step and offset of each group of codes, shape (blocks, groups), in units of 2**-24."""
    step = widen_half(fields["d"])
    if layout.formula in {Formula.SUBSCALED, Formula.SUBSCALED_AFFINE}:
        sub = fields["sub"]
        # Eight-bit sub-scales are two's complement (Q6_K); smaller ones are stored with an offset.
        signed = sub.view(np.int8) if layout.fields[1].width == 8 else sub
        step = step * (signed.astype(np.int64) - layout.sub_zero)
    offset = np.zeros_like(step)
    if layout.formula is Formula.AFFINE:
        offset = widen_half(fields["m"])
    elif layout.formula is Formula.SUBSCALED_AFFINE:
        offset = -widen_half(fields["dmin"]) * fields["submin"].astype(np.int64)
    return step, offset


def predict_scaled(
    layout: BlockLayout, old: Mapping[str, Array], new_scales: Mapping[str, Array]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Predict the codes of blocks that carry scales.

    Args:
        layout: Not of formula `PLAIN`.
        old: All fields of the base's blocks.
        new_scales: The fields of the new blocks without the codes.

    Returns:
        Expected codes and contexts, both uint8 of shape (blocks, codes); codes as they are stored.
    """
    is_plain_scale = layout.formula in {Formula.SCALED, Formula.AFFINE}
    shift = _PLAIN_SHIFT if is_plain_scale else _SUBSCALED_SHIFT
    old_step, old_offset = _steps(layout, old)
    new_step, new_offset = _steps(layout, new_scales)
    is_zero = new_step == 0
    divisor = np.where(is_zero, 1, new_step)
    ratio = (old_step << shift) // divisor
    offset = ((old_offset - new_offset) << shift) // divisor
    # A zero scale says nothing about its codes; ggml writes the code that means zero.
    ratio = np.where(is_zero, 0, np.clip(ratio, -_RATIO_LIMIT << shift, _RATIO_LIMIT << shift))
    offset = np.where(is_zero, 0, np.clip(offset, -_OFFSET_LIMIT << shift, _OFFSET_LIMIT << shift))
    return _predict(layout, old[layout.codes.name], ratio.astype(np.int32), offset.astype(np.int32), shift)


def predict_plain(
    layout: BlockLayout, old_codes: Array, gain: int, offset: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Predict codes whose scale lies elsewhere: `old * gain + offset`, both in units of 2**-16."""
    ones = np.ones((1, 1), np.int32)
    return _predict(layout, old_codes, ones * np.int32(gain), ones * np.int32(offset), GAIN_SHIFT)


def _predict(
    layout: BlockLayout, codes: Array, ratio: npt.NDArray[np.int32], offset: npt.NDArray[np.int32], shift: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    blocks, count = codes.shape
    groups = ratio.shape[1]
    signed = codes.view(np.int8) if layout.is_signed else codes
    half = np.int32(1 << (shift - 1))
    position = signed.astype(np.int32).reshape(blocks, groups, count // groups)
    position -= np.int32(layout.zero)
    position *= ratio[:, :, None]
    position += (offset + half)[:, :, None]
    expected = position >> shift
    expected += np.int32(layout.zero)
    width = layout.codes.width
    low, high = (-128, 127) if layout.is_signed else (0, (1 << width) - 1)
    np.clip(expected, low, high, out=expected)
    position &= np.int32((1 << shift) - 1)
    position -= half
    towards_upper = position > 0
    np.abs(position, out=position)
    position += np.int32((1 << (shift - 9)) - 1)
    position >>= shift - 9
    context = _CLASS_OF_DISTANCE.take(position)
    context |= towards_upper.view(np.uint8) << 7
    return expected.astype(np.uint8).reshape(blocks, count), context.reshape(blocks, count)
