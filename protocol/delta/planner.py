"""From two tensor maps to the list of segments, before a byte is encoded.

A plan says what belongs together and where its base lies; which rung of the ladder wins is the writer's business. Small
tensors share a segment, large ones are cut at block borders, and what has no tensor layout is cut out by itself.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from protocol.delta.anchors import Anchors
from protocol.delta.layouts import LAYOUTS, BlockLayout
from protocol.delta.matching import Match
from protocol.delta.tensor import RUNS_MAX, Run
from protocol.tensors.regions import Layout, ReadAt, Region

RAW_RUN_BYTES_MAX = 4096
"""Raw bytes between tensors ride along in their segment up to this length: padding, protobuf glue."""

RAW_SLACK_BYTES = 128 << 10
"""How much further than its own length a raw segment may look to either side in the base."""

_ROWS_MIN = 8
"""Segments end with a row where at least that many rows fit into one."""

_RUNS_PER_PLAN = RUNS_MAX // 2
_COMPARE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where in its tensor a run lies, so that a coder knows the row and the column of every code.

    The run starts the tensor where `first_block` is 0. Code `i` of the run is code `first_block * codes in a block + i` of
    the tensor; divided by `row_codes` that gives its row, the remainder its column.

    Attributes:
        tensor: Tells tensors apart: the index of the region in the new file's map.
        row_codes: Codes in one row; the whole tensor's where rows are not whole blocks, or where there is only one. Where a
            block lies in one column (`BlockLayout.is_column`), codes in one row of blocks.
        first_block: Index of the run's first block within the tensor.
        tensor_blocks: Blocks of the whole tensor, in the new file.
    """

    tensor: int
    row_codes: int
    first_block: int
    tensor_blocks: int


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """One segment to be encoded.

    Attributes:
        result_offset: Where its result starts.
        length: Of the result, in bytes.
        window_offset: Where its base window starts.
        window_length: Of the base window.
        runs: For the tensor codec; empty for bytes without tensor layout.
        places: For each run where in its tensor it lies; None for bytes between tensors.
    """

    result_offset: int
    length: int
    window_offset: int
    window_length: int
    runs: tuple[Run, ...] = ()
    places: tuple[TensorPlace | None, ...] = ()


@dataclass(slots=True)
class _Open:
    """The tensor segment under construction; base offsets are absolute until it is closed."""

    start: int = 0
    length: int = 0
    low: int = 0
    high: int = 0
    runs: list[Run] = field(default_factory=list)
    places: list[TensorPlace | None] = field(default_factory=list)

    def spans(self, base_offset: int | None, length: int) -> int:
        """Return the length of the base window if a run was added."""
        if base_offset is None or not self.high:
            return self.high - self.low if base_offset is None else length
        return max(self.high, base_offset + length) - min(self.low, base_offset)

    def add(self, run: Run, place: TensorPlace | None) -> None:
        if run.base_offset is not None:
            self.low = min(self.low, run.base_offset) if self.high else run.base_offset
            self.high = max(self.high, run.base_offset + run.length)
        self.runs.append(run)
        self.places.append(place)
        self.length += run.length

    def close(self) -> SegmentPlan:
        runs = tuple(
            Run(run.layout, run.blocks, None if run.base_offset is None else run.base_offset - self.low)
            for run in self.runs
        )
        return SegmentPlan(self.start, self.length, self.low, self.high - self.low, runs, tuple(self.places))


