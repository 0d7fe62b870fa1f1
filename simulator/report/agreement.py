"""The page about one scenario in virtual time and live: both curves, and where they differ."""

from pathlib import Path
from typing import Final

from markupsafe import Markup

from simulator.agreement import Agreement, points_of, table_of, verdict_of
from simulator.report.files import write_page
from simulator.report.fleet_bands import FLEET_CLASSES
from simulator.report.fleet_charts import completion
from simulator.report.templates import render
from simulator.report.units import devices, duration, size

CLASSES: Final = {"virtual": "fetching", "live": "back"}
"""Colours of the two sides."""


def write_agreement(path: Path, agreement: Agreement) -> None:
    """Write the page.

    Raises:
        StorageError: The file cannot be written.
    """
    write_page(path, render_agreement(agreement))


def render_agreement(agreement: Agreement) -> str:
    """The page: a complete document that needs nothing from outside."""
    sides = {"virtual": agreement.virtual, "live": agreement.live}
    curves = [
        (name, CLASSES[name], points_of(agreement.devices, curve.reached_s))
        for name, curve in sides.items()
        if curve.reached_s
    ]
    states = [
        (state, _seconds(agreement.virtual.state_s[state]), _seconds(agreement.live.state_s[state]))
        for state in agreement.virtual.state_s
        if agreement.virtual.state_s[state] or agreement.live.state_s[state]
    ]
    return render(
        "agreement.html.j2",
        agreement=agreement,
        verdict=verdict_of(agreement),
        classes=CLASSES,
        seconds=_seconds,
        kinds=FLEET_CLASSES,
        sides=sides,
        rows=table_of(agreement, _seconds),
        states=states,
        curve=Markup(completion(curves)) if curves else "",  # noqa: S704 - built by us, every text in it is escaped
        devices=devices,
        duration=duration,
        size=size,
    )


def _seconds(value: float) -> str:
    """All in one unit, so that columns can be compared."""
    return f"{value:,.1f}\N{NO-BREAK SPACE}s"
