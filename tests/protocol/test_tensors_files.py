"""Maps of releases: tensors in files of external data, models that are split, packed weights and their scales."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper

from protocol.errors import ModelFileError
from protocol.tensors import (
    BytesSource,
    JoinedSource,
    Layout,
    Region,
    join_maps,
    map_external,
    map_files,
    map_regions,
    parse_onnx,
    parse_safetensors,
)
from tests.protocol.model_files import (
    GgufBuilder,
    GgufTensor,
    external_tensor,
    onnx_model,
    regions_cover,
    safetensors_file,
    source,
)

_W = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
_B = np.arange(-64, 64, dtype=np.int8).reshape(2, 64)
_DATA = _W.tobytes() + bytes(4096 - 128) + bytes(128) + _B.tobytes()
_W_ENTRIES = {"location": "model.onnx.data", "offset": "0", "length": "8192"}
_B_ENTRIES = {"location": "model.onnx.data", "offset": "12288", "length": "128"}


def _named(regions: tuple[Region, ...]) -> dict[str, Region]:
    return {region.name: region for region in regions if region.name}


def _model(**entries: dict[str, str]) -> bytes:
    values: dict[str, npt.NDArray[Any]] = {"w": _W, "b": _B, "tied": _W}
    return onnx_model([], [external_tensor(name, values[name], **entries[name]) for name in entries])


def test_the_map_of_an_external_file_comes_from_the_model_beside_it() -> None:
    files = {"model.onnx": source(_model(w=_W_ENTRIES, b=_B_ENTRIES)), "model.onnx.data": source(_DATA)}
    maps = map_files(files)
    assert regions_cover(_DATA, maps["model.onnx.data"])
    assert [(r.name, r.layout, r.offset, r.length, r.dims, r.row_bytes) for r in maps["model.onnx.data"]] == [
        ("w", Layout.F32, 0, 8192, (64, 32), 128),
        ("", Layout.RAW, 8192, 4096, (), 0),
        ("b", Layout.I8, 12288, 128, (2, 64), 64),
    ]
    assert maps["model.onnx"] == map_regions(files["model.onnx"])
    assert [region.layout for region in map_files({"model.onnx.data": source(_DATA)})["model.onnx.data"]] == [
        Layout.RAW
    ]


def test_offset_and_length_of_an_external_tensor_may_be_left_out() -> None:
    parsed = parse_onnx(source(_model(w={"location": "./model.onnx.data"})))
    assert tuple(parsed.external) == ("model.onnx.data",)
    assert [(r.offset, r.length) for r in parsed.external["model.onnx.data"]] == [(0, 8192)]


def test_tied_tensors_are_mapped_once() -> None:
    parsed = parse_onnx(source(_model(w=_W_ENTRIES, tied=_W_ENTRIES)))
    assert [region.name for region in parsed.external["model.onnx.data"]] == ["w"]


@pytest.mark.parametrize(
    "location",
    [
        "",
        ".",
        "..",
        "../w",
        "a/../../w",
        "/etc/passwd",
        "a//b",
        "a/",
        "C:w",
        "a\\b",
        "a\0b",
        "a\nb",
        "./../w",
    ],
)
def test_a_location_outside_of_the_folder_of_the_model_is_refused(location: str) -> None:
    data = _model(w=_W_ENTRIES | {"location": location})
    with pytest.raises(ModelFileError, match="inside the model's folder"):
        parse_onnx(source(data))
    assert all(region.layout is Layout.RAW for region in map_regions(source(data)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "-1"}, "offset or length '-1'"),
        ({"offset": "1" * 20}, "offset or length '1111"),
        ({"offset": "\u0661"}, "offset or length"),
        ({"length": "8191"}, "its shape"),
        ({"length": "1e3"}, "offset or length '1e3'"),
    ],
)
def test_wrong_external_entries_are_refused(entries: dict[str, str], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        parse_onnx(source(_model(w=_W_ENTRIES | entries)))


def test_external_tensors_past_the_end_of_their_file_or_over_each_other_are_refused() -> None:
    tensors = parse_onnx(source(_model(w=_W_ENTRIES, b=_B_ENTRIES))).external["model.onnx.data"]
    with pytest.raises(ModelFileError, match="'b' ends at 12416, after its file's end at 12415"):
        map_external(tensors, len(_DATA) - 1)
    crossing = parse_onnx(source(_model(w=_W_ENTRIES, b=_B_ENTRIES | {"offset": "8000"}))).external
    with pytest.raises(ModelFileError, match="overlaps"):
        map_external(crossing["model.onnx.data"], len(_DATA))
    files = {"m.onnx": source(_model(w=_W_ENTRIES)), "model.onnx.data": source(_DATA[:5000])}
    assert [region.layout for region in map_files(files)["model.onnx.data"]] == [Layout.RAW]


def test_tensors_in_more_files_than_a_release_could_hold_are_refused() -> None:
    tensors = [external_tensor(f"w{i}", _B, location=f"w{i}.bin") for i in range(65)]
    with pytest.raises(ModelFileError, match="more than 64 files"):
        parse_onnx(source(onnx_model([], tensors)))


def test_nodes_tell_which_tensor_holds_the_scales_and_how_many_bits_a_code_has() -> None:
    def packed(name: str, *shape: int) -> TensorProto:
        values = np.zeros(shape, np.uint8)
        return helper.make_tensor(name, TensorProto.UINT8, shape, values.tobytes(), raw=True)

    nodes = [
        helper.make_node("MatMulNBits", ["x", "w4", "s4", "z4"], ["a"], domain="com.microsoft", bits=4),
        helper.make_node("MatMulNBits", ["a", "w8", "s8"], ["b"], domain="com.microsoft", bits=8),
        helper.make_node("GatherBlockQuantized", ["embedding", "ids", "s"], ["c"], domain="com.microsoft"),
        helper.make_node("QLinearConv", ["c", "xs", "xz", "kernel", "ks", "kz", "ys", "yz"], ["d"]),
        helper.make_node("DequantizeLinear", ["plain", "ps"], ["y"]),
    ]
    tensors = [
        packed("w4", 64, 3, 16),
        packed("z4", 64, 2),
        packed("w8", 64, 3, 32),
        packed("embedding", 100, 32),
        packed("kernel", 8, 16, 3, 3),
        packed("plain", 64, 64),
        helper.make_tensor("other_scale", TensorProto.FLOAT, [], [1.0]),
        packed("other_quantized", 64, 2),
        packed("lonely_quantized", 64, 2),
    ]
    found = _named(map_regions(source(onnx_model(nodes, tensors))))
    assert {name: (r.layout, r.dims, r.row_bytes, r.scales) for name, r in found.items()} == {
        "w4": (Layout.PACKED4, (64, 96), 48, "s4"),
        "z4": (Layout.PACKED4, (64, 4), 2, ""),
        "w8": (Layout.U8, (64, 96), 96, "s8"),
        "embedding": (Layout.PACKED4, (100, 64), 32, "s"),
        "kernel": (Layout.U8, (8, 16, 3, 3), 144, "ks"),
        "plain": (Layout.U8, (64, 64), 64, "ps"),
        "other_quantized": (Layout.U8, (64, 2), 2, "other_scale"),
        "lonely_quantized": (Layout.U8, (64, 2), 2, ""),
    }


def test_rows_of_integer_matrices_run_over_the_outputs_as_their_scales_do() -> None:
    weights = helper.make_tensor("w_quantized", TensorProto.INT8, [96, 64], bytes(96 * 64), raw=True)
    scales = helper.make_tensor("w_scale", TensorProto.FLOAT, [64], bytes(256), raw=True)
    node = helper.make_node("MatMulInteger", ["x", "w_quantized"], ["y"])
    found = _named(map_regions(source(onnx_model([node], [weights, scales]))))["w_quantized"]
    assert (found.dims, found.row_bytes, found.scales) == ((96, 64), 64, "w_scale")


def test_int4_initializers_are_codes() -> None:
    weights = helper.make_tensor("w", TensorProto.INT4, [96, 64], bytes(96 * 32), raw=True)
    found = _named(map_regions(source(onnx_model([], [weights]))))["w"]
    assert (found.layout, found.row_bytes) == (Layout.I4, 32)


def _int4_layer(weight: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A layer of 128 inputs and 256 outputs with groups of 32."""
    return {
        "l.qweight": ("I32", weight, bytes(4 * weight[0] * weight[1])),
        "l.qzeros": ("I32", (4, 32), bytes(512)),
        "l.scales": ("F16", (4, 256), bytes(2048)),
    }


