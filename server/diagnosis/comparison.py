"""Two versions of one tensor, block by block: what the newer one lost, and how far the rest of it moved.

Damaged blocks are counted and then left out of the sums, so that a few of them do not look like a change of everything. Reads
a stretch at a time: memory does not grow with the tensor. Pure.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS
from protocol.tensors import Layout, ReadAt, Region
from server.diagnosis.weights import (
    COMPARABLE,
    WORDS,
    Flags,
    Floats,
    Piece,
    block_weights,
    end_codes,
    read_piece,
)

Doubles = npt.NDArray[np.float64]

STRETCH_WEIGHTS: Final = 1 << 16
"""Weights in memory at a time, on each side: the dozen arrays of them stay in a processor's cache, which is five times as fast as a million."""

RESIZED_FACTOR: Final = 4.0
"""A block whose size or spread changed this much while its weights kept their proportions has another scale. Training moves a
weight by a few percent; one bit of a scale's exponent that flips makes a factor of 4 or more (of 2 for the lowest one)."""

RESIZED_CORRELATION_MIN: Final = 0.8
"""Weights of a block are in proportion from here on; those of two blocks that have nothing to do with each other are within
0.35 of 0 in 95 of 100 cases (32 weights)."""

SIZE_FLOOR: Final = 0.05
"""Of the median block: smaller blocks can be multiplied by anything, and mean nothing."""

SATURATED_SHARE: Final = 0.5
"""Of a block's codes at the ends of the range. In good quantizations of four bits one or two of 32 are."""

KEPT_SCALE: Final = 0.02
"""A scale that moved by less is the same one: training moves the largest weight of a block, which makes its scale, by a fraction of a
percent, while a quantizer that looks for better scales moves most of them by several percent."""

SKETCH_ROWS: Final = 16
"""Random combinations of a change's rows that are kept; their products estimate in how many directions it goes."""

DIRECTIONS_MIN: Final = 64
"""Directions that noise of a matrix's shape goes in: with fewer, a change by training can go in as many."""

_SKETCH_SEED: Final = 36
_ROW_WEIGHTS_MAX: Final = 1 << 20
_CODE_COUNT: Final = 256


@dataclass(slots=True)
class Blocks:
    """Blocks of a tensor, and which of them are damaged. Counted in the newer version where nothing else is said.

    Attributes:
        count: All of them.
        not_finite: With NaN or infinity in a scale or a weight, and finite before.
        lost_scale: With a scale of zero, and weights that differed before.
        dead: With weights that are all the same, and differed before; those without a scale not counted.
        resized: With another size by `RESIZED_FACTOR`, and the proportions of before.
        saturated: With `SATURATED_SHARE` of the codes at the ends of the range, and not so before where the layout is the same.
        old_not_finite: With NaN or infinity in the older version.
    """

    count: int = 0
    not_finite: int = 0
    lost_scale: int = 0
    dead: int = 0
    resized: int = 0
    saturated: int = 0
    old_not_finite: int = 0


@dataclass(frozen=True, slots=True)
class TensorChange:
    """How a tensor changed.

    Attributes:
        name: Of the tensor.
        old_layout: How it was stored.
        new_layout: How it is now.
        dims: Its shape, fastest dimension last.
        weights: How many it has.
        length: Bytes in the newer file.
        is_compared: Whether its numbers could be compared; if not, only `is_identical` says something.
        is_identical: Bytes and layout are the same.
        changed_codes: Share of the codes, or of the numbers, that are others; None where layouts differ.
        kept_scales: Share of the scales of undamaged blocks that moved by less than `KEPT_SCALE`; None where layouts differ, or
            blocks have none.
        relative: RMS of the change over the RMS of the older weights, undamaged blocks only.
        moved: Likewise of the weights that were quantized, without the rounding: what a small update changed beneath the steps of
            the grid is estimated from how many codes it pushed over an edge. Low by up to a third where few weights moved far.
        reordered: As `relative`, after the weights of every block have been sorted: small where only their order changed.
        cosine: Between older and newer weights, likewise.
        gain: Newer weights as a multiple of the older ones, least squares.
        rounding: Mean square of the change over what rounding to both grids explains; infinite where there is no grid.
        directions: In how many directions the change goes, as a share of what noise of the same shape would; None for what is no
            matrix, or a small one.
        blocks: What became of its blocks.
        old_values: Different values in a block of the older version, on average.
        new_values: Likewise in the newer one.
        step_ratio: Step of the newer grid over that of the older one, root mean square; 1 where there is none.
        is_permuted: The same codes, as often as before, at other places.
        scale_max: Largest magnitude of a scale in the newer version; 0 where there are none.
    """

    name: str
    old_layout: Layout
    new_layout: Layout
    dims: tuple[int, ...]
    weights: int
    length: int
    is_compared: bool = True
    is_identical: bool = False
    changed_codes: float | None = None
    kept_scales: float | None = None
    relative: float = 0.0
    moved: float = 0.0
    reordered: float = 0.0
    cosine: float = 1.0
    gain: float = 1.0
    rounding: float = 0.0
    directions: float | None = None
    blocks: Blocks = field(default_factory=Blocks)
    old_values: float = 0.0
    new_values: float = 0.0
    step_ratio: float = 1.0
    is_permuted: bool = False
    scale_max: float = 0.0


