"""Scales that move are held against brute force where that is possible, and against their promises everywhere else."""

import numpy as np
import pytest

from protocol.delta.layouts import LAYOUTS
from protocol.delta.modelling import lattice_scales
from protocol.delta.runs import DIVISORS
from protocol.tensors import Layout
from server.diagnosis.weights import Floats
from server.requantize.codes import CodedRows, Codes
from server.requantize.descent import Metric, Price, descend
from server.requantize.scales import (
    SCALED_LAYOUTS,
    changed_scales,
    descend_with_scales,
    move_scales,
    within_reach,
)

_PRICES = (1e-1, 1e-3, 1e-5, 0.0)


def _rows(
    rng: np.random.Generator, layout: Layout, rows: int, columns: int, *, on_lattice: bool = True
) -> CodedRows:
    """Random codes, scales of one size and either sign, and a block without a scale."""
    row = LAYOUTS[layout]
    blocks = rows * columns // row.codes.count
    fields = row.split(rng.integers(0, 256, (blocks, row.block_bytes), np.uint8))
    scales = np.flatnonzero(lattice_scales(DIVISORS[layout])) if on_lattice else np.arange(0x7C00)
    around = np.abs(rng.normal(0.05, 0.01, blocks)).astype(np.float16).view(np.uint16)
    halves = scales[np.searchsorted(scales, around)] | rng.choice([0, 0x8000], blocks)
    halves[0] = 0
    fields["d"] = halves.astype(np.uint16).reshape(fields["d"].shape)
    return CodedRows.read(layout, row.join(fields).tobytes(), columns)


def _metric(rng: np.random.Generator, rows: int, columns: int) -> Metric:
    seen = rng.normal(0.0, 1.0, (4 * columns, columns)) @ rng.normal(0.0, 1.0, (columns, columns))
    return Metric(
        (seen.T @ seen / (len(seen) * columns)).astype(np.float32),
        rng.uniform(0.5, 2.0, rows).astype(np.float32),
        rng.uniform(0.0, 0.2, rows).astype(np.float32),
    )


def _target(rng: np.random.Generator, rows: CodedRows, noise: float = 0.8) -> Floats:
    moved = rng.normal(0.0, noise, rows.codes.shape) * np.abs(rows.steps)
    return np.asarray(rows.weights(rows.codes) + moved, np.float32)


def _price(bit: float) -> Price:
    return Price(first=9 * bit, further=2 * bit, scale=10 * bit)


def _halves(rows: CodedRows) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return rows.fields["d"].view(np.uint16).reshape(-1)


def _objective(
    installed: CodedRows, rows: CodedRows, codes: Codes, target: Floats, metric: Metric, price: Price
) -> float:
    error = (target - rows.weights(codes)).astype(np.float64)
    quadratic = np.einsum("ij,jk,ik->i", error, metric.inputs.astype(np.float64), error) * metric.outputs
    quadratic += np.square(error).sum(axis=1) * metric.lookups
    assert price.scale is not None
    sent = price.of(codes, installed.codes) + price.scale * changed_scales(rows, installed)
    return float(quadratic.sum()) / 2 + sent


@pytest.mark.parametrize("layout", sorted(SCALED_LAYOUTS))
@pytest.mark.parametrize("on_lattice", [True, False])
def test_the_objective_never_rises_and_is_below_that_of_codes_alone(
    layout: Layout, *, on_lattice: bool
) -> None:
    rng = np.random.default_rng(1)
    rows = _rows(rng, layout, 12, 128, on_lattice=on_lattice)
    metric, target = _metric(rng, 12, 128), _target(rng, rows)
    gradient = metric.gradient(target - rows.weights(rows.codes))
    for bit in _PRICES:
        price = _price(bit)
        before = _objective(rows, rows, rows.codes, target, metric, price)
        scaled, moved = move_scales(rows, rows, rows.codes, gradient, metric, 10 * bit)
        assert _objective(rows, scaled, rows.codes, target, metric, price) <= before * (1 + 1e-6)
        np.testing.assert_allclose(
            moved, metric.gradient(target - scaled.weights(rows.codes)), rtol=1e-3, atol=1e-4
        )
        chosen, codes, reached = descend_with_scales(rows, rows, rows.codes, gradient, metric, price, 4)
        alone, _ = descend(rows, rows.codes, gradient, metric, price, 4)
        both = _objective(rows, chosen, codes, target, metric, price)
        assert both <= before * (1 + 1e-6)
        assert both <= _objective(rows, rows, alone, target, metric, price) * 1.01  # another corner
        np.testing.assert_allclose(
            reached, metric.gradient(target - chosen.weights(codes)), rtol=1e-3, atol=1e-4
        )
    assert changed_scales(chosen, rows) > 20  # for nothing
    assert both < 0.99 * _objective(rows, rows, alone, target, metric, price)


