"""A frontier as a picture: divergence over bytes. Pure."""

import math
from collections.abc import Sequence
from html import escape
from typing import Final, NamedTuple

from server.display import bytes_text
from server.scorecard.statistics import Interval

WIDTH: Final = 680
HEIGHT: Final = 270
_LEFT: Final = 70
_RIGHT: Final = 150
_TOP: Final = 14
_BOTTOM: Final = 44
_STEPS: Final = 4
_NAME_MAX: Final = 26
_KINDS: Final = {"best": "v2", "best?": "v2", "beaten": "neutral"}


class Dot(NamedTuple):
    """A point.

    Attributes:
        name: For people.
        bytes: What it weighs; 0 makes it a line.
        kl: Its divergence, nats.
        mark: What it is among the others: a key of the kinds of points that there are.
        is_chosen: Whether it has a ring.
    """

    name: str
    bytes: int
    kl: Interval
    mark: str
    is_chosen: bool


def plot(dots: Sequence[Dot], axis: str, description: str) -> str:
    """Divergence over bytes, these on a logarithmic scale, as SVG in the style of our pages; what weighs nothing is a line.

    Args:
        dots: The points.
        axis: Of the bytes, for people.
        description: Of the picture, for who does not see it.

    Returns:
        "" where fewer than two points weigh anything.
    """
    sent = [each for each in dots if each.bytes > 0]
    if len(sent) < 2:
        return ""
    scale = _Scale([each.bytes for each in sent], max(each.kl.high for each in dots))
    parts = _axes(scale, axis)
    for each in dots:
        if each.bytes <= 0:
            parts += _line(scale, each)
    parts += [_dot(scale, each) for each in sent]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


class _Scale:
    """Where a point stands in the picture."""

    def __init__(self, counts: Sequence[int], kl_max: float) -> None:
        self.low = (
            math.floor(math.log10(min(counts)) * 3) / 3
        )  # ends are about 1, 2 or 5 times a power of ten
        self.high = max(math.ceil(math.log10(max(counts)) * 3) / 3, self.low + 1 / 3)
        self.kl_step = _round_up((kl_max or 1.0) / _STEPS)
        self.kl_max = self.kl_step * math.ceil((kl_max or 1.0) / self.kl_step - 1e-9)

    def x(self, count: float) -> float:
        share = (math.log10(count) - self.low) / (self.high - self.low)
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * share

    def y(self, kl: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * kl / self.kl_max

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; powers alone where those are many."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1, 2, 5) if self.high - self.low <= 2 else (1,)
        found = [factor * 10.0**power for power in powers for factor in factors]
        slack = 1e-9
        return [each for each in found if self.low - slack <= math.log10(each) <= self.high + slack]


def _axes(scale: _Scale, axis: str) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in scale.ticks():
        x = scale.x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{bytes_text(round(tick)).replace(".0 ", " ")}</text>'
        )
    for step in range(round(scale.kl_max / scale.kl_step) + 1):
        y = scale.y(scale.kl_step * step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{scale.kl_step * step:.3g}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>'
    )
    parts.append(
        f'<text x="0" y="0" transform="translate(14 {bottom / 2:.0f}) rotate(-90)" text-anchor="middle">KL, nats</text>'
    )
    return parts


def _line(scale: _Scale, dot: Dot) -> list[str]:
    y, right = scale.y(dot.kl.value), WIDTH - _RIGHT
    return [
        f'<line class="axis" stroke-dasharray="5 5" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text x="{right + 8}" y="{y + 4:.1f}">{escape(_short(dot.name))}</text>',
    ]


def _dot(scale: _Scale, dot: Dot) -> str:
    x, y = scale.x(dot.bytes), scale.y(dot.kl.value)
    words = f"{dot.name}, chosen" if dot.is_chosen else dot.name
    title = f"{words}, {dot.mark}: {bytes_text(dot.bytes)}, {dot.kl.value:.4f} nats ({dot.kl.low:.4f} to {dot.kl.high:.4f})"
    ring = (
        f'<circle class="axis" cx="{x:.1f}" cy="{y:.1f}" r="10" style="fill: none"/>' if dot.is_chosen else ""
    )
    weight = ' class="strong"' if dot.is_chosen else ""
    return (
        f'<g class="{_KINDS[dot.mark]}"><title>{escape(title)}</title>'
        f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.y(dot.kl.low):.1f}" y2="{scale.y(dot.kl.high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>{ring}'
        f'<text{weight} x="{x + 12:.1f}" y="{y - 8:.1f}">{escape(_short(words))}</text></g>'
    )


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _short(name: str) -> str:
    return name if len(name) <= _NAME_MAX else f"{name[: _NAME_MAX - 1]}…"
