"""How far a model's answers lie from those of the model in floats. Pure.

An answer is one row of numbers: the vector of a sample, the scores at one position of it, or all of its values. Each kind has one measure, which
for small errors grows with their square, so that the effects of errors in different matrices can be added:

| answers | distortion of a row | a flip |
| --- | --- | --- |
| `embedding` | one less the cosine | one of its ten nearest neighbours among the other samples is none any more |
| `classes` | KL from the float model, in nats | the likeliest class is another one |
| `values` | squared error, as a share of the variance of the float model's answers | - |
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from protocol.errors import ModelFileError, RequestError
from server.scorecard.statistics import divergences

AnswerKind = Literal["embedding", "classes", "values"]

KINDS: Final[tuple[AnswerKind, ...]] = ("embedding", "classes", "values")

NEIGHBOURS: Final = 10
"""Whose loss is counted, as in recall@10 of nearest-neighbour search. One alone would take tens of thousands of samples to compare two files."""

_SUM_TOLERANCE: Final = 1e-3
_TINY: Final = 1e-30
_ROWS: Final = 1024

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says about some samples.

    Attributes:
        rows: Shape (answers, numbers of each).
        counts: Answers of each sample, in order; their sum is the number of rows.
    """

    rows: Rows
    counts: npt.NDArray[np.int64]


def answers_of(kind: AnswerKind, output: npt.NDArray[Any], mask: npt.NDArray[Any] | None) -> Answers:
    """Take one output of a model apart, sample by sample.

    Args:
        kind: What it is.
        output: Shape (samples, ..., numbers).
        mask: Which positions count: of the shape of the output's first dimensions; None for all.

    Raises:
        RequestError: The output does not have this shape.
    """
    if output.dtype.kind != "f" or output.ndim < 2:
        raise RequestError(
            f"the output has the type {output.dtype} and the shape {list(output.shape)}",
            hint="expected are floats with one entry for each sample: give another one with --output",
        )
    samples, width = len(output), output.shape[-1]
    wide = output.reshape(samples, -1, width)
    counted = np.ones(wide.shape[:2], np.bool_)
    if mask is not None and output.ndim > 2:
        if mask.shape != output.shape[:-1]:
            raise RequestError(
                f"the mask has the shape {list(mask.shape)}, the output {list(output.shape)}",
                hint="give a --mask for the positions of the output, or another --output",
            )
        counted = mask.reshape(samples, -1) != 0
        if not counted.any(axis=1).all():
            raise RequestError("the mask of a sample is 0 everywhere", hint="leave that sample out")
    if kind == "classes":
        return Answers(np.asarray(wide[counted], np.float32), counted.sum(axis=1))
    kept = wide.astype(np.float64) * counted[:, :, None]
    ones = np.ones(samples, np.int64)
    if kind == "embedding":
        return Answers((kept.sum(axis=1) / counted.sum(axis=1)[:, None]).astype(np.float32), ones)
    return Answers(kept.reshape(samples, -1).astype(np.float32), ones)


def distortions(kind: AnswerKind, reference: Answers, found: Answers) -> npt.NDArray[np.float64]:
    """Distortion of each answer.

    Args:
        kind: What the answers are.
        reference: Of the model in floats.
        found: Of the file, to the same samples.

    Raises:
        ModelFileError: An answer is no finite number, or of another shape.
    """
    if found.rows.shape != reference.rows.shape:
        raise ModelFileError(
            f"answers of the shape {list(found.rows.shape)}, the model in floats gives {list(reference.rows.shape)}"
        )
    for each in (reference, found):
        if not np.isfinite(each.rows).all():
            raise ModelFileError("the model's answers are not finite")
    if kind == "classes":
        both = (_scores(reference.rows), _scores(found.rows))
        parts = range(0, len(found.rows), _ROWS)
        return np.concatenate(
            [divergences(*(each[start : start + _ROWS] for each in both)) for start in parts]
        )
    first, second = (each.rows.astype(np.float64) for each in (reference, found))
    if kind == "embedding":
        return np.asarray(0.5 * np.square(_unit(first) - _unit(second)).sum(axis=1))
    spread = float(np.square(first - first.mean(axis=0)).sum(axis=1).mean())
    return np.asarray(np.square(first - second).sum(axis=1) / max(spread, _TINY))


def flips(kind: AnswerKind, reference: Answers, found: Answers) -> tuple[npt.NDArray[np.int64], int] | None:
    """How many decisions that are drawn from each answer are others than those of the model in floats, and of how many; None where none is drawn."""
    if kind == "classes":
        return np.not_equal(reference.rows.argmax(axis=1), found.rows.argmax(axis=1)).astype(np.int64), 1
    if kind == "embedding":
        count = min(NEIGHBOURS, len(found.rows) - 1)
        both = zip(_nearest(reference.rows, count), _nearest(found.rows, count), strict=True)
        return np.asarray([count - len(np.intersect1d(*each)) for each in both], np.int64), count
    return None


def _nearest(rows: Rows, count: int) -> npt.NDArray[np.int64]:
    """Numbers of the other rows that lie in nearly the same direction."""
    unit = _unit(rows.astype(np.float64))
    found = np.empty((len(unit), count), np.int64)
    for start in range(0, len(unit), _ROWS):
        near = unit[start : start + _ROWS] @ unit.T
        near[np.arange(len(near)), np.arange(start, start + len(near))] = -np.inf
        found[start : start + len(near)] = np.argsort(-near, axis=1, kind="stable")[:, :count]
    return found


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY))


def _scores(rows: Rows) -> Rows:
    """Logits, or the logarithms of what are probabilities already."""
    sums = rows.sum(axis=1, dtype=np.float64)
    if rows.min() >= 0 and np.abs(sums - 1).max() < _SUM_TOLERANCE:
        return np.log(np.maximum(rows, np.finfo(np.float32).tiny))
    return rows
