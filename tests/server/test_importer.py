"""What is refused when a release is made of several files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.errors import ModelFileError, ReleaseError, WhimbrelError
from protocol.release import Release
from server.adapters.blobs import FolderBlobs
from server.releases.importer import import_release
from tests.protocol.model_files import external_model, external_tensor, onnx_model, weights
from tests.server.samples import write_health

_W = weights((64, 32), 1)
_BIAS = weights((8,), 2)


def _import(folder: Path, *files: Path) -> Release:
    blobs = FolderBlobs(folder / "blobs")
    health = write_health(folder / "health.json")
    return import_release(blobs, family="f", version="1", files=list(files), runtime="onnx", health=health)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return external_model(tmp_path / "model", {"w": _W})


def test_a_model_with_its_external_data_is_taken(tmp_path: Path, model: Path) -> None:
    release = _import(tmp_path, model, model.with_name("model.onnx.data"))
    assert [(file.name, file.length) for file in release.files][1] == ("model.onnx.data", _W.nbytes)


def test_a_missing_file_of_external_data_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ReleaseError, match=r"tensors in other files: model\.onnx\.data \(name them behind"):
        _import(tmp_path, model)
    model.with_name("model.onnx.data").rename(model.with_name("other.data"))
    with pytest.raises(ReleaseError, match=r"model\.onnx\.data"):
        _import(tmp_path, model, model.with_name("other.data"))


def _entries(**entries: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(onnx_model([], [external_tensor("w", _W, **entries)]))

    return write


def _cut(path: Path) -> None:
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])


def _small_past_the_end(path: Path) -> None:
    bias = external_tensor("bias", _BIAS, location="model.onnx.data", offset="8190", length="32")
    path.write_bytes(onnx_model([], [external_tensor("w", _W, location="model.onnx.data"), bias]))


def _overlapping(path: Path) -> None:
    tensors = [
        external_tensor(f"w{at}", _W[:32], location="model.onnx.data", offset=str(at)) for at in (0, 64)
    ]
    path.write_bytes(onnx_model([], tensors))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        pytest.param(_cut, ModelFileError, "'w' ends at 8192, after its file's end at 8191", id="cut"),
        pytest.param(
            _entries(location="model.onnx.data", offset="4"),
            ModelFileError,
            "'w' ends at 8196, after its file's end at 8192 (give the file that was exported with",
            id="wrong offset",
        ),
        pytest.param(_small_past_the_end, ModelFileError, "'bias' ends at 8222", id="small and past the end"),
        pytest.param(_overlapping, ModelFileError, "'w64': overlaps", id="overlap"),
        pytest.param(
            _entries(location="../secret"),
            ModelFileError,
            "'../secret', which is no path inside the model's folder (export the model again",
            id="outside",
        ),
        pytest.param(
            _entries(location="weights/model.onnx.data"),
            ReleaseError,
            "weights/model.onnx.data (a release has no folders",
            id="in a folder",
        ),
    ],
)
def test_external_data_that_is_not_what_its_model_says_is_refused(
    tmp_path: Path, model: Path, damage: Callable[[Path], None], kind: type[WhimbrelError], message: str
) -> None:
    damage(model)
    with pytest.raises(kind) as refused:
        _import(tmp_path, model, model.with_name("model.onnx.data"))
    assert message in str(refused.value)
    assert not list((tmp_path / "blobs").glob("??/*"))  # nothing was copied
