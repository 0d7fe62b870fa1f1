"""Golden vectors: delta files, and payloads of the context coder, that every reader must turn into the same bytes for ever.

Run this file as a program to write vectors for layouts that have none; existing ones are never written again.
"""

import hashlib
import json
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from protocol.delta.format import Codec
from protocol.delta.inspection import inspect_delta
from protocol.delta.layouts import LAYOUTS
from protocol.delta.native import context as native
from protocol.delta.reference import context as reference
from protocol.delta.runs import (
    DIVISORS,
    RANKED,
    Basis,
    Flag,
    read_context_runs,
    write_context_runs,
)
from protocol.delta.tensor import takes_gain
from protocol.tensors import BytesSource, Layout
from tests.protocol.context_segments import Segment, new_state, scaled_by_columns, three_segments
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
CONTEXT_VECTORS = VECTORS / "context"
EDITS = VECTORS / "edits.json"
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


def _edited() -> tuple[bytes, bytes]:
    """Copies of several pieces, text, and bytes as they are."""
    same = blocks(Layout.RAW, 6000, 5)
    text = b"".join(b"token %d of the vocabulary, " % number for number in range(20))
    return same, same[:50] + b"a name" + same[60:3500] + text + same[3500:]


def _write_missing() -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    for layout in LAYOUTS:
        _write_vector(_path(layout), *_base_and_new(layout), 4096)
    _write_vector(EDITS, *_edited(), 1024)


def _write_vector(path: Path, base: bytes, new: bytes, segment_bytes: int) -> None:
    if path.exists():
        return
    vector = {
        "base": base.hex(),
        "delta": delta(base, new, segment_bytes)[0].hex(),
        "result_sha256": hashlib.sha256(new).hexdigest(),
    }
    path.write_text(json.dumps(vector, indent=1) + "\n")


def _context_cases() -> dict[str, list[Segment]]:
    """All flags at once for each layout, both a lattice and a basis where there may be one, and scales of columns."""
    every = Flag.BASE | Flag.SPARSE | Flag.DRIFT | Flag.GRID
    cases = {
        layout.value: (layout, every | (Flag.GAIN if takes_gain(row) else Flag(0)))
        for layout, row in LAYOUTS.items()
    }
    for layout in DIVISORS:
        cases[f"{layout.value}_lattice"] = layout, every | Flag.LATTICE
    for layout in RANKED:
        cases[f"{layout.value}_rank"] = layout, Flag.BASE | Flag.RANK
    segments = {
        name: three_segments(*case, has_forecast=True, rows=2) for name, case in sorted(cases.items())
    }
    return segments | {"i8_scales": [scaled_by_columns(0.001, rows=8).with_flags(Flag.SCALES)]}


def _context_vector(segments: list[Segment]) -> dict[str, object]:
    basis, state = segments[0].runs[0].basis, new_state()
    vector: dict[str, object] = {
        "basis": basis.pack().hex() if basis else "",
        "base": segments[0].window.hex(),
        "segments": [
            {
                "parameters": write_context_runs(segment.runs).hex(),
                "payload": reference.encode(state, segment.runs, segment.window, segment.result).hex(),
                "result_bytes": len(segment.result),
                "result_sha256": hashlib.sha256(segment.result).hexdigest(),
            }
            for segment in segments
        ],
    }
    return vector | {"state_sha256": hashlib.sha256(state).hexdigest()}


def _write_missing_context() -> None:
    CONTEXT_VECTORS.mkdir(parents=True, exist_ok=True)
    for name, case in _context_cases().items():
        path = CONTEXT_VECTORS / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(_context_vector(case), indent=1) + "\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_vector_of_a_layout_goes_through_that_layout(layout: Layout) -> None:
    vector = json.loads(_path(layout).read_text())
    found = inspect_delta(BytesSource(bytes.fromhex(vector["delta"])))
    assert layout is Layout.RAW or found.layout_bytes[layout] > 500


def test_the_vector_of_edits_has_copies_in_pieces_and_what_stands_between() -> None:
    vector = json.loads(EDITS.read_text())
    found = inspect_delta(BytesSource(bytes.fromhex(vector["delta"])))
    assert found.segments == {Codec.COPY: 3, Codec.RAW: 1, Codec.SELF: 1}
    assert found.result_bytes[Codec.COPY] > 3 * found.header.segment_bytes_max


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_a_stored_delta_still_gives_the_same_result(path: Path) -> None:
    vector = json.loads(path.read_text())
    result = apply(bytes.fromhex(vector["base"]), bytes.fromhex(vector["delta"]))
    assert hashlib.sha256(result).hexdigest() == vector["result_sha256"]


def test_every_layout_has_a_vector_of_the_context_coder() -> None:
    assert {path.stem for path in CONTEXT_VECTORS.glob("*.json")} >= _context_cases().keys()


@pytest.mark.parametrize("path", sorted(CONTEXT_VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_payloads_still_give_the_same_results_and_states(path: Path) -> None:
    vector = json.loads(path.read_text())
    base = bytes.fromhex(vector["base"])
    basis = Basis.unpack(bytes.fromhex(vector["basis"])) if vector["basis"] else None
    for coder in (reference, native) if native.is_available() else (reference,):
        reader, writer = new_state(), new_state()
        for segment in vector["segments"]:
            length, payload = segment["result_bytes"], bytes.fromhex(segment["payload"])
            runs = read_context_runs(bytes.fromhex(segment["parameters"]), length, len(base), basis)
            result = coder.decode(reader, runs, base, payload)
            assert result is not None
            assert hashlib.sha256(result).hexdigest() == segment["result_sha256"]
            assert coder.encode(writer, runs, base, result) == payload
        assert hashlib.sha256(reader).hexdigest() == vector["state_sha256"]
        assert reader == writer


if __name__ == "__main__":
    _write_missing()
    _write_missing_context()
