"""A chain: segments that are coded one after the other, each with what the ones before have taught.

Chains know nothing of each other, so they can be written side by side. Within a chain each segment is encoded with every
rung of the ladder that may win, the smallest is kept, and it is decoded again: a delta that was written can be applied.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from protocol.constants import BLOB_BYTES_MAX
from protocol.delta.bsdiff import encode_bsdiff, read_instructions
from protocol.delta.codecs import (
    decode_segment,
    read_tables,
    read_window,
    segment_checksum,
    segment_digest,
)
from protocol.delta.compression import compress
from protocol.delta.context import ContextModel
from protocol.delta.format import (
    PARAMETER_BYTES_MAX,
    SEGMENT_DIGEST_BYTES,
    WITH_DIGEST,
    Codec,
    Header,
    Profile,
    Reach,
    SegmentHeader,
)
from protocol.delta.gain import with_gains
from protocol.delta.layouts import LAYOUT_BY_NUMBER, BlockLayout
from protocol.delta.matching import Match
from protocol.delta.modelling import Choice, Modeller
from protocol.delta.notes import Notes
from protocol.delta.planner import SegmentPlan, separate
from protocol.delta.runs import write_context_runs
from protocol.delta.splitting import split
from protocol.delta.tensor import encode_tensor, write_runs
from protocol.errors import ModelFileError
from protocol.tensors.regions import BytesSource, ReadAt, Region

CHAIN_BYTES = 32 << 20
"""Result of a chain, about: a new one forgets what was learned, which costs some kilobytes; work is shared by whole chains."""

_EFFORTS = {Profile.FAST: "fast", Profile.SMALL: "small"}
_SELF_EFFORTS = {Profile.FAST: "fast", Profile.SMALL: "smallest"}
# A tensor segment that is hardly smaller than its result is tried without the base, too.
_POOR_RATIO = 0.8
_SAMPLE_BYTES = 64 << 10
_PROBES, _PROBE_BYTES = 64, 32
_RECORD_BYTES = 14
"""Of a segment without digest, about."""

_ANYWHERE = Reach(BLOB_BYTES_MAX, BLOB_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class ChainJob:
    """All that it takes to write one chain, beside the two files.

    Attributes:
        plans: Its segments.
        header: Of the delta file.
        regions: The new file's map.
        matches: For each region its counterpart.
        choices: How tall tensors are modelled; what is missing is decided on the spot.
        is_portable: Only codecs that are fast without the library.
    """

    plans: tuple[SegmentPlan, ...]
    header: Header
    regions: tuple[Region, ...]
    matches: tuple[Match, ...]
    choices: Mapping[int, Choice] = field(default_factory=dict)
    is_portable: bool = False


@dataclass(frozen=True, slots=True)
class ChainResult:
    """A chain, ready to be written.

    Attributes:
        records: Headers and bodies, in order.
        changed: Changed bytes of each tensor, by its index in the map.
    """

    records: list[tuple[SegmentHeader, bytes]]
    changed: dict[int, int]


def split_chains(plans: Iterable[SegmentPlan]) -> Iterator[tuple[SegmentPlan, ...]]:
    """Cut plans into chains of about `CHAIN_BYTES`."""
    chain: list[SegmentPlan] = []
    length = 0
    for plan in plans:
        if length >= CHAIN_BYTES:
            yield tuple(chain)
            chain, length = [], 0
        chain.append(plan)
        length += plan.length
    if chain:
        yield tuple(chain)


def encode_chain(base: ReadAt, new: ReadAt, job: ChainJob) -> ChainResult:
    """Return the records of a chain, each decoded once.

    Raises:
        ModelFileError: A file became shorter while it was read.
    """
    return _Chain(base, new, job).encode()


def read_exactly(source: ReadAt, offset: int, length: int) -> bytes:
    """Return bytes of a file that is being turned into a delta.

    Raises:
        ModelFileError: It has become shorter.
    """
    data = source.read_at(offset, length)
    if len(data) != length:
        raise ModelFileError("a file became shorter while it was read")
    return data


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One rung's answer."""

    codec: Codec
    body: bytes
    length: int  # of the result
    parameter_length: int = 0
    window_offset: int = 0
    window_length: int = 0

    @property
    def size(self) -> int:
        """Bytes in the delta file, about."""
        return len(self.body) + _RECORD_BYTES + (SEGMENT_DIGEST_BYTES if self.codec in WITH_DIGEST else 0)


def _size(parts: Iterable[_Encoded]) -> int:
    return sum(part.size for part in parts)


