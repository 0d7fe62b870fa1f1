"""Moments are held against the model computed in one piece, and gradients against finite differences."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import ModelFileError, RequestError
from server.requantize import calibration as module
from server.requantize.calibration import Calibration, calibrate
from server.requantize.model import EMBEDDING, opened_gguf, read_layer, read_shape, tensor_name
from server.requantize.transformer import (
    MATRICES,
    Array,
    Shape,
    backward_layer,
    distilled_head,
    forward_layer,
    rms_norm,
    sampled_head,
)
from tests.models import write_language_model
from tests.server.requantize.samples import tokens

_EPSILON = 1e-5


def _quiet(_line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("model") / "new.gguf", 1)


@pytest.fixture(scope="module")
def calibration(model: Path) -> Calibration:
    return calibrate(model, tokens(1), model.parent / "calibration", _quiet, sequences=5, sequence_tokens=32)


def _head(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    return rng.normal(0, 1, (6, 8)), rng.normal(1, 0.2, 8), rng.normal(0, 1, (11, 8))


def test_labels_are_drawn_as_the_model_would_say_them_and_the_gradient_is_theirs() -> None:
    rng = np.random.default_rng(1)
    hidden, norm, head = _head(rng)
    draws = rng.random(len(hidden))
    trace = sampled_head(hidden, draws, norm, head, _EPSILON, rows=4)

    def loss(states: Array) -> float:
        logits = rms_norm(states, norm, _EPSILON)[0] @ head.T
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -float(logits[np.arange(len(states)), labels].sum())

    logits = trace.normed @ head.T
    probable = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (np.cumsum(probable, axis=1) < draws[:, None]).sum(axis=1)
    assert trace.variance == pytest.approx((probable * (1 - probable)).sum(axis=0))
    _assert_slopes(loss, hidden, trace.at_hidden, rng)


def test_the_gradient_of_the_divergence_agrees_with_finite_differences() -> None:
    rng = np.random.default_rng(2)
    hidden, norm, head = _head(rng)
    teacher_normed, teacher_head = rng.normal(0, 1, (6, 8)), rng.normal(0, 1, (11, 8))

    def divergence(states: Array) -> float:
        return distilled_head(states, norm, head, _EPSILON, teacher_normed, teacher_head)[0]

    _, slope = distilled_head(hidden, norm, head, _EPSILON, teacher_normed, teacher_head, rows=4)
    _assert_slopes(divergence, hidden, slope, rng)
    same = distilled_head(hidden, norm, head, _EPSILON, rms_norm(hidden, norm, _EPSILON)[0], head)
    assert same[0] == pytest.approx(0, abs=1e-12)
    assert np.abs(same[1]).max() < 1e-12


@pytest.mark.parametrize("is_halved", [False, True])
def test_gradients_pass_biases_and_both_kinds_of_rotation(*, is_halved: bool) -> None:
    rng = np.random.default_rng(3)
    shape = Shape(1, heads=2, kv_heads=1, epsilon=_EPSILON, rope_base=100.0)
    shape = replace(shape, rope_factors=(1.0, 2.0), is_rope_halved=is_halved)
    sizes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    sizes |= {"ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}
    weights: dict[str, Array] = {name: rng.normal(0, 0.4, size) for name, size in sizes.items()}
    weights |= {f"{name}.bias": rng.normal(0, 0.4, size[0]) for name, size in sizes.items()}
    weights |= {name: rng.normal(1, 0.1, 8) for name in ("attn_norm", "ffn_norm")}
    hidden, direction = rng.normal(0, 1, (1, 5, 8)), rng.normal(0, 1, (1, 5, 8))

    def along(states: Array) -> float:
        return float((forward_layer(shape, weights, states)[0] * direction).sum())

    _, trace = forward_layer(shape, weights, hidden)
    slope, _ = backward_layer(shape, weights, trace, direction)
    _assert_slopes(along, hidden, slope, rng)


def _assert_slopes(function: object, at: Array, slope: Array, rng: np.random.Generator) -> None:
    assert callable(function)
    for flat in rng.choice(at.size, 12, replace=False):
        position = np.unravel_index(flat, at.shape)
        sides = []
        for step in (-1e-6, 1e-6):
            moved = at.copy()
            moved[position] += step
            sides.append(function(moved))
        assert (sides[1] - sides[0]) / 2e-6 == pytest.approx(slope[position], rel=1e-4, abs=1e-7)


def test_moments_are_those_of_the_model_in_one_piece(model: Path, calibration: Calibration) -> None:
    runs = np.asarray(calibration.runs())
    draws = np.random.default_rng(module._LABEL_SEED).random(runs.shape)
    with opened_gguf(model) as opened:
        shape = read_shape(opened)
        layers = [
            {name: each.astype(np.float64) for name, each in read_layer(opened, layer).items()}
            for layer in range(shape.layers)
        ]
        embedding = opened.floats(EMBEDDING).astype(np.float64)
        norm = opened.floats("output_norm.weight").astype(np.float64)
    hidden: Array = embedding[runs]
    traces = []
    for weights in layers:
        hidden, trace = forward_layer(shape, weights, hidden)
        traces.append(trace)
    flat = hidden.reshape(-1, hidden.shape[-1])
    head = sampled_head(flat, draws.reshape(-1), norm, embedding, shape.epsilon)
    _assert_near(calibration.inputs(EMBEDDING), head.normed.T @ head.normed / runs.size)
    _assert_near(calibration.outputs(EMBEDDING), head.variance / runs.size)
    upstream: Array = head.at_hidden.reshape(hidden.shape)
    for layer in reversed(range(shape.layers)):
        upstream, taps = backward_layer(shape, layers[layer], traces[layer], upstream)
        for name in MATRICES:
            inputs = taps[name][0]
            sharing = [other for other, key in module.INPUTS_OF.items() if key == module.INPUTS_OF[name]]
            weight = sum(np.square(taps[other][1]).sum(axis=1) for other in sharing)
            second = (inputs * np.asarray(weight)[:, None]).T @ inputs / np.sum(weight)
            full = tensor_name(layer, name)
            _assert_near(calibration.inputs(full), second)
            _assert_near(calibration.outputs(full), np.square(taps[name][1]).mean(axis=0))
    lookups = calibration.lookups(EMBEDDING)
    assert lookups is not None
    total = np.square(upstream).sum() / (runs.size * upstream.shape[-1])
    assert lookups.sum() == pytest.approx(total, rel=1e-3)
    assert not lookups[np.setdiff1d(np.arange(len(lookups)), runs)].any()


def _assert_near(measured: Array | None, wanted: Array) -> None:
    assert measured is not None
    np.testing.assert_allclose(measured, wanted, rtol=5e-3, atol=2e-3 * float(np.abs(wanted).max()))


def test_the_number_of_threads_changes_nothing(model: Path, calibration: Calibration, tmp_path: Path) -> None:
    other = calibrate(model, tokens(1), tmp_path, _quiet, sequences=5, sequence_tokens=32, workers=3)
    for path in sorted(calibration.folder.glob("*.npy")):
        assert path.read_bytes() == (other.folder / path.name).read_bytes(), path.name


def test_an_interrupted_run_goes_on_and_a_complete_one_is_read_back(
    model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    class Interrupted(Exception):  # noqa: N818 - what a signal raises has no such name either
        pass

    for stop in (2, 4, 10_000):  # in the second layer, on the way back through the first, never
        said: list[str] = []

        def report(line: str, said: list[str] = said, stop: int = stop) -> None:
            said.append(line)
            if len(said) == stop:
                raise Interrupted

        try:
            found = calibrate(model, tokens(1), tmp_path, report, sequences=5, sequence_tokens=32)
        except Interrupted:
            assert stop < 10_000
    assert len(said) == 1, "only what was left was done again"
    for path in sorted(calibration.folder.glob("*.npy")):
        assert path.read_bytes() == (found.folder / path.name).read_bytes(), path.name
    calibrate(model, tokens(1), tmp_path, _never, sequences=5, sequence_tokens=32)
    assert not (found.folder / "states").exists()


def _never(line: str) -> None:
    pytest.fail(f"measured again: {line}")


def test_what_cannot_be_calibrated_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="100 tokens, 256 are needed"):
        calibrate(model, tokens(1)[:100], tmp_path, _quiet)
    with pytest.raises(RequestError, match=r"vocabulary of .* ends at 263"):
        calibrate(model, tokens(1) + 200, tmp_path, _quiet)
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(ModelFileError, match=r"'gemma' is not computed here \(known are llama, "):
        calibrate(other, tokens(1), tmp_path, _quiet)
    with pytest.raises(RequestError, match="no such file"):
        calibrate(tmp_path / "none.gguf", tokens(1), tmp_path, _quiet)


def test_of_two_calibrations_at_once_the_second_is_told(model: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def report(_line: str) -> None:
        if not refused:
            with pytest.raises(RequestError, match="another process calibrates for this model") as found:
                calibrate(model, tokens(1), tmp_path, _quiet, sequences=5, sequence_tokens=32)
            refused.append(str(found.value))

    found = calibrate(model, tokens(1), tmp_path, report, sequences=5, sequence_tokens=32)
    assert refused
    assert found.inputs("blk.0.attn_q.weight") is not None
