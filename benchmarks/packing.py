"""MiniLM with four-bit weights, as MatMulNBits of ONNX and in the words of AWQ and GPTQ checkpoints, rounded to nearest.

Sources of the formats: onnxruntime `ContribOperators.md`, AutoAWQ `packing_utils.py`, AutoGPTQ `qlinear_cuda.py`.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

_GROUP = 128  # inputs that share scale and zero point in AWQ and GPTQ checkpoints
_BLOCK = 32  # inputs that share a scale in MatMulNBits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MAX_CODE = 15


def write_int4(source: Path, out: Path) -> None:
    """Writes an ONNX model as onnxruntime runs it: MatMulNBits and GatherBlockQuantized, symmetric, scales in float32."""
    model = onnx.load(source)
    weights, embeddings = _matrices(model), _read_by(model, "Gather", 0)
    added: dict[str, Array] = {}
    shape: tuple[int, ...]
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            inputs, outputs = weights[name].shape
            rows, names = weights[name].T, [node.input[0], f"{name}_Q4", f"{name}_scales"]
            shape, options = (outputs, inputs // _BLOCK, _BLOCK // 2), {"K": inputs, "N": outputs}
            operator = "MatMulNBits"
        elif node.op_type == "Gather" and node.input[0] in embeddings:
            name = node.input[0]
            rows, names = embeddings[name], [f"{name}_Q4", node.input[1], f"{name}_scales"]
            shape, options = (len(rows), rows.shape[1] // 2), {"gather_axis": 0, "quantize_axis": 1}
            operator = "GatherBlockQuantized"
        else:
            continue
        codes, scales = _symmetric(rows)
        packed = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
        added |= {f"{name}_Q4": packed.reshape(shape), f"{name}_scales": scales}
        options |= {"bits": 4, "block_size": _BLOCK}
        node.CopyFrom(helper.make_node(operator, names, node.output, domain="com.microsoft", **options))
    replaced = weights.keys() | embeddings.keys()
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in replaced]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in added.items())
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, out)


def write_packed(source: Path, out: Path, kind: str) -> None:
    """Writes the matrices of an ONNX model as the layers of an `awq` or `gptq` checkpoint, and nothing else."""
    tensors: dict[str, tuple[str, Array]] = {}
    for name, weights in _matrices(onnx.load(source)).items():
        codes, scales, zeros = _asymmetric(weights)
        inputs, outputs = codes.shape
        if kind == "awq":
            matrix = _words(codes.reshape(inputs, outputs // 8, 8), _AWQ_ORDER)
            points = _words(zeros.reshape(-1, outputs // 8, 8), _AWQ_ORDER)
        else:
            matrix = _words(codes.reshape(inputs // 8, 8, outputs).transpose(0, 2, 1), range(8))
            points = _words(
                zeros.reshape(-1, outputs // 8, 8) - 1 & _MAX_CODE, range(8)
            )  # as AutoGPTQ stores them
        tensors |= {
            f"{name}.qweight": ("I32", matrix),
            f"{name}.qzeros": ("I32", points),
            f"{name}.scales": ("F16", scales),
        }
    _write_safetensors(tensors, out)


def _read_by(model: onnx.ModelProto, operator: str, at: int) -> dict[str, Array]:
    """Matrices of float32 that are input `at` of an operator."""
    names = {node.input[at] for node in model.graph.node if node.op_type == operator}
    found = (tensor for tensor in model.graph.initializer if tensor.name in names and len(tensor.dims) == 2)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in found}
    return {name: values for name, values in arrays.items() if values.dtype == np.float32}


def _matrices(model: onnx.ModelProto) -> dict[str, Array]:
    """Weights, shape (inputs, outputs), that are quantized: the inputs are whole groups."""
    found = _read_by(model, "MatMul", 1)
    return {name: weights for name, weights in found.items() if len(weights) % _GROUP == 0}


def _symmetric(rows: Array) -> tuple[Array, Array]:
    """Codes, shape (rows, blocks, block), and scales, shape (rows, blocks); code 8 is zero."""
    blocks = rows.reshape(len(rows), -1, _BLOCK)
    at = np.abs(blocks).argmax(axis=2)[:, :, None]
    scales = np.take_along_axis(blocks, at, 2) / np.float32(-8)
    steps = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(blocks / steps) + 8, 0, _MAX_CODE).astype(np.uint8)
    return codes, scales[:, :, 0]


def _asymmetric(weights: Array) -> tuple[Array, Array, Array]:
    """Codes, shape (inputs, outputs), with half-precision scales and zero points, shape (groups, outputs)."""
    inputs, outputs = weights.shape
    groups = weights.reshape(inputs // _GROUP, _GROUP, outputs)
    low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    scales = ((high - low) / _MAX_CODE).astype(np.float16)
    steps = np.maximum(scales.astype(np.float32), np.finfo(np.float16).tiny)
    zeros = np.clip(np.rint(-low / steps), 0, _MAX_CODE)
    codes = np.clip(np.rint(groups / steps[:, None]) + zeros[:, None], 0, _MAX_CODE)
    return codes.astype(np.uint8).reshape(inputs, outputs), scales, zeros.astype(np.uint8)


def _words(codes: Array, order: Sequence[int]) -> Array:
    """Eight codes a word: nibble k, from the lowest, holds code `order[k]`."""
    words = np.zeros(codes.shape[:-1], np.uint32)
    for nibble, at in enumerate(order):
        words |= codes[..., at].astype(np.uint32) << np.uint32(4 * nibble)
    return words


def _write_safetensors(tensors: Mapping[str, tuple[str, Array]], out: Path) -> None:
    def entries() -> Iterator[tuple[str, dict[str, Any]]]:
        position = 0
        for name, (dtype, values) in tensors.items():
            end = position + values.nbytes
            yield name, {"dtype": dtype, "shape": values.shape, "data_offsets": (position, end)}
            position = end

    header = json.dumps(dict(entries())).encode()
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, values in tensors.values():
            file.write(values.tobytes())
