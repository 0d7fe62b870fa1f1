"""Coordinate descent: which codes of some rows to move by one, so that what is lost in the layer's outputs and what must be sent is least.

The objective, for each row with error e = target - weights(codes):

    1/2 (G e H e^T + D e e^T) + price of all codes that differ from the installed ones

Each step moves the one code of each row that lowers it most, until none does. Pure; rows do not depend on each other, so
that how they are cut into pieces changes nothing.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from server.diagnosis.weights import Floats
from server.requantize.codes import CodedRows, Codes

_BLOCK_WEIGHTS: Final = 1 << 16
"""Weights of the rows that are worked on together: their arrays stay in a processor's second cache."""

_MOVES_PER_WEIGHT_MAX: Final = 8
_NOISE: Final = np.float32(1e-6)
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
    """What a changed code costs to send, in nats per token.

    Attributes:
        first: Moving a code away from the installed one.
        further: Each step more.
    """

    first: float
    further: float

    def of(self, codes: Codes, installed: Codes) -> float:
        """Of all codes."""
        distance = np.abs(codes - installed)
        return self.first * float(np.count_nonzero(distance)) + self.further * float(
            np.maximum(distance - 1, 0).sum(dtype=np.float64)
        )


def descend(
    rows: CodedRows,
    target: Floats,
    start: Codes,
    metric: Metric,
    price: Price,
    shift: Floats | None = None,
) -> Codes:
    """Codes that no single step makes better.

    Args:
        rows: As installed.
        target: Weights that are wanted, same shape.
        start: Codes to begin with.
        metric: Of these rows.
        price: Relative to the installed codes.
        shift: Added to the gradient at the start, for what the metric does not see; same shape.
    """
    codes = start.copy()
    many = max(1, _BLOCK_WEIGHTS // target.shape[1])
    for first in range(0, len(target), many):
        part = slice(first, first + many)
        block = _Block(rows, part, target[part], codes[part], metric.part(part), price)
        if shift is not None:
            block.shift(shift[part])
        block.run()
    return codes


def single_gains(rows: CodedRows, target: Floats, metric: Metric) -> Floats:
    """What each code's best single step from the installed one gains before it is paid for; negative where none helps."""
    gradient = metric.gradient(target - rows.weights(rows.codes))
    return np.abs(rows.steps * gradient) - 0.5 * np.square(rows.steps) * metric.curvature()


class _Block:
    """Rows that are stepped side by side, and fewer of them as they are done."""

    def __init__(
        self, rows: CodedRows, part: slice, target: Floats, codes: Codes, metric: Metric, price: Price
    ) -> None:
        self._low, self._high = rows.low, rows.high
        self._price = price
        self._inputs = metric.inputs
        self._out = codes  # a view: what is done is written there
        self._places = np.arange(len(codes))
        self._codes = codes.copy()
        self._installed = rows.codes[part]
        self._steps = rows.steps[part]
        self._outputs, self._lookups = metric.outputs, metric.lookups
        self._gradient = metric.gradient(target - (self._steps * codes + rows.offsets[part]))
        self._half = np.float32(0.5) * np.square(self._steps) * metric.curvature()
        self._up = self._cost(self._codes, self._installed, 1)
        self._down = self._cost(self._codes, self._installed, -1)

    def shift(self, gradient: Floats) -> None:
        """Add to the gradient."""
        self._gradient += gradient

    def run(self) -> None:
        """Step until no row has a step that pays."""
        for _ in range(_MOVES_PER_WEIGHT_MAX * self._codes.shape[1]):
            slope = self._steps * self._gradient
            change = np.where(slope > 0, self._up, self._down)
            np.abs(slope, out=slope)
            change += self._half
            change -= slope
            best = change.argmin(axis=1)
            at = np.arange(len(best)), best
            pays = change[at] < -_NOISE * (slope[at] + self._half[at])
            count = int(np.count_nonzero(pays))
            if count == 0:
                break
            if count < 0.7 * len(pays):
                self._keep(pays)
                best = best[pays]
                pays = np.ones(count, np.bool_)
            self._move(best, pays)
        self._out[self._places] = self._codes

    def _move(self, best: Codes, pays: Codes) -> None:
        at = np.arange(len(best)), best
        direction = np.where(self._gradient[at] * self._steps[at] > 0, 1, -1) * pays
        moved = self._codes[at] + direction
        self._codes[at] = moved
        shift = (direction * self._steps[at]).astype(np.float32)
        through = self._inputs[best]
        through *= (shift * self._outputs)[:, None]
        self._gradient -= through
        self._gradient[at] -= shift * self._lookups
        installed = self._installed[at]
        self._up[at] = self._cost(moved, installed, 1)
        self._down[at] = self._cost(moved, installed, -1)

    def _cost(self, codes: Codes, installed: Codes, direction: int) -> Floats:
        """Of a step up or down from here: given back where it leads nearer to the installed code, and never out of range."""
        away = (codes - installed) * direction
        cost = np.where(away >= 1, self._price.further, -self._price.further)
        cost = np.where(away == 0, self._price.first, np.where(away == -1, -self._price.first, cost))
        after = codes + direction
        return np.where((after < self._low) | (after > self._high), np.inf, cost).astype(np.float32)

    def _keep(self, rows: Codes) -> None:
        """Only these rows go on."""
        self._out[self._places[~rows]] = self._codes[~rows]
        self._places = self._places[rows]
        self._codes, self._installed = self._codes[rows], self._installed[rows]
        self._steps, self._half = self._steps[rows], self._half[rows]
        self._outputs, self._lookups = self._outputs[rows], self._lookups[rows]
        self._gradient, self._up, self._down = self._gradient[rows], self._up[rows], self._down[rows]
