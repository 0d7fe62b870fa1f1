"""The trade-off report as a page of its own. Pure."""

from collections.abc import Sequence
from html import escape
from typing import Final

from markupsafe import Markup

from server.display import bytes_text
from server.templates import template
from server.tradeoffs.frontiers import TITLES, headline, option_rows, picture, why_lines
from server.tradeoffs.records import Candidate, Option, TierTable, TradeoffReport
from server.tradeoffs.text import (
    COMPARISON_TITLES,
    DRIFT_TITLES,
    OPTION_TITLES,
    VERSION_TITLES,
    comparison_rows,
    drift_rows,
    mark,
    missing_lines,
    option_lines,
    option_row,
    tier_text,
    version_rows,
)

_WIDTH: Final = 680
_HEIGHT: Final = 250
_LEFT: Final = 70
_RIGHT: Final = 150
_BOTTOM: Final = 44
_STEPS: Final = 4

_KINDS: Final = {"best": "v2", "best?": "v2", "beaten": "neutral", "refused": "back", "out": "neutral"}


def render(report: TradeoffReport) -> str:
    """The page."""
    return template("tradeoffs/page.html.j2").render(
        report=report,
        headline=_headline(report),
        tables=[
            ("Right answers", VERSION_TITLES, version_rows(report), 5),
            ("Drift, and one inference", DRIFT_TITLES, drift_rows(report), 1),
            ("Any two of them", COMPARISON_TITLES, comparison_rows(report), 3),
        ],
        option_titles=OPTION_TITLES,
        frontier_titles=TITLES,
        tiers=[
            (
                table,
                tier_text(table),
                Markup(_plot(report, table)),  # noqa: S704 - built by us, every text in it is escaped
                [option_row(option, report.currency) for option in table.options],
                [line for option in table.options for line in option_lines(option)],
                [
                    (
                        headline(each),
                        Markup(picture(each, table.name)),  # noqa: S704 - likewise
                        option_rows(each, report.currency),
                        why_lines(each),
                    )
                    for each in table.frontiers
                ],
            )
            for table in report.tiers
        ],
        missing=list(missing_lines(report)) if report.missing else [],
    )


def _headline(report: TradeoffReport) -> str:
    after = f", compared with {report.reference}" if report.reference else ""
    return f"{report.family}: {', '.join(each.version for each in report.candidates)}{after}"


def _plot(report: TradeoffReport, table: TierTable) -> str:
    """Drift over bytes to each device; nothing where fewer than two versions have both."""
    known = [
        (option, each)
        for option, each in zip(table.options, report.candidates, strict=True)
        if each.drift is not None
    ]
    if len(known) < 2:
        return ""
    x_max = max(option.air.mean_bytes for option, _ in known) or 1.0
    y_max = max(each.drift.mean.high for _, each in known if each.drift is not None) or 1.0
    parts = list(_axes(x_max, y_max))
    parts += [_point(option, each, x_max, y_max) for option, each in known]
    description = f"Drift from {report.reference} over bytes to each device of {table.name}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def _axes(x_max: float, y_max: float) -> Sequence[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for step in range(_STEPS + 1):
        x = _x(x_max * step / _STEPS, x_max)
        y = _y(y_max * step / _STEPS, y_max)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="{bottom}"/>')
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{bytes_text(round(x_max * step / _STEPS))}</text>'
        )
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{y_max * step / _STEPS:.3g}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">over the air, to each device</text>'
    )
    middle = (_HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="0" y="0" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">drift, nats</text>'
    )
    return parts


def _point(option: Option, each: Candidate, x_max: float, y_max: float) -> str:
    assert each.drift is not None
    mean = each.drift.mean
    x, y = _x(option.air.mean_bytes, x_max), _y(mean.value, y_max)
    words = mark(option)
    title = f"{each.version}, {words}: {bytes_text(round(option.air.mean_bytes))}, {mean.value:.4f} nats ({mean.low:.4f} to {mean.high:.4f})"
    return (
        f'<g class="{_KINDS[words]}"><title>{escape(title)}</title>'
        f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(mean.low, y_max):.1f}" y2="{_y(mean.high, y_max):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        f'<text class="strong" x="{x + 12:.1f}" y="{y - 8:.1f}">{escape(each.version[:24])}, {words}</text></g>'
    )


def _x(value: float, most: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / most


def _y(value: float, most: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - 14) * value / most
