"""Fits the basis of a tall tensor: in which few directions its rows have moved, and what an old row says about how far.

Only the writer comes here; floating point is allowed, because what it finds is sent. The directions are the leading
eigenvectors of the rows' differences, the forecast is a ridge regression of their coefficients on the old rows.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS
from protocol.delta.runs import (
    BASIS_BYTES_MAX,
    DIVISORS,
    FORECAST_SHIFT_MAX,
    GROUP_CODES,
    RANK_MAX,
    VARIANCE_BITS_MAX,
    VARIANCE_BITS_MIN,
    Basis,
)
from protocol.tensors.regions import Layout, ReadAt, Region

ROWS_PER_COLUMN_MIN = 8
"""A basis pays for itself in tensors with that many rows for each column: embeddings."""

COLUMNS_MAX = 1024
"""Wider tensors would need more side information than they save, and a Gram matrix of more than 8 MiB."""

_ROWS_MAX = 16_384  # rows that are looked at; evenly spread pieces of the tensor
_PIECE_ROWS = 1024
_RIDGE = 1e-5
COEFFICIENT_UNIT = 4096
"""Of the coder's coefficients: 1."""

_WEIGHT_MAX = 10.0  # of a row with tiny steps, relative to the mean

Matrix = npt.NDArray[np.float32]


def is_tall(region: Region) -> bool:
    """Tell whether a basis may pay for a tensor."""
    layout = LAYOUTS[region.layout]
    if region.layout not in DIVISORS or not region.row_bytes or region.row_bytes % layout.block_bytes:
        return False
    columns = region.row_bytes // layout.block_bytes * layout.codes.count
    rows = region.length // region.row_bytes
    return columns % GROUP_CODES == 0 and columns <= COLUMNS_MAX and rows >= ROWS_PER_COLUMN_MIN * columns


def fit_basis(base: ReadAt, new: ReadAt, old_region: Region, region: Region) -> tuple[Basis, float]:
    """Return the basis of a tall tensor and the share of the update's energy that it explains.

    Args:
        base: The base.
        new: The new file.
        old_region: The tensor in the base, with rows of the same length.
        region: The tensor in the new file; `is_tall`.
    """
    with single_thread():
        return _fit_basis(base, new, old_region, region)


def single_thread() -> contextlib.AbstractContextManager[Any]:
    """Keep linear algebra to this thread: its idle threads spin, which costs more processor time than they save."""
    try:
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - only writers need it, so only they have to have it
    except ImportError:
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


def _fit_basis(base: ReadAt, new: ReadAt, old_region: Region, region: Region) -> tuple[Basis, float]:
    layout = LAYOUTS[region.layout]
    columns = region.row_bytes // layout.block_bytes * layout.codes.count
    rank = min(RANK_MAX, BASIS_BYTES_MAX // 2 // columns)
    gram = np.zeros((columns, columns), np.float64)
    for _, moved, step in _pieces(base, new, old_region, region):
        scaled = moved / step[:, None]
        gram += scaled.T @ scaled
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank].T
    directions = np.rint(vectors / np.abs(vectors).max(axis=1, keepdims=True) * 127).astype(np.int8)
    fit = _Forecast(directions, _unit(new, region))
    for old, moved, step in _pieces(base, new, old_region, region):
        fit.add(old, moved, step)
    forecast, prior, explained = fit.solve()
    return Basis(columns, rank, directions.tobytes(), forecast.tobytes(), prior), explained


