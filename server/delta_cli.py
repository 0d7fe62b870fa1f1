"""`whimbrel delta make | apply | inspect`: delta files by hand, on any two files; `graph` is in `graph_cli.py`.

What they do is in `delta_files.py`, which loads the coder and numpy: no other command waits for that.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol.delta.format import DEFAULT_SEGMENT_BYTES
from server import graph_cli

_MEMORY_LIMIT_MIB = 256
_TENSORS_SHOWN = 12


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Register `delta` with its commands; `args.run(args)` executes the chosen one.

    Args:
        subparsers: Of the `whimbrel` command.
        common: Options of the commands that work on a server's folder.
    """
    delta = subparsers.add_parser(
        "delta", help="make, apply or inspect a delta file; show the fleet's deltas"
    )
    commands = delta.add_subparsers(dest="delta_command", required=True, metavar="COMMAND")

    make = _make_parser(commands)
    apply = commands.add_parser("apply", help="turn OLD into the new file")
    apply.add_argument("old", type=Path, metavar="OLD")
    apply.add_argument("patch", type=Path, metavar="PATCH")
    apply.add_argument("-o", "--output", type=Path, metavar="OUT", help="required without --in-place")
    apply.add_argument(
        "--memory-limit-mib",
        type=int,
        default=_MEMORY_LIMIT_MIB,
        metavar="MIB",
        help="refuse a delta that declares more (default: %(default)s)",
    )

    make.add_argument(
        "--in-place",
        action="store_true",
        help="make it so that devices without room for two files can apply it",
    )
    apply.add_argument(
        "--in-place",
        action="store_true",
        help="turn OLD itself into the new file; again after an interruption",
    )
    apply.add_argument(
        "--inverse",
        type=Path,
        metavar="FILE",
        help="with --in-place: the delta back, which is written meanwhile",
    )

    inspect = commands.add_parser("inspect", help="show what a delta file holds")
    inspect.add_argument("patch", type=Path, metavar="PATCH")

    graph_cli.add_parser(commands, common)

    for command in (make, apply):
        command.add_argument("--force", action="store_true", help="replace an output file that exists")
    for command in (make, apply, inspect):
        command.add_argument("--json", action="store_true", help="print one JSON object for programs")
        command.set_defaults(run=run)


def _make_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    make = commands.add_parser("make", help="write the delta that turns OLD into NEW")
    make.add_argument("old", type=Path, metavar="OLD", help="what devices have")
    make.add_argument("new", type=Path, metavar="NEW", help="what they shall have")
    make.add_argument("-o", "--output", type=Path, required=True, metavar="PATCH")
    make.add_argument(
        "--profile", choices=("small", "fast"), default="small", help="fewest bytes, or most speed"
    )
    make.add_argument(
        "--segment-kib",
        type=int,
        default=DEFAULT_SEGMENT_BYTES >> 10,
        metavar="KIB",
        help="result of one segment: memory on the device, and what a power cut costs (default: %(default)s)",
    )

    make.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that work side by side on a file of more than 64 MiB (default: one for each core)",
    )
    make.add_argument(
        "--portable",
        action="store_true",
        help="for devices that have no compiled library: larger, and read at a bearable speed by Python alone",
    )
    return make


def run(args: argparse.Namespace) -> int:
    """Execute a parsed `delta` command and print its result.

    Returns:
        0; everything else is an error.

    Raises:
        WhimbrelError: One line for the user, and nothing left behind.
    """
    from server import delta_files  # noqa: PLC0415 - see the top

    commands = {"make": delta_files.make, "apply": delta_files.apply, "inspect": delta_files.inspect}
    started = time.perf_counter()  # noqa: TID251 - a command reports how long it took
    report = commands[args.delta_command](args)
    report["seconds"] = round(time.perf_counter() - started, 3)  # noqa: TID251 - a command reports how long it took
    report["peak_memory_bytes"] = _peak_memory_bytes()
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _describe(report)))
    return 0


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} bytes"


def _describe(report: dict[str, Any]) -> Iterator[str]:
    if "output" in report:
        yield f"{'wrote':<9}{report['output']}"
    yield f"{'base':<9}{_size(report['base_bytes'])}"
    yield f"{'result':<9}{_size(report['result_bytes'])}"
    ratio = "" if report["ratio"] is None else f", {100 * report['ratio']:.2f} % of the result"
    yield f"{'delta':<9}{_size(report['patch_bytes'])}{ratio}"
    if "inverse" in report:
        yield f"{'inverse':<9}{_size(report['inverse_bytes'])}, {report['inverse']}"
    for side, names in report.get("described_by", {}).items():
        if names:
            yield f"{'tensors':<9}of {side.upper()} are described by {', '.join(names)}"
    yield f"{'memory':<9}{_size(report['decoder_memory_bytes'])} declared for a device"
    yield from _describe_contents(report)
    speed = report["result_bytes"] / max(report["seconds"], 1e-3) / 1e6
    yield f"{'took':<9}{report['seconds']:.2f} s ({speed:.1f} MB/s), {_size(report['peak_memory_bytes'])} at most"


def _describe_contents(report: dict[str, Any]) -> Iterator[str]:
    codecs = report.get("codecs", {})
    if codecs:
        yield ""
        yield f"{'codec':<10}{'segments':>9}{'delta':>14}{'result':>14}"
        for name, row in codecs.items():
            yield f"{name:<10}{row['segments']:>9}{_size(row['patch_bytes']):>14}{_size(row['result_bytes']):>14}"
        yield ""
    layouts = report.get("layouts", {})
    if layouts:
        yield f"{'layouts':<9}" + ", ".join(f"{name} {_size(size)}" for name, size in layouts.items())
    tensors = report.get("tensors", [])
    if tensors:
        yield f"{'tensors':<9}{len(tensors)} changed or new; those that changed most:"
        ranked = sorted(
            tensors, key=lambda row: -(row["bytes"] if row["changed_bytes"] is None else row["changed_bytes"])
        )
        for row in ranked[:_TENSORS_SHOWN]:
            changed = row["changed_bytes"]
            share = "no base" if changed is None else f"{100 * changed / row['bytes']:.1f} % of its bytes"
            reason = f"; {row['reason']}" if row["reason"] else ""
            yield f"  {row['name']:<40} {row['layout']:<8}{_size(row['bytes']):>12}  {share}{reason}"
        yield ""
