"""Writes the inverse of a delta while that is applied: an ordinary delta file, from the new file back to the old one.

Where bytes went is known from the delta, so nothing is searched: the old bytes are sent as differences from what became of them, and as they
are where nothing did. That takes a few percent of the time that decoding takes; coding them with the context model would take as long as
decoding again, for half the size of a file that never leaves the device (docs/adr/0012).
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from protocol.delta.bsdiff import encode_instructions
from protocol.delta.codecs import segment_checksum, segment_digest
from protocol.delta.compression import compress
from protocol.delta.format import (
    END_BYTES,
    RECORD_BYTES_MAX,
    Codec,
    EndRecord,
    Header,
    Position,
    Profile,
    Reach,
    SegmentHeader,
    segment_memory_bytes,
)
from protocol.delta.moves import Move
from protocol.errors import InverseFullError, PatchError
from protocol.tensors.regions import ReadAt

SEGMENT_BYTES: Final = 1 << 20
"""Result of one segment of an inverse, unless those of the delta are shorter."""

_WINDOW_FACTOR = 2
"""A base window is at most that many segments long: bytes that went further apart are sent as they are."""

MOVES_MAX: Final = 4096
"""Moves that are remembered at a time; those that come when there are so many are forgotten, which costs bytes only."""

_POOR_RATIO = 0.8
_STATE = struct.Struct("<QQI")  # length, cursor, moves
_MOVE = struct.Struct("<QQQ")


class WriteAt(Protocol):
    """Where an inverse goes."""

    def write_at(self, offset: int, data: bytes, /) -> None:
        """Write into the file, which grows as needed."""
        ...


@dataclass(frozen=True, slots=True)
class InverseState:
    """How far an inverse has come; what lies behind `length` in its file does not count.

    Attributes:
        length: Of the inverse, in bytes.
        cursor: How many bytes of the old file it gives.
        moves: What is known of the old bytes behind the cursor.
    """

    length: int = 0
    cursor: int = 0
    moves: tuple[Move, ...] = ()

    def pack(self) -> bytes:
        """Return the state as bytes."""
        head = _STATE.pack(self.length, self.cursor, len(self.moves))
        return head + b"".join(
            _MOVE.pack(move.base_offset, move.result_offset, move.length) for move in self.moves
        )

    @classmethod
    def unpack(cls, data: bytes) -> "InverseState":
        """Read what `pack` made.

        Raises:
            PatchError: It is not that.
        """
        try:
            length, cursor, count = _STATE.unpack_from(data)
            moves = tuple(Move(*_MOVE.unpack_from(data, _STATE.size + i * _MOVE.size)) for i in range(count))
        except struct.error as error:
            raise PatchError("the stored state of an inverse is damaged") from error
        return cls(length, cursor, moves)


def inverse_header(header: Header) -> Header:
    """Return the header of the inverse of a delta that was made for application in place."""
    assert header.reach is not None
    segment_bytes = min(SEGMENT_BYTES, header.segment_bytes_max)
    return Header(
        Profile.FAST,
        header.result_length,
        header.result_sha256,
        header.base_length,
        header.base_sha256,
        segment_memory_bytes(Codec.BSDIFF, segment_bytes, _WINDOW_FACTOR * segment_bytes, segment_bytes),
        segment_bytes,
        Reach(header.reach.ahead_bytes, header.reach.behind_bytes),
    )


class InverseWriter:
    """Writes one inverse, in the order of the old file.

    Args:
        header: Of the delta that is being applied.
        out: Takes the inverse.
        state: Where to go on; None to begin, which writes the header.
        bytes_max: Room for the inverse.

    Raises:
        InverseFullError: From every method that writes, before anything is written.
    """

    def __init__(self, header: Header, out: WriteAt, state: InverseState | None, bytes_max: int) -> None:
        self._header = inverse_header(header)
        self._out = out
        self._bytes_max = bytes_max
        self._segment_bytes = self._header.segment_bytes_max
        packed = self._header.pack()
        self._header_crc = int.from_bytes(packed[-4:], "little")
        self._length = self._cursor = 0
        self._moves: list[Move] = []
        if state is None:
            self._write(packed)
        else:
            self._length, self._cursor = state.length, state.cursor
            self._moves = list(state.moves)

    @property
    def state(self) -> InverseState:
        """How far it has come."""
        return InverseState(self._length, self._cursor, tuple(self._moves))

    @property
    def length(self) -> int:
        """Length so far, in bytes."""
        return self._length

    def learn(self, moves: Iterable[Move]) -> None:
        """Note where old bytes have gone."""
        for move in moves:
            if len(self._moves) >= MOVES_MAX:
                break
            if move.base_end > self._cursor:
                self._moves.append(move)
        self._moves.sort(key=lambda move: move.base_offset)

    def emit(self, until: int, old: ReadAt, new: ReadAt) -> None:
        """Write segments for all bytes of the old file up to an offset.

        Args:
            until: The offset; beyond the end of the old file it stands for that.
            old: The old file, from the last offset up to this one.
            new: The new file, as far as moves that were learned lead.
        """
        until = min(until, self._header.result_length)
        while self._cursor < until:
            left = until - self._cursor
            pieces = -(-left // self._segment_bytes)
            self._put(self._cursor - (-left // pieces), old, new)

    def check_room(self, more_bytes: int) -> None:
        """Make sure that there is room for as many bytes of the old file as they are.

        Raises:
            InverseFullError: There is not.
        """
        records = -(-more_bytes // self._segment_bytes) + 1
        needed = self._length + more_bytes + records * RECORD_BYTES_MAX + END_BYTES
        if needed > self._bytes_max:
            raise InverseFullError(
                f"the inverse delta needs {needed} bytes, there is room for {self._bytes_max}",
                hint="the file is put back as it was; make room for it",
            )

    def finish(self) -> None:
        """Write the end record."""
        assert self._cursor == self._header.result_length
        self._write(EndRecord().pack(self._position()))

    def _put(self, end: int, old: ReadAt, new: ReadAt) -> None:
        result = old.read_at(self._cursor, end - self._cursor)
        assert len(result) == end - self._cursor
        moves = self._usable(end)
        low = min((move.result_offset for move in moves), default=0)
        high = max((move.result_offset + move.length for move in moves), default=0)
        window = new.read_at(low, high - low) if moves else b""
        assert len(window) == high - low
        codec, body = _encode(self._cursor, result, moves, low, window)
        has_window = codec in {Codec.COPY, Codec.BSDIFF}
        segment = SegmentHeader(
            codec,
            0,
            len(result),
            low if has_window else 0,
            len(window) if has_window else 0,
            len(body),
            segment_digest(codec, result),
            segment_checksum(codec, result, body),
        )
        self._write(segment.pack(self._position()) + body)
        self._cursor = end
        self._moves = [move for move in self._moves if move.base_end > end]

    def _usable(self, end: int) -> list[Move]:
        """Return what is known of the bytes up to `end`: without overlaps, and within the reach of an in-place rollback."""
        reach = self._header.reach
        assert reach is not None
        found: list[Move] = []
        at = self._cursor
        low, high = self._header.base_length, 0
        for move in self._moves:
            start, stop = max(move.base_offset, at), min(move.base_end, end)
            to = move.result_offset + start - move.base_offset
            if start >= stop or to < self._cursor - reach.behind_bytes:
                continue
            if max(high, to + stop - start) - min(low, to) > _WINDOW_FACTOR * self._segment_bytes:
                continue
            low, high, at = min(low, to), max(high, to + stop - start), stop
            last = found[-1] if found else None
            if last and (last.base_end, last.result_offset + last.length) == (start, to):
                found[-1] = Move(last.base_offset, last.result_offset, last.length + stop - start)
            else:
                found.append(Move(start, to, stop - start))
        return found

    def _position(self) -> Position:
        return Position(self._header_crc, self._length, self._cursor)

    def _write(self, data: bytes) -> None:
        if self._length + len(data) > self._bytes_max:
            self.check_room(len(data))
        self._out.write_at(self._length, data)
        self._length += len(data)


def _encode(start: int, result: bytes, moves: list[Move], low: int, window: bytes) -> tuple[Codec, bytes]:
    """Return the smallest that a rung gives."""
    if moves and window == result:
        return Codec.COPY, b""
    best = (Codec.RAW, result)
    if moves:
        body = _differences(start, result, moves, low, window)
        best = min(best, (Codec.BSDIFF, body), key=lambda rung: len(rung[1]))
    if len(best[1]) > _POOR_RATIO * len(result):
        best = min(best, (Codec.SELF, compress(result, "quick")), key=lambda rung: len(rung[1]))
    return best


def _differences(start: int, result: bytes, moves: list[Move], low: int, window: bytes) -> bytes:
    old, new = np.frombuffer(result, np.uint8), np.frombuffer(window, np.uint8)
    instructions: list[tuple[int, int, int]] = []
    differences: list[bytes] = []
    insertions: list[bytes] = []
    at, position = 0, 0  # in result and window, behind the last instruction
    add = 0
    for move in moves:
        inside, to = move.base_offset - start, move.result_offset - low
        # An instruction adds, inserts up to the next one's bytes, and moves to theirs.
        instructions.append((add, inside - at, to - position))
        insertions.append(result[at:inside])
        add = move.length
        at, position = inside + add, to + add
        differences.append((old[inside:at] - new[to:position]).tobytes())
    instructions.append((add, len(result) - at, 0))
    insertions.append(result[at:])
    if instructions[0] == (0, 0, 0):
        del instructions[0]
    return encode_instructions(instructions, b"".join(differences), b"".join(insertions), "quick")
