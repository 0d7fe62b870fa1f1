"""`whimbrel delta`: what a user sees, and what is left on disk when something goes wrong."""

import argparse
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import (
    NotInPlaceError,
    PatchError,
    RequestError,
    StorageFullError,
    TruncatedPatchError,
    WhimbrelError,
    WrongBaseError,
)
from protocol.tensors import Layout
from server import delta_cli
from tests.protocol.model_files import (
    block_file,
    blocks,
    external_model,
    moved_blocks,
    safetensors_file,
    weights,
)

_BLOCKS = blocks(Layout.Q4_0, 500, 1)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "old.gguf").write_bytes(block_file(Layout.Q4_0, _BLOCKS))
    (tmp_path / "new.gguf").write_bytes(block_file(Layout.Q4_0, moved_blocks(Layout.Q4_0, _BLOCKS, 2, 0.01)))
    (tmp_path / "out").mkdir()
    return tmp_path


def _run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    delta_cli.add_parser(parser.add_subparsers(required=True), argparse.ArgumentParser(add_help=False))
    args = parser.parse_args(["delta", *map(str, words)])
    code: int = args.run(args)
    return code


def _make(files: Path, *options: str) -> Path:
    patch = files / "out" / "patch"
    assert _run("make", files / "old.gguf", files / "new.gguf", "-o", patch, *options) == 0
    return patch


def _report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_make_and_apply_give_back_the_new_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = _make(files, "--json")
    made = _report(capsys)
    assert made["patch_bytes"] == patch.stat().st_size
    assert made["ratio"] == pytest.approx(made["patch_bytes"] / made["result_bytes"], abs=1e-6)
    assert made["peak_memory_bytes"] > 1 << 20
    result = files / "out" / "result"
    assert _run("apply", files / "old.gguf", patch, "-o", result, "--json") == 0
    assert _report(capsys)["result_sha256"] == made["result_sha256"]
    assert result.read_bytes() == (files / "new.gguf").read_bytes()
    assert sorted(path.name for path in (files / "out").iterdir()) == ["patch", "result"]


