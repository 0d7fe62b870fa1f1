"""What the command line shows to people: tables and sizes as text."""

import argparse
from collections.abc import Callable
from typing import Any

Printer = Callable[[argparse.Namespace, Any, list[str]], None]
"""Shows a value to programs, or lines to people, as the arguments of a command ask for."""


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Left-aligned columns; nothing at all without rows."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [titles, *rows]
    ]


def bytes_text(count: int) -> str:
    """A size with three digits at most, in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.1f} {unit}"