class _Chain:
    def __init__(self, base: ReadAt, new: ReadAt, job: ChainJob) -> None:
        self._base = base
        self._new = new
        self._job = job
        profile = job.header.profile
        self._effort, self._self_effort = _EFFORTS[profile], _SELF_EFFORTS[profile]
        self._modeller = Modeller(base, new, job.regions, job.matches, profile, job.choices)
        self._model, self._check = ContextModel(), ContextModel()
        self._notes = Notes(job.regions, job.matches)
        self._records: list[tuple[SegmentHeader, bytes]] = []
        self._has_model = False
        self._not_in_planes: set[int] = set()

    def encode(self) -> ChainResult:
        for plan in self._job.plans:
            for part in self._parts_of(plan):
                self._write(part)
        return ChainResult(self._records, self._notes.changed)

    def _parts_of(self, plan: SegmentPlan) -> list[SegmentPlan]:
        """Cut a plan where several tensors have bases: a tables record brings one for whole segments."""
        if self._job.is_portable:
            return [plan]
        apart = [
            index
            for index, place in enumerate(plan.places)
            if place is not None and self._modeller.choice(place.tensor).basis is not None
        ]
        return separate(plan, apart) if len(apart) > 1 else [plan]

    def _write(self, plan: SegmentPlan) -> None:
        result = read_exactly(self._new, plan.result_offset, plan.length)
        window = read_window(self._base, plan.window_offset, plan.window_length)
        continues = self._has_model
        before = self._model.snapshot()
        best = self._best(plan, result, window)
        codecs = {part.codec for part in best}
        if Codec.CONTEXT in codecs:
            self._has_model = True
        else:
            self._model.rewind(before)
        # The check is against what was hashed, so a wrong encoder can never write a wrong file.
        source = _Window(self._base.length, plan.window_offset, window)
        position = 0
        for part in best:
            expected = result[position : position + part.length]
            self._put(part, expected, source, continues=continues and part.codec is Codec.CONTEXT)
            position += part.length
        assert position == len(result)
        self._notes.add(plan, result, window, is_copy=codecs == {Codec.COPY})

    def _put(self, part: _Encoded, result: bytes, source: ReadAt, *, continues: bool) -> None:
        segment = SegmentHeader(
            part.codec,
            part.parameter_length,
            part.length,
            part.window_offset,
            part.window_length,
            len(part.body) - part.parameter_length,
            segment_digest(part.codec, result),
            segment_checksum(part.codec, result, part.body),
            continues,
        )
        if part.codec is Codec.COPY:
            decoded = source.read_at(part.window_offset, part.window_length)
        else:
            decoded = decode_segment(segment, part.body, source, self._job.header, self._check)
        assert decoded == result, f"a {part.codec.name} segment does not give what was encoded"
        self._records.append((segment, part.body))

    def _best(self, plan: SegmentPlan, result: bytes, window: bytes) -> list[_Encoded]:
        """Return the smallest that gives a segment's result, part by part."""
        at = _find_copy(plan, result, window)
        if at is not None:
            return [_Encoded(Codec.COPY, b"", len(result), 0, plan.window_offset + at, len(result))]
        found = self._candidates(plan, result, window)
        best = [min(found, key=lambda encoded: encoded.size)]
        if plan.runs or found[-1].codec is not Codec.BSDIFF:
            return best
        parts = self._parts(plan, result, window, read_instructions(found[-1].body, len(result)))
        return min(best, parts, key=_size) if parts else best

    def _parts(
        self, plan: SegmentPlan, result: bytes, window: bytes, instructions: list[tuple[int, int, int]]
    ) -> list[_Encoded]:
        """Return copies and the bytes between; nothing if that would be too many."""
        reach = self._job.header.reach or _ANYWHERE
        ahead = plan.window_offset - plan.result_offset
        moved = (-reach.behind_bytes - ahead, reach.ahead_bytes - ahead)
        parts: list[_Encoded] = []
        for stretch in split(result, window, instructions, moved):
            data = result[stretch.start : stretch.start + stretch.length]
            if stretch.window_start is None:
                packed = _Encoded(Codec.SELF, compress(data, self._self_effort), len(data))
                parts.append(min(_Encoded(Codec.RAW, data, len(data)), packed, key=lambda part: part.size))
            else:
                at = plan.window_offset + stretch.window_start
                parts.append(_Encoded(Codec.COPY, b"", len(data), 0, at, len(data)))
        return parts

    def _candidates(self, plan: SegmentPlan, result: bytes, window: bytes) -> list[_Encoded]:
        found = [_Encoded(Codec.RAW, result, len(result))]
        if plan.runs:
            encode = self._tensor if self._job.is_portable else self._context
            found.append(encode(plan, result, window))
            is_poor = len(found[-1].body) > _POOR_RATIO * len(result)
            if is_poor:
                found.append(_Encoded(Codec.SELF, compress(result, self._self_effort), len(result)))
            if encode != self._tensor:
                found += self._in_planes(plan, result, window, found, is_poor=is_poor)
        else:
            found.append(_Encoded(Codec.SELF, compress(result, self._self_effort), len(result)))
            if window and _is_alike(result, window):
                body = encode_bsdiff(result, window, self._effort)
                found.append(_Encoded(Codec.BSDIFF, body, len(result), 0, plan.window_offset, len(window)))
        return found

    def _in_planes(
        self, plan: SegmentPlan, result: bytes, window: bytes, others: Sequence[_Encoded], *, is_poor: bool
    ) -> list[_Encoded]:
        """Try planes where they are sometimes better: what shares nothing with the base, words, codes below each other.

        A tensor for which they were not is not tried again.
        """
        tensor = _ruling_tensor(plan)
        if not is_poor and (tensor is None or tensor in self._not_in_planes):
            return []
        planes = self._tensor(plan, result, window)
        if tensor is not None and planes.size > min(other.size for other in others):
            self._not_in_planes.add(tensor)
        return [planes]

    def _context(self, plan: SegmentPlan, result: bytes, window: bytes) -> _Encoded:
        runs = self._modeller.runs(plan, result, window)
        for basis in dict.fromkeys(run.basis for run in runs if run.basis):
            self._write_tables(basis.pack())
        if not self._has_model:
            self._model.reset()
        parameters = write_context_runs(runs)
        assert len(parameters) <= PARAMETER_BYTES_MAX
        body = parameters + self._model.encode(runs, window, result)
        return _Encoded(Codec.CONTEXT, body, len(result), len(parameters), plan.window_offset, len(window))

    def _write_tables(self, content: bytes) -> None:
        """Send a basis, unless it is the one that was sent last."""
        if self._check.basis is not None and self._check.basis.pack() == content:
            return
        body = compress(content, "smallest")
        record = SegmentHeader(Codec.TABLES, 0, 0, 0, 0, len(body), b"", zlib.crc32(body))
        self._check.basis = self._model.basis = read_tables(record, body)
        self._records.append((record, body))

    def _tensor(self, plan: SegmentPlan, result: bytes, window: bytes) -> _Encoded:
        runs = with_gains(plan.runs, result, window)
        parameters = write_runs(runs)
        assert len(parameters) <= PARAMETER_BYTES_MAX
        body = parameters + encode_tensor(result, window, runs, self._effort)
        return _Encoded(Codec.TENSOR, body, len(result), len(parameters), plan.window_offset, len(window))


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


