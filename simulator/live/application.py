"""The local applications: each asks the model of its device again and again, whatever happens to the update."""

import heapq
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Final

from protocol.errors import EngineError
from protocol.release import Prompt
from simulator.live.devices import Device
from simulator.live.observer import Observer

STOP_S_MAX: Final = 60.0


class Applications:
    """One application per device, on a shared thread.

    Args:
        devices: Whose models are asked.
        prompts: What is asked, in turn.
        interval_s: Between two questions to one device.
        observer: Takes note of every answer.
    """

    def __init__(
        self, devices: Sequence[Device], prompts: Sequence[Prompt], interval_s: float, observer: Observer
    ) -> None:
        self._prompts = itertools.cycle(prompts)
        self._interval_s = interval_s
        self._observer = observer
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="applications", daemon=True)
        now = time.monotonic()
        step = interval_s / max(1, len(devices))
        self._due = [(now + number * step, number, device) for number, device in enumerate(devices)]

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S_MAX)

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            due, number, device = self._due[0]
            wait = due - time.monotonic()
            if wait > 0:
                self._is_stopping.wait(wait)
                continue
            error = ""
            try:
                device.ask(next(self._prompts))
            except (EngineError, OSError) as caught:
                error = str(caught)
            self._observer.asked(device.device, error)
            heapq.heapreplace(
                self._due, (max(due, time.monotonic() - self._interval_s) + self._interval_s, number, device)
            )
