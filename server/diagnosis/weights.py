"""From the bytes of a tensor to numbers that can be compared: weights, the step of the grid they lie on, scales and codes.

Follows the table of block layouts alone (`protocol/delta/layouts.py`, after ggml's `dequantize_row_*`), so a layout that is
added there can be diagnosed. Pure; what is passed in bounds the memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS, Array, BlockLayout, Formula
from protocol.tensors import Layout

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

GROUP_WEIGHTS: Final = 32
"""Weights that are judged together where a layout has no blocks; the block of ggml's simple quantizations."""

SCALE_FIELDS: Final[tuple[str, ...]] = ("d", "m", "dmin")
"""Fields of a block that hold numbers which many weights are multiplied with, or moved by."""

CODE_BITS_MIN: Final = 4
"""Of two- and three-bit codes, a third and more lie at the ends of their range in good quantizations, too."""

_HALF_STEP_F16: Final = 2.0**-10
_HALF_STEP_BF16: Final = 2.0**-7
_E4M3_MANTISSA: Final = 3
_CODES_OF_WORDS: Final = {Layout.I8: np.int8, Layout.U8: np.uint8, Layout.I16: np.int16, Layout.I32: np.int32}

COMPARABLE: Final = frozenset(
    layout
    for layout, row in LAYOUTS.items()
    if row.formula is not Formula.PLAIN
    or row.codebook
    or layout in {Layout.F32, Layout.F16, Layout.BF16, Layout.F64}
)
"""Layouts whose weights follow from their own bytes, in rows, so that they can be compared with those of any other of these.

The codes of all others are compared with themselves only: their scales lie in another tensor.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of whole blocks of one tensor.

    Attributes:
        values: Weights, or codes where the scales lie elsewhere; shape (blocks, weights of a block).
        steps: Distance between neighbouring values of the grid, same shape or one that broadcasts; 0 where there is no grid.
        codes: As stored, 0 to 2**width - 1, None where a value is a float or has more than eight bits.
        scales: The scale fields of each block by name, shape (blocks, fields of that name).
    """

    values: Floats
    steps: Floats
    codes: Array | None
    scales: Mapping[str, Floats]


def block_weights(layout: Layout) -> int:
    """Weights of one block; 1 for a layout without blocks."""
    row = LAYOUTS[layout]
    return 1 if layout in {Layout.I64, Layout.F64} else row.codes.count


def read_piece(layout: Layout, data: bytes) -> Piece:
    """Take a run of whole blocks apart.

    Args:
        layout: Of the tensor; not `RAW`.
        data: Whole blocks.
    """
    row = LAYOUTS[layout]
    if layout is Layout.F64:
        return _plain(np.frombuffer(data, "<f8"))
    if layout is Layout.I64:
        return _plain(np.frombuffer(data, "<i8"), step=1)
    fields = row.split(np.frombuffer(data, np.uint8).reshape(-1, row.block_bytes))
    codes = fields[row.codes.name]
    if row.formula is Formula.PLAIN and not row.codebook:
        return _unscaled(layout, row, codes)
    scales = {name: _floats(layout, fields[name]) for name in SCALE_FIELDS if name in fields}
    width = row.codes.width
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales are what is looked for
        values, steps = _scaled(layout, row, fields)
    return Piece(values, steps, codes.view(np.uint8) if width <= 8 else None, scales)


def end_codes(layout: Layout) -> tuple[int, ...]:
    """The codes at both ends of a layout's range, which values beyond it are cut down to; none for codes of few bits, where many lie there."""
    row = LAYOUTS[layout]
    width = row.codes.width
    if not CODE_BITS_MIN <= width <= 8 or layout is Layout.F8:
        return ()
    if row.is_signed:
        return (0x7F, 0x80, 0x81)
    if row.codebook:
        return tuple(
            code for code, value in enumerate(row.codebook) if value in {min(row.codebook), max(row.codebook)}
        )
    return (0, (1 << width) - 1)


