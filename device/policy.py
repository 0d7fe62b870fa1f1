"""When an update may go on: what the owner allows, against how the device stands at this moment. Pure.

A rule speaks only about what is known: without a sensor, a battery or a right clock it holds nothing, so that no device is held for
ever by what it cannot measure. What has been held goes on a little below the limit, so that nothing flaps at it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final, NamedTuple

from device.events import Conditions
from protocol.errors import RequestError

CLOCK_YEAR_MIN: Final = 2024
"""Before that a clock was never set: a board without a battery for it wakes up in 1970."""

BATTERY_SLACK_PERCENT: Final = 5
TEMPERATURE_SLACK_C: Final = 5.0
RELEASE_SHARE: Final = 0.75
"""Load and pressure go on at this share of their limit."""

MEMORY_RELEASE_SHARE: Final = 1.1

WINDOWS_MAX: Final = 32

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW: Final = re.compile(r"(?:(?P<days>[a-z,-]+) )?(\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY_MINUTES: Final = 24 * 60
_MB: Final = 1 << 20


class Step(Enum):
    """What may have to wait. The values are what configurations say."""

    FETCH = "fetch"  # metadata and artifacts
    INSTALL = "install"  # applying, and reading the result back
    TRIAL = "trial"


class Metered(Enum):
    """What may be fetched on a metered link. The values are what configurations say."""

    ALWAYS = "always"  # as on any other
    SMALL = "small"  # metadata, and updates up to a size
    NEVER = "never"


class Hold(NamedTuple):
    """Why something may not begin now: a stable code, and one line."""

    code: str
    text: str


OPERATOR: Final = Hold("held.operator", "updates are paused by the operator")


class Window(NamedTuple):
    """A time of the day in which updates may go on, in local time; one over midnight belongs to the day on which it begins."""

    days: frozenset[int]  # 0 is Monday
    begin_minute: int
    end_minute: int
    text: str

    def is_open(self, local: datetime) -> bool:
        """Whether a local time is within."""
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.begin_minute < self.end_minute:
            return day in self.days and self.begin_minute <= minute < self.end_minute
        begins = day in self.days and minute >= self.begin_minute
        return begins or ((day - 1) % 7 in self.days and minute < self.end_minute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the owner allows; without arguments, everything at any time.

    Attributes:
        windows: When updates may go on; none for always.
        window_steps: What has to wait for a window.
        battery_percent_min: Below that, on battery, everything waits.
        temperature_c_max: Above that, installations and trials wait.
        load_max: Likewise, processes that run or wait for a processor per core, mean of a minute (proc_loadavg(5)).
        pressure_percent_max: Likewise, the share of the last minute in which something waited for processor, memory or disk, the largest
            of the three (Linux, Documentation/accounting/psi.rst).
        memory_bytes_min: Below that much available memory, installations and trials wait.
        metered: What may be fetched on a metered link.
        metered_bytes_max: Artifacts of an update that count as small.
    """

    windows: tuple[Window, ...] = ()
    window_steps: frozenset[Step] = frozenset(Step)
    battery_percent_min: int | None = None
    temperature_c_max: float | None = None
    load_max: float | None = None
    pressure_percent_max: float | None = None
    memory_bytes_min: int | None = None
    metered: Metered = Metered.ALWAYS
    metered_bytes_max: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it holds nothing, whatever the conditions."""
        limits = (
            self.battery_percent_min,
            self.temperature_c_max,
            self.load_max,
            self.pressure_percent_max,
            self.memory_bytes_min,
        )
        return not self.windows and self.metered is Metered.ALWAYS and all(limit is None for limit in limits)


NO_RULES: Final = Policy()


def parse_window(text: str) -> Window:
    """Read `22:00-06:00`, `sat,sun 10:00-16:00` or `mon-fri 22:00-06:00`.

    Raises:
        RequestError: It is none of these.
    """
    match = _WINDOW.fullmatch(text)
    if match is None:
        raise RequestError(
            f"window {text!r} is not of the form 22:00-06:00, or sat,sun 10:00-16:00, or mon-fri 22:00-06:00"
        )
    begin_hour, begin, end_hour, end = (int(part) for part in match.groups()[1:])
    begin_minute, end_minute = begin_hour * 60 + begin, end_hour * 60 + end
    if begin > 59 or end > 59 or begin_minute >= _DAY_MINUTES or end_minute > _DAY_MINUTES:
        raise RequestError(f"window {text!r} has a time that no clock shows")
    if begin_minute == end_minute:
        raise RequestError(f"window {text!r} is empty", hint="the whole day is 00:00-24:00")
    named = match["days"]
    days = frozenset(range(7)) if named is None else _parse_days(named, text)
    return Window(days, begin_minute, end_minute, text)


def _parse_days(named: str, text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in named.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if first not in _DAYS or last not in _DAYS or part.endswith("-"):
            raise RequestError(f"window {text!r} has a day {part!r}, allowed are {', '.join(_DAYS)}")
        begin, count = _DAYS.index(first), (_DAYS.index(last) - _DAYS.index(first)) % 7 + 1
        days.update((begin + number) % 7 for number in range(count))
    return frozenset(days)


class Guard:
    """A policy, how the device stands, and which limits were passed and not yet left behind.

    Args:
        policy: What the owner allows.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._is_open = policy.is_open  # the common case, and fleets share a process
        self._now = Conditions()
        self._passed: frozenset[str] = frozenset()

    def take(self, conditions: Conditions) -> None:
        """The device was looked at."""
        self._now = conditions
        self._passed = frozenset(
            limit.code for limit in self._limits() if limit.is_passed(was_passed=limit.code in self._passed)
        )

    def hold(self, step: Step, fetch_bytes: int = 0) -> Hold | None:
        """Why a step may not begin now; `None` where it may.

        Args:
            step: Which.
            fetch_bytes: What the update has to fetch in all; 0 for metadata.
        """
        return None if self._is_open else next(self._holds(step, fetch_bytes), None)

    def _holds(self, step: Step, fetch_bytes: int) -> Iterator[Hold]:
        policy, now = self._policy, self._now
        if step in policy.window_steps and (hold := self._outside()) is not None:
            yield hold
        if step is Step.FETCH and now.is_metered:
            if policy.metered is Metered.NEVER:
                yield Hold("held.metered", "the link is metered")
            if policy.metered is Metered.SMALL and fetch_bytes > policy.metered_bytes_max:
                text = f"the link is metered, the update takes {fetch_bytes / 1e6:.1f} MB, allowed are {policy.metered_bytes_max / 1e6:.1f}"
                yield Hold("held.metered", text)
        for limit in self._limits():
            if limit.code in self._passed and (step is not Step.FETCH or limit.is_for_fetch):
                yield limit.hold

    def _outside(self) -> Hold | None:
        windows, local = self._policy.windows, self._now.local
        if not windows or local is None or local.year < CLOCK_YEAR_MIN:
            return None
        if any(window.is_open(local) for window in windows):
            return None
        opens = ", ".join(window.text for window in windows)
        return Hold("held.window", f"it is {_DAYS[local.weekday()]} {local:%H:%M}, goes on in {opens}")

    def _limits(self) -> Iterator["_Limit"]:
        policy, now = self._policy, self._now
        if (percent := policy.battery_percent_min) is not None:
            value = now.battery_percent if now.is_on_battery else None
            release = min(percent + BATTERY_SLACK_PERCENT, 100)
            text = "on battery at {:.0f} %, goes on at {:.0f} or on mains"
            yield _Limit("held.battery", value, percent, release, text, is_lowest=True, is_for_fetch=True)
        if (celsius := policy.temperature_c_max) is not None:
            text = "at {:.0f} C, goes on at {:.0f}"
            yield _Limit("held.temperature", now.temperature_c, celsius, celsius - TEMPERATURE_SLACK_C, text)
        if (load := policy.load_max) is not None:
            text = "load {:.2f} per core, goes on at {:.2f}"
            yield _Limit("held.load", now.load, load, load * RELEASE_SHARE, text)
        if (share := policy.pressure_percent_max) is not None:
            text = "something waits {:.0f} % of the time, goes on at {:.0f}"
            yield _Limit("held.pressure", now.pressure_percent, share, share * RELEASE_SHARE, text)
        if (least := policy.memory_bytes_min) is not None:
            available = now.memory_available_bytes
            value = None if available is None else available / _MB
            text = "{:.0f} MB of memory available, goes on at {:.0f}"
            limit = least / _MB
            yield _Limit("held.memory", value, limit, limit * MEMORY_RELEASE_SHARE, text, is_lowest=True)


class _Limit(NamedTuple):
    """What was measured, beside the limit and where it goes on."""

    code: str
    value: float | None
    limit: float
    release: float
    text: str
    is_lowest: bool = False  # the value must not be below it; else not above
    is_for_fetch: bool = False

    def is_passed(self, *, was_passed: bool) -> bool:
        if self.value is None:
            return False
        bound = self.release if was_passed else self.limit
        return self.value < bound if self.is_lowest else self.value > bound

    @property
    def hold(self) -> Hold:
        return Hold(self.code, self.text.format(self.value, self.release))
