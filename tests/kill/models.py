"""Three versions of a small real classifier: big enough that a delta between them is some sixty chunks."""

from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from protocol.release import ClassPrompt, HealthPlan

VERSIONS: Final = ("v1", "v2", "v3")
PROMPTS: Final = 6
_INPUTS: Final = 64
_WIDTH: Final = 1_200
_CLASSES: Final = 10
_STEP: Final = 0.01
"""Versions differ in every weight by about this share: far enough for a big delta, near enough for one."""


def write_models(folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
    """Write the versions and their health plans; returns model and plan by version."""
    rng = np.random.default_rng(seed)
    shapes = ((_INPUTS, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, _CLASSES))
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    questions = rng.standard_normal((PROMPTS, _INPUTS)).astype(np.float32)
    written = {}
    for version in VERSIONS:
        model, plan = folder / f"{version}.onnx", folder / f"{version}.health.json"
        model.write_bytes(_network(weights))
        plan.write_bytes(msgspec.json.encode(_plan(model, questions)))
        written[version] = (model, plan)
        weights = [
            matrix * (1 + _STEP * rng.standard_normal(matrix.shape).astype(np.float32)) for matrix in weights
        ]
    return written


def _network(weights: list[NDArray[np.float32]]) -> bytes:
    nodes, current = [], "x"
    for layer, _ in enumerate(weights):
        out = "scores" if layer == len(weights) - 1 else f"sum{layer}"
        nodes.append(helper.make_node("MatMul", [current, f"w{layer}"], [out]))
        if out != "scores":
            nodes.append(helper.make_node("Relu", [out], [f"active{layer}"]))
        current = f"active{layer}"
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", _INPUTS])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", _CLASSES])],
        [numpy_helper.from_array(matrix, f"w{layer}") for layer, matrix in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def _plan(model: Path, questions: NDArray[np.float32]) -> HealthPlan:
    """Prompts that this version answers, with limits that a busy machine keeps: kills are tested here, not speed."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"x": questions})[0].argmax(axis=1)
    return HealthPlan(
        prompts=[
            ClassPrompt(name=f"p{number}", input=question.tolist(), label=int(label))
            for number, (question, label) in enumerate(zip(questions, labels, strict=True))
        ],
        latency_p99_ms_max=60_000,
        memory_peak_bytes_max=1 << 30,
        soak_ms=100,
    )
