"""The owner's command after a swap: for applications that open the files of the `current` link themselves."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

_LOG: Final = logging.getLogger(__name__)


class SwapHook:
    """Runs a command in a thread of its own: one at a time, for a bounded time, and never in the agent's way.

    A swap while it runs has it run once more after that, with what is true then. It may run for the same version again: after a power cut nobody
    knows whether it did.

    Args:
        command: The command and its arguments, without a shell; empty for none.
        timeout_s: It is killed after that, with everything that it started in its session.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self._command: Final = tuple(command)
        self._timeout_s: Final = timeout_s
        self._lock: Final = threading.Lock()
        self._next: dict[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_running = False
        self._is_stopped = False

    def run(self, environment: Mapping[str, str]) -> None:
        """Have it run soon.

        Args:
            environment: What it finds beside the agent's own environment.
        """
        if not self._command:
            return
        with self._lock:
            self._next = dict(environment)
            if self._is_running or self._is_stopped:
                return
            self._is_running = True
        threading.Thread(target=self._work, name="whimbrel-hook", daemon=True).start()

    def stop(self) -> None:
        """Kill it if it runs: the agent is about to end."""
        with self._lock:
            self._is_stopped = True
            self._next = None
            if self._process is not None:
                _kill(self._process)

    def _work(self) -> None:
        while True:
            with self._lock:
                environment, self._next = self._next, None
                if environment is None:
                    self._is_running = False
                    return
                try:
                    process = self._process = subprocess.Popen(
                        self._command,
                        env={**os.environ, **environment},
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                except OSError as error:
                    _LOG.warning("[hooks] after_swap: %s: %s", self._command[0], error.strerror or error)
                    continue
            self._wait(process)

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            status = process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            _LOG.warning("[hooks] after_swap: %s was killed after %g s", self._command[0], self._timeout_s)
            _kill(process)
            status = 0
            process.wait()
        with self._lock:
            self._process = None
        if status:
            _LOG.warning("[hooks] after_swap: %s ended with %d", self._command[0], status)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
