"""The steps as data: what is asked, what is run, and what is said about it. Their texts lie in `steps/*.toml`.

Texts that quote figures are format strings over the names that the step's experiment and `scale_figures` give.
"""

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from protocol.errors import RequestError
from simulator.rehearsal.experiments import EXPERIMENTS, Figures, scale_figures

FOLDER: Final = Path(__file__).parent / "steps"


class Prediction(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to predict before the experiment."""

    ask: str
    figure: str  # name of the figure that answers it
    unit: str


class Exchange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A follow-up question and a model answer."""

    ask: str
    answer: str


class Step(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of the interview."""

    name: str
    title: str
    question: str
    experiment: str  # name in `EXPERIMENTS`
    runs: str  # what it runs, in words
    predict: Prediction
    answer: str
    table: list[list[str]]  # the first row is the head
    say: str  # what one says at the whiteboard
    followups: list[Exchange]
    at_10: str
    at_10_000: str
    at_10_000_000: str
    has_diagram: bool = False


class Answer(Struct, frozen=True, kw_only=True):
    """A step with its figures in place."""

    step: Step
    figures: Figures
    measured: float  # what was to be predicted
    answer: str
    table: list[list[str]]
    say: str
    followups: list[Exchange]
    scale: dict[str, str]


@lru_cache(maxsize=1)
def all_steps() -> tuple[Step, ...]:
    """All steps in order."""
    return tuple(
        msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Step)
        for path in sorted(FOLDER.glob("*.toml"))
    )


def step_named(name: str) -> Step:
    """One step, by its name or number.

    Raises:
        RequestError: There is none.
    """
    for number, step in enumerate(all_steps(), start=1):
        if name in {step.name, str(number)}:
            return step
    names = ", ".join(step.name for step in all_steps())
    raise RequestError(f"there is no step {name}", hint=f"choose one of {names}")


def run_step(step: Step) -> Figures:
    """Run its experiment: some seconds."""
    return EXPERIMENTS[step.experiment]()


def answered(step: Step, figures: Figures) -> Answer:
    """Put figures into the texts of a step.

    Raises:
        KeyError: A text names a figure that the experiment does not give.
    """
    known = {**scale_figures(), **figures}

    def filled(text: str) -> str:
        return text.format_map(known)

    return Answer(
        step=step,
        figures=figures,
        measured=figures[step.predict.figure],
        answer=filled(step.answer),
        table=[[filled(cell) for cell in row] for row in step.table],
        say=filled(step.say),
        followups=[Exchange(ask=each.ask, answer=filled(each.answer)) for each in step.followups],
        scale={
            "10": filled(step.at_10),
            "10,000": filled(step.at_10_000),
            "10,000,000": filled(step.at_10_000_000),
        },
    )
