"""Block layouts as data, and the generic splitter that takes blocks apart into fields and puts them together.

A layout is a row of `LAYOUTS`: which bytes hold numbers of 8, 16 or 32 bits, which bits of which bytes make up the
packed values, and how a value follows from its code and the scales. A new quantization type is a new row with golden
vectors. Sources: ggml `ggml-common.h` and `gguf-py/gguf/quants.py`; onnxruntime's MatMulNBits; AutoAWQ and AutoGPTQ.

Wire numbers are fixed by SPEC section 6.7 and never reused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.tensors.regions import Layout

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class Order(Enum):
    """How the bits of a word are turned into an integer whose differences are small."""

    INTEGER = "integer"  # the bits as they are
    FLOAT = "float"  # sign and magnitude: negative numbers are reversed so that neighbours differ by one


class Formula(Enum):
    """How a weight follows from its code; the coder predicts a new code from the old one with it."""

    PLAIN = "plain"  # no scale in the block
    SCALED = "scaled"  # d * (code - zero)
    AFFINE = "affine"  # d * code + m
    SUBSCALED = "subscaled"  # d * sub * (code - zero)
    SUBSCALED_AFFINE = "subscaled_affine"  # d * sub * code - dmin * submin


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of bytes of which some bits belong to a run of elements.

    Byte `byte + i` holds at bits `shift ... shift + width` the bits `to ... to + width` of element
    `element + i * stride`, for `i` in `0 ... count`.
    """

    byte: int
    count: int
    shift: int
    width: int
    element: int
    to: int = 0
    stride: int = 1


@dataclass(frozen=True)
class Words:
    """A field of whole little-endian words that lie side by side."""

    name: str
    byte: int
    count: int
    width: int  # bits: 8, 16, 32 or 64
    order: Order = Order.INTEGER

    def split(self, blocks: Bytes) -> Array:
        """Return the words, shape (blocks, count), unsigned."""
        end = self.byte + self.count * self.width // 8
        return np.ascontiguousarray(blocks[:, self.byte : end]).view(f"<u{self.width // 8}")

    def join(self, values: Array, blocks: Bytes) -> None:
        """Write the words into `blocks`."""
        end = self.byte + self.count * self.width // 8
        blocks[:, self.byte : end] = np.ascontiguousarray(values, dtype=f"<u{self.width // 8}").view(np.uint8)


@dataclass(frozen=True)
class Bits:
    """A field of values of up to eight bits that are spread over bytes.

    Attributes:
        name: Of the field.
        count: Values in a block.
        width: Bits of a value.
        slices: Where those bits lie; each bit of each value exactly once.
        flip: Bits that are stored inverted: the sign bit of two's complement values, so that neighbours differ by one.
    """

    name: str
    count: int
    width: int
    slices: tuple[Slice, ...]
    flip: int = 0

    def split(self, blocks: Bytes) -> Array:
        """Return the values, shape (blocks, count), uint8."""
        values = np.full((len(blocks), self.count), self.flip, np.uint8)
        for part in self.slices:
            source = blocks[:, part.byte : part.byte + part.count]
            end = part.element + part.count * part.stride
            mask = (1 << part.width) - 1
            values[:, part.element : end : part.stride] ^= ((source >> part.shift) & mask) << part.to
        return values

    def join(self, values: Array, blocks: Bytes) -> None:
        """Set the bits of the values in `blocks`, where they must be zero before."""
        for part in self.slices:
            end = part.element + part.count * part.stride
            mask = (1 << part.width) - 1
            bits = ((values[:, part.element : end : part.stride] ^ self.flip) >> part.to) & mask
            blocks[:, part.byte : part.byte + part.count] |= (bits << part.shift).astype(np.uint8)


@dataclass(frozen=True)
class BlockLayout:
    """One row of the table.

    Attributes:
        number: On the wire.
        block_bytes: Size of a block.
        fields: In coding order; the last one holds the codes.
        formula: How weights follow from codes.
        zero: The code that means 0 in `SCALED` and `SUBSCALED`.
        is_signed: Codes are two's complement bytes.
        sub_zero: What is subtracted from a sub-scale; sub-scales of eight bits are two's complement.
        codebook: What each code stands for, in units of the scale, where codes are indices of a table.
        is_column: The codes of a block lie below each other, in neighbouring rows of one column.
    """

    number: int
    block_bytes: int
    fields: tuple[Words | Bits, ...]
    formula: Formula = Formula.PLAIN
    zero: int = 0
    is_signed: bool = False
    sub_zero: int = 0
    codebook: tuple[int, ...] = ()
    is_column: bool = False

    @cached_property
    def codes(self) -> Words | Bits:
        """The field that holds most of the bytes."""
        return self.fields[-1]

    def split(self, blocks: Bytes) -> dict[str, Array]:
        """Take blocks of shape (n, block_bytes) apart; the exact inverse of `join`."""
        return {field.name: field.split(blocks) for field in self.fields}

    def join(self, values: Mapping[str, Array]) -> Bytes:
        """Put fields together into blocks."""
        blocks = np.zeros((len(values[self.codes.name]), self.block_bytes), np.uint8)
        for field in self.fields:
            field.join(values[field.name], blocks)
        return blocks


