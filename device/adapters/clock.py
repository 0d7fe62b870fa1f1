"""The machine's clock and its entropy."""

import ctypes
import random
import time
from pathlib import Path
from typing import Final

_MS_PER_S: Final = 1000

_TIME_ERROR: Final = 5
"""What adjtimex(2) returns while nobody has set the clock by a reference."""

_TIMEX_BYTES: Final = 512
"""Room for the `struct timex` of any platform; without modes set, nothing is changed."""

_SYNCHRONIZED: Final = "run/systemd/timesync/synchronized"
"""There once systemd-timesyncd has set the clock since the boot."""

_RTC_FOLDER: Final = "sys/class/rtc"


class SystemClock:
    """Milliseconds since 1970 that never go back while the process runs, whatever happens to the wall clock; sleep of the machine counts."""

    def __init__(self) -> None:
        self._offset_s = time.time() - _since_boot_s()

    def now_ms(self) -> int:
        """The instant."""
        return int((self._offset_s + _since_boot_s()) * _MS_PER_S)


def is_clock_set(root: Path = Path("/")) -> bool:
    """Whether somebody who knows the time has set the machine's clock since it started: the network, or a clock with a battery.

    A saved time (`fake-hwclock`) is none: it says when the machine was switched off.

    Args:
        root: Where `/run` and `/sys` are.
    """
    if (root / _SYNCHRONIZED).exists() or _is_synchronized():
        return True
    return any(_read(path) == "1" for path in (root / _RTC_FOLDER).glob("*/hctosys"))


def system_rng() -> random.Random:
    """A source of chance that differs on every start and that nobody foresees: for jitter, client ids, and numbers that are used once."""
    return random.SystemRandom()


def _since_boot_s() -> float:
    """Seconds since the boot, sleep included; CLOCK_MONOTONIC would stand still meanwhile (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_synchronized() -> bool:
    """What the kernel says, where the sandbox lets us ask (`ProtectClock=` of systemd does not)."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return False
    state: int = adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return 0 <= state < _TIME_ERROR


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