class _Forecast:
    """Normal equations of the regression."""

    def __init__(self, directions: npt.NDArray[np.int8], unit: float) -> None:
        self._directions = directions.astype(np.float64)
        self._inverse = np.linalg.inv(self._directions @ self._directions.T) @ self._directions
        self._unit = unit
        rank, columns = directions.shape
        self._left = np.zeros((columns, columns))
        self._right = np.zeros((columns, rank))
        self._energy = self._rest = 0.0
        self._sum = np.zeros(rank)
        self._squares = np.zeros((rank, rank))
        self._rows = 0
        self._old_sum = np.zeros(columns)
        self._cross = np.zeros((columns, rank))
        self._old_squares = np.zeros((columns, columns))

    def add(self, old: Matrix, moved: Matrix, step: Matrix) -> None:
        weights, changes = old / self._unit, moved / self._unit
        coefficients = changes @ self._inverse.T
        self._energy += float((changes**2).sum())
        self._rest += float(((changes - coefficients @ self._directions) ** 2).sum())
        coefficients *= COEFFICIENT_UNIT
        inverse_step = 1 / step
        row_weight = np.minimum(inverse_step / inverse_step.mean(), _WEIGHT_MAX)[:, None]
        self._left += (weights * row_weight).T @ weights
        self._right += (weights * row_weight).T @ coefficients
        self._sum += coefficients.sum(axis=0)
        self._squares += coefficients.T @ coefficients
        self._cross += weights.T @ coefficients
        self._old_squares += weights.T @ weights
        self._old_sum += weights.sum(axis=0)
        self._rows += len(old)

    def solve(self) -> tuple[npt.NDArray[np.int8], bytes, float]:
        """Return forecast, prior, and the share of energy that the directions explain."""
        columns = len(self._left)
        ridge = np.eye(columns) * (np.trace(self._left) / columns * _RIDGE + 1e-30)
        slopes = np.linalg.solve(self._left + ridge, self._right)
        largest = np.abs(slopes).max(axis=0) + 1e-30
        shifts = np.clip(np.floor(np.log2(127 / largest)), 0, FORECAST_SHIFT_MAX).astype(np.int64)
        rounded = np.clip(np.rint(slopes * 2.0**shifts), -127, 127).astype(np.int8)
        kept = rounded / 2.0**shifts
        # The mean square of what is missed, from sums alone; its mean is learned by the coder.
        squares = (
            np.diag(self._squares)
            - 2 * (kept * self._cross).sum(axis=0)
            + np.einsum("ik,ij,jk->k", kept, self._old_squares, kept)
        )
        mean = (self._sum - self._old_sum @ kept) / self._rows
        variance = np.maximum(squares / self._rows - mean**2, 1.0)
        bits = np.clip(np.rint(np.log2(variance)), VARIANCE_BITS_MIN, VARIANCE_BITS_MAX).astype(np.uint8)
        explained = 1 - self._rest / self._energy if self._energy else 0.0
        return rounded.T.copy(), bits.tobytes() + shifts.astype(np.uint8).tobytes(), explained


def _pieces(
    base: ReadAt, new: ReadAt, old_region: Region, region: Region
) -> Iterator[tuple[Matrix, Matrix, Matrix]]:
    """Yield old weights, changes, and mean steps of evenly spread pieces of rows."""
    rows = min(region.length, old_region.length) // region.row_bytes
    pieces = max(1, min(_ROWS_MAX, rows) // _PIECE_ROWS)
    for index in range(pieces):
        first = rows * index // pieces
        size = min(_PIECE_ROWS, rows - first) * region.row_bytes
        offset = first * region.row_bytes
        old, _ = weights_of(region.layout, base.read_at(old_region.offset + offset, size), region.row_bytes)
        now, steps = weights_of(region.layout, new.read_at(region.offset + offset, size), region.row_bytes)
        yield old, now - old, np.maximum(steps.mean(axis=1), 1e-9)


def weights_of(name: Layout, data: bytes, row_bytes: int) -> tuple[Matrix, Matrix]:
    """Return the weights of whole rows, shape (rows, columns), and the magnitudes of their blocks' scales."""
    layout = LAYOUTS[name]
    fields = layout.split(np.frombuffer(data, np.uint8).reshape(-1, layout.block_bytes))
    codes = (
        fields["codes"].view(np.int8) if layout.is_signed else fields["codes"].astype(np.int16) - layout.zero
    )
    # Infinite and undefined scales say nothing about where weights went.
    scales = np.nan_to_num(fields["d"].view(np.float16).astype(np.float32), posinf=0, neginf=0)
    rows = len(data) // row_bytes
    return (codes * scales).reshape(rows, -1), np.abs(scales).reshape(rows, -1)


def _unit(new: ReadAt, region: Region) -> float:
    """The coder's unit of weights: the power of two of which the tensor's first step has 256 to 512."""
    _, steps = weights_of(region.layout, new.read_at(region.offset, region.row_bytes), region.row_bytes)
    first = float(steps.reshape(-1)[0]) or float(steps.mean()) or 1.0
    # The coder measures steps and weights multiplied by the divisor, both alike; units follow the product.
    factor = DIVISORS[region.layout]
    return 2.0 ** (math.floor(math.log2(first * factor)) - 8) / factor
