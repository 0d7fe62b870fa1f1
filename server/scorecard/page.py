"""A scorecard as a page of its own. Pure."""

from collections.abc import Sequence
from html import escape
from typing import Final

from markupsafe import Markup
from msgspec import UNSET

from server.display import bytes_text
from server.scorecard.card import Scorecard, SuiteDrift
from server.scorecard.frontier import Frontier, standings
from server.scorecard.frontier_display import (
    HELD_OUT_TITLES,
    TITLES,
    beaten_lines,
    choice_text,
    held_out_rows,
    notes,
    point_rows,
)
from server.scorecard.frontier_plot import Dot, plot
from server.scorecard.intervals import change_text, share_text
from server.scorecard.report import (
    P_NOTABLE,
    VERDICTS,
    cost_rows,
    divergence_rows,
    memory_rows,
    notable_groups,
    speed_rows,
)
from server.scorecard.statistics import Interval
from server.templates import template

_WIDTH: Final = 680
_LABEL: Final = 210
_VALUE: Final = 150
_ROW: Final = 26
_AXIS: Final = 30
DIVERGENCES_SHOWN: Final = 200


def render(card: Scorecard, digest: str) -> str:
    """The page.

    Args:
        card: What it shows.
        digest: Of the scorecard's bytes.
    """
    return template("scorecard/page.html.j2").render(
        card=card,
        digest=digest,
        headline=_headline(card),
        verdict=VERDICTS[card.verdict],
        figures=_figures(card),
        accuracy=Markup(_accuracy(card)),  # noqa: S704 - built by us, every text in it is escaped
        change=Markup(_change(card.drift.suites)) if card.drift else "",  # noqa: S704 - likewise
        speed=speed_rows(card.speed) if card.speed else [],
        memory=memory_rows(card),
        memory_plot=Markup(_memory(card)),  # noqa: S704 - likewise
        costs=cost_rows(card),
        groups=[_group_plot(suite) for suite in card.drift.suites if suite.groups] if card.drift else [],
        divergences=divergence_rows(card.drift.divergences) if card.drift else [],
        divergences_shown=DIVERGENCES_SHOWN,
        share_text=share_text,
        change_text=change_text,
        bytes_text=bytes_text,
        frontier=None if card.frontier is UNSET else _frontier(card.frontier),
    )


def _frontier(frontier: Frontier) -> dict[str, object]:
    """What the template shows of how the file was chosen."""
    description = f"Divergence from the float model on {frontier.text} over bytes of the delta"
    found = standings(frontier)
    dots = [
        Dot(each.name, each.delta_bytes, each.kl, found[each.name].mark, each.name == frontier.chosen)
        for each in frontier.points
    ]
    return {
        "text": frontier.text,
        "tokens": frontier.tokens,
        "plot": Markup(plot(dots, "bytes of the delta", description)),  # noqa: S704 - see `render`
        "choice": choice_text(frontier),
        "titles": TITLES,
        "rows": point_rows(frontier),
        "lines": [*beaten_lines(found), *notes(frontier)],
        "held_out_titles": HELD_OUT_TITLES,
        "held_out": held_out_rows(frontier),
        "installed": frontier.installed,
    }


def _headline(card: Scorecard) -> str:
    subject = card.subject
    after = f" after {card.drift.against.version}" if card.drift else ""
    return f"{subject.family} {subject.version}{after}: {VERDICTS[card.verdict]}"


def _figures(card: Scorecard) -> list[tuple[str, str]]:
    found = [(bytes_text(card.resources.size_bytes), "size of all files")]
    if card.speed is not None:
        unit = "tokens" if card.speed.step == "token" else "inferences"
        found.append((f"{card.speed.steps_per_s:,.0f}", f"{unit} per second"))
        found.append((f"{card.speed.p99_ms.value:.1f} ms", f"p99 of one {card.speed.step}"))
    if card.memory is not None and card.memory.contexts:
        found.append((bytes_text(card.memory.contexts[0].peak_bytes), "peak memory, smallest context"))
    found += [
        (share_text(suite.accuracy)[0], f"{suite.name}, {suite.count:,} questions")
        for suite in card.suites
        if suite.accuracy is not None and not suite.prompts
    ]
    if card.drift is not None and card.drift.texts is not None:
        found.append((f"{card.drift.texts.mean.value:.4f}", "mean KL divergence, nats"))
    return found


def _accuracy(card: Scorecard) -> str:
    rows = [
        (suite.name, suite.accuracy, f"{suite.right:,} of {suite.count:,}")
        for suite in card.suites
        if suite.accuracy is not None
    ]
    return _intervals(rows, 0.0, 1.0, "Share of right answers of each suite, with 95 % intervals")


