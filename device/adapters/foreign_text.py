"""What other programs said, fit for a report: one printable line of bounded length."""

from typing import Final

LINE_CHARS_MAX: Final = 300
"""The runtimes' messages may hold a whole graph."""


def one_line(text: object, chars_max: int = LINE_CHARS_MAX) -> str:
    """Return a text without line breaks, control characters and repeated blanks, cut to `chars_max` characters."""
    printable = "".join(char if char.isprintable() else " " for char in str(text))
    return " ".join(printable.split())[:chars_max]


def error_line(error: Exception) -> str:
    """Return what an error says as one line, or its type where it says nothing."""
    return one_line(error) or type(error).__name__
