"""Latent codes: where the codes of a matrix want to be, in fractions of a step, and which of them move. Pure.

A code's latent is how far it wants to stand from the installed code. Gradients move latents; the file has the whole codes nearest to
them, of those that want to move most as many as there is room for, and the installed ones elsewhere. The gradient is taken at the
whole codes and followed by the latents: the straight-through estimator of Bengio, Leonard & Courville (2013). Steps are momentum over the
root of a factored second moment, as in Adafactor (Shazeer & Stern, 2018): a row and a column of it are kept, not a matrix.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from server.diagnosis.weights import Floats
from server.requantize.codes import Codes, LinearRows

NEAREST: Final = 0.5
"""The threshold at which a latent's whole code is the nearest one."""

MOMENTUM: Final = 0.9
MEMORY: Final = 0.99
"""Decay of the mean gradient and of the mean squares, for each step."""

_TINY: Final = np.float32(1e-30)
SAMPLES_MAX: Final = 4_000_000
"""Latents that are looked at to find how far the ones with room want to go."""


@dataclass(slots=True)
class Latents:
    """The latents of a matrix, and what moves them.

    Attributes:
        values: Steps from the installed codes, shape (rows, columns).
        momentum: Mean gradient by each latent.
        row_squares: Mean squared gradient of each row.
        column_squares: Of each column.
    """

    values: Floats
    momentum: Floats
    row_squares: Floats
    column_squares: Floats

    @classmethod
    def begin(
        cls, rows: LinearRows, codes: Codes, installed: Codes, target: Floats, draws: np.random.Generator
    ) -> Self:
        """Latents whose nearest codes are the given ones, as near to the new weights as that allows.

        A code that is nearest to its new weight has that weight as its latent: what rounding left over tells the latents of a matrix
        apart, so that few of them cross a threshold at a time. Elsewhere latents are drawn between the code and the threshold on the
        weight's side.

        Args:
            rows: Scales that the codes stand for weights with.
            codes: To begin with.
            installed: Codes that devices have.
            target: The new weights.
            draws: Random numbers.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(rows.steps == 0, 0.0, (target - rows.weights(codes)) / rows.steps)
        drawn = np.float32(NEAREST) * draws.random(left.shape, np.float32) * np.sign(left)
        values = (codes - installed) + np.where(np.abs(left) < NEAREST, left, drawn)
        none = np.zeros_like(values, np.float32)
        return cls(values.astype(np.float32), none, none[:, 0].copy(), none[0].copy())

    def follow(self, gradient: Floats, rate: float, step: int) -> None:
        """Move against a gradient.

        Args:
            gradient: Of the loss by each code; overwritten.
            rate: How far a typical latent goes.
            step: How many were taken before.
        """
        self.momentum *= np.float32(MOMENTUM)
        self.momentum += np.float32(1 - MOMENTUM) * gradient
        np.square(gradient, out=gradient)
        self.row_squares = _mean(self.row_squares, gradient.mean(axis=1))
        self.column_squares = _mean(self.column_squares, gradient.mean(axis=0))
        seen = np.float32(1 - MEMORY ** (step + 1))
        by_row = np.maximum(self.row_squares / seen, _TINY)
        by_column = np.maximum(self.column_squares / seen / by_row.mean(), _TINY)
        length = np.float32(rate / (1 - MOMENTUM ** (step + 1)))
        np.multiply(self.momentum, (length / np.sqrt(by_row))[:, None], out=gradient)
        gradient /= np.sqrt(by_column)
        self.values -= gradient

    def codes(self, rows: LinearRows, installed: Codes, threshold: float) -> Codes:
        """Whole codes of the latents beyond a threshold, which is `NEAREST` or more; the installed ones of the others."""
        moves = np.where(np.abs(self.values) > threshold, np.rint(self.values), 0)
        return np.clip(installed + moves, rows.low, rows.high).astype(np.int16)

    def sample(self, every: int) -> Floats:
        """How far one in `every` latents is from its installed code."""
        return np.abs(self.values.reshape(-1)[::every])


def _mean(so_far: Floats, squares: Floats) -> Floats:
    return np.asarray(np.float32(MEMORY) * so_far + np.float32(1 - MEMORY) * squares, np.float32)


def threshold_for(latents: Iterable[Latents], room: int) -> float:
    """Beyond which about `room` latents of all matrices are, and no less than `NEAREST`."""
    known = list(latents)
    # Odd, so that it does not beat with the width of a matrix.
    every = sum(each.values.size for each in known) // SAMPLES_MAX | 1
    samples = np.concatenate([each.sample(every) for each in known])
    rank = len(samples) - 1 - room // every
    return NEAREST if rank < 0 else max(NEAREST, float(np.partition(samples, rank)[rank]))
