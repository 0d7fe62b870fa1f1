"""What systemd hears of an agent, over a real datagram socket, and what it reads of its log."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from device.adapters.control import ask_agent
from device.adapters.systemd import JournalFormatter, Notifier, is_journal, log_formatter
from device.cli import main
from device.config import load_config
from server.operations import add_release, export_release, init_repository, publish_release
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import embedded_broker, stop, wait_until

WAIT_S = 30.0
WATCHDOG_US = 400_000


class Manager:
    """The service manager's end: a datagram socket, real or abstract."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.socket.settimeout(0.2)
        self.heard: list[str] = []

    def close(self) -> None:
        self.socket.close()

    def hear(self, wait_s: float = 0.2) -> list[str]:
        """Messages that came in within the time."""
        messages: list[str] = []
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            try:
                messages += self.socket.recv(4096).decode().splitlines()
            except TimeoutError:
                continue
        self.heard += messages
        return messages

    def hears(self, message: str) -> bool:
        return wait_until(lambda: message in self.hear() or message in self.heard, WAIT_S)

    def hears_of(self, words: str) -> bool:
        """Whether some message has these words, now or before: it may come together with another one that was waited for."""
        return wait_until(lambda: any(words in said for said in self.hear() + self.heard), WAIT_S)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "server"
    init_repository(folder, "lab", port=0)
    health = write_health_plan(tmp_path / "health.json")
    add_release(
        folder, "digits", "v1", [write_classifier(tmp_path / "v1.onnx", 1)], runtime="onnx", health=health
    )
    publish_release(folder, "digits", "v1")
    export_release(folder, "digits", "v1", tmp_path / "factory")
    with embedded_broker() as broker:
        (tmp_path / "device.toml").write_text(
            'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'
            f'broker = "127.0.0.1:{broker.port}"\n'
        )
        assert (
            main(
                ["provision", "--config", str(tmp_path / "device.toml"), "--from", str(tmp_path / "factory")]
            )
            == 0
        )
        yield tmp_path


@contextmanager
def running(folder: Path, **environment: str) -> "Iterator[tuple[subprocess.Popen[bytes], int, int]]":
    """An agent as systemd starts it; gives the process, and both ends of the pipe that it writes its log to."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "device.cli", "run", "--config", "device.toml"],
        stdout=writer,
        cwd=folder,
        env={**os.environ, **environment},
    )
    try:
        yield process, reader, writer
    finally:
        os.set_blocking(reader, False)
        drain(reader)
        stop(process)
        os.close(reader)
        os.close(writer)


def drain(reader: int) -> bytes:
    os.set_blocking(reader, False)
    data = b""
    try:
        while piece := os.read(reader, 1 << 16):
            data += piece
    except BlockingIOError:
        return data
    return data


def test_a_running_agent_says_that_it_is_up_how_it_stands_and_that_its_loop_turns(device: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(device / "notify"), "WATCHDOG_USEC": str(WATCHDOG_US)}
    with (
        closing(Manager(str(device / "notify"))) as manager,
        running(device, **environment) as (process, _, _),
    ):
        assert manager.hears("READY=1")
        assert f"MAINPID={process.pid}" in manager.heard
        assert manager.hears_of("digits v1 answers, connected")
        assert manager.hear(1.5).count("WATCHDOG=1") >= 4
        assert main(["pause", "--config", str(device / "device.toml")]) == 0
        assert manager.hears_of("updates are paused")
        process.terminate()
        assert process.wait(WAIT_S) == 0
        assert manager.hears("STOPPING=1")


def test_a_loop_that_hangs_feeds_no_watchdog_although_the_process_lives(device: Path) -> None:
    name = f"@whimbrel-test-{os.getpid()}"  # systemd may use an abstract name, too
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": str(WATCHDOG_US)}
    with closing(Manager(name)) as manager, running(device, **environment) as (process, reader, writer):
        assert manager.hears("READY=1")
        assert manager.hears("WATCHDOG=1")
        os.set_blocking(writer, True)
        fill(writer)
        config = load_config(device / "device.toml")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(config.control))
            client.sendall(b'{"wish":"resume"}\n')  # is logged, and that log is full
            assert wait_until(lambda: manager.hear(1.0) == [], WAIT_S)
            assert process.poll() is None
            drain(reader)
            os.set_blocking(writer, True)
            assert manager.hears("WATCHDOG=1")
        assert wait_until(lambda: manager.hear().count("WATCHDOG=1") > 0, WAIT_S)
        assert ask_agent(config.control, "status").status is not None


def fill(writer: int) -> None:
    """Fill a pipe to its brim, as a log does that nobody reads."""
    copy = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)  # not blocking for us alone
    try:
        for size in (4096, 1):
            try:
                while True:
                    os.write(copy, b"x" * size)
            except BlockingIOError:
                continue
    finally:
        os.close(copy)


def test_the_log_is_for_the_journal_where_it_goes_there_and_has_the_time_elsewhere(device: Path) -> None:
    reader, writer = os.pipe()
    status = os.fstat(writer)
    for environment, is_for_journal in (
        ({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, True),
        ({"JOURNAL_STREAM": "1:2"}, False),
        ({}, False),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "device.cli", "run", "--config", "device.toml"],
            stdout=writer,
            cwd=device,
            env={**os.environ, **environment},
        )
        try:
            os.set_blocking(reader, True)
            line = os.read(reader, 4096).decode().splitlines()[0]
        finally:
            stop(process)
            drain(reader)
        assert line.endswith(f"pi-1: connected to {broker_of(device)}")
        assert line.startswith("<6>pi-1: ") is is_for_journal
        assert line.startswith("20") is not is_for_journal
    os.close(reader)
    os.close(writer)


def broker_of(device: Path) -> str:
    config = load_config(device / "device.toml")
    return f"{config.broker_host}:{config.broker_port}"


def test_every_line_of_a_record_has_its_level() -> None:
    formatter = JournalFormatter("%(message)s")
    shown = {
        logging.DEBUG: "<7>",
        logging.INFO: "<6>",
        logging.WARNING: "<4>",
        logging.ERROR: "<3>",
        logging.CRITICAL: "<3>",
    }
    for level, prefix in shown.items():
        record = logging.LogRecord("device", level, __file__, 1, "one\ntwo", (), None)
        assert formatter.format(record) == f"{prefix}one\n{prefix}two"


def test_a_stream_that_is_no_file_is_no_journal() -> None:
    with Path(os.devnull).open("w") as nothing:
        assert not is_journal(nothing, {})
        assert not isinstance(log_formatter(nothing, {}), JournalFormatter)
    assert not is_journal(nothing, {"JOURNAL_STREAM": "1:2"})  # closed


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_per_timeout_if_it_is_ours(
    environment: dict[str, str], watchdog_s: float | None
) -> None:
    assert Notifier(environment).watchdog_s == watchdog_s


def test_without_a_manager_or_with_one_that_is_gone_nothing_is_said(tmp_path: Path) -> None:
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()


def test_a_manager_that_does_not_listen_holds_nobody_up(tmp_path: Path) -> None:
    with closing(Manager(str(tmp_path / "notify"))) as manager:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        began = time.monotonic()
        for _ in range(5000):
            notifier.alive()
        assert time.monotonic() - began < 5.0
        assert set(manager.hear()) == {"WATCHDOG=1"}
