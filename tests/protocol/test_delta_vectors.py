"""Golden vectors: delta files that every reader, on every processor, must turn into the same bytes for ever.

Run this file as a program to write vectors for layouts that have none; existing ones are never written again.
"""

import hashlib
import json
from pathlib import Path

import pytest

from protocol.delta.layouts import LAYOUTS
from protocol.tensors import Layout
from tests.protocol.delta_files import apply, delta
from tests.protocol.model_files import GGML_NUMBERS, block_file, blocks, moved_blocks, safetensors_file

VECTORS = Path(__file__).parent.parent / "vectors" / "delta"
_DTYPES = {Layout.I8: "I8", Layout.U8: "U8", Layout.F8: "F8_E4M3", Layout.F64: "F64"}
_DTYPES |= {Layout.I16: "I16", Layout.I32: "I32", Layout.I64: "I64"}


def _file(layout: Layout, data: bytes) -> bytes:
    if layout in GGML_NUMBERS:
        return block_file(layout, data)
    if layout in _DTYPES:
        count = len(data) // LAYOUTS[layout].block_bytes
        return safetensors_file({"w": (_DTYPES[layout], (count,), data)})
    return data


def _base_and_new(layout: Layout) -> tuple[bytes, bytes]:
    count = max(4, 600 // LAYOUTS[layout].block_bytes)
    data = blocks(layout, count, 1)
    return _file(layout, data), _file(layout, moved_blocks(layout, data, 2, 0.1))


def _write_missing() -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    for layout in LAYOUTS:
        path = VECTORS / f"{layout.value}.json"
        if not path.exists():
            base, new = _base_and_new(layout)
            vector = {
                "base": base.hex(),
                "delta": delta(base, new)[0].hex(),
                "result_sha256": hashlib.sha256(new).hexdigest(),
            }
            path.write_text(json.dumps(vector, indent=1) + "\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stored_delta_still_gives_the_same_result(layout: Layout) -> None:
    vector = json.loads((VECTORS / f"{layout.value}.json").read_text())
    result = apply(bytes.fromhex(vector["base"]), bytes.fromhex(vector["delta"]))
    assert hashlib.sha256(result).hexdigest() == vector["result_sha256"]


if __name__ == "__main__":
    _write_missing()
