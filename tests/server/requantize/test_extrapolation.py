"""Extrapolation that is learned: what factors do to weights, that following a gradient finds them, and files that are chosen with them."""

import hashlib
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gguf_files import read_stored, write_gguf
from protocol.errors import RequestError
from server.diagnosis.weights import Floats
from server.requantize.calibration import Calibration, calibrate
from server.requantize.choice import Chosen, choose
from server.requantize.correction import measure_divergence
from server.requantize.extrapolation import DIRECTIONS, Factors, Fit, Response, leading_directions
from server.requantize.settings import Settings
from server.requantize.weighing import delta_bytes
from tests.models import write_language_model
from tests.server.requantize.samples import TYPES, choose_in, quantized, quiet, tokens

ROWS, COLUMNS = 48, 32


def _directions(draws: np.random.Generator) -> Floats:
    """Of inputs that a few directions carry most of."""
    seen = draws.normal(size=(400, COLUMNS)) * np.geomspace(3, 0.2, COLUMNS)
    seen = seen @ np.linalg.qr(draws.normal(size=(COLUMNS, COLUMNS)))[0]
    return leading_directions((seen.T @ seen / 400).astype(np.float32))[:, -5:]


def test_leading_directions_carry_most() -> None:
    draws = np.random.default_rng(4)
    seen = draws.normal(size=(500, 100)) * np.geomspace(5, 0.1, 100)
    moments = (seen.T @ seen / 500).astype(np.float32)
    found = leading_directions(moments)
    assert found.shape == (100, DIRECTIONS)
    assert np.allclose(found.T @ found, np.eye(DIRECTIONS), atol=1e-5)
    carried = np.trace(found.T @ moments @ found)
    assert carried > 0.99 * np.sort(np.linalg.eigvalsh(moments))[-DIRECTIONS:].sum()
    assert leading_directions(moments[:20, :20]).shape == (20, 20)


def test_what_is_added_is_the_change_times_the_factors_of_matrix_row_column_and_direction() -> None:
    draws = np.random.default_rng(1)
    directions = _directions(draws)
    change = draws.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    count = 1 + ROWS + COLUMNS + directions.shape[1]
    one = Factors(draws.normal(size=count).astype(np.float32), ROWS, COLUMNS)
    other = Factors(draws.normal(size=count).astype(np.float32), ROWS, COLUMNS)
    part = slice(5, 9)
    found = one.added(change[part], directions, part)
    assert found.shape == (4, COLUMNS)
    projected = sum(
        one.values[1 + ROWS + COLUMNS + k] * (change[6] @ directions[:, k]) * directions[3, k]
        for k in range(directions.shape[1])
    )
    wanted = (one.values[0] + one.values[1 + 6] + one.values[1 + ROWS + 3]) * change[6, 3] + projected
    assert found[1, 3] == pytest.approx(wanted, rel=1e-4)
    assert np.allclose(found, one.added(change, directions)[part], atol=1e-5)
    expected = one.added(change, directions) + other.added(change, directions)
    assert np.allclose(one.plus(other).added(change, directions), expected, atol=1e-4)
    assert not Factors.none(change, directions).added(change, directions).any()


def test_a_response_is_what_strong_directions_and_the_rest_show_of_what_was_added() -> None:
    """Codes that follow strong inputs, and move at random besides."""
    draws = np.random.default_rng(5)
    moments = np.diag(np.geomspace(9, 0.01, 100)).astype(np.float32)
    directions = leading_directions(moments)
    true = Response(directions, np.repeat([0.2, 0.6, 1.0], [48, 12, 4]).astype(np.float32), 0.05)
    added = draws.normal(size=(3000, 100)).astype(np.float32)
    noise = draws.normal(size=added.shape).astype(np.float32)
    found = Response.seen(directions, added, true.of(added) + noise)
    assert np.allclose(found.shares, true.shares, atol=0.03)
    assert found.rest == pytest.approx(0.05, abs=0.02)
    assert np.allclose(true.of(added) @ directions, (added @ directions) * true.shares, atol=1e-4)
    weakest = np.eye(100, dtype=np.float32)[:, -1:]  # in none of the directions
    assert np.allclose(true.of(added) @ weakest, 0.05 * added @ weakest, atol=1e-4)


def test_a_response_is_never_more_than_all_and_where_nothing_was_added_the_least() -> None:
    directions = leading_directions(np.eye(8, dtype=np.float32))
    added = np.zeros((4, 8), np.float32)
    unseen = Response.seen(directions, added, added + 1)
    assert unseen.rest == 0
    assert (unseen.shares > 0).all()
    assert (unseen.shares < 0.1).all()
    assert (Response.seen(directions, added + 1, added + 5).shares <= 1).all()
    assert np.allclose(Response.unseen(directions).of(added + 1), 1, atol=1e-5)


