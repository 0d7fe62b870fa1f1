"""Mistakes are told in one line, with what to do, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from simulator.cli import main
from simulator.live import brokers

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Everything temporary goes here, so that a test sees what is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["run", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("whimbrel-sim: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "0"], "choose 1 to"),
        (["--devices", "1001"], "choose 1 to"),
        (["--seed", "-1"], "--seed"),
        (["--broker", "nonsense"], "mosquitto"),
        (["--broker", "127.0.0.1:99999"], "not allowed"),
        (["--broker", "192.0.2.1:1883"], "not on this machine"),
        (["--broker", "example.org:1883"], "not on this machine"),
        (["--llm"], "--models"),
        (["--models", "nowhere"], "examples.digits.build"),
        (["--models", "nowhere", "--llm"], "examples.smollm2.build"),
        (["--report", "nowhere/report.html"], "--report"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    options: list[str], words: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_folder.is_dir()
    assert words in refused(capsys, *options)


def test_a_broker_that_is_not_there_is_told(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert run_folder.is_dir()
        assert f"no broker answers at 127.0.0.1:{port}" in refused(capsys, "--broker", f"127.0.0.1:{port}")


def test_a_missing_mosquitto_is_told(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(run_folder / "empty"))
    monkeypatch.setattr(brokers, "_SEARCH_PATH", "")
    assert "apt-get install mosquitto" in refused(capsys, "--broker", "mosquitto")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    options = ["--dir", str(tmp_path), "--report", str(tmp_path / "report.html")]
    assert "is not empty" in refused(capsys, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything_that_was_started(
    number: signal.Signals, tmp_path: Path, models: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "simulator.cli",
        "run",
        "--devices",
        "4",
        "--plain",
        "--models",
        str(models),
    ]
    with subprocess.Popen(
        [*command, "--report", str(tmp_path / "report.html")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any("canaries are asked" in line for line in process.stdout)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(number)
        begin = time.monotonic()
        _, error = process.communicate(timeout=WAIT_S)
        assert time.monotonic() - begin < 15
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert list(tmp_path.glob("whimbrel*")) == []
