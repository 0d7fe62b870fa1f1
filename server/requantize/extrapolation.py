"""How far beyond the new weights a choice aims, learned from what the file that it makes says.

A choice by descent sends only what pays, so that it carries less of an update than it should, always to the same side: it shrinks, as the lasso
does (Tibshirani, 1996; undone by a second fit in Meinshausen's relaxed lasso, 2007). In each matrix the metric of `calibration.py` finds that
hardly worth a bit, but all matrices err to the same side, and what they put out adds up: on SmolLM2 it is most of what is left. A target beyond
the new weights makes up for it. How far beyond differs from matrix to matrix, from row to row and from column to column, and is followed here by
gradient descent on the divergence of the chosen file from the float model, in floats: a few numbers for each matrix, which some ten
thousand tokens settle. The descent is then made again with what was learned.
"""

from collections.abc import Callable
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

RATE_OF_MATRIX: Final = 0.02
RATE_OF_LINE: Final = 0.01
"""What the factor of a whole matrix, and of one row or column, changes by in a step at the start; at the end a twentieth."""

REACH: Final = 1.3
"""A descent carries a part of what is added to its target: so many times what was missing is added, from the second round on."""

_RATE_END: Final = 0.05
_WARM_UP: Final = 5
_MOMENTUM: Final = 0.9
_MEMORY: Final = 0.98
_TINY: Final = np.float32(1e-12)
_REPORT_EVERY: Final = 10


@dataclass(frozen=True, slots=True)
class Factors:
    """Of one matrix: how many times the way from the weights before to the new ones is added to each weight, as a sum of three.

    Attributes:
        values: That of all weights, then one of each row, then one of each column; shape (1 + rows + columns,).
        height: Rows of the matrix.
    """

    values: Floats
    height: int

    @classmethod
    def none(cls, rows: int, columns: int) -> Self:
        """Nothing is added."""
        return cls(np.zeros(1 + rows + columns, np.float32), rows)

    def of_rows(self, part: slice) -> Floats:
        """Of each weight of some rows, shape (rows, columns)."""
        whole, rows, columns = np.split(self.values, (1, 1 + self.height))
        return np.asarray(whole + rows[part, None] + columns, np.float32)

    def plus(self, other: Self, times: float) -> Self:
        """With those of another fit on top."""
        return replace(self, values=self.values + np.float32(times) * other.values)


class Fit:
    """Factors on their way: momentum over the root of the mean square of each (Adam; Kingma and Ba, 2015)."""

    def __init__(self, rows: int, columns: int) -> None:
        self.factors = Factors.none(rows, columns)
        self._rates = np.full(1 + rows + columns, RATE_OF_LINE, np.float32)
        self._rates[0] = RATE_OF_MATRIX
        self._mean = np.zeros_like(self._rates)
        self._square = np.zeros_like(self._rates)

    def follow(self, gradient: Floats, share: float, step: int) -> None:
        """Move against a gradient.

        Args:
            gradient: Of the loss by what is added to each weight, in units of its change from before to new.
            share: Of the full rates.
            step: How many were taken before.
        """
        rows = gradient.sum(axis=1)
        slope = np.concatenate([rows.sum(keepdims=True), rows, gradient.sum(axis=0)])
        self._mean += np.float32(1 - _MOMENTUM) * (slope - self._mean)
        self._square += np.float32(1 - _MEMORY) * (np.square(slope) - self._square)
        length = self._rates * np.float32(share / (1 - _MOMENTUM ** (step + 1)))
        root = np.sqrt(self._square / np.float32(1 - _MEMORY ** (step + 1))) + _TINY
        values = self.factors.values
        values -= length * self._mean / root


@dataclass(slots=True)
class Learning:
    """What a candidate's matrices lack along the update.

    Weights and changes are held in memory: eight bytes for each weight of the layers.

    Attributes:
        new: The new model in floats.
        before: The installed version in floats.
        candidate: The file that was chosen so far.
        text: What is read, tokens.
        pool: Threads; how many changes nothing but the time.
        report: Takes lines about the progress.
    """

    new: ModelFile
    before: ModelFile
    candidate: ModelFile
    text: Tokens
    pool: ThreadPoolExecutor
    report: Callable[[str], None]
    _weights: dict[str, Floats] = field(default_factory=dict)
    _changes: dict[str, Floats] = field(default_factory=dict)
    _fits: dict[str, Fit] = field(default_factory=dict)

    def run(self, steps: int, number: int) -> dict[str, Factors]:
        """Read as many steps of text; says what is to be added to the weights of each matrix.

        Args:
            steps: 1 or more.
            number: Of the round; each reads other text.
        """
        for name in coded_matrices(self.candidate):
            self._weights[name] = np.asarray(self.candidate.values(name), np.float32)
            self._changes[name] = self.new.floats(name) - self.before.floats(name)
            self._fits[name] = Fit(*self._weights[name].shape)
        student = Student.begin(
            self.new, self.candidate, self.text, steps, self.pool, self.report, seed=number
        )
        divergences: list[float] = []
        for step in range(steps):
            follow = partial(self._follow, rate_at(step, steps, _WARM_UP, _RATE_END), step)
            divergences.append(student.step(step, self._layer, follow))
            if step % _REPORT_EVERY == _REPORT_EVERY - 1 or step == steps - 1:
                mean = sum(divergences[-_REPORT_EVERY:]) / len(divergences[-_REPORT_EVERY:])
                self.report(
                    f"extrapolation, round {number}: step {step + 1} of {steps}, divergence {mean:.4g}"
                )
        return {name: fit.factors for name, fit in self._fits.items()}

    def _layer(self, layer: int) -> dict[str, Array]:
        matrices = self.pool.map(lambda name: self._matrix(tensor_name(layer, name)), MATRICES)
        return read_layer(self.candidate, layer, ()) | dict(zip(MATRICES, matrices, strict=True))

    def _matrix(self, name: str) -> Array:
        if name not in self._fits:
            return self.candidate.values(name)
        added = self._fits[name].factors.of_rows(slice(None))
        added *= self._changes[name]
        added += self._weights[name]
        return added

    def _follow(self, share: float, step: int, layer: int, taps: list[Taps]) -> None:
        list(self.pool.map(lambda name: self._follow_matrix(share, step, layer, taps, name), MATRICES))

    def _follow_matrix(self, share: float, step: int, layer: int, taps: list[Taps], name: str) -> None:
        full = tensor_name(layer, name)
        if full in self._fits:
            gradient = gradient_of(taps, name, self._changes[full])
            self._fits[full].follow(gradient, share, step)