def _ruling_tensor(plan: SegmentPlan) -> int | None:
    """Return the tensor with the longest run, if most of the segment is words, or codes that lie below each other."""
    lengths = [run.length if _is_of_planes(LAYOUT_BY_NUMBER[run.layout]) else 0 for run in plan.runs]
    if 2 * sum(lengths) < plan.length:
        return None
    place = plan.places[lengths.index(max(lengths))]
    return place.tensor if place else None


def _is_of_planes(layout: BlockLayout) -> bool:
    return layout.is_column or layout.codes.width > 8


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
    """Tell whether bsdiff may find anything: do pieces stand in the base, do bytes stand still, does knowing the base help zstd?"""
    steps = range(0, max(1, len(result) - _PROBE_BYTES), max(1, len(result) // _PROBES))
    if any(window.find(result[at : at + _PROBE_BYTES]) >= 0 for at in steps):
        return True
    size = min(len(result), len(window))
    still = np.count_nonzero(np.frombuffer(result, np.uint8, size) == np.frombuffer(window, np.uint8, size))
    if still > size // 16:
        return True
    ours, theirs = result[:_SAMPLE_BYTES], window[: 2 * _SAMPLE_BYTES]
    alone = len(compress(ours, "fast"))
    together = len(compress(theirs + ours, "fast")) - len(compress(theirs, "fast"))
    return together < 0.95 * alone


def tall_choices(
    base: ReadAt, new: ReadAt, header: Header, regions: Sequence[Region], matches: Sequence[Match]
) -> dict[int, Choice]:
    """Return how tall tensors are modelled; they may span chains, and deciding takes a look at all of them."""
    modeller = Modeller(base, new, regions, matches, header.profile)
    return {index: modeller.choice(index) for index in modeller.tall_tensors()}