def _half(name: str, byte: int) -> Words:
    return Words(name, byte, 1, 16, Order.FLOAT)


def _nibbles(byte: int, group: int, groups: int) -> tuple[Slice, ...]:
    """`group` bytes hold `2 * group` codes: first all low nibbles, then all high ones; `groups` times."""
    return tuple(
        Slice(byte + g * group, group, 4 * high, 4, g * 2 * group + high * group)
        for g in range(groups)
        for high in (0, 1)
    )


def _fifth_bits(byte: int) -> tuple[Slice, ...]:
    """Q5_0 and Q5_1: bit i of a 32-bit word is the fifth bit of code i."""
    return tuple(Slice(byte, 4, bit, 1, bit, to=4, stride=8) for bit in range(8))


def _k_scales(byte: int, *, minimum: bool) -> Bits:
    """Q4_K and Q5_K: eight sub-scales and eight sub-minima of six bits in twelve bytes."""
    first = byte + (4 if minimum else 0)
    low = Slice(byte + 8, 4, 4 if minimum else 0, 4, 4)
    return Bits(
        "submin" if minimum else "sub", 8, 6, (Slice(first, 4, 0, 6, 0), low, Slice(first, 4, 6, 2, 4, to=4))
    )


def _quarters(byte: int, half_bytes: int, *, to: int = 0) -> tuple[Slice, ...]:
    """Two-bit values of K-quants: in each half of 128 codes, 32 bytes hold four times 32 of them."""
    return tuple(
        Slice(byte + half * half_bytes, 32, 2 * k, 2, 128 * half + 32 * k, to=to)
        for half in range(2)
        for k in range(4)
    )


