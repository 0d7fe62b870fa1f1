"""Which bytes of a result came from where in the base: what a segment says of it, without decoding anything."""

from dataclasses import dataclass

from protocol.delta.bsdiff import read_instructions
from protocol.delta.format import Codec, SegmentHeader
from protocol.delta.runs import Basis, read_context_runs
from protocol.delta.tensor import read_runs

MOVE_BYTES_MIN = 64
"""Shorter ones cost more to describe than to send."""


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of the result that were made from as many bytes of the base.

    Attributes:
        base_offset: Where they are in the base.
        result_offset: Where they are in the result.
        length: How many.
    """

    base_offset: int
    result_offset: int
    length: int

    @property
    def base_end(self) -> int:
        """The offset after the last byte in the base."""
        return self.base_offset + self.length


def moves_of(
    segment: SegmentHeader, body: bytes, result_offset: int, basis: Basis | None
) -> tuple[Move, ...]:
    """Return the moves of a segment that was decoded, in the order of the result; neighbours that moved alike are one.

    Args:
        segment: Its header.
        body: Parameters and payload.
        result_offset: Where its result starts.
        basis: What the last tables record brought.
    """
    moves: list[Move] = []
    for inside, at, length in _stretches(segment, body, basis):
        move = Move(segment.window_offset + at, result_offset + inside, length)
        last = moves[-1] if moves else None
        if last is not None and (last.base_end, last.result_offset + last.length) == (
            move.base_offset,
            move.result_offset,
        ):
            moves[-1] = Move(last.base_offset, last.result_offset, last.length + length)
        else:
            moves.append(move)
    return tuple(move for move in moves if move.length >= MOVE_BYTES_MIN)


def _stretches(segment: SegmentHeader, body: bytes, basis: Basis | None) -> list[tuple[int, int, int]]:
    """Return offset in the result, offset in the window, and length."""
    if segment.codec is Codec.COPY:
        return [(0, 0, segment.result_length)]
    if segment.codec is Codec.BSDIFF:
        return _follow(read_instructions(body, segment.result_length))
    parameters = body[: segment.parameter_length]
    if segment.codec is Codec.TENSOR:
        runs = read_runs(parameters, segment.result_length, segment.window_length)
        places = [(run.base_offset, run.length) for run in runs]
    elif segment.codec is Codec.CONTEXT:
        context_runs = read_context_runs(parameters, segment.result_length, segment.window_length, basis)
        places = [(run.base_offset, run.length) for run in context_runs]
    else:
        return []
    found: list[tuple[int, int, int]] = []
    inside = 0
    for base_offset, length in places:
        if base_offset is not None:
            found.append((inside, base_offset, length))
        inside += length
    return found


def _follow(instructions: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    inside = at = 0
    for add, insert, move in instructions:
        if add:
            found.append((inside, at, add))
        inside += add + insert
        at += add + move
    return found
