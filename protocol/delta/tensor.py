"""The first tensor codec: blocks are split into fields, fields are predicted from the base, residuals are compressed.

A segment of this codec is a list of runs. A run is a number of blocks of one layout with, or without, a place in the base
window. Residuals of all runs with the same layout share their streams, so that many small tensors cost little.
Layout of parameters and payload: SPEC section 6.6.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUT_BY_NUMBER, Array, Bits, BlockLayout, Bytes, Formula, Order, Words
from protocol.delta.prediction import NO_BASE_CLASS, TOWARDS_UPPER, predict_plain, predict_scaled
from protocol.delta.symbols import Payload, Unsigned, decode_symbols, encode_symbols
from protocol.delta.varints import write_signed, write_varint
from protocol.errors import PatchError

RUNS_MAX = 4096
"""Runs in one segment; a limit of the format (SPEC section 6.3)."""

_HAS_BASE, _HAS_GAIN = 1, 2
GAIN = struct.Struct("<ii")
GAIN_LIMIT = 1 << 22
"""Gain and offset stay below this, so that no product leaves 32 bits (SPEC section 6.8)."""

_CHUNK_CODES = 1 << 16  # codes predicted at once: temporaries stay in the processor's cache
_SPLIT_CLASSES, _ONE_CLASS = 1, 0
_CLASSES = 16


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks that lie side by side in the result, and in the base if they have a place there.

    Attributes:
        layout: Row of the layout table, by wire number.
        blocks: How many, at least 1.
        base_offset: Where the counterpart starts, relative to the segment's base window; None without one.
        gain: `(gain, offset)` in units of 2**-16 for layouts without scales, None for 1 and 0.
    """

    layout: int
    blocks: int
    base_offset: int | None
    gain: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self.blocks * LAYOUT_BY_NUMBER[self.layout].block_bytes


def write_runs(runs: Sequence[Run]) -> bytes:
    """Return the parameters of a segment."""
    out = bytearray()
    write_varint(len(runs), out)
    expected = 0
    for run in runs:
        flags = (_HAS_BASE if run.base_offset is not None else 0) | (_HAS_GAIN if run.gain else 0)
        out += bytes((run.layout, flags))
        write_varint(run.blocks, out)
        if run.base_offset is not None:
            write_signed(run.base_offset - expected, out)
            expected = run.base_offset + run.length
        if run.gain:
            out += GAIN.pack(*run.gain)
    return bytes(out)


