"""`whimbrel-sim scenarios`, `sweep`, `sample` and `compare`: many runs, and what people read of them."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final, TextIO

import msgspec
from rich.console import Console
from rich.table import Table

from protocol.errors import RequestError
from simulator.compare import compare, load_figures
from simulator.engines import dask_engine, local_engine
from simulator.figures import Figures
from simulator.intervals import Summary
from simulator.sampling import plan_sample, sampled
from simulator.scenario_files import (
    DEFAULT,
    add_scenario_options,
    load_scenario,
    scenario_names,
    scenario_schema,
    scenario_text,
)
from simulator.sweep import Row, Task, cells_of, parse_seeds, plan_sweep, run_tasks

SHOWN: Final = ("t50_s", "t95_s", "down_bytes_median", "broker_bytes_per_s_peak", "blast_radius")
COLUMN_WIDTH: Final = 28
"""Of a table that does not go to a terminal: nothing is cut."""


def add_sweep_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser of `whimbrel-sim`."""
    scenarios = commands.add_parser("scenarios", help="list the scenarios that are shipped, or print one")
    scenarios.add_argument("name", nargs="?", metavar="NAME", help="print this one as TOML")
    scenarios.add_argument("--schema", action="store_true", help="print the JSON schema of a scenario file")
    scenarios.add_argument("--json", action="store_true", help="print JSON")
    scenarios.set_defaults(action=_scenarios)

    sweep = commands.add_parser(
        "sweep",
        help="run a scenario with many seeds and values of its fields",
        description="Runs every seed in every cell: a cell is one combination of the values of --over."
        " Exit code 0: every run kept its promises; 1: one did not, or a run could not be done.",
    )
    add_scenario_options(sweep, DEFAULT)
    sweep.add_argument("--seeds", default="1-10", metavar="A-B", help="or A,B,C (default: %(default)s)")
    sweep.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="FIELD=V,V,V",
        help="values of a field; may be repeated",
    )
    sweep.add_argument(
        "--show",
        default=",".join(SHOWN),
        metavar="FIGURES",
        help="columns of the table (default: %(default)s)",
    )
    sweep.add_argument(
        "--out", type=Path, metavar="FILE", help="write a line of JSON for every run, as it is done"
    )
    _add_engine_options(sweep)
    sweep.set_defaults(action=_sweep)

    sample = commands.add_parser(
        "sample",
        help="estimate a fleet that is too large to be run whole from some of its devices",
        description="Runs shards of the fleet and says how far off they may be. Exit code as of sweep.",
    )
    add_scenario_options(sample, DEFAULT)
    sample.add_argument("--devices", type=int, default=1_000_000, metavar="N", help="default: %(default)s")
    sample.add_argument("--shards", type=int, default=8, metavar="K", help="default: %(default)s")
    sample.add_argument(
        "--shard-devices", type=int, default=2_000, metavar="N", help="of each shard (default: %(default)s)"
    )
    sample.add_argument("--seed", type=int, metavar="S", help="default: the scenario's")
    _add_engine_options(sample)
    sample.set_defaults(action=_sample)

    comparison = commands.add_parser(
        "compare",
        help="compare two results, or two scenarios, which are run",
        description="Exit code 0: the second is not worse than the first in any figure by more than --tolerance;"
        " 1: it is, or the comparison could not be done.",
    )
    comparison.add_argument(
        "before", metavar="A", help="a result of `fleet --json`, a scenario file, or a name"
    )
    comparison.add_argument("after", metavar="B", help="likewise")
    comparison.add_argument(
        "--tolerance", type=float, default=0.1, metavar="PART", help="default: %(default)s, ten percent"
    )
    comparison.add_argument("--json", action="store_true", help="print one line of JSON per figure")
    comparison.set_defaults(action=_compare)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--engine", choices=("local", "dask"), default="local", help="default: %(default)s")
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="of a Dask cluster, as tcp://host:8786 (default: one here)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _scenarios(arguments: argparse.Namespace, _command: str, output: TextIO, _errors: TextIO) -> int:
    if arguments.schema:
        print(json.dumps(scenario_schema(), indent=2), file=output)
    elif arguments.name is not None:
        text = scenario_text(arguments.name)
        if arguments.json:
            text = msgspec.json.encode(load_scenario(arguments.name)).decode()
        print(text.rstrip("\n"), file=output)
    else:
        _list_scenarios(arguments.json, output)
    return 0


def _list_scenarios(is_json: bool, output: TextIO) -> None:  # noqa: FBT001 - an option of the command line
    for name in scenario_names():
        file = load_scenario(name)
        if is_json:
            about = {
                "name": name,
                "devices": file.devices,
                "title": file.title,
                "asks": file.asks,
                "expects": file.expects,
            }
            print(json.dumps(about), file=output)
        else:
            print(f"{name:22} {file.title} ({file.devices:,} devices)\n{'':22} {file.asks}", file=output)


