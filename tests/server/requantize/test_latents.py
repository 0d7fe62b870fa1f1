"""Latent codes: where they begin, how they move, and how many of them the file follows."""

import numpy as np
import pytest

from server.diagnosis.weights import Floats
from server.requantize.codes import Codes, LinearRows
from server.requantize.latents import NEAREST, Latents, threshold_for

ROWS, COLUMNS = 64, 96


def _rows(seed: int) -> LinearRows:
    draws = np.random.default_rng(seed)
    steps = np.repeat(draws.uniform(0.5, 2, (ROWS, COLUMNS // 32)), 32, 1).astype(np.float32)
    steps[3, :32] = 0  # a block without a scale
    codes = draws.integers(0, 16, (ROWS, COLUMNS)).astype(np.int16)
    return LinearRows(codes, steps, -8 * steps, 0, 15)


def _target(rows: LinearRows, seed: int, spread: float) -> Floats:
    noise = np.random.default_rng(seed).normal(0, spread, rows.codes.shape)
    return np.asarray(rows.weights(rows.codes) + rows.steps * noise, np.float32)


def _begun(rows: LinearRows, codes: Codes, target: Floats) -> Latents:
    return Latents.begin(rows, codes, rows.codes, target, np.random.default_rng(1))


def test_latents_begin_with_the_codes_that_are_given_and_with_the_new_weights_where_these_agree() -> None:
    rows = _rows(1)
    target = _target(rows, 2, 1.0)
    nearest = rows.nearest(target)
    for codes in (rows.codes, nearest):
        latents = _begun(rows, codes, target)
        assert np.array_equal(latents.codes(rows, rows.codes, NEAREST), codes)
        wanted = (target - rows.weights(rows.codes)) / np.where(rows.steps == 0, 1, rows.steps)
        agree = (codes == nearest) & (nearest > rows.low) & (nearest < rows.high) & (rows.steps != 0)
        assert agree.any()
        assert np.allclose(latents.values[agree], wanted[agree], atol=1e-3)
        assert not latents.values[rows.steps == 0].any()


def test_followed_gradients_bring_a_layer_nearer_than_rounding_does() -> None:
    rows = _rows(3)
    target = _target(rows, 4, 0.3)
    inputs = np.random.default_rng(5).normal(size=(40, COLUMNS)).astype(np.float32)  # fewer than columns
    latents = _begun(rows, rows.nearest(target), target)

    def loss() -> float:
        error = rows.weights(latents.codes(rows, rows.codes, NEAREST)) - target
        return float(np.square(error @ inputs.T).mean())

    rounded = loss()
    for step in range(100):
        error = rows.weights(latents.codes(rows, rows.codes, NEAREST)) - target
        gradient = np.asarray(error @ inputs.T @ inputs * rows.steps, np.float32)
        latents.follow(gradient, 0.002 * (1 - step / 100), step)
    assert loss() < 0.7 * rounded


def test_codes_stay_in_their_range_however_far_latents_go() -> None:
    rows = _rows(6)
    latents = _begun(rows, rows.codes, _target(rows, 7, 0.1))
    for step in range(50):
        latents.follow(np.full_like(latents.values, -1.0), 1.0, step)
    assert np.array_equal(latents.codes(rows, rows.codes, NEAREST), np.full_like(rows.codes, rows.high))


@pytest.mark.parametrize("room", [0, 500, 2_000, 10**9])
def test_so_many_codes_move_as_there_is_room_for_and_they_are_the_ones_that_want_to_most(room: int) -> None:
    draws = np.random.default_rng(8)
    codes = np.full((400, 640), 8, np.int16)
    rows = LinearRows(codes, np.ones(codes.shape, np.float32), np.zeros(codes.shape, np.float32), 0, 15)
    latents = _begun(rows, codes, rows.weights(codes))
    latents.values[:] = draws.normal(0, 0.3, codes.shape)
    threshold = threshold_for([latents], room)
    moved = latents.codes(rows, codes, threshold) != codes
    beyond = np.abs(latents.values) > NEAREST
    assert abs(int(moved.sum()) - min(room, int(beyond.sum()))) <= 1
    assert not (moved & ~beyond).any()
    if moved.any():
        assert np.abs(latents.values[moved]).min() >= np.abs(latents.values[~moved]).max()
