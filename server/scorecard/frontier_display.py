"""A frontier for people: as a table, as lines of text, and as a plot. Pure."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from msgspec import UNSET

from server.display import bytes_text, table
from server.scorecard.frontier import Frontier, HeldOut, Point, Standing, standings
from server.scorecard.statistics import Interval

TITLES: Final = ["", "FILE", "BYTES", "OF THE FILE", "KL, NATS", "95 %", "FLIPS", "95 %", "GAIN KEPT", "95 %"]
HELD_OUT_TITLES: Final = ["TEXT", "TOKENS", "FILE", "KL, NATS", "95 %", "FLIPS", "95 %"]

WIDTH: Final = 680
HEIGHT: Final = 270
_LEFT: Final = 70
_RIGHT: Final = 150
_TOP: Final = 14
_BOTTOM: Final = 44
_STEPS: Final = 4
_NAME_MAX: Final = 26
_KINDS: Final = {"best": "v2", "best?": "v2", "beaten": "neutral"}


def text_lines(frontier: Frontier) -> list[str]:
    """Everything."""
    return [
        f"Bytes against quality, measured on {frontier.text}, {frontier.tokens:,} tokens",
        *table(TITLES, point_rows(frontier)),
        *(f"  {line}" for line in beaten_lines(frontier)),
        *(f"  {note}" for note in frontier.notes),
        f"How it was chosen: {choice_text(frontier)}",
        *table(HELD_OUT_TITLES, held_out_rows(frontier)),
    ]


def point_rows(frontier: Frontier) -> list[list[str]]:
    """The points, each with what it is among the others."""
    found = standings(frontier)
    return [
        [
            found[each.name].mark,
            named(frontier, each),
            f"{each.delta_bytes:,}",
            f"{100 * each.delta_bytes / frontier.file_bytes:.3f} %",
            *nats(each.kl),
            *shares(each.flips),
            *(("-", "-") if each.gain is None else shares(each.gain)),
        ]
        for each in frontier.points
    ]


def beaten_lines(frontier: Frontier, found: dict[str, Standing] | None = None) -> list[str]:
    """Which points another one beats, or would beat."""
    lines = []
    for name, standing in (found or standings(frontier)).items():
        if standing.surely:
            lines.append(f"{name} is beaten by {', '.join(standing.surely)}")
        elif standing.perhaps:
            lines.append(
                f"{name} would be beaten by {', '.join(standing.perhaps)}, if that is no worse where the text does not say"
            )
    return lines


def choice_text(frontier: Frontier) -> str:
    """How the point was chosen, and whether the file was written."""
    rule = frontier.rule
    words = {
        "budget": f"{rule.budget}, as the budget was named before anything was measured",
        "keep": f"the fewest bytes that keep {100 * rule.keep_share:g} % of plain's gain on {frontier.text}, no farther from the float model than plain",
        "no worse": f"the fewest bytes that are shown to be no worse than plain on {frontier.text}, in divergence by {100 * rule.kl_share:g} % of"
        f" plain's and in flips by {100 * rule.flips:g} points",
    }[rule.kind]
    if not frontier.chosen:
        return f"none; wanted were {words}"
    parts = [words if rule.kind == "budget" else f"{frontier.chosen}, {words}"]
    if frontier.extrapolation:
        parts.append(f"aimed beyond the new weights by {frontier.extrapolation:g} of the way to them")
    if frontier.held_out and frontier.result is UNSET:
        parts.append("not written, as it did not pass on the held-out texts")
    return "; ".join(parts)


def held_out_rows(frontier: Frontier) -> list[list[str]]:
    """How the chosen file was judged, beside plain."""
    return [row for each in frontier.held_out for row in _held_out(each)]


def _held_out(each: HeldOut) -> list[list[str]]:
    return [
        [each.text, f"{each.tokens:,}", "chosen", *nats(each.kl), *shares(each.flips)],
        ["", "", "plain", *nats(each.plain_kl), *shares(each.plain_flips)],
    ]


def named(frontier: Frontier, point: Point) -> str:
    """Name of a point, and whether it was chosen."""
    return f"{point.name} (chosen)" if point.name == frontier.chosen else point.name


def nats(interval: Interval) -> tuple[str, str]:
    """A mean divergence and its interval."""
    return f"{interval.value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"


def shares(interval: Interval) -> tuple[str, str]:
    """A share and its interval."""
    return f"{100 * interval.value:.1f} %", f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def plot(
    frontier: Frontier,
    found: dict[str, Standing],
    bytes_of: Callable[[Point], int],
    axis: str,
    description: str,
) -> str:
    """Divergence over bytes, these on a logarithmic scale; files of no bytes are a line. As SVG in the style of our pages.

    Args:
        frontier: The points.
        found: What beats them.
        bytes_of: What a point weighs.
        axis: Of the bytes, for people.
        description: Of the plot, for who does not see it.

    Returns:
        "" where fewer than two points weigh anything.
    """
    sent = [each for each in frontier.points if bytes_of(each) > 0]
    if len(sent) < 2:
        return ""
    scale = _Scale([bytes_of(each) for each in sent], max(each.kl.high for each in frontier.points))
    parts = _axes(scale, axis)
    for each in frontier.points:
        if bytes_of(each) <= 0:
            parts += _line(scale, each)
    parts += [_dot(frontier, scale, each, found[each.name], bytes_of(each)) for each in sent]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


class _Scale:
    """Where a point stands in the picture."""

    def __init__(self, counts: Sequence[int], kl_max: float) -> None:
        self.low = (
            math.floor(math.log10(min(counts)) * 3) / 3
        )  # ends are about 1, 2 or 5 times a power of ten
        self.high = max(math.ceil(math.log10(max(counts)) * 3) / 3, self.low + 1 / 3)
        self.kl_max = kl_max or 1.0

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
    for step in range(_STEPS + 1):
        y = scale.y(scale.kl_max * step / _STEPS)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{scale.kl_max * step / _STEPS:.2g}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>'
    )
    parts.append(
        f'<text x="0" y="0" transform="translate(14 {bottom / 2:.0f}) rotate(-90)" text-anchor="middle">KL, nats</text>'
    )
    return parts


def _line(scale: _Scale, point: Point) -> list[str]:
    y, right = scale.y(point.kl.value), WIDTH - _RIGHT
    return [
        f'<line class="axis" stroke-dasharray="5 5" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text x="{right + 8}" y="{y + 4:.1f}">{escape(_short(point.name))}</text>',
    ]


def _dot(frontier: Frontier, scale: _Scale, point: Point, standing: Standing, count: int) -> str:
    x, y = scale.x(count), scale.y(point.kl.value)
    is_chosen = point.name == frontier.chosen
    words = f"{point.name}{', chosen' if is_chosen else ''}"
    title = f"{words}, {standing.mark}: {bytes_text(count)}, {point.kl.value:.4f} nats ({point.kl.low:.4f} to {point.kl.high:.4f})"
    ring = f'<circle class="axis" cx="{x:.1f}" cy="{y:.1f}" r="10" style="fill: none"/>' if is_chosen else ""
    weight = ' class="strong"' if is_chosen else ""
    return (
        f'<g class="{_KINDS[standing.mark]}"><title>{escape(title)}</title>'
        f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.y(point.kl.low):.1f}" y2="{scale.y(point.kl.high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>{ring}'
        f'<text{weight} x="{x + 12:.1f}" y="{y - 8:.1f}">{escape(_short(words))}</text></g>'
    )


def _short(name: str) -> str:
    return name if len(name) <= _NAME_MAX else f"{name[: _NAME_MAX - 1]}…"