def read_runs(parameters: bytes, result_length: int, window_length: int) -> list[Run]:
    """Read and check the parameters of a segment: every run inside the window, together as long as the result.

    Raises:
        PatchError: Anything is out of bounds.
    """
    payload = Payload(parameters)
    runs: list[Run] = []
    expected = 0
    left = result_length
    for _ in range(payload.varint(RUNS_MAX)):
        layout, flags = payload.byte(), payload.byte()
        if layout not in LAYOUT_BY_NUMBER:
            raise PatchError(f"a run has the unknown layout {layout}")
        if flags & ~(_HAS_BASE | _HAS_GAIN):
            raise PatchError(f"a run has unknown flags {flags:#x}")
        blocks = payload.varint(left // LAYOUT_BY_NUMBER[layout].block_bytes)
        if blocks == 0:
            raise PatchError("a run has no blocks")
        run = Run(layout, blocks, None)
        base_offset = None
        if flags & _HAS_BASE:
            base_offset = expected + payload.signed(2 * window_length)
            if base_offset < 0 or base_offset + run.length > window_length:
                raise PatchError("a run lies outside its base window")
            expected = base_offset + run.length
        gain = (
            check_gain(LAYOUT_BY_NUMBER[layout], *GAIN.unpack(payload.take(GAIN.size)))
            if flags & _HAS_GAIN
            else None
        )
        left -= run.length
        runs.append(Run(layout, blocks, base_offset, gain))
    payload.expect_end()
    if left:
        raise PatchError(f"the runs of a segment leave {left} bytes out")
    return runs


def working_bytes(runs: Sequence[Run]) -> int:
    """Return what decoding these runs takes beside payload, window and result (SPEC section 6.4).

    Ten arrays of the size of the codes (symbols, values, gaps, expected values, contexts), and two of the blocks.
    """
    total = 0
    for run in runs:
        layout = LAYOUT_BY_NUMBER[run.layout]
        code_bytes = layout.codes.count * _word_width(layout.codes) // 8
        total += run.blocks * (10 * code_bytes + 2 * layout.block_bytes)
    return total


def takes_gain(layout: BlockLayout) -> bool:
    """Tell whether codes of this layout may be predicted with a gain: integers of up to eight bits without scales."""
    codes = layout.codes
    is_integer = not isinstance(codes, Words) or codes.order is Order.INTEGER
    return layout.formula is Formula.PLAIN and codes.width <= 8 and is_integer


def check_gain(layout: BlockLayout, gain: int, offset: int) -> tuple[int, int]:
    """Return gain and offset.

    Raises:
        PatchError: They are out of bounds, or codes of this layout take none.
    """
    if not takes_gain(layout) or abs(gain) > GAIN_LIMIT or abs(offset) > GAIN_LIMIT << 8:
        raise PatchError("a run has a gain out of bounds")
    return gain, offset


class _Group:
    """All runs of one layout in a segment, as if they were one array of blocks."""

    def __init__(self, layout: BlockLayout, runs: Sequence[tuple[int, Run]], window: memoryview) -> None:
        self.layout = layout
        self.runs = runs  # (offset in the result, run)
        self.blocks = sum(run.blocks for _, run in runs)
        self.old = self._base_blocks(window)
        self.is_plain = layout.formula is Formula.PLAIN
        self.is_all_based = all(run.base_offset is not None for _, run in runs)

    def _base_blocks(self, window: memoryview) -> Bytes:
        size = self.layout.block_bytes
        if len(self.runs) == 1 and self.runs[0][1].base_offset is not None:
            start = self.runs[0][1].base_offset
            return np.frombuffer(window[start : start + self.blocks * size], np.uint8).reshape(-1, size)
        blocks = np.zeros((self.blocks, size), np.uint8)
        first = 0
        for _, run in self.runs:
            if run.base_offset is not None:
                data = window[run.base_offset : run.base_offset + run.length]
                blocks[first : first + run.blocks] = np.frombuffer(data, np.uint8).reshape(-1, size)
            first += run.blocks
        return blocks

    def gather(self, result: memoryview) -> Bytes:
        """Return this group's blocks of the result."""
        parts = [np.frombuffer(result[at : at + run.length], np.uint8) for at, run in self.runs]
        return np.concatenate(parts).reshape(-1, self.layout.block_bytes)

    def chunks(self) -> Iterator[tuple[int, int, Run]]:
        """Yield `(first block, last block + 1, run)` in pieces that keep temporaries small."""
        step = max(1, _CHUNK_CODES // self.layout.codes.count)
        first = 0
        for _, run in self.runs:
            for start in range(first, first + run.blocks, step):
                yield start, min(start + step, first + run.blocks), run
            first += run.blocks

    def base_classes(self, count: int) -> npt.NDArray[np.uint8] | None:
        """Contexts of fields that have no better ones: whether there is a base. None where all have one."""
        if self.is_all_based:
            return None
        classes = [
            np.full(run.blocks * count, 0 if run.base_offset is not None else NO_BASE_CLASS, np.uint8)
            for _, run in self.runs
        ]
        return np.concatenate(classes)

    def predict_codes(self, scales: dict[str, Array]) -> tuple[Unsigned, npt.NDArray[np.uint8] | None]:
        """Return expected codes, flat, and their contexts; None where every context is the same."""
        codes = self.layout.codes
        if self.is_plain and not any(run.gain for _, run in self.runs):
            return codes.split(self.old).reshape(-1), self.base_classes(codes.count)
        expected = np.zeros((self.blocks, codes.count), np.uint8)
        context = np.full((self.blocks, codes.count), NO_BASE_CLASS, np.uint8)
        for start, end, run in self.chunks():
            if run.base_offset is None:
                continue
            old = self.layout.split(self.old[start:end])
            if self.is_plain:
                gain, offset = run.gain or (1 << 16, 0)
                guess = predict_plain(self.layout, old[codes.name], gain, offset)
            else:
                guess = predict_scaled(
                    self.layout, old, {key: value[start:end] for key, value in scales.items()}
                )
            expected[start:end], context[start:end] = guess
        return expected.reshape(-1), context.reshape(-1)


def _groups(runs: Sequence[Run], window: memoryview) -> list[_Group]:
    by_layout: dict[int, list[tuple[int, Run]]] = {}
    position = 0
    for run in runs:
        by_layout.setdefault(run.layout, []).append((position, run))
        position += run.length
    return [_Group(LAYOUT_BY_NUMBER[number], by_layout[number], window) for number in sorted(by_layout)]


def encode_tensor(result: bytes, window: bytes, runs: Sequence[Run], effort: str) -> bytes:
    """Return the payload that gives `result` from the base window.

    Args:
        result: The segment's bytes.
        window: The bytes of the base that runs refer to.
        runs: What the segment is made of; together as long as `result`.
        effort: As for `compression.compress`.
    """
    out = bytearray()
    for group in _groups(runs, memoryview(window)):
        new = group.layout.split(group.gather(memoryview(result)))
        for field in group.layout.fields[:-1]:
            symbols = _residuals(field, new[field.name], field.split(group.old), None)
            out += _encode_classes(symbols, group.base_classes(field.count), effort)
        expected, context = group.predict_codes(new)
        codes = group.layout.codes
        symbols = _residuals(codes, new[codes.name], expected, context)
        out += _encode_classes(symbols, context, effort)
    return bytes(out)


def decode_tensor(payload: bytes, window: bytes, runs: Sequence[Run]) -> bytes:
    """Return the segment's bytes; the inverse of `encode_tensor`.

    Raises:
        PatchError: The payload is damaged.
    """
    reader = Payload(payload)
    result = bytearray(sum(run.length for run in runs))
    for group in _groups(runs, memoryview(window)):
        layout = group.layout
        new: dict[str, Array] = {}
        for field in layout.fields[:-1]:
            symbols = _decode_classes(
                reader, group.blocks * field.count, field, group.base_classes(field.count)
            )
            values = _restore(field, symbols, field.split(group.old), None)
            new[field.name] = values.reshape(group.blocks, field.count)
        expected, context = group.predict_codes(new)
        symbols = _decode_classes(reader, group.blocks * layout.codes.count, layout.codes, context)
        codes = _restore(layout.codes, symbols, expected, context)
        new[layout.codes.name] = codes.reshape(group.blocks, layout.codes.count)
        blocks = layout.join(new).tobytes()
        taken = 0
        for at, run in group.runs:
            result[at : at + run.length] = blocks[taken : taken + run.length]
            taken += run.length
    reader.expect_end()
    return bytes(result)


def _word_width(field: Words | Bits) -> int:
    return field.width if isinstance(field, Words) else 8


def _ordered(field: Words | Bits, values: Unsigned) -> Unsigned:
    """Map words to integers in the order of the numbers they stand for."""
    if not isinstance(field, Words) or field.order is Order.INTEGER:
        return values
    kind = values.dtype.type
    sign = kind(1 << (field.width - 1))
    ordered: Unsigned = values ^ np.where(values & sign, ~kind(0), sign)
    return ordered


def _unordered(field: Words | Bits, values: Unsigned) -> Unsigned:
    if not isinstance(field, Words) or field.order is Order.INTEGER:
        return values
    kind = values.dtype.type
    sign = kind(1 << (field.width - 1))
    words: Unsigned = values ^ np.where(values & sign, sign, ~kind(0))
    return words


def _residuals(
    field: Words | Bits, new: Array, old: Array, context: npt.NDArray[np.uint8] | None
) -> Unsigned:
    """Return zigzag differences, modulo the word width, folded so that the likelier direction is the smaller."""
    width = _word_width(field)
    difference = _ordered(field, new.reshape(-1)) - _ordered(field, old.reshape(-1))
    signed = difference.view(f"<i{width // 8}")
    if context is not None and width == 8:
        np.negative(signed, out=signed, where=(context & TOWARDS_UPPER).astype(bool))
    return ((signed << 1) ^ (signed >> (width - 1))).view(f"<u{width // 8}")


def _restore(
    field: Words | Bits, symbols: Unsigned, old: Array, context: npt.NDArray[np.uint8] | None
) -> Unsigned:
    width = _word_width(field)
    kind = symbols.dtype.type
    difference = (symbols >> kind(1)) ^ -(symbols & kind(1))
    if context is not None and width == 8:
        np.negative(difference, out=difference, where=(context & TOWARDS_UPPER).astype(bool))
    new = _unordered(field, _ordered(field, old.reshape(-1)) + difference)
    # A hostile stream may leave the range of a field; what does not fit is cut, and the segment's digest refuses it.
    return new if isinstance(field, Words) else new & np.uint8((1 << field.width) - 1)


def _encode_classes(symbols: Unsigned, context: npt.NDArray[np.uint8] | None, effort: str) -> bytes:
    whole = bytes([_ONE_CLASS]) + encode_symbols(symbols, effort)
    if context is None or len(whole) <= 64:
        return whole
    classes = context & 0x0F
    parts = bytearray([_SPLIT_CLASSES])
    for number in range(_CLASSES):
        chosen = symbols[classes == number]
        if len(chosen):
            parts += encode_symbols(chosen, effort)
    return min(whole, bytes(parts), key=len)


def _decode_classes(
    reader: Payload, count: int, field: Words | Bits, context: npt.NDArray[np.uint8] | None
) -> Unsigned:
    width = _word_width(field)
    mode = reader.byte()
    if mode == _ONE_CLASS:
        return decode_symbols(reader, count, width)
    if mode != _SPLIT_CLASSES or context is None:
        raise PatchError(f"a stream has the unknown mode {mode}")
    classes = context & 0x0F
    symbols: Unsigned = np.zeros(count, f"<u{width // 8}")
    for number in range(_CLASSES):
        chosen = classes == number
        size = int(np.count_nonzero(chosen))
        if size:
            symbols[chosen] = decode_symbols(reader, size, width)
    return symbols
