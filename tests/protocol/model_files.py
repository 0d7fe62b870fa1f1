"""Small model files of every kind, the same bytes for the same arguments."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from protocol.delta.layouts import LAYOUTS
from protocol.tensors import BytesSource, Layout

Weights = npt.NDArray[np.float32]

GGML_NUMBERS = {
    Layout.F32: 0,
    Layout.F16: 1,
    Layout.Q4_0: 2,
    Layout.Q4_1: 3,
    Layout.Q5_0: 6,
    Layout.Q5_1: 7,
    Layout.Q8_0: 8,
    Layout.Q2_K: 10,
    Layout.Q3_K: 11,
    Layout.Q4_K: 12,
    Layout.Q5_K: 13,
    Layout.Q6_K: 14,
    Layout.IQ4_NL: 20,
    Layout.IQ4_XS: 23,
    Layout.BF16: 30,
    Layout.TQ2_0: 35,
    Layout.MXFP4: 39,
    Layout.NVFP4: 40,
}


def weights(shape: tuple[int, ...], seed: int, update: float = 0.0) -> Weights:
    """Random weights; with `update`, the same ones moved by that share of their size."""
    values = np.random.default_rng(seed).standard_normal(shape)
    if update:
        values = values + update * np.random.default_rng(seed + 1).standard_normal(shape)
    return (0.02 * values).astype(np.float32)


def blocks(layout: Layout, count: int, seed: int) -> bytes:
    """Random blocks whose scales are ordinary numbers."""
    rng = np.random.default_rng(seed)
    row = LAYOUTS[layout]
    fields = row.split(rng.integers(0, 256, (count, row.block_bytes), dtype=np.uint8))
    for name in ("d", "m", "dmin"):
        if name in fields:
            if row.fields[0].width == 8:  # exponents
                fields[name] = 96 + fields[name] % 24
                continue
            scales = (0.01 + 0.002 * rng.standard_normal((count, 1))).astype(np.float16)
            fields[name] = scales.view(np.uint16)
    return row.join(fields).tobytes()


def moved_blocks(layout: Layout, data: bytes, seed: int, share: float = 0.05) -> bytes:
    """The same blocks after a small update: some scales a little off, some codes one further."""
    rng = np.random.default_rng(seed)
    row = LAYOUTS[layout]
    fields = row.split(np.frombuffer(data, np.uint8).reshape(-1, row.block_bytes))
    for block_field in row.fields:
        values = fields[block_field.name].copy()
        top = (1 << min(block_field.width, 8 * values.dtype.itemsize)) - 1
        chosen = (rng.random(values.shape) < share) & (values < top)
        fields[block_field.name] = values + chosen.astype(values.dtype)
    return row.join(fields).tobytes()


def gguf_file(path: Path, tensors: Mapping[str, tuple[Weights, Any]], name: str = "model") -> bytes:
    """Write a file with the reference writer; each tensor as `(weights, quantization type)`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_token_list([f"token{i}" for i in range(50)])
    for tensor_name, (values, kind) in tensors.items():
        writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


@dataclass
class GgufTensor:
    """One tensor of a hand-made GGUF file; fields can be set to anything."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class GgufBuilder:
    """Writes GGUF files byte by byte, wrong ones too."""

    tensors: Sequence[GgufTensor] = ()
    key_values: Sequence[tuple[str, int, bytes]] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    tail: bytes = b""
    _parts: list[bytes] = field(default_factory=list)

    def build(self) -> bytes:
        """Return the file."""
        keys = len(self.key_values) if self.key_count is None else self.key_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        for key, kind, value in self.key_values:
            head += _gguf_string(key) + struct.pack("<I", kind) + value
        offset = 0
        data = b""
        for tensor in self.tensors:
            head += _gguf_string(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            head += struct.pack("<IQ", tensor.kind, offset if tensor.offset is None else tensor.offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
            offset = len(data)
        return head + bytes(-len(head) % self.alignment) + data + self.tail


def block_file(layout: Layout, data: bytes, name: str = "w") -> bytes:
    """A GGUF file with one tensor of the given blocks."""
    count = len(data) // LAYOUTS[layout].block_bytes
    tensor = GgufTensor(name, (count * LAYOUTS[layout].codes.count, 1), GGML_NUMBERS[layout], data)
    return GgufBuilder([tensor]).build()


def safetensors_file(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Write a safetensors file; each tensor as `(dtype, shape, bytes)`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


_ONNX_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
_ONNX_TYPES |= {"float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def onnx_file(tensors: Mapping[str, npt.NDArray[Any]], *, matmul_nbits: str = "", doc: str = "") -> bytes:
    """Write an ONNX file with the given initializers; one of them may be the weights of a MatMulNBits node."""
    node = helper.make_node("Identity", ["x"], ["y"])
    if matmul_nbits:
        node = helper.make_node("MatMulNBits", ["x", matmul_nbits, "scales"], ["y"], domain="com.microsoft")
    initializers = [
        helper.make_tensor(name, _ONNX_TYPES[str(values.dtype)], values.shape, values.tobytes(), raw=True)
        for name, values in tensors.items()
    ]
    return onnx_model([node], initializers, doc)


def external_tensor(name: str, values: npt.NDArray[Any], **entries: str) -> TensorProto:
    """An initializer whose bytes lie elsewhere, with the given entries of `external_data`."""
    tensor = TensorProto(name=name, dims=values.shape, data_type=_ONNX_TYPES[str(values.dtype)])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def onnx_model(nodes: Sequence[Any], initializers: Sequence[TensorProto], doc: str = "") -> bytes:
    """Write an ONNX file."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers, doc_string=doc)
    data: bytes = helper.make_model(graph, producer_name="whimbrel-tests").SerializeToString()
    return data


def regions_cover(data: bytes, regions: Sequence[Any]) -> bool:
    """Whether regions touch each other from the first to the last byte."""
    position = 0
    for region in regions:
        if region.offset != position or region.length < 1:
            return False
        position = region.end
    return position == len(data)


def source(data: bytes) -> BytesSource:
    """Bytes as `ReadAt`."""
    return BytesSource(data)


def external_model(folder: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    """Write `model.onnx` and, with the reference library, its tensors into `model.onnx.data` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    model = onnx.load_model_from_string(onnx_file(tensors))
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    return path
