"""The writer: two files in, a delta file out, through bounded windows.

Each planned segment is encoded with every rung of the ladder that may win, the smallest is kept, and it is decoded again
before it is written: a delta that was written can be applied.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from protocol.constants import BLOB_BYTES_MAX
from protocol.delta.bsdiff import encode_bsdiff
from protocol.delta.codecs import decode_segment, read_window, segment_digest
from protocol.delta.compression import compress
from protocol.delta.format import (
    HEADER_BYTES,
    NOTES_BYTES_MAX,
    PARAMETER_BYTES_MAX,
    RECORD_BYTES,
    SEGMENT_BYTES_MAX,
    SEGMENT_DIGEST_BYTES,
    Codec,
    EndRecord,
    Header,
    Position,
    Profile,
    SegmentHeader,
    segment_memory_bytes,
)
from protocol.delta.gain import with_gains
from protocol.delta.matching import match_regions
from protocol.delta.planner import Planner, SegmentPlan
from protocol.delta.tensor import encode_tensor, working_bytes, write_runs
from protocol.errors import ModelFileError, PatchLimitError
from protocol.tensors import map_regions
from protocol.tensors.regions import BytesSource, Layout, ReadAt, Region

DEFAULT_SEGMENT_BYTES = 1 << 20
"""A compromise: shorter segments cost headers and statistics, longer ones memory on the device."""

_READ_BYTES = 1 << 20
_EFFORTS = {Profile.FAST: "fast", Profile.SMALL: "small"}
# A tensor segment that is hardly smaller than its result is tried without the base, too.
_POOR_RATIO = 0.8
_SAMPLE_BYTES = 64 << 10


class Sink(Protocol):
    """Where the delta file goes: anything with `write`."""

    def write(self, data: bytes, /) -> object:
        """Append `data`."""
        ...


@dataclass(slots=True)
class DeltaStats:
    """What `make_delta` did.

    Attributes:
        header: The header that was written.
        patch_length: Of the delta file, in bytes.
        segments: How many segments each codec won.
        patch_bytes: Bytes of the delta file for each codec, headers included.
        result_bytes: Bytes of the result for each codec.
    """

    header: Header
    patch_length: int = 0
    segments: Counter[Codec] = field(default_factory=Counter)
    patch_bytes: Counter[Codec] = field(default_factory=Counter)
    result_bytes: Counter[Codec] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One rung's answer."""

    codec: Codec
    body: bytes
    parameter_length: int = 0
    window_offset: int = 0
    window_length: int = 0