def _change(suites: Sequence[SuiteDrift]) -> str:
    rows = [
        (suite.name, suite.paired.difference, f"{suite.paired.gained} gained, {suite.paired.lost} lost")
        for suite in suites
    ]
    low, high = _around_zero([change for _, change, _ in rows])
    return _intervals(rows, low, high, "Change of the share of right answers, with 95 % intervals")


def _group_plot(suite: SuiteDrift) -> tuple[str, str, Markup, list[list[str]]]:
    """Name, what stands out, plot and rows of a suite's groups."""
    groups = sorted(suite.groups, key=lambda each: each.paired.difference.value)
    rows = [
        (
            each.name.replace("_", " "),
            each.paired.difference,
            f"+{each.paired.gained} -{each.paired.lost} of {each.paired.count}",
        )
        for each in groups
    ]
    low, high = _around_zero([change for _, change, _ in rows])
    notable = [each.name for each in groups if each.p_holm < P_NOTABLE]
    words = f"Beyond chance, adjusted for {len(groups)} groups: {', '.join(notable) or 'none'}."
    plot = _intervals(rows, low, high, f"{suite.name}: change by group, with 95 % intervals")
    return suite.name, words, Markup(plot), notable_groups(suite)  # noqa: S704 - see `render`


def _around_zero(changes: Sequence[Interval]) -> tuple[float, float]:
    widest = max([0.05, *(max(-change.low, change.high) for change in changes)])
    return -min(1.0, widest), min(1.0, widest)


def _intervals(rows: Sequence[tuple[str, Interval, str]], low: float, high: float, description: str) -> str:
    """A dot and a bar for each row, on an axis in percent."""
    if not rows:
        return ""
    width = _WIDTH - _LABEL - _VALUE
    height = _ROW * len(rows)

    def x(value: float) -> float:
        return _LABEL + width * (min(max(value, low), high) - low) / (high - low)

    parts = []
    for step in range(5):
        value = low + (high - low) * step / 4
        kind = "axis" if abs(value) < 1e-12 and low < 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="0" y2="{height}"/>')
        text = f"{100 * value:+.0f}" if low < 0 else f"{100 * value:.0f} %"
        parts.append(f'<text x="{x(value):.1f}" y="{height + 20}" text-anchor="middle">{text}</text>')
    for index, (name, share, note) in enumerate(rows):
        y = _ROW * index + _ROW / 2
        kind = "back" if share.high < 0 else "v2" if low < 0 < share.low else "fetching"
        title = f"{name}: {100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f}), {note}"
        parts.append(
            f'<g class="{kind}"><title>{escape(title)}</title>'
            f'<text class="strong" x="{_LABEL - 12}" y="{y + 4:.0f}" text-anchor="end">{escape(_short(name))}</text>'
            f'<line class="range" x1="{x(share.low):.1f}" x2="{x(share.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(share.value):.1f}" cy="{y}" r="5"/>'
            f'<text x="{_WIDTH - _VALUE + 12}" y="{y + 4:.0f}">{escape(note)}</text></g>'
        )
    return _picture(height + _AXIS, parts, description)


def _memory(card: Scorecard) -> str:
    """Runtime, weights, keys and values, and the rest up to the peak, for each length of context."""
    memory = card.memory
    if memory is None:
        return ""
    most = max(context.peak_bytes for context in memory.contexts)
    width = _WIDTH - _LABEL - _VALUE
    parts = []
    for index, context in enumerate(memory.contexts):
        y, left = _ROW * 1.4 * index + 4, float(_LABEL)
        known = memory.runtime_bytes + memory.weights_bytes + context.cache_bytes
        pieces = (
            ("runtime", "neutral", memory.runtime_bytes),
            ("weights", "fetching", memory.weights_bytes),
            ("keys and values", "trial", context.cache_bytes),
            ("working memory", "installing", max(0, context.peak_bytes - known)),
        )
        name = f"{context.tokens:,} tokens" if context.tokens else "one input"
        parts.append(
            f'<text class="strong" x="{_LABEL - 12}" y="{y + 16:.0f}" text-anchor="end">{name}</text>'
        )
        for piece, kind, size in pieces:
            long = width * size / most
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{y:.1f}" width="{long:.1f}" height="22">'
                f"<title>{piece}: {bytes_text(size)}</title></rect>"
            )
            left += long
        parts.append(f'<text x="{left + 10:.1f}" y="{y + 16:.0f}">{bytes_text(context.peak_bytes)}</text>')
    return _picture(_ROW * 1.4 * len(memory.contexts) + 4, parts, "Memory by length of context")


def _picture(height: float, parts: Sequence[str], description: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= 30 else name[:29] + "…"
