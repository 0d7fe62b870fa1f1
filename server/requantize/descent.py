"""Coordinate descent: which codes of some rows to move by one, so that what is lost in the layer's outputs and what must be sent is least.

The objective, for each row with error e = target - weights(codes):

    1/2 (G e H e^T + D e e^T) + price of all codes that differ from the installed ones

Each step moves the one code of each row that lowers it most, until none does. Pure; rows do not depend on each other, so
that how they are cut into pieces changes nothing.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from server.diagnosis.weights import Flags, Floats
from server.requantize.codes import Codes, LinearRows

Places = npt.NDArray[np.int64]

_BLOCK_WEIGHTS: Final = 1 << 16
"""Weights of the rows that are worked on together: their arrays stay in a processor's second cache."""

_MOVES_PER_WEIGHT_MAX: Final = 8
_CROWDED: Final = 0.7
"""Share of rows that still step, below which the others are left out."""

NOISE: Final = np.float32(1e-6)
"""Share of a move's terms below which a gain may be rounding."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What an error of rows costs.

    Attributes:
        inputs: H, second moments of the inputs, shape (columns, columns).
        outputs: G, worth of an error of each row's output, shape (rows,).
        lookups: D, worth of an error of any weight of a row beside that, shape (rows,).
    """

    inputs: Floats
    outputs: Floats
    lookups: Floats

    def gradient(self, error: Floats) -> Floats:
        """Half of what `cost` grows by with the error."""
        through = (error @ self.inputs) * self.outputs[:, None]
        return np.asarray(through + error * self.lookups[:, None], np.float32)

    def curvature(self) -> Floats:
        """Second derivative of the cost by each weight, shape (rows, columns)."""
        own = np.outer(self.outputs, np.diagonal(self.inputs)) + self.lookups[:, None]
        return np.asarray(own, np.float32)

    def cost(self, error: Floats) -> float:
        """In nats per token, of all rows."""
        return 0.5 * float(np.sum(self.gradient(error) * error, dtype=np.float64))

    def part(self, rows: slice) -> "Metric":
        """Of some of the rows."""
        return Metric(self.inputs, self.outputs[rows], self.lookups[rows])


@dataclass(frozen=True, slots=True)
class Price:
    """What a changed code or scale costs to send, in nats per token.

    Attributes:
        first: Moving a code away from the installed one.
        further: Each step more.
        shares: Of the fleet that has each of several installed files; none for one file. Installed codes then have one more axis,
            as long as this, and the price is the mean over the fleet.
        scale: Moving the scale of a block away from the installed one (`scales.py`); None where scales stay.
    """

    first: float
    further: float
    shares: tuple[float, ...] = ()
    scale: float | None = None

    def of(self, codes: Codes, installed: Codes) -> float:
        """Of all codes."""
        return float(self.of_each(codes, installed).sum())

    def of_each(self, codes: Codes, installed: Codes) -> npt.NDArray[np.float64]:
        """Of each code."""
        if self.shares:
            alone = self._alone()
            each = (
                share * alone.of_each(codes, installed[..., index]) for index, share in enumerate(self.shares)
            )
            return np.asarray(sum(each), np.float64)
        distance = np.abs(codes - installed)
        return np.where(distance, self.first + self.further * (distance - 1.0), 0.0)

    def of_step(self, codes: Codes, installed: Codes, direction: int) -> npt.NDArray[np.float64]:
        """Of a step of each code up (1) or down (-1): given back where it leads nearer to the installed code."""
        if self.shares:
            alone = self._alone()
            each = (
                share * alone.of_step(codes, installed[..., index], direction)
                for index, share in enumerate(self.shares)
            )
            return np.asarray(sum(each), np.float64)
        away = (codes - installed) * direction
        cost = np.where(away >= 1, self.further, -self.further)
        return np.where(away == 0, self.first, np.where(away == -1, -self.first, cost))

    def _alone(self) -> "Price":
        return Price(self.first, self.further)


