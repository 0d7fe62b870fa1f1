"""What `whimbrel requantize` does with held-out texts: the chosen file is measured beside what else could be sent, and written only if it is no worse than plain."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import RequestError
from server.display import Printer, bytes_text, reporter
from server.requantize.adapter import adapter_path, check_out
from server.requantize.calibration import calibrate
from server.requantize.evaluation import Evaluator
from server.requantize.frontier import NoPointError, budgets_of, write_frontier
from server.requantize.guards import TEXTS_MIN, Margins
from server.requantize.judging import Judged, judge
from server.requantize.order import check_lines, check_names, record_lines, suites_of, verdict_line
from server.requantize.provenance import write_record
from server.requantize.request import Aim, Models, Questions, check_request
from server.requantize.rows import lines
from server.requantize.sent import sent_lines
from server.requantize.settings import Settings
from server.requantize.texts import RUN_TOKENS, Text
from server.requantize.tokens import read_tokens
from server.scorecard.frontier_display import text_lines as frontier_lines

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
    report = reporter(is_quiet=arguments.json)
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
        settings = Settings(
            budget_bytes=1,
            learned=arguments.learn_extrapolation,
            is_afresh=arguments.afresh,
            moves_scales=arguments.move_scales,
            distillation=arguments.distill,
            workers=arguments.workers,
        )
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


def _questions(arguments: argparse.Namespace) -> Questions:
    if len(arguments.held_out) < TEXTS_MIN:
        raise RequestError(
            f"{len(arguments.held_out)} held-out text(s), {TEXTS_MIN} are needed",
            hint="give --held-out once more, with text of another kind",
        )
    check_names(arguments, "texts")

    def text(path: Path) -> Text:
        return Text(path.name, read_tokens(arguments.new, [path]))

    def held_out(path: Path) -> Text:
        found, runs = text(path), arguments.held_out_runs
        if runs is None:
            return found
        if found.runs_there < runs:
            raise RequestError(
                f"{path} has {found.runs_there} runs of {RUN_TOKENS} tokens, --held-out-runs asks for {runs}",
                hint="give a longer text, or ask for fewer",
            )
        return replace(found, runs_max=runs)

    return Questions(
        calibration=Text("the calibration text", read_tokens(arguments.new, arguments.calibration)),
        held_out=tuple(held_out(path) for path in arguments.held_out),
        development=text(arguments.development) if arguments.development else None,
        suites=suites_of(arguments),
    )


def _aim(arguments: argparse.Namespace) -> Aim:
    length = arguments.installed.stat().st_size
    budget = None if arguments.budget is None else arguments.budget(length)
    points = budgets_of(arguments.frontier or {}, budget, length)
    tried: tuple[float, ...] = (arguments.extrapolate,)
    is_searched = arguments.keep is not None and not points
    is_given = arguments.extrapolate or arguments.learn_extrapolation
    if is_searched and arguments.before is not None and not is_given:
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
    return [
        *([] if judged.frontier is None else [*frontier_lines(judged.frontier), ""]),
        *lines(judged.rows),
        "",
        *check_lines(judged.checks),
        "",
        *sent_lines(judged.sent),
        f"{judged.changed:,} of {judged.codes:,} codes changed{f', and {judged.scales:,} scales of blocks' if judged.scales else ''}",
        verdict_line(out, judged.checks, size, is_written=judged.is_written),
        *record_lines(record),
        *_adapter_lines(out, judged, size),
    ]


def _adapter_lines(out: Path, judged: Judged, chosen_bytes: int) -> list[str]:
    if not judged.adapters:
        return []
    found = []
    for each in judged.adapters:
        found += ["", f"{each.name}: {bytes_text(each.bytes)} to send", *check_lines(each.checks)]
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
