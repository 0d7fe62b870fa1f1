"""How far a run in virtual time is from a live one of the same scenario: completion curves side by side. Pure.

The measure is the largest relative difference of the instants at which 5, 10, ... 95 % of the fleet had the release, as
the server knew it, since the rollout began. Instants are what people ask a simulator for ("when do 95 % have it?"), and
relative ones mean the same for a rollout of minutes and of days. The largest vertical gap is told, too, but it is no
measure: where a curve is steep, a second's delay is a gap of many devices, and where it is flat, minutes are none. What
is outside of 5 to 95 % is the luck of single devices.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from msgspec import Struct

from device.states import RESTING, State

PERCENTS: Final = tuple(range(5, 100, 5))
"""Shares of the fleet that are compared."""

SHOWN_PERCENTS: Final = (10, 25, 50, 75, 90, 95)
TOLERANCE: Final = 0.15
"""Largest difference that counts as agreement."""

UNDER_WAY: Final = tuple(state.value for state in State if state not in RESTING)

Steps = Sequence[tuple[int, str]]
"""What a device did: instants in milliseconds, ascending, and the state that it entered."""


class Curve(Struct, frozen=True, kw_only=True):
    """One side."""

    reached_s: list[
        float
    ]  # when the server knew of each device that committed, since the rollout began; ascending
    counts: dict[str, int]  # devices by status at the end
    rollout: str  # its state at the end
    state_s: dict[str, float]  # time that a device spent in each state of an update, on average
    down_bytes: int  # to all devices, without headers live and with them in virtual time
    wall_s: float  # that the run took
    cpu_s: float


class Machine(Struct, frozen=True, kw_only=True):
    """What the live run had to itself."""

    processors: int
    load: float  # processes that ran or waited for a processor, on average of the last minute


class Reached(Struct, frozen=True, kw_only=True):
    """A share of the fleet on both sides; None where it was never reached."""

    percent: int
    virtual_s: float | None
    live_s: float | None
    difference: float | None  # of the virtual instant, in units of the live one


class Agreement(Struct, frozen=True, kw_only=True):
    """What the comparison says."""

    scenario: str
    seed: int
    devices: int
    broker: str
    command: str
    tolerance: float
    reached: list[Reached]
    difference: float | None  # the largest one; None if only one side got to a share
    at_percent: int  # where that is
    gap: float  # largest vertical distance of the curves, as a share of the fleet
    gap_at_s: float
    virtual: Curve
    live: Curve
    machine: Machine

    @property
    def is_within(self) -> bool:
        """Whether the sides agree."""
        return self.difference is not None and abs(self.difference) <= self.tolerance


def compared(devices: int, virtual: Sequence[float], live: Sequence[float]) -> tuple[list[Reached], Reached]:
    """Both curves at every share, and the share where they differ most."""
    rows = [_reached(percent, devices, virtual, live) for percent in PERCENTS]

    def size(row: Reached) -> float:
        if row.difference is not None:
            return abs(row.difference)
        return 0.0 if row.virtual_s is row.live_s else math.inf  # None is None: neither got there

    return rows, max(rows, key=size)


def largest_gap(devices: int, virtual: Sequence[float], live: Sequence[float]) -> tuple[float, float]:
    """Largest difference between the shares of the fleet that had it at one instant, and that instant."""
    steps = sorted([(at_s, 1) for at_s in virtual] + [(at_s, -1) for at_s in live])
    distance, worst, worst_s = 0, 0, 0.0
    for (at_s, step), following in pairwise([*steps, (math.inf, 0)]):
        distance += step
        if following[0] > at_s and abs(distance) > worst:
            worst, worst_s = abs(distance), at_s
    return worst / devices, worst_s


def state_seconds(devices: Sequence[Steps]) -> dict[str, float]:
    """Time that a device spent in each state of an update, on average."""
    totals_ms = dict.fromkeys(UNDER_WAY, 0)
    for steps in devices:
        for (from_ms, state), (to_ms, _) in pairwise(steps):
            if state in totals_ms:
                totals_ms[state] += to_ms - from_ms
    return {state: total_ms / 1_000 / len(devices) for state, total_ms in totals_ms.items()}


def points_of(devices: int, reached_s: Sequence[float]) -> list[tuple[float, float]]:
    """A curve for a plot: seconds, and per cent of the fleet."""
    return [(at_s, 100 * (index + 1) / devices) for index, at_s in enumerate(reached_s)]


def table_of(agreement: Agreement, seconds: Callable[[float], str] = "{:.1f}".format) -> list[list[str]]:
    """Rows for people: share, virtual, live, difference."""
    return [
        [
            f"p{row.percent}",
            "never" if row.virtual_s is None else seconds(row.virtual_s),
            "never" if row.live_s is None else seconds(row.live_s),
            "-" if row.difference is None else f"{100 * row.difference:+.1f} %",
        ]
        for row in agreement.reached
        if row.percent in SHOWN_PERCENTS
    ]


def verdict_of(agreement: Agreement) -> str:
    """In one sentence."""
    bar = f"{100 * agreement.tolerance:.0f} %"
    if agreement.difference is None:
        return f"The runs disagree: only one of them got to {agreement.at_percent} % of the fleet"
    size = f"{100 * abs(agreement.difference):.1f} % at p{agreement.at_percent}"
    if agreement.is_within:
        return f"The runs agree: they differ by at most {size}, allowed are {bar}"
    return f"The runs disagree: they differ by {size}, allowed are {bar}"


def _reached(percent: int, devices: int, virtual: Sequence[float], live: Sequence[float]) -> Reached:
    rank = math.ceil(
        devices * percent / 100
    )  # the nearest rank, among all devices and not those that got there
    virtual_s, live_s = (curve[rank - 1] if rank <= len(curve) else None for curve in (virtual, live))
    difference = None
    if virtual_s is not None and live_s:
        difference = (virtual_s - live_s) / live_s
    return Reached(percent=percent, virtual_s=virtual_s, live_s=live_s, difference=difference)
