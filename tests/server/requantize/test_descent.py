"""The descent is held against brute force where that is possible, and against its promises everywhere else."""

import itertools

import numpy as np
import pytest

from protocol.delta.layouts import LAYOUTS
from protocol.tensors import Layout
from server.diagnosis.weights import Floats, read_piece
from server.requantize.codes import LINEAR_LAYOUTS, CodedRows, Codes, code_range
from server.requantize.descent import Metric, Price, single_gains
from server.requantize.descent import descend as descend_from


def _rows(rng: np.random.Generator, layout: Layout, rows: int, columns: int) -> CodedRows:
    """Random codes with scales of one size."""
    row = LAYOUTS[layout]
    blocks = rows * columns // row.codes.count
    fields = row.split(rng.integers(0, 256, (blocks, row.block_bytes), np.uint8))
    for name in ("d", "m", "dmin"):
        if name in fields:
            fields[name] = rng.normal(0.05, 0.01, fields[name].shape).astype(np.float16).view(np.uint16)
    return CodedRows.read(layout, row.join(fields).tobytes(), columns)


def _metric(rng: np.random.Generator, rows: int, columns: int, *, correlated: bool = True) -> Metric:
    seen = rng.normal(0.0, 1.0, (4 * columns, columns))
    if correlated:
        seen = seen @ rng.normal(0.0, 1.0, (columns, columns)) / np.sqrt(columns)
    inputs = seen.T @ seen / len(seen) if correlated else np.diag(rng.uniform(0.5, 2.0, columns))
    return Metric(
        inputs.astype(np.float32),
        rng.uniform(0.5, 2.0, rows).astype(np.float32),
        rng.uniform(0.0, 0.2, rows).astype(np.float32),
    )


def _target(rng: np.random.Generator, rows: CodedRows) -> Floats:
    noise = rng.normal(0.0, 0.8, rows.codes.shape) * np.abs(rows.steps)
    return np.asarray(rows.weights(rows.codes) + noise, np.float32)


def descend(
    rows: CodedRows, target: Floats, start: Codes, metric: Metric, price: Price, pairs: int = 0
) -> Codes:
    """From the gradient of an error that is known; the one that is reached must be that of the error that is left."""
    codes, reached = descend_from(
        rows, start, metric.gradient(target - rows.weights(start)), metric, price, pairs
    )
    left = metric.gradient(target - rows.weights(codes))
    np.testing.assert_allclose(reached, left, rtol=1e-3, atol=1e-4 * float(np.abs(target).max()))
    return codes


def _objective(rows: CodedRows, target: Floats, codes: Codes, metric: Metric, price: Price) -> float:
    error = (target - rows.weights(codes)).astype(np.float64)
    quadratic = np.einsum("ij,jk,ik->i", error, metric.inputs.astype(np.float64), error) * metric.outputs
    quadratic += np.square(error).sum(axis=1) * metric.lookups
    return float(quadratic.sum()) / 2 + price.of(codes, rows.codes)


def test_every_layout_with_linear_codes_is_taken_apart_and_put_together() -> None:
    rng = np.random.default_rng(1)
    assert {Layout.Q4_0, Layout.Q8_0, Layout.Q2_K, Layout.Q6_K} <= LINEAR_LAYOUTS
    for layout in sorted(LINEAR_LAYOUTS):
        rows = _rows(rng, layout, 4, 512)
        data = rows.joined(rows.codes)
        assert np.array_equal(
            rows.weights(rows.codes).reshape(-1), read_piece(layout, data).values.reshape(-1)
        ), layout
        possible, has_scale = np.clip(rows.codes, rows.low, rows.high), rows.steps != 0
        assert np.array_equal(rows.nearest(rows.weights(rows.codes))[has_scale], possible[has_scale]), layout
        moved = np.clip(rows.codes + 1, rows.low, rows.high)
        again = CodedRows.read(layout, rows.joined(moved), 512)
        assert np.array_equal(again.codes, moved), layout
        assert np.array_equal(again.steps, rows.steps), layout


def test_inputs_that_are_independent_are_solved_exactly() -> None:
    """Brute force over all codes of rows of 32 weights is possible code by code, when nothing ties them together."""
    rng = np.random.default_rng(2)
    rows, price = _rows(rng, Layout.Q4_0, 6, 32), Price(first=1e-3, further=3e-4)
    metric, target = _metric(rng, 6, 32, correlated=False), _target(rng, rows)
    chosen = descend(rows, target, rows.codes, metric, price)
    weight = np.outer(metric.outputs, np.diagonal(metric.inputs)) + metric.lookups[:, None]
    costs = []
    for code in range(rows.low, rows.high + 1):
        error = target - (rows.steps * code + rows.offsets)
        distance = np.abs(code - rows.codes)
        costs.append(
            weight * error**2 / 2 + price.first * (distance > 0) + price.further * np.maximum(distance - 1, 0)
        )
    best = np.min(costs, axis=0)
    own = np.take_along_axis(np.array(costs), (chosen - rows.low)[None], 0)[0]
    assert own == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_no_single_step_and_no_code_of_its_own_is_better() -> None:
    rng = np.random.default_rng(3)
    rows, price = _rows(rng, Layout.Q4_0, 3, 32), Price(first=2e-3, further=5e-4)
    metric, target = _metric(rng, 3, 32), _target(rng, rows)
    chosen = descend(rows, target, rows.codes, metric, price)
    reached = _objective(rows, target, chosen, metric, price)
    for row, column, step in itertools.product(range(3), range(32), (-1, 1)):
        other = chosen.copy()
        other[row, column] += step
        if rows.low <= other[row, column] <= rows.high:
            assert _objective(rows, target, other, metric, price) >= reached - 1e-6


