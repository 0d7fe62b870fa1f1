"""Rows that move in a few common directions: the basis is sent, each row's coefficients are estimated while the row is coded.

Sums over columns are numpy's, exact in 64 bits; everything else is plain integers. SPEC section 6.11.
"""

from operator import mul
from typing import Final

import numpy as np

from protocol.delta.reference.arithmetic import STEP, clamp, quotient
from protocol.delta.reference.state import Tensor
from protocol.delta.runs import GROUP_CODES, RANK_MAX, Basis

_COEFFICIENT_LIMIT: Final = 1 << 19
_VARIANCE_MIN: Final = 1 << 12
_VARIANCE_MAX: Final = 1 << 40
_NORMAL_LIMIT: Final = 1 << 39
_RIGHT_LIMIT: Final = 1 << 45
_STEP_LIMIT: Final = 1 << 24
_SWEEPS: Final = 2
_ROWS_REMEMBERED: Final = 300
_MEAN_LIMIT: Final = 16 * STEP
_MOVE_LIMIT: Final = 8 * STEP
_SEEN_LIMIT: Final = 1 << 15


class Directions:
    """A basis as the coder uses it.

    Args:
        basis: As the tables record has it.

    Attributes:
        rank: How many directions.
    """

    def __init__(self, basis: Basis) -> None:
        self.rank = basis.rank
        rows = np.frombuffer(basis.directions, np.int8).reshape(basis.rank, -1).astype(np.int64)
        # By groups: (group, direction, code).
        self._groups = np.ascontiguousarray(rows.reshape(basis.rank, -1, GROUP_CODES).transpose(1, 0, 2))
        self._gram = (self._groups @ self._groups.transpose(0, 2, 1)).tolist()
        self._columns = rows.T.tolist()
        self._forecast = np.frombuffer(basis.forecast, np.int8).reshape(-1, basis.columns).astype(np.int64)
        self._shifts = basis.prior[basis.rank :]

    @property
    def has_forecast(self) -> bool:
        """Whether an old row foretells its coefficients."""
        return len(self._forecast) > 0

    def moves(self, tensor: Tensor, column: int, new_step: int) -> list[int]:
        """Return where a group's weights are expected to have moved, in units of 2**-16 steps."""
        coefficients = np.array(tensor.coefficient[: self.rank], np.int64)
        scale = (1 << 22) // _step_in_units(tensor, new_step)
        sums = (coefficients @ self._groups[column // GROUP_CODES]) >> 6
        moves: list[int] = np.clip((sums * scale) >> 12, -_MEAN_LIMIT, _MEAN_LIMIT).tolist()
        return moves

    def at(self, tensor: Tensor, column: int) -> int:
        """Return where a weight is expected to have moved, in the tensor's unit."""
        move: int = sum(map(mul, tensor.coefficient, self._columns[column])) >> 12
        return move

    def observe(
        self, tensor: Tensor, column: int, new_step: int, mean: list[int], pull: list[int], information: int
    ) -> None:
        """Take in a group: `pull` is each outcome's score for a move, `information` their sum of Fisher information, both in 1/256."""
        step = _step_in_units(tensor, new_step)
        information = information // len(pull) + 1
        weight = clamp(information * (1 << 18) // (step * step), 1, 1 << 20)
        force = np.array(pull, np.int64) * STEP
        moved = np.sign(force) * (abs(force) // information)
        moved = np.array(mean, np.int64) + np.clip(moved, -_MOVE_LIMIT, _MOVE_LIMIT)
        seen = np.clip((moved * step) >> 16, -_SEEN_LIMIT, _SEEN_LIMIT)
        group = column // GROUP_CODES
        sums = (self._groups[group] @ seen).tolist()
        right, normal = tensor.right, tensor.normal
        for k, (total, row) in enumerate(zip(sums, self._gram[group], strict=True)):
            right[k] = clamp(right[k] + weight * total, -_RIGHT_LIMIT, _RIGHT_LIMIT)
            at = k * RANK_MAX
            sums = [
                known + weight * product
                for known, product in zip(normal[at : at + self.rank], row, strict=True)
            ]
            if min(sums) < -_NORMAL_LIMIT or max(sums) > _NORMAL_LIMIT:
                sums = [clamp(known, -_NORMAL_LIMIT, _NORMAL_LIMIT) for known in sums]
            normal[at : at + self.rank] = sums
        self._solve(tensor)

    def _solve(self, tensor: Tensor) -> None:
        """Least squares for the row's coefficients, from what it has shown and what was expected: sweeps of Gauss-Seidel."""
        coefficient = tensor.coefficient
        rows = []
        for k in range(self.rank):
            ridge = _ridge(tensor, k)
            row = tensor.normal[k * RANK_MAX : k * RANK_MAX + self.rank]
            rows.append((k, row, tensor.right[k] * 4096 + ridge * tensor.expected[k], row[k], row[k] + ridge))
        for _ in range(_SWEEPS):
            for k, row, known, own, divisor in rows:
                total = known - sum(map(mul, row, coefficient)) + own * coefficient[k]
                coefficient[k] = clamp(quotient(total, divisor), -_COEFFICIENT_LIMIT, _COEFFICIENT_LIMIT)

    def start_row(self, tensor: Tensor, old_row: list[int] | None) -> None:
        """Learn from the row that ended, and start the next.

        Args:
            tensor: Its row is that of the next row already.
            old_row: Its weights in the base in the tensor's unit, where they shall foretell the coefficients.
        """
        forecasts = self._foretell(old_row)
        for k in range(self.rank):
            if tensor.row > 0:
                self._learn_row(tensor, k)
            tensor.forecast[k] = forecasts[k]
            start = clamp(forecasts[k] + tensor.mean[k], -_COEFFICIENT_LIMIT, _COEFFICIENT_LIMIT)
            tensor.coefficient[k] = tensor.expected[k] = start
            tensor.right[k] = 0
            tensor.normal[k * RANK_MAX : k * RANK_MAX + self.rank] = [0] * self.rank

    def _foretell(self, old_row: list[int] | None) -> list[int]:
        if old_row is None:
            return [0] * self.rank
        sums = (self._forecast @ np.array(old_row, np.int64)).tolist()
        return [
            clamp(total >> shift, -_COEFFICIENT_LIMIT, _COEFFICIENT_LIMIT)
            for total, shift in zip(sums, self._shifts, strict=True)
        ]

    @staticmethod
    def _learn_row(tensor: Tensor, k: int) -> None:
        rows = min(tensor.row + 2, _ROWS_REMEMBERED)
        miss = tensor.coefficient[k] - tensor.expected[k]
        doubt = (1 << 50) // (tensor.normal[k * RANK_MAX + k] + _ridge(tensor, k))
        variance = tensor.variance[k] + quotient(miss * miss + doubt - tensor.variance[k], rows)
        tensor.variance[k] = clamp(variance, _VARIANCE_MIN, _VARIANCE_MAX)
        tensor.mean[k] += quotient(tensor.coefficient[k] - tensor.forecast[k] - tensor.mean[k], rows)


def _ridge(tensor: Tensor, k: int) -> int:
    return (1 << 50) // clamp(tensor.variance[k], _VARIANCE_MIN, _VARIANCE_MAX)


def _step_in_units(tensor: Tensor, step: int) -> int:
    return clamp(tensor.in_units(abs(step)), 1, _STEP_LIMIT)
