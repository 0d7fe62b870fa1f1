"""Small parts of which plots are made: scales, ticks, axes, text. Pure; colours are classes that the page's style defines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

TICK_STEPS: Final = (1, 2, 5, 10)
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

    @property
    def bottom(self) -> float:
        """Ordinate of the lower edge."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """Abscissa of the right edge."""
        return self.left + self.width


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


def axes(
    frame: Frame, *, x_title: str, y_title: str, y_format: str = "{:.0f}", y_ticks: int = 5
) -> list[str]:
    """Grid, tick labels and titles."""
    parts = []
    for value in ticks(0, frame.y_to, y_ticks):
        y = frame.y(value)
        parts.append(line(frame.left, y, frame.right, y, "grid"))
        parts.append(text(frame.left - 8, y + 4, y_format.format(value), anchor="end"))
    for value in ticks(frame.x_from, frame.x_to, 8):
        x = frame.x(value)
        parts.append(line(x, frame.bottom, x, frame.bottom + 5, "tick"))
        parts.append(text(x, frame.bottom + 19, number(value), anchor="middle"))
    parts.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(text(frame.right, frame.bottom + 38, x_title, kind="title", anchor="end"))
    parts.append(text(frame.left - 40, frame.top - 10, y_title, kind="title"))
    return parts


def picture(width: float, height: float, parts: Sequence[str], description: str) -> str:
    """The whole drawing, with a description for those who cannot see it."""
    size = f'viewBox="0 0 {number(width)} {number(height)}"'
    return f'<svg {size} role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
