"""Making, applying and doctoring delta files in tests."""

import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from protocol.delta.format import (
    END_BYTES,
    HEADER_PREFIX_BYTES,
    RECORD_BYTES_MAX,
    Codec,
    EndRecord,
    Header,
    Position,
    SegmentHeader,
    header_length,
    unpack_record,
)
from protocol.delta.reader import DeltaReader
from protocol.delta.writer import DeltaStats, make_delta
from protocol.tensors import BytesSource


@dataclass(frozen=True)
class Record:
    """Where a record of a delta file stands.

    Attributes:
        segment: What it says; None for the end record.
        offset: Of its first byte.
        length: Without its body.
        body_length: Of what follows.
    """

    segment: SegmentHeader | None
    offset: int
    length: int
    body_length: int = 0

    @property
    def end(self) -> int:
        """The offset after its body."""
        return self.offset + self.length + self.body_length

    @property
    def result_length(self) -> int:
        """Bytes of result that it gives."""
        return self.segment.result_length if self.segment else 0


def delta(
    base: bytes, new: bytes, segment_bytes: int = 4096, *, is_portable: bool = False
) -> tuple[bytes, DeltaStats]:
    """Return the delta file and its statistics."""
    out = io.BytesIO()
    stats = make_delta(
        BytesSource(base), BytesSource(new), out, segment_bytes=segment_bytes, is_portable=is_portable
    )
    return out.getvalue(), stats


def apply(base: bytes, patch: bytes, *, memory_limit_bytes: int = 64 << 20) -> bytes:
    """Return the result of a delta file, fed at once."""
    return apply_parts(base, [patch], memory_limit_bytes=memory_limit_bytes)


def apply_parts(base: bytes, parts: Iterable[bytes], *, memory_limit_bytes: int = 64 << 20) -> bytes:
    """Return the result of a delta file, fed piece by piece."""
    reader = DeltaReader(BytesSource(base), memory_limit_bytes=memory_limit_bytes)
    out = bytearray()
    for part in parts:
        for piece in reader.feed(part):
            assert piece.offset == len(out)
            out += piece.data
    reader.finish()
    assert reader.is_result_verified
    return bytes(out)


def header_end(patch: bytes) -> int:
    """Return the length of a delta file's header."""
    return header_length(patch[:HEADER_PREFIX_BYTES])


def header_of(patch: bytes) -> Header:
    """Return the header of a delta file."""
    return Header.unpack(patch[: header_end(patch)])


def records(patch: bytes) -> list[Record]:
    """Return the records of a delta file, the end record last."""
    found: list[Record] = []
    position, result_offset = header_end(patch), 0
    crc = _header_crc(patch)
    while True:
        data = patch[position : position + RECORD_BYTES_MAX]
        read = unpack_record(data, Position(crc, position, result_offset))
        assert read is not None
        segment, length = read
        if isinstance(segment, EndRecord):
            return [*found, Record(None, position, length)]
        found.append(Record(segment, position, length, segment.body_length))
        position = found[-1].end
        result_offset += segment.result_length


def sealed(patch: bytes, layout: list[Record]) -> bytes:
    """Compute all checksums of a doctored file anew, as someone who wants to be believed would."""
    out = bytearray(patch)
    start = layout[0].offset
    out[start - 4 : start] = _crc(out[: start - 4])
    crc = int.from_bytes(out[start - 4 : start], "little")
    result_offset = 0
    for record in layout:
        end = record.offset + record.length
        if record.segment and record.segment.codec is not Codec.COPY:
            out[end - 8 : end - 4] = _crc(out[end : record.end])
        seed = Position(crc, record.offset, result_offset).seed()
        out[end - 4 : end] = zlib.crc32(out[record.offset : end - 4], seed).to_bytes(4, "little")
        result_offset += record.result_length
    return bytes(out)


def with_header(patch: bytes, **changes: Any) -> bytes:
    """Return a delta file whose header says something else, with checksums that agree."""
    return _joined(replace(header_of(patch), **changes), _segments(patch))


def with_segment(patch: bytes, index: int, **changes: Any) -> bytes:
    """Return a delta file one of whose records says something else, with checksums that agree."""
    segments = _segments(patch)
    segments[index] = replace(segments[index][0], **changes), segments[index][1]
    return _joined(header_of(patch), segments)


def without_segments(patch: bytes) -> bytes:
    """Return a delta file that ends after its header, with checksums that agree."""
    return _joined(header_of(patch), [])


def _segments(patch: bytes) -> list[tuple[SegmentHeader, bytes]]:
    return [
        (each.segment, patch[each.offset + each.length : each.end]) for each in records(patch) if each.segment
    ]


def _joined(header: Header, segments: list[tuple[SegmentHeader, bytes]]) -> bytes:
    out = bytearray(header.pack())
    crc = _header_crc(out)
    result_offset = 0
    for segment, body in segments:
        out += segment.pack(Position(crc, len(out), result_offset)) + body
        result_offset += segment.result_length
    end = EndRecord().pack(Position(crc, len(out), result_offset))
    assert len(end) == END_BYTES
    return bytes(out + end)


def _header_crc(patch: bytes | bytearray) -> int:
    end = header_end(bytes(patch[:HEADER_PREFIX_BYTES]))
    return int.from_bytes(patch[end - 4 : end], "little")


def _crc(data: bytes | bytearray) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
