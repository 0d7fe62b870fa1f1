"""The push reader: bytes of a delta file in, pieces of the result out, in order.

Pure: the base is read through `ReadAt`, the result is handed to the caller, who writes it. Between two pieces the
whole state is a few hundred bytes (`dump`, `restore`); inside a segment a restored reader starts that segment again.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, TypeGuard

from protocol.delta.codecs import decode_segment, read_tables, read_window, wrong_base
from protocol.delta.context import ContextModel
from protocol.delta.format import (
    HEADER_PREFIX_BYTES,
    NOTES_MAX,
    RECORD_BYTES_MAX,
    Codec,
    EndRecord,
    Header,
    Position,
    SegmentHeader,
    check_segment,
    header_length,
    unpack_record,
)
from protocol.delta.moves import MOVE_BYTES_MIN, Move, moves_of
from protocol.errors import PatchError, PatchLimitError, TruncatedPatchError, WrongBaseError
from protocol.tensors.regions import ReadAt

DEFAULT_MEMORY_LIMIT_BYTES = 64 << 20
"""What a reader accepts to spend on decoding unless it is told otherwise: a quarter of the smallest board's memory."""

STATE_BYTES_MAX = 256 << 10
"""A dumped state is never larger."""

_STATE_MAGIC = b"WBS3"
# Magic, header length, flags, patch offset, result offset, notes, length and checksum of what was given of a copy; header and
# model follow.
_STATE = struct.Struct("<4sHHQQIQI")
_IS_FINISHED = 1
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the result: a segment, or what fits into one of a longer copy.

    Attributes:
        offset: Where it goes in the result.
        data: Its bytes.
        codec: How it was sent.
        moves: Which of its bytes came from where in the base, for a reader that was asked to tell.
    """

    offset: int
    data: bytes
    codec: Codec
    moves: tuple[Move, ...] = ()


class DeltaReader:
    """Applies one delta file.

    Args:
        base: What the delta applies to. Its length is checked at once; its digest is the caller's to compare with
            `header.base_sha256`, since only the caller knows when it was last measured.
        memory_limit_bytes: A delta that declares more is refused before anything is allocated for it.
        tells_moves: Pieces say where their bytes came from.

    Attributes:
        header: None until enough bytes have been fed.
        patch_offset: From which byte of the delta file a reader restored now goes on; that of its record in the middle of a copy.
        result_offset: How much of the result has been given out.
    """

    def __init__(
        self,
        base: ReadAt,
        *,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        tells_moves: bool = False,
    ) -> None:
        self._base = base
        self._tells_moves = tells_moves
        self._memory_limit_bytes = memory_limit_bytes
        self._buffer = bytearray()
        self._segment: SegmentHeader | None = None
        self._record_length = 0
        self._copied, self._copied_crc = 0, 0  # of the copy at `patch_offset`
        self._header_bytes = b""
        self._notes = 0
        self._is_finished = False
        self._model = ContextModel()
        # A hash state cannot be stored, so only a reader that saw everything verifies the whole result itself.
        self._hash: hashlib._Hash | None = hashlib.sha256()
        self.header: Header | None = None
        self.patch_offset = 0
        self.result_offset = 0

    @property
    def is_finished(self) -> bool:
        """Whether the end record was read and agreed."""
        return self._is_finished

    @property
    def is_result_verified(self) -> bool:
        """Whether this reader itself compared the SHA-256 of the whole result.

        False for a reader that was restored: the caller reads the written file back and compares it with
        `header.result_sha256`, which a device does in any case, because disks lie.
        """
        return self._is_finished and self._hash is not None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Piece]:
        """Accept the next bytes of the delta file and return the pieces of the result that they complete.

        The pieces are made while the iterator is advanced, so memory holds one segment whatever `data` contains. What was computed
        is verified by its digest before it is given out; a copy longer than a segment by a checksum, with its last piece. An
        iterator that is dropped early loses nothing: the next call goes on there. After each piece, `dump` describes
        the state behind it.

        Raises:
            PatchError: While iterating: the file is damaged, hostile, or goes on after its end.
            PatchLimitError: It needs more memory or length than was accepted.
            WrongBaseError: It was made for another base.
        """
        self._buffer += data
        return self._drain()

    def finish(self) -> None:
        """Declare that there are no more bytes.

        Raises:
            TruncatedPatchError: The file should have gone on.
        """
        if not self._is_finished:
            raise TruncatedPatchError(
                f"the delta file ends at byte {self.patch_offset + len(self._buffer)}, before its end record",
                hint="fetch it again",
            )

    def dump(self) -> bytes:
        """Return the state behind the last piece that was given out, for `restore`."""
        flags = _IS_FINISHED if self._is_finished else 0
        state = _STATE.pack(
            _STATE_MAGIC,
            len(self._header_bytes),
            flags,
            self.patch_offset,
            self.result_offset,
            self._notes,
            self._copied,
            self._copied_crc,
        )
        state += self._header_bytes
        if not self._is_finished:
            state += self._model.dump()
        return state + _CRC.pack(zlib.crc32(state))

    @classmethod
    def restore(
        cls,
        base: ReadAt,
        state: bytes,
        *,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        tells_moves: bool = False,
    ) -> Self:
        """Return a reader that goes on where `dump` was called; feed it from byte `patch_offset` of the delta file.

        Raises:
            PatchError: The state is damaged or contradicts itself.
            PatchLimitError, WrongBaseError: As when the header is first read.
        """
        if not _STATE.size + _CRC.size <= len(state) <= STATE_BYTES_MAX or state[:4] != _STATE_MAGIC:
            raise PatchError("the stored state of a delta is not one", hint="start the delta again")
        if zlib.crc32(state[:-4]) != _CRC.unpack(state[-4:])[0]:
            raise PatchError("the stored state of a delta is damaged", hint="start the delta again")
        _, length, flags, patch_offset, result_offset, notes, copied, crc = _STATE.unpack_from(state)
        header_bytes = state[_STATE.size : _STATE.size + length]
        reader = cls(base, memory_limit_bytes=memory_limit_bytes, tells_moves=tells_moves)
        is_torn = length != len(header_bytes) or copied > result_offset
        if is_torn or (not length and (patch_offset or result_offset)):
            raise PatchError("the stored state of a delta contradicts itself", hint="start the delta again")
        if length:
            if header_length(header_bytes[:HEADER_PREFIX_BYTES]) != length:
                raise PatchError(
                    "the stored state of a delta contradicts itself", hint="start the delta again"
                )
            reader._accept_header(header_bytes)
            reader._hash = None
            if patch_offset < length or result_offset > reader._result_length():
                raise PatchError(
                    "the stored state of a delta contradicts itself", hint="start the delta again"
                )
        reader.patch_offset, reader.result_offset = patch_offset, result_offset
        reader._notes, reader._copied, reader._copied_crc = notes, copied, crc
        reader._is_finished = bool(flags & _IS_FINISHED)
        reader._model = ContextModel.load(state[_STATE.size + length : -4])
        return reader

    def _drain(self) -> Iterator[Piece]:
        while True:
            if self._is_finished:
                if self._buffer:
                    raise PatchError("there are bytes after the end of the delta file")
                return
            if self.header is None:
                if not self._read_header():
                    return
            elif self._segment is None:
                if not self._read_record(self.header):
                    return
            elif self._segment.codec is Codec.COPY:
                yield self._copy(self._segment, self.header)
            else:
                if len(self._buffer) < self._record_length + self._segment.body_length:
                    return
                piece = self._read_body(self._segment, self.header)
                if piece is not None:
                    yield piece

    def _read_header(self) -> bool:
        if len(self._buffer) < HEADER_PREFIX_BYTES:
            return False
        length = header_length(bytes(self._buffer[:HEADER_PREFIX_BYTES]))
        if len(self._buffer) < length:
            return False
        self._accept_header(bytes(self._buffer[:length]))
        del self._buffer[:length]
        self.patch_offset = length
        return True

    def _accept_header(self, data: bytes) -> None:
        header = Header.unpack(data)
        if header.decoder_memory_bytes > self._memory_limit_bytes:
            raise PatchLimitError(
                f"the delta file needs {header.decoder_memory_bytes} bytes of memory,"
                f" {self._memory_limit_bytes} are accepted"
            )
        if header.base_length != self._base.length:
            raise WrongBaseError(
                f"the delta was made for a base of {header.base_length} bytes, this one has {self._base.length}"
            )
        self.header = header
        self._header_bytes = data

    def _result_length(self) -> int:
        return self.header.result_length if self.header else 0

    def _position(self) -> Position:
        header_crc = _CRC.unpack(self._header_bytes[-4:])[0]
        return Position(header_crc, self.patch_offset, self.result_offset - self._copied)

    def _read_record(self, header: Header) -> bool:
        position = self._position()
        read = unpack_record(bytes(self._buffer[:RECORD_BYTES_MAX]), position)
        if read is None:
            return False
        record, self._record_length = read
        copied_max = record.result_length - 1 if _is_copy(record) else 0
        if self._copied > copied_max:
            raise PatchError("the stored state of a delta belongs to another delta", hint="start it again")
        if isinstance(record, EndRecord):
            self._finish(header)
        else:
            check_segment(record, header, position.result_offset)
            self._segment = record
        return True

    def _copy(self, segment: SegmentHeader, header: Header) -> Piece:
        """Return the next piece of a copy."""
        offset, done = self.result_offset, self._copied
        length = min(segment.result_length - done, header.segment_bytes_max)
        at = segment.window_offset + done
        data = read_window(self._base, at, length)
        crc = zlib.crc32(data, self._copied_crc)
        is_last = done + length == segment.result_length
        if is_last and crc != segment.checksum:
            raise wrong_base(segment.window_offset)
        moves = (Move(at, offset, length),) if self._tells_moves and length >= MOVE_BYTES_MIN else ()
        self._give(data)
        self._copied, self._copied_crc = (0, 0) if is_last else (done + length, crc)
        if is_last:
            self._pass(self._record_length)
        return Piece(offset, data, segment.codec, moves)

    def _read_body(self, segment: SegmentHeader, header: Header) -> Piece | None:
        length = self._record_length + segment.body_length
        body = bytes(memoryview(self._buffer)[self._record_length : length])
        piece: Piece | None = None
        if segment.codec is Codec.NOTES:
            self._read_note(segment, body)
        elif segment.codec is Codec.TABLES:
            self._model.basis = read_tables(segment, body)
        else:
            data = decode_segment(segment, body, self._base, header, self._model)
            moves = (
                moves_of(segment, body, self.result_offset, self._model.basis) if self._tells_moves else ()
            )
            piece = Piece(self.result_offset, data, segment.codec, moves)
            self._give(data)
        self._pass(length)
        return piece

    def _give(self, data: bytes) -> None:
        if self._hash is not None:
            self._hash.update(data)
        self.result_offset += len(data)

    def _pass(self, length: int) -> None:
        """Leave a record behind, with its body."""
        del self._buffer[:length]
        self.patch_offset += length
        self._segment = None

    def _read_note(self, segment: SegmentHeader, body: bytes) -> None:
        if zlib.crc32(body) != segment.checksum:
            raise PatchError("a note record is damaged")
        self._notes += 1
        if self._notes > NOTES_MAX:
            raise PatchLimitError(f"the delta file has more than {NOTES_MAX} note records")

    def _finish(self, header: Header) -> None:
        if self.result_offset != header.result_length:
            raise PatchError("the delta file's end record does not agree with its segments")
        if self._hash is not None and self._hash.digest() != header.result_sha256:
            raise PatchError("the result does not have the announced SHA-256", hint="the delta file is wrong")
        self._pass(self._record_length)
        self._is_finished = True


def _is_copy(record: SegmentHeader | EndRecord) -> TypeGuard[SegmentHeader]:
    return isinstance(record, SegmentHeader) and record.codec is Codec.COPY
