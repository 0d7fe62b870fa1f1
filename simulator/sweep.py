"""Many runs of a scenario: seeds times values of fields, in any engine; the rows come in one order whatever is done where."""

import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from protocol.errors import RequestError
from simulator.figures import Figures, figures_of
from simulator.fleet import run_fleet
from simulator.intervals import Summary, summary_of
from simulator.scenario import Scenario
from simulator.scenario_files import load_scenario, split_change

RUNS_MAX: Final = 100_000
"""Runs of one sweep; each takes a second at least."""

AHEAD_PER_WORKER: Final = 4
"""Runs that are handed out before the first of them is done: enough that nobody waits, few enough to be cancelled."""

_SEEDS: Final = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


class Task(Struct, frozen=True, kw_only=True):
    """One run to be done."""

    cell: dict[str, str]  # what is set otherwise in this cell: field and value
    scenario: Scenario


class Row(Struct, frozen=True, kw_only=True):
    """One run that was done."""

    cell: dict[str, str]
    seed: int
    figures: Figures


class Cell(Struct, frozen=True, kw_only=True):
    """All seeds of one cell."""

    cell: dict[str, str]
    runs: int
    failed: int
    summaries: dict[
        str, Summary | None
    ]  # None where a run has no such figure, as a share that it never reached


def parse_seeds(text: str) -> list[int]:
    """Seeds as people write them: `1-50`, `3,5,9`, or both.

    Raises:
        RequestError: They are none, or too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        if match is None:
            raise RequestError(f"--seeds {text}: {part!r} is no seed", hint="write 1-50 or 3,5,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= RUNS_MAX:
            raise RequestError(
                f"--seeds {text}: {part} is empty or has more than {RUNS_MAX} seeds", hint="write 1-50"
            )
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        raise RequestError(f"--seeds {text}: a seed is there twice", hint="name each once")
    return seeds


def plan_sweep(
    name_or_path: str, changes: Sequence[str], over: Iterable[str], seeds: Sequence[int]
) -> list[Task]:
    """Every run of a sweep, checked before the first one begins.

    Args:
        name_or_path: Of the scenario.
        changes: As in `load_scenario`, for all runs.
        over: Fields and the values they take, as `faults.drop=0,0.1,0.3`; every combination is a cell.
        seeds: Of each cell.

    Raises:
        RequestError: A field or a value is wrong, or there are too many runs.
    """
    axes = []
    for each in over:
        field, values = split_change(each)
        axes.append([(field, value.strip()) for value in values.split(",")])
    cells = [dict(combination) for combination in itertools.product(*axes)]
    if len(cells) * len(seeds) > RUNS_MAX:
        raise RequestError(
            f"{len(cells)} cells of {len(seeds)} seeds are more than {RUNS_MAX} runs", hint="take fewer"
        )
    tasks: list[Task] = []
    for cell in cells:
        scenario = load_scenario(
            name_or_path, (*changes, *(f"{field}={value}" for field, value in cell.items()))
        ).scenario
        tasks.extend(Task(cell=cell, scenario=replace(scenario, seed=seed)) for seed in seeds)
    return tasks


def run_task(task: Task) -> Row:
    """Do one run.

    Raises:
        RequestError: It took more memory than a worker may use.
    """
    try:
        result = run_fleet(task.scenario)
    except MemoryError as error:
        raise RequestError(
            f"a run of {task.scenario.devices} devices needs more memory than a worker may use",
            hint="take fewer --workers or fewer devices",
        ) from error
    return Row(cell=task.cell, seed=task.scenario.seed, figures=figures_of(result))


def run_tasks(tasks: Sequence[Task], engine: Executor, workers: int) -> Iterator[Row]:
    """Do all runs; the rows come in the order of the tasks, each as soon as those before it are there.

    Raises:
        WhimbrelError: One of the runs cannot be done.
    """
    waiting = iter(tasks)
    begun: deque[Future[Row]] = deque(
        engine.submit(run_task, task) for task in itertools.islice(waiting, workers * AHEAD_PER_WORKER)
    )
    while begun:
        try:
            row = begun.popleft().result()
        except BrokenProcessPool as error:
            raise RequestError(
                "a worker was killed, probably since the machine ran out of memory",
                hint="take fewer --workers",
            ) from error
        begun.extend(engine.submit(run_task, task) for task in itertools.islice(waiting, 1))
        yield row


def cells_of(rows: Iterable[Row], names: Sequence[str]) -> list[Cell]:
    """The rows of each cell summed up, in the order in which the cells come.

    Args:
        rows: Of a sweep.
        names: Of figures that are numbers.
    """
    grouped: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row.cell.items()), []).append(row)
    return [
        Cell(
            cell=dict(cell),
            runs=len(group),
            failed=sum(bool(row.figures.failure) for row in group),
            summaries={name: _summary([getattr(row.figures, name) for row in group]) for name in names},
        )
        for cell, group in grouped.items()
    ]


def _summary(values: Sequence[float | None]) -> Summary | None:
    numbers = [value for value in values if value is not None]
    return summary_of(numbers) if len(numbers) == len(values) else None
