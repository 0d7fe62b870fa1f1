"""`whimbrel-sim rehearse`: the interview question step by step, with a prediction, an experiment and an answer for each.

Nothing is stored, except the document that `--write` asks for.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from protocol.errors import RequestError, StorageError
from simulator.rehearsal.document import drawn_transitions, figures_in, rendered
from simulator.rehearsal.experiments import Figures
from simulator.rehearsal.steps import Answer, Step, all_steps, answered, run_step, step_named

SKIP: Final = "skip"
TRIES: Final = 3
COLUMNS: Final = 110


def add_rehearse_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `rehearse` to the commands of `whimbrel-sim`."""
    parser = commands.add_parser(
        "rehearse",
        help="work through the interview question, with an experiment for each step",
        description="Works through the question 'design a model update mechanism for embedded devices with intermittent"
        " connectivity'. Without a step it lists them; docs/rehearsal.md is the whole text.",
    )
    parser.add_argument("step", nargs="?", metavar="STEP", help="name or number of a step")
    parser.add_argument(
        "--predict", metavar="VALUE", help="your prediction, or skip; asked for on a terminal"
    )
    parser.add_argument(
        "--all", action="store_true", help="all steps, one after the other (about three minutes)"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="run all experiments and write the document"
    )
    parser.add_argument(
        "--reuse", action="store_true", help="with --write: keep the figures that FILE carries"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(action=_rehearse)


def _rehearse(arguments: argparse.Namespace, command: str, output: TextIO, errors: TextIO) -> int:
    del command
    if arguments.reuse and arguments.write is None:
        raise RequestError("--reuse goes with --write FILE")
    if arguments.write is not None:
        _write(arguments.write, errors, is_reused=arguments.reuse)
        return 0
    if arguments.step is None and not arguments.all:
        _list(arguments, output)
        return 0
    if arguments.all and (arguments.step or arguments.predict != SKIP):
        raise RequestError("--all takes no step and makes no predictions", hint="add --predict skip")
    steps = all_steps() if arguments.all else (step_named(arguments.step),)
    found = []
    for step in steps:
        if not arguments.json:
            _print_question(step, output)
        predicted = _prediction(step, arguments, output)
        print(f"running: {step.runs.strip()}", file=errors if arguments.json else output)
        answer = answered(step, run_step(step))
        found.append(_document(answer, predicted))
        if not arguments.json:
            _print_answer(answer, predicted, output)
    if arguments.json:
        print(msgspec.json.encode(found).decode(), file=output)
    return 0


def _list(arguments: argparse.Namespace, output: TextIO) -> None:
    steps = all_steps()
    if arguments.json:
        print(msgspec.json.encode(steps).decode(), file=output)
        return
    for number, step in enumerate(steps, start=1):
        print(f"{number}  {step.name:14}{step.title}", file=output)
    print(
        f"\nBegin with `whimbrel-sim rehearse {steps[0].name}`: it asks, you predict, it measures. The whole text is docs/rehearsal.md.",
        file=output,
    )


def _prediction(step: Step, arguments: argparse.Namespace, output: TextIO) -> float | None:
    """What the user says beforehand; None for no prediction."""
    given: str | None = arguments.predict
    if given is not None:
        return None if given == SKIP else _number(given)
    if not sys.stdin.isatty() or arguments.json:
        raise RequestError(
            f"{step.name} wants a prediction first", hint="add --predict VALUE, or --predict skip"
        )
    for _ in range(TRIES):
        print(f"your prediction in {step.predict.unit} (Enter to skip): ", end="", file=output, flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            return None
        try:
            return _number(text)
        except RequestError as error:
            print(error, file=output)
    return None


def _number(text: str) -> float:
    try:
        value = float(text.replace(",", "").rstrip("%"))
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise RequestError(f"{text!r} is no number", hint="give a number like 12.5, or skip")
    return value


def _print_question(step: Step, output: TextIO) -> None:
    print(f"\n{step.title}\n{'=' * len(step.title)}\n\n{step.question.strip()}\n", file=output)
    print(f"Predict first: {step.predict.ask.strip()} ({step.predict.unit})", file=output)


def _print_answer(answer: Answer, predicted: float | None, output: TextIO) -> None:
    step = answer.step
    unit = step.predict.unit
    print(f"\nMeasured: {answer.measured:,.4g} {unit}", file=output)
    if predicted is not None:
        print(f"You said: {predicted:,.4g} {unit}{_compared(predicted, answer.measured)}", file=output)
    print(f"\n{_flowed(answer.answer)}\n", file=output)
    _print_table(answer.table, output)
    print(f"\nWhat to say\n-----------\n{_flowed(answer.say)}", file=output)
    if step.has_diagram:
        print(file=output)
        _print_table([["state", "trigger", "next state"], *drawn_transitions()], output)
    print("\nFollow-up questions\n-------------------", file=output)
    for each in answer.followups:
        print(f"{_flowed(f'Q: {each.ask}')}\n{_flowed(f'A: {each.answer}')}\n", file=output)
    print("At 10, 10,000 and 10,000,000 devices\n------------------------------------", file=output)
    for name, text in answer.scale.items():
        print(_flowed(f"{name}: {text}"), file=output)


def _compared(predicted: float, measured: float) -> str:
    if predicted == measured:
        return ": exactly"
    if predicted <= 0 or measured <= 0:
        return ""
    factor = max(predicted / measured, measured / predicted)
    return f": within {factor - 1:.0%}" if factor < 2 else f": off by a factor of {factor:,.1f}"


def _flowed(text: str) -> str:
    """Paragraphs and list items in lines that fit; tables and code as they are."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if block.startswith(("|", "```")):
            blocks.append(block)
            continue
        items = re.split(r"\n(?=- |\d+\. )", block)
        blocks.append(
            "\n".join(
                textwrap.fill(
                    " ".join(item.split()), COLUMNS, subsequent_indent="   " if len(items) > 1 else ""
                )
                for item in items
            )
        )
    return "\n\n".join(blocks)


def _print_table(rows: list[list[str]], output: TextIO) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(),
            file=output,
        )


def _document(answer: Answer, predicted: float | None) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(answer)
    return {**fields, "predicted": predicted}


def _write(path: Path, errors: TextIO, *, is_reused: bool) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise StorageError(f"{path} cannot be written", hint="choose another --write")
    try:
        figures = figures_in(path.read_text(encoding="utf-8")) if is_reused else _measured(errors)
        path.write_text(rendered(figures), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="choose another --write") from error


def _measured(errors: TextIO) -> dict[str, Figures]:
    figures = {}
    for step in all_steps():
        print(f"{step.name}: {step.runs.strip()}", file=errors)
        figures[step.name] = run_step(step)
    return figures
