"""How far beyond the new weights a choice aims, learned from what the file that it makes says.

A choice by descent sends only what pays, so that it carries less of an update than it should, always to the same side: it shrinks, as the lasso
does (Tibshirani, 1996; undone by a second fit in Meinshausen's relaxed lasso, 2007). In each matrix the metric of `calibration.py` finds that
hardly worth a bit, but all matrices err to the same side, and what they put out adds up: on SmolLM2 it is most of what is left. A target beyond
the new weights makes up for it. How far beyond differs from matrix to matrix, from row to row and from column to column, and most of all with how
strong the inputs are: what the update does to directions that carry much of them (the leading eigenvectors of their second moments) arrives whole, what
it does to all others is left out. So each leading direction has a number of its own, too. All are followed here by gradient descent on the
divergence of the chosen file from the float model, in floats: a few numbers for each matrix, which some ten thousand tokens settle. The descent
is then made again with what was learned. Only a part of what is added to a target arrives in the codes; which one is read from the last two
files, and the next factors are learned for what will arrive.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Self

import numpy as np

from server.diagnosis.weights import Floats
from server.requantize.model import ModelFile, read_layer, tensor_name
from server.requantize.student import Student, Tokens, coded_matrices, gradient_of, rate_at
from server.requantize.transformer import MATRICES, Array, Taps

STEPS: Final = 40
"""Of some hundred tokens, in each round."""

ROUNDS_MAX: Final = 20

DIRECTIONS: Final = 64
"""Of each matrix that have a factor of their own; a factor for each that there is brought little more, at many times the work."""

RATE_OF_MATRIX: Final = 0.06
RATE_OF_LINE: Final = 0.02
RATE_OF_DIRECTION: Final = 0.03
"""What the factor of a whole matrix, of one row or column, and of one direction all of which arrives, changes by in a step at the start of the first
round; in the second half of that, in the third a third: what is left to learn is less, and what runs of text say by chance is not. At the
end of each round it is a twentieth."""

_BANDS: Final = (4, 12, 48)
"""Of the directions, from the strongest on, how many respond alike."""

_SHARE_MIN: Final = 0.02
_SHARE_SLOW: Final = 0.1
"""A direction of which little arrives moves faster, so that as much does; below this share no faster."""

_RATE_END: Final = 0.05
_WARM_UP: Final = 5
_MOMENTUM: Final = 0.9
_MEMORY: Final = 0.98
_TINY: Final = np.float32(1e-12)
_REPORT_EVERY: Final = 10


def leading_directions(moments: Floats) -> Floats:
    """The directions that carry most of what a matrix takes.

    Args:
        moments: Second moments of the inputs, shape (columns, columns).

    Returns:
        Orthonormal, shape (columns, directions): `DIRECTIONS` of them, or as many as there are columns.
    """
    vectors = np.linalg.eigh(moments)[1]  # from the weakest to the strongest
    return np.ascontiguousarray(vectors[:, -DIRECTIONS:], np.float32)


@dataclass(frozen=True, slots=True)
class Factors:
    """Of one matrix: how many times the way from the weights before to the new ones, the change, is added to the new ones.

    Attributes:
        values: That of all weights, then one of each row, one of each column, and one of what the change does in each leading direction.
        height: Rows of the matrix.
        width: Columns.
    """

    values: Floats
    height: int
    width: int

    @classmethod
    def none(cls, change: Floats, directions: Floats) -> Self:
        """Nothing is added."""
        rows, columns = change.shape
        return cls(np.zeros(1 + rows + columns + directions.shape[1], np.float32), rows, columns)

    def parts(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Of the matrix, its rows, its columns and its leading directions: shapes (1,), (rows,), (columns,), (directions,)."""
        ends = np.cumsum([1, self.height, self.width])
        whole, rows, columns, directions = np.split(self.values, ends)
        return whole, rows, columns, directions

    def added(self, change: Floats, directions: Floats, rows: slice = slice(None)) -> Floats:
        """What is added to the weights of some rows.

        Args:
            change: Of these rows, shape (rows, columns).
            directions: As `leading_directions` gives them.
            rows: Which ones.
        """
        whole, each_row, each_column, each_direction = self.parts()
        turned = change @ directions
        turned *= each_direction
        added = (whole + each_row[rows, None] + each_column) * change
        added += turned @ directions.T
        return np.asarray(added, np.float32)

    def plus(self, other: Self) -> Self:
        """With those of another fit on top."""
        return replace(self, values=self.values + other.values)


@dataclass(frozen=True, slots=True)
class Response:
    """Which part of what is added to the target of a matrix arrives in its codes: nearly all of what strong inputs see, little of the rest.

    Attributes:
        directions: Of what the matrix takes, as `leading_directions` gives them.
        shares: Of each of them.
        rest: Of what is in none of them.
    """

    directions: Floats
    shares: Floats
    rest: float

    @classmethod
    def unseen(cls, directions: Floats) -> Self:
        """Before anything is known all is taken to arrive, so that the first round adds too little rather than too much."""
        return cls(directions, np.ones(directions.shape[1], np.float32), 1.0)

    @classmethod
    def seen(cls, directions: Floats, added: Floats, arrived: Floats) -> Self:
        """From one choice to the next.

        Args:
            directions: Of what the matrix takes.
            added: To the target in between, shape (rows, columns).
            arrived: Between the weights of both files.
        """
        wanted, found = added @ directions, arrived @ directions
        product, square = float(np.vdot(added, arrived)), float(np.vdot(added, added))
        shares = np.empty(directions.shape[1], np.float32)
        last = len(shares)
        for count in _BANDS:
            part = slice(max(0, last - count), last)
            of_product = float(np.vdot(wanted[:, part], found[:, part]))
            of_square = float(np.vdot(wanted[:, part], wanted[:, part]))
            shares[part] = _share(of_product, of_square, _SHARE_MIN)
            product, square, last = product - of_product, square - of_square, part.start
        return cls(directions, shares, _share(product, square, 0.0))

    def of(self, matrix: Floats) -> Floats:
        """What arrives of a matrix; likewise of a gradient, what it is by what is added."""
        arrived = np.float32(self.rest) * matrix
        arrived += (matrix @ self.directions * (self.shares - np.float32(self.rest))) @ self.directions.T
        return np.asarray(arrived, np.float32)