def _sweep(arguments: argparse.Namespace, _command: str, output: TextIO, errors: TextIO) -> int:
    shown = _shown(arguments.show)
    tasks = plan_sweep(arguments.scenario, arguments.changes, arguments.over, parse_seeds(arguments.seeds))
    rows: list[Row] = []
    with ExitStack() as stack:
        lines = [output] if arguments.json else []
        if arguments.out is not None:
            lines.append(stack.enter_context(_opened(arguments.out)))
        engine = stack.enter_context(_engine(arguments))
        try:
            for row in _shown_progress(run_tasks(tasks, engine, arguments.workers), tasks, errors):
                rows.append(row)
                for line in lines:
                    print(msgspec.json.encode(row).decode(), file=line, flush=True)
        finally:  # interrupted, too: what is done is done
            if rows and not arguments.json:
                _print_cells(rows, shown, output)
    return int(any(row.figures.failure for row in rows))


def _sample(arguments: argparse.Namespace, _command: str, output: TextIO, errors: TextIO) -> int:
    changes = [*arguments.changes, f"devices={arguments.devices}"]
    if arguments.seed is not None:
        changes.append(f"seed={arguments.seed}")
    scenario = load_scenario(arguments.scenario, changes).scenario
    tasks = plan_sample(scenario, arguments.shards, arguments.shard_devices)
    with _engine(arguments) as engine:
        rows = list(_shown_progress(run_tasks(tasks, engine, arguments.workers), tasks, errors))
    result = sampled(scenario, arguments.shard_devices, rows)
    if arguments.json:
        print(msgspec.json.encode(result).decode(), file=output)
    else:
        table = Table("figure", "estimate", "low", "high", box=None)
        for each in result.estimates:
            table.add_row(each.figure, _number(each.value), _number(each.low), _number(each.high))
        title = f"{scenario.devices:,} devices of {scenario.name}, from {result.shards} shards of {result.shard_devices:,}"
        print(f"{title}; {result.failed} failed", file=output)
        _print_table(table, output)
    return int(result.failed > 0)


def _compare(arguments: argparse.Namespace, _command: str, output: TextIO, _errors: TextIO) -> int:
    if arguments.tolerance < 0:
        raise RequestError(f"--tolerance {arguments.tolerance} is negative", hint="choose 0 or more")
    differences = compare(load_figures(arguments.before), load_figures(arguments.after), arguments.tolerance)
    if arguments.json:
        for each in differences:
            print(msgspec.json.encode(each).decode(), file=output)
    else:
        table = Table("figure", "A", "B", "B / A", "", box=None)
        for each in differences:
            table.add_row(
                each.figure,
                _value(each.before),
                _value(each.after),
                _number(each.ratio),
                "worse" if each.is_worse else "",
            )
        _print_table(table, output)
    return int(any(each.is_worse for each in differences))


def _engine(arguments: argparse.Namespace) -> AbstractContextManager[Executor]:
    if arguments.engine == "dask":
        return dask_engine(arguments.workers, arguments.scheduler)
    if arguments.scheduler:
        raise RequestError("--scheduler is for Dask", hint="add --engine dask")
    return local_engine(arguments.workers)


def _shown(text: str) -> list[str]:
    numbers = [name for name in Figures.__struct_fields__ if name not in {"failure", "trace_digest"}]
    names = text.split(",")
    for name in names:
        if name not in numbers:
            raise RequestError(f"--show: there is no figure {name!r}", hint=f"there are {', '.join(numbers)}")
    return names


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="choose another --out") from error


def _shown_progress(rows: Iterable[Row], tasks: Sequence[Task], errors: TextIO) -> Iterator[Row]:
    """The same rows, counted on a line that is written over on a terminal, and every tenth part elsewhere."""
    total, failed = len(tasks), 0
    step = 1 if errors.isatty() else max(1, total // 10)
    for done, row in enumerate(rows, start=1):
        failed += bool(row.figures.failure)
        if done % step == 0 or done == total:
            end = "\r" if errors.isatty() and done < total else "\n"
            print(f"{done} of {total} runs, {failed} failed", end=end, file=errors, flush=True)
        yield row


def _print_cells(rows: Sequence[Row], shown: Sequence[str], output: TextIO) -> None:
    cells = cells_of(rows, shown)
    fields = list(cells[0].cell)
    table = Table(*fields, "runs", "failed", *shown, box=None)
    for cell in cells:
        summaries = (_summarized(cell.summaries[name]) for name in shown)
        table.add_row(*cell.cell.values(), str(cell.runs), str(cell.failed), *summaries)
    _print_table(table, output)
    print("mean ± half of its 95 % interval (median)", file=output)
    for row in rows:
        if row.figures.failure:
            print(f"seed {row.seed} {row.cell or ''}: {row.figures.failure}", file=output)


def _print_table(table: Table, output: TextIO) -> None:
    console = Console(file=output, highlight=False)
    if not console.is_terminal:
        console.width = COLUMN_WIDTH * len(table.columns)
    console.print(table)


def _summarized(summary: Summary | None) -> str:
    if summary is None:
        return "never in some"
    half = "" if summary.high is None else f" ± {_number(summary.high - summary.mean)}"
    return f"{_number(summary.mean)}{half} ({_number(summary.median)})"


def _value(value: float | str | None) -> str:
    return value[:40] if isinstance(value, str) else _number(value)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1_000 or value == int(value) else f"{value:.4g}"
