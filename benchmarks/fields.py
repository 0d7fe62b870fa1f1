"""Quantized blocks apart into codes and steps, for estimates only. The coder has a splitter of its own.

An estimate that used the coder's own tables would agree with its mistakes. Sources: ggml `ggml-common.h`,
`ggml-quants.c`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.tensors.regions import Layout

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Fields:
    """What a tensor's blocks hold. A weight is `steps * codes - offsets`.

    Attributes:
        codes: Integers, shape (groups, weights of a group).
        steps: float32, shape (groups, 1); may be negative.
        offsets: float32, shape (groups, 1); zero where the layout has none.
        low: The smallest code that the layout can hold.
        high: The largest.
        words: The bits of each group's or block's scales as small integers, by name.
    """

    codes: Array
    steps: Array
    offsets: Array
    low: int
    high: int
    words: dict[str, Array]


def _half(blocks: Array, at: int) -> Array:
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _bits(blocks: Array, at: int) -> Array:
    return blocks[:, at : at + 2].copy().view("<u2").ravel()


def _simple(blocks: Array, codes: Array, low: int, high: int) -> Fields:
    steps = _half(blocks, 0)
    return Fields(codes, steps, np.zeros_like(steps), low, high, {"d": _bits(blocks, 0)})


def _nibbles(packed: Array) -> Array:
    return np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.int16)


def _q4_0(blocks: Array) -> Fields:
    return _simple(blocks, _nibbles(blocks[:, 2:]) - 8, -8, 7)


def _q5_0(blocks: Array) -> Fields:
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little").astype(np.int16)
    return _simple(blocks, _nibbles(blocks[:, 6:]) + 16 * high - 16, -16, 15)


def _q8_0(blocks: Array) -> Fields:
    return _simple(blocks, blocks[:, 2:].view(np.int8).astype(np.int16), -127, 127)


def _q4_k(blocks: Array) -> Fields:
    packed = blocks[:, 4:16].astype(np.int16)
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 32)
    return Fields(
        codes,
        (_half(blocks, 0) * scales).reshape(-1, 1),
        (_half(blocks, 2) * minima).reshape(-1, 1),
        0,
        15,
        {"d": _bits(blocks, 0), "dmin": _bits(blocks, 2), "scales": scales.ravel(), "minima": minima.ravel()},
    )


def _q6_k(blocks: Array) -> Fields:
    # Two halves of 128 weights; in each, four runs of 32 share 64 low bytes and 32 high bytes.
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate((low & 15, low >> 4), axis=2).astype(np.int16)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = (low | ((high >> shifts & 3).astype(np.int16) << 4)) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.int16)
    steps = (_half(blocks, 208) * scales).reshape(-1, 1)
    words = {"d": _bits(blocks, 208), "scales": scales.ravel()}
    return Fields(codes.reshape(-1, 16), steps, np.zeros_like(steps), -32, 31, words)


_BLOCKS: dict[Layout, tuple[int, Callable[[Array], Fields]]] = {
    Layout.Q4_0: (18, _q4_0),
    Layout.Q5_0: (22, _q5_0),
    Layout.Q8_0: (34, _q8_0),
    Layout.Q4_K: (144, _q4_k),
    Layout.Q6_K: (210, _q6_k),
}


def block_bytes(layout: Layout) -> int | None:
    """Bytes of one block, or None for a layout that is not taken apart here."""
    row = _BLOCKS.get(layout)
    return row[0] if row else None


def split(layout: Layout, data: bytes) -> Fields:
    """Takes whole blocks apart."""
    size, splitter = _BLOCKS[layout]
    return splitter(np.frombuffer(data, np.uint8).reshape(-1, size))
