"""Real brokers for tests: the embedded one in a thread or a process, and mosquitto; and a bare MQTT connection.

Every broker is a context manager that yields where it listens. Processes are stopped by their pid.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import pytest

from server.broker.limits import BrokerLimits
from server.broker.packets import Connack, Connect, Packet, PacketReader, Received, encode
from server.broker.tcp import EmbeddedBroker
from server.identity import BrokerRecord, configure_broker

MOSQUITTO_PATH = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
MOSQUITTO_MISSING = "mosquitto is not installed (apt-get install mosquitto)"
WAIT_S = 15.0

BROKERS = [
    "embedded",
    pytest.param(
        "mosquitto",
        marks=[pytest.mark.mosquitto, pytest.mark.skipif(MOSQUITTO_PATH is None, reason=MOSQUITTO_MISSING)],
    ),
]
"""For `pytest.mark.parametrize` or `pytest.fixture(params=...)`, together with `running_broker`."""

_Packet = TypeVar("_Packet", bound=Packet)


@dataclass(frozen=True)
class Address:
    """Where a broker listens; `pid` is the process to watch, this one for a broker in a thread."""

    name: str
    host: str
    port: int
    pid: int


def wait_until(condition: Callable[[], object], wait_s: float = WAIT_S) -> bool:
    """Poll until a condition holds; return whether it did within the time."""
    end = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def free_port() -> int:
    """Return a loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running_broker(name: str, folder: Path) -> Iterator[Address]:
    """Run one of `BROKERS` with its defaults; `folder` takes the configuration and log of a process."""
    runner = embedded_broker() if name == "embedded" else mosquitto_broker(folder)
    with runner as address:
        yield address


@contextlib.contextmanager
def embedded_broker(limits: BrokerLimits | None = None) -> Iterator[Address]:
    """Run the embedded broker in a thread."""
    with EmbeddedBroker(limits=limits) as broker:
        yield Address("embedded", broker.host, broker.port, os.getpid())


@contextlib.contextmanager
def embedded_broker_process(*options: str) -> Iterator[Address]:
    """Run the embedded broker as `python -m server.broker`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server.broker", "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield Address("embedded", told["host"], told["port"], process.pid)
    finally:
        stop(process)


@contextlib.contextmanager
def mosquitto_broker(folder: Path, *settings: str) -> Iterator[Address]:
    """Run mosquitto with a configuration of its own; skip the test where it is not installed."""
    if MOSQUITTO_PATH is None:
        pytest.skip(MOSQUITTO_MISSING)
    folder.mkdir(parents=True, exist_ok=True)
    process, port = _start_mosquitto(folder, settings)
    try:
        yield Address("mosquitto", "127.0.0.1", port, process.pid)
    finally:
        stop(process)


@dataclass(frozen=True)
class SecuredBroker(Address):
    """mosquitto with the configuration that `whimbrel broker config` wrote."""

    claims_port: int
    folder: Path

    def reload(self) -> None:
        """Let it read its rules and its list of revoked certificates again; returns when it has."""
        count = self._log().count("Reloading config")
        os.kill(self.pid, signal.SIGHUP)
        assert wait_until(lambda: self._log().count("Reloading config") > count)
        with Wire(self) as probe:  # it goes through its loop once more, and hangs up on what is no TLS
            probe.socket.sendall(bytes(64))
            assert probe.is_closed_by_broker()

    def _log(self) -> str:
        return (self.folder / "mosquitto.log").read_text()


@contextlib.contextmanager
def secured_mosquitto(
    server_folder: Path, folder: Path, *, devices_max: int = 100
) -> Iterator[SecuredBroker]:
    """Let a server in `server_folder` configure mosquitto in `folder`, and run it; skip the test where it is not installed."""
    if MOSQUITTO_PATH is None:
        pytest.skip(MOSQUITTO_MISSING)
    for _ in range(5):  # another program may take a port before mosquitto does
        port, claims_port = free_port(), free_port()
        record = BrokerRecord(
            kind="mosquitto",
            output=str(folder),
            hosts=("127.0.0.1", "localhost"),
            installed=str(folder),
            bind="127.0.0.1",
            port=port,
            claims_port=claims_port,
            devices_max=devices_max,
        )
        configure_broker(server_folder, record)
        configuration = folder / "mosquitto.conf"
        if os.geteuid() == 0:
            configuration.write_text(f"user root\n{configuration.read_text()}")
        with (folder / "mosquitto.log").open("wb") as log:
            process = subprocess.Popen([MOSQUITTO_PATH, "-c", str(configuration)], stdout=log, stderr=log)
        try:
            if _is_up(process, port):
                yield SecuredBroker("mosquitto", "127.0.0.1", port, process.pid, claims_port, folder)
                return
        finally:
            stop(process)
    raise AssertionError(f"mosquitto did not start, see the log in {folder}")


def _start_mosquitto(folder: Path, settings: tuple[str, ...]) -> "tuple[subprocess.Popen[bytes], int]":
    assert MOSQUITTO_PATH is not None
    for _ in range(5):  # another program may take the port before mosquitto does
        port = free_port()
        lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "persistence false", *settings]
        if os.geteuid() == 0:
            lines.append("user root")
        configuration = folder / f"mosquitto-{port}.conf"
        configuration.write_text("\n".join(lines) + "\n")
        with (folder / f"mosquitto-{port}.log").open("wb") as log:
            process = subprocess.Popen([MOSQUITTO_PATH, "-c", str(configuration)], stdout=log, stderr=log)
        if _is_up(process, port):
            return process, port
        stop(process)
    raise AssertionError(f"mosquitto did not start, see the logs in {folder}")


def _is_up(process: "subprocess.Popen[bytes]", port: int) -> bool:
    wait_until(lambda: process.poll() is not None or is_listening(port))
    return process.poll() is None


def is_listening(port: int) -> bool:
    """Tell whether a loopback port accepts connections."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
        return True
    return False


def stop(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """End a process that a test started, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


class Wire:
    """A bare connection that speaks whole packets or any bytes; for what a real client would never do."""

    def __init__(self, address: Address, receive_buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.socket.settimeout(WAIT_S)
        self.socket.connect((address.host, address.port))
        self.reader = PacketReader()
        self.packets: list[Received] = []
        self.is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def connect(self, packet: Connect) -> Connack:
        """Send CONNECT and return the answer."""
        self.send(packet)
        return self.expect(Connack)

    def send(self, *packets: Packet) -> None:
        """Send packets in one write."""
        self.socket.sendall(b"".join(map(encode, packets)))

    def expect(self, kind: type[_Packet]) -> _Packet:
        """Return the next packet of a kind; others stay in `packets`."""
        end = time.monotonic() + WAIT_S
        while True:
            for index, packet in enumerate(self.packets):
                if isinstance(packet, kind):
                    del self.packets[index]
                    return packet
            assert not self.is_closed, f"closed while waiting for {kind.__name__}"
            assert time.monotonic() < end, f"no {kind.__name__} came, but {self.packets}"
            self.read()

    def read(self) -> None:
        """Take what comes next from the socket."""
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        self.is_closed = not data
        self.packets += self.reader.feed(data)

    def is_closed_by_broker(self) -> bool:
        """Read until the broker closes; return False when it does not within the time."""
        with contextlib.suppress(TimeoutError):
            while not self.is_closed:
                self.read()
        return self.is_closed
