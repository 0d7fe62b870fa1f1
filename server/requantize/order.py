"""What an order of `whimbrel requantize` has in common, whatever the model is: its suites, the names of its texts or samples, and what is said at the end."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import RequestError
from server.display import bytes_text
from server.scorecard.card import Check
from server.scorecard.items import Suite
from server.scorecard.suites import Asking, read_suite

_MARKS = {"passed": "ok", "failed": "FAILED", "undecided": "UNDECIDED"}


def suites_of(arguments: argparse.Namespace) -> tuple[Suite, ...]:
    """The prompts and questions that the options name.

    Raises:
        WhimbrelError: As `read_suite`.
    """
    golden = [read_suite("golden", path, Asking()) for path in arguments.golden]
    others = [read_suite(kind, path, Asking(sample=arguments.sample)) for kind, path in arguments.suite]
    return (*golden, *others)


def check_names(arguments: argparse.Namespace, what: str) -> None:
    """Refuse two held-out or development files of one name, by which tables tell them apart.

    Raises:
        RequestError: There are two.
    """
    paths: list[Path] = [*arguments.held_out, *([arguments.development] if arguments.development else [])]
    names = [path.name for path in paths]
    if len(set(names)) != len(names):
        raise RequestError(
            f"two {what} are called {max(names, key=names.count)}", hint="give them other names"
        )


def check_lines(checks: Sequence[Check]) -> list[str]:
    """The guards, a line each."""
    return [f"{_MARKS[check.status]:<9}  {check.name}: {check.detail}" for check in checks]


def verdict_line(out: Path, checks: Sequence[Check], delta_bytes: int, *, is_written: bool) -> str:
    """What became of the chosen file."""
    if is_written:
        return f"{out}: {bytes_text(delta_bytes)} to send"
    return f"{out} is not written: {sum(check.status != 'passed' for check in checks)} guard(s) did not pass"


def record_lines(record: Path | None) -> list[str]:
    """Where it says how a file was chosen, if one was written."""
    if record is None:
        return []
    return [f"How it was chosen: {record}; `whimbrel release add` signs it with the file"]
