"""The demo's classifier is really trained: what its files are worth is measured here, not believed."""

import json
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx
import pytest

from examples.digits import build
from examples.digits.export import INPUT_NAME, predictions
from examples.digits.network import Network
from protocol.release import ClassPrompt, HealthPlan

_SEED = 7
_CHUNK_BYTES = 65_496
_DELTA_CHUNKS_MIN = 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    assert build.main(["--out", str(out), "--seed", str(_SEED)]) == 0
    return out


def _accuracy(built: Path) -> dict[str, Any]:
    versions: dict[str, Any] = json.loads((built / "accuracy.json").read_bytes())["versions"]
    return versions


def _int8_weights(file: Path) -> dict[str, Any]:
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    return {name: array for name, array in arrays.items() if array.ndim == 2}


def test_the_second_version_is_better_and_the_third_is_far_worse(built: Path) -> None:
    versions = _accuracy(built)
    assert 0.88 < versions["v1"]["accuracy"] < versions["v2"]["accuracy"] - 0.01
    assert versions["v2"]["accuracy"] > 0.95
    assert versions["v3"]["accuracy"] < 0.5


def test_good_quantization_costs_almost_nothing(built: Path) -> None:
    for name in ("v1", "v2"):
        version = _accuracy(built)[name]
        assert abs(version["accuracy"] - version["float32_accuracy"]) < 0.02


def test_the_accuracies_in_the_report_are_those_of_the_files(built: Path) -> None:
    held_out = build.split_digits(np.random.default_rng(_SEED)).held_out
    for name, version in _accuracy(built).items():
        answers = predictions((built / f"{name}.onnx").read_bytes(), held_out.images)
        assert float(np.mean(answers == held_out.labels)) == version["accuracy"]


def test_the_health_plan_accepts_the_first_two_versions_and_refuses_the_third(built: Path) -> None:
    plan = msgspec.json.decode((built / "health.json").read_bytes(), type=HealthPlan)
    prompts = [prompt for prompt in plan.prompts if isinstance(prompt, ClassPrompt)]
    images = np.asarray([prompt.input for prompt in prompts], np.float32)
    labels = np.asarray([prompt.label for prompt in prompts])
    assert images.shape == (build.GOLDEN_COUNT, 64)
    assert images.max() == build.PIXEL_MAX
    shares = {
        name: float(np.mean(predictions((built / f"{name}.onnx").read_bytes(), images) == labels))
        for name in ("v1", "v2", "v3")
    }
    assert shares["v1"] >= plan.class_accuracy_min
    assert shares["v2"] >= plan.class_accuracy_min
    assert shares["v3"] < plan.class_accuracy_min / 2


def test_golden_images_are_neither_trained_on_nor_held_out() -> None:
    digits = build.split_digits(np.random.default_rng(_SEED))
    parts = (digits.train, digits.held_out, digits.golden)
    assert sum(len(part.labels) for part in parts) == 1797
    seen = [{image.tobytes() for image in part.images} for part in parts]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_weights_are_int8_and_their_delta_spans_at_least_twenty_chunks(built: Path) -> None:
    old, new = _int8_weights(built / "v1.onnx"), _int8_weights(built / "v2.onnx")
    assert old.keys() == new.keys()
    assert len(new) == 4
    bits = 0.0
    for name, weights in new.items():
        assert weights.dtype == np.int8
        residual = (weights.view(np.uint8) - old[name].view(np.uint8)).ravel()
        counts = np.bincount(residual, minlength=256)
        shares = counts[counts > 0] / residual.size
        bits -= float((shares * np.log2(shares)).sum()) * residual.size
    full = (built / "v2.onnx").stat().st_size
    assert _DELTA_CHUNKS_MIN * _CHUNK_BYTES < bits / 8 < 0.65 * full


def test_the_third_version_differs_from_the_second_in_its_scales_only(built: Path) -> None:
    good, bad = _int8_weights(built / "v2.onnx"), _int8_weights(built / "v3.onnx")
    assert all(np.array_equal(good[name], bad[name]) for name in good)
    assert (built / "v2.onnx").read_bytes() != (built / "v3.onnx").read_bytes()


def test_the_first_input_takes_any_number_of_raw_images(built: Path) -> None:
    first = onnx.load(built / "v2.onnx").graph.input[0]
    assert first.name == INPUT_NAME
    assert [each.dim_param or each.dim_value for each in first.type.tensor_type.shape.dim] == ["batch", 64]


@pytest.mark.slow
def test_one_seed_gives_the_same_bytes_twice(built: Path, tmp_path: Path) -> None:
    assert build.main(["--out", str(tmp_path), "--seed", str(_SEED)]) == 0
    for file in sorted(built.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_an_output_path_that_is_a_file_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_bytes(b"")
    assert build.main(["--out", str(tmp_path / "taken")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: cannot write to ")
    assert message.count("\n") == 1


def test_gradients_agree_with_finite_differences() -> None:
    rng = np.random.default_rng(3)
    network = Network.initialized((5, 7, 6, 3), rng)
    double = cast("type[np.float32]", np.float64)  # finite differences need the finer type
    network.weights = [each.astype(double) for each in network.weights]
    network.biases = [rng.normal(0.0, 0.1, each.shape).astype(double) for each in network.biases]
    images, labels = rng.normal(0.0, 1.0, (8, 5)).astype(double), rng.integers(0, 3, 8)
    _, gradients = network.gradients(images, labels)
    step = 1e-6
    for parameter, gradient in zip(network.weights + network.biases, gradients, strict=True):
        for position in np.ndindex(*parameter.shape):
            kept = parameter[position]
            losses = []
            for value in (kept - step, kept + step):
                parameter[position] = value
                losses.append(network.gradients(images, labels)[0])
            parameter[position] = kept
            assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(
                gradient[position], rel=1e-4, abs=1e-7
            )