_Q6_LOW = tuple(
    Slice(64 * half, 64, 4 * high, 4, 128 * half + 64 * high) for half in (0, 1) for high in (0, 1)
)
_Q3_SCALES = Bits(
    "sub",
    16,
    6,
    (
        *(Slice(96, 8, 4 * high, 4, 8 * high) for high in (0, 1)),
        *(Slice(104, 4, 2 * k, 2, 4 * k, to=4) for k in range(4)),
    ),
)
_IQ4_XS_HIGH = tuple(Slice(2 + i // 4, 1, 2 * (i % 4), 2, i, to=4) for i in range(8))
_IQ4_XS_SUB = Bits(
    "sub", 8, 6, (*(Slice(4, 4, 4 * high, 4, high, stride=2) for high in (0, 1)), *_IQ4_XS_HIGH)
)

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled

# Nibble k of a word of AutoAWQ's GEMM format belongs to this column of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _word_nibbles(order: tuple[int, ...]) -> Bits:
    return Bits("codes", 8, 4, tuple(Slice(k // 2, 1, 4 * (k % 2), 4, at) for k, at in enumerate(order)))


LAYOUTS: dict[Layout, BlockLayout] = {
    Layout.RAW: BlockLayout(0, 1, (Words("codes", 0, 1, 8),)),
    Layout.F32: BlockLayout(1, 4, (Words("codes", 0, 1, 32, Order.FLOAT),)),
    Layout.F16: BlockLayout(2, 2, (Words("codes", 0, 1, 16, Order.FLOAT),)),
    Layout.BF16: BlockLayout(3, 2, (Words("codes", 0, 1, 16, Order.FLOAT),)),
    Layout.I8: BlockLayout(4, 1, (Words("codes", 0, 1, 8),), is_signed=True),
    Layout.U8: BlockLayout(5, 1, (Words("codes", 0, 1, 8),)),
    Layout.PACKED4: BlockLayout(6, 1, (Bits("codes", 2, 4, (Slice(0, 1, 0, 4, 0), Slice(0, 1, 4, 4, 1))),)),
    Layout.I4: BlockLayout(
        14, 1, (Bits("codes", 2, 4, (Slice(0, 1, 0, 4, 0), Slice(0, 1, 4, 4, 1)), flip=8),), zero=8
    ),
    Layout.F8: BlockLayout(7, 1, (Words("codes", 0, 1, 8, Order.FLOAT),)),
    Layout.I16: BlockLayout(8, 2, (Words("codes", 0, 1, 16),)),
    Layout.I32: BlockLayout(9, 4, (Words("codes", 0, 1, 32),)),
    Layout.I64: BlockLayout(10, 8, (Words("codes", 0, 2, 32),)),
    Layout.F64: BlockLayout(11, 8, (Words("codes", 0, 2, 32),)),
    Layout.AWQ4: BlockLayout(12, 4, (_word_nibbles(_AWQ_ORDER),)),
    Layout.GPTQ4: BlockLayout(13, 4, (_word_nibbles(tuple(range(8))),), is_column=True),
    Layout.Q4_0: BlockLayout(
        16, 18, (_half("d", 0), Bits("codes", 32, 4, _nibbles(2, 16, 1))), Formula.SCALED, zero=8
    ),
    Layout.Q4_1: BlockLayout(
        17, 20, (_half("d", 0), _half("m", 2), Bits("codes", 32, 4, _nibbles(4, 16, 1))), Formula.AFFINE
    ),
    Layout.Q5_0: BlockLayout(
        18,
        22,
        (_half("d", 0), Bits("codes", 32, 5, (*_fifth_bits(2), *_nibbles(6, 16, 1)))),
        Formula.SCALED,
        zero=16,
    ),
    Layout.Q5_1: BlockLayout(
        19,
        24,
        (_half("d", 0), _half("m", 2), Bits("codes", 32, 5, (*_fifth_bits(4), *_nibbles(8, 16, 1)))),
        Formula.AFFINE,
    ),
    Layout.Q8_0: BlockLayout(
        20, 34, (_half("d", 0), Words("codes", 2, 32, 8)), Formula.SCALED, is_signed=True
    ),
    Layout.Q2_K: BlockLayout(
        21,
        84,
        (
            _half("d", 80),
            _half("dmin", 82),
            Bits("sub", 16, 4, (Slice(0, 16, 0, 4, 0),)),
            Bits("submin", 16, 4, (Slice(0, 16, 4, 4, 0),)),
            Bits("codes", 256, 2, _quarters(16, 32)),
        ),
        Formula.SUBSCALED_AFFINE,
    ),
    Layout.Q3_K: BlockLayout(
        22,
        110,
        (
            _half("d", 108),
            _Q3_SCALES,
            Bits(
                "codes",
                256,
                3,
                (*_quarters(32, 32), *(Slice(0, 32, bit, 1, 32 * bit, to=2) for bit in range(8))),
            ),
        ),
        Formula.SUBSCALED,
        zero=4,
        sub_zero=32,
    ),
    Layout.Q4_K: BlockLayout(
        23,
        144,
        (
            _half("d", 0),
            _half("dmin", 2),
            _k_scales(4, minimum=False),
            _k_scales(4, minimum=True),
            Bits("codes", 256, 4, _nibbles(16, 32, 4)),
        ),
        Formula.SUBSCALED_AFFINE,
    ),
    Layout.Q5_K: BlockLayout(
        24,
        176,
        (
            _half("d", 0),
            _half("dmin", 2),
            _k_scales(4, minimum=False),
            _k_scales(4, minimum=True),
            Bits(
                "codes",
                256,
                5,
                (*(Slice(16, 32, bit, 1, 32 * bit, to=4) for bit in range(8)), *_nibbles(48, 32, 4)),
            ),
        ),
        Formula.SUBSCALED_AFFINE,
    ),
    Layout.Q6_K: BlockLayout(
        25,
        210,
        (
            _half("d", 208),
            Words("sub", 192, 16, 8),
            Bits("codes", 256, 6, (*_Q6_LOW, *_quarters(128, 32, to=4))),
        ),
        Formula.SUBSCALED,
        zero=32,
    ),
    Layout.IQ4_NL: BlockLayout(
        26, 18, (_half("d", 0), Bits("codes", 32, 4, _nibbles(2, 16, 1))), codebook=_IQ4_VALUES
    ),
    Layout.IQ4_XS: BlockLayout(
        27,
        136,
        (_half("d", 0), _IQ4_XS_SUB, Bits("codes", 256, 4, _nibbles(8, 16, 8))),
        sub_zero=32,
        codebook=_IQ4_VALUES,
    ),
    # The scale is a power of two (E8M0).
    Layout.MXFP4: BlockLayout(
        28, 17, (Words("d", 0, 1, 8), Bits("codes", 32, 4, _nibbles(1, 16, 1))), codebook=_E2M1_VALUES
    ),
    # Four scales of E4M3 without a sign, one for each sixteen codes.
    Layout.NVFP4: BlockLayout(
        29, 36, (Words("d", 0, 4, 8), Bits("codes", 64, 4, _nibbles(4, 8, 4))), codebook=_E2M1_VALUES
    ),
    Layout.TQ2_0: BlockLayout(
        30, 66, (_half("d", 64), Bits("codes", 256, 2, _quarters(0, 32))), Formula.SCALED, zero=1
    ),
}

LAYOUT_BY_NUMBER: dict[int, BlockLayout] = {layout.number: layout for layout in LAYOUTS.values()}
NAME_BY_NUMBER: dict[int, Layout] = {layout.number: name for name, layout in LAYOUTS.items()}
