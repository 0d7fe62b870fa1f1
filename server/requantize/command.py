"""What `whimbrel requantize` does with held-out texts: the chosen file is measured beside what else could be sent, and written only if it is no worse than plain."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import RequestError
from server.display import Printer, bytes_text
from server.requantize.adapter import adapter_path, check_out
from server.requantize.calibration import calibrate
from server.requantize.choice import Settings
from server.requantize.evaluation import Evaluator
from server.requantize.frontier import NoPointError, budgets_of, write_frontier
from server.requantize.guards import TEXTS_MIN, Margins
from server.requantize.judging import Judged, judge
from server.requantize.provenance import write_record
from server.requantize.request import Aim, Models, Questions, check_request
from server.requantize.rows import lines
from server.requantize.sent import sent_lines
from server.requantize.texts import Text
from server.requantize.tokens import read_tokens
from server.scorecard.card import Check
from server.scorecard.frontier_display import text_lines as frontier_lines
from server.scorecard.items import Suite
from server.scorecard.suites import Asking, read_suite

EXIT_NOT_WRITTEN: Final = 1
"""Nothing passed all guards."""

_EXTRAPOLATIONS: Final = (0.0, 0.5, 1.0)
"""Tried on the development text where the installed version in floats is there, and nobody says which."""


def run(arguments: argparse.Namespace, show: Printer) -> int:
    """Choose, measure, and write the file if all guards pass.

    Returns:
        0 if it or an adapter was written, else `EXIT_NOT_WRITTEN`.

    Raises:
        WhimbrelError: As `judge`.
    """
    out: Path = arguments.out
    report = _reporter(arguments)
    models = Models(
        new=arguments.new,
        installed=arguments.installed,
        before=arguments.before,
        start=arguments.start,
        also=arguments.also,
        adapter=arguments.adapter,
    )
    aim = _aim(arguments)
    questions = _questions(arguments)
    check_request(models, questions, aim)
    if models.adapter is not None:
        check_out(out, models.adapter, is_replaced=arguments.force)
    cache = arguments.cache or out.parent / "calibration"
    calibration = calibrate(
        arguments.new,
        questions.calibration.tokens,
        cache,
        report,
        sequences=arguments.runs,
        workers=arguments.workers,
    )

    def progress(done: int, total: int, what: str) -> None:
        if done == total:
            report(f"{what}: read")

    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".requantize-") as folder,
        Evaluator(
            arguments.new, questions.held_out, cache / "readings", arguments.threads, progress
        ) as evaluator,
    ):
        settings = Settings(budget_bytes=1, workers=arguments.workers)
        try:
            judged, chosen = judge(
                models, questions, aim, calibration, evaluator, settings, Path(folder), out, report
            )
        except NoPointError as error:
            found = {"frontier": msgspec.to_builtins(error.frontier), "is_written": False}
            show(
                arguments,
                found,
                [*frontier_lines(error.frontier), "", f"{out} is not written: {error.message}"],
            )
            return EXIT_NOT_WRITTEN
    record = write_record(out, chosen, judged.checks) if judged.is_written else None
    if judged.is_written and judged.frontier is not None:
        write_frontier(out, judged.frontier)
    show(arguments, msgspec.to_builtins(judged), _lines(out, judged, record))
    return 0 if judged.is_written or judged.adapter is not None else EXIT_NOT_WRITTEN


def _reporter(arguments: argparse.Namespace) -> Callable[[str], None]:
    def report(line: str) -> None:
        if not arguments.json:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    return report


def _questions(arguments: argparse.Namespace) -> Questions:
    if len(arguments.held_out) < TEXTS_MIN:
        raise RequestError(
            f"{len(arguments.held_out)} held-out text(s), {TEXTS_MIN} are needed",
            hint="give --held-out once more, with text of another kind",
        )
    paths: list[Path] = [*arguments.held_out, *([arguments.development] if arguments.development else [])]
    names = [path.name for path in paths]
    if len(set(names)) != len(names):
        raise RequestError(
            f"two texts are called {max(names, key=names.count)}", hint="give them other names"
        )

    def text(path: Path) -> Text:
        return Text(path.name, read_tokens(arguments.new, [path]))

    suites: list[Suite] = [read_suite("golden", path, Asking()) for path in arguments.golden]
    suites += [read_suite(kind, path, Asking(sample=arguments.sample)) for kind, path in arguments.suite]
    return Questions(
        calibration=Text("the calibration text", read_tokens(arguments.new, arguments.calibration)),
        held_out=tuple(text(path) for path in arguments.held_out),
        development=text(arguments.development) if arguments.development else None,
        suites=tuple(suites),
    )


def _aim(arguments: argparse.Namespace) -> Aim:
    length = arguments.installed.stat().st_size
    budget = None if arguments.budget is None else arguments.budget(length)
    points = budgets_of(arguments.frontier or {}, budget, length)
    tried: tuple[float, ...] = (arguments.extrapolate,)
    is_searched = arguments.keep is not None and not points
    if is_searched and arguments.before is not None and not arguments.extrapolate:
        tried = _EXTRAPOLATIONS
    return Aim(
        budget_bytes=budget,
        keep_share=arguments.keep,
        extrapolations=tried,
        margins=Margins(),
        frontier=points,
    )


def _lines(out: Path, judged: Judged, record: Path | None) -> list[str]:
    size = next(each.delta_bytes for each in judged.rows if each.name == "chosen") or 0
    verdict = (
        f"{out}: {bytes_text(size)} to send"
        if judged.is_written
        else f"{out} is not written: {sum(check.status != 'passed' for check in judged.checks)} guard(s) did not pass"
    )
    return [
        *([] if judged.frontier is None else [*frontier_lines(judged.frontier), ""]),
        *lines(judged.rows),
        "",
        *_check_lines(judged.checks),
        "",
        *sent_lines(judged.sent),
        f"{judged.changed:,} of {judged.codes:,} codes changed",
        verdict,
        *(
            []
            if record is None
            else [f"How it was chosen: {record}; `whimbrel release add` signs it with the file"]
        ),
        *_adapter_lines(out, judged, size),
    ]


def _check_lines(checks: Sequence[Check]) -> list[str]:
    marks = {"passed": "ok", "failed": "FAILED", "undecided": "UNDECIDED"}
    return [f"{marks[check.status]:<9}  {check.name}: {check.detail}" for check in checks]


def _adapter_lines(out: Path, judged: Judged, chosen_bytes: int) -> list[str]:
    if not judged.adapters:
        return []
    found = []
    for each in judged.adapters:
        found += ["", f"{each.name}: {bytes_text(each.bytes)} to send", *_check_lines(each.checks)]
    best = judged.adapter
    if best is None:
        return [*found, "", "No adapter is written: guards did not pass"]
    found += ["", f"{adapter_path(out)}: {bytes_text(best.bytes)} to send, with the installed file"]
    if judged.is_written:
        cheaper = "the adapter" if best.bytes < chosen_bytes else "the chosen file"
        found.append(f"Both pass; {cheaper} is cheaper")
    else:
        found.append("The adapter passes, the chosen file does not")
    return found
