"""`whimbrel requantize`: the next quantized file of a model, chosen against the one that the fleet has."""

import argparse
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import RequestError, StorageError
from server.arguments import integer, suite_argument
from server.display import Printer, bytes_text, reporter, table
from server.scorecard.frontier import POINTS_MAX

_BUDGET_DEFAULT: Final = "0.5%"
_BUDGET_NAME_MAX: Final = 24
_BYTES_MAX: Final = 1 << 44
_RUNS_MAX: Final = 4096
_WORKERS_MAX: Final = 256
_DISTILL_MAX: Final = 2_000  # `distillation.STEPS_MAX`, which loads numpy
_LEARN_MAX: Final = 20  # `extrapolation.ROUNDS_MAX`, likewise
_RANK_MAX: Final = 256  # beyond it an adapter is hardly smaller than what it changes
_SAMPLE_MAX: Final = 1_000_000
_TENSORS_SHOWN: Final = 8
_BUDGET: Final = re.compile(r"(?P<share>\d+(\.\d+)?)%|(?P<bytes>\d+)")


def add_parser(commands: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """Register `requantize`.

    Args:
        commands: Of the `whimbrel` command.
        common: Options of the commands that work on a server's folder.
        show: Prints a value or lines.
    """
    parser = commands.add_parser(
        "requantize",
        parents=[common],
        help="choose the next quantized file against the one that devices have, for few bytes",
        description="Writes the quantized file of a new model that is worth most for what its delta from the installed file weighs,"
        " and beside it, as JSON, how it was chosen. What was measured of a model is kept: a run that was interrupted goes on.",
    )
    parser.add_argument(
        "new", metavar="NEW", type=Path, help="the new model in floats: GGUF with F32, F16 or BF16, or ONNX"
    )
    _add_installed(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        type=Path,
        action="append",
        required=True,
        help="text of the kind that the model is for, UTF-8, of which about 100 kB are used; for ONNX an .npz with an array for each input,"
        " or lines of a suite `classes`; repeatable",
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        type=_budget,
        help=f"what the delta may weigh: bytes, or a share of the installed file such as 0.2%% (default: {_BUDGET_DEFAULT}%)",
    )
    _add_aim(parser)
    _add_work(parser)
    _add_judging(parser)
    _add_questions(parser)
    _add_onnx(parser)
    parser.set_defaults(run=lambda arguments: _run(arguments, show))


def _add_aim(parser: argparse.ArgumentParser) -> None:
    """Where a choice begins, and what it aims at."""
    parser.add_argument(
        "--before",
        metavar="FILE",
        type=Path,
        help="the installed version in floats; needed for --extrapolate and --learn-extrapolation",
    )
    parser.add_argument(
        "--extrapolate",
        metavar="A",
        type=_factor,
        default=0.0,
        help="aim beyond the new weights, by A times the way from those before (default: %(default)s)",
    )
    parser.add_argument(
        "--learn-extrapolation",
        metavar="ROUNDS",
        type=integer(0, _LEARN_MAX),
        default=0,
        help="so many times, read pieces of the calibration text with what was chosen, learn how far beyond the new weights each row,"
        " column and strong direction has to aim, and choose again: where the file shall come very near to the new model, such as Q8_0 (try 3;"
        " some minutes each for 135 M weights)",
    )
    parser.add_argument(
        "--start",
        metavar="FILE",
        type=Path,
        help="begin with the codes of this file instead of the installed ones",
    )
    parser.add_argument(
        "--afresh",
        action="store_true",
        help="begin with the best codes for the new model, and go back to the installed ones where that saves more than it costs: fewer"
        " bytes for the same nearness from two percent of the file on, more of them below; takes several times as long",
    )
    parser.add_argument(
        "--move-scales",
        action="store_true",
        help="also move scales of blocks, of Q4_0 and Q5_0: worth its time from about a percent of the file on (three times the time)",
    )
    parser.add_argument(
        "--distill",
        metavar="STEPS",
        type=integer(0, _DISTILL_MAX),
        default=0,
        help="then read so many pieces of the calibration text with what was chosen, and mend it where it says something else than the new"
        " model: for narrow tasks and small budgets, whose text must be most of --calibration (try 60; a few seconds each for 135 M weights)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    """How the work is done."""
    parser.add_argument(
        "--runs",
        metavar="N",
        type=integer(1, _RUNS_MAX),
        default=40,
        help="runs of 256 tokens to calibrate with (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=integer(1, _WORKERS_MAX),
        help="processes (default: one for each processor)",
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        type=Path,
        help="keeps what was measured (default: `calibration` beside --out)",
    )
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")


def _add_installed(parser: argparse.ArgumentParser) -> None:
    """What devices have."""
    installed = parser.add_mutually_exclusive_group(required=True)
    installed.add_argument(
        "--installed", metavar="FILE", type=Path, help="the quantized GGUF that devices have"
    )
    installed.add_argument(
        "--fleet",
        metavar="FAMILY",
        help="instead of --installed: the versions that the server's devices of this family run, as they report, with their shares",
    )
    parser.add_argument(
        "--also",
        metavar="FILE=SHARE",
        type=_portion,
        action="append",
        default=[],
        help="another quantized GGUF that a share of the devices has instead, such as v1.gguf=0.3; repeatable: one file is chosen for"
        " all, and --budget is what a device fetches on average",
    )


def _add_judging(parser: argparse.ArgumentParser) -> None:
    """What files are judged on."""
    parser.add_argument(
        "--held-out",
        metavar="TEXT",
        type=Path,
        action="append",
        default=[],
        help="text, or samples of an ONNX model, on which the file is judged beside plain quantization, and which calibration has not"
        " seen; at least twice, of different kinds",
    )
    parser.add_argument(
        "--held-out-runs",
        metavar="N",
        type=integer(2, _RUNS_MAX),
        help="runs of 512 tokens that are read of each held-out text: four times as many halve the intervals of what is undecided"
        " (default: 8, or as many as it has)",
    )
    parser.add_argument(
        "--unjudged", action="store_true", help="write the file without judging it, for experiments"
    )
    parser.add_argument(
        "--keep",
        metavar="SHARE",
        type=_share,
        help="instead of --budget: as few bytes as keep this share of plain's gain on --development, such as 95%%",
    )
    parser.add_argument(
        "--frontier",
        metavar="SIZES",
        type=_budgets,
        help="measure a file of each budget on --development, such as 0.1%%,0.25%%,0.5%%,1%%, and choose among them: the one of"
        " --budget, else the smallest that meets --keep, else the smallest that is no worse than plain there",
    )
    parser.add_argument(
        "--development",
        metavar="TEXT",
        type=Path,
        help="text or samples on which --keep and --frontier try settings: neither calibration nor held out",
    )


def _add_questions(parser: argparse.ArgumentParser) -> None:
    """What files are asked, and what else is measured beside them."""
    parser.add_argument(
        "--golden",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="prompts that the file has to answer wherever plain does, as in `whimbrel score`; repeatable",
    )
    parser.add_argument(
        "--suite",
        metavar="KIND=PATH",
        type=suite_argument,
        action="append",
        default=[],
        help="questions of which the file may lose few against plain, as in `whimbrel score`; repeatable",
    )
    parser.add_argument(
        "--adapter",
        metavar="FILE|rank=N",
        type=_adapter,
        help="measure beside it: the installed file with this low-rank adapter (LoRA, GGUF), or with one of rank N that is made to"
        " lead from it to the new model; it is written if it passes",
    )
    parser.add_argument(
        "--sample",
        metavar="N",
        type=integer(1, _SAMPLE_MAX),
        default=0,
        help="questions of each suite (default: all)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=integer(1, _WORKERS_MAX),
        default=1,
        help="of one inference (default: %(default)s)",
    )


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    """What is asked of ONNX models alone."""
    group = parser.add_argument_group("ONNX models")
    group.add_argument(
        "--output-kind",
        choices=["embedding", "classes", "values"],
        help="what the output is: vectors that are compared by their direction (of several positions, their mean), scores of classes,"
        " or other numbers",
    )
    group.add_argument("--output", metavar="NAME", help="the output that counts (default: the first)")
    group.add_argument(
        "--mask",
        metavar="NAME",
        help="the input that is 0 at positions that do not count (default: attention_mask, where there is one)",
    )
    group.add_argument(
        "--plain",
        metavar="FILE",
        type=Path,
        help="the new model, quantized as the installed file was; needed where that is no dynamic quantization by onnxruntime",
    )


def _run(arguments: argparse.Namespace, show: Printer) -> int:
    _check_judging(arguments)
    from server.requantize import command  # noqa: PLC0415 - numpy and the coder, which no other command loads
    from server.requantize.onnx import command as onnx_command  # noqa: PLC0415 - likewise

    with ExitStack() as stack:
        _find_installed(arguments, stack)
        _check_files(arguments)
        if onnx_command.is_onnx(arguments.new):
            return onnx_command.run(arguments, show)
        _check_gguf(arguments)
        return _run_unjudged(arguments, show) if arguments.unjudged else command.run(arguments, show)


def _find_installed(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Put the file that most devices have into `installed`, and all others with their shares into `also`."""
    from server.requantize.portions import Portion, main_first  # noqa: PLC0415 - numpy
    from server.requantize.running import running  # noqa: PLC0415 - likewise

    if arguments.fleet is None:
        others = [Portion(path, share) for path, share in arguments.also]
        arguments.installed, arguments.also = main_first(arguments.installed, others)
    elif arguments.also:
        raise RequestError("--fleet and --also contradict each other", hint="give one of them")
    else:
        found = running(arguments.dir, arguments.fleet, reporter(is_quiet=arguments.json))
        arguments.installed, arguments.also = stack.enter_context(found)


def _check_gguf(arguments: argparse.Namespace) -> None:
    given = ("output_kind", "output", "mask", "plain")
    if arguments.afresh and arguments.start is not None:
        raise RequestError("--afresh and --start contradict each other", hint="give one of them")
    if arguments.learn_extrapolation and arguments.before is None:
        raise RequestError(
            "--learn-extrapolation needs the installed version in floats", hint="give it with --before"
        )
    useless = next((name for name in given if getattr(arguments, name) is not None), None)
    if useless is not None:
        raise RequestError(
            f"--{useless.replace('_', '-')} is for ONNX models, {arguments.new} is none", hint="leave it out"
        )


def _check_judging(arguments: argparse.Namespace) -> None:
    if arguments.budget is not None and arguments.keep is not None:
        raise RequestError("--budget and --keep contradict each other", hint="give one of them")
    if arguments.budget is None and arguments.keep is None and arguments.frontier is None:
        arguments.budget = _budget(_BUDGET_DEFAULT)
    needing = {"--keep": arguments.keep, "--frontier": arguments.frontier}
    for name in (name for name, value in needing.items() if value is not None):
        if arguments.development is None:
            raise RequestError(f"{name} needs --development", hint="give a text on which settings are tried")
    if arguments.unjudged:
        given = {
            "--held-out": arguments.held_out,
            "--held-out-runs": arguments.held_out_runs,
            "--keep": arguments.keep,
            "--frontier": arguments.frontier,
            "--golden": arguments.golden,
            "--suite": arguments.suite,
            "--adapter": arguments.adapter,
        }
        useless = next((name for name, value in given.items() if value), None)
        if useless is not None:
            raise RequestError(f"--unjudged and {useless} contradict each other", hint="give one of them")
    elif not arguments.held_out:
        raise RequestError(
            "no held-out text was given, so nothing says that the file is no worse than a plain one",
            hint="give --held-out twice, or --unjudged for an experiment",
        )


def _run_unjudged(arguments: argparse.Namespace, show: Printer) -> int:
    from server.requantize.alone import with_alone  # noqa: PLC0415 - numpy and the coder, which no other command loads
    from server.requantize.calibration import calibrate  # noqa: PLC0415 - likewise
    from server.requantize.choice import choose  # noqa: PLC0415 - likewise
    from server.requantize.portions import check_fleet  # noqa: PLC0415 - likewise
    from server.requantize.provenance import write_record  # noqa: PLC0415 - likewise
    from server.requantize.settings import Settings  # noqa: PLC0415 - likewise
    from server.requantize.tokens import read_tokens  # noqa: PLC0415 - likewise

    out: Path = arguments.out
    installed: Path = arguments.installed
    settings = Settings(
        budget_bytes=arguments.budget(installed.stat().st_size),
        extrapolation=arguments.extrapolate,
        learned=arguments.learn_extrapolation,
        is_afresh=arguments.afresh,
        moves_scales=arguments.move_scales,
        distillation=arguments.distill,
        workers=arguments.workers,
    )

    report = reporter(is_quiet=arguments.json)
    check_fleet(installed, arguments.also)
    calibration = calibrate(
        arguments.new,
        read_tokens(arguments.new, arguments.calibration),
        arguments.cache or out.parent / "calibration",
        report,
        sequences=arguments.runs,
        workers=arguments.workers,
    )
    chosen = choose(
        arguments.new,
        installed,
        calibration,
        settings,
        out,
        report,
        start=arguments.start,
        before=arguments.before,
        also=arguments.also,
    )
    record = write_record(out, chosen)
    if arguments.also:
        before = arguments.before if settings.is_extrapolated else None
        chosen = with_alone(
            chosen, arguments.new, installed, arguments.also, calibration, out.parent, report, before=before
        )
        write_record(out, chosen)
    show(arguments, msgspec.to_builtins(chosen), _lines(out, record, chosen))
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """What can be known before the long work."""
    out: Path = arguments.out
    adapter = arguments.adapter if isinstance(arguments.adapter, Path) else None
    others = [each.path for each in arguments.also]
    for path in (
        arguments.new,
        arguments.installed,
        *others,
        arguments.before,
        arguments.start,
        arguments.plain,
        adapter,
    ):
        if path is None:
            continue
        if not path.is_file():
            raise RequestError(f"{path}: no such file", hint="give a GGUF or ONNX file")
        if out.exists() and out.samefile(path):
            raise RequestError(f"{out}: is one of the files to choose from", hint="choose another --out")
    if out.is_dir() or not out.parent.is_dir():
        raise StorageError(f"{out} cannot be written", hint="choose another --out")
    if out.exists() and not arguments.force:
        raise RequestError(f"{out}: exists", hint="choose another --out, or pass --force to replace it")


def _lines(out: Path, record: Path, chosen: Any) -> list[str]:
    from server.requantize.sent import sent_lines  # noqa: PLC0415 - numpy

    changed, scales = sum(chosen.changed.values()), sum(chosen.scales.values())
    ranked = sorted(chosen.changed.items(), key=lambda each: -each[1])[:_TENSORS_SHOWN]
    lines = [
        f"{out}: {bytes_text(chosen.delta_bytes)} to send, {100 * chosen.delta_bytes / chosen.file_bytes:.3g} % of the file",
        f"{changed:,} of {chosen.codes:,} codes{f' and {scales:,} scales of blocks' if scales else ''} changed, at {chosen.price:.3g} nats a bit",
        f"Expected loss per token, as the calibration sees it: {chosen.objective_before:.4g} nats as installed, {chosen.objective_after:.4g} now",
        *table(["TENSOR", "CODES CHANGED"], [[name, f"{count:,}"] for name, count in ranked if count]),
        *sent_lines(chosen.sent),
        f"How it was chosen: {record}",
    ]
    if chosen.kept:
        lines.insert(
            2, f"{len(chosen.kept)} tensor(s) stay as installed, {chosen.kept[0]} first: no linear codes"
        )
    return lines


def _budget(text: str) -> Any:
    """A function from the length of the installed file to bytes."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither bytes nor a share such as 0.5%")
    if match["share"] is not None:
        share = float(match["share"])
        if not 0 < share <= 100:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not between 0 and 100 %")
        return lambda length: max(1, int(share / 100 * length))
    count = int(match["bytes"])
    if not 1 <= count <= _BYTES_MAX:
        raise argparse.ArgumentTypeError(f"{count} is not between 1 and {_BYTES_MAX} bytes")
    return lambda _length: count


def _budgets(text: str) -> dict[str, Any]:
    """Budgets by their names, in the order in which they were given."""
    names = [each.strip() for each in text.split(",")]
    if len(names) > POINTS_MAX - 1:  # --budget may come to it
        raise argparse.ArgumentTypeError(f"{len(names)} budgets, possible are {POINTS_MAX - 1}")
    long = next((name for name in names if len(name) > _BUDGET_NAME_MAX), None)
    if long is not None:
        raise argparse.ArgumentTypeError(f"{long[:40]!r} has more than {_BUDGET_NAME_MAX} characters")
    return {name: _budget(name) for name in names}


def _portion(text: str) -> tuple[Path, float]:
    """A file and a share of the fleet."""
    name, _, number = text.rpartition("=")
    is_percent = number.endswith("%")
    try:
        share = float(number.removesuffix("%")) / (100 if is_percent else 1)
    except ValueError:
        share = -1.0
    if not name or not 0 < share < 1:
        raise argparse.ArgumentTypeError(
            f"{text[:200]!r} is not FILE=SHARE with a share of the devices between 0 and 1, such as v1.gguf=0.3"
        )
    return Path(name), share


def _adapter(text: str) -> Path | int:
    name, equals, number = text.partition("=")
    return integer(1, _RANK_MAX)(number) if equals and name == "rank" else Path(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number") from None
    if not 0 <= value <= 4:
        raise argparse.ArgumentTypeError(f"{value:g} is not between 0 and 4")
    return value


def _share(text: str) -> float:
    match = _BUDGET.fullmatch(text)
    if match is None or match["share"] is None or not 0 < float(match["share"]) <= 200:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share such as 95%")
    return float(match["share"]) / 100
