"""What people are shown: tables, sizes and addresses as text."""

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


def address_text(address: str) -> str:
    """An address without its user, password and query, any of which may be a secret; for errors and logs."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "", address
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"[:80]