def test_a_person_reads_sizes_ratio_time_and_memory(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = _make(files)
    shown = capsys.readouterr().out
    assert "% of the result" in shown
    assert "MB/s" in shown
    assert _run("inspect", patch) == 0
    shown = capsys.readouterr().out
    assert "q4_0" in shown
    assert "1 changed or new" in shown


def test_inspect_counts_every_byte(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = _make(files, "--profile", "fast")
    capsys.readouterr()
    _run("inspect", patch, "--json")
    report = _report(capsys)
    assert sum(row["patch_bytes"] for row in report["codecs"].values()) == patch.stat().st_size
    assert sum(row["result_bytes"] for row in report["codecs"].values()) == report["result_bytes"]
    assert report["profile"] == "fast"
    assert [tensor["name"] for tensor in report["tensors"]] == ["w"]


@pytest.mark.parametrize("content", [b"", b"x" * 5000])
def test_an_empty_file_is_a_file(files: Path, content: bytes) -> None:
    (files / "a").write_bytes(b"")
    (files / "b").write_bytes(content)
    assert _run("make", files / "a", files / "b", "-o", files / "p") == 0
    assert _run("apply", files / "a", files / "p", "-o", files / "c") == 0
    assert (files / "c").read_bytes() == content


def _refused(kind: type[WhimbrelError], message: str, files: Path, *words: object) -> None:
    before = sorted(path.name for path in (files / "out").iterdir())
    with pytest.raises(kind) as caught:
        _run(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (files / "out").iterdir()) == before


def test_missing_files_are_named(files: Path) -> None:
    old, out = files / "old.gguf", files / "out" / "p"
    _refused(RequestError, "nothing: no such file", files, "make", files / "nothing", old, "-o", out)
    _refused(RequestError, "no such file or folder", files, "make", old, old, "-o", files / "no" / "p")
    _refused(RequestError, "nothing: no such file", files, "inspect", files / "nothing")
    _refused(RequestError, "out", files, "make", files / "out", old, "-o", out)
    _refused(RequestError, "is a folder", files, "make", old, old, "-o", files / "out")


def test_an_output_that_exists_is_kept(files: Path) -> None:
    patch = _make(files)
    content = patch.read_bytes()
    _refused(RequestError, "--force", files, "make", files / "old.gguf", files / "old.gguf", "-o", patch)
    assert patch.read_bytes() == content
    _make(files, "--force")


def test_a_truncated_delta_is_refused(files: Path) -> None:
    patch = _make(files)
    for length in (0, 50, 130, patch.stat().st_size - 1):
        (files / "cut").write_bytes(patch.read_bytes()[:length])
        target = files / "out" / "r"
        _refused(
            TruncatedPatchError,
            "ends at byte",
            files,
            "apply",
            files / "old.gguf",
            files / "cut",
            "-o",
            target,
        )
        _refused(TruncatedPatchError, "ends at byte", files, "inspect", files / "cut")


def test_a_file_that_is_no_delta_is_refused(files: Path) -> None:
    old = files / "old.gguf"
    _refused(PatchError, "not a delta file", files, "apply", old, old, "-o", files / "out" / "r")
    _refused(PatchError, "not a delta file", files, "inspect", old)


def test_a_wrong_base_is_refused_before_anything_is_written(files: Path) -> None:
    patch, target = _make(files), files / "out" / "r"
    _refused(WrongBaseError, "SHA-256 differs", files, "apply", files / "new.gguf", patch, "-o", target)
    (files / "short").write_bytes(b"short")
    _refused(WrongBaseError, "a base of", files, "apply", files / "short", patch, "-o", target)


def test_a_damaged_delta_leaves_nothing_behind(files: Path) -> None:
    patch = _make(files)
    rng = np.random.default_rng(1)
    for offset in rng.integers(0, patch.stat().st_size, 10):
        damaged = bytearray(patch.read_bytes())
        damaged[int(offset)] ^= 0x40
        (files / "bad").write_bytes(damaged)
        _refused(PatchError, "", files, "apply", files / "old.gguf", files / "bad", "-o", files / "out" / "r")


def test_a_memory_limit_is_kept(files: Path) -> None:
    patch = _make(files)
    words = ("apply", files / "old.gguf", patch, "-o", files / "out" / "r", "--memory-limit-mib", 1)
    _refused(PatchError, "bytes of memory", files, *words)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    words = ("make", files / "old.gguf", files / "new.gguf", "-o", files / "out" / "p")
    _refused(StorageFullError, "no space left", files, *words)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_device_is_not_a_model(files: Path) -> None:
    _refused(RequestError, "not a regular file", files, "inspect", "/dev/full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_reported(files: Path) -> None:
    (files / "out").chmod(0o500)
    words = ("make", files / "old.gguf", files / "new.gguf", "-o", files / "out" / "p")
    _refused(RequestError, "permission denied", files, *words)


def test_usage_errors_end_with_two(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["make", files / "old.gguf"], ["nothing"], []):
        with pytest.raises(SystemExit) as caught:
            _run(*words)
        assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_what_a_segment_size_outside_its_limits_says(files: Path) -> None:
    words = ("make", files / "old.gguf", files / "new.gguf", "-o", files / "out" / "p", "--segment-kib", 0)
    _refused(PatchError, "segments of 0 bytes", files, *words)


# --- in place --------------------------------------------------------------------------------------------------


def _in_place(files: Path, patch: Path, *options: str) -> int:
    return _run(
        "apply", files / "old.gguf", patch, "--in-place", "--inverse", files / "out" / "back", *options
    )


def test_a_file_is_updated_in_place_and_its_inverse_leads_back(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (files / "old.gguf").read_bytes(), (files / "new.gguf").read_bytes()
    patch = _make(files, "--in-place")
    capsys.readouterr()
    assert _in_place(files, patch, "--json") == 0
    report = _report(capsys)
    assert (files / "old.gguf").read_bytes() == new
    assert report["inverse_bytes"] == (files / "out" / "back").stat().st_size < len(old)
    again = ("apply", files / "old.gguf", files / "out" / "back", "--in-place")
    assert _run(*again, "--inverse", files / "out" / "forth") == 0
    assert (files / "old.gguf").read_bytes() == old
    assert "inverse" in capsys.readouterr().out
    assert sorted(path.name for path in files.iterdir()) == ["new.gguf", "old.gguf", "out"]


def test_an_interrupted_update_in_place_goes_on(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = (files / "new.gguf").read_bytes()
    patch = _make(files, "--in-place")
    with monkeypatch.context() as context:
        context.setattr(os, "ftruncate", _interrupted)  # the last thing that is done to the file
        with pytest.raises(KeyboardInterrupt):
            _in_place(files, patch)
    assert _in_place(files, patch) == 0
    assert (files / "old.gguf").read_bytes() == new


def _interrupted(_descriptor: int, length: int) -> None:
    if length < 1 << 20:  # not the journal
        raise KeyboardInterrupt


@pytest.mark.parametrize("at", [200, -60])
def test_a_damaged_delta_leaves_the_file_as_it_was(files: Path, at: int) -> None:
    old = (files / "old.gguf").read_bytes()
    patch = _make(files, "--in-place")
    data = bytearray(patch.read_bytes())
    data[at] ^= 1
    patch.write_bytes(data)
    with pytest.raises(PatchError):
        _in_place(files, patch)
    assert (files / "old.gguf").read_bytes() == old
    assert sorted(path.name for path in files.iterdir()) == ["new.gguf", "old.gguf", "out"]
    assert [path.name for path in (files / "out").iterdir()] == ["patch"]


def test_in_place_refuses_what_it_cannot_do(files: Path) -> None:
    old = (files / "old.gguf").read_bytes()
    ordinary, patch = _make(files), files / "out" / "in_place"
    assert _run("make", files / "old.gguf", files / "new.gguf", "-o", patch, "--in-place") == 0
    with pytest.raises(NotInPlaceError, match="--in-place"):
        _in_place(files, ordinary)
    with pytest.raises(RequestError, match="--inverse"):
        _run("apply", files / "old.gguf", patch, "--in-place")
    with pytest.raises(RequestError, match="-o"):
        _run("apply", files / "old.gguf", patch)
    with pytest.raises(RequestError, match="itself"):
        _run("apply", files / "old.gguf", patch, "--in-place", "-o", files / "x", "--inverse", files / "y")
    with pytest.raises(RequestError, match="no such file"):
        _run("apply", files / "none", patch, "--in-place", "--inverse", files / "y")
    (files / "out" / "back").write_bytes(b"precious")
    with pytest.raises(RequestError, match="exists"):
        _in_place(files, patch)
    assert (files / "out" / "back").read_bytes() == b"precious"
    (files / "out" / "back").unlink()
    (files / "old.gguf").write_bytes(old[:-1])
    with pytest.raises(WrongBaseError):
        _in_place(files, patch)
    assert (files / "old.gguf").read_bytes() == old[:-1]
    assert not (files / "out" / "back").exists()


def test_a_delta_made_for_application_in_place_is_an_ordinary_one_too(files: Path) -> None:
    patch, out = _make(files, "--in-place"), files / "out" / "new"
    assert _run("apply", files / "old.gguf", patch, "-o", out) == 0
    assert out.read_bytes() == (files / "new.gguf").read_bytes()


def _external(tmp_path: Path) -> list[Path]:
    """The files of external data of two versions."""
    models = (
        external_model(tmp_path / f"{update}", {"w": weights((256, 128), 1, update)}) for update in (0, 0.01)
    )
    return [model.with_name("model.onnx.data") for model in models]


def test_the_model_beside_a_file_of_external_data_is_found_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = _external(tmp_path)
    (old.parent / "unrelated.onnx").write_bytes(b"\x08no model")
    (old.parent / "folder.onnx").mkdir()
    patch, result = tmp_path / "patch", tmp_path / "result"
    assert _run("make", old, new, "-o", patch, "--json") == 0
    made = _report(capsys)
    assert made["described_by"] == {"old": ["model.onnx"], "new": ["model.onnx"]}
    assert _run("make", old, new, "-o", patch, "--force") == 0
    assert "tensors  of NEW are described by model.onnx\n" in capsys.readouterr().out
    assert _run("inspect", patch, "--json") == 0
    shown = _report(capsys)
    assert [(tensor["name"], tensor["layout"]) for tensor in shown["tensors"]] == [("w", "f32")]
    assert shown["layouts"] == {"f32": new.stat().st_size}
    assert _run("apply", old, patch, "-o", result) == 0
    assert result.read_bytes() == new.read_bytes()


def test_a_file_that_its_model_describes_wrongly_is_sent_as_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = _external(tmp_path)
    new.write_bytes(new.read_bytes()[:-4])
    patch, result = tmp_path / "patch", tmp_path / "result"
    assert _run("make", old, new, "-o", patch, "--json") == 0
    assert _report(capsys)["described_by"] == {"old": ["model.onnx"], "new": []}
    assert _run("apply", old, patch, "-o", result) == 0
    assert result.read_bytes() == new.read_bytes()


def test_shards_of_a_model_describe_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = blocks(Layout.AWQ4, 128 * 32, 1)
    others = {"l.qzeros": ("I32", (4, 32), bytes(512)), "l.scales": ("F16", (4, 256), bytes(2048))}
    for version, data in (("old", words), ("new", moved_blocks(Layout.AWQ4, words, 2))):
        (tmp_path / version).mkdir()
        shards = ({"l.qweight": ("I32", (128, 32), data)}, others)
        for number, shard in enumerate(shards, start=1):
            path = tmp_path / version / f"model-0000{number}-of-00002.safetensors"
            path.write_bytes(safetensors_file(shard))
        (tmp_path / version / "model-00001-of-00003.safetensors").write_bytes(b"of another split")
    first = "model-00001-of-00002.safetensors"
    patch, result = tmp_path / "patch", tmp_path / "result"
    assert _run("make", tmp_path / "old" / first, tmp_path / "new" / first, "-o", patch, "--json") == 0
    assert _report(capsys)["described_by"]["new"] == ["model-00002-of-00002.safetensors"]
    assert _run("inspect", patch, "--json") == 0
    assert "awq4" in _report(capsys)["layouts"]
    assert _run("apply", tmp_path / "old" / first, patch, "-o", result) == 0
    assert result.read_bytes() == (tmp_path / "new" / first).read_bytes()