class Planner:
    """Cuts a new file into segments.

    Args:
        base: The base, looked at only where bytes without tensor layout are compared.
        new: The new file, likewise.
        segment_bytes: No segment's result is longer.
        base_regions: The base's map.
    """

    def __init__(
        self, base: ReadAt, new: ReadAt, segment_bytes: int, base_regions: Sequence[Region] = ()
    ) -> None:
        self._base = base
        self._anchors = Anchors(base, base_regions)
        self._new = new
        self._segment_bytes = segment_bytes
        self._open = _Open()

    def plan(self, regions: Sequence[Region], matches: Sequence[Match]) -> Iterator[SegmentPlan]:
        """Yield segments in the order of the result.

        Args:
            regions: The new file's map.
            matches: For each region its counterpart in the base.
        """
        for index, (region, match) in enumerate(zip(regions, matches, strict=True)):
            if region.layout is Layout.RAW and region.length > RAW_RUN_BYTES_MAX:
                yield from self._flush(region.offset)
                yield from self._plan_raw(region, match.base)
            else:
                yield from self._plan_tensor(index, region, match.base)
        yield from self._flush(0)

    def _flush(self, next_offset: int) -> Iterator[SegmentPlan]:
        if self._open.runs:
            yield self._open.close()
        self._open = _Open(start=next_offset)

    def _plan_tensor(self, index: int, region: Region, match: Region | None) -> Iterator[SegmentPlan]:
        layout = LAYOUTS[region.layout]
        based = min(region.length, match.length) if match else 0
        if region.layout is Layout.RAW and match and match.length != region.length:
            based = 0  # glue that changed its length has moved inside
        position = region.offset
        while position < region.end:
            inside = position - region.offset
            base_offset = match.offset + inside if match and inside < based else None
            until = based if base_offset is not None else region.length
            length = self._run_length(region, inside, until)
            is_too_wide = self._open.spans(base_offset, length) > 2 * self._segment_bytes
            if length <= 0 or is_too_wide or len(self._open.runs) >= _RUNS_PER_PLAN:
                yield from self._flush(position)
                continue
            if not self._open.runs:
                self._open.start = position
            place = _place(index, region, layout, inside)
            self._open.add(Run(layout.number, length // layout.block_bytes, base_offset), place)
            position += length

    def _run_length(self, region: Region, inside: int, until: int) -> int:
        """Return how much of a tensor the open segment takes, 0 for nothing; it ends with a row where it can.

        A coder that keeps statistics of rows and columns then starts with a whole row in every segment.
        """
        block_bytes = LAYOUTS[region.layout].block_bytes
        room = self._segment_bytes - self._open.length
        if until - inside <= room:
            return until - inside
        end = (inside + room) // block_bytes * block_bytes
        row_bytes = region.row_bytes
        # Whole rows leave up to a row of each segment empty: more segments, unless rows are short.
        if block_bytes <= row_bytes <= self._segment_bytes // _ROWS_MIN and row_bytes % block_bytes == 0:
            end = (inside + room) // row_bytes * row_bytes
        return max(0, end - inside)

    def _plan_raw(self, region: Region, match: Region | None) -> Iterator[SegmentPlan]:
        """Cut a raw region: what is equal at both ends first, so that a change in the middle costs only itself."""
        old = match or Region("", Layout.RAW, min(region.offset, self._base.length), 0)
        head = self._common_prefix(region, old)
        tail = self._common_suffix(region, old, min(region.length, old.length) - head)
        yield from self._cut(region.offset, head, old.offset, old.offset + head, slack=0)
        middle_end = region.end - tail
        yield from self._cut(
            region.offset + head,
            middle_end - region.offset - head,
            old.offset + head,
            old.end - tail,
            RAW_SLACK_BYTES,
        )
        yield from self._cut(middle_end, tail, old.end - tail, old.end, slack=0)

    def _cut(
        self, start: int, length: int, base_start: int, base_end: int, slack: int
    ) -> Iterator[SegmentPlan]:
        for inside in range(0, length, self._segment_bytes):
            piece = min(self._segment_bytes, length - inside)
            # The window follows at the same distance from the start; near the end it keeps to the base's end.
            at = min(base_start + inside, max(base_start, base_end - piece))
            if slack:
                moved_to = self._anchors.locate(self._new.read_at(start + inside, piece))
                at = at if moved_to is None else moved_to
            low = min(max(0, at - slack), self._base.length)
            high = max(low, min(self._base.length, at + piece + slack))
            yield SegmentPlan(start + inside, piece, low, high - low)

    def _common_prefix(self, region: Region, old: Region) -> int:
        limit = min(region.length, old.length)
        for inside in range(0, limit, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, limit - inside)
            ours = self._new.read_at(region.offset + inside, size)
            theirs = self._base.read_at(old.offset + inside, size)
            if ours != theirs:
                return inside + next(i for i in range(size) if ours[i] != theirs[i])
        return limit

    def _common_suffix(self, region: Region, old: Region, limit: int) -> int:
        for inside in range(0, limit, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, limit - inside)
            ours = self._new.read_at(region.end - inside - size, size)
            theirs = self._base.read_at(old.end - inside - size, size)
            if ours != theirs:
                return inside + next(i for i in range(size) if ours[-1 - i] != theirs[-1 - i])
        return limit


def confine(plan: SegmentPlan, reach_bytes: int) -> SegmentPlan:
    """Return the plan without what of its base lies more than `reach_bytes` before its result (SPEC 6.12)."""
    limit = plan.result_offset - reach_bytes
    if plan.window_offset >= limit or not plan.window_length:
        return plan
    end = plan.window_offset + plan.window_length
    if not plan.runs:
        low = min(limit, end)
        return replace(plan, window_offset=low, window_length=end - low)
    kept = [
        run
        if run.base_offset is not None and plan.window_offset + run.base_offset >= limit
        else Run(run.layout, run.blocks, None)
        for run in plan.runs
    ]
    starts = [run.base_offset for run in kept if run.base_offset is not None]
    if not starts:
        return replace(plan, window_offset=0, window_length=0, runs=tuple(kept))
    first = min(starts)
    last = max(run.base_offset + run.length for run in kept if run.base_offset is not None)
    moved = (
        run if run.base_offset is None else Run(run.layout, run.blocks, run.base_offset - first)
        for run in kept
    )
    return replace(
        plan, window_offset=plan.window_offset + first, window_length=last - first, runs=tuple(moved)
    )


def separate(plan: SegmentPlan, apart: Collection[int]) -> list[SegmentPlan]:
    """Cut a plan so that some of its runs are in different segments.

    Args:
        plan: With runs.
        apart: Which runs, by index: no two of them may share a segment.

    Returns:
        The parts in order; the plan itself if a part would reach further in the base than the plan does (SPEC 6.12).
    """
    parts: list[SegmentPlan] = []
    current, is_taken = _Open(plan.result_offset), False
    for index, (run, place) in enumerate(zip(plan.runs, plan.places, strict=True)):
        if is_taken and index in apart:
            parts.append(current.close())
            current, is_taken = _Open(current.start + current.length), False
        is_taken = is_taken or index in apart
        offset = None if run.base_offset is None else plan.window_offset + run.base_offset
        current.add(replace(run, base_offset=offset), place)
    parts.append(current.close())
    is_near = all(
        _behind(each) <= _behind(plan) and _ahead(each) <= _ahead(plan)
        for each in parts
        if each.window_length
    )
    return parts if is_near else [plan]


def _behind(plan: SegmentPlan) -> int:
    return plan.result_offset - plan.window_offset


def _ahead(plan: SegmentPlan) -> int:
    return plan.window_offset + plan.window_length - plan.result_offset - plan.length


def _place(index: int, region: Region, layout: BlockLayout, inside: int) -> TensorPlace | None:
    """Return where the run that starts `inside` bytes into the region lies; None for what has no tensor layout."""
    if region.layout is Layout.RAW:
        return None
    has_rows = 0 < region.row_bytes < region.length and region.row_bytes % layout.block_bytes == 0
    row_blocks = (region.row_bytes if has_rows else region.length) // layout.block_bytes
    return TensorPlace(
        tensor=index,
        row_codes=row_blocks * layout.codes.count,
        first_block=inside // layout.block_bytes,
        tensor_blocks=region.length // layout.block_bytes,
    )
