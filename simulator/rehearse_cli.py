"""`whimbrel-sim rehearse`: the interview question step by step, with a prediction, an experiment and an answer for each.

Nothing is stored, except the document that `--write` asks for.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec
from rich.console import Console
from rich.markdown import Markdown

from protocol.errors import RequestError, StorageError
from simulator.rehearsal.document import drawn_transitions, figures_in, markdown_table, rendered
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
        "--all", action="store_true", help="all steps, one after the other (one to three minutes)"
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
    ask = f"{step.predict.ask.strip()} ({step.predict.unit})"
    _print(f"# {step.title}\n\n{step.question}\n\n**Predict first:** {ask}", output)


def _print_answer(answer: Answer, predicted: float | None, output: TextIO) -> None:
    step, unit = answer.step, answer.step.predict.unit
    measured = f"Measured: {answer.measured:,.4g} {unit}"
    if predicted is not None:
        measured += f"\n\nYou said: {predicted:,.4g} {unit}{_compared(predicted, answer.measured)}"
    said = answer.say
    if step.has_diagram:
        said += "\n\n" + markdown_table([["state", "trigger", "next state"], *drawn_transitions()])
    asked = "\n\n".join(f"**{each.ask.strip()}**\n\n{each.answer.strip()}" for each in answer.followups)
    scale = "\n".join(f"- **{name}:** {text.strip()}" for name, text in answer.scale.items())
    parts = [
        measured,
        answer.answer,
        markdown_table(answer.table),
        "## What to say",
        said,
        "## Follow-up questions",
        asked,
        "## At 10, 10,000 and 10,000,000 devices",
        scale,
    ]
    _print("\n\n".join(parts), output)


def _print(text: str, output: TextIO) -> None:
    console = Console(file=output, highlight=False)
    with console.capture() as shown:
        console.print(Markdown(text, hyperlinks=False), width=min(console.width, COLUMNS))
    print(f"\n{shown.get()}", file=output)


def _compared(predicted: float, measured: float) -> str:
    if predicted == measured:
        return ": exactly"
    if predicted <= 0 or measured <= 0:
        return ""
    factor = max(predicted / measured, measured / predicted)
    return f": within {factor - 1:.0%}" if factor < 2 else f": off by a factor of {factor:,.1f}"


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
    except KeyError as error:
        raise RequestError(f"{path} carries no figure {error}", hint="write it without --reuse") from error


def _measured(errors: TextIO) -> dict[str, Figures]:
    figures = {}
    for step in all_steps():
        print(f"{step.name}: {step.runs.strip()}", file=errors)
        figures[step.name] = run_step(step)
    return figures