_AWQ, _GPTQ = _int4_layer((128, 32)), _int4_layer((16, 256))


@pytest.mark.parametrize(
    ("layer", "weight", "zeros"),
    [
        pytest.param(_AWQ, (Layout.AWQ4, 128), Layout.AWQ4, id="awq"),
        pytest.param(_GPTQ, (Layout.GPTQ4, 1024), Layout.PACKED4, id="gptq"),
    ],
)
def test_words_of_eight_codes_are_recognised_by_name_and_shape(
    layer: dict[str, tuple[str, tuple[int, ...], bytes]], weight: tuple[Layout, int], zeros: Layout
) -> None:
    found = _named(parse_safetensors(source(safetensors_file(layer))))
    matrix, points = found["l.qweight"], found["l.qzeros"]
    assert (matrix.layout, matrix.dims, matrix.row_bytes, matrix.scales) == (
        weight[0],
        (128, 256),
        weight[1],
        "l.scales",
    )
    assert (points.layout, points.dims, points.row_bytes) == (zeros, (4, 256), 128)


def test_words_that_do_not_fit_their_scales_stay_words() -> None:
    without = {name: part for name, part in _AWQ.items() if name != "l.qzeros"}
    three_bits = _GPTQ | {"l.qzeros": ("I32", (4, 24), bytes(384))}
    for layer in (without, three_bits):
        assert _named(parse_safetensors(source(safetensors_file(layer))))["l.qweight"].layout is Layout.I32


