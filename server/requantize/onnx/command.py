"""`whimbrel requantize` for ONNX models: arguments to a choice, a table and a file."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import ModelFileError, RequestError
from protocol.tensors import parse_onnx
from server.adapters.blobs import FileSource, storage_errors
from server.display import Printer, bytes_text, reporter
from server.requantize.guards import Margins
from server.requantize.onnx.calibration import Calibration, calibrate
from server.requantize.onnx.choice import Chosen, Settings, choose
from server.requantize.onnx.distortion import KINDS
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.inputs import Samples, read_samples
from server.requantize.onnx.judging import Aim, Judged, Models, Questions, check_inputs, check_request, judge
from server.requantize.onnx.matrices import find_floats, find_matrices
from server.requantize.onnx.orders import Asked
from server.requantize.onnx.verdict import lines
from server.requantize.order import check_lines, check_names, record_lines, suites_of, verdict_line
from server.requantize.provenance import write_record
from server.requantize.rows import CHOSEN

EXIT_NOT_WRITTEN: Final = 1
"""A guard did not pass."""

_EXTRAPOLATIONS: Final = (0.0, 0.5, 1.0)
_MASK_NAME: Final = "attention_mask"
_MAGIC_OF_GGUF: Final = b"GGUF"
_KEPT_SHOWN: Final = 4


def is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX model, or was meant to be one by its name."""
    with storage_errors(path), path.open("rb") as file:
        if file.read(len(_MAGIC_OF_GGUF)) == _MAGIC_OF_GGUF:
            return False
        if path.suffix == ".onnx":
            return True
        try:
            parse_onnx(FileSource(file))
        except ModelFileError:
            return False
    return True


def run(arguments: argparse.Namespace, show: Printer) -> int:
    """Choose, measure, and write the file if all guards pass; unjudged, write it as it is.

    Returns:
        0 if it was written, else `EXIT_NOT_WRITTEN`.

    Raises:
        WhimbrelError: As `judge`.
    """
    _check_options(arguments)
    if arguments.output_kind is None:
        raise RequestError(
            "nothing says what the model's output is", hint=f"give --output-kind, one of {', '.join(KINDS)}"
        )
    models = Models(
        Graph(arguments.new),
        Graph(arguments.installed),
        None if arguments.before is None else Graph(arguments.before),
        arguments.plain,
    )
    _check_before(models)
    mask = arguments.mask or (_MASK_NAME if _MASK_NAME in models.new.inputs else "")
    asked = Asked(
        kind=arguments.output_kind, output=arguments.output or "", mask=mask, threads=arguments.threads
    )
    report = reporter(is_quiet=arguments.json)
    if arguments.unjudged:
        samples = read_samples(arguments.calibration)
        check_inputs(models.new, samples, asked)
        return _run_unjudged(
            arguments, models, _calibrated(arguments, models, samples, asked, report), report, show
        )
    questions, aim = _questions(arguments), _aim(arguments)
    check_request(models, questions, aim, asked)
    calibration = _calibrated(arguments, models, questions.calibration, asked, report)
    out: Path = arguments.out
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".requantize-") as folder:
        settings = Settings(budget_bytes=1, workers=arguments.workers)
        judged = judge(models, questions, aim, asked, calibration, settings, Path(folder), out, report)
    record = write_record(out, judged.chosen, judged.checks) if judged.is_written else None
    show(arguments, msgspec.to_builtins(judged), _lines(out, judged, record))
    return 0 if judged.is_written else EXIT_NOT_WRITTEN


def _check_options(arguments: argparse.Namespace) -> None:
    given = {
        "--start": arguments.start,
        "--move-scales": arguments.move_scales or None,
        "--afresh": arguments.afresh or None,
        "--distill": arguments.distill or None,
        "--learn-extrapolation": arguments.learn_extrapolation or None,
        "--frontier": arguments.frontier,
        "--held-out-runs": arguments.held_out_runs,
        "--adapter": arguments.adapter,
        "--also": arguments.also or None,
    }
    foreign = next((name for name, value in given.items() if value is not None), None)
    if foreign is not None:
        raise RequestError(f"{foreign} is for GGUF files", hint="leave it out")


