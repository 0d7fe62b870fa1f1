"""Wall clocks of devices: they drift, are stepped, may stand in 1970, and never go back while the device runs."""

from typing import Final

from simulator.loop import US_PER_MS, Loop

START_MS: Final = 1_800_000_000_000
"""What a right clock shows when a run begins: 15 January 2027."""

WRONG_MS: Final = 60_000
"""An error that somebody mends."""

_PPM: Final = 1_000_000


class DeviceClock:
    """A clock with an error; as `device.adapters.clock.SystemClock`, a process keeps the time that it started with.

    Args:
        loop: Virtual time.
        offset_ms: Error at the start.
        drift_ppm: How much too fast it is, in millionths.
    """

    __slots__ = ("_drift_ppm", "_loop", "_running_offset_ms", "offset_ms")

    def __init__(self, loop: Loop, offset_ms: int, drift_ppm: int) -> None:
        self.offset_ms = offset_ms  # of the wall clock, which somebody may set
        self._running_offset_ms = offset_ms
        self._loop = loop
        self._drift_ppm = drift_ppm

    def restart(self) -> None:
        """A process starts, and looks at the wall clock."""
        self._running_offset_ms = self.offset_ms

    @property
    def is_wrong(self) -> bool:
        """Whether the process takes another time for the right one than a wall clock shows that was set meanwhile."""
        return abs(self._running_offset_ms - self.offset_ms) > WRONG_MS

    def now_ms(self) -> int:
        """What the process takes for the time; never before 1970."""
        now_us = self._loop.now_us
        since_ms = (now_us + now_us * self._drift_ppm // _PPM) // US_PER_MS
        return max(START_MS + self._running_offset_ms, 0) + since_ms

    def until_us(self, instant_ms: int) -> int:
        """How long it takes until it shows an instant."""
        ahead_us = (instant_ms - self.now_ms()) * US_PER_MS
        return max(0, ahead_us - ahead_us * self._drift_ppm // _PPM)


class RightClock:
    """The server's."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return START_MS + self._loop.now_us // US_PER_MS
