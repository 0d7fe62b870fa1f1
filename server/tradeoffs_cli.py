"""`whimbrel tradeoffs`: several versions of one model side by side, tier by tier."""

import argparse
import json
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import RequestError, StorageError
from server.display import Printer, Progress
from server.scorecard.card import CARD_BYTES_MAX, Scorecard, decode_card
from server.tradeoffs.prices import read_prices
from server.tradeoffs.records import AXES, DEFAULT_AXES, Axis, Margins
from server.tradeoffs.text import text_lines
from server.tradeoffs.weighing import VERSIONS_MAX, Question, weigh

_MARGINS: Final = tuple(Margins.__struct_fields__)


def add_parser(commands: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """Add `tradeoffs` to the commands of `whimbrel`."""
    tradeoffs = commands.add_parser(
        "tradeoffs",
        parents=[common],
        help="compare versions of a model, for example quantizations, on each hardware tier",
        description="Puts accuracy, drift, latency, memory, energy, bytes over the air and cost of several versions side by side for each"
        " hardware tier, and marks those that nothing beats. Nothing is measured: scorecards come from `whimbrel score`.",
    )
    tradeoffs.add_argument("family", metavar="FAMILY", help="model family, for example smollm2")
    tradeoffs.add_argument(
        "versions", metavar="VERSION", nargs="+", help=f"drafts or published, at most {VERSIONS_MAX}"
    )
    tradeoffs.add_argument(
        "--reference",
        metavar="VERSION",
        default="",
        help="with which the scorecards compare (default: what most of them do)",
    )
    tradeoffs.add_argument(
        "--tier", metavar="T", action="append", default=[], help="hardware tier; repeatable (default: all)"
    )
    tradeoffs.add_argument(
        "--axis",
        metavar="NAME",
        choices=AXES,
        action="append",
        default=[],
        help=f"what counts, of {', '.join(AXES)}; repeatable (default: {', '.join(DEFAULT_AXES)})",
    )
    tradeoffs.add_argument(
        "--margin",
        metavar="AXIS=X",
        type=_margin,
        action="append",
        default=[],
        help="how much is no difference: "
        + ", ".join(f"{name}={getattr(Margins(), name):g}" for name in _MARGINS)
        + "; repeatable",
    )
    tradeoffs.add_argument("--prices", metavar="FILE", type=Path, help="TOML file: what a megabyte costs")
    tradeoffs.add_argument(
        "--scorecard",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="one that no release names: scorecard.json, or what `score --json` printed; repeatable",
    )
    tradeoffs.add_argument(
        "--deltas", action="store_true", help="build deltas that are missing, to see how large they are"
    )
    tradeoffs.add_argument("--html", metavar="FILE", type=Path, help="write a page as well")
    tradeoffs.set_defaults(run=lambda arguments: _tradeoffs(arguments, show))


def _tradeoffs(arguments: argparse.Namespace, show: Printer) -> int:
    page: Path | None = arguments.html
    if page is not None and (not page.parent.is_dir() or page.is_dir()):
        raise StorageError(f"{page} cannot be written", hint="choose another --html")
    axes: tuple[Axis, ...] = tuple(dict.fromkeys(arguments.axis)) or DEFAULT_AXES
    question = Question(
        family=arguments.family,
        versions=tuple(arguments.versions),
        reference=arguments.reference,
        tiers=tuple(arguments.tier),
        axes=axes,
        margins=msgspec.structs.replace(Margins(), **dict(arguments.margin)),
        prices=None if arguments.prices is None else read_prices(arguments.prices),
        cards=tuple(_card(path) for path in arguments.scorecard),
        is_building=arguments.deltas,
    )
    with Progress(is_quiet=arguments.json) as progress:
        report = weigh(arguments.dir, question, progress)
    if page is not None:
        from server.tradeoffs.page import render  # noqa: PLC0415 - templates are only loaded where a page is written

        try:
            page.write_text(render(report), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{page}: {error.strerror}", hint="choose another --html") from error
    value = {**msgspec.to_builtins(report), "paragraph_text": report.paragraph_text}
    show(arguments, value, list(text_lines(report)))
    return 0


def _card(path: Path) -> Scorecard:
    """A scorecard as `release export` writes it, or within what `score --json` prints."""
    try:
        with path.open("rb") as file:
            data = file.read(CARD_BYTES_MAX + 1)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return decode_card(data, str(path))  # says what is wrong
    if isinstance(value, dict) and "scorecard" in value:
        data = msgspec.json.encode(value["scorecard"])
    return decode_card(data, str(path))


def _margin(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if name not in _MARGINS or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is not AXIS=X with one of {', '.join(_MARGINS)} and a number from 0 to 1"
        )
    return name, value
