"""Chooses how each tensor is modelled: what its numbers look like decides the flags of its runs, trials decide the rest.

Only the writer comes here. A wrong choice costs bytes, never correctness.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.delta.basis import fit_basis, is_tall
from protocol.delta.compression import compress
from protocol.delta.context import ContextModel
from protocol.delta.directions import RECORD_BYTES, fit_directions, is_matrix
from protocol.delta.format import Profile
from protocol.delta.gain import fit_gain
from protocol.delta.layouts import LAYOUT_BY_NUMBER, LAYOUTS, NAME_BY_NUMBER, Array, BlockLayout, Formula
from protocol.delta.matching import Match
from protocol.delta.planner import SegmentPlan, TensorPlace
from protocol.delta.runs import COLUMNS_MAX, DIVISORS, SCALED, SLOTS, Basis, ContextRun, Flag
from protocol.delta.tensor import Run
from protocol.tensors.regions import Layout, ReadAt, Region

# Of half groups that did not change; above it a flag for each group pays.
_SPARSE_SHARES = {Profile.FAST: 0.6, Profile.SMALL: 0.98}
_HALF_GROUP = 16
_SAMPLES = 4  # pieces of a tall tensor on which choices are tried
_SAMPLE_BYTES = 384 << 10
_COMPARE_BYTES = 1 << 20
_KEEPING_SCALES = {LAYOUTS[name].number for name in (Layout.RAW, *SCALED)}
_EXPLAINED_MIN = 0.01  # of an update, by a basis that is worth a trial


@dataclass(frozen=True, slots=True)
class Choice:
    """How one tensor is modelled.

    Attributes:
        flags: For all its runs.
        basis: Directions of its rows, if they pay.
    """

    flags: Flag = Flag.NONE
    basis: Basis | None = None


class Modeller:
    """Makes the runs of context segments.

    Args:
        base: The base.
        new: The new file.
        regions: The new file's map.
        matches: For each region its counterpart.
        profile: Few bytes or much speed.
        choices: What was decided before, by the index of the tensor in the map.
    """

    def __init__(
        self,
        base: ReadAt,
        new: ReadAt,
        regions: Sequence[Region],
        matches: Sequence[Match],
        profile: Profile,
        choices: Mapping[int, Choice] | None = None,
    ) -> None:
        self._base = base
        self._new = new
        self._regions = regions
        self._matches = matches
        self._profile = profile
        self._is_small = profile is Profile.SMALL
        self._choices = dict(choices or {})
        self._slots: dict[tuple[int, bool], int] = {}
        self._last_tensor: int | None = None
        self._scales = _column_scales(regions, matches)
        self._last_scales: int | None = None

    def tall_tensors(self) -> list[int]:
        """Return the tensors for which a basis may pay and that are not the same as in the base, by index in the map."""
        return [
            index
            for index, (region, match) in enumerate(zip(self._regions, self._matches, strict=True))
            if match.base is not None and is_tall(region) and not self._is_equal(match.base, region)
        ]

    def _is_equal(self, old: Region, new: Region) -> bool:
        if old.length != new.length:
            return False
        return all(
            self._base.read_at(old.offset + at, min(_COMPARE_BYTES, new.length - at))
            == self._new.read_at(new.offset + at, min(_COMPARE_BYTES, new.length - at))
            for at in range(0, new.length, _COMPARE_BYTES)
        )

    def runs(self, plan: SegmentPlan, result: bytes, window: bytes) -> list[ContextRun]:
        """Return the runs of a segment of the chain.

        Args:
            plan: The segment.
            result: Its bytes.
            window: Those of its base window.
        """
        runs: list[ContextRun] = []
        position = 0
        for run, place in zip(plan.runs, plan.places, strict=True):
            new = result[position : position + run.length]
            old = (
                window[run.base_offset : run.base_offset + run.length] if run.base_offset is not None else b""
            )
            runs.append(self._run(run, place, old, new))
            position += run.length
        return runs

    def choice(self, tensor: int) -> Choice:
        """Return how a tensor is modelled, by its index in the map."""
        if tensor not in self._choices:
            self._choices[tensor] = self._choose(tensor)
        return self._choices[tensor]

    def _run(self, run: Run, place: TensorPlace | None, old: bytes, new: bytes) -> ContextRun:
        choice = self.choice(place.tensor) if place is not None and old else Choice()
        tensor = place.tensor if place else -1
        flags = Flag.NONE if tensor == self._last_tensor and place else Flag.START
        self._last_tensor = tensor
        row_codes = place.row_codes if place else run.length
        gain, basis = None, None
        if old:
            flags |= Flag.BASE | observed_flags(NAME_BY_NUMBER[run.layout], old, new, self._profile)
            flags |= self._scale_flags(run, tensor)
            flags |= choice.flags & ~(Flag.GRID if not self._has_grid(run, flags) else Flag.NONE)
            gain = None if _has_scales(run, flags) else fit_gain(run, old, new, by_position=True)
            flags |= Flag.GAIN if gain else Flag.NONE
            if choice.basis and place and _is_whole_rows(run, place):
                flags, basis = flags | Flag.RANK, choice.basis
        else:
            self._last_scales = None
        first_block = place.first_block if place else 0
        slot = self._slots.setdefault((run.layout, Flag.DRIFT in flags), len(self._slots)) % SLOTS
        return ContextRun(
            run.layout, flags, slot, run.blocks, row_codes, first_block, run.base_offset, gain, basis
        )

    def _scale_flags(self, run: Run, tensor: int) -> Flag:
        """Return whether a run is a tensor's scales, has those that this chain has seen last, or lies between: zero points, names."""
        if tensor in self._scales.values() and run.length == self._regions[tensor].length:
            self._last_scales = tensor
        elif tensor in self._scales:
            if self._scales[tensor] != self._last_scales:
                self._last_scales = None
        elif run.layout not in _KEEPING_SCALES or run.length > COLUMNS_MAX:
            self._last_scales = None
        return Flag.SCALES if self._last_scales is not None else Flag.NONE

    def _has_grid(self, run: Run, flags: Flag) -> bool:
        name = NAME_BY_NUMBER[run.layout]
        return Flag.LATTICE in flags if name in DIVISORS else self._is_bfloat16

    @functools.cached_property
    def _is_bfloat16(self) -> bool:
        """Whether tensors that were not quantized say that the model was bfloat16 before."""
        return all(
            _has_short_floats(source, regions)
            for source, regions in (
                (self._new, self._regions),
                (self._base, [match.base for match in self._matches if match.base]),
            )
        )

    def _choose(self, tensor: int) -> Choice:
        region, match = self._regions[tensor], self._matches[tensor].base
        flags = Flag.GRID if self._is_small and region.layout in {Layout.Q8_0, Layout.Q6_K} else Flag.NONE
        if match is not None and self._is_small and is_matrix(region):
            return Choice(basis=fit_directions(self._base, self._new, match, region))
        if match is None or not is_tall(region):
            return Choice(flags)
        drifting = Choice(flags | Flag.DRIFT)
        if not self._is_small:
            return drifting
        basis, explained = fit_basis(self._base, self._new, match, region)
        if explained < _EXPLAINED_MIN:
            return drifting
        candidates = [drifting]
        candidates += [Choice(flags | Flag.DRIFT, basis.cut(rank)) for rank in (basis.rank // 2, basis.rank)]
        return min(candidates, key=lambda choice: self._trial_bytes(tensor, match, choice))

    def _trial_bytes(self, tensor: int, match: Region, choice: Choice) -> float:
        """Estimate what a tensor costs, from evenly spread pieces of rows."""
        region = self._regions[tensor]
        layout = LAYOUTS[region.layout]
        row_blocks = region.row_bytes // layout.block_bytes
        rows = min(region.length, match.length) // region.row_bytes
        some = min(rows, max(1, _SAMPLE_BYTES // region.row_bytes))
        model = ContextModel()
        model.reset()
        total = seen = 0
        for index in range(_SAMPLES):
            first = (rows - some) * index // max(1, _SAMPLES - 1)
            old = self._base.read_at(match.offset + first * region.row_bytes, some * region.row_bytes)
            new = self._new.read_at(region.offset + first * region.row_bytes, some * region.row_bytes)
            flags = Flag.BASE | observed_flags(region.layout, old, new, self._profile) | choice.flags
            flags |= (Flag.START if index == 0 else Flag.NONE) | (Flag.RANK if choice.basis else Flag.NONE)
            if Flag.LATTICE not in flags:
                flags &= ~Flag.GRID
            run = ContextRun(
                layout.number,
                flags,
                0,
                some * row_blocks,
                row_blocks * layout.codes.count,
                first * row_blocks,
                0,
                None,
                choice.basis,
            )
            total += len(model.encode([run], old, new))
            seen += len(new)
        side = len(compress(choice.basis.pack(), "small")) + RECORD_BYTES if choice.basis else 0
        return total * region.length / max(seen, 1) + side


def _column_scales(regions: Sequence[Region], matches: Sequence[Match]) -> dict[int, int]:
    """Return for each tensor whose columns have scales in a tensor before it, and both of which the base has, that tensor."""
    found: dict[int, int] = {}
    seen: dict[str, int] = {}
    for index, (region, match) in enumerate(zip(regions, matches, strict=True)):
        if match.base is None or match.base.length != region.length:
            continue
        if region.layout is Layout.F32:
            seen[region.name] = index
        elif region.layout in SCALED and region.scales in seen and 0 < region.row_bytes <= COLUMNS_MAX:
            scales = seen[region.scales]
            if regions[scales].length == 4 * region.row_bytes:
                found[index] = scales
    return found


def _has_scales(run: Run, flags: Flag) -> bool:
    return NAME_BY_NUMBER[run.layout] in SCALED and Flag.SCALES in flags


def _is_whole_rows(run: Run, place: TensorPlace) -> bool:
    row_blocks = place.row_codes // LAYOUT_BY_NUMBER[run.layout].codes.count
    return place.first_block % row_blocks == 0 and run.blocks % row_blocks == 0


def observed_flags(name: Layout, old: bytes, new: bytes, profile: Profile) -> Flag:
    """Return the flags that the bytes of a run decide by themselves.

    Args:
        name: The run's layout.
        old: Its bytes in the base.
        new: Its bytes in the result.
        profile: Few bytes or much speed.
    """
    layout = LAYOUTS[name]
    if layout.codes.width > 8 or name is Layout.RAW:
        return Flag.NONE
    flags = Flag.NONE
    before = np.frombuffer(old, np.uint8).reshape(-1, layout.block_bytes)
    after = np.frombuffer(new, np.uint8).reshape(-1, layout.block_bytes)
    share = _sparse_share(layout, before, after)
    # Codes below each other share a scale: where it stays, a word stays as it was, whatever the words beside it do.
    if share > _SPARSE_SHARES[profile] or layout.is_column:
        flags |= Flag.SPARSE
    if name in DIVISORS and layout.formula is Formula.SCALED:
        field = layout.fields[0]
        lattice = lattice_scales(DIVISORS[name])
        if all(lattice[field.split(blocks) & 0x7FFF].all() for blocks in (before, after)):
            flags |= Flag.LATTICE
    return flags


def _sparse_share(layout: BlockLayout, old: Array, new: Array) -> float:
    """Share of half groups of codes that are equal."""
    halves = len(old) * layout.codes.count // _HALF_GROUP
    if not halves:
        return 0.0
    if layout.codes.count % _HALF_GROUP == 0:
        # Half groups lie within blocks: what is not in a block that differs need not be taken apart.
        differing = np.zeros(len(old), np.bool_)
        differing[np.flatnonzero(old.reshape(-1) != new.reshape(-1)) // layout.block_bytes] = True
        old, new = old[differing], new[differing]
    ours, theirs = (layout.codes.split(blocks).reshape(-1) for blocks in (old, new))
    codes = len(ours) // _HALF_GROUP * _HALF_GROUP
    changed = (ours[:codes] != theirs[:codes]).view(np.uint64)  # eight at once
    return (halves - int(np.count_nonzero(changed[::2] | changed[1::2]))) / halves


@functools.cache
def lattice_scales(divisor: int) -> Array:
    """Return for each half-precision magnitude whether a bfloat16 maximum gives it as its scale."""
    maxima = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        scales = (maxima / np.float32(divisor)).astype(np.float16).view(np.uint16)
    found = np.zeros(0x8000, np.bool_)
    found[scales[scales < 0x7C00]] = True
    return found


def _has_short_floats(source: ReadAt, regions: Sequence[Region]) -> bool:
    """Tell whether the first numbers of all float32 tensors would fit into bfloat16; False where there are none."""
    singles = [region for region in regions if region.layout is Layout.F32]
    pieces = [source.read_at(region.offset, min(region.length, 4096)) for region in singles[:8]]
    return bool(pieces) and all(not (np.frombuffer(piece, "<u4") & 0xFFFF).any() for piece in pieces)
