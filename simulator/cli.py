"""The `whimbrel-sim` command: a fleet of real agents on this machine.

Exit codes: 0 every check passed, 1 a check failed or the run could not be done (one line says why), 2 wrong usage,
130 interrupted.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console

from protocol.errors import StorageError, WhimbrelError
from simulator.live.options import Options
from simulator.live.run import run_live
from simulator.report.page import render_page
from simulator.report.record import Run
from simulator.report.summary import print_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(arguments, f"whimbrel-sim {shlex.join(given)}")
    except WhimbrelError as error:
        print(f"whimbrel-sim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("whimbrel-sim: interrupted; everything it started has been stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whimbrel-sim", description="A fleet of real agents on this machine."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="bring up a broker, a server and a fleet; ship a good and a bad release",
        description="Brings up a broker, a server and a fleet behind links that come and go, ships a good release"
        " and a bad one, and checks what became of them.",
    )
    run.add_argument("--devices", type=int, default=36, metavar="N", help="default: %(default)s")
    run.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="S",
        help="decides links, losses and kills (default: %(default)s)",
    )
    run.add_argument(
        "--broker",
        default="embedded",
        metavar="embedded|mosquitto|HOST:PORT",
        help="embedded in the server, a mosquitto of its own, or one that runs on this machine (default: embedded)",
    )
    run.add_argument("--models", type=Path, metavar="DIR", help="v1, v2, v3 and health.json, built before")
    run.add_argument("--llm", action="store_true", help="the models are GGUF files under llama.cpp")
    run.add_argument(
        "--report",
        type=Path,
        default=Path("whimbrel-report.html"),
        metavar="FILE",
        help="default: %(default)s",
    )
    run.add_argument("--json", action="store_true", help="print the record as JSON, progress goes to stderr")
    run.add_argument("--plain", action="store_true", help="print lines even on a terminal")
    run.add_argument("--dir", type=Path, metavar="DIR", help="empty folder for everything, kept afterwards")
    run.add_argument("--keep", action="store_true", help="keep the temporary folder, and say where it is")
    run.add_argument(
        "--timeout",
        type=_seconds,
        default=300,
        metavar="SECONDS",
        help="for one rollout (default: %(default)s)",
    )
    return parser


def _run(arguments: argparse.Namespace, command: str) -> int:
    report: Path = arguments.report
    _check_writable(report)
    console = Console(
        stderr=arguments.json,
        force_terminal=False if arguments.plain else None,
        highlight=False,
    )
    options = Options(
        devices=arguments.devices,
        seed=arguments.seed,
        broker=arguments.broker,
        kind="smollm2" if arguments.llm else "digits",
        models=arguments.models,
        folder=arguments.dir,
        keep=arguments.keep,
        phase_s_max=arguments.timeout,
        command=command,
    )
    run = run_live(options, console)
    _write(report, render_page(run))
    print_summary(run, console)
    console.print(f"Report: {report}", soft_wrap=True)
    if arguments.json:
        print(json.dumps(summary_document(run, report)))
    return 0 if run.is_passed else 1


def summary_document(run: Run, report: Path) -> dict[str, object]:
    """What `--json` prints: the whole record, whether it is good, and where the page is."""
    return {"is_passed": run.is_passed, "report": str(report), **msgspec.to_builtins(run)}


def _check_writable(path: Path) -> None:
    """Find out before the run that its report can be written."""
    if not path.parent.is_dir() or path.is_dir():
        raise StorageError(f"{path} cannot be written", hint="choose another --report")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="choose another --report") from error


def _seconds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 86_400:
        raise argparse.ArgumentTypeError("from 1 to 86400")
    return value


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
