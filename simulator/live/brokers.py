"""Which broker carries the run: embedded in the server, a mosquitto of its own, or one that is running already."""

import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from protocol.errors import RequestError, TransportError
from server.broker.tcp import EmbeddedBroker
from server.config import EMBEDDED, parse_broker

MOSQUITTO: Final = "mosquitto"
START_S_MAX: Final = 10.0
STOP_S_MAX: Final = 5.0
_POLL_S: Final = 0.02
_PORTS_TRIED_MAX: Final = 5
_SEARCH_PATH: Final = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"


@contextlib.contextmanager
def broker_setting(text: str, folder: Path) -> Iterator[str]:
    """The broker as the server's settings name it, running for as long as the context lasts.

    Args:
        text: `embedded`, `mosquitto` or HOST:PORT.
        folder: Takes the configuration and the log of a mosquitto.

    Raises:
        RequestError: The text is none of these, or mosquitto is not installed.
        TransportError: The broker does not answer.
    """
    if text == MOSQUITTO:
        with _mosquitto(folder) as port:
            yield f"127.0.0.1:{port}"
        return
    try:
        address = parse_broker(text)
    except RequestError as error:
        raise RequestError(error.message, hint="use `embedded`, `mosquitto` or 127.0.0.1:PORT") from error
    if address != "embedded":
        check_loopback(address[0])
        if not _answers(*address):
            raise TransportError(f"no broker answers at {text}", hint="is it running?")
    yield text if address != "embedded" else EMBEDDED


def check_loopback(host: str) -> None:
    """Refuse a broker beyond this machine: a simulated fleet does not belong there.

    Raises:
        RequestError: `host` is no loopback address.
    """
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise RequestError(f"broker {host[:200]} is not on this machine", hint="use 127.0.0.1:PORT")


@contextlib.contextmanager
def _mosquitto(folder: Path) -> Iterator[int]:
    broker = Mosquitto(folder)
    broker.start()
    try:
        yield broker.port
    finally:
        broker.stop()


class OwnBroker(ABC):
    """A broker of this run's own, which can die and come back empty on its port.

    Attributes:
        port: Where it listens, on loopback.
    """

    port: int

    @abstractmethod
    def start(self) -> None:
        """Start it for the first time.

        Raises:
            RequestError: It is not installed.
            TransportError: It does not start.
        """

    @abstractmethod
    def kill(self) -> None:
        """End it without a word."""

    @abstractmethod
    def restart(self) -> None:
        """Start it again on the same port, with nothing of what it had.

        Raises:
            TransportError: It does not start.
        """

    @abstractmethod
    def stop(self) -> None:
        """End it; harmless when it does not run."""


class Mosquitto(OwnBroker):
    """A mosquitto that keeps nothing on disk.

    Args:
        folder: Takes its configuration and its log.
    """

    def __init__(self, folder: Path) -> None:
        self.port = 0
        self._folder = folder
        self._program = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """As `OwnBroker.start`; another program may take the free port first, so a few are tried."""
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path=_SEARCH_PATH)
        if program is None:
            raise RequestError(
                "mosquitto is not installed", hint="apt-get install mosquitto, or choose --broker embedded"
            )
        self._program = program
        for _ in range(_PORTS_TRIED_MAX):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            if self._run():
                return
        raise self._failure()

    def kill(self) -> None:
        """As `OwnBroker.kill`."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """As `OwnBroker.restart`."""
        if not self._run():
            raise self._failure()

    def stop(self) -> None:
        """As `OwnBroker.stop`."""
        if self._process is not None:
            stop(self._process)

    def _run(self) -> bool:
        lines = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", "persistence false"]
        if os.geteuid() == 0:
            lines.append("user root")  # else it drops to a user that may not read a private folder
        configuration = self._folder / "mosquitto.conf"
        configuration.write_text("\n".join(lines) + "\n")
        with self._log.open("ab") as output:
            process = subprocess.Popen(
                [self._program, "-c", str(configuration)], stdout=output, stderr=output
            )
        self._process = process
        end = time.monotonic() + START_S_MAX
        while process.poll() is None and time.monotonic() < end:
            if _answers("127.0.0.1", self.port):
                return True
            time.sleep(_POLL_S)
        stop(process)
        return False

    @property
    def _log(self) -> Path:
        return self._folder / "mosquitto.log"

    def _failure(self) -> TransportError:
        return TransportError("mosquitto does not start", hint=f"see {self._log}, with --keep")


class Embedded(OwnBroker):
    """The embedded broker on a thread of its own, apart from the server's."""

    def __init__(self) -> None:
        self._broker = EmbeddedBroker()

    def start(self) -> None:
        """As `OwnBroker.start`."""
        self.port = self._broker.start_in_thread()

    def kill(self) -> None:
        """As `OwnBroker.kill`."""
        self._broker.close()

    def restart(self) -> None:
        """As `OwnBroker.restart`."""
        self._broker = EmbeddedBroker(port=self.port)
        self._broker.start_in_thread()

    def stop(self) -> None:
        """As `OwnBroker.stop`."""
        self._broker.close()


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a child process, politely first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False