def test_of_one_block_the_best_scale_within_reach_is_found() -> None:
    rng = np.random.default_rng(2)
    rows = _rows(rng, Layout.Q4_0, 40, 32)
    metric, target, price = _metric(rng, 40, 32), _target(rng, rows, 0.2), _price(3e-6)
    gradient = metric.gradient(target - rows.weights(rows.codes))
    chosen, _ = move_scales(rows, rows, rows.codes, gradient, metric, price.scale or 0.0)
    ladder = np.flatnonzero(lattice_scales(DIVISORS[Layout.Q4_0])).astype(np.uint16)
    assert 10 < changed_scales(chosen, rows) < 39
    for row in range(40):
        part = slice(row, row + 1)
        one = CodedRows.read(Layout.Q4_0, rows.joined(rows.codes)[18 * row : 18 * (row + 1)], 32)
        sign, place = _halves(one) & 0x8000, np.searchsorted(ladder, _halves(one) & 0x7FFF)[0]
        costs = [
            _objective(one, other, one.codes, target[part], metric.part(part), price)
            for rung in range(max(1, place - 20), place + 21)
            if within_reach(one, other := one.with_scales(ladder[rung] | sign)) is not one or rung == place
        ]
        own = CodedRows.read(Layout.Q4_0, chosen.joined(rows.codes)[18 * row : 18 * (row + 1)], 32)
        best = _objective(one, own, one.codes, target[part], metric.part(part), price)
        if place:
            assert best == pytest.approx(min(costs), rel=1e-4)


@pytest.mark.parametrize("layout", sorted(SCALED_LAYOUTS))
def test_scales_stay_on_their_lattice_and_where_the_coder_expects_the_installed_codes(layout: Layout) -> None:
    rng = np.random.default_rng(3)
    rows = _rows(rng, layout, 8, 96)
    metric, target = _metric(rng, 8, 96), _target(rng, rows, 4.0)
    gradient = metric.gradient(target - rows.weights(rows.codes))
    chosen, _ = move_scales(rows, rows, rows.codes, gradient, metric, 0.0)
    moved = _halves(chosen) != _halves(rows)
    assert moved.sum() > 15
    assert lattice_scales(DIVISORS[layout])[_halves(chosen) & 0x7FFF].all()
    assert not ((_halves(chosen) ^ _halves(rows)) & 0x8000).any()
    assert _halves(chosen)[0] == _halves(rows)[0] == 0
    largest = 1 << (LAYOUTS[layout].codes.width - 1)
    old, new = (each.view(np.float16)[moved].astype(np.float64) for each in (_halves(rows), _halves(chosen)))
    assert (np.abs(largest * (old / new - 1)) < 0.5).all()
    again = CodedRows.read(layout, chosen.joined(rows.codes), 96)
    assert np.array_equal(again.codes, rows.codes)
    assert np.array_equal(again.steps, chosen.steps)


def test_where_nothing_is_worth_it_every_byte_stays_and_what_has_moved_goes_back() -> None:
    rng = np.random.default_rng(4)
    rows = _rows(rng, Layout.Q4_0, 8, 64)
    metric, target, dear = _metric(rng, 8, 64), _target(rng, rows), _price(1e6)
    gradient = metric.gradient(target - rows.weights(rows.codes))
    chosen, codes, _ = descend_with_scales(rows, rows, rows.codes, gradient, metric, dear)
    assert chosen.joined(codes) == rows.joined(rows.codes)
    away, codes, gradient = descend_with_scales(rows, rows, rows.codes, gradient, metric, _price(0.0))
    assert changed_scales(away, rows) > 5
    back, codes, _ = descend_with_scales(rows, away, codes, gradient, metric, dear)
    assert back.joined(codes) == rows.joined(rows.codes)


def test_a_start_brings_the_scales_that_a_move_leads_to_and_no_others() -> None:
    rng = np.random.default_rng(5)
    rows = _rows(rng, Layout.Q4_0, 2, 96)
    halves = _halves(rows).copy()
    ladder = np.flatnonzero(lattice_scales(DIVISORS[Layout.Q4_0]))
    place = np.searchsorted(ladder, halves & 0x7FFF)
    wanted = halves.copy()
    wanted[1] = ladder[place[1] + 2] | halves[1] & 0x8000  # near
    wanted[2] = ladder[place[2] + 40] | halves[2] & 0x8000  # a third of the scale away
    wanted[3] = halves[3] ^ 0x8000  # another sign
    wanted[4] = halves[4] + 1  # not on the lattice
    wanted[5] = 0x7C00  # infinite
    begun = within_reach(rows, rows.with_scales(wanted))
    assert _halves(begun)[1] == wanted[1]
    assert changed_scales(begun, rows) == 1
    assert within_reach(rows, rows) is rows


def test_rows_do_not_depend_on_what_they_are_worked_on_with() -> None:
    rng = np.random.default_rng(6)
    rows = _rows(rng, Layout.Q4_0, 24, 64)
    metric, target, price = _metric(rng, 24, 64), _target(rng, rows), _price(1e-4)
    gradient = metric.gradient(target - rows.weights(rows.codes))
    chosen, codes, _ = descend_with_scales(rows, rows, rows.codes, gradient, metric, price)
    together = chosen.joined(codes)
    for row in (0, 11, 23):
        part, size = slice(row, row + 1), 2 * 18
        alone = CodedRows.read(Layout.Q4_0, rows.joined(rows.codes)[size * row : size * (row + 1)], 64)
        own, codes, _ = descend_with_scales(
            alone, alone, alone.codes, gradient[part], metric.part(part), price
        )
        assert own.joined(codes) == together[size * row : size * (row + 1)]