def _calibrated(
    arguments: argparse.Namespace,
    models: Models,
    samples: Samples,
    asked: Asked,
    report: Callable[[str], None],
) -> Calibration:
    matrices, kept = find_matrices(models.new, models.installed)
    for name, why in list(kept.items())[:_KEPT_SHOWN]:
        report(f"{name} stays as installed: {why}")
    if len(kept) > _KEPT_SHOWN:
        report(f"and so do {len(kept) - _KEPT_SHOWN} more")
    cache = arguments.cache or arguments.out.parent / "calibration"
    floats = find_floats(models.new, models.installed)
    return calibrate(models.new, models.installed, matrices, floats, samples, asked, cache, report)


def _run_unjudged(
    arguments: argparse.Namespace,
    models: Models,
    calibration: Calibration,
    report: Callable[[str], None],
    show: Printer,
) -> int:
    out: Path = arguments.out
    settings = Settings(
        budget_bytes=arguments.budget(models.installed.length),
        extrapolation=arguments.extrapolate,
        workers=arguments.workers,
    )
    chosen = choose(models.new, models.installed, calibration, settings, out, report, before=models.before)
    record = write_record(out, chosen)
    text = [
        f"{out}: {bytes_text(chosen.delta_bytes)} to send",
        *_told(chosen),
        f"How it was chosen: {record}",
    ]
    show(arguments, msgspec.to_builtins(chosen), text)
    return 0


def _check_before(models: Models) -> None:
    before, new = models.before, models.new
    for matrix in find_matrices(new, models.installed)[0]:
        name = matrix.name
        if before is not None and (
            not before.is_float(name) or before.stored[name].dims != new.stored[name].dims
        ):
            raise ModelFileError(f"{before.path}: has no floats {name} of the shape that {new.path} has")


def _questions(arguments: argparse.Namespace) -> Questions:
    check_names(arguments, "sets")
    return Questions(
        calibration=read_samples(arguments.calibration),
        held_out=tuple(read_samples([path]) for path in arguments.held_out),
        development=read_samples([arguments.development]) if arguments.development else None,
        suites=suites_of(arguments),
    )


def _aim(arguments: argparse.Namespace) -> Aim:
    budget = None
    if arguments.keep is None:
        budget = arguments.budget(arguments.installed.stat().st_size)
    tried: tuple[float, ...] = (arguments.extrapolate,)
    if arguments.keep is not None and arguments.before is not None and not arguments.extrapolate:
        tried = _EXTRAPOLATIONS
    return Aim(budget_bytes=budget, keep_share=arguments.keep, extrapolations=tried, margins=Margins())


def _told(chosen: Chosen) -> list[str]:
    kept = list(chosen.kept.items())
    return [
        f"{sum(chosen.changed.values()):,} of {chosen.codes:,} codes and floats changed, at {chosen.price:.3g} a bit",
        f"Expected distortion, as the calibration sees it: {chosen.objective_before:.4g} as installed, {chosen.objective_after:.4g} now",
        *(f"{name} stays as installed: {why}" for name, why in kept[:_KEPT_SHOWN]),
        *([f"and so do {len(kept) - _KEPT_SHOWN} more"] if len(kept) > _KEPT_SHOWN else []),
    ]


def _lines(out: Path, judged: Judged, record: Path | None) -> list[str]:
    size = next(each.delta_bytes for each in judged.rows if each.name == CHOSEN) or 0
    return [
        *lines(judged.rows),
        "",
        *check_lines(judged.checks),
        "",
        *_told(judged.chosen),
        verdict_line(out, judged.checks, size, is_written=judged.is_written),
        *record_lines(record),
    ]
