"""Attacks by model files, as `whimbrel release add` meets them: each is refused with its reason, and nothing is copied.

Rows 67 to 71 of `docs/security/input.md`. The attacks on single fields, one by one, are in `tests/protocol/test_tensors_*`.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, SparseTensorProto, TensorProto, helper

from device.adapters.engines import LocalEngine
from device.ports import ModelSource, TrialOrder
from protocol.errors import ModelFileError, ReleaseError, RequestError, WhimbrelError
from protocol.release import Release, RuntimeName
from server.adapters.blobs import FolderBlobs
from server.releases.importer import import_release
from tests.models import health_plan
from tests.protocol.model_files import (
    GgufBuilder,
    GgufTensor,
    external_model,
    external_tensor,
    onnx_model,
    safetensors_file,
)
from tests.server.samples import write_health

_UINT16, _INT32, _UINT32, _STRING, _ARRAY, _UINT64 = 2, 5, 4, 8, 9, 10
_Q4_0, _UNKNOWN_TYPE = 2, 1000
_W = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
_MEMORY = "*/_ORT_MEM_ADDR_/*"


def _add(folder: Path, runtime: RuntimeName, *files: Path) -> Release:
    if runtime == "onnx":
        health = write_health(folder / "health.json")
    else:
        prompt = b'{"kind":"text","name":"a","prompt":"a","completion":"b","logprob_mean_min":-9.0}'
        health = folder / "health.json"
        health.write_bytes(
            b'{"prompts":[' + prompt + b'],"latency_p99_ms_max":9.0,"memory_peak_bytes_max":9}'
        )
    blobs = FolderBlobs(folder / "blobs")
    return import_release(blobs, family="f", version="1", files=list(files), runtime=runtime, health=health)


def _refused(
    folder: Path, runtime: RuntimeName, kind: type[WhimbrelError], message: str, *files: Path
) -> None:
    with pytest.raises(kind) as refused:
        _add(folder, runtime, *files)
    assert message in str(refused.value)
    assert not list((folder / "blobs").glob("??/*")), "something was copied"


def _quantized(name: str = "w", offset: int | None = None) -> GgufTensor:
    return GgufTensor(name, (32, 2), _Q4_0, bytes(36), offset)


GGUF_ATTACKS = {
    "metadata count overflow, CVE-2024-23605": (
        GgufBuilder(key_count=(1 << 64) - 1),
        "metadata count 18446744073709551615 is more than",
    ),
    "tensor count overflow, CVE-2024-21836": (
        GgufBuilder(tensor_count=1 << 61),
        "tensor count 2305843009213693952 is more than",
    ),
    "counts that the file cannot hold": (GgufBuilder(key_count=60_000), "metadata count 60000 is more than"),
    "string longer than the file, CVE-2024-23496": (
        GgufBuilder(key_values=[("a", _STRING, struct.pack("<Q", (1 << 64) - 1))]),
        "has 18446744073709551615 bytes, at most",
    ),
    "array size overflow, CVE-2024-21825": (
        GgufBuilder(key_values=[("a", _ARRAY, struct.pack("<IQ", _UINT64, 1 << 61))]),
        "elements, more than the file can hold",
    ),
    "array of strings that goes on for ever": (
        GgufBuilder(key_values=[("a", _ARRAY, struct.pack("<IQ", _STRING, 1 << 60))]),
        "elements, more than the file can hold",
    ),
    "nested arrays": (
        GgufBuilder(key_values=[("a", _ARRAY, struct.pack("<IQ", _ARRAY, 1))]),
        "array of type 9",
    ),
    "dimension product overflow, CVE-2024-21802, CVE-2025-53630": (
        GgufBuilder([GgufTensor("w", (1 << 32, 1 << 32), _Q4_0, bytes(36))]),
        "more than 9223372036854775807 weights",
    ),
    "dimension product overflow of an unknown type": (
        GgufBuilder([GgufTensor("w", (1 << 62, 4), _UNKNOWN_TYPE, bytes(36))]),
        "more than 9223372036854775807 weights",
    ),
    "negative dimension": (
        GgufBuilder([GgufTensor("w", ((1 << 64) - 32,), _Q4_0, bytes(36))]),
        "more than 9223372036854775807 weights",
    ),
    "dimension of zero": (GgufBuilder([GgufTensor("w", (32, 0), _Q4_0, b"")]), "dimension of 0"),
    "rank beyond ggml's array": (
        GgufBuilder([GgufTensor("w", (32, 1, 1, 1, 1), _Q4_0, bytes(18))]),
        "has 5 dimensions",
    ),
    "division by a block of zero weights": (
        GgufBuilder([GgufTensor("w", (32,), 36, bytes(18))]),
        "has the type 36, which was removed",
    ),
    "tensor offset wraps around, GHSA-3p4r-fq3f-q74v": (
        GgufBuilder([_quantized(offset=(1 << 64) - 64)]),
        "has offset 18446744073709551552, expected 0",
    ),
    "tensors over each other": (
        GgufBuilder([_quantized("a"), _quantized("b", offset=0)]),
        "'b' has offset 0, expected 64",
    ),
    "tensor past the end of the file": (
        GgufBuilder([GgufTensor("w", (32, 9), _Q4_0, bytes(36))]),
        "the file at",
    ),
    "bytes that no tensor names": (GgufBuilder([_quantized()], tail=bytes(64)), "follow the last tensor"),
    "alignment of two gigabytes": (
        GgufBuilder(key_values=[("general.alignment", _UINT32, struct.pack("<I", 1 << 31))]),
        "general.alignment 2147483648 is not a power of two",
    ),
    "alignment of zero": (
        GgufBuilder(key_values=[("general.alignment", _UINT32, bytes(4))]),
        "general.alignment 0 is not a power of two",
    ),
    "alignment of another type": (
        GgufBuilder(key_values=[("general.alignment", _UINT64, struct.pack("<Q", 32))]),
        "has the type 10, expected 4",
    ),
    "two names that C reads as one": (
        GgufBuilder([_quantized("a\0b"), _quantized("a\0c")]),
        "cannot be printed",
    ),
    "tensor named twice": (GgufBuilder([_quantized(), _quantized()]), "name occurs twice"),
    "key twice": (
        GgufBuilder(key_values=[("a", _UINT32, bytes(4)), ("a", _UINT32, bytes(4))]),
        "'a' occurs twice",
    ),
    "the other byte order": (GgufBuilder(version=3 << 24), "a big-endian file"),
}


@pytest.mark.parametrize("attack", GGUF_ATTACKS)
def test_row_67_and_68_gguf(tmp_path: Path, attack: str) -> None:
    builder, message = GGUF_ATTACKS[attack]
    model = tmp_path / "model.gguf"
    model.write_bytes(builder.build())
    _refused(tmp_path, "llama", ModelFileError, message, model)


def _shard(number: int, count: int, tensor: str = "", said: int = 2) -> bytes:
    keys = [
        ("split.no", _UINT16, struct.pack("<H", number)),
        ("split.count", _UINT16, struct.pack("<H", count)),
        ("split.tensors.count", _INT32, struct.pack("<i", said)),
    ]
    return GgufBuilder([_quantized(tensor or f"w{number}")], keys).build()


def _shards(folder: Path, *parts: bytes) -> list[Path]:
    paths = [folder / f"m-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    return paths


def test_a_model_in_several_gguf_files_is_taken_whole(tmp_path: Path) -> None:
    paths = _shards(tmp_path, _shard(0, 2), _shard(1, 2))
    assert [file.name for file in _add(tmp_path, "llama", *paths).files] == [path.name for path in paths]


SHARD_ATTACKS: dict[str, tuple[Callable[[Path], list[Path]], type[WhimbrelError], str]] = {
    "damage behind the first file": (
        lambda at: _shards(at, _shard(0, 2), GgufBuilder(tensor_count=1 << 60).build()),
        ModelFileError,
        "m-00002-of-00002.gguf: GGUF: tensor count",
    ),
    "a part is missing": (
        lambda at: _shards(at, _shard(0, 2), _shard(1, 2))[:1],
        ReleaseError,
        "parts are missing: m-00002-of-00002.gguf",
    ),
    "a part of another model": (
        lambda at: _shards(at, _shard(0, 2), _shard(1, 3)),
        ModelFileError,
        "is not part 2 of 2",
    ),
    "a part twice": (
        lambda at: _shards(at, _shard(0, 2), _shard(0, 2, "w1")),
        ModelFileError,
        "is not part 2 of 2",
    ),
    "a tensor in two parts": (
        lambda at: _shards(at, _shard(0, 2), _shard(1, 2, "w0")),
        ModelFileError,
        "'w0', which another part has",
    ),
    "tensors that no part has": (
        lambda at: _shards(at, _shard(0, 2, said=3), _shard(1, 2)),
        ModelFileError,
        "have 3 tensors, they have 2",
    ),
    "more parts than a release has files": (
        lambda at: _shards(at, _shard(0, 65_535)),
        ReleaseError,
        "is split into 65535 parts",
    ),
    "the second part first": (
        lambda at: list(reversed(_shards(at, _shard(0, 2), _shard(1, 2)))),
        ReleaseError,
        "not the first by its name",
    ),
}


@pytest.mark.parametrize("attack", SHARD_ATTACKS)
def test_row_67_gguf_in_several_files(tmp_path: Path, attack: str) -> None:
    write, kind, message = SHARD_ATTACKS[attack]
    _refused(tmp_path, "llama", kind, message, *write(tmp_path))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return external_model(tmp_path / "model", {"w": _W})


def _elsewhere(location: str = "/etc/passwd", **entries: str) -> TensorProto:
    return external_tensor("w", _W, location=location, **entries)


LOCATIONS = {
    "traversal, CVE-2022-25882": "../../etc/passwd",
    "traversal in the middle, CVE-2024-27318": "data/../../etc/passwd",
    "absolute": "/etc/passwd",
    "traversal in Windows' way": "..\\secret",
    "drive": "C:secret",
    "empty base": "",
    "the folder itself": ".",
    "zero byte": "model.onnx.data\0.txt",
    "pattern": "*",
}


@pytest.mark.parametrize("attack", LOCATIONS)
def test_row_69_onnx_external_data_elsewhere(tmp_path: Path, model: Path, attack: str) -> None:
    model.write_bytes(onnx_model([], [_elsewhere(LOCATIONS[attack])]))
    _refused(tmp_path, "onnx", ModelFileError, "no path inside the model's folder", model)


def test_row_69_onnx_external_data_in_a_folder(tmp_path: Path, model: Path) -> None:
    model.write_bytes(onnx_model([], [_elsewhere("data/model.onnx.data")]))
    data = model.with_name("model.onnx.data")
    _refused(tmp_path, "onnx", ReleaseError, "a release has no folders", model, data)


def _in_sparse_initializer(tensor: TensorProto, graph: GraphProto, _model: ModelProto) -> None:
    graph.sparse_initializer.append(SparseTensorProto(values=tensor, dims=[64]))


def _in_sparse_indices(tensor: TensorProto, graph: GraphProto, _model: ModelProto) -> None:
    graph.sparse_initializer.append(SparseTensorProto(indices=tensor, dims=[64]))


def _in_attribute(tensor: TensorProto, graph: GraphProto, _model: ModelProto) -> None:
    graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _in_sparse_attribute(tensor: TensorProto, graph: GraphProto, _model: ModelProto) -> None:
    sparse = SparseTensorProto(values=tensor, dims=[64])
    attribute = AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(attribute)
    graph.node.append(node)


def _in_subgraph(tensor: TensorProto, graph: GraphProto, _model: ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor])
    graph.node.append(helper.make_node("If", ["x"], ["c"], then_branch=inner))


def _in_function(tensor: TensorProto, _graph: GraphProto, model: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("f", "g", [], ["c"], [node], []))


def _in_function_default(tensor: TensorProto, _graph: GraphProto, model: ModelProto) -> None:
    function = helper.make_function("f", "g", [], [], [], [])
    function.attribute_proto.append(helper.make_attribute("value", tensor))
    model.functions.append(function)


def _in_training(tensor: TensorProto, _graph: GraphProto, model: ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


def _in_training_start(tensor: TensorProto, _graph: GraphProto, model: ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(tensor)


HIDING_PLACES = [
    _in_sparse_initializer,
    _in_sparse_indices,
    _in_attribute,
    _in_sparse_attribute,
    _in_subgraph,
    _in_function,
    _in_function_default,
    _in_training,
    _in_training_start,
]


@pytest.mark.parametrize("hide", HIDING_PLACES, ids=lambda hide: hide.__name__.strip("_"))
def test_row_69_onnx_external_data_in_every_corner_of_a_model(
    tmp_path: Path, model: Path, hide: Callable[[TensorProto, GraphProto, ModelProto], None]
) -> None:
    hidden = ModelProto.FromString(onnx_model([], []))
    hide(_elsewhere(), hidden.graph, hidden)
    model.write_bytes(hidden.SerializeToString())
    _refused(tmp_path, "onnx", ModelFileError, "'/etc/passwd', which is no path inside", model)


def _twice(tensor: TensorProto) -> None:
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "other"


def _no_such_key(tensor: TensorProto) -> None:
    entry = tensor.external_data.add()
    entry.key, entry.value = "basepath", "/etc"


def _prepacked(tensor: TensorProto) -> None:
    entry = tensor.external_data.add()
    entry.key, entry.value = "prepacked_0", "MatMul|0;8192;x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_twice, "'location' of external data occurs twice", id="two locations"),
        pytest.param(
            _no_such_key, "'basepath' of external data is not known", id="attribute injection, CVE-2026-34445"
        ),
        pytest.param(_prepacked, "'prepacked_0' of external data is not known", id="prepacked weights"),
    ],
)
def test_row_69_onnx_external_data_entries(
    tmp_path: Path, model: Path, change: Callable[[TensorProto], None], message: str
) -> None:
    tensor = _elsewhere("model.onnx.data")
    change(tensor)
    model.write_bytes(onnx_model([], [tensor]))
    data = model.with_name("model.onnx.data")
    _refused(tmp_path, "onnx", ModelFileError, message, model, data)


def test_row_69_onnx_external_data_of_a_tensor_that_says_it_has_none(tmp_path: Path, model: Path) -> None:
    tensor = _elsewhere()
    tensor.data_location = TensorProto.DEFAULT
    model.write_bytes(onnx_model([], [tensor]))
    _refused(tmp_path, "onnx", ModelFileError, "'/etc/passwd', which is no path inside", model)


def test_row_69_symbolic_link_as_external_data(tmp_path: Path, model: Path) -> None:
    secret = tmp_path / "secret"
    data = model.with_name("model.onnx.data")
    data.rename(secret)
    data.symlink_to(secret)
    _refused(tmp_path, "onnx", RequestError, "is a link to a file elsewhere", model, data)


def test_row_69_hard_link_as_external_data(tmp_path: Path, model: Path) -> None:
    data = model.with_name("model.onnx.data")
    os.link(data, tmp_path / "secret")
    _refused(tmp_path, "onnx", RequestError, "is a link to a file elsewhere", model, data)


def test_row_69_pipe_as_external_data(tmp_path: Path, model: Path) -> None:
    data = model.with_name("model.onnx.data")
    data.unlink()
    os.mkfifo(data)
    _refused(tmp_path, "onnx", RequestError, "is no plain file", model, data)


def test_a_model_may_lie_behind_a_link_as_in_caches(tmp_path: Path, model: Path) -> None:
    link = tmp_path / "model.onnx"
    link.symlink_to(model)
    assert [file.name for file in _add(tmp_path, "onnx", link, model.with_name("model.onnx.data")).files] == [
        "model.onnx",
        "model.onnx.data",
    ]


MARKERS = [_MEMORY, "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*", "./*/_ORT_MEM_ADDR_/*"]


@pytest.mark.parametrize("marker", MARKERS)
def test_row_70_onnx_address_in_the_memory_of_its_reader(tmp_path: Path, model: Path, marker: str) -> None:
    tensor = _elsewhere(marker, offset="93824992231424", length="8192")
    model.write_bytes(onnx_model([], [tensor]))
    _refused(tmp_path, "onnx", ModelFileError, "an address in the memory of its reader", model)


def test_row_70_onnx_address_in_memory_kills_no_device(tmp_path: Path) -> None:
    """What the importer refuses, the pinned onnxruntime refuses as well, and the trial survives it."""
    w = external_tensor("w", _W, location=_MEMORY, offset="4096", length="8192")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    path = tmp_path / "model.onnx"
    opset = helper.make_opsetid("", 21)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
    evidence = LocalEngine().trial(TrialOrder(ModelSource("onnx", str(path)), health_plan(), 1 << 30))
    assert evidence.detail.startswith("runtime refused the file")


def test_onnx_program_for_an_accelerator(tmp_path: Path, model: Path) -> None:
    node = helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="../../engine.so"
    )
    model.write_bytes(onnx_model([node], []))
    _refused(tmp_path, "onnx", ModelFileError, "a program for one kind of accelerator", model)


def test_onnx_shape_product_overflow(tmp_path: Path, model: Path) -> None:
    for dims in ([1 << 62, 4], [0, 1 << 62, 1 << 62]):
        model.write_bytes(onnx_model([], [TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT)]))
        _refused(tmp_path, "onnx", ModelFileError, "which no file can hold", model)


def _varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + _varint(value >> 7)) if value >= 0x80 else bytes([value])


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def test_onnx_numbers_that_libraries_cut_down_to_others(tmp_path: Path, model: Path) -> None:
    tensor = _elsewhere().SerializeToString()
    hidden = _varint((1 << 32 | 5) << 3 | 2) + _varint(len(tensor)) + tensor  # field 5 after a cut
    kind = _varint(2 << 3) + _varint(1 << 32 | 1)  # float after a cut
    for graph, message in ((hidden, "field number 4294967301"), (_message(5, kind), "no value of an enum")):
        model.write_bytes(b"\x08\x0a" + _message(7, graph))
        _refused(tmp_path, "onnx", ModelFileError, message, model)


def test_row_71_archives_and_second_models_are_looked_into_or_refused(tmp_path: Path, model: Path) -> None:
    """No archive is ever unpacked: a file is a file. One that claims to be a model is parsed like the first."""
    data = model.with_name("model.onnx.data")
    for name, content, message in (
        ("more.onnx", b"PK\x03\x04", "more.onnx: ONNX: "),
        ("more.safetensors", safetensors_file({})[:-1], "more.safetensors: safetensors: "),
        ("MORE.GGUF", b"PK\x03\x04", "MORE.GGUF: GGUF: "),
    ):
        other = model.with_name(name)
        other.write_bytes(content)
        _refused(tmp_path, "onnx", ModelFileError, message, model, data, other)


@pytest.mark.parametrize("name", ["..", "a\nb", "-rf", ".hidden", "a:b", "a\\b"])
def test_row_71_names_that_would_leave_a_slot(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    path = folder / name
    if name != "..":
        path.write_bytes(b"")
    _refused(tmp_path, "onnx", ReleaseError, "name", path)