def test_fp8_and_mxfp4_weights_know_their_scales() -> None:
    data = safetensors_file(
        {
            "a.weight": ("F8_E4M3", (128, 128), bytes(128 * 128)),
            "a.weight_scale_inv": ("F32", (1, 1), bytes(4)),
            "b.weight": ("F8_E5M2", (8, 8), bytes(64)),
            "e_blocks": ("U8", (2, 4, 3, 16), bytes(384)),
            "e_scales": ("U8", (2, 4, 3), bytes(24)),
        }
    )
    found = _named(parse_safetensors(source(data)))
    assert (found["a.weight"].layout, found["a.weight"].scales) == (Layout.F8, "a.weight_scale_inv")
    assert (found["b.weight"].layout, found["b.weight"].scales) == (Layout.F8, "")
    blocks = found["e_blocks"]
    assert (blocks.layout, blocks.dims, blocks.row_bytes, blocks.scales) == (
        Layout.PACKED4,
        (2, 4, 96),
        48,
        "e_scales",
    )


def test_a_packed_layer_may_be_split_over_two_files() -> None:
    names = list(_AWQ)
    files = {
        "1.safetensors": source(safetensors_file({names[0]: _AWQ[names[0]]})),
        "2.safetensors": source(safetensors_file({name: _AWQ[name] for name in names[1:]})),
    }
    maps = map_files(files)
    assert _named(maps["1.safetensors"])["l.qweight"].layout is Layout.AWQ4
    assert _named(maps["2.safetensors"])["l.qzeros"].layout is Layout.AWQ4


def test_split_files_are_read_and_mapped_as_one() -> None:
    parts = [
        GgufBuilder([GgufTensor(name, (32, 2), 2, bytes([number]) * 36)]).build()
        for number, name in enumerate("abc")
    ]
    sources = [source(part) for part in parts]
    joined = JoinedSource(sources)
    whole = b"".join(parts)
    regions = join_maps([map_regions(each) for each in sources], [len(part) for part in parts])
    assert regions_cover(whole, regions)
    assert [joined.read_at(r.offset, r.length) for r in regions if r.name] == [
        bytes([n]) * 36 for n in range(3)
    ]
    for offset in range(0, len(whole) + 3, 7):
        for length in (0, 1, 50, 500):
            assert joined.read_at(offset, length) == whole[offset : offset + length]
    assert joined.length == len(whole)


def test_joining_nothing_and_empty_sources_is_reading_nothing() -> None:
    assert JoinedSource([]).read_at(0, 10) == b""
    assert JoinedSource([BytesSource(b""), BytesSource(b"ab"), BytesSource(b"")]).read_at(0, 10) == b"ab"
