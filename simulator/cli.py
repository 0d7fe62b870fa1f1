"""The `whimbrel-sim` command: fleets of real agents on this machine, in real time or in virtual time.

Exit codes: 0 every check passed, 1 a check failed or the run could not be done (one line says why), 2 wrong usage,
130 interrupted.
"""

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, TextIO

import msgspec
from rich.console import Console

from protocol.errors import WhimbrelError
from simulator.agree_cli import add_agree_parser
from simulator.estimate_cli import add_estimate_parser
from simulator.fleet_cli import add_commands
from simulator.live.options import Options
from simulator.live.run import run_live
from simulator.output import own_descriptor
from simulator.rehearse_cli import add_rehearse_parser
from simulator.report.files import check_writable, write_page
from simulator.report.page import render_page
from simulator.report.record import Run
from simulator.report.summary import print_summary
from simulator.sweep_cli import add_sweep_commands

PHASE_S: Final = 300
PHASE_S_PER_DEVICE: Final = 3
"""Trials of one process run one after the other, and each takes a second of a busy processor."""

_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    before = {number: signal.signal(number, _interrupt) for number in _INTERRUPTS}
    with contextlib.ExitStack() as stack:
        output, errors = (
            stack.enter_context(own_descriptor(sys.stdout)),
            stack.enter_context(own_descriptor(sys.stderr)),
        )
        try:
            return int(arguments.action(arguments, f"whimbrel-sim {shlex.join(given)}", output, errors))
        except WhimbrelError as error:
            print(f"whimbrel-sim: {error}", file=errors)
            return 1
        except KeyboardInterrupt:
            print("whimbrel-sim: interrupted; everything it started has been stopped", file=errors)
            return 130
        except BrokenPipeError:  # whoever read our output has had enough
            return 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
        metavar="SECONDS",
        help=f"for one rollout (default: {PHASE_S}, or {PHASE_S_PER_DEVICE} for each device if that is more)",
    )
    run.set_defaults(action=_run)
    add_commands(commands)
    add_agree_parser(commands)
    add_estimate_parser(commands)
    add_rehearse_parser(commands)
    add_sweep_commands(commands)
    return parser


def _run(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    report: Path = arguments.report
    check_writable(report)
    console = Console(
        file=errors if arguments.json else output,
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
        phase_s_max=arguments.timeout or max(PHASE_S, PHASE_S_PER_DEVICE * arguments.devices),
        command=command,
    )
    run = run_live(options, console)
    write_page(report, render_page(run))
    print_summary(run, console)
    console.print(f"Report: {report}", soft_wrap=True)
    if arguments.json:
        print(json.dumps(summary_document(run, report)), file=output)
    return 0 if run.is_passed else 1


def summary_document(run: Run, report: Path) -> dict[str, object]:
    """What `--json` prints: the whole record, whether it is good, and where the page is."""
    return {"is_passed": run.is_passed, "report": str(report), **msgspec.to_builtins(run)}


def _seconds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 86_400:
        raise argparse.ArgumentTypeError("from 1 to 86400")
    return value


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """End the run; from here on everything is being stopped, which a second signal must not interrupt."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
