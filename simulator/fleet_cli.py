"""`whimbrel-sim fleet`, `soak` and `replay`: fleets in virtual time, and what people read of them."""

import argparse
import time
from pathlib import Path
from typing import Final, TextIO

import msgspec
from msgspec.structs import replace

from protocol.errors import RequestError
from simulator.faults import draw_faults
from simulator.fleet import run_fleet
from simulator.population import mixed_population
from simulator.recording import Recorder
from simulator.report.files import check_writable
from simulator.report.fleet import write_fleet_report
from simulator.results import Failure, FleetResult
from simulator.scenario import ReleasePlan, Scenario, encode_scenario
from simulator.scenario_files import DEFAULT, add_scenario_options, load_scenario
from simulator.soak import explain, run_seeds, soak_scenario, total_faults

DEVICES: Final = 1_000
FAULTS_END_S: Final = 1_800.0
STORY_LINES: Final = 40
"""Last lines of a story that are printed; `replay` prints all."""

SCENARIO_BYTES_MAX: Final = 1 << 20


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser of `whimbrel-sim`."""
    fleet = commands.add_parser(
        "fleet", help="a release on a large fleet in virtual time, replayed from a seed"
    )
    fleet.add_argument(
        "--devices", type=int, metavar="N", help=f"default: {DEVICES}, or as many as the scenario has"
    )
    fleet.add_argument(
        "--seed", type=int, metavar="S", help="decides everything (default: 1, or the scenario's)"
    )
    add_scenario_options(fleet)
    fleet.add_argument(
        "--faults",
        choices=("none", "mixed"),
        default="none",
        help="mixed: of every kind, at rates drawn from the seed",
    )
    fleet.add_argument(
        "--population", choices=("uniform", "mixed"), default="uniform", help="default: %(default)s"
    )
    fleet.add_argument(
        "--device", type=int, default=-1, metavar="NUMBER", help="tell the story of one device"
    )
    fleet.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_report_option(fleet)
    fleet.set_defaults(action=_fleet)
    soak = commands.add_parser(
        "soak", help="many seeds with every fault; the first failure is shrunk and told"
    )
    soak.add_argument(
        "--devices", type=int, default=40, metavar="N", help="of each seed (default: %(default)s)"
    )
    soak.add_argument("--first", type=int, default=1, metavar="S", help="first seed (default: %(default)s)")
    soak.add_argument("--count", type=int, default=100, metavar="N", help="seeds (default: %(default)s)")
    soak.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    soak.add_argument("--json", action="store_true", help="print one line of JSON per seed")
    soak.set_defaults(action=_soak)
    replay = commands.add_parser("replay", help="run a scenario from a file, and tell the story of a device")
    replay.add_argument(
        "file", type=Path, metavar="FILE", help="JSON: a scenario, or the fields that are not as usual"
    )
    replay.add_argument("--device", type=int, default=-1, metavar="NUMBER", help="tell its story")
    replay.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_report_option(replay)
    replay.set_defaults(action=_replay)


def _add_report_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page about the run")


def _fleet(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    if arguments.scenario is None and not arguments.changes:
        return _finish(_plain(arguments), arguments, command, output, errors)
    if arguments.faults != "none" or arguments.population != "uniform":
        raise RequestError(
            "--faults and --population are not for a scenario", hint="use --set, as faults.drop=0.1"
        )
    changes = [
        f"{name}={getattr(arguments, name)}"
        for name in ("devices", "seed")
        if getattr(arguments, name) is not None
    ]
    scenario = load_scenario(arguments.scenario or DEFAULT, [*arguments.changes, *changes]).scenario
    return _finish(scenario, arguments, command, output, errors)


def _plain(arguments: argparse.Namespace) -> Scenario:
    """A fleet that no file describes."""
    devices = DEVICES if arguments.devices is None else arguments.devices
    seed = 1 if arguments.seed is None else arguments.seed
    canary_count = max(1, devices // 500)
    scenario = checked(
        Scenario(devices=devices, seed=seed, releases=(ReleasePlan(canary_count=canary_count),))
    )
    if arguments.population == "mixed":
        scenario = replace(scenario, population=mixed_population())
    if arguments.faults == "mixed":
        plan = ReleasePlan(canary_count=canary_count, failures_max=devices, wave_timeout_s=600.0)
        scenario = replace(
            scenario, releases=(plan,), faults=draw_faults(seed, FAULTS_END_S), keep_alive_s=120
        )
    return scenario


def _replay(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    path: Path = arguments.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a scenario file") from error
    if len(data) > SCENARIO_BYTES_MAX:
        raise RequestError(f"{path} has {len(data)} bytes, allowed are {SCENARIO_BYTES_MAX}")
    try:
        scenario = msgspec.json.decode(data, type=Scenario)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise RequestError(f"{path}: {error}", hint="see simulator/README.md for its fields") from error
    return _finish(scenario, arguments, command, output, errors)


def checked(scenario: Scenario) -> Scenario:
    """The same scenario, with the bounds of every field enforced.

    Raises:
        RequestError: A field is out of range; it is named.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(scenario), Scenario)
    except msgspec.ValidationError as error:
        raise RequestError(f"scenario: {error}", hint="choose another value") from error


