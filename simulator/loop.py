"""Virtual time: one heap of (instant, serial, action), and nothing else that decides what happens next."""

import heapq
from collections.abc import Callable
from typing import Any, Final

US_PER_MS: Final = 1_000
US_PER_S: Final = 1_000_000


class Loop:
    """The only scheduler. Instants are microseconds since the start; equal ones happen in the order of the calls."""

    __slots__ = ("_heap", "_serial", "events", "now_us")

    def __init__(self) -> None:
        self.now_us = 0
        self.events = 0  # actions carried out so far
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def at(self, instant_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Run `action(*arguments)` at an instant; one that has passed means now."""
        self._serial += 1
        heapq.heappush(self._heap, (max(instant_us, self.now_us), self._serial, action, arguments))

    def after(self, delay_us: int, action: Callable[..., None], *arguments: Any) -> None:
        """Run `action(*arguments)` after a delay."""
        self._serial += 1
        heapq.heappush(self._heap, (self.now_us + max(0, delay_us), self._serial, action, arguments))

    def run(self, until_us: int, is_done: Callable[[], bool]) -> bool:
        """Carry out actions in order, until one makes `is_done` true or the time is over; whether it was the first."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_us:
            self.now_us, _, action, arguments = pop(heap)
            self.events += 1
            action(*arguments)
            if is_done():
                return True
        self.now_us = max(self.now_us, until_us)
        return is_done()

    def __len__(self) -> int:
        return len(self._heap)
