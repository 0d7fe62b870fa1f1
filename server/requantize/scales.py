"""Moves of block scales beside steps of codes: a scale changes all weights of its block, for about the bits of one code.

The objective is that of `descent.py`. With the codes c of a block (less the code that means 0) and its scale d, a move of d by s
changes what is lost by

    -s <g, c> + 1/2 s^2 (G c H c^T + D c c^T)

with g the gradient and H the moments within the block: a parabola, whose lowest point is rounded to a scale that the file can hold. Pure.

Scales go no farther than where the delta coder still expects the installed codes (SPEC 6.11), so that they alone have to be sent, and stay on
the lattice that the installed ones lie on, which makes them shorter to send.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS
from protocol.delta.modelling import lattice_scales
from protocol.delta.runs import DIVISORS
from protocol.tensors import Layout
from server.diagnosis.weights import Floats
from server.requantize.codes import CodedRows, Codes
from server.requantize.descent import NOISE, Metric, Price, descend

SCALED_LAYOUTS: Final = frozenset({Layout.Q4_0, Layout.Q5_0})
"""Blocks with one half-precision scale that move. Those of Q8_0 do not: codes are so fine there that a scale has nothing to mend."""

_DEARER: Final = (8.0, 4.0, 2.0)
"""What pays at a multiple of the price goes first, scales and codes in turn: nearly as if the best of both went first each time."""

_PASSES_MAX: Final = 4
"""Over all blocks, at one price; after the first one little is left."""

_REACH: Final = 0.49
"""How far, in steps of a code, the largest weight that a block can hold may move with its scale; at half a step another code is expected."""

_MAGNITUDE: Final = 0x7FFF
_SIGN: Final = 0x8000
_INFINITE: Final = 0x7C00

Halves = npt.NDArray[np.uint16]
_Values = npt.NDArray[np.float64]
_Rungs = npt.NDArray[np.int64]


def descend_with_scales(
    installed: CodedRows,
    rows: CodedRows,
    start: Codes,
    gradient: Floats,
    metric: Metric,
    price: Price,
    pairs: int = 0,
) -> tuple[CodedRows, Codes, Floats]:
    """Scales and codes that no single move of either makes better, or nearly so: the last codes may have moved after the last scales.

    Args:
        installed: What the price is relative to; of `SCALED_LAYOUTS`.
        rows: The same with the scales to begin with, within reach of the installed ones (`within_reach`).
        start: Codes to begin with.
        gradient: As `descent.descend` takes it, at this start.
        metric: Of these rows.
        price: Of a changed code, and of a changed scale.
        pairs: As `descent.descend` takes it, for the last descent.

    Returns:
        The rows with the scales that were reached, the codes, and the gradient there.
    """
    assert price.scale is not None
    codes = start
    # A start that others have made would be lost at a higher price than its own.
    is_installed = rows is installed and start is installed.codes
    for factor in (*(_DEARER if is_installed else ()), 1.0):
        rows, gradient = move_scales(installed, rows, codes, gradient, metric, price.scale * factor)
        dearer = Price(price.first * factor, price.further * factor)
        codes, gradient = descend(rows, codes, gradient, metric, dearer)
    rows, gradient = move_scales(installed, rows, codes, gradient, metric, price.scale)
    codes, gradient = descend(rows, codes, gradient, metric, price, pairs)
    return rows, codes, gradient


def move_scales(
    installed: CodedRows, rows: CodedRows, codes: Codes, gradient: Floats, metric: Metric, cost: float
) -> tuple[CodedRows, Floats]:
    """Move the scale of each block where that pays, block after block, until none does.

    Args:
        installed: What the cost is relative to.
        rows: With the scales to begin with, within reach of the installed ones.
        codes: Stay as they are.
        gradient: At these scales and codes.
        metric: Of these rows.
        cost: Of a scale that is not the installed one, in nats per token.

    Returns:
        The rows with the scales that were reached, and the gradient there.
    """
    blocks = _Blocks(installed, rows, codes, gradient, metric, cost)
    for _ in range(_PASSES_MAX):
        if not blocks.run():
            break
    return rows.with_scales(blocks.halves()), blocks.gradient


def within_reach(installed: CodedRows, other: CodedRows) -> CodedRows:
    """The installed rows with those scales of others that a move can lead to, the installed ones elsewhere."""
    ladder = _Ladder(installed)
    first, wanted = _halves(installed), _halves(other)
    low, high = ladder.reach(ladder.rungs(first))
    rungs = ladder.rungs(wanted)
    is_near = (low <= rungs) & (rungs <= high) & (first & _SIGN == wanted & _SIGN)
    if np.array_equal(np.where(is_near, wanted, first), first):
        return installed
    return installed.with_scales(np.where(is_near, wanted, first))


def changed_scales(rows: CodedRows, installed: CodedRows) -> int:
    """How many blocks have another scale."""
    return int(np.count_nonzero(_halves(rows) != _halves(installed)))


class _Ladder:
    """The magnitudes that scales of some rows can have, in order."""

    def __init__(self, installed: CodedRows) -> None:
        layout = installed.layout
        lattice = lattice_scales(DIVISORS[layout])
        if not lattice[_halves(installed) & _MAGNITUDE].all():
            lattice = np.arange(_MAGNITUDE + 1) < _INFINITE
        self._bits = np.flatnonzero(lattice).astype(np.uint16)
        self._rung_of = np.full(_MAGNITUDE + 1, -1, np.int64)
        self._rung_of[self._bits] = np.arange(len(self._bits))
        self.values: _Values = self._bits.view(np.float16).astype(np.float64)
        self._most = _REACH / (1 << (LAYOUTS[layout].codes.width - 1))

    def rungs(self, halves: Halves) -> _Rungs:
        """Where scales stand, -1 for those that are not on the ladder."""
        rungs: _Rungs = self._rung_of[halves & _MAGNITUDE]
        return rungs

    def bits(self, rungs: _Rungs) -> Halves:
        """The magnitude of scales as half-precision bits."""
        return self._bits[rungs]

    def reach(self, rungs: _Rungs) -> tuple[_Rungs, _Rungs]:
        """The lowest and the highest rung that scales may move to; a block without a scale has its own only."""
        value = self.values[rungs]
        low = np.searchsorted(self.values, value / (1 + self._most))
        high = np.searchsorted(self.values, value / (1 - self._most), side="right") - 1
        return np.where(value > 0, low, rungs), np.where(value > 0, np.maximum(high, rungs), rungs)


class _Blocks:
    """Moves of the scales of some rows, whose codes stay."""

    def __init__(
        self,
        installed: CodedRows,
        rows: CodedRows,
        codes: Codes,
        gradient: Floats,
        metric: Metric,
        cost: float,
    ) -> None:
        self.gradient = gradient.copy()
        self._metric = metric
        self._cost = cost
        self._ladder = _Ladder(installed)
        self._signs = _halves(rows) & _SIGN
        self._first = self._ladder.rungs(_halves(installed))
        self._low, self._high = self._ladder.reach(self._first)
        self._rungs = self._ladder.rungs(_halves(rows))
        self._units = codes.astype(np.float32) - np.float32(LAYOUTS[rows.layout].zero)
        self._width = LAYOUTS[rows.layout].codes.count
        self._curvature = np.stack([self._bend(block) for block in range(self._rungs.shape[1])], axis=1)

    def run(self) -> int:
        """Once over all blocks of each row; says how many have moved."""
        return sum(self._move(block) for block in range(self._rungs.shape[1]))

    def halves(self) -> Halves:
        """The scales as they stand, shape (rows, blocks of a row)."""
        return np.asarray(self._ladder.bits(self._rungs) | self._signs, np.uint16)

    def _columns(self, block: int) -> slice:
        return slice(block * self._width, (block + 1) * self._width)

    def _bend(self, block: int) -> _Values:
        """Second derivative of what is lost by the scale of a block, for each row."""
        at, metric = self._columns(block), self._metric
        units = self._units[:, at]
        through = (units @ metric.inputs[at, at]) * metric.outputs[:, None] + units * metric.lookups[:, None]
        return np.asarray(np.sum(through * units, axis=1, dtype=np.float64))

    def _move(self, block: int) -> int:
        values, first, rungs = self._ladder.values, self._first[:, block], self._rungs[:, block]
        at, signs = self._columns(block), np.where(self._signs[:, block], -1.0, 1.0)
        slope = signs * np.sum(self.gradient[:, at] * self._units[:, at], axis=1, dtype=np.float64)
        bend, here = self._curvature[:, block], values[rungs]
        lowest = here + np.divide(slope, bend, out=np.zeros_like(slope), where=bend > 0)
        above = np.searchsorted(values, lowest)
        best, least = rungs.copy(), np.zeros(len(rungs))
        for wanted in (above - 1, above, first):
            rung = np.clip(wanted, self._low[:, block], self._high[:, block])
            step = values[rung] - here
            down, up = slope * step, 0.5 * bend * np.square(step)
            change = up - down + self._cost * ((rung != first).astype(np.float64) - (rungs != first))
            pays = change < np.minimum(least, -NOISE * (np.abs(down) + up))
            best, least = np.where(pays, rung, best), np.where(pays, change, least)
        moved = np.flatnonzero(best != rungs)
        if len(moved):
            step = (signs * (values[best] - here))[moved].astype(np.float32)
            self._shift(moved, at, step[:, None] * self._units[moved, at])
            self._rungs[moved, block] = best[moved]
        return len(moved)

    def _shift(self, rows: _Rungs, at: slice, change: Floats) -> None:
        """What weights of some rows that grow do to the gradient."""
        through = change @ self._metric.inputs[at]
        through *= self._metric.outputs[rows, None]
        through[:, at] += change * self._metric.lookups[rows, None]
        self.gradient[rows] -= through


def _halves(rows: CodedRows) -> Halves:
    return np.ascontiguousarray(rows.fields["d"]).view(np.uint16).reshape(len(rows.codes), -1)
