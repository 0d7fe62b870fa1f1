"""Does to each device what the seed has planned for it: cuts its link, or kills it, in the middle of the good update."""

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from simulator.live.devices import Device, ProcessDevice, TraceReader
from simulator.live.link import Cause, Link
from simulator.live.observer import Observer
from simulator.report.bands import moment
from simulator.report.record import Transition

TRIAL_DELAY_S: Final = 0.35
"""Into the trial: its process has started and is at work."""

JOIN_S_MAX: Final = 30.0


class Saboteur:
    """Waits for the planned moment of each device.

    Args:
        devices: By identity.
        version: The update that is disturbed.
        expected_bytes: What a device has to fetch for it.
        observer: Takes note.
    """

    def __init__(
        self,
        devices: Mapping[str, Device],
        version: str,
        expected_bytes: Callable[[Device], int],
        observer: Observer,
    ) -> None:
        self._devices = devices
        self._version = version
        self._expected_bytes = expected_bytes
        self._observer = observer
        self._cut: set[str] = set()
        self._killed: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._is_stopping = threading.Event()
        self.traces: TraceReader | None = None

    @property
    def victims(self) -> set[str]:
        """Devices that have been or are being killed: their processes may be absent."""
        return set(self._killed)

    @property
    def is_at_work(self) -> bool:
        """Whether a device that was killed has still to come back."""
        return any(thread.is_alive() for thread in self._threads)

    def on_transition(self, transition: Transition) -> None:
        """A device has moved: perhaps its moment has come, or its link is armed for it."""
        if transition.version != self._version:
            return
        device = self._devices[transition.device]
        cut, kill = device.plan.cut, device.plan.kill
        if cut is not None and transition.target == "downloading" and device.device not in self._cut:
            self._cut.add(device.device)
            count = int(cut.at_share * self._expected_bytes(device))
            device.link.arm(count, functools.partial(device.link.cut, cut.offline_ms))
        if kill is not None and transition.target == kill.state and device.device not in self._killed:
            self._killed.add(device.device)
            strike = functools.partial(self._strike, device)
            if kill.state == "downloading":
                device.link.arm(int(kill.at_share * self._expected_bytes(device)), strike)
            else:
                strike()

    def on_lost(self, link: Link, cause: Cause) -> None:
        """A link went down under a connection."""
        if self.traces is not None and not self._is_stopping.is_set():
            self.traces.read(link.device)
            fault = self._observer.lost(link.device, cause)
            if fault.is_mid_update:
                word = "lost its connection" if cause == "cut" else "went to sleep"
                self._observer.tell(f"{link.device} {word} {moment(fault.state)}")

    def stop(self) -> None:
        """Let everyone come back."""
        self._is_stopping.set()
        for thread in self._threads:
            thread.join(JOIN_S_MAX)

    def _strike(self, device: Device) -> None:
        if isinstance(device, ProcessDevice) and not self._is_stopping.is_set():
            thread = threading.Thread(target=self._kill, args=(device,), name="kill", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _kill(self, device: ProcessDevice) -> None:
        kill = device.plan.kill
        assert kill is not None
        assert self.traces is not None
        if kill.state == "trial":
            time.sleep(TRIAL_DELAY_S)
        device.kill()
        self.traces.read(device.device)
        self._observer.went_down(device.device)
        self._is_stopping.wait(kill.down_ms / 1000)
        if not self._is_stopping.is_set():
            device.start()
            self._observer.came_back(device.device)
