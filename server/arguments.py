"""Types of command-line arguments that several commands have."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from server.scorecard.items import SuiteKind


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return parse


def suite_argument(text: str) -> tuple[SuiteKind, Path]:
    """`KIND=PATH` of a suite, as an option has it."""
    name, equals, path = text.partition("=")
    for kind in get_args(SuiteKind):
        if name == kind and equals and path:
            return kind, Path(path)
    raise argparse.ArgumentTypeError(
        f"{text[:60]!r} is not KIND=PATH with one of {', '.join(get_args(SuiteKind))}"
    )