@pytest.mark.parametrize("layout", [Layout.Q4_0, Layout.Q5_1, Layout.Q8_0, Layout.Q4_K, Layout.Q6_K])
def test_the_objective_never_rises_and_a_lower_price_reaches_less(layout: Layout) -> None:
    rng = np.random.default_rng(4)
    rows = _rows(rng, layout, 5, 256)
    metric, target = _metric(rng, 5, 256), _target(rng, rows)
    losses, counts = [], []
    for each in (1e9, 1e-2, 1e-4, 0.0):
        price = Price(first=each, further=each / 4)
        codes = descend(rows, target, rows.codes, metric, price)
        assert _objective(rows, target, codes, metric, price) <= _objective(
            rows, target, rows.codes, metric, price
        ) * (1 + 1e-6)
        losses.append(_objective(rows, target, codes, metric, Price(first=0, further=0)))
        counts.append(int(np.count_nonzero(codes != rows.codes)))
    assert counts[0] == 0
    assert all(fewer < 1.05 * more + 1 for fewer, more in itertools.pairwise(counts))
    # Single steps end in different corners; a cheaper one may be a little worse.
    assert all(cheaper < 1.05 * dearer for dearer, cheaper in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_codes_stay_in_their_range_however_far_the_target_lies() -> None:
    rng = np.random.default_rng(5)
    for layout in (Layout.Q4_0, Layout.Q8_0, Layout.Q3_K):
        rows = _rows(rng, layout, 2, 256)
        target = rng.choice([-1e3, 1e3], rows.codes.shape).astype(np.float32)
        codes = descend(rows, target, rows.codes, _metric(rng, 2, 256), Price(first=0, further=0))
        low, high = code_range(layout)
        moved = codes != rows.codes
        assert moved.any()
        assert codes[moved].min() >= low
        assert codes[moved].max() <= high


def test_a_start_of_its_own_is_priced_by_its_distance_to_the_installed_codes() -> None:
    rng = np.random.default_rng(6)
    rows = _rows(rng, Layout.Q4_0, 4, 64)
    start = np.clip(rows.codes + 1, rows.low, rows.high).astype(np.int16)
    dear = Price(first=1e6, further=1e6)
    codes = descend(rows, rows.weights(rows.codes), start, _metric(rng, 4, 64), dear)
    assert np.array_equal(codes, rows.codes)


def test_two_steps_together_reach_what_single_ones_do_not() -> None:
    """Two inputs that nearly always agree: to raise one and lower the other costs little, each alone much."""
    rng = np.random.default_rng(9)
    rows = _rows(rng, Layout.Q4_0, 16, 64)
    inputs = np.kron(np.eye(32), np.array([[1.0, 0.97], [0.97, 1.0]])).astype(np.float32)
    metric = Metric(inputs, np.ones(16, np.float32), np.zeros(16, np.float32))
    target, price = _target(rng, rows), Price(first=1e-6, further=1e-6)
    single, pairs = (descend(rows, target, rows.codes, metric, price, each) for each in (0, 8))
    ends = [_objective(rows, target, codes, metric, price) for codes in (single, pairs)]
    assert ends[1] < ends[0]


def test_rows_do_not_depend_on_what_they_are_worked_on_with() -> None:
    rng = np.random.default_rng(7)
    rows = _rows(rng, Layout.Q4_0, 40, 96)
    metric, target = _metric(rng, 40, 96), _target(rng, rows)
    price = Price(first=1e-4, further=2e-5)
    together = descend(rows, target, rows.codes, metric, price)
    for row in (0, 17, 39):
        part = slice(row, row + 1)
        data = rows.joined(rows.codes)[row * 96 // 32 * 18 : (row + 1) * 96 // 32 * 18]
        alone = CodedRows.read(Layout.Q4_0, data, 96)
        assert np.array_equal(
            descend(alone, target[part], alone.codes, metric.part(part), price)[0], together[row]
        )


def test_single_gains_are_what_a_step_gains() -> None:
    rng = np.random.default_rng(8)
    rows = _rows(rng, Layout.Q4_0, 2, 32)
    metric, target = _metric(rng, 2, 32), _target(rng, rows)
    free = Price(first=0, further=0)
    gains = single_gains(rows, metric.gradient(target - rows.weights(rows.codes)), metric)
    before = _objective(rows, target, rows.codes, metric, free)
    for row, column in ((0, 3), (1, 30)):
        after = []
        for step in (-1, 1):
            codes = rows.codes.copy()
            codes[row, column] += step
            after.append(_objective(rows, target, codes, metric, free))
        assert before - min(after) == pytest.approx(gains[row, column], rel=1e-3, abs=1e-7)
