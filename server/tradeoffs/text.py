"""The trade-off report as lines of text; the page draws on the same rows. Pure."""

import textwrap
from collections.abc import Iterator
from typing import Final

from server.display import bytes_text, table
from server.scorecard.intervals import change_text, share_text
from server.tradeoffs.frontiers import frontier_lines
from server.tradeoffs.records import (
    Air,
    Candidate,
    Comparison,
    Figure,
    Option,
    Rival,
    TierTable,
    TradeoffReport,
)

WIDTH: Final = 110
"""Of the paragraph."""

VERSION_TITLES: Final = ["VERSION", "SIZE", "SCORECARD", "SUITE", "RIGHT", "95 %", "CHANGE", "95 %"]
DRIFT_TITLES: Final = ["VERSION", "KL, NATS", "95 %", "SAME CHOICE", "OPERATIONS", "MOVED", "ENERGY"]
COMPARISON_TITLES: Final = [
    "VERSION",
    "AND",
    "SUITE",
    "ONLY FIRST",
    "ONLY SECOND",
    "POINTS",
    "95 %",
    "ACCURACY",
    "DRIFT",
]
OPTION_TITLES: Final = [
    "",
    "VERSION",
    "LATENCY",
    "MEMORY",
    "IN THE SWAP",
    "TO EACH DEVICE",
    "IN ALL",
    "ENERGY",
    "COST",
]


def text_lines(report: TradeoffReport) -> Iterator[str]:
    """The report for people."""
    after = f", compared with {report.reference}" if report.reference else ""
    yield f"{report.family}: {', '.join(each.version for each in report.candidates)}{after}"
    yield ""
    yield from table(VERSION_TITLES, version_rows(report))
    for each in report.candidates:
        if each.reason:
            yield f"  {each.version} is no choice: {each.reason}" + (
                f"; {each.remedy}" if each.remedy else ""
            )
    yield ""
    yield from table(DRIFT_TITLES, drift_rows(report))
    if report.comparisons:
        yield ""
        yield from table(COMPARISON_TITLES, comparison_rows(report))
    for tier in report.tiers:
        yield ""
        yield f"{tier.name}: {tier_text(tier)}"
        yield from table(OPTION_TITLES, [option_row(option, report.currency) for option in tier.options])
        yield from (f"  {line}" for option in tier.options for line in option_lines(option))
        for frontier in tier.frontiers:
            yield ""
            yield from frontier_lines(frontier, report.currency)
    if report.missing:
        yield ""
        yield from missing_lines(report)
    yield ""
    yield from report.notes
    yield ""
    yield from textwrap.wrap(report.paragraph_text, WIDTH)


def version_rows(report: TradeoffReport) -> list[list[str]]:
    """Each version with its suites."""
    rows = []
    for each in report.candidates:
        head = [each.version, bytes_text(each.size_bytes), standing_text(each)]
        if not each.suites:
            rows.append([*head, "-", "-", "-", "-", "-"])
        for suite in each.suites:
            right = f"{suite.right:,} of {suite.count:,}"
            if suite.kind in {"golden", "edge"}:  # all have to be answered: they are no sample
                shares = ("-", "-", "-")
            else:
                change = ("-", "-") if suite.change is None else change_text(suite.change.difference)
                shares = (share_text(suite.accuracy)[1], *change)
            rows.append([*head, suite.name, right, *shares])
            head = ["", "", ""]
    return rows


def standing_text(each: Candidate) -> str:
    """What the scorecard allows."""
    if each.standing == "scored":
        verdict = "undecided" if each.verdict == "undecided" else "passed"
        return f"{verdict}, reference" if each.is_reference else verdict
    return {"failed": "failed", "incomplete": "incomplete", "apart": "not comparable", "unscored": "none"}[
        each.standing
    ]


def drift_rows(report: TradeoffReport) -> list[list[str]]:
    """Drift and what one inference takes."""
    rows = []
    for each in report.candidates:
        drift = ["-", "-", "-"]
        if each.drift is not None and not each.is_reference:
            mean = each.drift.mean
            drift = [
                f"{mean.value:.4f}",
                f"{mean.low:.4f} to {mean.high:.4f}",
                f"{100 * each.drift.same_choice:.1f} %",
            ]
        cost = ["-", "-", "-"]
        if each.operations is not None and each.moved_bytes is not None and each.energy_mj is not None:
            cost = [
                f"{each.operations / 1e9:,.3f} GFLOP",
                bytes_text(each.moved_bytes),
                f"{each.energy_mj:.3g} mJ",
            ]
        rows.append([each.version, *drift, *cost])
    return rows