def compare_tensors(old: ReadAt, old_region: Region, new: ReadAt, new_region: Region) -> TensorChange:
    """Compare two versions of one tensor, which must have the same shape.

    Args:
        old: File of the older version.
        old_region: Where it lies there.
        new: File of the newer version.
        new_region: Where it lies there.
    """
    comparison = _Comparison(old_region, new_region)
    if are_equal(old, old_region, new, new_region):
        return comparison.result(is_identical=True)
    if comparison.is_possible:
        for old_data, new_data in comparison.stretches(old, new):
            comparison.add(old_data, new_data)
    return comparison.result(is_identical=False)


def are_equal(old: ReadAt, old_region: Region, new: ReadAt, new_region: Region) -> bool:
    """Whether two regions have the same layout and the same bytes."""
    if (old_region.layout, old_region.length) != (new_region.layout, new_region.length):
        return False
    step = STRETCH_WEIGHTS
    return all(
        old.read_at(old_region.offset + at, min(step, old_region.length - at))
        == new.read_at(new_region.offset + at, min(step, old_region.length - at))
        for at in range(0, old_region.length, step)
    )


class _Comparison:
    """Sums over the stretches of one tensor."""

    def __init__(self, old: Region, new: Region) -> None:
        self._old, self._new = old, new
        self.is_possible = Layout.RAW not in {old.layout, new.layout} and (
            old.layout is new.layout or {old.layout, new.layout} <= COMPARABLE
        )
        self._weights = math.prod(new.dims) if new.dims else 0
        self._blocks = Blocks()
        self._sums = np.zeros(
            7
        )  # of aa, bb, ab, rr, the squares of the steps of both grids, and rr of sorted blocks
        self._values = np.zeros(2)  # different values in each block, of both versions
        self._changed = 0
        self._scales = np.zeros(2, np.int64)  # kept, and all of them
        self._old_codes = np.zeros(_CODE_COUNT, np.int64)
        self._new_codes = np.zeros(_CODE_COUNT, np.int64)
        self._scale_max = 0.0
        columns = new.dims[-1] if len(new.dims) == 2 else 0
        is_whole = (
            all(columns % block_weights(each.layout) == 0 for each in (old, new))
            if self.is_possible
            else False
        )
        self._columns = columns if is_whole and 1 < columns <= _ROW_WEIGHTS_MAX else 0
        self._sketch = np.zeros((SKETCH_ROWS, self._columns), np.float32)
        self._rng = np.random.default_rng(_SKETCH_SEED)

    def stretches(self, old: ReadAt, new: ReadAt) -> Iterator[tuple[bytes, bytes]]:
        """The same weights of both versions, a stretch at a time."""
        row = self._columns * 32 if self._columns and self._columns * 32 <= STRETCH_WEIGHTS else self._columns
        unit = row or 256
        stretch = max(1, STRETCH_WEIGHTS // unit) * unit
        sizes = [
            stretch // block_weights(each.layout) * LAYOUTS[each.layout].block_bytes
            for each in (self._old, self._new)
        ]
        old_at, new_at = 0, 0
        while old_at < self._old.length and new_at < self._new.length:
            yield (
                old.read_at(self._old.offset + old_at, min(sizes[0], self._old.length - old_at)),
                new.read_at(self._new.offset + new_at, min(sizes[1], self._new.length - new_at)),
            )
            old_at, new_at = old_at + sizes[0], new_at + sizes[1]

    def add(self, old_data: bytes, new_data: bytes) -> None:
        """Take one stretch in."""
        old, new = read_piece(self._old.layout, old_data), read_piece(self._new.layout, new_data)
        self._count_codes(old, new)
        shape = new.values.shape
        a, b = old.values.reshape(shape), new.values
        with np.errstate(all="ignore"):  # what is not finite is found by that, and left out
            is_damaged = self._find_damage(old, new, a, b)
            healthy = ~is_damaged[:, None]
            before, after = np.where(healthy, a, 0), np.where(healthy, b, 0)
            change = after - before
            steps = [np.where(healthy, each.steps.reshape(shape), 0) for each in (old, new)]
            self._compare_scales(old, new, ~is_damaged)
        in_order = [np.sort(each, axis=1) for each in (before, after)]
        self._sums += [
            _dot(before, before),
            _dot(after, after),
            _dot(before, after),
            _dot(change, change),
            *(_dot(each, each) for each in steps),
            float(np.square(in_order[1] - in_order[0], dtype=np.float64).sum()),
        ]
        self._values += [_different_values(each) for each in in_order]
        if self._columns:
            rows = change.reshape(-1, self._columns)
            self._sketch += self._rng.standard_normal((SKETCH_ROWS, len(rows)), np.float32) @ rows

    def _count_codes(self, old: Piece, new: Piece) -> None:
        if self._old.layout is not self._new.layout:
            pass
        elif old.codes is not None and new.codes is not None:
            self._changed += int(np.count_nonzero(old.codes != new.codes))
        else:
            self._changed += int(np.count_nonzero(old.values != new.values))
        self._old_codes += _histogram(old)
        self._new_codes += _histogram(new)

    def _compare_scales(self, old: Piece, new: Piece, is_healthy: Flags) -> None:
        if self._old.layout is not self._new.layout or "d" not in new.scales:
            return
        before, after = (each.scales["d"] for each in (old, new))
        is_kept = np.abs(after - before) <= KEPT_SCALE * np.abs(before)
        blocks = is_healthy.reshape(len(is_kept), -1).all(axis=1)
        self._scales += [int(is_kept[blocks].sum()), int(blocks.sum()) * is_kept.shape[1]]

    def _find_damage(self, old: Piece, new: Piece, a: Floats, b: Floats) -> Flags:
        """Which blocks are damaged, after counting them by kind."""
        blocks = self._blocks
        old_bad, new_bad = _not_finite(a), _not_finite(b)
        blocks.old_not_finite += int(np.count_nonzero(old_bad))
        blocks.not_finite += int(np.count_nonzero(new_bad & ~old_bad))
        blocks.count += len(b)
        for values in new.scales.values():
            finite = np.abs(values[np.isfinite(values)])
            self._scale_max = max(self._scale_max, float(finite.max(initial=0)))
        if b.shape[1] == 1:
            return old_bad | new_bad
        old_same, new_same = (each.max(axis=1) == each.min(axis=1) for each in (a, b))
        died = new_same & ~old_same & ~new_bad & ~old_bad
        has_no_scale = (new.scales["d"] == 0).all(axis=1) if "d" in new.scales else np.zeros(len(b), bool)
        blocks.lost_scale += int(np.count_nonzero(died & has_no_scale))
        blocks.dead += int(np.count_nonzero(died & ~has_no_scale))
        resized = _resized(a, b) & ~died & ~new_bad & ~old_bad
        if self._new.layout in WORDS:  # their scale lies elsewhere, and is that of all of them
            resized[:] = False
        blocks.resized += int(np.count_nonzero(resized))
        blocks.saturated += self._saturated(old, new, ~new_same)
        damaged: Flags = old_bad | new_bad | died | resized
        return damaged

    def _saturated(self, old: Piece, new: Piece, is_alive: Flags) -> int:
        ends = end_codes(self._new.layout)
        if not ends or new.codes is None or new.codes.shape[1] == 1:
            return 0
        is_full = _share(new.codes, ends) >= SATURATED_SHARE
        if self._old.layout is self._new.layout and old.codes is not None:
            is_full &= _share(old.codes, ends) < SATURATED_SHARE
        if len(is_full) == len(is_alive):
            is_full &= is_alive
        return int(np.count_nonzero(is_full))

    def result(self, *, is_identical: bool) -> TensorChange:
        """What all stretches say together."""
        aa, bb, ab, rr, old_grid, new_grid, reordered = (float(each) for each in self._sums)
        grid = (old_grid + new_grid) / 12  # variance of a rounding error: step^2 / 12
        values = self._values / max(1, self._blocks.count)
        is_same_layout = self._old.layout is self._new.layout
        has_codes = bool(self._old_codes.any()) and is_same_layout
        return TensorChange(
            name=self._new.name,
            old_layout=self._old.layout,
            new_layout=self._new.layout,
            dims=self._new.dims,
            weights=self._weights,
            length=self._new.length,
            is_compared=self.is_possible or is_identical,
            is_identical=is_identical,
            changed_codes=self._changed / max(1, self._weights)
            if is_same_layout and self.is_possible
            else None,
            kept_scales=float(self._scales[0] / self._scales[1]) if self._scales[1] else None,
            relative=_share_of(rr, aa),
            moved=_share_of(moved_energy(rr, grid, is_same_grid=is_same_layout), aa),
            reordered=_share_of(reordered, aa),
            cosine=ab / math.sqrt(aa * bb) if aa and bb else float(aa == bb),
            gain=ab / aa if aa else 1.0,
            rounding=rr / grid if grid else (math.inf if rr else 0.0),
            directions=self._directions(rr),
            blocks=self._blocks,
            old_values=float(values[0]),
            new_values=float(values[1]),
            step_ratio=math.sqrt(new_grid / old_grid) if old_grid and new_grid else 1.0,
            is_permuted=has_codes and not is_identical and bool((self._old_codes == self._new_codes).all()),
            scale_max=self._scale_max,
        )

    def _directions(self, energy: float) -> float | None:
        """Stable rank |R|^4 / |R R'|^2 of the change, over m n / (m + n), which it is for noise of the shape (m, n).

        For rows g, h of independent normal numbers, (g R)(h R)' has the mean square |R R'|^2, |.| being Frobenius' norm.
        """
        if not self._columns or not energy:
            return None
        products = self._sketch.astype(np.float64) @ self._sketch.T.astype(np.float64)
        others = products[~np.eye(SKETCH_ROWS, dtype=bool)]
        rows = self._weights // self._columns
        noise = rows * self._columns / (rows + self._columns)
        if noise < DIRECTIONS_MIN:
            return None
        return float(energy**2 / max(float(np.mean(others**2)), 1e-300) / noise)


def moved_energy(change: float, grid: float, *, is_same_grid: bool) -> float:
    """Sum of squares that weights moved by before they were rounded, from what they moved by on the grid.

    A weight that moves by z steps, from anywhere within its cell, crosses floor(z) edges or one more; the mean of the square is z^2 where
    z is whole, and linear between. For normal z of some spread that gives one curve, which is read backwards.

    Args:
        change: Sum of squares of the change.
        grid: What rounding to both grids explains of it: a sixth of the square of a step for each weight.
        is_same_grid: Whether weights that do not move are rounded to the same values.
    """
    if not grid:
        return change
    if not is_same_grid:
        return max(0.0, change - grid)
    squares, spreads = _curve()
    steps = float(np.interp(change / (6 * grid), squares, spreads))
    return 6 * grid * steps**2


@functools.cache
def _curve() -> tuple[Doubles, Doubles]:
    """Mean squares that are crossed, in steps, and the spreads that they belong to."""
    spreads = np.concatenate([[0.0], np.geomspace(1e-8, 1e4, 1000)])
    quantiles = [NormalDist().inv_cdf(0.5 + (number + 0.5) / 1024) for number in range(512)]  # of |z|
    moves = np.outer(spreads, quantiles)
    whole = np.floor(moves)
    return (whole**2 + (moves - whole) * (2 * whole + 1)).mean(axis=1), spreads


def _share_of(energy: float, whole: float) -> float:
    """RMS as a share of another."""
    return math.sqrt(energy / whole) if whole else (math.inf if energy else 0.0)


def _histogram(piece: Piece) -> npt.NDArray[np.int64]:
    codes = np.empty(0, np.uint8) if piece.codes is None else piece.codes.reshape(-1)
    return np.bincount(codes, minlength=_CODE_COUNT)


def _different_values(ordered: Floats) -> int:
    return len(ordered) + int(np.count_nonzero(ordered[:, 1:] != ordered[:, :-1]))


def _resized(a: Floats, b: Floats) -> Flags:
    means = [each.mean(axis=1, keepdims=True) for each in (a, b)]
    centred = [each - mean for each, mean in zip((a, b), means, strict=True)]
    spreads = [np.sqrt(np.square(each).mean(axis=1)) for each in centred]
    sizes = [np.sqrt(np.square(each).mean(axis=1)) for each in (a, b)]
    correlation = (centred[0] * centred[1]).mean(axis=1) / np.maximum(spreads[0] * spreads[1], 1e-30)
    is_other = np.zeros(len(a), bool)
    for before, after in (spreads, sizes):
        finite = before[np.isfinite(before)]
        floor = SIZE_FLOOR * float(np.median(finite)) if finite.size else 0.0
        grown = after > RESIZED_FACTOR * np.maximum(before, floor)
        is_other |= grown | ((after * RESIZED_FACTOR < before) & (before > floor))
    flags: Flags = is_other & (correlation >= RESIZED_CORRELATION_MIN)
    return flags


def _not_finite(values: Floats) -> Flags:
    return np.asarray((~np.isfinite(values)).any(axis=1))


def _share(codes: npt.NDArray[Any], wanted: tuple[int, ...]) -> Floats:
    share: Floats = np.isin(codes, wanted).mean(axis=1, dtype=np.float32)
    return share


def _dot(a: Floats, b: Floats) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
