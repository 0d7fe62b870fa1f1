"""What is seen of a run while it goes on: transitions, chunks, faults, answers. Every method may be called from any thread."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from simulator.report.bands import DOWN, RESTING, band, moment
from simulator.report.record import Fault, FaultKind, Phase, Transition

NEWS_MAX: Final = 200
"""Lines of news that are kept for the display."""


@dataclass(slots=True)
class Sight:
    """What is known of one device now.

    Attributes:
        state: By its trace.
        version: That answers now.
        is_down: Its process was killed.
        offered: Versions that it was asked to take.
        tried: Versions of which a trial began.
    """

    state: str
    version: str
    is_down: bool = False
    offered: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    chunks: Counter[tuple[str, int]] = field(default_factory=Counter)
    asked: int = 0
    answered: int = 0
    failed: int = 0


class Observer:
    """Collects; decides nothing.

    Args:
        listener: Told of every transition, on the thread that saw it.
    """

    def __init__(self, listener: Callable[[Transition], None] | None = None) -> None:
        self.started_ms = time.time_ns() // 1_000_000
        self.listener = listener
        self.sights: dict[str, Sight] = {}
        self.transitions: list[Transition] = []
        self.faults: list[Fault] = []
        self.phases: list[Phase] = []
        self.failures: list[str] = []  # of the application, for the one who looks for the reason
        self.news: deque[tuple[int, str]] = deque(maxlen=NEWS_MAX)
        self.news_count = 0
        self._lock = threading.RLock()
        self._phase: tuple[str, int] | None = None

    @property
    def now_ms(self) -> int:
        """Milliseconds since the run began."""
        return time.time_ns() // 1_000_000 - self.started_ms

    @property
    def phase(self) -> str:
        """Name of the phase under way."""
        return self._phase[0] if self._phase else ""

    def add_device(self, device: str, version: str) -> None:
        """Begin to watch a device that runs `version`."""
        with self._lock:
            self.sights[device] = Sight("idle", version)

    def begin_phase(self, name: str) -> None:
        """End the phase before, if there is one, and begin another."""
        with self._lock:
            self.end_phase()
            self._phase = (name, self.now_ms)

    def end_phase(self) -> None:
        """End the phase under way."""
        with self._lock:
            if self._phase is not None:
                self.phases.append(Phase(name=self._phase[0], begin_ms=self._phase[1], end_ms=self.now_ms))
                self._phase = None

    def tell(self, text: str) -> None:
        """Add a line of news."""
        with self._lock:
            self.news.append((self.now_ms, text))
            self.news_count += 1

    def moved(
        self, device: str, source: str, target: str, version: str, code: str, at_epoch_ms: int | None = None
    ) -> None:
        """A device took a transition."""
        with self._lock:
            sight = self.sights[device]
            at_ms = self.now_ms if at_epoch_ms is None else at_epoch_ms - self.started_ms
            sight.state = target
            sight.offered.add(version)
            if target == "trial":
                sight.tried.add(version)
            if source == "committing" and target == "idle":
                sight.version = version
            transition = Transition(
                at_ms=at_ms, device=device, source=source, target=target, version=version, code=code
            )
            self.transitions.append(transition)
        if self.listener is not None:
            self.listener(transition)

    def stored(self, device: str, blob: str, index: int) -> None:
        """A device stored a chunk."""
        with self._lock:
            self.sights[device].chunks[blob, index] += 1

    def lost(self, device: str, kind: FaultKind) -> Fault:
        """A device lost its connection or its life."""
        with self._lock:
            state = self.sights[device].state
            fault = Fault(
                at_ms=self.now_ms,
                device=device,
                kind=kind,
                state=state,
                is_mid_update=state not in RESTING,
            )
            self.faults.append(fault)
            return fault

    def went_down(self, device: str) -> None:
        """The process of a device is dead; call after its trace was read to the end."""
        with self._lock:
            sight = self.sights[device]
            fault = self.lost(device, "kill")
            sight.is_down = True
            self.transitions.append(
                Transition(at_ms=self.now_ms, device=device, source=fault.state, target=DOWN, version="")
            )
            self.tell(f"{device} killed with SIGKILL {moment(fault.state)}")

    def came_back(self, device: str) -> None:
        """The process of a device was started again."""
        with self._lock:
            sight = self.sights[device]
            sight.is_down = False
            self.transitions.append(
                Transition(at_ms=self.now_ms, device=device, source=DOWN, target=sight.state, version="")
            )

    def asked(self, device: str, error: str = "") -> None:
        """The application on a device asked its model, and got an answer unless `error` says why not."""
        with self._lock:
            sight = self.sights[device]
            sight.asked += 1
            if error:
                sight.failed += 1
                self.failures.append(f"{device} ({sight.state}): {error}")
            else:
                sight.answered += 1

    def bands(self) -> Counter[str]:
        """Devices by what they are doing, in the words of the displays."""
        with self._lock:
            return Counter(
                band(sight.state, sight.version, is_down=sight.is_down) for sight in self.sights.values()
            )

    def copy(self) -> tuple[list[Transition], list[Fault], list[Phase]]:
        """What was collected, in order of time."""
        with self._lock:
            return (
                sorted(self.transitions, key=lambda each: each.at_ms),
                list(self.faults),
                list(self.phases),
            )

    def totals(self) -> dict[str, int]:
        """Sums for the display."""
        with self._lock:
            sights = self.sights.values()
            return {
                "answered": sum(sight.answered for sight in sights),
                "failed": sum(sight.failed for sight in sights),
                "chunks": sum(len(sight.chunks) for sight in sights),
                "cuts": sum(fault.kind != "kill" and fault.is_mid_update for fault in self.faults),
                "kills": sum(fault.kind == "kill" and fault.is_mid_update for fault in self.faults),
            }
