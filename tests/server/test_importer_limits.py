"""Edges of what `whimbrel release add` takes, and that it says for every file what is wrong with which."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import ModelFileError, ReleaseError, RequestError, TopicError
from protocol.release import FILES_MAX, Release, RuntimeName
from server.adapters.blobs import FolderBlobs
from server.releases.importer import EXPORTED_NAMES, import_release
from tests.protocol.model_files import (
    GgufBuilder,
    GgufTensor,
    external_tensor,
    onnx_file,
    onnx_model,
    safetensors_file,
)

_UINT16, _INT32, _STRING = 2, 5, 8
_W = np.zeros((4, 64), np.float32)
CLASS: dict[str, Any] = {"kind": "class", "name": "zero", "input": [0.0], "label": 1}
TEXT: dict[str, Any] = {
    "kind": "text",
    "name": "greeting",
    "prompt": "a",
    "completion": "b",
    "logprob_mean_min": -9.0,
}
_PROMPTS: dict[RuntimeName, dict[str, Any]] = {"onnx": CLASS, "llama": TEXT}


def add(folder: Path, *files: Path, runtime: RuntimeName = "onnx", **given: Any) -> Release:
    plan = {
        "prompts": given.pop("prompts", [_PROMPTS[runtime]]),
        "latency_p99_ms_max": 9.0,
        "memory_peak_bytes_max": 9,
    }
    health = folder / "health.json"
    health.write_text(json.dumps(plan))
    arguments: dict[str, Any] = {"family": "f", "version": "1", "health": health, **given}
    return import_release(FolderBlobs(folder / "blobs"), files=list(files), runtime=runtime, **arguments)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file({"w": _W}))
    return path


def beside(model: Path, name: str, data: bytes) -> Path:
    path = model.with_name(name)
    path.write_bytes(data)
    return path


# --- the description --------------------------------------------------------------------------------------------


def test_a_release_says_what_was_given_and_which_runtime_it_needs_at_least(
    tmp_path: Path, model: Path
) -> None:
    release = add(tmp_path, model, memory_bytes=77, tiers=["pi-5"])
    assert (release.runtime_version_min, release.resources.memory_bytes) == ("1.17", 77)
    assert release.resources.tiers == ["pi-5"]
    assert add(tmp_path, model, runtime_version_min="1.20").runtime_version_min == "1.20"
    assert [(file.name, file.length) for file in release.files] == [("model.onnx", model.stat().st_size)]


@pytest.mark.parametrize(
    ("names", "what"), [({"family": "../f"}, "model family"), ({"version": "1/2"}, "version")]
)
def test_a_name_that_is_none_is_refused(
    tmp_path: Path, model: Path, names: dict[str, Any], what: str
) -> None:
    with pytest.raises(TopicError, match=f"^{what}"):
        add(tmp_path, model, **names)


def test_a_release_has_one_file_to_as_many_as_the_limit(tmp_path: Path, model: Path) -> None:
    others = [beside(model, f"vocabulary-{number}.txt", b"x") for number in range(FILES_MAX)]
    assert len(add(tmp_path, model, *others[1:]).files) == FILES_MAX
    for files in ([], [model, *others]):
        with pytest.raises(RequestError, match=f"{len(files)} files, allowed are 1 to {FILES_MAX}"):
            add(tmp_path, *files)


@pytest.mark.parametrize("name", sorted(EXPORTED_NAMES))
def test_no_file_takes_the_place_of_what_is_written_beside_it(tmp_path: Path, model: Path, name: str) -> None:
    with pytest.raises(ReleaseError, match=f"no file of a release may be called {name}"):
        add(tmp_path, model, beside(model, name, b"{}"))


@pytest.mark.parametrize("runtime", ["onnx", "llama"])
def test_every_prompt_is_of_the_kind_that_the_runtime_answers(
    tmp_path: Path, model: Path, runtime: RuntimeName
) -> None:
    """Where the file is none of that runtime, the prompts are looked at first."""
    right = _PROMPTS[runtime]
    wrong = TEXT if runtime == "onnx" else CLASS
    with pytest.raises(ReleaseError, match=f"prompt '{wrong['name']}' is not of the kind that {runtime}"):
        add(tmp_path, model, runtime=runtime, prompts=[right, wrong])


def test_a_health_plan_or_a_file_that_cannot_be_read_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.json: No such file"):
        add(tmp_path, model, health=tmp_path / "nowhere.json")
    with pytest.raises(RequestError, match=r"nowhere\.onnx: No such file"):
        add(tmp_path, tmp_path / "nowhere.onnx")
    with pytest.raises(RequestError, match=r"nowhere\.txt: No such file"):
        add(tmp_path, model, tmp_path / "nowhere.txt")


# --- files ------------------------------------------------------------------------------------------------------


def test_the_first_file_is_a_model_of_the_runtime_whatever_it_is_called(tmp_path: Path, model: Path) -> None:
    renamed = beside(model, "weights.bin", model.read_bytes())
    assert add(tmp_path, renamed).files[0].name == "weights.bin"
    for runtime, data, message in [
        ("onnx", safetensors_file({}), r"weights\.bin: ONNX"),
        ("llama", onnx_file({"w": _W}), r"weights\.bin: GGUF.*give a model for the runtime llama"),
        ("onnx", b"", r"weights\.bin: the file is empty .give a model for the runtime onnx"),
    ]:
        renamed.write_bytes(data)
        with pytest.raises(ModelFileError, match=message):
            add(tmp_path, renamed, runtime=runtime)  # type: ignore[arg-type]


def test_the_reason_of_a_parser_keeps_its_own_advice(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GgufBuilder(version=3 << 24).build())
    with pytest.raises(ModelFileError) as refused:
        add(tmp_path, path, runtime="llama")
    assert refused.value.hint == "a big-endian file"


def test_files_beside_the_model_are_read_by_their_endings(tmp_path: Path, model: Path) -> None:
    empty = beside(model, "none.txt", b"")
    adapter = beside(model, "Adapter.SafeTensors", safetensors_file({"w": ("I8", (2,), b"ab")}))
    more = beside(model, "more.gguf", GgufBuilder().build())
    assert len(add(tmp_path, model, empty, adapter, more).files) == 4
    adapter.write_bytes(b"none")
    with pytest.raises(ModelFileError, match=r"Adapter\.SafeTensors: .*for the runtime safetensors"):
        add(tmp_path, model, empty, adapter)


def test_a_model_may_have_two_names_and_its_other_files_may_not(tmp_path: Path, model: Path) -> None:
    os.link(model, tmp_path / "second.onnx")
    vocabulary = beside(model, "vocabulary.txt", b"x")
    assert len(add(tmp_path, model, vocabulary).files) == 2
    os.link(vocabulary, tmp_path / "second.txt")
    with pytest.raises(RequestError, match="is a link to a file elsewhere"):
        add(tmp_path, model, vocabulary)


def test_a_link_that_is_put_there_after_the_look_is_not_followed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = beside(model, "secret", b"secret")
    link = tmp_path / "vocabulary.txt"
    link.symlink_to(secret)
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)
    with pytest.raises(RequestError, match=r"vocabulary\.txt: "):
        add(tmp_path, model, link)


def test_a_folder_is_no_file(tmp_path: Path, model: Path) -> None:
    (tmp_path / "folder").mkdir()
    for files in ([tmp_path / "folder"], [model, tmp_path / "folder"]):
        with pytest.raises(RequestError, match="folder"):
            add(tmp_path, *files)


# --- tensors in other files -------------------------------------------------------------------------------------


def test_two_models_may_share_tensors_and_what_both_say_is_checked(tmp_path: Path, model: Path) -> None:
    data = beside(model, "w.data", bytes(2 * _W.nbytes))

    def placed(name: str, offset: int) -> bytes:
        return onnx_model([], [external_tensor(name, _W, location="w.data", offset=str(offset))])

    decoder = beside(model, "decoder.onnx", placed("w", 0))
    model.write_bytes(placed("w", 0))
    assert len(add(tmp_path, model, decoder, data).files) == 3
    decoder.write_bytes(placed("v", _W.nbytes))
    assert len(add(tmp_path, model, decoder, data).files) == 3
    for first, second in [(_W.nbytes + 64, 0), (0, _W.nbytes + 64)]:
        model.write_bytes(placed("w", first))
        decoder.write_bytes(placed("v", second))
        with pytest.raises(ModelFileError, match=r"w\.data: not the tensors that model\.onnx describes"):
            add(tmp_path, model, decoder, data)


def test_advice_about_folders_is_given_when_any_file_lies_in_one(tmp_path: Path, model: Path) -> None:
    for locations, advice in [
        (("a.data", "b.data"), "name them behind the model"),
        (("a.data", "in/b.data"), "a release has no folders"),
    ]:
        tensors = [external_tensor(name, _W, location=name) for name in locations]
        model.write_bytes(onnx_model([], tensors))
        with pytest.raises(ReleaseError, match=f"{', '.join(locations)}.*{advice}"):
            add(tmp_path, model)


def test_a_model_is_no_file_of_tensors_for_itself(tmp_path: Path, model: Path) -> None:
    model.write_bytes(onnx_model([], [external_tensor("w", _W, location=model.name)]))
    with pytest.raises(ReleaseError, match=r"keeps tensors in other files: model\.onnx"):
        add(tmp_path, model)


# --- models in several GGUF files -------------------------------------------------------------------------------


def part(number: int, count: int, said: int, tensors: tuple[str, ...] = ("",)) -> bytes:
    keys = [
        ("split.no", _UINT16, struct.pack("<H", number)),
        ("split.count", _UINT16, struct.pack("<H", count)),
        ("split.tensors.count", _INT32, struct.pack("<i", said)),
    ]
    listed = [GgufTensor(name or f"w{number}", (32,), 2, bytes(18)) for name in tensors]
    return GgufBuilder(listed, keys).build()


def parts(folder: Path, *data: bytes) -> list[Path]:
    paths = [folder / f"m-{number:05}-of-{len(data):05}.gguf" for number in range(1, len(data) + 1)]
    for path, content in zip(paths, data, strict=True):
        path.write_bytes(content)
    return paths


def test_all_parts_of_a_model_are_taken_in_any_order_behind_the_first(tmp_path: Path) -> None:
    first, *others = parts(tmp_path, part(0, 3, 4), part(1, 3, 0, ("a", "b")), part(2, 3, 9))
    assert len(add(tmp_path, first, *reversed(others), runtime="llama").files) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_in_one_part_may_have_any_name(tmp_path: Path, count: int) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(part(0, count, 5))
    assert add(tmp_path, path, runtime="llama").files[0].name == "any.gguf"


def test_a_count_of_parts_that_is_no_number_is_none(tmp_path: Path) -> None:
    path = tmp_path / "any.gguf"
    text = struct.pack("<Q", 1) + b"2"
    path.write_bytes(GgufBuilder(key_values=[("split.count", _STRING, text)]).build())
    assert add(tmp_path, path, runtime="llama").files[0].name == "any.gguf"


def test_a_model_has_no_more_parts_than_a_release_has_files(tmp_path: Path) -> None:
    for count, message in [
        (FILES_MAX, "parts are missing"),
        (FILES_MAX + 1, f"split into {FILES_MAX + 1} parts"),
    ]:
        path = tmp_path / f"m-00001-of-{count:05}.gguf"
        path.write_bytes(part(0, count, 1))
        with pytest.raises(ReleaseError, match=message):
            add(tmp_path, path, runtime="llama")


def test_each_part_has_its_number_and_the_count(tmp_path: Path) -> None:
    for second in (part(2, 2, 0), part(1, 1, 0)):
        with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is not part 2 of 2"):
            add(tmp_path, *parts(tmp_path, part(0, 2, 2), second), runtime="llama")


def test_a_number_that_a_part_does_not_give_or_gives_as_text_is_0(tmp_path: Path) -> None:
    count = ("split.count", _UINT16, struct.pack("<H", 2))
    said = ("split.tensors.count", _INT32, struct.pack("<i", 2))
    text = ("split.no", _STRING, struct.pack("<Q", 1) + b"1")
    for keys in ([count, said], [count, said, text]):
        first = GgufBuilder([GgufTensor("w0", (32,), 2, bytes(18))], keys).build()
        assert len(add(tmp_path, *parts(tmp_path, first, part(1, 2, 0)), runtime="llama").files) == 2
        with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is not part 2 of 2"):
            add(tmp_path, *parts(tmp_path, part(0, 2, 2), first), runtime="llama")


def test_a_tensor_stands_in_one_part_only_and_the_first_names_the_sum(tmp_path: Path) -> None:
    twice = parts(tmp_path, part(0, 3, 3), part(1, 3, 0), part(2, 3, 0, ("w0",)))
    with pytest.raises(ModelFileError, match="has tensor 'w0', which another part has"):
        add(tmp_path, *twice, runtime="llama")
    for said in (2, 4):
        wrong = parts(tmp_path, part(0, 3, said), part(1, 3, 3), part(2, 3, 3))
        with pytest.raises(ModelFileError, match=f"have {said} tensors, they have 3"):
            add(tmp_path, *wrong, runtime="llama")
