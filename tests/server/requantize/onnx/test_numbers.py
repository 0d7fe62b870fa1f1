"""What is reckoned from numbers alone: codes that do not depend on each other, distortions, verdicts, sets of samples."""

from pathlib import Path

import numpy as np
import pytest

from protocol.errors import ModelFileError, RequestError
from server.requantize.codes import LinearRows
from server.requantize.descent import Price
from server.requantize.guards import Margins
from server.requantize.onnx.choice import choose_separately
from server.requantize.onnx.distortion import Answers, answers_of, distortions, flips
from server.requantize.onnx.inputs import read_samples
from server.requantize.onnx.verdict import Reading, check_sets, figures, share_of_gain


def test_separate_codes_are_the_best_of_all_there_are() -> None:
    draws = np.random.default_rng(1)
    codes = draws.integers(0, 16, (5, 40)).astype(np.int16)
    steps = draws.uniform(-0.3, 0.3, codes.shape).astype(np.float32)
    steps[0, :3] = 0
    rows = LinearRows(codes, steps, draws.normal(0, 1, codes.shape).astype(np.float32), 0, 15)
    target = rows.weights(codes) + draws.normal(0, 0.5, codes.shape).astype(np.float32)
    worth = draws.uniform(0, 2, 5).astype(np.float32)
    price = Price(first=0.02, further=0.004)
    chosen = choose_separately(rows, target, worth, price)
    every = np.arange(16, dtype=np.int16)[:, None, None]
    error = target - (steps * every + rows.offsets)
    away = np.abs(every - codes)
    costs = 0.5 * worth[:, None] * error**2 + np.where(away > 0, price.first + price.further * (away - 1), 0)
    found = np.take_along_axis(costs, chosen[None].astype(int), axis=0)[0]
    assert np.allclose(found, costs.min(axis=0), rtol=1e-4, atol=1e-6)
    assert (chosen[0, :3] == codes[0, :3]).all()
    assert 20 < np.count_nonzero(chosen != codes) < codes.size


def answers(rows: list[list[float]], counts: list[int] | None = None) -> Answers:
    return Answers(np.asarray(rows, np.float32), np.asarray(counts or [1] * len(rows)))


def test_distortions_are_what_they_are_called() -> None:
    first, second = answers([[1, 0], [0, 2]]), answers([[2, 0], [2, 2]])
    assert distortions("embedding", first, second) == pytest.approx([0, 1 - np.sqrt(0.5)])
    assert distortions("values", first, second) == pytest.approx([1 / 1.25, 4 / 1.25])  # mean (0.5, 1)
    logits, other = answers([[0, np.log(3)]]), answers([[0, 0]])
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert distortions("classes", logits, other) == pytest.approx([expected], rel=1e-5)
    assert distortions("classes", answers([[0.25, 0.75]]), answers([[0.5, 0.5]])) == pytest.approx(
        [expected], rel=1e-5
    )
    with pytest.raises(ModelFileError, match="not finite"):
        distortions("values", first, answers([[np.nan, 0], [0, 0]]))
    with pytest.raises(ModelFileError, match="shape"):
        distortions("values", first, logits)


def test_flips_are_other_classes_and_lost_neighbours() -> None:
    found = flips("classes", answers([[1, 2], [2, 1]]), answers([[1, 3], [1, 2]]))
    assert found is not None
    assert (found[0].tolist(), found[1]) == ([0, 1], 1)
    angles = np.linspace(0, np.pi, 40)
    first = Answers(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), np.ones(40, np.int64))
    moved = Answers(first.rows.copy(), first.counts)
    moved.rows[0] = -moved.rows[39]  # nearly where it was, and yet
    moved.rows[39] = first.rows[0]
    found = flips("embedding", first, moved)
    assert found is not None
    lost, count = found
    assert count == 10
    assert lost[39] == 10  # all of its neighbours are at the other end
    assert lost[20] == 0  # far from both
    same = flips("embedding", first, first)
    assert same is not None
    assert same[0].sum() == 0
    assert flips("values", first, moved) is None


def test_positions_that_do_not_count_are_left_out() -> None:
    output = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    classes = answers_of("classes", output, mask)
    assert classes.rows.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert classes.counts.tolist() == [2, 1]
    assert answers_of("embedding", output, mask).rows.tolist() == [[1, 2], [6, 7]]
    assert answers_of("values", output, mask).rows.tolist() == [[0, 1, 2, 3, 0, 0], [6, 7, 0, 0, 0, 0]]
    with pytest.raises(RequestError, match="the mask has the shape"):
        answers_of("classes", output, mask[:, :2])
    with pytest.raises(RequestError, match="0 everywhere"):
        answers_of("classes", output, 0 * mask)
    with pytest.raises(RequestError, match="the output has the type"):
        answers_of("classes", output.astype(np.int64), mask)


def read(seed: int, mean: float, flips: float) -> Reading:
    draws = np.random.default_rng(seed)
    noise = np.random.default_rng(0).exponential(1, 400)  # what makes a sample hard does so for every file
    values = mean * noise * draws.uniform(0.95, 1.05, 400)
    return Reading(
        distortions=tuple(values.tolist()),
        flips=tuple((draws.uniform(size=400) < flips).astype(int).tolist()),
        counts=(1,) * 400,
    )


def test_a_file_passes_only_if_the_whole_interval_is_within_the_margin() -> None:
    plain, installed = read(1, 1e-3, 0.1), read(2, 4e-3, 0.2)

    def statuses(chosen: Reading) -> list[str]:
        both = dict.fromkeys(("a", "b"), chosen)
        return [each.status for each in check_sets(both, {"a": plain, "b": plain}, ["a", "b"], Margins())]

    assert statuses(read(3, 0.8e-3, 0.02)) == ["passed"] * 4
    assert statuses(read(3, 1.5e-3, 0.3)) == ["failed"] * 4
    assert statuses(read(3, 0.8e-3, 0.1)) == ["passed", "undecided"] * 2
    with pytest.raises(RequestError, match="1 sets of samples, 2 are needed"):
        check_sets({"a": plain}, {"a": plain}, ["a"], Margins())
    gain = figures(read(3, 2.5e-3, 0.1), installed, plain).gain
    assert gain is not None
    assert gain.low < 0.5 < gain.high
    assert share_of_gain(plain, plain, installed) is None


def test_samples_are_read_from_arrays_and_from_suites_of_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)), rate=np.array(16000))
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 2)), rate=np.array(16000))
    both = read_samples([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert len(both) == 5
    assert both.arrays["rate"] == 16000
    (tmp_path / "c.jsonl").write_text('{"input": [1, 2], "label": 0}\n{"input": [3, 4], "label": 1}\n')
    assert read_samples([tmp_path / "c.jsonl"]).arrays[""].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"x": np.ones((3, 2)), "y": np.ones(2)}, "the arrays have 2 and 3 samples"),
        ({"x": np.array(["a"])}, "numbers are expected"),
        ({"x": np.array(1)}, "the arrays have no samples"),
        ({"x": np.array([None])}, "no .npz of plain arrays"),
    ],
)
def test_damaged_sets_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], what: str) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]  # by name
    with pytest.raises(RequestError, match=what):
        read_samples([path])
    path.write_bytes(b"PK nothing")
    with pytest.raises(RequestError, match=str(path)):
        read_samples([path])
    with pytest.raises(RequestError, match="no such file"):
        read_samples([tmp_path / "none.npz"])