def _finish(
    scenario: Scenario, arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO
) -> int:
    follow: int = arguments.device
    if follow >= scenario.devices:
        raise RequestError(f"there is no device {follow}", hint=f"choose 0 to {scenario.devices - 1}")
    report: Path | None = arguments.report
    if report is not None:
        check_writable(report)
    recorder = Recorder() if report is not None else None
    result = run_fleet(scenario, follow=follow, command=command, recorder=recorder)
    if arguments.json:
        print(msgspec.json.encode(result).decode(), file=output)
    else:
        print_result(result, output)
        for line in result.story:
            print(line, file=output)
    if result.failure is not None and follow < 0:
        told = print_failure(result.scenario, result.failure, command, errors)
        result = replace(result, story=told.story, shrunk=told.shrunk)
    if report is not None:
        write_fleet_report(report, scenario, result)
        print(f"Report: {report}", file=errors if arguments.json else output)
    return 0 if result.is_passed else 1


def _soak(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    if arguments.count < 1 or arguments.workers < 1:
        raise RequestError("a soak needs at least one seed and one worker")
    checked(soak_scenario(max(0, arguments.first), arguments.devices))
    results = []
    begun = time.monotonic()  # noqa: TID251 - how long the soak took
    seeds = range(arguments.first, arguments.first + arguments.count)
    for result in run_seeds(seeds, arguments.devices, arguments.workers):
        results.append(result)
        if arguments.json:
            print(msgspec.json.encode(result).decode(), file=output)
        if result.failure is not None:
            again = f"{command} --first {result.seed} --count 1"
            print_failure(soak_scenario(result.seed, arguments.devices), result.failure, again, errors)
            return 1
    updates, faults = sum(result.updates for result in results), total_faults(results)
    elapsed_s = time.monotonic() - begun  # noqa: TID251 - likewise
    line = (
        f"{len(results)} seeds, {arguments.devices * len(results):,} devices, {updates:,} updates,"
        f" {faults.total():,} faults, {sum(result.checks for result in results):,} checks in {elapsed_s:,.0f} s:"
        " no promise broken"
    )
    print(line, file=errors if arguments.json else output)
    if not arguments.json:
        for kind, count in sorted(faults.items()):
            print(f"  {kind:24} {count:12,}", file=output)
    return 0


def print_result(result: FleetResult, output: TextIO) -> None:
    """What people read."""
    devices = result.scenario.devices
    print(
        f"{devices:,} devices, {result.virtual_s:,.0f} s of virtual time in {result.wall_s:.1f} s"
        f" ({result.events / max(result.wall_s, 1e-9):,.0f} events/s, {result.peak_memory_bytes / 1e6:,.0f} MB)",
        file=output,
    )
    for rollout in result.rollouts:
        counts = ", ".join(f"{count:,} {status}" for status, count in rollout.counts.items())
        reason = f" ({rollout.reason})" if rollout.reason else ""
        print(f"  {rollout.version} ({rollout.kind}): {rollout.state}{reason}: {counts}", file=output)
    print(
        "  versions at the end: " + ", ".join(f"{k} {v:,}" for k, v in result.versions.items()), file=output
    )
    completion = result.completion_s
    if completion:
        middle, late = completion[len(completion) // 2], completion[len(completion) * 99 // 100]
        print(
            f"  an update takes {middle:.1f} s in the median, {late:.1f} s at the 99th percentile",
            file=output,
        )
    print(
        f"  {result.down_bytes / 1e6:,.1f} MB to devices, {result.up_bytes / 1e6:,.1f} MB from them;"
        f" broker {result.broker.messages_out:,} messages out, server busy {result.server.busy_s:,.1f} s",
        file=output,
    )
    if result.faults:
        print(f"  {sum(result.faults.values()):,} faults: {_listed(result.faults)}", file=output)
    print(f"  {result.checks:,} checks; trace {result.trace_digest}", file=output)


def print_failure(scenario: Scenario, failure: Failure, command: str, errors: TextIO) -> FleetResult:
    """Print the seed, how to replay it, a smaller scenario, and the story of the device involved; returns the last two."""
    where = f" on device {failure.device}" if failure.device >= 0 else ""
    print(
        f"seed {scenario.seed} failed at {failure.at_s:.3f} s{where}: promise {failure.promise}: {failure.detail}",
        file=errors,
    )
    print(f"replay it: {command}", file=errors)
    told = explain(scenario, failure, command)
    assert told.shrunk is not None
    small = encode_scenario(told.shrunk).decode()
    print(f"a smaller scenario, for `whimbrel-sim replay FILE`: {small}", file=errors)
    if told.story:
        device = told.failure.device if told.failure else -1
        print(f"the last lines of the story of device {device}:", file=errors)
        for line in told.story[-STORY_LINES:]:
            print(f"  {line}", file=errors)
    return told


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