def descend(
    rows: LinearRows,
    start: Codes,
    gradient: Floats,
    metric: Metric,
    price: Price,
    pairs: int = 0,
    anchors: Codes | None = None,
) -> tuple[Codes, Floats]:
    """Codes that no single step makes better, and the gradient there.

    Args:
        rows: As installed.
        start: Codes to begin with.
        gradient: At the start, how much each weight's growth lowers the cost: the metric's own for an error that is known, or one
            that was measured. From there on it changes as the metric says.
        metric: Of these rows.
        price: Relative to the installed codes.
        pairs: How many first steps are tried for two together, where no single one pays; 0 for none.
        anchors: The codes that the price is relative to, where those are not the rows' own: of several installed files, with a last
            axis for these (`anchors.py`).
    """
    installed = rows.codes if anchors is None else anchors
    codes, reached = np.empty_like(start), np.empty_like(gradient)
    many = max(1, _BLOCK_WEIGHTS // start.shape[1])
    for first in range(0, len(start), many):
        part = slice(first, first + many)
        block = _Block(rows, part, installed[part], start[part], gradient[part], metric.part(part), price)
        block.run(min(pairs, start.shape[1] - 1))
        codes[part], reached[part] = block.rows.codes, block.rows.gradient
    return codes, reached


def single_gains(rows: LinearRows, gradient: Floats, metric: Metric) -> Floats:
    """What each code's best single step from the installed one gains before it is paid for; negative where none helps."""
    half = np.float32(0.5) * np.square(rows.steps) * metric.curvature()
    return np.asarray(np.abs(rows.steps * gradient) - half, np.float32)


@dataclass(slots=True)
class _Rows:
    """Rows that are stepped side by side, with what a step of each of their codes would change.

    Attributes:
        codes: Where they stand.
        installed: What the price is relative to; with a last axis for several installed files.
        steps: What a code is multiplied with.
        half: Half the curvature along each code.
        outputs: G of each row.
        lookups: D of each row.
        gradient: How much each weight's growth lowers the cost.
        up: Price of a step up; infinite at the end of the range.
        down: Price of a step down.
    """

    codes: Codes
    installed: Codes
    steps: Floats
    half: Floats
    outputs: Floats
    lookups: Floats
    gradient: Floats
    up: Floats
    down: Floats

    def take(self, places: Places | Flags) -> "_Rows":
        """A copy of some rows."""
        return _Rows(*(getattr(self, each)[places] for each in self.__slots__))

    def give_back(self, places: Places, rows: "_Rows", which: Places | None = None) -> None:
        """Put what stepping has changed where it was taken from."""
        for name in ("codes", "gradient", "up", "down"):
            values = getattr(rows, name)
            getattr(self, name)[places] = values if which is None else values[which]


class _Block:
    """The descent of some rows."""

    def __init__(
        self,
        rows: LinearRows,
        part: slice,
        installed: Codes,
        start: Codes,
        gradient: Floats,
        metric: Metric,
        price: Price,
    ) -> None:
        self._low, self._high = rows.low, rows.high
        self._price = price
        self._inputs = metric.inputs
        steps = rows.steps[part]
        self.rows = _Rows(
            codes=start.copy(),
            installed=installed,
            steps=steps,
            half=np.float32(0.5) * np.square(steps) * metric.curvature(),
            outputs=metric.outputs,
            lookups=metric.lookups,
            gradient=gradient.copy(),
            up=self._cost(start, installed, 1),
            down=self._cost(start, installed, -1),
        )

    def run(self, pairs: int) -> None:
        """Step until no single step pays in any row; then until no two steps do, of which the first is among the cheapest few."""
        waiting = np.arange(len(self.rows.codes))
        for _ in range(self.rows.codes.shape[1]):
            self._run_singles(waiting)
            if not pairs:
                break
            waiting = self._step_pairs(waiting, pairs)
            if not len(waiting):
                break

    def _run_singles(self, places: Places) -> None:
        rows = self.rows.take(places)
        for _ in range(_MOVES_PER_WEIGHT_MAX * rows.codes.shape[1]):
            slope = rows.steps * rows.gradient
            change = _changes(rows, slope)
            best = change.argmin(axis=1)
            at = np.arange(len(best)), best
            pays = change[at] < -NOISE * (np.abs(slope[at]) + rows.half[at])
            count = int(np.count_nonzero(pays))
            if count == 0:
                break
            if count < _CROWDED * len(pays):
                self.rows.give_back(places[~pays], rows, ~pays)
                rows, places, best = rows.take(pays), places[pays], best[pays]
                pays = np.ones(count, np.bool_)
            self._move(rows, best, pays)
        self.rows.give_back(places, rows)

    def _step_pairs(self, places: Places, count: int) -> Places:
        """One pair of steps in each row where one pays; says which rows these are."""
        rows = self.rows.take(places)
        slope = rows.steps * rows.gradient
        change = _changes(rows, slope)
        every = np.arange(len(places))
        firsts = np.argpartition(change, count, axis=1)[:, :count]
        best = np.zeros(len(places), np.float32)
        pair = np.zeros((2, len(places)), np.int64)
        for first in firsts.T:
            at = every, first
            shift = rows.steps[at] * _directions(rows, slope[at], at)
            through = self._inputs[first]
            through *= (shift * rows.outputs)[:, None]
            after = _changes(rows, slope - rows.steps * through)
            after[at] = np.inf
            second = after.argmin(axis=1)
            total = change[at] + after[every, second]
            better = total < np.minimum(best, -NOISE * (np.abs(slope[at]) + rows.half[at]))
            best = np.where(better, total, best)
            pair = np.where(better, [first, second], pair)
        pays = best < 0
        rows, places = rows.take(pays), places[pays]
        for step in pair[:, pays]:
            self._move(rows, step, np.ones(len(places), np.bool_))
        self.rows.give_back(places, rows)
        return places

    def _move(self, rows: _Rows, best: Places, pays: Flags) -> None:
        at = np.arange(len(best)), best
        direction = _directions(rows, rows.gradient[at] * rows.steps[at], at) * pays
        moved = rows.codes[at] + direction
        rows.codes[at] = moved
        shift = (direction * rows.steps[at]).astype(np.float32)
        through = self._inputs[best]
        through *= (shift * rows.outputs)[:, None]
        rows.gradient -= through
        rows.gradient[at] -= shift * rows.lookups
        installed = rows.installed[at]
        rows.up[at] = self._cost(moved, installed, 1)
        rows.down[at] = self._cost(moved, installed, -1)

    def _cost(self, codes: Codes, installed: Codes, direction: int) -> Floats:
        """Of a step up or down from here, never out of range."""
        cost = self._price.of_step(codes, installed, direction)
        after = codes + direction
        return np.where((after < self._low) | (after > self._high), np.inf, cost).astype(np.float32)


def _directions(rows: _Rows, slope: Floats, at: tuple[Places, Places]) -> Places:
    """Which way the better step of some codes goes."""
    return np.where(rows.up[at] - slope < rows.down[at] + slope, 1, -1)


def _changes(rows: _Rows, slope: Floats) -> Floats:
    """What the better step of each code, up or down, changes the objective by."""
    change = rows.up - slope
    np.minimum(change, rows.down + slope, out=change)
    change += rows.half
    return change
