"""ONNX and safetensors maps, and the choice between kinds."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from protocol.errors import ModelFileError
from protocol.tensors import Layout, map_regions, parse_onnx, parse_safetensors
from tests.protocol.model_files import onnx_file, regions_cover, safetensors_file, source

_INT8 = np.arange(-128, 128, dtype=np.int8).reshape(4, 64)
_FLOATS = np.linspace(-1, 1, 100, dtype=np.float32)


def test_initializers_of_an_onnx_file_are_found_where_they_lie() -> None:
    data = onnx_file({"w": _INT8, "scale": _FLOATS, "tiny": np.zeros(2, np.float32)})
    regions = parse_onnx(source(data)).regions
    assert regions_cover(data, regions)
    tensors = [region for region in regions if region.name]
    assert [(t.name, t.layout, t.dims) for t in tensors] == [
        ("w", Layout.I8, (4, 64)),
        ("scale", Layout.F32, (100,)),
    ]
    assert data[tensors[0].offset : tensors[0].end] == _INT8.tobytes()


def test_four_bit_weights_are_known_by_the_node_that_reads_them() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(4, 4, 16)
    by_node = {
        r.name: r.layout for r in parse_onnx(source(onnx_file({"b": packed}, matmul_nbits="b"))).regions
    }
    alone = {r.name: r.layout for r in parse_onnx(source(onnx_file({"b": packed}))).regions}
    assert by_node["b"] is Layout.PACKED4
    assert alone["b"] is Layout.U8


def test_tensors_in_attributes_and_subgraphs_are_found() -> None:
    inner = helper.make_tensor("inner", TensorProto.FLOAT, [100], _FLOATS.tobytes(), raw=True)
    constant = helper.make_node("Constant", [], ["c"], value=inner)
    branch = helper.make_graph([constant], "branch", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [], [])
    data = helper.make_model(graph).SerializeToString()
    regions = parse_onnx(source(data)).regions
    assert [region.name for region in regions if region.name] == ["inner", "inner"]
    assert regions_cover(data, regions)


def test_float_data_is_a_tensor_like_raw_data() -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [100], _FLOATS.tolist())
    data = helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
    found = next(region for region in parse_onnx(source(data)).regions if region.name == "w")
    assert data[found.offset : found.end] == _FLOATS.tobytes()


def _nested(depth: int) -> bytes:
    graph = helper.make_graph([], "leaf", [], [])
    for _ in range(depth):
        graph = helper.make_graph([helper.make_node("If", ["x"], [], then_branch=graph)], "g", [], [])
    data: bytes = helper.make_model(graph).SerializeToString()
    return data


def test_graphs_nested_too_deeply_are_refused() -> None:
    assert parse_onnx(source(_nested(8))).regions
    with pytest.raises(ModelFileError, match="nested"):
        parse_onnx(source(_nested(9)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no graph"),
        (b"\x08\x07", "no graph"),
        (b"\x3a\x05abc", "needs 5 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x00\x01", "field number 0"),
        (b"\x08" + b"\xff" * 10, "64 bits"),
        (b"\x3a\x0e\x2a\x0c\x08\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01" + bytes(1), "negative"),
    ],
)
def test_wrong_wire_data_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        parse_onnx(source(data))


def test_files_of_nothing_but_names_are_refused_before_they_fill_the_memory() -> None:
    name = b"\x0a" + b"\x80\x20" + b"n" * 4096  # an input of a node
    node = b"\x0a" + _varint(5 * len(name)) + 5 * name
    data = b"\x08\x07\x3a" + _varint(4000 * len(node)) + 4000 * node
    with pytest.raises(ModelFileError, match="names take more than"):
        parse_onnx(source(data))


def test_very_many_fields_are_refused() -> None:
    node = b"\x08\x01" * 2_000_001
    data = b"\x3a" + _varint(len(node) + 5) + b"\x0a" + _varint(len(node)) + node
    with pytest.raises(ModelFileError, match="more than 2000000 fields"):
        parse_onnx(source(data))


def _varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + _varint(value >> 7)) if value >= 0x80 else bytes([value])


def test_a_tensor_whose_shape_does_not_fit_its_bytes_is_refused() -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [100], _FLOATS.tobytes(), raw=True)
    tensor.dims[0] = 99
    data = helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
    with pytest.raises(ModelFileError, match="its shape"):
        parse_onnx(source(data))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_byte_of_an_onnx_file_may_be_anything(data: st.DataObject) -> None:
    original = bytearray(onnx_file({"w": _INT8, "s": _FLOATS}))
    for _ in range(data.draw(st.integers(1, 3))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        regions = parse_onnx(source(bytes(original))).regions
    except ModelFileError:
        return
    assert regions_cover(bytes(original), regions)


_SAFE = {"a": ("F16", (2, 8), bytes(32)), "b": ("I8", (64,), bytes(64)), "c": ("F6_E2M3", (64,), bytes(48))}


def test_tensors_of_a_safetensors_file_are_found() -> None:
    data = safetensors_file(_SAFE)
    regions = parse_safetensors(source(data))
    assert regions_cover(data, regions)
    assert [(r.name, r.layout, r.row_bytes) for r in regions[1:]] == [
        ("a", Layout.F16, 16),
        ("b", Layout.I8, 64),
        ("c", Layout.RAW, 0),
    ]


def _safe(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "header length"),
        (struct.pack("<Q", 100) + b"{}", "needs 100 bytes"),
        (_safe(b"{"), "not JSON"),
        (_safe(b'{"a":' + b"[" * 100_000), "not JSON"),
        (_safe(b'{"a":' + b"[" * 200_000), "more entries"),
        (_safe('{"__metadata__":{}}'.encode("utf-16-le")), "not JSON"),
        (_safe(b' {"a":1}'), "does not start with '{'"),
        (_safe({"__metadata__": {"format": 1}}), "text to text"),
        (_safe({"__metadata__": []}), "text to text"),
        (_safe(b"{" + b",".join([b'"a":0'] * 800_000) + b"}"), "more entries"),
        (_safe({"a" * 5000: 1}), "name has 5000"),
        (_safe(b'{"\\ud800":1}'), "not UTF-8"),
        (_safe({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)), "its shape"),
        (_safe([]), "does not start with '{'"),
        (_safe(b'{"a":1,"a":1}'), "twice"),
        (_safe({"a": 1}), "not described"),
        (_safe({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "wrong shape"),
        (_safe({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "wrong shape"),
        (_safe({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}), "wrong shape"),
        (_safe({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}), "before it starts"),
        (_safe({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "its shape"),
        (_safe({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "does not start"),
        (_safe({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(5)), "the file at"),
    ],
)
def test_a_wrong_safetensors_header_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        parse_safetensors(source(data))


@pytest.mark.parametrize(
    "data", [b"", b"x", b"GGUF", b"\x08\x07junk", bytes(range(256)), struct.pack("<Q", 5) + b"{nope"]
)
def test_what_is_not_understood_is_raw(data: bytes) -> None:
    regions = map_regions(source(data))
    assert regions_cover(data, regions)
    assert all(region.layout is Layout.RAW for region in regions)


def test_the_kind_is_recognised_by_the_first_bytes() -> None:
    for data in (onnx_file({"w": _INT8}), safetensors_file(_SAFE)):
        assert any(region.name for region in map_regions(source(data)))
