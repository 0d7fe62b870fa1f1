"""What people are shown: tables, sizes, times and addresses as text."""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, Self

Printer = Callable[[argparse.Namespace, Any, list[str]], None]
"""Shows a value to programs, or lines to people, as the arguments of a command ask for."""


_TENTHS: Final = 10


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


def instant_text(at_ms: int) -> str:
    """A time, to the second."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def address_text(address: str) -> str:
    """An address without its user, password and query, any of which may be a secret; for errors and logs."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "", address
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"[:80]


def reporter(*, is_quiet: bool) -> Callable[[str], None]:
    """Takes lines about what is going on, and says them on stderr; nothing for programs."""

    def report(line: str) -> None:
        if not is_quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    return report


class Progress:
    """How far something has come, on stderr: a line that is rewritten where a person looks at one, and else a line for each tenth.

    Args:
        is_quiet: Say nothing, for programs.
    """

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._is_rewritten = sys.stderr.isatty()
        self._said: tuple[str, int] = ("", -1)

    def __call__(self, done: int, total: int, what: str) -> None:
        """Say how far it is."""
        if self._is_quiet:
            return
        if self._is_rewritten:
            sys.stderr.write(f"\r\x1b[K{what}: {done:,} of {total:,}")
            sys.stderr.flush()
            self._said = (what, 0)
        elif self._said != (what, _TENTHS * done // total):
            self._said = (what, _TENTHS * done // total)
            sys.stderr.write(f"{what}: {done:,} of {total:,}\n")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_rewritten and self._said[1] >= 0:
            sys.stderr.write("\r\x1b[K")
