"""The end of a run in a terminal: what happened, in a table that a person understands."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulator.report.page import headline, seconds, story, verdict
from simulator.report.record import Run

_ANSWER_WIDTH = 46


def print_summary(run: Run, console: Console) -> None:
    """Print it."""
    console.print()
    console.print(Text(headline(run), style="bold"))
    console.print(Text(story(run)))
    if run.answers:
        console.print()
        console.print(_answers(run))
    console.print()
    console.print(_checks(run))
    style = "bold green" if run.is_passed else "bold red"
    console.print(Text(f"{verdict(run)} in {seconds(run.duration_ms)}".capitalize(), style=style))


def _checks(run: Run) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("", "promised", "wanted", "measured"):
        table.add_column(title, no_wrap=title == "")
    for check in run.checks:
        mark = Text("ok", style="green") if check.is_passed else Text("NO", style="bold red")
        table.add_row(mark, Text(check.name), Text(check.wanted, style="dim"), Text(check.measured))
    return table


def _answers(run: Run) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("device", "asked", "before", "after"):
        table.add_column(title)
    for answer in run.answers:
        question = answer.prompt.removeprefix("User: ").removesuffix("\nAssistant:")
        cells = [Text(_short(text)) for text in (question, answer.before, answer.after)]
        table.add_row(answer.device, *cells)
    return table


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _ANSWER_WIDTH else line[: _ANSWER_WIDTH - 1] + "\N{HORIZONTAL ELLIPSIS}"