def test_a_fit_finds_what_a_shrunken_update_lacks_though_a_part_of_it_does_not_arrive() -> None:
    """Of a layer whose update was carried in part: more in some rows and columns than in others, and in strong directions most of all."""
    draws = np.random.default_rng(2)
    change = draws.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    directions = _directions(draws)
    response = Response(directions, np.array([0.3, 0.3, 0.5, 0.9, 0.9], np.float32), 0.6)
    lacks = (0.2 + draws.uniform(0, 0.1, (ROWS, 1)) + draws.uniform(0, 0.1, COLUMNS)).astype(np.float32)
    lacking = response.of(np.asarray(lacks * change - 0.2 * change @ directions @ directions.T, np.float32))
    fit = Fit(change, response)

    def error() -> Floats:
        return np.asarray(fit.arriving() - lacking, np.float32)

    before = float(np.square(error()).sum())
    for step in range(150):
        inputs = draws.normal(size=(200, COLUMNS)).astype(np.float32)
        gradient = error() @ inputs.T @ inputs / np.float32(200)
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


def _forget(calibration: Calibration) -> None:
    """That any choice was made, so that the next one begins anew."""
    for each in calibration.folder.glob("learned-*"):
        shutil.rmtree(each)


def test_processes_change_nothing_of_what_is_learned(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    one = _choose(folder, calibration, tmp_path / "one.gguf", price=1e-6, learned=1)
    _forget(calibration)
    two = _choose(folder, calibration, tmp_path / "two.gguf", price=1e-6, learned=1, workers=2)
    assert one.sources.result == two.sources.result
    assert one.divergences == two.divergences


def _choose_and_tell(
    tell: Callable[[str], None], folder: Path, calibration: Calibration, out: Path, learned: int = 2
) -> Chosen:
    settings = Settings(price=1e-6, learned=learned, workers=1)
    new, installed, before = (folder / f"{name}.gguf" for name in ("new", "installed", "before"))
    return choose(new, installed, calibration, settings, out, tell, before=before)


def _choose_and_send(lines: Connection, folder: Path, calibration: Calibration, out: Path) -> None:
    _choose_and_tell(lines.send, folder, calibration, out)


def test_a_choice_that_was_killed_goes_on_after_its_last_round(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    whole = _choose_and_tell(quiet, folder, calibration, tmp_path / "whole.gguf")
    _forget(calibration)
    spawn = multiprocessing.get_context("spawn")
    received, sent = spawn.Pipe(duplex=False)
    out = tmp_path / "out.gguf"
    child = spawn.Process(target=_choose_and_send, args=(sent, folder, calibration, out))
    child.start()
    sent.close()
    while "round 2: step" not in received.recv():
        continue
    child.kill()
    child.join()
    assert not out.exists()
    lines: list[str] = []
    again = _choose_and_tell(lines.append, folder, calibration, out)
    assert lines[0] == "extrapolation: goes on after round 1"
    assert not any("extrapolation, round 1" in line for line in lines)
    assert (again.sources, again.divergences, again.rounds) == (
        whole.sources,
        whole.divergences,
        whole.rounds,
    )


def test_a_choice_that_has_ended_is_not_made_again_until_another_was(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    _forget(calibration)
    out = tmp_path / "out.gguf"
    first = _choose_and_tell(quiet, folder, calibration, out, learned=1)
    lines: list[str] = []
    again = _choose_and_tell(lines.append, folder, calibration, out, learned=1)
    assert not any("descent" in line or "step" in line for line in lines)
    assert (again.sources, again.divergences, again.rounds) == (
        first.sources,
        first.divergences,
        first.rounds,
    )
    other = replace(calibration, text=calibration.text[:-1])  # of which the runs are the same
    _choose_and_tell(lines.append, folder, other, tmp_path / "other.gguf", learned=1)
    assert any("step" in line for line in lines)
    assert len(list(calibration.folder.glob("learned-*"))) == 1  # that of the other


@pytest.mark.parametrize("cut", [0, 1])
def test_what_a_choice_has_left_is_not_gone_on_with_where_it_is_damaged(
    folder: Path, calibration: Calibration, tmp_path: Path, cut: int
) -> None:
    _forget(calibration)
    first = _choose_and_tell(quiet, folder, calibration, tmp_path / "first.gguf", learned=1)
    (kept,) = calibration.folder.glob("learned-*/*/kept.gguf")
    data = kept.read_bytes()
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1])[cut:])
    lines: list[str] = []
    again = _choose_and_tell(lines.append, folder, calibration, tmp_path / "again.gguf", learned=1)
    assert "is damaged, the choice begins anew (kept.gguf is another file)" in lines[0]
    assert again.sources.result == first.sources.result


def test_the_same_choice_twice_at_once_is_refused(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    def begin_another(line: str) -> None:
        if "round 1: step" in line:
            _choose_and_tell(quiet, folder, calibration, tmp_path / "second.gguf")

    _forget(calibration)
    with pytest.raises(RequestError, match="another process makes this choice"):
        _choose_and_tell(begin_another, folder, calibration, tmp_path / "first.gguf")


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