def scaling(layout: Layout, fields: Mapping[str, Array]) -> tuple[Floats, Floats]:
    """What the codes of blocks are multiplied with, and what is added then, before the code that means 0 is taken off.

    Args:
        layout: One with scales in its blocks.
        fields: Of the blocks, as `BlockLayout.split` gives them.

    Returns:
        Both of shape (blocks, groups), each group's for as many codes; where nothing is added, zeros.
    """
    row = LAYOUTS[layout]
    step = _floats(layout, fields["d"])
    if "sub" in fields:
        sub = fields["sub"]
        # Eight-bit sub-scales are two's complement (Q6_K); smaller ones are stored with an offset.
        is_byte = row.fields[1].width == 8 and row.formula is Formula.SUBSCALED
        step = step * ((sub.view(np.int8) if is_byte else sub).astype(np.float32) - row.sub_zero)
    if row.formula is Formula.AFFINE:
        return step, _floats(layout, fields["m"])
    if row.formula is Formula.SUBSCALED_AFFINE:
        return step, -_floats(layout, fields["dmin"]) * fields["submin"].astype(np.float32)
    return step, np.zeros_like(step)


def _scaled(layout: Layout, row: BlockLayout, fields: Mapping[str, Array]) -> tuple[Floats, Floats]:
    codes = fields[row.codes.name]
    step, offset = scaling(layout, fields)
    each = codes.shape[1] // step.shape[1]
    if row.codebook:
        table = np.asarray(row.codebook, np.float32)
        values = np.repeat(step, each, 1) * table[codes]
        gap = float(np.diff(np.unique(table)).mean())
    else:
        signed = (codes.view(np.int8) if row.is_signed else codes).astype(np.float32)
        values = np.repeat(step, each, 1) * (signed - row.zero)
        gap = 1.0
    values = values + np.repeat(offset, each, 1)
    steps = np.repeat(np.abs(step) * np.float32(gap), each, 1)
    return values.astype(np.float32), steps.astype(np.float32)


def _floats(layout: Layout, words: Array) -> Floats:
    """Scales of a block: half precision, or an exponent alone, or E4M3 without a sign."""
    if layout is Layout.MXFP4:  # the codebook is doubled, hence one less
        return np.ldexp(np.float32(1), words.astype(np.int32) - 128).astype(np.float32)
    if layout is Layout.NVFP4:
        exponent, mantissa = words.astype(np.int32) >> _E4M3_MANTISSA & 15, words & 7
        normal = np.ldexp(1 + mantissa / 8, exponent - 7)
        value = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6)) / 2
        return np.where((words & 127) == 127, 0, value).astype(np.float32)
    return words.view(np.float16).astype(np.float32)


def _unscaled(layout: Layout, row: BlockLayout, codes: Array) -> Piece:
    flat = codes.reshape(-1)
    if layout is Layout.F32:
        return _plain(flat.view("<f4"))
    if layout is Layout.F16:
        values = flat.view("<f2").astype(np.float32)
        return _plain(values, step=np.abs(values) * np.float32(_HALF_STEP_F16))
    if layout is Layout.BF16:
        values = (flat.astype(np.uint32) << 16).view(np.float32)
        return _plain(values, step=np.abs(values) * np.float32(_HALF_STEP_BF16))
    if layout is Layout.F8:  # E4M3 or E5M2: sign and magnitude either way, in order of size
        numbers = np.where(flat & 128, -(flat & 127).astype(np.int16), flat)
    elif layout in _CODES_OF_WORDS:
        numbers = flat.view(_CODES_OF_WORDS[layout])
    else:
        numbers = flat.astype(np.int32) - row.zero
    return _plain(numbers, step=1, codes=flat.view(np.uint8) if row.codes.width <= 8 else None)


def _plain(values: Array, *, step: Floats | int = 0, codes: Array | None = None) -> Piece:
    """Numbers that stand for themselves, in groups where they divide evenly."""
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    width = GROUP_WEIGHTS if floats.size % GROUP_WEIGHTS == 0 and floats.size else 1
    shape = (-1, width)
    steps = np.broadcast_to(np.asarray(step, np.float32), floats.shape).reshape(shape)
    return Piece(floats.reshape(shape), steps, None if codes is None else codes.reshape(shape), {})
