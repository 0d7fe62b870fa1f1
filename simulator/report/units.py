"""Durations, sizes and shares as people read them. Pure."""

from typing import Final

_SIZES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def duration(seconds: float) -> str:
    """A duration in its natural unit, with three figures or so."""
    for size, name in ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def size(byte_count: float) -> str:
    """A size in decimal units."""
    for factor, name in _SIZES:
        if byte_count >= factor:
            value = byte_count / factor
            return f"{value:.0f} {name}" if value >= 100 else f"{value:.1f} {name}"
    return f"{byte_count:.0f} bytes"


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent: never 0 % or 100 % when it is not."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "under 0.1 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.0f} %" if percent in {0.0, 100.0} or 1 <= percent < 99 else f"{percent:.1f} %"


def devices(count: int) -> str:
    """So many devices."""
    return f"{count:,} device{'' if count == 1 else 's'}"
