"""A frontier for people, as tables and lines of text; the page draws on the same rows. Pure."""

from collections.abc import Mapping
from typing import Final

from msgspec import UNSET

from server.display import table
from server.scorecard.frontier import Frontier, HeldOut, Point, Standing, standings
from server.scorecard.intervals import nats_text, share_text
from server.scorecard.statistics import Interval

TITLES: Final = ["", "FILE", "BYTES", "OF THE FILE", "KL, NATS", "95 %", "FLIPS", "95 %", "GAIN KEPT", "95 %"]
HELD_OUT_TITLES: Final = ["TEXT", "TOKENS", "FILE", "KL, NATS", "95 %", "FLIPS", "95 %"]


def text_lines(frontier: Frontier) -> list[str]:
    """Everything."""
    return [
        f"Bytes against quality, measured on {frontier.text}, {frontier.tokens:,} tokens",
        *table(TITLES, point_rows(frontier)),
        *(f"  {line}" for line in beaten_lines(standings(frontier))),
        *(f"  {note}" for note in notes(frontier)),
        f"Chosen: {choice_text(frontier)}",
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
            f"{100 * each.delta_bytes / frontier.file_bytes:.3g} %",
            *nats_text(each.kl),
            *share_text(each.flips),
            *_gain(each.gain),
        ]
        for each in frontier.points
    ]


def beaten_lines(found: Mapping[str, Standing]) -> list[str]:
    """Which points another one beats, or would beat."""
    lines = []
    for name, standing in found.items():
        if standing.surely:
            lines.append(f"{name} is beaten by {', '.join(standing.surely)}")
        elif standing.perhaps:
            lines.append(
                f"{name} would be beaten by {', '.join(standing.perhaps)}, if that is no worse where the text does not decide"
            )
    return lines


def notes(frontier: Frontier) -> list[str]:
    """For which fleet bytes are meant, and budgets without a file."""
    fleet = ", ".join(f"{100 * each.share:.3g} % have {each.installed[:16]}…" for each in frontier.fleet)
    return [*([f"Bytes are the mean over a fleet of which {fleet}"] if fleet else []), *frontier.notes]


def choice_text(frontier: Frontier) -> str:
    """How the point was chosen, and whether the file was written."""
    rule = frontier.rule
    words = {
        "budget": f"{rule.budget}, which the operator named",
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
        [each.text, f"{each.tokens:,}", "chosen", *nats_text(each.kl), *share_text(each.flips)],
        ["", "", "plain", *nats_text(each.plain_kl), *share_text(each.plain_flips)],
    ]


def named(frontier: Frontier, point: Point) -> str:
    """Name of a point, and whether it was chosen."""
    return f"{point.name} (chosen)" if point.name == frontier.chosen else point.name


def _gain(gain: Interval | None) -> tuple[str, str]:
    """A share of a gain: its interval is wide, and has no use for decimals."""
    if gain is None:
        return "-", "-"
    return f"{100 * gain.value:.0f} %", f"{100 * gain.low:.0f} to {100 * gain.high:.0f} %"