def make_delta(
    base: ReadAt,
    new: ReadAt,
    sink: Sink,
    *,
    profile: Profile = Profile.SMALL,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaStats:
    """Write to `sink` the delta file that turns `base` into `new`.

    Any two files will do; those whose tensors are understood give small deltas. The same input gives the same output.
    Memory does not depend on the length of the files.

    Args:
        base: What devices have.
        new: What they shall have.
        sink: Takes the file's bytes in order.
        profile: Fewest bytes, or most speed.
        segment_bytes: Result of one segment: decides the device's memory and what a power cut costs.
        progress: Called with bytes of the result done and in all.

    Raises:
        PatchLimitError: A file or `segment_bytes` is beyond the format's limits.
        ModelFileError: A file changed while it was read.
    """
    if not 1024 <= segment_bytes <= SEGMENT_BYTES_MAX:
        raise PatchLimitError(
            f"segments of {segment_bytes} bytes are not between 1024 and {SEGMENT_BYTES_MAX}"
        )
    if max(base.length, new.length) > BLOB_BYTES_MAX:
        raise PatchLimitError(f"a file has more than {BLOB_BYTES_MAX} bytes")
    new_regions = map_regions(new)
    base_regions = map_regions(base)
    matches = match_regions(base_regions, new_regions, base, new)
    plans = list(Planner(base, new, segment_bytes, base_regions).plan(new_regions, matches))
    header = Header(
        profile,
        base.length,
        _sha256(base),
        new.length,
        _sha256(new),
        max((_plan_memory_bytes(plan) for plan in plans), default=0),
        segment_bytes,
    )
    encoder = _Encoder(base, new, sink, header, new_regions)
    for plan in plans:
        encoder.write(plan)
        if progress:
            progress(plan.result_offset + plan.length, new.length)
    return encoder.finish()


def _plan_memory_bytes(plan: SegmentPlan) -> int:
    """The most that any rung may need; a body longer than the result would be sent raw."""
    codec = Codec.TENSOR if plan.runs else Codec.BSDIFF
    return segment_memory_bytes(codec, plan.length, plan.window_length, plan.length, working_bytes(plan.runs))


def _sha256(source: ReadAt) -> bytes:
    digest = hashlib.sha256()
    for offset in range(0, source.length, _READ_BYTES):
        digest.update(_read(source, offset, min(_READ_BYTES, source.length - offset)))
    return digest.digest()


def _read(source: ReadAt, offset: int, length: int) -> bytes:
    data = source.read_at(offset, length)
    if len(data) != length:
        raise ModelFileError("a file became shorter while it was read")
    return data


class _Encoder:
    """Writes header, segments, notes and end record, and keeps count."""

    def __init__(
        self, base: ReadAt, new: ReadAt, sink: Sink, header: Header, regions: Sequence[Region]
    ) -> None:
        self._base = base
        self._new = new
        self._sink = sink
        self._effort = _EFFORTS[header.profile]
        self._self_effort = "smallest" if header.profile is Profile.SMALL else "fast"
        self._notes = _Notes(regions)
        self._result_offset = 0
        self.stats = DeltaStats(header)
        packed = header.pack()
        self._header_crc = int.from_bytes(packed[-4:], "little")
        self._put(packed)
        # Whatever reads the new file a second time must see what was hashed.
        self._digest = hashlib.sha256()

    def write(self, plan: SegmentPlan) -> None:
        """Encode one segment, check it by decoding it, and write it."""
        result = _read(self._new, plan.result_offset, plan.length)
        window = read_window(self._base, plan.window_offset, plan.window_length)
        self._digest.update(result)
        best = min(self._candidates(plan, result, window), key=lambda encoded: len(encoded.body))
        segment = SegmentHeader(
            best.codec,
            best.parameter_length,
            len(result),
            best.window_offset,
            best.window_length,
            len(best.body) - best.parameter_length,
            segment_digest(result),
            zlib.crc32(best.body),
        )
        # The check is against what was hashed, so a wrong encoder can never write a wrong file.
        decode_segment(
            segment, best.body, _Window(self._base.length, plan.window_offset, window), self.stats.header
        )
        self._notes.add(plan, result, window, is_copy=best.codec is Codec.COPY)
        self._put(segment.pack(self._position()) + best.body)
        self._result_offset += len(result)
        self.stats.segments[best.codec] += 1
        self.stats.patch_bytes[best.codec] += RECORD_BYTES + len(best.body)
        self.stats.result_bytes[best.codec] += len(result)

    def finish(self) -> DeltaStats:
        """Write what comes after the last segment."""
        if self._digest.digest() != self.stats.header.result_sha256:
            raise ModelFileError("the new file changed while it was read")
        note = self._notes.pack()
        if note:
            record = SegmentHeader(
                Codec.NOTES, 0, 0, 0, 0, len(note), bytes(SEGMENT_DIGEST_BYTES), zlib.crc32(note)
            )
            self._put(record.pack(self._position()) + note)
            self.stats.patch_bytes[Codec.NOTES] += RECORD_BYTES + len(note)
        end = EndRecord(
            self.stats.segments.total(),
            self._result_offset,
            self.stats.patch_length + RECORD_BYTES,
            self.stats.header.result_sha256[:SEGMENT_DIGEST_BYTES],
        )
        self._put(end.pack(self._position()))
        self.stats.patch_bytes[Codec.END] = HEADER_BYTES + RECORD_BYTES
        return self.stats

    def _put(self, data: bytes) -> None:
        self._sink.write(data)
        self.stats.patch_length += len(data)

    def _position(self) -> Position:
        return Position(self._header_crc, self.stats.patch_length, self._result_offset)

    def _candidates(self, plan: SegmentPlan, result: bytes, window: bytes) -> Iterable[_Encoded]:
        at = _find_copy(plan, result, window)
        if at is not None:
            return [_Encoded(Codec.COPY, b"", 0, plan.window_offset + at, len(result))]
        found = [_Encoded(Codec.RAW, result)]
        if plan.runs:
            found.append(self._tensor(plan, result, window))
            if len(found[-1].body) > _POOR_RATIO * len(result):
                found.append(_Encoded(Codec.SELF, compress(result, self._self_effort)))
        else:
            found.append(_Encoded(Codec.SELF, compress(result, self._self_effort)))
            if window and _is_alike(result, window):
                body = encode_bsdiff(result, window, self._effort)
                found.append(_Encoded(Codec.BSDIFF, body, 0, plan.window_offset, len(window)))
        return found

    def _tensor(self, plan: SegmentPlan, result: bytes, window: bytes) -> _Encoded:
        runs = with_gains(plan.runs, result, window)
        parameters = write_runs(runs)
        assert len(parameters) <= PARAMETER_BYTES_MAX
        body = parameters + encode_tensor(result, window, runs, self._effort)
        return _Encoded(Codec.TENSOR, body, len(parameters), plan.window_offset, len(window))


class _Window(BytesSource):
    """The part of the base that was already read, at its place."""

    def __init__(self, length: int, offset: int, data: bytes) -> None:
        super().__init__(data)
        self._length = length
        self._offset = offset

    @property
    def length(self) -> int:
        return self._length

    def read_at(self, offset: int, length: int) -> bytes:
        return super().read_at(offset - self._offset, length)


def _find_copy(plan: SegmentPlan, result: bytes, window: bytes) -> int | None:
    """Return where in the window the whole result stands, or None."""
    if not plan.runs:
        at = window.find(result)
        return at if at >= 0 else None
    expected = first = plan.runs[0].base_offset
    if expected is None or first is None:
        return None
    for run in plan.runs:
        if run.base_offset != expected:
            return None
        expected += run.length
    return first if window[first:expected] == result else None


def _is_alike(result: bytes, window: bytes) -> bool:
    """Tell whether bsdiff may find anything: in a sample, does knowing the base help zstd, or do bytes stand still?"""
    ours, theirs = result[:_SAMPLE_BYTES], window[: 2 * _SAMPLE_BYTES]
    alone = len(compress(ours, "fast"))
    together = len(compress(theirs + ours, "fast")) - len(compress(theirs, "fast"))
    if together < 0.95 * alone:
        return True
    size = min(len(result), len(window))
    still = np.count_nonzero(np.frombuffer(result, np.uint8, size) == np.frombuffer(window, np.uint8, size))
    return bool(still > size // 16)


class _Notes:
    """Names of the tensors that changed, for `whimbrel delta inspect`; devices skip them."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._tensors = [region for region in regions if region.name and region.layout is not Layout.RAW]
        self._next = 0
        self._changed: dict[int, int | None] = {}

    def add(self, plan: SegmentPlan, result: bytes, window: bytes, *, is_copy: bool) -> None:
        """Count changed bytes of the tensors in a segment; None marks a tensor without a base."""
        if is_copy:
            return
        position = 0
        for run in plan.runs:
            offset = plan.result_offset + position
            while self._next < len(self._tensors) and self._tensors[self._next].end <= offset:
                self._next += 1
            if self._next < len(self._tensors) and self._tensors[self._next].offset <= offset:
                new = result[position : position + run.length]
                if run.base_offset is None:
                    self._changed[self._next] = None
                else:
                    self._count(new, window[run.base_offset : run.base_offset + run.length])
            position += run.length

    def _count(self, new: bytes, old: bytes) -> None:
        changed = int(np.count_nonzero(np.frombuffer(new, np.uint8) != np.frombuffer(old, np.uint8)))
        before = self._changed.get(self._next, 0)
        if changed and before is not None:
            self._changed[self._next] = before + changed

    def pack(self) -> bytes:
        """Return the record's payload, or nothing where there is nothing to say or it would be too long."""
        tensors = [
            [self._tensors[i].name, self._tensors[i].layout.value, self._tensors[i].length, changed]
            for i, changed in sorted(self._changed.items())
        ]
        if not tensors:
            return b""
        text = json.dumps({"tensors": tensors}, separators=(",", ":"), ensure_ascii=False).encode()
        packed = compress(text, "smallest")
        return packed if len(packed) <= NOTES_BYTES_MAX else b""
