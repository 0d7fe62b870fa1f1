"""The end of a run in a terminal: what happened, in a table that a person understands."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulator.report.page import headline, question, seconds, story, verdict
from simulator.report.record import Run


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
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column()
    for check in run.checks:
        mark = Text("ok", style="green") if check.is_passed else Text("NO", style="bold red")
        measured = Text(check.measured)
        if not check.is_passed:
            measured.append(f" (wanted: {check.wanted})", style="bold red")
        table.add_row(mark, Text(check.name), measured)
    return table


def _answers(run: Run) -> Table:
    """What was answered before and after; devices that answer alike are told together."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for answer in run.answers:
        alike.setdefault((answer.prompt, answer.before, answer.after), []).append(answer.device)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for (prompt, before, after), devices in alike.items():
        who = f"all {len(devices)} devices" if len(devices) == len(run.devices) else ", ".join(devices)
        table.add_row("asked", Text(f"{question(prompt)}  ({who})", style="bold"))
        table.add_row("before", Text(" ".join(before.split())))
        table.add_row("after", Text(" ".join(after.split())))
    return table
