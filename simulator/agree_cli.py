"""`whimbrel-sim agree`: is the virtual world like the real one?"""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Final, TextIO

import msgspec

from protocol.errors import RequestError
from server.config import EMBEDDED
from simulator.agreement import Agreement, table_of, verdict_of
from simulator.live.agree import agree
from simulator.live.brokers import MOSQUITTO
from simulator.report.agreement import write_agreement
from simulator.report.files import check_writable
from simulator.scenario import Scenario
from simulator.scenario_files import add_scenario_options, load_scenario

DEFAULT: Final = "slow-links"
_SUFFIX: Final = ".toml"


def add_agree_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `whimbrel-sim`."""
    parser = commands.add_parser(
        "agree",
        help="one scenario in virtual time and live, and how far apart they are",
        description="Runs one scenario in virtual time, then live: the same devices, links and instants, real agents, a"
        " real broker, a real server. Compares when 5 to 95 % of the fleet had the release. Exit code 1 if the"
        f" worlds differ by more than 15 %. Takes minutes. Scenarios: {', '.join(live_scenario_names())}.",
    )
    add_scenario_options(parser, DEFAULT)
    parser.add_argument("--devices", type=int, metavar="N", help="default: as many as the scenario has")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the scenario's")
    parser.add_argument(
        "--broker",
        choices=(MOSQUITTO, EMBEDDED),
        default=MOSQUITTO,
        help="of the live side (default: %(default)s)",
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="v1, v2, v3 and health.json, built before")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page with both curves")
    parser.set_defaults(action=_agree)


def live_scenario_names() -> list[str]:
    """The scenarios that are shipped for this, sorted."""
    folder = files("simulator") / "live" / "scenarios"
    return sorted(
        entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)
    )


def load_live_scenario(name_or_path: str, changes: list[str]) -> Scenario:
    """Read a scenario of those that are shipped for live mode, or of a file.

    Raises:
        RequestError: There is none, or it says something that cannot be.
    """
    if name_or_path in live_scenario_names():
        name_or_path = str(files("simulator") / "live" / "scenarios" / f"{name_or_path}{_SUFFIX}")
    elif Path(name_or_path).suffix not in {_SUFFIX, ".json"} and len(Path(name_or_path).parts) == 1:
        raise RequestError(
            f"there is no scenario {name_or_path!r} for live mode",
            hint=f"there are {', '.join(live_scenario_names())}, or give a file that ends in .toml or .json",
        )
    return load_scenario(name_or_path, changes).scenario


def _agree(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    report: Path | None = arguments.report
    if report is not None:
        check_writable(report)
    changes = [
        f"{name}={getattr(arguments, name)}"
        for name in ("devices", "seed")
        if getattr(arguments, name) is not None
    ]
    scenario = load_live_scenario(arguments.scenario, [*arguments.changes, *changes])
    found = agree(
        scenario,
        arguments.broker,
        models=arguments.models,
        command=command,
        tell=lambda text: print(text, file=errors, flush=True),
    )
    return tell_agreement(found, output, errors, report=report, as_json=arguments.json)


def tell_agreement(
    found: Agreement, output: TextIO, errors: TextIO, *, report: Path | None = None, as_json: bool = False
) -> int:
    """Print a comparison, and write its page; returns the exit code.

    Raises:
        StorageError: The page cannot be written.
    """
    if as_json:
        document = {"is_within": found.is_within, **msgspec.to_builtins(found)}
        print(msgspec.json.encode(document).decode(), file=output)
    else:
        print_agreement(found, output)
    if report is not None:
        write_agreement(report, found)
        print(f"Report: {report}", file=errors if as_json else output)
    return 0 if found.is_within else 1


def print_agreement(found: Agreement, output: TextIO) -> None:
    """What people read."""
    print(f"{found.scenario}: {found.devices} devices, seed {found.seed}, broker {found.broker}", file=output)
    print(f"  {'share':>6} {'virtual, s':>12} {'live, s':>12} {'difference':>12}", file=output)
    for percent, virtual, live, difference in table_of(found):
        print(f"  {percent:>6} {virtual:>12} {live:>12} {difference:>12}", file=output)
    print(
        f"  curves are at most {100 * found.gap:.0f} % of the fleet apart, at {found.gap_at_s:.0f} s",
        file=output,
    )
    print(f"  {'a device was in':>22} {'virtual, s':>12} {'live, s':>12}", file=output)
    for state in found.virtual.state_s:
        virtual_s, live_s = found.virtual.state_s[state], found.live.state_s[state]
        if virtual_s or live_s:
            print(f"  {state:>22} {virtual_s:>12.2f} {live_s:>12.2f}", file=output)
    for side, curve in (("virtual", found.virtual), ("live", found.live)):
        counts = ", ".join(f"{count} {status}" for status, count in curve.counts.items())
        print(f"  {side}: {curve.rollout}: {counts}; took {curve.wall_s:.0f} s", file=output)
    print(
        f"  the live run had a load of {found.machine.load:.1f} on {found.machine.processors} processors at its end",
        file=output,
    )
    print(f"{verdict_of(found)}.", file=output)
