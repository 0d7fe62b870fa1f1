"""A small real ONNX model for the tests of this folder, trained on from and quantized in the ways that onnxruntime has."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from server.requantize.onnx.inputs import Samples

VOCABULARY, WIDTH, HIDDEN, CLASSES, TOKENS = 64, 128, 128, 8, 6

Array = npt.NDArray[Any]


def weights(seed: int, noise: float) -> dict[str, Array]:
    """An embedding, two layers with biases; `noise` moves all of them, as training on does."""
    draws, moves = np.random.default_rng(seed), np.random.default_rng(seed + 100)
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "w1": (WIDTH, HIDDEN),
        "b1": (HIDDEN,),
        "w2": (HIDDEN, CLASSES),
        "b2": (2 * CLASSES,),
    }
    found = {}
    for name, shape in shapes.items():
        size = 1.0 if name == "embedding" else shape[0] ** -0.5
        values = draws.normal(0, size, shape)
        found[name] = (values + noise * size * moves.normal(0, 1, shape)).astype(np.float32)
    return found


def write_model(path: Path, seed: int = 1, noise: float = 0.0) -> Path:
    """Tokens and a mask to scores of classes at each position."""
    values = weights(seed, noise)
    values["b2"] = values["b2"][:CLASSES]
    nodes = [
        helper.make_node("Gather", ["embedding", "tokens"], ["e"]),
        helper.make_node("MatMul", ["e", "w1"], ["h"]),
        helper.make_node("Add", ["h", "b1"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["s"]),
        helper.make_node("Add", ["s", "b2"], ["scores"]),
        helper.make_node("Identity", ["mask"], ["seen"]),
    ]
    save(path, nodes, values)
    return path


def save(path: Path, nodes: list[Any], values: dict[str, Array]) -> None:
    """Write a graph with the inputs and outputs of `write_model`."""
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in ("tokens", "mask")],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", "t", CLASSES]),
            helper.make_tensor_value_info("seen", TensorProto.INT64, ["n", "t"]),
        ],
        [numpy_helper.from_array(each, name) for name, each in values.items()],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), str(path))


def write_dynamic(source: Path, out: Path, *, per_channel: bool = False) -> Path:
    """As onnxruntime's dynamic quantizer does it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - after the check

    quantize_dynamic(source, out, weight_type=QuantType.QInt8, per_channel=per_channel)
    return out


def write_int4(source: Path, out: Path, block: int = 32) -> Path:
    """MatMulNBits with zero points, rounded to nearest; the embedding stays in floats."""
    model = onnx.load(str(source))
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if not name:
            nodes.append(node)
            continue
        inputs, outputs = values[name].shape
        blocks = values.pop(name).T.reshape(outputs, inputs // block, block)
        low, high = blocks.min(axis=2), blocks.max(axis=2)
        scales = (high - low) / 15
        zeros = np.clip(np.rint(-low / scales), 0, 15).astype(np.uint8)
        codes = np.clip(np.rint(blocks / scales[:, :, None]) + zeros[:, :, None], 0, 15).astype(np.uint8)
        values[f"{name}_Q4"] = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
        values[f"{name}_scales"] = scales.astype(np.float32)
        values[f"{name}_zero_points"] = (zeros[:, 0::2] | zeros[:, 1::2] << 4).reshape(-1)
        names = [node.input[0], *(f"{name}_{part}" for part in ("Q4", "scales", "zero_points"))]
        options = {"K": inputs, "N": outputs, "bits": 4, "block_size": block, "domain": "com.microsoft"}
        nodes.append(helper.make_node("MatMulNBits", names, node.output, **options))
    save(out, nodes, values)
    return out


def write_qdq(source: Path, out: Path, axis: int) -> Path:
    """Matrices as int8 behind DequantizeLinear, with a scale for each place along an axis."""
    model = onnx.load(str(source))
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = []
    for name in ("w1", "w2"):
        whole = values.pop(name)
        scales = (np.abs(whole).max(axis=1 - axis) / 127).astype(np.float32)
        spread = scales[None, :] if axis == 1 else scales[:, None]
        values[f"{name}_quantized"] = np.rint(whole / spread).astype(np.int8)
        values[f"{name}_scale"] = scales
        values[f"{name}_zero_point"] = np.zeros(len(scales), np.int8)
        inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
    save(out, [*nodes, *model.graph.node], values)
    return out


def drawn(name: str, seed: int, count: int = 64, first: int = 0) -> Samples:
    """Sequences of random tokens of random length, filled up with zeros."""
    draws = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < draws.integers(3, TOKENS + 1, count)[:, None]).astype(np.int64)
    return Samples(name, {"tokens": draws.integers(first + 1, VOCABULARY, mask.shape) * mask, "mask": mask})


def written(folder: Path, samples: Samples) -> Path:
    """A set as a file."""
    path = folder / samples.name
    np.savez(path, allow_pickle=False, **samples.arrays)
    return path


def run(path: Path, samples: Samples) -> Array:
    """The scores that onnxruntime gives."""
    import onnxruntime  # noqa: PLC0415 - after the check

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["scores"], dict(samples.arrays))[0])
