"""Which versions nothing beats: the Pareto set of one tier, where figures are uncertain. Pure.

On an axis a version is better than another if the whole 95 % interval of the difference is beyond a margin, no worse if none of it is beyond
the margin on the other side, worse likewise, and undecided else. It beats the other if it is no worse on every axis and better on at least
one. Exact figures have no margin, so that without uncertainty this is Pareto's order. What the data do not decide keeps a version in the
set, and it is said on which axes. With margins, versions may beat each other in a circle; then none of the circle is out because of another.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from server.scorecard.statistics import CONFIDENCE, Outcome, holm, outcome
from server.tradeoffs.records import Axis, Candidate, Figure, Margins, Rival
from server.tradeoffs.standing import flips_between


class Contender(Struct, frozen=True, kw_only=True):
    """A version on a tier, as far as comparing goes.

    Attributes:
        candidate: The version.
        figures: By axis, smaller is better; accuracy and drift are the candidate's.
    """

    candidate: Candidate
    figures: dict[Axis, Figure]


class Beaten(Struct, frozen=True, kw_only=True):
    """What beats a version: for certain, and perhaps."""

    surely: list[Rival]
    perhaps: list[Rival]


def known_axes(contenders: Sequence[Contender], axes: Sequence[Axis]) -> list[Axis]:
    """Those of which something is known of at least one version; with the others nothing could be compared."""
    return [axis for axis in axes if any(_is_known(each, axis) for each in contenders)]


def beaten(contenders: Sequence[Contender], axes: Sequence[Axis], margins: Margins) -> list[Beaten]:
    """What beats each of the contenders, in their order.

    Args:
        contenders: All that can be among the best.
        axes: On which they are compared; without any nothing beats anything.
        margins: How much is no difference.
    """
    outcomes = {
        (one, other): {axis: compare(axis, contenders[one], contenders[other], margins) for axis in axes}
        for one in range(len(contenders))
        for other in range(len(contenders))
        if one != other
    }
    edges: dict[int, dict[int, Rival]] = {index: {} for index in range(len(contenders))}
    perhaps: list[list[Rival]] = [[] for _ in contenders]
    for (one, other), found in outcomes.items():
        better: list[Axis] = [axis for axis, each in found.items() if each == "better"]
        if not better or "worse" in found.values():
            continue
        undecided: list[Axis] = [axis for axis, each in found.items() if each == "undecided"]
        rival = Rival(version=contenders[one].candidate.version, better=better, undecided=undecided)
        if undecided:
            perhaps[other].append(rival)
        else:
            edges[one][other] = rival
    return [
        Beaten(
            surely=[
                edges[one][index] for one in edges if index in edges[one] and not _reaches(edges, index, one)
            ],
            perhaps=perhaps[index],
        )
        for index in range(len(contenders))
    ]


def compare(axis: Axis, one: Contender, other: Contender, margins: Margins) -> Outcome:
    """How `one` stands to `other` on an axis."""
    if axis == "accuracy":
        return _by_accuracy(one.candidate, other.candidate, margins.accuracy)
    if axis == "drift":
        return _by_drift(one.candidate, other.candidate, margins.drift)
    mine, theirs = one.figures.get(axis), other.figures.get(axis)
    if mine is None or theirs is None or mine.basis != theirs.basis:
        return "undecided"
    if None in {mine.low, mine.high, theirs.low, theirs.high}:
        return "undecided"
    is_exact = mine.low == mine.high and theirs.low == theirs.high
    margin = 0.0 if is_exact else margins.latency * max(mine.value, theirs.value)
    return outcome((theirs.low or 0.0) - (mine.high or 0.0), (theirs.high or 0.0) - (mine.low or 0.0), margin)


def contrast(axis: Axis, one: Contender, other: Contender, margins: Margins) -> Outcome:
    """How `one` stands to `other`, looked at from either side: `same` only if neither is worse."""
    there, back = compare(axis, one, other, margins), compare(axis, other, one, margins)
    if "undecided" in {there, back} and not {"better", "worse"} & {there, back}:
        return "undecided"
    mirrored: dict[Outcome, Outcome] = {"better": "worse", "worse": "better"}
    return mirrored.get(back, there) if there == "same" else there


def _by_accuracy(one: Candidate, other: Candidate, margin: float) -> Outcome:
    """No worse takes every suite; for better one suffices, if McNemar's test with Holm's adjustment for their number says so too."""
    flips = list(flips_between(one, other).values())
    outcomes = [outcome(each.difference.low, each.difference.high, margin) for each in flips]
    if "worse" in outcomes:
        return "worse"
    if not outcomes or "undecided" in outcomes:
        return "undecided"
    adjusted = holm([each.p_value for each in flips])
    is_better = any(
        each == "better" and p <= 1 - CONFIDENCE for each, p in zip(outcomes, adjusted, strict=True)
    )
    return "better" if is_better else "same"


def _by_drift(one: Candidate, other: Candidate, margin: float) -> Outcome:
    """The two intervals are of different bootstraps: the difference lies between their ends."""
    if one.drift is None or other.drift is None:
        return "undecided"
    mine, theirs = one.drift.mean, other.drift.mean
    return outcome(theirs.low - mine.high, theirs.high - mine.low, margin)


def _is_known(contender: Contender, axis: Axis) -> bool:
    if axis == "accuracy":
        return any(suite.kind not in _PROMPTS for suite in contender.candidate.suites)
    if axis == "drift":
        drift = contender.candidate.drift
        return drift is not None and not contender.candidate.is_reference
    return axis in contender.figures


_PROMPTS: Final = frozenset({"golden", "edge"})


def _reaches(edges: dict[int, dict[int, Rival]], start: int, goal: int) -> bool:
    """Whether one beats another, perhaps by way of others."""
    seen, ends = {start}, [start]
    while ends:
        ends = list({other for one in ends for other in edges[one]} - seen)
        seen.update(ends)
    return goal in seen