def comparison_rows(report: TradeoffReport) -> list[list[str]]:
    """Any two versions, suite by suite."""
    rows = []
    for each in report.comparisons:
        outcomes = [outcome_text(each, "accuracy"), outcome_text(each, "drift")]
        if not each.suites:
            rows.append([each.version, each.other, "-", "-", "-", "-", "-", *outcomes])
        for suite in each.suites:
            flips = suite.flips
            counts = [str(flips.gained), str(flips.lost)]
            rows.append(
                [each.version, each.other, suite.name, *counts, *change_text(flips.difference), *outcomes]
            )
    return rows


def outcome_text(each: Comparison, axis: str) -> str:
    """How the one stands to the other, from the one's side."""
    outcome = each.accuracy if axis == "accuracy" else each.drift
    if axis == "accuracy" and outcome == "undecided" and each.questions_needed is not None:
        return f"undecided, about {each.questions_needed:,} questions"
    return outcome


def tier_text(each: TierTable) -> str:
    """What a tier has, and what its devices run."""
    budget = [
        "" if each.memory_mb is None else f"{each.memory_mb} MB of memory",
        "" if each.disk_mb is None else f"{each.disk_mb} MB of disk",
        "" if each.token_ms_max is None else f"{each.token_ms_max:g} ms a token",
    ]
    running = ", ".join(f"{version or 'nothing'} on {count:,}" for version, count in each.running.items())
    devices = f"{each.devices:,} device{'' if each.devices == 1 else 's'}"
    return "; ".join(part for part in (", ".join(filter(None, budget)), devices, running) if part)


def option_row(option: Option, currency: str) -> list[str]:
    """One version on one tier."""
    return [
        mark(option),
        option.version,
        latency_text(option.latency),
        "-" if option.memory is None else mebibytes(option.memory.value),
        "-" if option.swap_bytes is None else mebibytes(option.swap_bytes),
        bytes_text(round(option.air.mean_bytes)),
        bytes_text(option.air.total_bytes) if option.air.devices else "-",
        "-" if option.energy is None else f"{option.energy.value:.3g} mJ",
        "-" if option.cost is None else f"{option.cost:,.2f} {currency}",
    ]


def mark(option: Option) -> str:
    """Where a version stands on a tier."""
    if option.is_best:
        return "best" if not option.perhaps_beaten_by else "best?"
    if option.fits is False:
        return "refused"
    return "beaten" if option.beaten_by else "out"


def option_lines(option: Option) -> Iterator[str]:
    """What stands behind a row: why a version is out, and where its figures come from."""
    name = option.version
    yield from (f"{name} does not fit: {each.detail}" for each in option.broken)
    if option.would_fit:
        yield f"  would fit: {'; '.join(option.would_fit)}"
    yield from (f"{name} is beaten by {rival_text(rival)}" for rival in option.beaten_by)
    yield from (f"{name} would be beaten by {rival_text(rival)}" for rival in option.perhaps_beaten_by)
    bases = [
        f"{what}: {figure.basis}"
        for what, figure in (("latency", option.latency), ("memory", option.memory))
        if figure is not None
    ]
    yield f"{name}: {'; '.join([*bases, air_text(option.air)])}"


def rival_text(rival: Rival) -> str:
    """Who is better, at what, and what would have to be known."""
    text = f"{rival.version}, which is better in {', '.join(rival.better)}"
    if rival.undecided:
        text += f", if it is no worse in {', '.join(rival.undecided)}"
    return text


def air_text(air: Air) -> str:
    """The ways of the devices."""
    kinds = {
        "there": "have it",
        "whole": "whole files",
        "delta": "deltas",
        "estimated": "deltas, not signed yet",
    }
    ways = [
        f"{way.devices:,} from {way.version or 'nothing'} {bytes_text(way.wire_bytes)} ({kinds[way.kind]})"
        for way in air.ways
    ]
    return "; ".join(ways) if ways else f"a new device fetches {bytes_text(round(air.mean_bytes))}"


def missing_lines(report: TradeoffReport) -> Iterator[str]:
    """Deltas that nobody has built."""
    seconds = sum(each.seconds for each in report.missing)
    yield f"Whole files are counted where no delta is there. --deltas builds these, in about {duration_text(seconds)}:"
    for each in report.missing:
        yield f"  {each.base} to {each.version}, for {each.devices:,} device{'' if each.devices == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """A time that is estimated."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def latency_text(figure: Figure | None) -> str:
    """Milliseconds, with their interval where they have one."""
    if figure is None:
        return "-"
    if figure.low == figure.high == figure.value:
        return f"{figure.value:.3g} ms"
    low, high = ("no bound" if end is None else f"{end:.3g}" for end in (figure.low, figure.high))
    return f"{figure.value:.3g} ms ({low} to {high})"


def mebibytes(count: float) -> str:
    """As tiers have them: 2**20 bytes."""
    return f"{count / (1 << 20):.1f} MB"
