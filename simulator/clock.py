"""Wall clocks of devices: they drift, are stepped, may stand in 1970, and never go back while the device runs."""

from typing import Final

from simulator.loop import US_PER_MS, Loop

START_MS: Final = 1_800_000_000_000
"""What a right clock shows when a run begins: 15 January 2027."""

_PPM: Final = 1_000_000


class DeviceClock:
    """A clock with an error.

    Args:
        loop: Virtual time.
        offset_ms: Error at the start.
        drift_ppm: How much too fast it is, in millionths.
    """

    __slots__ = ("_drift_ppm", "_last_ms", "_loop", "offset_ms")

    def __init__(self, loop: Loop, offset_ms: int, drift_ppm: int) -> None:
        self.offset_ms = offset_ms
        self._loop = loop
        self._drift_ppm = drift_ppm
        self._last_ms = 0

    def restart(self) -> None:
        """The device starts: only from here on its time does not go back."""
        self._last_ms = 0

    def now_ms(self) -> int:
        """What it shows."""
        now_us = self._loop.now_us
        shown = START_MS + self.offset_ms + (now_us + now_us * self._drift_ppm // _PPM) // US_PER_MS
        if shown > self._last_ms:
            self._last_ms = shown
        return self._last_ms

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
