"""Which broker carries the run: embedded in the server, a mosquitto of its own, or one that is running already."""

import contextlib
import ipaddress
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from protocol.errors import RequestError, TransportError
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
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=_SEARCH_PATH)
    if program is None:
        raise RequestError(
            "mosquitto is not installed", hint="apt-get install mosquitto, or leave --broker out"
        )
    process, port = _start(program, folder)
    try:
        yield port
    finally:
        stop(process)


def _start(program: str, folder: Path) -> "tuple[subprocess.Popen[bytes], int]":
    """Start mosquitto on a free port; another program may take that port first, so a few are tried."""
    log = folder / "mosquitto.log"
    for _ in range(_PORTS_TRIED_MAX):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "persistence false"]
        if os.geteuid() == 0:
            lines.append("user root")  # else it drops to a user that may not read a private folder
        configuration = folder / "mosquitto.conf"
        configuration.write_text("\n".join(lines) + "\n")
        with log.open("wb") as output:
            process = subprocess.Popen([program, "-c", str(configuration)], stdout=output, stderr=output)
        end = time.monotonic() + START_S_MAX
        while process.poll() is None and time.monotonic() < end:
            if _answers("127.0.0.1", port):
                return process, port
            time.sleep(_POLL_S)
        stop(process)
    raise TransportError("mosquitto does not start", hint=f"see {log}, with --keep")


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
