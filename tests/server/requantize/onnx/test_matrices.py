"""What the installed file's bytes stand for, as onnxruntime itself computes with them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from protocol.errors import ModelFileError, RequestError
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.matrices import find_floats, find_matrices
from server.requantize.onnx.storage import Form
from tests.server.requantize.onnx import models

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("matrices")
    source = models.write_model(made / "model.onnx")
    models.write_dynamic(source, made / "int8.onnx")
    models.write_dynamic(source, made / "int8pc.onnx", per_channel=True)
    models.write_int4(source, made / "int4.onnx")
    models.write_qdq(source, made / "qdq0.onnx", axis=0)
    models.write_qdq(source, made / "qdq1.onnx", axis=1)
    return made


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("int8", ["embedding", "w1", "w2"]),
        ("int8pc", ["embedding", "w1", "w2"]),
        ("int4", ["w1", "w2"]),
        ("qdq0", ["w1", "w2"]),
        ("qdq1", ["w1", "w2"]),
    ],
)
def test_installed_codes_are_read_as_onnxruntime_reads_them(
    folder: Path, kind: str, names: list[str]
) -> None:
    new, installed = Graph(folder / "model.onnx"), Graph(folder / f"{kind}.onnx")
    matrices, kept = find_matrices(new, installed)
    assert [each.name for each in matrices] == names
    assert not kept
    model = onnx.load(str(folder / "model.onnx"))
    for tensor in model.graph.initializer:
        for matrix in matrices:
            if matrix.name == tensor.name:
                read = matrix.installed_weights(installed)
                whole = numpy_helper.to_array(tensor)
                assert np.abs(read - whole).max() < 0.6 * float(
                    matrix.grid.scales.max()
                )  # rounded to nearest
                tensor.CopyFrom(numpy_helper.from_array(read, tensor.name))
    onnx.save(model, str(folder / "read.onnx"))
    samples = models.drawn("some", 3)
    scores, said = models.run(folder / "read.onnx", samples), models.run(folder / f"{kind}.onnx", samples)
    tolerance = (
        1e-4 if kind in {"int4", "qdq0"} else 0.03
    )  # the runtime rounds what goes into the others, too
    assert np.abs(scores - said).max() < tolerance * np.abs(said).max()


def test_codes_go_back_into_the_bytes_that_they_came_from(folder: Path) -> None:
    for kind in ("int8", "int8pc", "int4", "qdq0"):
        installed = Graph(folder / f"{kind}.onnx")
        content = (folder / f"{kind}.onnx").read_bytes()
        for matrix in find_matrices(Graph(folder / "model.onnx"), installed)[0]:
            data = matrix.installed(installed)
            assert content[matrix.offset : matrix.offset + len(data)] == data
            assert matrix.form.joined(np.array(matrix.form.codes(data), np.int16), data) == data


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_code_moves_only_its_own_bits_and_what_fills_up_a_row_stays(bits: int) -> None:
    form = Form((40, 3), bits=bits, block=32, is_transposed=True, is_stored_by_rows=True)
    data = np.random.default_rng(1).integers(0, 256, form.length).astype(np.uint8).tobytes()
    assert len(data) == 3 * 64 * bits // 8
    codes = np.array(form.codes(data), np.int16)
    assert codes.shape == (3, 40)
    codes[1, 39] ^= 1
    changed = np.frombuffer(form.joined(codes, data), np.uint8) ^ np.frombuffer(data, np.uint8)
    place = 64 + 39
    assert np.flatnonzero(changed).tolist() == [place * bits // 8]
    assert changed.max() == 1 << (place * bits % 8)


def test_a_tensor_that_is_not_known_in_the_new_model_stays_as_installed_and_is_named(
    folder: Path, tmp_path: Path
) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    for tensor in model.graph.initializer:
        tensor.name = "other" if tensor.name == "w1" else tensor.name
    for node in model.graph.node:
        node.input[:] = ["other" if name == "w1" else name for name in node.input]
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    new, installed = Graph(tmp_path / "renamed.onnx"), Graph(folder / "int8.onnx")
    matrices, kept = find_matrices(new, installed)
    assert [each.name for each in matrices] == ["embedding", "w2"]
    assert kept == {"w1_quantized": "the new model has no floats w1"}


def test_only_floats_that_differ_are_listed(folder: Path, tmp_path: Path) -> None:
    other = models.write_model(tmp_path / "other.onnx", noise=0.1)
    installed = Graph(folder / "int8.onnx")
    assert find_floats(Graph(folder / "model.onnx"), installed) == ()
    found = find_floats(Graph(other), installed)
    assert {each.name for each in found} == {"b1", "b2"}
    content = (folder / "int8.onnx").read_bytes()
    for each in found:  # one of them has so few bytes that no tensor map names it
        data = installed.array(each.name).tobytes()
        assert content[each.offset : each.offset + len(data)] == data


def test_codes_of_a_reduced_range_stay_in_it() -> None:
    form = Form((2, 3), is_signed=True)
    assert form.range(np.array([-64, 3, 64])) == (-64, 64)
    assert form.range(np.array([-65, 3, 64])) == (-127, 127)
    assert form.range(np.array([-128, 3])) == (-128, 127)
    assert Form((2, 3)).range(np.array([0, 127])) == (0, 127)
    assert Form((2, 3)).range(np.array([0, 128])) == (0, 255)


def test_what_is_no_quantized_file_of_the_model_is_refused_with_the_reason(
    folder: Path, tmp_path: Path
) -> None:
    new = Graph(folder / "model.onnx")
    with pytest.raises(ModelFileError, match="no quantized tensor is known to be one of"):
        find_matrices(new, new)
    with pytest.raises(RequestError, match="no such file"):
        Graph(tmp_path / "none.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((folder / "int8.onnx").read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=str(damaged)):
        Graph(damaged)
    damaged.write_bytes(b"\x0a\x02hi")
    with pytest.raises(ModelFileError, match="there is no graph"):
        Graph(damaged)
    model = onnx.load(str(folder / "int8.onnx"))
    scale = next(each for each in model.graph.initializer if each.name == "w1_scale")
    scale.CopyFrom(numpy_helper.from_array(np.float32("nan"), "w1_scale"))
    onnx.save(model, str(damaged))
    with pytest.raises(ModelFileError, match="the scales of w1_quantized are no numbers"):
        find_matrices(new, Graph(damaged))
    onnx.save(
        onnx.load(str(folder / "model.onnx")),
        str(damaged),
        save_as_external_data=True,
        location="beside",
        size_threshold=0,
    )
    with pytest.raises(ModelFileError, match="its tensors lie in beside"):
        Graph(damaged)
