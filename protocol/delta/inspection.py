"""What is in a delta file, for people: without the base, without decoding, in one pass."""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from protocol.delta.codecs import read_tables
from protocol.delta.format import (
    HEADER_PREFIX_BYTES,
    RECORD_BYTES,
    WITHOUT_RESULT,
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
    for segment, body in segments:
        codec = segment.codec
        parameters = body[: segment.parameter_length]
        runs: Sequence[Run | ContextRun] = ()
        inspection.segments[codec] += 1
        inspection.patch_bytes[codec] += RECORD_BYTES + len(body)
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


def read_segments(patch: ReadAt) -> tuple[Header, Iterator[tuple[SegmentHeader, bytes]]]:
    """Return the header of a delta file, and all of its records but the last with their bodies.

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
) -> Iterator[tuple[SegmentHeader, bytes]]:
    position, result_offset, count = start, 0, 0
    while True:
        record = unpack_record(
            _read(patch, position, RECORD_BYTES), Position(header_crc, position, result_offset)
        )
        position += RECORD_BYTES
        if isinstance(record, EndRecord):
            is_complete = (record.segments, record.result_length) == (count, result_offset)
            if (
                not is_complete
                or result_offset != header.result_length
                or record.patch_length != patch.length
            ):
                raise PatchError("the delta file's end record does not agree with its segments")
            return
        check_segment(record, header, result_offset)
        body = _read(patch, position, record.body_length)
        if zlib.crc32(body) != record.body_crc:
            raise PatchError("a segment's payload is damaged")
        yield record, body
        position += len(body)
        result_offset += record.result_length
        count += record.codec not in WITHOUT_RESULT


def _read(patch: ReadAt, offset: int, length: int) -> bytes:
    data = patch.read_at(offset, length)
    if len(data) != length:
        raise TruncatedPatchError(f"the delta file ends at byte {offset + len(data)}", hint="fetch it again")
    return data
