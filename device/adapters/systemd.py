"""Speaking to systemd: readiness, status and the watchdog by `sd_notify`, and log lines that the journal understands.

The protocol is one datagram per message to the socket that `NOTIFY_SOCKET` names (sd_notify(3)). Without one, nothing is sent.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Final, TextIO

_LEVELS: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))
"""Levels of syslog as sd-daemon(3) names them; anything between counts as the one below."""

_US_PER_S: Final = 1_000_000
_PINGS_PER_TIMEOUT: Final = 2
"""sd_watchdog_enabled(3) recommends half of the time."""


class Notifier:
    """Tells the service manager how things stand.

    Args:
        environment: Where systemd leaves word.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self.watchdog_s = _watchdog_s(environment)
        self._status = ""

    def ready(self) -> None:
        """The agent is up."""
        self._send(f"READY=1\nMAINPID={os.getpid()}")

    def stopping(self) -> None:
        """The agent is about to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The loop turns."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`, sent where it has changed."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _send(self, message: str) -> None:
        """A manager that does not listen must not stop the agent."""
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender,
        ):
            sender.sendto(message.encode(), self._address)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """How often to send `alive`; `None` where nobody waits for it."""
    pid, text = environment.get("WATCHDOG_PID", ""), environment.get("WATCHDOG_USEC", "")
    if not text.isdigit() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / _US_PER_S / _PINGS_PER_TIMEOUT


class JournalFormatter(logging.Formatter):
    """Lines for the journal: it keeps the time itself and reads the level from a prefix."""

    def format(self, record: logging.LogRecord) -> str:
        """Prefix every line of a record with its level."""
        number = next((number for level, number in _LEVELS if record.levelno >= level), 7)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


def log_formatter(
    stream: TextIO = sys.stdout, environment: Mapping[str, str] = os.environ
) -> logging.Formatter:
    """The form of log lines: for the journal where the stream leads there, with the time elsewhere."""
    if is_journal(stream, environment):
        return JournalFormatter("%(message)s")
    return logging.Formatter("%(asctime)s %(message)s")


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is connected to the journal: `JOURNAL_STREAM` names its device and inode (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
