"""What a file's answers to held-out samples say beside those of others: figures, guards, the table. Pure.

As with texts (`figures.py`, `guards.py`; ADR 42): 95 % intervals from one bootstrap, here over samples; a chosen file has to show that it is no
worse than plain, by a stated margin; undecided fails.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from protocol.errors import RequestError
from server.display import table
from server.requantize.guards import TEXTS_MIN, Margins, no_worse
from server.requantize.onnx.distortion import AnswerKind, Answers, distortions, flips
from server.requantize.rows import CHOSEN, NOTHING, PLAIN, REPAIR, TRAP, interval_text
from server.scorecard.card import Check
from server.scorecard.statistics import Interval, clustered_mean, clustered_ratio

NAMES: Final = (NOTHING, PLAIN, REPAIR, TRAP, CHOSEN)
"""Always all of them, in this order."""


class Reading(Struct, frozen=True, kw_only=True):
    """One file on one set of samples, sample by sample.

    Attributes:
        distortions: Summed over the answers of each sample.
        flips: Decisions drawn from the answers of each sample that are others; None where none is drawn.
        counts: Answers of each sample.
        decisions: Drawn from each answer.
    """

    distortions: tuple[float, ...]
    flips: tuple[int, ...] | None
    counts: tuple[int, ...]
    decisions: int = 1

    @property
    def decided(self) -> list[int]:
        """Decisions of each sample."""
        return [self.decisions * count for count in self.counts]

    @property
    def mean(self) -> float:
        """Distortion of an answer."""
        return sum(self.distortions) / sum(self.counts)


class SetFigures(Struct, frozen=True, kw_only=True):
    """One file on one set of samples.

    Attributes:
        samples: How many.
        distortion: Mean of an answer.
        flips: Share of decisions that are others than the float model's; None where none is drawn.
        gain: Share of what plain takes away from the installed file's distortion; None where that is not above 0 with confidence.
    """

    samples: int
    distortion: Interval
    flips: Interval | None = None
    gain: Interval | None = None


class Row(Struct, frozen=True, kw_only=True):
    """One file that could be sent.

    Attributes:
        name: One of `NAMES`, or another in a benchmark.
        delta_bytes: Of the project's own delta from the installed file; None where there is no such file.
        share: The same, of the file.
        sets: Figures by name of the set.
        note: Why there are no figures, or how the file was made; "" for nothing.
    """

    name: str
    delta_bytes: int | None = None
    share: float | None = None
    sets: dict[str, SetFigures] = {}
    note: str = ""


def reading(kind: AnswerKind, reference: Answers, found: Answers) -> Reading:
    """Compare a file's answers with those of the model in floats.

    Raises:
        ModelFileError: They are not finite, or of another shape.
    """
    loss, flipped = distortions(kind, reference, found), flips(kind, reference, found)
    places = np.cumsum(reference.counts)[:-1]

    def sums(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> list[float]:
        return [float(each.sum()) for each in np.split(values, places)]

    return Reading(
        distortions=tuple(sums(loss)),
        flips=None if flipped is None else tuple(int(each) for each in sums(flipped[0])),
        counts=tuple(reference.counts.tolist()),
        decisions=1 if flipped is None else flipped[1],
    )


def figures(found: Reading, installed: Reading, plain: Reading) -> SetFigures:
    """Means of one file on one set, and its share of the gain."""
    return SetFigures(
        samples=len(found.counts),
        distortion=clustered_mean(found.distortions, found.counts),
        flips=None if found.flips is None else clustered_mean(found.flips, found.decided),
        gain=share_of_gain(found, installed, plain),
    )


def share_of_gain(found: Reading, installed: Reading, plain: Reading) -> Interval | None:
    """What part of the distortion that plain takes away from the installed file a file takes away; None where plain is not better with confidence."""
    whole = np.subtract(installed.distortions, plain.distortions)
    if clustered_mean(whole.tolist(), installed.counts).low <= 0:
        return None
    return clustered_ratio(np.subtract(installed.distortions, found.distortions).tolist(), whole.tolist())


def check_sets(
    chosen: Mapping[str, Reading], plain: Mapping[str, Reading], names: Sequence[str], margins: Margins
) -> tuple[Check, ...]:
    """Compare distortion and flips with the plain file's on each held-out set.

    Raises:
        RequestError: There are fewer than `TEXTS_MIN` sets.
    """
    if len(names) < TEXTS_MIN:
        raise RequestError(
            f"the guards have {len(names)} sets of samples, {TEXTS_MIN} are needed",
            hint="give --held-out twice, with samples of different kinds",
        )
    checks = []
    for name in names:
        one, other = chosen[name], plain[name]
        lost = clustered_mean(np.subtract(one.distortions, other.distortions).tolist(), one.counts)
        unit = "% of plain's distortion"
        margin, factor = margins.kl_share * other.mean, 100 / max(other.mean, np.finfo(np.float64).tiny)
        checks.append(no_worse(f"{name}: distortion", lost, margin, unit, factor))
        if one.flips is not None and other.flips is not None:
            more = clustered_mean(np.subtract(one.flips, other.flips).tolist(), one.decided)
            checks.append(no_worse(f"{name}: flips", more, margins.flips, "points", 100))
    return tuple(checks)


def lines(rows: Sequence[Row]) -> list[str]:
    """One table for each set, and the notes."""
    found: list[str] = []
    for name in dict.fromkeys(name for each in rows for name in each.sets):
        samples = next(each.sets[name].samples for each in rows if name in each.sets)
        titles = [
            f"{name}, {samples:,} samples",
            "bytes",
            "% of file",
            "distortion x 1e4",
            "gain kept %",
            "flips %",
        ]
        found += [*table(titles, [_cells(each, name) for each in rows]), ""]
    return found + [f"{each.name}: {each.note}" for each in rows if each.note]


def _cells(each: Row, name: str) -> list[str]:
    one = each.sets.get(name)
    if one is None or each.delta_bytes is None or each.share is None:
        return [each.name, *["-"] * 5]
    return [
        each.name,
        f"{each.delta_bytes:,}",
        f"{100 * each.share:.3f}",
        interval_text(one.distortion, 1e4, 2),
        "-" if one.gain is None else interval_text(one.gain, 100, 1),
        "-" if one.flips is None else interval_text(one.flips, 100, 1),
    ]
