"""One scenario in both worlds: live first, then in virtual time with the same files, draws and instants."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from protocol.errors import RequestError
from simulator.agreement import (
    TOLERANCE,
    Agreement,
    Curve,
    Machine,
    compared,
    largest_gap,
    state_seconds,
)
from simulator.fleet import run_fleet
from simulator.live.models import build_digits, load_models
from simulator.live.possible import check_possible
from simulator.live.scenario_run import LiveRun, run_scenario
from simulator.recording import Recorder
from simulator.results import FleetResult
from simulator.scenario import Model, Scenario

MODELS_SEED: Final = 1
"""The digits are the same for every scenario: their delta is a part of what a scenario says."""

PATIENCE: Final = 2.0
"""A live run ends after so many times what the virtual one took, whatever is missing by then; that is disagreement enough."""

PATIENCE_S: Final = 60.0
"""And so much more, for a machine that is busy."""


def agree(
    scenario: Scenario,
    broker: str,
    *,
    models: Path | None = None,
    command: str = "",
    tell: Callable[[str], None] = lambda _text: None,
) -> Agreement:
    """Run a scenario in both worlds and compare them.

    Args:
        scenario: What to run.
        broker: `mosquitto` or `embedded`, for the live side.
        models: Folder with models that are built already; None builds the digits, unless the scenario names files.
        command: That repeats it.
        tell: Told what goes on.

    Raises:
        WhimbrelError: The scenario cannot be done live, something needed is missing, or a side gave up.
    """
    check_possible(scenario)
    with _workplace() as folder:
        if not scenario.model.files:
            scenario = replace(scenario, model=model_of(models, folder, tell))
        result = run_fleet(scenario, recorder=Recorder())
        if result.failure is not None:
            raise RequestError(
                f"the run in virtual time failed: {result.failure.detail}",
                hint="look at it with `whimbrel-sim fleet --scenario FILE`",
            )
        tell(f"virtual: {result.virtual_s:.0f} s in {result.wall_s:.0f} s")
        finished_s = max([each.finished_s or result.virtual_s for each in result.rollouts], default=0.0)
        live = run_scenario(scenario, broker, folder, tell, finished_s * PATIENCE + PATIENCE_S)
        tell(f"live: {live.wall_s:.0f} s")
    return agreement_of(scenario, broker, command, result, live)


def agreement_of(
    scenario: Scenario, broker: str, command: str, result: FleetResult, live: LiveRun
) -> Agreement:
    """What two runs say.

    Args:
        scenario: Of the live run.
        broker: Of the live run.
        command: That repeats it.
        result: In virtual time, with a recording.
        live: In real time.
    """
    devices = scenario.devices
    rows, worst = compared(devices, result.reached_s, live.reached_s)
    gap, gap_at_s = largest_gap(devices, result.reached_s, live.reached_s)
    rollout = result.rollouts[0] if result.rollouts else None
    return Agreement(
        scenario=scenario.name,
        seed=scenario.seed,
        devices=devices,
        broker=broker,
        command=command,
        tolerance=TOLERANCE,
        reached=rows,
        difference=worst.difference,
        at_percent=worst.percent,
        gap=gap,
        gap_at_s=gap_at_s,
        virtual=Curve(
            reached_s=result.reached_s,
            counts={} if rollout is None else rollout.counts,
            rollout="" if rollout is None else rollout.state,
            state_s=state_seconds(_steps(result)),
            down_bytes=result.down_bytes,
            wall_s=result.wall_s,
            cpu_s=result.cpu_s,
        ),
        live=Curve(
            reached_s=live.reached_s,
            counts=live.counts,
            rollout=live.state,
            state_s=state_seconds(live.steps),
            down_bytes=live.down_bytes,
            wall_s=live.wall_s,
            cpu_s=live.cpu_s,
        ),
        machine=Machine(processors=live.processors, load=live.load),
    )


def model_of(models: Path | None, folder: Path, tell: Callable[[str], None] = lambda _text: None) -> Model:
    """The digits of the examples as the files of a scenario.

    Args:
        models: Where they are; None builds them.
        folder: Takes what is built.
        tell: Told what goes on.

    Raises:
        RequestError: They are not there, or cannot be built.
    """
    if models is None:
        models = folder / "digits"
        tell("training and quantizing a digit classifier")
        build_digits(models, MODELS_SEED, lambda _line: None)
    found = load_models(models.absolute(), "digits")
    return Model(files=(str(found.files["v1"]), str(found.files["v2"])), health=str(found.health["v2"]))


def _steps(result: FleetResult) -> list[list[tuple[int, str]]]:
    assert result.recording is not None
    tracks, labels = result.recording.tracks, result.recording.labels
    steps: list[list[tuple[int, str]]] = [[] for _ in tracks.kinds]
    for at_ms, device, label in zip(tracks.at_ms, tracks.device, tracks.label, strict=True):
        steps[device].append((at_ms, labels[label].split()[0]))
    return steps


@contextmanager
def _workplace() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="whimbrel-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
