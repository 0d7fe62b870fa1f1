"""What is in a delta file, for people: without the base, without decoding, in one pass."""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from protocol.delta.codecs import read_tables
from protocol.delta.format import (
    HEADER_PREFIX_BYTES,
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
from protocol.delta.layouts import NAME_BY_NUMBER
from protocol.delta.notes import TensorNote, read_notes
from protocol.delta.runs import Basis, ContextRun, read_context_runs
from protocol.delta.tensor import Run, read_runs
from protocol.errors import PatchError, TruncatedPatchError
from protocol.tensors.regions import Layout, ReadAt


@dataclass(slots=True)
class Inspection:
    """A delta file's table of contents.

    Attributes:
        header: What the file promises.
        patch_length: Its length in bytes.
        segments: How many segments each codec has.
        patch_bytes: Bytes of the file for each codec, record headers included.
        result_bytes: Bytes of the result for each codec.
        layout_bytes: Bytes of the result of each block layout inside tensor segments.
        tensors: Changed tensors, if the writer noted them.
    """

    header: Header
    patch_length: int = 0
    segments: Counter[Codec] = field(default_factory=Counter)
    patch_bytes: Counter[Codec] = field(default_factory=Counter)
    result_bytes: Counter[Codec] = field(default_factory=Counter)
    layout_bytes: Counter[Layout] = field(default_factory=Counter)
    tensors: list[TensorNote] = field(default_factory=list)


def inspect_delta(patch: ReadAt) -> Inspection:
    """Read a whole delta file and check every checksum that needs no base.

    Raises:
        TruncatedPatchError: It ends too early.
        PatchError: It is damaged, or no delta file.
    """
    header, segments = read_segments(patch)
    inspection = Inspection(header, patch.length)
    basis: Basis | None = None
    for segment, body, length in segments:
        codec = segment.codec
        parameters = body[: segment.parameter_length]
        runs: Sequence[Run | ContextRun] = ()
        inspection.segments[codec] += 1
        inspection.patch_bytes[codec] += length
        inspection.result_bytes[codec] += segment.result_length
        if codec is Codec.TENSOR:
            runs = read_runs(parameters, segment.result_length, segment.window_length)
        elif codec is Codec.CONTEXT:
            runs = read_context_runs(parameters, segment.result_length, segment.window_length, basis)
        elif codec is Codec.TABLES:
            basis = read_tables(segment, body)
        elif codec is Codec.NOTES:
            inspection.tensors += read_notes(body)
        for run in runs:
            inspection.layout_bytes[NAME_BY_NUMBER[run.layout]] += run.length
    inspection.patch_bytes[Codec.END] = patch.length - inspection.patch_bytes.total()
    return inspection


def read_segments(patch: ReadAt) -> tuple[Header, Iterator[tuple[SegmentHeader, bytes, int]]]:
    """Return the header of a delta file, and all of its records but the last with their bodies and the length of both.

    Raises:
        TruncatedPatchError: It ends too early; also while records are read.
        PatchError: It is damaged, or no delta file; likewise.
    """
    length = header_length(_read(patch, 0, HEADER_PREFIX_BYTES))
    packed = _read(patch, 0, length)
    header = Header.unpack(packed)
    return header, _segments(patch, header, int.from_bytes(packed[-4:], "little"), length)


def _segments(
    patch: ReadAt, header: Header, header_crc: int, start: int
) -> Iterator[tuple[SegmentHeader, bytes, int]]:
    position, result_offset = start, 0
    while True:
        data = patch.read_at(position, RECORD_BYTES_MAX)
        read = unpack_record(data, Position(header_crc, position, result_offset))
        if read is None:
            raise _truncated(position + len(data))
        record, length = read
        if isinstance(record, EndRecord):
            if result_offset != header.result_length or position + length != patch.length:
                raise PatchError("the delta file's end record does not agree with its segments")
            return
        check_segment(record, header, result_offset)
        body = _read(patch, position + length, record.body_length)
        if record.codec is not Codec.COPY and zlib.crc32(body) != record.checksum:
            raise PatchError("a segment's payload is damaged")
        yield record, body, length + len(body)
        position += length + len(body)
        result_offset += record.result_length


def _read(patch: ReadAt, offset: int, length: int) -> bytes:
    data = patch.read_at(offset, length)
    if len(data) != length:
        raise _truncated(offset + len(data))
    return data


def _truncated(length: int) -> TruncatedPatchError:
    return TruncatedPatchError(f"the delta file ends at byte {length}", hint="fetch it again")
