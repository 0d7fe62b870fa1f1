"""Golden vectors: delta files that every reader, on every processor, must turn into the same bytes for ever.

Run this file as a program to write vectors for layouts that have none; existing ones are never written again.
"""

import hashlib
import json
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from protocol.delta.inspection import inspect_delta
from protocol.delta.layouts import LAYOUTS
from protocol.tensors import BytesSource, Layout
from tests.protocol.delta_files import apply, delta
from tests.protocol.model_files import (
    GGML_NUMBERS,
    block_file,
    blocks,
    moved_blocks,
    onnx_model,
    safetensors_file,
)

VECTORS = Path(__file__).parent.parent / "vectors" / "delta"
_DTYPES = {Layout.I8: "I8", Layout.U8: "U8", Layout.F8: "F8_E4M3", Layout.F64: "F64"}
_DTYPES |= {Layout.I16: "I16", Layout.I32: "I32", Layout.I64: "I64", Layout.PACKED4: "F4"}
# The first vector of this name was made from files that no container described: raw segments. It stays.
_NAMES = {Layout.PACKED4: "packed4_codes"}


def _file(layout: Layout, data: bytes) -> bytes:
    if layout in GGML_NUMBERS:
        return block_file(layout, data)
    if layout in _DTYPES:
        count = len(data) // LAYOUTS[layout].block_bytes * (2 if layout is Layout.PACKED4 else 1)
        return safetensors_file({"w": (_DTYPES[layout], (count,), data)})
    if layout in {Layout.AWQ4, Layout.GPTQ4}:
        return _int4_file(layout, data)
    if layout is Layout.I4:
        tensor = helper.make_tensor("w", TensorProto.INT4, [2 * len(data)], data, raw=True)
        return onnx_model([], [tensor])
    return data


def _int4_file(layout: Layout, data: bytes) -> bytes:
    """A layer of eight outputs, whose packing follows from the shapes."""
    words = len(data) // 4 // 8 * 8
    weight = (words, 1) if layout is Layout.AWQ4 else (words // 8, 8)
    layer = {
        "l.qweight": ("I32", weight, data[: 4 * words]),
        "l.qzeros": ("I32", (1, 1), bytes(4)),
        "l.scales": ("F16", (1, 8), bytes(16)),
    }
    return safetensors_file(layer)


def _base_and_new(layout: Layout) -> tuple[bytes, bytes]:
    count = max(4, 600 // LAYOUTS[layout].block_bytes)
    data = blocks(layout, count, 1)
    return _file(layout, data), _file(layout, moved_blocks(layout, data, 2, 0.1))


def _path(layout: Layout) -> Path:
    return VECTORS / f"{_NAMES.get(layout, layout.value)}.json"


def _write_missing() -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    for layout in LAYOUTS:
        path = _path(layout)
        if not path.exists():
            base, new = _base_and_new(layout)
            vector = {
                "base": base.hex(),
                "delta": delta(base, new)[0].hex(),
                "result_sha256": hashlib.sha256(new).hexdigest(),
            }
            path.write_text(json.dumps(vector, indent=1) + "\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_vector_of_a_layout_goes_through_that_layout(layout: Layout) -> None:
    vector = json.loads(_path(layout).read_text())
    found = inspect_delta(BytesSource(bytes.fromhex(vector["delta"])))
    assert layout is Layout.RAW or found.layout_bytes[layout] > 500


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_a_stored_delta_still_gives_the_same_result(path: Path) -> None:
    vector = json.loads(path.read_text())
    result = apply(bytes.fromhex(vector["base"]), bytes.fromhex(vector["delta"]))
    assert hashlib.sha256(result).hexdigest() == vector["result_sha256"]


if __name__ == "__main__":
    _write_missing()
