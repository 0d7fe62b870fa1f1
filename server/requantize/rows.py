"""The table of a choice: the chosen file beside what could be sent instead, for people and programs. Pure."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from server.display import table
from server.requantize.figures import TextFigures
from server.scorecard.statistics import Interval

NOTHING: Final = "nothing sent"
PLAIN: Final = "plain"
FROZEN: Final = "plain, embedding frozen"
REPAIR: Final = "repair only"
TRAP: Final = "minimum weight error"
CHOSEN: Final = "chosen"

NAMES: Final = (NOTHING, PLAIN, FROZEN, REPAIR, TRAP, CHOSEN)
"""Always all of them, in this order."""


def nothing_to(name: str) -> str:
    """The row of another installed file, after that of the one that most devices have."""
    return f"{NOTHING}, {name}"


class Row(Struct, frozen=True, kw_only=True):
    """One file that could be sent.

    Attributes:
        name: One of `NAMES`, of `nothing_to`, or another in a benchmark.
        delta_bytes: Of the project's own delta from the installed file, from several the mean over the fleet; None where there is no such file.
        share: The same, of the file.
        texts: Figures by name of the text.
        note: Why there are no figures, or how the file was made; "" for nothing.
    """

    name: str
    delta_bytes: int | None = None
    share: float | None = None
    texts: dict[str, TextFigures] = {}
    note: str = ""


def row(name: str, delta_bytes: int, file_bytes: int, texts: dict[str, TextFigures], note: str = "") -> Row:
    """A row with figures."""
    return Row(name=name, delta_bytes=delta_bytes, share=delta_bytes / file_bytes, texts=texts, note=note)


def lines(rows: Sequence[Row]) -> list[str]:
    """One table for each text, and the notes."""
    texts = list(dict.fromkeys(name for each in rows for name in each.texts))
    found = []
    for name in texts:
        tokens = next(each.texts[name].tokens for each in rows if name in each.texts)
        titles = [
            f"{name}, {tokens:,} tokens",
            "bytes",
            "% of file",
            "nll",
            "gain kept %",
            "KL to float",
            "flips %",
        ]
        found += [*table(titles, [_cells(each, name) for each in rows]), ""]
    found += [f"{each.name}: {each.note}" for each in rows if each.note]
    return found


def _cells(each: Row, text: str) -> list[str]:
    figures = each.texts.get(text)
    if figures is None or each.delta_bytes is None or each.share is None:
        return [each.name, *["-"] * 6]
    return [
        each.name,
        f"{each.delta_bytes:,}",
        f"{100 * each.share:.3f}",
        f"{figures.nll.value:.4f}",
        "-" if figures.gain is None else interval_text(figures.gain, 100, 1),
        interval_text(figures.kl, 1, 4),
        interval_text(figures.flips, 100, 1),
    ]


def interval_text(interval: Interval, factor: float, digits: int) -> str:
    """A value and what holds the true one."""
    value, low, high = (factor * each for each in (interval.value, interval.low, interval.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
