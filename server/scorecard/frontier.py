"""The frontier that a requantized file was chosen from: what each file that could be sent weighs, and how near it comes to the float model. Pure.

It is measured on the development text, on which a point may be chosen; what was chosen is judged on held-out texts (ADR 46).
"""

import math
from collections.abc import Callable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from protocol.errors import ReleaseError
from server.scorecard.statistics import Interval, Outcome, outcome

FRONTIER_VERSION: Final = 1

FRONTIER_BYTES_MAX: Final = 1 << 20
"""Sixteen points and their differences make some 60 kB."""

POINTS_MAX: Final = 16
"""Budgets of one frontier: each is a file that is chosen and measured, and compared with all others."""

CONTROLS_MAX: Final = 4
FLEET_MAX: Final = 8
"""Installed files that one file is chosen for."""

NOTES_MAX: Final = 64

PLAIN: Final = "plain"
"""Point that the others are judged by: what could be sent instead."""

_Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Text = Annotated[str, Meta(max_length=1000)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Bytes = Annotated[int, Meta(ge=0, le=1 << 44)]
_Count = Annotated[int, Meta(ge=1, le=1 << 32)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class Share(Struct, frozen=True, kw_only=True):
    """A part of the fleet: SHA-256 of the quantized file that its devices have, and how large it is."""

    installed: _Digest
    share: _Share


class Difference(Struct, frozen=True, kw_only=True):
    """A point less another one, on the same tokens.

    Attributes:
        other: Name of that.
        kl: Of mean divergences, nats.
        flips: Of shares of tokens.
    """

    other: _Name
    kl: Interval
    flips: Interval


class Point(Struct, frozen=True, kw_only=True):
    """A file that could be sent, on the development text.

    Attributes:
        name: Of the point: its budget, or what it is where it was not chosen.
        budget_bytes: What its delta was allowed to weigh; None for a control.
        price: Nats per token and bit at which its codes stand; None for a control.
        delta_bytes: Of the delta from the installed file; from several ones, the mean over the fleet.
        each_bytes: Of the delta from each file of the fleet; none where all devices have the same.
        kl: Mean divergence from the float model, nats.
        flips: Share of tokens at which the file and the float model would choose differently.
        gain: Share of what plain gains in likelihood over the installed file; None where that gain is not above 0 with confidence.
        differences: From every point that stands before this one.
    """

    name: _Name
    budget_bytes: _Bytes | None = None
    price: float | None = None
    delta_bytes: _Bytes
    each_bytes: Annotated[tuple[_Bytes, ...], Meta(max_length=FLEET_MAX)] = ()
    kl: Interval
    flips: Interval
    gain: Interval | None = None
    differences: Annotated[tuple[Difference, ...], Meta(max_length=POINTS_MAX + CONTROLS_MAX)] = ()

    @property
    def is_control(self) -> bool:
        """Whether it is no chosen file, but stands beside them."""
        return self.budget_bytes is None


class Rule(Struct, frozen=True, kw_only=True):
    """How a point is chosen from a frontier.

    Attributes:
        kind: `budget`: the operator named it. `keep`: the fewest bytes that keep a share of plain's gain, and
            are no farther from the float model than plain. `no worse`: the fewest bytes that are shown to be no worse than plain.
        budget: Name of the point, for `budget`; "" else.
        keep_share: The share, for `keep`; 0 else.
        kl_share: How much farther from the float model than plain counts as no worse, as a share of plain's divergence.
        flips: The same of flips, as a share of tokens.
    """

    kind: Literal["budget", "keep", "no worse"]
    budget: Annotated[str, Meta(max_length=64)] = ""
    keep_share: Annotated[float, Meta(ge=0, le=2)] = 0.0
    kl_share: _Share
    flips: _Share


class HeldOut(Struct, frozen=True, kw_only=True):
    """The chosen file and the plain one on a text on which nothing was decided.

    Attributes:
        text: Name of the text.
        tokens: That were predicted.
        kl: Mean divergence of the chosen file, nats.
        flips: Share of tokens, of the chosen file.
        plain_kl: Mean divergence of the plain one.
        plain_flips: Share of tokens, of the plain one.
    """

    text: _Name
    tokens: _Count
    kl: Interval
    flips: Interval
    plain_kl: Interval
    plain_flips: Interval


class Frontier(Struct, frozen=True, kw_only=True):
    """Everything.

    Attributes:
        frontier: Version of this document.
        new: SHA-256 of the new model in floats.
        installed: SHA-256 of the quantized file that devices have; of several ones, of that which most have.
        fleet: All of them, that one first; none where all devices have it.
        file_bytes: Length of that.
        text: Name of the development text.
        tokens: That were predicted of it.
        extrapolation: With which all points were chosen.
        rule: How a point is chosen.
        points: Controls first, then the chosen files by their budgets.
        chosen: Name of the point that was chosen; "" where none is good enough.
        notes: Which budgets have no file, and why.
        result: SHA-256 of the chosen file; absent where it was not written.
        held_out: How the chosen file was judged.
    """

    frontier: Literal[1] = FRONTIER_VERSION
    new: _Digest
    installed: _Digest
    fleet: Annotated[tuple[Share, ...], Meta(max_length=FLEET_MAX)] = ()
    file_bytes: _Count
    text: _Name
    tokens: _Count
    extrapolation: float
    rule: Rule
    points: Annotated[tuple[Point, ...], Meta(min_length=1, max_length=POINTS_MAX + CONTROLS_MAX)]
    chosen: Annotated[str, Meta(max_length=64)] = ""
    notes: Annotated[tuple[_Text, ...], Meta(max_length=NOTES_MAX)] = ()
    result: _Digest | UnsetType = UNSET
    held_out: Annotated[tuple[HeldOut, ...], Meta(max_length=NOTES_MAX)] = ()

    def point(self, name: str) -> Point:
        """The point of a name.

        Raises:
            KeyError: There is none.
        """
        return {each.name: each for each in self.points}[name]

    def difference(self, one: Point, other: Point) -> Difference:
        """`one` less `other`, whichever stands first."""
        for found in one.differences:
            if found.other == other.name:
                return found
        (turned,) = (each for each in other.differences if each.other == one.name)
        return Difference(other=other.name, kl=_negative(turned.kl), flips=_negative(turned.flips))


class Standing(Struct, frozen=True, kw_only=True):
    """What beats a point.

    Attributes:
        surely: Names of points that weigh no more, are no worse and in one of these better.
        perhaps: Those of which the text does not say whether they are no worse.
    """

    surely: tuple[str, ...]
    perhaps: tuple[str, ...]

    @property
    def mark(self) -> str:
        """In a word, as in the trade-off report."""
        if self.surely:
            return "beaten"
        return "best?" if self.perhaps else "best"


def standings(
    frontier: Frontier, kl_margin: float | None = None, bytes_of: Callable[[Point], float] | None = None
) -> dict[str, Standing]:
    """Which points beat which, in bytes, divergence and flips; by name.

    One point beats another if it weighs no more, is no worse in divergence and flips, and better in one of the three: better by more than a
    margin with the whole interval of the paired difference, no worse likewise. Bytes are exact.

    Args:
        frontier: The points, and their margins.
        kl_margin: How much is no difference, nats; by default the share of plain's divergence that the rule has.
        bytes_of: What a point weighs; by default its delta.
    """
    if kl_margin is None:
        kl_margin = frontier.rule.kl_share * frontier.point(PLAIN).kl.value
    weigh = bytes_of or (lambda point: point.delta_bytes)
    found = {}
    for point in frontier.points:
        surely: list[str] = []
        perhaps: list[str] = []
        for other in frontier.points:
            if other is point:
                continue
            less = frontier.difference(point, other)
            lighter = float(weigh(point) - weigh(other))
            outcomes: list[Outcome] = [
                outcome(lighter, lighter, 0.0),
                outcome(less.kl.low, less.kl.high, kl_margin),
                outcome(less.flips.low, less.flips.high, frontier.rule.flips),
            ]
            if "better" in outcomes and "worse" not in outcomes:
                (perhaps if "undecided" in outcomes else surely).append(other.name)
        found[point.name] = Standing(surely=tuple(surely), perhaps=tuple(perhaps))
    return found


def pick(frontier: Frontier) -> Point | None:
    """The point that the rule chooses, of the fewest bytes; None where none is good enough."""
    able = [each for each in frontier.points if not each.is_control and _is_enough(frontier, each)]
    return min(able, key=lambda each: each.delta_bytes, default=None)


def _is_enough(frontier: Frontier, point: Point) -> bool:
    rule, plain = frontier.rule, frontier.point(PLAIN)
    if rule.kind == "budget":
        return point.name == rule.budget
    if rule.kind == "keep":
        return (
            point.gain is not None
            and point.gain.value >= rule.keep_share
            and point.kl.value <= plain.kl.value
        )
    more = frontier.difference(point, plain)
    return more.kl.high <= rule.kl_share * plain.kl.value and more.flips.high <= rule.flips


_decoder: Final = msgspec.json.Decoder(Frontier)


def decode_frontier(data: bytes, source: str) -> Frontier:
    """Read what `encode_frontier` wrote.

    Raises:
        ReleaseError: Too long, malformed, or it contradicts itself.
    """
    if len(data) > FRONTIER_BYTES_MAX:
        raise ReleaseError(f"{source} has {len(data)} bytes, allowed are {FRONTIER_BYTES_MAX}")
    try:
        frontier = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReleaseError(
            f"{source} is no frontier: {error}", hint="`whimbrel requantize --frontier` writes one"
        ) from error
    check_frontier(frontier, source)
    return frontier


def encode_frontier(frontier: Frontier) -> bytes:
    """As JSON for a file, one line for each point."""
    return msgspec.json.format(msgspec.json.encode(frontier), indent=1) + b"\n"


def check_frontier(frontier: Frontier, source: str) -> None:
    """Refuse what is no frontier although it has the form of one.

    Raises:
        ReleaseError: Names the point and what is wrong.
    """
    names = [each.name for each in frontier.points]
    wrong = ""
    if len(set(names)) != len(names):
        wrong = f"two points are called {max(names, key=names.count)}"
    elif PLAIN not in names:
        wrong = f"there is no point {PLAIN}"
    elif frontier.chosen and frontier.chosen not in names:
        wrong = f"the chosen point {frontier.chosen} is not there"
    elif frontier.result is not UNSET and not frontier.chosen:
        wrong = "a file was written, and no point was chosen"
    elif frontier.fleet and frontier.fleet[0].installed != frontier.installed:
        wrong = "the first file of the fleet is not the installed one"
    for index, point in enumerate(frontier.points):
        if len(point.each_bytes) != len(frontier.fleet):
            wrong = (
                wrong
                or f"{point.name}: {len(point.each_bytes)} deltas from the {len(frontier.fleet)} files of the fleet"
            )
        if sorted(each.other for each in point.differences) != sorted(names[:index]):
            wrong = wrong or f"{point.name}: differences are not those from the {index} points before it"
        intervals = [point.kl, point.flips, *([] if point.gain is None else [point.gain])]
        intervals += [each for less in point.differences for each in (less.kl, less.flips)]
        if not all(map(_is_interval, intervals)):
            wrong = wrong or f"{point.name}: an interval is none"
        if min(point.kl.low, point.flips.low) < 0 or point.flips.high > 1:
            wrong = wrong or f"{point.name}: a divergence is below 0, or flips are no share"
    for text in frontier.held_out:
        if not all(map(_is_interval, (text.kl, text.flips, text.plain_kl, text.plain_flips))):
            wrong = wrong or f"{text.text}: an interval is none"
    if wrong:
        raise ReleaseError(
            f"{source} is no frontier: {wrong}", hint="`whimbrel requantize --frontier` writes one"
        )


def _is_interval(interval: Interval) -> bool:
    return math.isfinite(interval.value) and -math.inf < interval.low <= interval.high < math.inf


def _negative(interval: Interval) -> Interval:
    return Interval(value=-interval.value, low=-interval.high, high=-interval.low)
