"""How this machine stands, read from the files in which Linux says so. What cannot be read is not known, and holds nothing.

Only what the policy asks about is read: some sensors sit behind a slow bus.
"""

import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from device.config import ConditionSources
from device.events import Conditions
from device.policy import Metered, Policy

PERIOD_S: Final = 30.0
"""Between two looks: a window opens and closes so much late."""

_FILE_BYTES_MAX: Final = 4096
_TEMPERATURES_C: Final = (-40.0, 150.0)
"""A sensor that says something else is not connected."""

_MAINS: Final = frozenset({"Mains", "USB", "Wireless"})
_CHARGED: Final = frozenset({"Charging", "Full", "Not charging"})
_BATTERIES: Final = frozenset({"Battery", "UPS"})
_TRUE: Final = frozenset({"1", "yes", "true", "on"})
_FALSE: Final = frozenset({"0", "no", "false", "off"})


class MachineConditions:
    """Reads them.

    Args:
        policy: What they are for.
        sources: What the configuration says about where to look.
        root: Where `/proc` and `/sys` are.
        now_s: The clock on the wall, seconds since 1970.
    """

    def __init__(
        self,
        policy: Policy,
        sources: ConditionSources,
        root: Path = Path("/"),
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._sources = sources
        self._root = root
        self._now_s = now_s

    def read(self) -> Conditions:
        """How it stands now."""
        policy = self._policy
        is_on_battery, percent = self._power() if policy.battery_percent_min is not None else (None, None)
        return Conditions(
            local=datetime.fromtimestamp(self._now_s(), self._sources.zone) if policy.windows else None,
            is_metered=self._is_metered() if policy.metered is not Metered.ALWAYS else None,
            is_on_battery=is_on_battery,
            battery_percent=percent,
            temperature_c=self._temperature_c() if policy.temperature_c_max is not None else None,
            load=self._load() if policy.load_max is not None else None,
            pressure_percent=self._pressure_percent() if policy.pressure_percent_max is not None else None,
            memory_available_bytes=self._memory_bytes() if policy.memory_bytes_min is not None else None,
        )

    def _is_metered(self) -> bool | None:
        """What the file of a modem manager says, or else the configuration."""
        file = self._sources.metered_file
        if file is None:
            return self._sources.is_metered
        word = _text(file).lower()
        if word in _TRUE:
            return True
        return False if word in _FALSE else None

    def _power(self) -> tuple[bool | None, float | None]:
        """Whether it runs on a battery, and how full those are on average.

        See sysfs-class-power of the kernel's ABI documents. Batteries of a mouse have the scope `Device`.
        """
        statuses: set[str] = set()
        percents: list[float] = []
        is_on_mains = False
        for supply in _entries(self._root / "sys/class/power_supply"):
            kind = _text(supply / "type")
            if _text(supply / "scope") == "Device" or _text(supply / "present") == "0":
                continue
            if kind in _MAINS and _text(supply / "online") in {"1", "2"}:
                is_on_mains = True
            if kind in _BATTERIES:
                statuses.add(_text(supply / "status"))
                percent = _number(_text(supply / "capacity"))
                if percent is not None and 0 <= percent <= 100:
                    percents.append(percent)
        if not percents:
            return None, None
        percent = sum(percents) / len(percents)
        if "Discharging" in statuses:  # even beside a charger that is too weak
            return True, percent
        return (False, percent) if is_on_mains or statuses & _CHARGED else (None, percent)

    def _temperature_c(self) -> float | None:
        """Of the hottest zone; the kernel counts in thousandths of a degree."""
        found = [
            value / 1000
            for zone in _entries(self._root / "sys/class/thermal")
            if zone.name.startswith("thermal_zone") and (value := _number(_text(zone / "temp"))) is not None
        ]
        low, high = _TEMPERATURES_C
        return max((value for value in found if low <= value <= high), default=None)

    def _load(self) -> float | None:
        """The first figure of proc_loadavg(5), per processor."""
        load = _number(_text(self._root / "proc/loadavg").partition(" ")[0])
        return None if load is None else load / (os.cpu_count() or 1)

    def _pressure_percent(self) -> float | None:
        """The largest `avg60` of the lines `some`; a kernel without them is not asked."""
        found = []
        for name in ("cpu", "io", "memory"):
            for line in _text(self._root / "proc/pressure" / name).splitlines():
                fields = dict(field.partition("=")[::2] for field in line.split())
                if "some" in fields and (value := _number(fields.get("avg60", ""))) is not None:
                    found.append(value)
        return max(found, default=None)

    def _memory_bytes(self) -> int | None:
        """`MemAvailable` of proc_meminfo(5)."""
        for line in _text(self._root / "proc/meminfo").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable" and (kilobytes := _number(value.removesuffix("kB"))) is not None:
                return int(kilobytes) * 1024
        return None


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except OSError:
        return


def _text(path: Path) -> str:
    """What a file says, empty where it says nothing; a sensor that is asleep gives errors of many kinds."""
    try:
        with path.open("rb") as file:
            return file.read(_FILE_BYTES_MAX).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
