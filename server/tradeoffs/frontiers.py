"""The frontier that a version's file was chosen from, in bytes over the air of a tier. Pure.

Its points are no versions: only one of them was published, and nothing was measured of the others but their nearness to the float model. So they
are compared among themselves, in bytes over the air, drift and flips, by the margins of the report.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import UNSET

from protocol.delta_graph import wire_bytes
from protocol.ids import Digest
from server.display import bytes_text, table
from server.releases.delta_planner import is_worthwhile
from server.scorecard.frontier import Frontier, Point, Standing, standings
from server.scorecard.frontier_display import beaten_lines
from server.scorecard.frontier_plot import Dot, plot
from server.scorecard.intervals import nats_text, share_text
from server.tradeoffs.air import Field
from server.tradeoffs.prices import MB
from server.tradeoffs.records import FrontierOption, FrontierTable, Margins
from server.tradeoffs.standing import Entry

TITLES: Final = ["", "FILE", "TO EACH DEVICE", "IN ALL", "COST", "KL, NATS", "95 %", "FLIPS", "95 %"]


def frontier_tables(
    entries: Sequence[Entry], field: Field, tier: str | None, price: float | None, margins: Margins
) -> list[FrontierTable]:
    """The frontiers of those versions whose scorecard has one.

    Args:
        entries: The versions.
        field: The fleet.
        tier: Whose devices count; None for all.
        price: Of 10**6 bytes; None without.
        margins: How much is no difference: that of drift counts.
    """
    return [
        _table(entry.release.version, entry.card.frontier, field, tier, price, margins)
        for entry in entries
        if entry.card is not None and entry.card.frontier is not UNSET
    ]


def _table(
    version: str, frontier: Frontier, field: Field, tier: str | None, price: float | None, margins: Margins
) -> FrontierTable:
    known = [Digest(each.installed) for each in frontier.fleet] or [Digest(frontier.installed)]
    holders = [field.holders(each, tier) for each in known]
    devices = sum(holders)
    totals = {
        each.name: sum(count * size for count, size in zip(holders, _wire_bytes(frontier, each), strict=True))
        for each in frontier.points
    }
    means = {
        each.name: totals[each.name] / devices if devices else _expected_bytes(frontier, each)
        for each in frontier.points
    }
    found = standings(frontier, margins.drift, lambda point: means[point.name])
    return FrontierTable(
        version=version,
        installed=[field.version_of(each) or f"sha256 {each[:16]}…" for each in known],
        devices=devices,
        text=frontier.text,
        tokens=frontier.tokens,
        options=[
            FrontierOption(
                name=each.name,
                is_chosen=each.name == frontier.chosen,
                mean_bytes=means[each.name],
                total_bytes=totals[each.name],
                cost=None if price is None or not devices else totals[each.name] / MB * price,
                kl=each.kl,
                flips=each.flips,
                is_best=not found[each.name].surely,
                beaten_by=list(found[each.name].surely),
                perhaps_beaten_by=list(found[each.name].perhaps),
            )
            for each in frontier.points
        ],
    )


def _wire_bytes(frontier: Frontier, point: Point) -> list[int]:
    """To a device with each of the installed files: the delta, or the whole file where that is as good."""
    found = []
    for size in point.each_bytes or (point.delta_bytes,):
        is_delta = is_worthwhile(size, frontier.file_bytes)
        found.append(wire_bytes(size if is_delta else frontier.file_bytes) if size else 0)
    return found


def _expected_bytes(frontier: Frontier, point: Point) -> float:
    shares = [each.share for each in frontier.fleet] or [1.0]
    return sum(share * size for share, size in zip(shares, _wire_bytes(frontier, point), strict=True))


def frontier_lines(found: FrontierTable, currency: str) -> Iterator[str]:
    """One frontier for people."""
    yield headline(found)
    yield from table(TITLES, option_rows(found, currency))
    yield from (f"  {line}" for line in why_lines(found))


def headline(found: FrontierTable) -> str:
    """What is shown, and for whom."""
    devices = f"{found.devices:,} device{'' if found.devices == 1 else 's'}"
    return f"What could be sent instead of {found.version}, for {devices} with {' or '.join(found.installed)}; measured on {found.text}, {found.tokens:,} tokens"


def option_rows(found: FrontierTable, currency: str) -> list[list[str]]:
    """The points."""
    return [
        [
            _standing(each).mark,
            f"{each.name} (chosen)" if each.is_chosen else each.name,
            bytes_text(round(each.mean_bytes)),
            bytes_text(each.total_bytes) if found.devices else "-",
            "-" if each.cost is None else f"{each.cost:,.2f} {currency}",
            *nats_text(each.kl),
            *share_text(each.flips),
        ]
        for each in found.options
    ]


def why_lines(found: FrontierTable) -> list[str]:
    """Which point beats which."""
    return beaten_lines({each.name: _standing(each) for each in found.options})


def picture(found: FrontierTable, tier: str) -> str:
    """Divergence over bytes to each device, as SVG."""
    dots = [
        Dot(each.name, round(each.mean_bytes), each.kl, _standing(each).mark, each.is_chosen)
        for each in found.options
    ]
    description = f"Divergence from the float model over bytes to each device of {tier}, for {found.version} and what could be sent instead"
    return plot(dots, "over the air, to each device", description)


def _standing(each: FrontierOption) -> Standing:
    return Standing(surely=tuple(each.beaten_by), perhaps=tuple(each.perhaps_beaten_by))
