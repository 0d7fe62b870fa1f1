"""Blocks as the context coder sees them: which field of a layout is the scale, which are sub-scales, what the codes mean."""

import functools
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import numpy as np

from protocol.delta.layouts import (
    LAYOUT_BY_NUMBER,
    NAME_BY_NUMBER,
    Array,
    Bits,
    BlockLayout,
    Order,
    Words,
)
from protocol.delta.native.context import is_words
from protocol.delta.runs import DIVISORS
from protocol.tensors.regions import Layout

_EXPONENT_BITS: Final = {Layout.F32: 8, Layout.BF16: 8, Layout.F16: 5, Layout.F8: 4}


class Kind(Enum):
    """How the context coder goes about a layout."""

    PLAIN = auto()
    SCALED = auto()
    AFFINE = auto()
    SUBSCALED = auto()
    SUBSCALED_AFFINE = auto()
    INDEXED = auto()
    FLOAT = auto()
    WORD = auto()


@dataclass(frozen=True, slots=True)
class Shape:
    """A layout's row, and what the context coder derives from it.

    Attributes:
        layout: The row.
        kind: How it is coded.
        low: The lowest code, with 0 for the weight 0.
        high: The highest.
        d: The half-precision scale.
        m: The half-precision offset.
        sub: The sub-scales.
        submin: The sub-minima.
        divisor: By which the quantizer divides a block's maximum; 0 if that is not known.
        exponent_bits: Of a floating-point word.
    """

    layout: BlockLayout
    kind: Kind
    low: int
    high: int
    d: Words | Bits | None
    m: Words | Bits | None
    sub: Words | Bits | None
    submin: Words | Bits | None
    divisor: int
    exponent_bits: int

    @property
    def count(self) -> int:
        """Codes, or words, in a block."""
        return self.layout.codes.count

    @property
    def is_words(self) -> bool:
        """Whether blocks are coded by whole words."""
        return self.kind in {Kind.FLOAT, Kind.WORD}

    @property
    def sub_range(self) -> tuple[int, int]:
        """The lowest and the highest sub-scale."""
        width, zero = self.sub.width if self.sub else 0, self.layout.sub_zero
        return (-128, 127) if width == 8 else (-zero, (1 << width) - 1 - zero)


@dataclass(slots=True)
class Parts:
    """Fields of several blocks, an entry for each block; empty where a layout has no such field."""

    d: list[int]
    m: list[int]
    sub: list[list[int]]
    submin: list[list[int]]
    codes: list[list[int]]


@functools.cache
def shape_of(number: int) -> Shape:
    """Return what the coder derives from the layout with a wire number."""
    name, layout = NAME_BY_NUMBER[number], LAYOUT_BY_NUMBER[number]
    fields = {field.name: field for field in layout.fields[:-1]}
    codes = layout.codes
    kind = Kind[layout.formula.name]
    if is_words(name):
        kind = Kind.FLOAT if isinstance(codes, Words) and codes.order is Order.FLOAT else Kind.WORD
    elif layout.codebook:
        kind = Kind.INDEXED
    d = fields.get("d")
    is_half = d is not None and d.width == 16
    return Shape(
        layout,
        kind,
        -128 if layout.is_signed else -layout.zero,
        127 if layout.is_signed else (1 << codes.width) - 1 - layout.zero,
        d if is_half else None,
        fields.get("m") or fields.get("dmin"),
        fields.get("sub") if is_half else d,
        fields.get("submin"),
        DIVISORS.get(name, 0),
        _EXPONENT_BITS.get(name, 0),
    )


def split(shape: Shape, data: bytes | memoryview, *, is_raw: bool = False) -> Parts:
    """Take blocks apart: 0 stands for the weight 0 in codes and in sub-scales, unless they are wanted as they are stored."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, shape.layout.block_bytes)
    codes = _rows(shape.layout.codes, blocks)
    sub = _rows(shape.sub, blocks)
    if not is_raw:
        codes = _signed(codes, is_byte=shape.layout.is_signed) - shape.layout.zero
        sub = _signed(sub, is_byte=shape.sub_range[0] == -128) - shape.layout.sub_zero
    return Parts(
        _rows(shape.d, blocks).flatten().tolist(),
        _rows(shape.m, blocks).flatten().tolist(),
        sub.tolist(),
        _rows(shape.submin, blocks).tolist(),
        codes.tolist(),
    )


def join(shape: Shape, parts: Parts, *, is_raw: bool = False) -> bytes:
    """Put blocks together; the inverse of `split`."""
    codes, sub = np.array(parts.codes, np.int64), np.array(parts.sub, np.int64)
    if not is_raw:
        codes = codes + shape.layout.zero
        sub = sub + shape.layout.sub_zero
    blocks = np.zeros((len(codes), shape.layout.block_bytes), np.uint8)
    shape.layout.codes.join(codes.astype(np.uint8), blocks)
    for field, values in (
        (shape.d, parts.d),
        (shape.m, parts.m),
        (shape.sub, sub),
        (shape.submin, parts.submin),
    ):
        if field:
            array = np.array(values, np.int64).reshape(len(codes), -1)
            field.join(array.astype(np.uint16 if field.width == 16 else np.uint8), blocks)
    return blocks.tobytes()


def _rows(field: Words | Bits | None, blocks: Array) -> Array:
    return field.split(blocks) if field else np.zeros((len(blocks), 0), np.uint8)


def _signed(values: Array, *, is_byte: bool) -> Array:
    return (values.view(np.int8) if is_byte else values).astype(np.int64)
