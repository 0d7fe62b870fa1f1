"""The end of commands that live in a folder of their own."""

import tempfile
from pathlib import Path

import pytest

from protocol.errors import StorageError
from tests.endings import run_in_folder


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where new folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def leave_behind(folder: Path) -> int:
    (folder / "agent.log").write_text("it was here")
    return 7


def run(is_good: bool) -> int:
    return run_in_folder("kill test", leave_behind, lambda _: is_good, lambda outcome: f"{outcome} kills\n")


def test_what_went_well_leaves_nothing_behind(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(is_good=True) == 0
    assert capsys.readouterr() == ("7 kills\n", "")
    assert list(folders.iterdir()) == []


def test_what_went_wrong_is_told_and_kept(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(is_good=False) == 1
    (folder,) = folders.iterdir()
    assert (folder / "agent.log").read_text() == "it was here"
    assert folder.name.startswith("whimbrel-kill-test-")
    assert capsys.readouterr() == ("7 kills\n", f"what was left behind is in {folder}\n")


def test_what_could_not_be_done_is_one_line_and_kept(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> int:
        leave_behind(folder)
        raise StorageError("the disk is full")

    assert run_in_folder("kill test", fail, bool, str) == 1
    (folder,) = folders.iterdir()
    expected = f"kill test: the disk is full\nwhat was left behind is in {folder}\n"
    assert capsys.readouterr() == ("", expected)