def _share(product: float, square: float, least: float) -> float:
    return float(np.clip(product / square, least, 1.0)) if square > 0 else least


class Fit:
    """Factors on their way: momentum over the root of the mean square of each (Adam; Kingma and Ba, 2015).

    Args:
        change: From the weights before to the new ones, shape (rows, columns).
        response: Of the matrix's codes.
    """

    def __init__(self, change: Floats, response: Response) -> None:
        self.factors = Factors.none(change, response.directions)
        self._change = change
        self._response = response
        self._turned = change @ response.directions
        directions = RATE_OF_DIRECTION / np.maximum(response.shares, _SHARE_SLOW)
        lines = np.full(sum(change.shape), RATE_OF_LINE)
        self._rates = np.concatenate([[RATE_OF_MATRIX], lines, directions]).astype(np.float32)
        self._mean = np.zeros_like(self._rates)
        self._square = np.zeros_like(self._rates)

    def arriving(self) -> Floats:
        """What the weights will have more, as it stands."""
        return self._response.of(self.factors.added(self._change, self._response.directions))

    def follow(self, gradient: Floats, share: float, step: int) -> None:
        """Move against a gradient.

        Args:
            gradient: Of the loss by each weight.
            share: Of the full rates.
            step: How many were taken before.
        """
        gradient = self._response.of(gradient)
        turned = gradient @ self._response.directions
        turned *= self._turned
        gradient *= self._change
        rows = gradient.sum(axis=1)
        slope = np.concatenate([rows.sum(keepdims=True), rows, gradient.sum(axis=0), turned.sum(axis=0)])
        self._mean += np.float32(1 - _MOMENTUM) * (slope - self._mean)
        self._square += np.float32(1 - _MEMORY) * (np.square(slope) - self._square)
        length = self._rates * np.float32(share / (1 - _MOMENTUM ** (step + 1)))
        root = np.sqrt(self._square / np.float32(1 - _MEMORY ** (step + 1))) + _TINY
        values = self.factors.values
        values -= length * self._mean / root


@dataclass(slots=True)
class Learning:
    """What a candidate's matrices lack along the update.

    Weights, changes and the weights of the step are held in memory: twelve bytes for each weight of the layers.

    Attributes:
        new: The new model in floats.
        before: The installed version in floats.
        candidate: The file that was chosen so far.
        responses: Of each matrix's codes, by its name.
        text: What is read, tokens.
        pool: Threads; how many changes nothing but the time.
        report: Takes lines about the progress.
    """

    new: ModelFile
    before: ModelFile
    candidate: ModelFile
    responses: Mapping[str, Response]
    text: Tokens
    pool: ThreadPoolExecutor
    report: Callable[[str], None]
    _weights: dict[str, Floats] = field(default_factory=dict)
    _fits: dict[str, Fit] = field(default_factory=dict)
    _layers: dict[int, dict[str, Array]] = field(default_factory=dict)

    def run(self, steps: int, number: int) -> dict[str, Factors]:
        """Read as many steps of text; says what is to be added to the weights of each matrix.

        Args:
            steps: 1 or more.
            number: Of the round, from 1 on; each reads other text, and changes factors less.
        """
        for name in coded_matrices(self.candidate):
            self._weights[name] = np.asarray(self.candidate.values(name), np.float32)
            change = self.new.floats(name) - self.before.floats(name)
            self._fits[name] = Fit(change, self.responses[name])
        student = Student.begin(
            self.new, self.candidate, self.text, steps, self.pool, self.report, seed=number
        )
        divergences: list[float] = []
        for step in range(steps):
            share = rate_at(step, steps, _WARM_UP, _RATE_END) / number
            follow = partial(self._follow, share, step)
            divergences.append(student.step(step, self._layer, follow))
            if step % _REPORT_EVERY == _REPORT_EVERY - 1 or step == steps - 1:
                mean = sum(divergences[-_REPORT_EVERY:]) / len(divergences[-_REPORT_EVERY:])
                self.report(
                    f"extrapolation, round {number}: step {step + 1} of {steps}, divergence {mean:.4g}"
                )
        return {name: fit.factors for name, fit in self._fits.items()}

    def _layer(self, layer: int) -> dict[str, Array]:
        """Its weights; the same on the way forward and on the way back, after which they are let go."""
        if layer in self._layers:
            return self._layers.pop(layer)
        matrices = self.pool.map(lambda name: self._matrix(tensor_name(layer, name)), MATRICES)
        found = read_layer(self.candidate, layer, ()) | dict(zip(MATRICES, matrices, strict=True))
        self._layers[layer] = found
        return found

    def _matrix(self, name: str) -> Array:
        if name not in self._fits:
            return self.candidate.values(name)
        return self._fits[name].arriving() + self._weights[name]

    def _follow(self, share: float, step: int, layer: int, taps: list[Taps]) -> None:
        list(self.pool.map(lambda name: self._follow_matrix(share, step, layer, taps, name), MATRICES))

    def _follow_matrix(self, share: float, step: int, layer: int, taps: list[Taps], name: str) -> None:
        full = tensor_name(layer, name)
        if full in self._fits:
            self._fits[full].follow(gradient_of(taps, name), share, step)
