"""The time axis of a run: from the first rollout to the end, with long times of few changes cut short. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from simulator.report.svg import Frame, line, rect, ticks
from simulator.report.units import duration

BREAKS_MAX: Final = 6
BREAK_SHARE: Final = 0.1
"""A quiet time is cut short when it is more than this share of all the rest."""

BREAK_WIDTH: Final = 0.04
"""Of the axis, for each quiet time."""

MARGIN_SHARE: Final = 0.02
TICKS: Final = 9
STRETCH_TICKS: Final = 3
"""Between two breaks, at the least, as far as there is room."""

TICK_ROOM: Final = 40
"""Between two labels, in the units of the drawing."""

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3_600.0, 86_400.0
_UNITS: Final = (
    (3 * _DAY_S, _DAY_S, "days"),
    (3 * _HOUR_S, _HOUR_S, "hours"),
    (5 * _MINUTE_S, _MINUTE_S, "minutes"),
)


@dataclass(frozen=True, slots=True)
class TimeScale:
    """Instants in seconds, and where they are between 0 and 1.

    Attributes:
        knots: Instant and position, ascending; straight in between.
        breaks: Times that are cut short, since little changed.
        zero_s: Instant that is called 0.
        unit_s: Length of the unit on the axis.
        unit: Its name.
    """

    knots: tuple[tuple[float, float], ...]
    breaks: tuple[tuple[float, float], ...]
    zero_s: float
    unit_s: float
    unit: str

    def position(self, at_s: float) -> float:
        """Where an instant is; what is outside is at the nearer end."""
        return _between(at_s, self.knots)

    def instant(self, position: float) -> float:
        """The instant at a position, in seconds."""
        return _between(position, [(where, at_s) for at_s, where in self.knots])


def time_scale(begin_s: float, end_s: float, active_s: Sequence[float]) -> TimeScale:
    """An axis.

    Args:
        begin_s: Called 0; a little before it is shown, too.
        end_s: The end.
        active_s: Instants between two of which little enough happened to be cut short, ascending.
    """
    end_s = max(end_s, begin_s + 1e-3)
    breaks = _breaks([begin_s, *(at_s for at_s in active_s if begin_s < at_s < end_s), end_s])
    shown_s = end_s - begin_s - sum(late - early for early, late in breaks)
    first_s = max(0.0, begin_s - MARGIN_SHARE * shown_s)
    shown_s += begin_s - first_s
    part = (1.0 - BREAK_WIDTH * len(breaks)) / shown_s
    knots, at_s, position = [(first_s, 0.0)], first_s, 0.0
    for early, late in breaks:
        position += (early - at_s) * part
        knots += [(early, position), (late, position + BREAK_WIDTH)]
        at_s, position = late, position + BREAK_WIDTH
    knots.append((end_s, 1.0))
    unit_s, unit = next(
        ((length, name) for least, length, name in _UNITS if shown_s >= least), (1.0, "seconds")
    )
    return TimeScale(tuple(knots), tuple(breaks), begin_s, unit_s, unit)


def _breaks(instants: Sequence[float]) -> list[tuple[float, float]]:
    """Which of the times between instants are cut short: the longest, as long as they are much of all the rest."""
    gaps = sorted(((late - early, early, late) for early, late in pairwise(instants)), reverse=True)
    rest, breaks = instants[-1] - instants[0], []
    for length, early, late in gaps[:BREAKS_MAX]:
        if length <= BREAK_SHARE * (rest - length):
            break
        rest -= length
        margin = min(MARGIN_SHARE * rest, length / 10)
        breaks.append((early + margin, late - margin))
    return sorted(breaks)


@dataclass(frozen=True, slots=True)
class TimeFrame(Frame):
    """A frame whose abscissa is a time axis."""

    scale: TimeScale | None = None

    def x(self, value: float) -> float:
        """Abscissa of an instant."""
        assert self.scale is not None
        return self.left + self.scale.position(value) * self.width

    def x_ticks(self) -> list[tuple[float, str]]:
        """As `Frame.x_ticks`: round times in each stretch between two breaks."""
        scale = self.scale
        assert scale is not None
        edges = [scale.knots[0][0], *(edge for pair in scale.breaks for edge in pair), scale.knots[-1][0]]
        marks: list[tuple[float, str]] = []
        for early, late in zip(edges[::2], edges[1::2], strict=True):
            share = scale.position(late) - scale.position(early)
            low, high = (early - scale.zero_s) / scale.unit_s, (late - scale.zero_s) / scale.unit_s
            for value in ticks(low, high, max(STRETCH_TICKS, round(TICKS * share))):
                at_s = value * scale.unit_s + scale.zero_s
                if not marks or self.x(at_s) - self.x(marks[-1][0]) > TICK_ROOM:
                    marks.append((at_s, f"{value:,.6g}"))
        return marks

    def break_marks(self) -> list[str]:
        """Where time is cut short, and by how much."""
        scale = self.scale
        assert scale is not None
        parts = []
        for early, late in scale.breaks:
            left, right = self.x(early), self.x(late)
            title = f"{duration(late - early)} in which little changed"
            parts.append(rect(left, self.top, right - left, self.height, "quiet", title))
            parts += [line(x, self.top, x, self.bottom, "cutline") for x in (left, right)]
        return parts


def time_frame(
    left: float, top: float, width: float, height: float, scale: TimeScale, y_to: float
) -> TimeFrame:
    """A frame over a time axis."""
    return TimeFrame(left, top, width, height, scale.knots[0][0], scale.knots[-1][0], y_to, scale)


def _between(value: float, knots: Sequence[tuple[float, float]]) -> float:
    if value <= knots[0][0]:
        return knots[0][1]
    if value >= knots[-1][0]:
        return knots[-1][1]
    index = bisect_right(knots, value, key=lambda knot: knot[0])
    (x0, y0), (x1, y1) = knots[index - 1], knots[index]
    return y0 + (value - x0) / ((x1 - x0) or 1.0) * (y1 - y0)
