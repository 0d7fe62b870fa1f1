"""Small parts of which plots are made: scales, ticks, axes, text. Pure; colours are classes that the page's style defines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

TICK_STEPS: Final = (1, 2, 5, 10)
X_TICKS: Final = 8
LOG_DECADES_WIDE: Final = 4
BAND_CLASSES: Final = {
    "runs v0": "v0",
    "runs v1": "v1",
    "fetching": "fetching",
    "offline": "offline",
    "killed": "killed",
    "installing": "installing",
    "trial": "trial",
    "rolled back": "back",
    "runs v3": "v3",
    "runs v2": "v2",
}
"""CSS class of what a device is doing, in the order in which an update passes through it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The inner rectangle of a plot and the values at its edges."""

    left: float
    top: float
    width: float
    height: float
    x_from: float
    x_to: float
    y_to: float = 1.0

    def x(self, value: float) -> float:
        """Abscissa of a value."""
        span = self.x_to - self.x_from or 1.0
        return self.left + (value - self.x_from) / span * self.width

    def y(self, value: float) -> float:
        """Ordinate of a value; zero is at the bottom."""
        return self.top + self.height - value / (self.y_to or 1.0) * self.height

    def x_ticks(self) -> list[tuple[float, str]]:
        """Values that are marked on the abscissa, and what is written there."""
        return [(value, number(value)) for value in ticks(self.x_from, self.x_to, X_TICKS)]

    @property
    def bottom(self) -> float:
        """Ordinate of the lower edge."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """Abscissa of the right edge."""
        return self.left + self.width


class LogFrame(Frame):
    """A frame with a logarithmic abscissa, for values of which some are a hundred times others; both ends above 0."""

    def x(self, value: float) -> float:
        """As `Frame.x`; what is below the left end is drawn there."""
        position = math.log(max(value, self.x_from) / self.x_from) / math.log(self.x_to / self.x_from)
        return self.left + position * self.width

    def x_ticks(self) -> list[tuple[float, str]]:
        """As `Frame.x_ticks`: powers of ten, with 2 and 5 between them where there is room."""
        decades = range(math.floor(math.log10(self.x_from)), math.ceil(math.log10(self.x_to)) + 1)
        factors = (1, 2, 5) if len(decades) <= LOG_DECADES_WIDE else (1,)
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        return [(value, f"{value:,.6g}") for value in values if self.x_from <= value <= self.x_to]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values from `low` to `high`, about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / max(1, count)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor for factor in TICK_STEPS if factor * magnitude >= raw * 0.999) * magnitude
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A coordinate or a tick label, short."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def text(x: float, y: float, content: str, *, kind: str = "label", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    """A rectangle; `title` is shown on hovering and read aloud."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    shape = (
        f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    )
    return f'<rect class="{kind}" {shape}>{inner}</rect>'


def circle(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    """A dot."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}">{inner}</circle>'


def area(
    frame: Frame, low: Sequence[float], high: Sequence[float], width: float, kind: str, title: str
) -> str:
    """A band between two step lines of equally wide columns."""
    upper, lower = [], []
    for column, (bottom, top) in enumerate(zip(low, high, strict=True)):
        left, right = number(frame.left + column * width), number(frame.left + (column + 1) * width)
        upper.append(f"{left},{number(frame.y(top))} {right},{number(frame.y(top))}")
        lower.append(f"{right},{number(frame.y(bottom))} {left},{number(frame.y(bottom))}")
    points = " ".join(upper + lower[::-1])
    return f'<polygon class="{kind}" points="{points}"><title>{escape(title)}</title></polygon>'


def polyline(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> str:
    """A line through points of the drawing."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}">{inner}</polyline>'


def axes(
    frame: Frame, *, x_title: str, y_title: str, y_format: str = "{:.0f}", y_ticks: int = 5
) -> list[str]:
    """Grid, tick labels and titles."""
    parts = []
    for value in ticks(0, frame.y_to, y_ticks):
        y = frame.y(value)
        parts.append(line(frame.left, y, frame.right, y, "grid"))
        parts.append(text(frame.left - 8, y + 4, y_format.format(value), anchor="end"))
    for value, label in frame.x_ticks():
        x = frame.x(value)
        parts.append(line(x, frame.bottom, x, frame.bottom + 5, "tick"))
        parts.append(text(x, frame.bottom + 19, label, anchor="middle"))
    parts.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(text(frame.right, frame.bottom + 38, x_title, kind="title", anchor="end"))
    parts.append(text(frame.left - 40, frame.top - 10, y_title, kind="title"))
    return parts


def picture(width: float, height: float, parts: Sequence[str], description: str) -> str:
    """The whole drawing, with a description for those who cannot see it."""
    size = f'viewBox="0 0 {number(width)} {number(height)}"'
    return f'<svg {size} role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
