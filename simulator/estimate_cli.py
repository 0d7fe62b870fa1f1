"""`whimbrel-sim estimate`: back-of-envelope answers with their working, and how far off they are."""

import argparse
from itertools import groupby
from typing import Final, TextIO

import msgspec

from protocol.errors import RequestError
from simulator.estimate import FleetPlan, Line, estimate
from simulator.estimate_check import Comparison, compare_all

TITLES: Final = {
    "bytes": "Bytes",
    "hours": "Hours",
    "broker": "Broker",
    "server": "Server",
    "dollars": "Dollars",
    "rollout": "Rollout",
}


def add_estimate_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `estimate` to the commands of `whimbrel-sim`: one option for each field of a plan."""
    parser = commands.add_parser(
        "estimate",
        help="reckon bytes, hours, dollars and broker load on the back of an envelope",
        description="Reckons what an update of a fleet takes, and shows every step. Nothing is simulated, except with --check.",
    )
    for name, schema in msgspec.json.schema(FleetPlan)["$defs"]["FleetPlan"]["properties"].items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if schema["type"] == "integer" else float,
            default=schema["default"],
            metavar="N",
            help=f"{schema['description']} (default: {schema['default']:g})",
        )
    parser.add_argument("--check", action="store_true", help="run the simulator and compare (a minute)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(action=_estimate)


def plan_from(arguments: argparse.Namespace) -> FleetPlan:
    """The plan that the options describe.

    Raises:
        RequestError: A value is out of range; its option is named.
    """
    values = {name: getattr(arguments, name) for name in FleetPlan.__struct_fields__}
    try:
        return msgspec.convert(values, FleetPlan)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        raise RequestError(
            f"--{path.rstrip('`').replace('_', '-')}: {text.lower()}", hint="choose another value"
        ) from error


def print_lines(lines: tuple[Line, ...], output: TextIO) -> None:
    """A worked calculation for people."""
    for group, members in groupby(lines, key=lambda line: line.group):
        print(TITLES[group], file=output)
        for line in members:
            print(f"  {line.working}", file=output)


def print_comparisons(comparisons: list[Comparison], output: TextIO) -> None:
    """A table for people."""
    print(f"{'':28}{'figure':22}{'estimated':>14}{'simulated':>14}{'ratio':>7}{'tolerance':>11}", file=output)
    for each in comparisons:
        print(
            f"{each.situation:28}{each.name:22}{each.estimated:14,.1f}{each.simulated:14,.1f}{each.ratio:7.2f}"
            f"{each.tolerance:>10.0%}{'' if each.is_within else '  off'}",
            file=output,
        )


def _estimate(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    del command, errors
    if arguments.check:
        return _check(arguments, output)
    plan = plan_from(arguments)
    lines = estimate(plan)
    if arguments.json:
        values = {line.name: line.value for line in lines}
        print(msgspec.json.encode({"plan": plan, "values": values, "lines": lines}).decode(), file=output)
    else:
        print_lines(lines, output)
    return 0


def _check(arguments: argparse.Namespace, output: TextIO) -> int:
    comparisons = list(compare_all())
    if arguments.json:
        rows = [
            {**msgspec.to_builtins(each), "ratio": each.ratio, "is_within": each.is_within}
            for each in comparisons
        ]
        print(msgspec.json.encode(rows).decode(), file=output)
    else:
        print_comparisons(comparisons, output)
    return 0 if all(each.is_within for each in comparisons) else 1
