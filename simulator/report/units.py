"""Durations, sizes and shares as people read them, with spaces at which no line breaks. Pure."""

from typing import Final

_GAP: Final = "\N{NO-BREAK SPACE}"
_PERIODS: Final = ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min"))
_SIZES: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def duration(seconds: float) -> str:
    """A duration in its natural unit, with three figures or so."""
    for length, name in _PERIODS:
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}{_GAP}{name}"
    return f"{seconds:.2f}{_GAP}s" if seconds < 10 else f"{seconds:.1f}{_GAP}s"


def size(byte_count: float) -> str:
    """A size in decimal units."""
    for factor, name in _SIZES:
        if byte_count >= factor:
            value = byte_count / factor
            return f"{value:.{0 if value >= 100 else 1}f}{_GAP}{name}"
    return f"{byte_count:.0f}{_GAP}bytes"


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent: never 0 or 100 % when it is not."""
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return f"under 0.1{_GAP}%"
    if 99.9 < percent < 100:
        return f"over 99.9{_GAP}%"
    is_whole = percent in {0.0, 100.0} or 1 <= percent < 99
    return f"{percent:.{0 if is_whole else 1}f}{_GAP}%"


def devices(count: int) -> str:
    """So many devices."""
    return f"{count:,} device{'' if count == 1 else 's'}"
