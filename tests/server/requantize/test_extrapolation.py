"""Extrapolation that is learned: what factors do to weights, that following a gradient finds them, and files that are chosen with them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gguf_files import read_stored, write_gguf
from protocol.errors import RequestError
from server.diagnosis.weights import Floats
from server.requantize.calibration import Calibration, calibrate
from server.requantize.choice import Chosen, choose
from server.requantize.correction import measure_divergence
from server.requantize.extrapolation import Factors, Fit
from server.requantize.settings import Settings
from server.requantize.weighing import delta_bytes
from tests.models import write_language_model
from tests.server.requantize.samples import TYPES, choose_in, quantized, quiet, tokens

ROWS, COLUMNS = 48, 32


def test_factors_are_those_of_the_matrix_a_row_and_a_column_added_up() -> None:
    draws = np.random.default_rng(1)
    one = Factors(draws.normal(size=1 + ROWS + COLUMNS).astype(np.float32), ROWS)
    other = Factors(draws.normal(size=1 + ROWS + COLUMNS).astype(np.float32), ROWS)
    both = one.plus(other, 2.0)
    part = slice(5, 9)
    assert one.of_rows(part).shape == (4, COLUMNS)
    assert one.of_rows(part)[1, 3] == pytest.approx(
        one.values[0] + one.values[1 + 6] + one.values[1 + ROWS + 3]
    )
    assert np.allclose(both.of_rows(part), one.of_rows(part) + 2 * other.of_rows(part), atol=1e-5)
    assert not Factors.none(ROWS, COLUMNS).of_rows(slice(None)).any()


def test_a_fit_finds_what_a_shrunken_update_lacks() -> None:
    """Of a layer whose update was carried in part, more in some rows and columns than in others."""
    draws = np.random.default_rng(2)
    change = draws.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    lacks = (0.2 + draws.uniform(0, 0.1, (ROWS, 1)) + draws.uniform(0, 0.1, COLUMNS)).astype(np.float32)
    fit = Fit(ROWS, COLUMNS)

    def error() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.asarray((fit.factors.of_rows(slice(None)) - lacks) * change, np.float32)

    before = float(np.square(error()).sum())
    for step in range(120):
        inputs = draws.normal(size=(200, COLUMNS)).astype(np.float32)
        gradient = error() @ inputs.T @ inputs / np.float32(200) * change
        fit.follow(np.asarray(gradient, np.float32), 1.0 if step < 90 else 0.1, step)
    assert float(np.square(error()).sum()) < 0.01 * before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models before and after an update of one direction in each matrix, of which descent leaves out a part; the one before in Q8_0."""
    made = tmp_path_factory.mktemp("extrapolation")
    source = write_language_model(made / "before.gguf", 1)
    draws = np.random.default_rng(3)

    def updated(data: Floats) -> Floats:
        rows, columns = data.shape
        change = draws.normal(size=(rows, 1)) @ draws.normal(size=(1, columns))
        return np.asarray(data + 0.3 * np.abs(data).mean() * change, np.float32)

    tensors = [
        replace(each, data=updated(each.data))
        if each.name.startswith("blk") and each.data.ndim == 2
        else each
        for each in read_stored(source)
    ]
    write_gguf(source, made / "new.gguf", tensors, {})
    quantized(made / "before.gguf", made / "installed.gguf", kind=TYPES.Q8_0)
    return made


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Calibration:
    return calibrate(
        folder / "new.gguf", tokens(1), folder / "calibration", quiet, sequences=8, sequence_tokens=64
    )


def _choose(folder: Path, calibration: Calibration, out: Path, **settings: object) -> Chosen:
    return choose_in(folder, calibration, out, folder / "before.gguf", **settings)


def test_a_file_with_learned_extrapolation_is_nearer_to_the_new_model_at_the_same_price(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    unlearned = _choose(folder, calibration, plain, price=1e-6)
    chosen = _choose(folder, calibration, out, price=1e-6, learned=1)
    before, after = chosen.divergences
    assert after < 0.9 * before
    for file, divergence in ((plain, before), (out, after)):
        assert _divergence(folder, calibration, file) == pytest.approx(divergence)
    assert chosen.delta_bytes == delta_bytes(folder / "installed.gguf", out)
    assert unlearned.sources.distilled_tokens is None
    assert chosen.sources.distilled_tokens == hashlib.sha256(tokens(1).astype("<i4").tobytes()).hexdigest()


def test_each_round_holds_the_budget_and_the_best_file_stays(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    chosen = _choose(folder, calibration, out, budget_bytes=6_000, learned=2)
    assert chosen.delta_bytes <= 6_000
    assert chosen.delta_bytes == delta_bytes(folder / "installed.gguf", out)
    assert _divergence(folder, calibration, out) == pytest.approx(min(chosen.divergences))


def _divergence(folder: Path, calibration: Calibration, file: Path) -> float:
    look = folder / "look"
    return measure_divergence(folder / "new.gguf", file, calibration, look, quiet, workers=1)


def test_processes_change_nothing_of_what_is_learned(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    one = _choose(folder, calibration, tmp_path / "one.gguf", price=1e-6, learned=1)
    two = _choose(folder, calibration, tmp_path / "two.gguf", price=1e-6, learned=1, workers=2)
    assert one.sources.result == two.sources.result
    assert one.divergences == two.divergences


def test_what_cannot_be_learned_is_refused(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(RequestError, match="up to 20 rounds, not 21"):
        _choose(folder, calibration, out, price=1e-8, learned=21)
    short = replace(calibration, text=calibration.text[:100])
    with pytest.raises(RequestError, match="--learn-extrapolation reads runs of 160 tokens"):
        _choose(folder, short, out, price=1e-6, learned=1)
    with pytest.raises(RequestError, match="installed version in floats"):
        choose(
            folder / "new.gguf",
            folder / "installed.gguf",
            calibration,
            Settings(price=1e-8, learned=1, workers=1),
            out,
            quiet,
        )
    assert not out.exists()


def test_rounds_end_where_one_brings_nothing_and_the_best_file_stays(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Of a file that says already what the new model says: each code is sent."""
    chosen = _choose(
        folder, calibration, tmp_path / "out.gguf", price=0.0, pairs=0, is_afresh=True, learned=9
    )
    before, *each = chosen.divergences
    assert len(each) < 9
    assert each[-1] >= min(before, *each)
    seen = _divergence(folder, calibration, tmp_path / "out.gguf")
    assert seen == pytest.approx(min(before, *each))
