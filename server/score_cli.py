"""`whimbrel score`: measure a version, compare it with the one that it replaces, say whether it is good enough."""

import argparse
import os
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from protocol.errors import RequestError, StorageError
from server.arguments import integer, suite_argument
from server.display import Printer, Progress
from server.scorecard.frontier import FRONTIER_BYTES_MAX, Frontier, decode_frontier
from server.scorecard.items import SuiteKind
from server.scorecard.keeping import Plan
from server.scorecard.page import render
from server.scorecard.report import text_lines
from server.scorecard.suites import SHOTS_MAX, Asking
from server.scorecard.verdict import Limits, read_limits
from server.scorecard.work import MemoryOrder
from server.scoring import Scored, score_release

_COUNT_MAX: Final = 1_000_000
_CONTEXT_MAX: Final = 1 << 20
_CONTEXTS: Final = ", ".join(str(tokens) for tokens in MemoryOrder().contexts)


def add_parser(commands: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """Add `score` to the commands of `whimbrel`."""
    score = commands.add_parser(
        "score",
        parents=[common],
        help="measure a version and compare it with another; 1 if it is not good enough",
        description="Makes the scorecard of a version, bound to the digests of its files. What was measured is kept: a run that"
        " was interrupted goes on, and one that was complete is read back.",
    )
    score.add_argument("family", metavar="FAMILY", help="model family, for example digits")
    score.add_argument("version", metavar="VERSION", help="for example 2.0")
    score.add_argument("--against", metavar="OLD", help="version that it replaces")
    _add_questions(score)
    _add_conditions(score)
    score.add_argument("--limits", metavar="FILE", type=Path, help="TOML file: what is good enough")
    score.add_argument(
        "--frontier",
        metavar="FILE",
        type=Path,
        help="how the file was chosen: what `whimbrel requantize --frontier` wrote beside it",
    )
    score.add_argument("--html", metavar="FILE", type=Path, help="write a page as well")
    score.set_defaults(run=lambda arguments: _score(arguments, show))


def _add_questions(score: argparse.ArgumentParser) -> None:
    score.add_argument(
        "--suite",
        metavar="KIND=PATH",
        type=suite_argument,
        action="append",
        default=[],
        help=f"questions beside the prompts of the health plan; KIND is one of {', '.join(get_args(SuiteKind))}; repeatable",
    )
    score.add_argument(
        "--sample",
        metavar="[KIND=]N",
        type=_sample,
        action="append",
        default=[],
        help="questions of each suite, or of those of one kind (default: all); repeatable",
    )
    score.add_argument(
        "--seed",
        metavar="S",
        type=integer(0, _COUNT_MAX),
        default=0,
        help="draws the sample (default: %(default)s)",
    )
    score.add_argument(
        "--shots",
        metavar="K",
        type=integer(0, SHOTS_MAX),
        default=5,
        help="solved examples before each question (default: %(default)s)",
    )
    score.add_argument(
        "--answer-tokens",
        metavar="N",
        type=integer(1, 4096),
        default=256,
        help="longest answer to a problem (default: %(default)s)",
    )
    score.add_argument(
        "--drift-texts",
        metavar="N",
        type=integer(0, _COUNT_MAX),
        default=64,
        help="solutions or inputs over which distributions are compared (default: %(default)s)",
    )


def _add_conditions(score: argparse.ArgumentParser) -> None:
    score.add_argument(
        "--threads",
        metavar="N",
        type=integer(1, 1024),
        default=max(1, (os.cpu_count() or 1) // 2),
        help="of one inference (default: half of the cores)",
    )
    score.add_argument(
        "--context",
        metavar="N",
        type=integer(64, _CONTEXT_MAX),
        default=4096,
        help="tokens of examples, question and answer together (default: %(default)s)",
    )
    score.add_argument(
        "--memory-at",
        metavar="N",
        type=integer(64, _CONTEXT_MAX),
        action="append",
        default=[],
        help=f"length of context at which memory is measured; repeatable (default: {_CONTEXTS})",
    )


def _score(arguments: argparse.Namespace, show: Printer) -> int:
    page: Path | None = arguments.html
    if page is not None and (not page.parent.is_dir() or page.is_dir()):
        raise StorageError(f"{page} cannot be written", hint="choose another --html")
    plan = Plan(
        asking=Asking(
            sample=dict(arguments.sample).get("", 0),
            samples={kind: count for kind, count in arguments.sample if kind},
            seed=arguments.seed,
            shots=arguments.shots,
            tokens_max=arguments.answer_tokens,
        ),
        limits=Limits() if arguments.limits is None else read_limits(arguments.limits),
        threads=arguments.threads,
        context_tokens=arguments.context,
        drift_texts=arguments.drift_texts,
        memory=MemoryOrder(contexts=tuple(sorted(set(arguments.memory_at))))
        if arguments.memory_at
        else MemoryOrder(),
    )
    if arguments.against == arguments.version:
        raise RequestError(
            f"{arguments.version} is what is measured", hint="give another version with --against"
        )
    with Progress(is_quiet=arguments.json) as progress:
        scored = score_release(
            arguments.dir,
            arguments.family,
            arguments.version,
            suites=arguments.suite,
            plan=plan,
            against=arguments.against,
            frontier=None if arguments.frontier is None else _frontier(arguments.frontier),
            progress=progress,
        )
    if page is not None:
        try:
            page.write_text(render(scored.card, scored.digest), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{page}: {error.strerror}", hint="choose another --html") from error
    value = {
        "digest": scored.digest,
        "is_bound": scored.is_bound,
        "note": scored.note,
        "scorecard": msgspec.to_builtins(scored.card),
    }
    show(arguments, value, [*text_lines(scored.card), "", *_bound_lines(scored)])
    return 0 if scored.card.verdict == "passed" else 1


def _frontier(path: Path) -> Frontier:
    try:
        with path.open("rb") as file:
            data = file.read(FRONTIER_BYTES_MAX + 1)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error
    return decode_frontier(data, str(path))


def _bound_lines(scored: Scored) -> list[str]:
    subject = scored.card.subject
    lines = [f"Scorecard: sha256 {scored.digest}"]
    if scored.is_bound:
        return [*lines, f"{subject.family} {subject.version} names it, and publishing signs it"]
    return [*lines, f"{subject.family} {subject.version} does not name it: {scored.note}"]


def _sample(text: str) -> tuple[str, int]:
    kind, equals, number = text.rpartition("=")
    if equals and kind not in get_args(SuiteKind):
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is not N or KIND=N with one of {', '.join(get_args(SuiteKind))}"
        )
    count: int = integer(1, _COUNT_MAX)(number)
    return kind, count
