"""The writer: two files in, a delta file out, through bounded windows. What is in the file is the business of `chains`."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from protocol.constants import BLOB_BYTES_MAX
from protocol.delta.chains import (
    ChainJob,
    ChainResult,
    encode_chain,
    read_exactly,
    split_chains,
    tall_choices,
)
from protocol.delta.context import is_fast
from protocol.delta.format import (
    DEFAULT_SEGMENT_BYTES,
    END_BYTES,
    REACH_BYTES_MAX,
    SEGMENT_BYTES_MAX,
    WITHOUT_RESULT,
    Codec,
    EndRecord,
    Header,
    Position,
    Profile,
    Reach,
    SegmentHeader,
    joined_checksum,
    segment_memory_bytes,
)
from protocol.delta.matching import match_regions
from protocol.delta.notes import Notes
from protocol.delta.planner import Planner, SegmentPlan, confine
from protocol.delta.tensor import working_bytes
from protocol.errors import ModelFileError, PatchLimitError
from protocol.tensors import map_regions
from protocol.tensors.regions import ReadAt, Region

_READ_BYTES = 1 << 20


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


def make_delta(
    base: ReadAt,
    new: ReadAt,
    sink: Sink,
    *,
    maps: tuple[Sequence[Region], Sequence[Region]] | None = None,
    profile: Profile = Profile.SMALL,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    is_portable: bool | None = None,
    in_place: bool | None = False,
    progress: Callable[[int, int], None] | None = None,
    encode_chains: Callable[[Iterable[ChainJob]], Iterable[ChainResult]] | None = None,
) -> DeltaStats:
    """Write to `sink` the delta file that turns `base` into `new`.

    Any two files will do; those whose tensors are understood give small deltas. The same input gives the same output.
    Memory does not depend on the length of the files.

    Args:
        base: What devices have.
        new: What they shall have.
        sink: Takes the file's bytes in order.
        maps: Of base and new file, where files beside them say more about their tensors than they do (`map_files`); by default
            each file's own. They decide how small the delta is, never what it gives back.
        profile: Fewest bytes, or most speed.
        segment_bytes: Result of one segment: decides the device's memory and what a power cut costs.
        is_portable: Use only codecs that are fast without the library, for devices that have no wheel of their own; larger by
            half. None means: if this machine has no library either.
        in_place: Make it so that it can be applied in place, too: nothing is made from bytes of the base that lie far behind. Costs
            nothing where the layouts are alike, and much where tensors have changed places. None means: if it costs nothing.
        progress: Called with bytes of the result done and in all.
        encode_chains: Turns jobs into their results, in order; by default one after the other, here. A caller with processes
            hands them out and calls `chains.encode_chain` there.

    Raises:
        PatchLimitError: A file or `segment_bytes` is beyond the format's limits.
        ModelFileError: A file changed while it was read, or a map does not cover its file.
    """
    if not 1024 <= segment_bytes <= SEGMENT_BYTES_MAX:
        raise PatchLimitError(
            f"segments of {segment_bytes} bytes are not between 1024 and {SEGMENT_BYTES_MAX}"
        )
    if max(base.length, new.length) > BLOB_BYTES_MAX:
        raise PatchLimitError(f"a file has more than {BLOB_BYTES_MAX} bytes")
    base_regions, new_regions = maps or (map_regions(base), map_regions(new))
    _check_map(base_regions, base)
    _check_map(new_regions, new)
    matches = match_regions(base_regions, new_regions, base, new)
    plans = list(Planner(base, new, segment_bytes, base_regions).plan(new_regions, matches))
    if in_place is not False:
        confined = [confine(plan, REACH_BYTES_MAX) for plan in plans]
        in_place = in_place or confined == plans
        plans = confined if in_place else plans
    header = Header(
        profile,
        base.length,
        _sha256(base),
        new.length,
        _sha256(new),
        max((_plan_memory_bytes(plan) for plan in plans), default=0),
        segment_bytes,
        _reach(plans) if in_place else None,
    )
    is_portable = not is_fast() if is_portable is None else is_portable
    choices = {} if is_portable else tall_choices(base, new, header, new_regions, matches)
    jobs = (
        ChainJob(chain, header, tuple(new_regions), tuple(matches), choices, is_portable)
        for chain in split_chains(plans)
    )
    results = encode_chains(jobs) if encode_chains else (encode_chain(base, new, job) for job in jobs)
    file = _File(sink, header, Notes(new_regions, matches))
    for result in results:
        for segment, body in result.records:
            file.put(segment, body)
        file.notes.merge(result.changed)
        if progress:
            progress(file.result_offset, new.length)
    return file.finish()


def _check_map(regions: Sequence[Region], source: ReadAt) -> None:
    """A gap would be missing from the result, and only a device would notice."""
    position = 0
    for region in regions:
        if region.offset != position or region.length < 1:
            break
        position = region.end
    else:
        if position == source.length:
            return
    raise ModelFileError(
        f"a map of tensors covers {position} of {source.length} bytes", hint="map the file as it is now"
    )


def _plan_memory_bytes(plan: SegmentPlan) -> int:
    """The most that any rung may need; a body longer than the result would be sent raw."""
    if not plan.runs:
        return segment_memory_bytes(Codec.BSDIFF, plan.length, plan.window_length, plan.length)
    return max(
        segment_memory_bytes(Codec.CONTEXT, plan.length, plan.window_length, plan.length),
        segment_memory_bytes(
            Codec.TENSOR, plan.length, plan.window_length, plan.length, working_bytes(plan.runs)
        ),
    )


def _reach(plans: Iterable[SegmentPlan]) -> Reach:
    behind = ahead = 0
    for plan in plans:
        if plan.window_length:
            behind = max(behind, plan.result_offset - plan.window_offset)
            ahead = max(ahead, plan.window_offset + plan.window_length - plan.result_offset - plan.length)
    return Reach(behind, min(ahead, REACH_BYTES_MAX))


def _sha256(source: ReadAt) -> bytes:
    digest = hashlib.sha256()
    for offset in range(0, source.length, _READ_BYTES):
        digest.update(read_exactly(source, offset, min(_READ_BYTES, source.length - offset)))
    return digest.digest()


class _File:
    """Writes header, records, notes and end record, and keeps count."""

    def __init__(self, sink: Sink, header: Header, notes: Notes) -> None:
        self._sink = sink
        self.notes = notes
        self._offset = 0  # of the result, up to the last record that was written
        self._copy: SegmentHeader | None = None
        self.stats = DeltaStats(header)
        packed = header.pack()
        self._header_crc = int.from_bytes(packed[-4:], "little")
        self._write(packed)
        self.stats.patch_bytes[Codec.END] += len(packed)

    @property
    def result_offset(self) -> int:
        """Bytes of the result that were taken."""
        return self._offset + (self._copy.result_length if self._copy else 0)

    def put(self, segment: SegmentHeader, body: bytes) -> None:
        """Take the next record. A copy is written once it is known that the next one does not go on with it."""
        if self._copy is not None and _goes_on(segment, self._copy):
            self._copy = replace(
                self._copy,
                result_length=self._copy.result_length + segment.result_length,
                window_length=self._copy.window_length + segment.window_length,
                checksum=joined_checksum(self._copy.checksum, segment.checksum, segment.result_length),
            )
            return
        self._flush()
        if segment.codec is Codec.COPY:
            self._copy = segment
        else:
            self._put(segment, body)

    def _flush(self) -> None:
        if self._copy is not None:
            self._put(self._copy, b"")
            self._copy = None

    def _put(self, segment: SegmentHeader, body: bytes) -> None:
        record = segment.pack(self._position()) + body
        self._write(record)
        self._offset += segment.result_length
        if segment.codec not in WITHOUT_RESULT:
            self.stats.segments[segment.codec] += 1
        self.stats.patch_bytes[segment.codec] += len(record)
        self.stats.result_bytes[segment.codec] += segment.result_length

    def finish(self) -> DeltaStats:
        """Write what comes after the last segment."""
        self._flush()
        note = self.notes.pack()
        if note:
            self._put(SegmentHeader(Codec.NOTES, 0, 0, 0, 0, len(note), b"", zlib.crc32(note)), note)
        self._write(EndRecord().pack(self._position()))
        self.stats.patch_bytes[Codec.END] += END_BYTES
        return self.stats

    def _write(self, data: bytes) -> None:
        self._sink.write(data)
        self.stats.patch_length += len(data)

    def _position(self) -> Position:
        return Position(self._header_crc, self.stats.patch_length, self._offset)


def _goes_on(segment: SegmentHeader, copy: SegmentHeader) -> bool:
    end = copy.window_offset + copy.window_length
    return segment.codec is Codec.COPY and segment.window_offset == end
