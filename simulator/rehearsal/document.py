"""The rehearsal as a document: the steps, with the figures of one run, which the document carries at its end."""

from itertools import groupby
from pathlib import Path
from typing import Final

import msgspec

from device.states import TRANSITIONS, State, Trigger
from protocol.errors import RequestError
from simulator.rehearsal.experiments import Figures
from simulator.rehearsal.steps import Answer, all_steps, answered

FOLDER: Final = Path(__file__).parent / "steps"
COMMAND: Final = ".venv/bin/whimbrel-sim rehearse"
FIGURES_BEGIN: Final = "<!-- figures: "
FIGURES_END: Final = " -->\n"
INTERRUPTIONS: Final = frozenset({Trigger.REQUESTED, Trigger.WITHDRAWN})
"""Lead from nearly everywhere to the same state; without them the diagram fits on a whiteboard."""

FIGURE_DIGITS: Final = 9


def rendered(figures: dict[str, Figures]) -> str:
    """The whole document, from the figures of each step by name."""
    rounded = {
        name: {key: float(f"{value:.{FIGURE_DIGITS}g}") for key, value in each.items()}
        for name, each in figures.items()
    }
    steps = all_steps()
    contents = "\n".join(
        f"{number}. [{step.title}](#{number}-{_anchor(step.title)})"
        for number, step in enumerate(steps, start=1)
    )
    parts = [
        _text("opening.md").format(contents=contents),
        *(_chapter(number, answered(step, rounded[step.name])) for number, step in enumerate(steps, start=1)),
        _text("closing.md"),
    ]
    data = msgspec.json.encode(rounded).decode()
    return "\n".join(parts) + f"\n{FIGURES_BEGIN}{data}{FIGURES_END}"


def figures_in(document: str) -> dict[str, Figures]:
    """The figures that a document carries.

    Raises:
        RequestError: It carries none, or not those of every step.
    """
    _, _, tail = document.rpartition(FIGURES_BEGIN)
    try:
        figures = msgspec.json.decode(tail.removesuffix(FIGURES_END), type=dict[str, Figures])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RequestError("the document carries no figures", hint="write it without --reuse") from error
    missing = [step.name for step in all_steps() if step.name not in figures]
    if missing:
        raise RequestError(
            f"the document carries no figures of {missing[0]}", hint="write it without --reuse"
        )
    return figures


def drawn_transitions() -> list[list[str]]:
    """State, triggers and next state of an update on a device, without what interrupts it from outside."""
    rows = [row for row in TRANSITIONS if row.trigger not in INTERRUPTIONS or row.source is State.IDLE]
    rows.sort(key=lambda row: (row.source.value, row.target.value))
    return [
        [source.value, ", ".join(row.trigger.value for row in group), target.value]
        for (source, target), group in groupby(rows, key=lambda row: (row.source, row.target))
    ]


def _diagram() -> str:
    lines = ["```mermaid", "stateDiagram-v2", "    direction LR", f"    [*] --> {State.IDLE.value}"]
    lines += [f"    {source} --> {target}: {triggers}" for source, triggers, target in drawn_transitions()]
    return "\n".join([*lines, "```"])


def _chapter(number: int, answer: Answer) -> str:
    step = answer.step
    parts = [
        f"## {number}. {step.title}\n\n*{step.question.strip()}*",
        f"**Experiment**: {step.runs.strip()}.",
        f"**Predict first**: {step.predict.ask.strip()} ({step.predict.unit})",
        f"```\n{COMMAND} {step.name}\n```",
        f"<details><summary>The answer, with figures from that command</summary>\n\n{answer.answer.strip()}\n\n{markdown_table(answer.table)}\n\n</details>",
        f"### What to say\n\n{answer.say.strip()}",
    ]
    if step.has_diagram:
        parts.append(
            f"{_diagram()}\n\nLeft out: a new request or a withdrawal, which end an update from nearly every state."
        )
    asked = "\n\n".join(
        f"<details><summary>{each.ask.strip()}</summary>\n\n{each.answer.strip()}\n\n</details>"
        for each in answer.followups
    )
    scale = markdown_table(
        [["devices", "what changes"], *([name, text.strip()] for name, text in answer.scale.items())]
    )
    parts += [f"### Follow-up questions\n\n{asked}", f"### At 10, 10,000 and 10,000,000 devices\n\n{scale}"]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[list[str]]) -> str:
    """Rows as a table; the first is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines)


def _anchor(title: str) -> str:
    kept = "".join(each for each in title.lower() if each.isalnum() or each in " -")
    return kept.replace(" ", "-")


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
