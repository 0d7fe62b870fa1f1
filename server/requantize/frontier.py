"""Makes and measures the points of a frontier: a file for each budget on the development text, beside what else could be sent.

What was made is in a journal, so that nothing is chosen twice. Files are not kept, which would be many: the one that is chosen is made again
at its price, which is one round, and has the same bytes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import replace

from protocol.errors import RequestError, StorageError
from protocol.ids import digest_of
from server.adapters.blobs import write_file
from server.requantize.calibration import Calibration
from server.requantize.choice import Chosen
from server.requantize.evaluation import Evaluator
from server.requantize.figures import difference, figures
from server.requantize.model import sha256_of
from server.requantize.readings import Reading
from server.requantize.rows import CHOSEN, NOTHING, PLAIN, Row
from server.requantize.search import BUDGET_USED_MIN, SmallBudgetError
from server.requantize.settings import CHOSEN_BY, Settings
from server.requantize.texts import Text
from server.scorecard.frontier import (
    Difference,
    Frontier,
    HeldOut,
    Point,
    Rule,
    Share,
    check_frontier,
    encode_frontier,
    pick,
)
from server.scorecard.journal import Journal, journal
from server.scorecard.keeping import runtime_version

FRONTIER_SUFFIX: Final = ".frontier.json"
"""Added to the name of the chosen file."""

_SLOPE: Final = -1.25
"""How the logarithm of the price falls with that of the bytes, before two files say so themselves; as in `search.py`."""

_SLOPE_MIN: Final = -5.0
_SLOPE_MAX: Final = -0.2
_RATIO_MIN: Final = 1.2
"""Two files of nearly the same length say little of the slope."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the delta of a point may weigh; named as the operator named it."""

    name: str
    bytes: int


def budgets_of(
    named: Mapping[str, Callable[[int], int]], fixed: int | None, length: int
) -> tuple[Budget, ...]:
    """The budgets of a frontier, that of the operator among them.

    Args:
        named: By name: from the length of the installed file to bytes. None at all where no frontier is wanted.
        fixed: In bytes, named before anything was measured; None where a point is to be chosen.
        length: Of the installed file.

    Raises:
        RequestError: Two of them are the same number of bytes.
    """
    found = [Budget(name, size(length)) for name, size in named.items()]
    if found and fixed is not None and fixed not in [each.bytes for each in found]:
        found.append(Budget(f"{fixed:,} bytes", fixed))
    for place, budget in enumerate(found):
        same = next((each for each in found[:place] if each.bytes == budget.bytes), None)
        if same is not None:
            raise RequestError(
                f"{budget.name} and {same.name} of the frontier are both {budget.bytes:,} bytes",
                hint="give each budget once",
            )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Made:
    """A file, and what was measured of it on the development text; `each_bytes` are those from each of several installed files."""

    name: str
    delta_bytes: int
    reading: Reading
    chosen: Chosen | None = None
    each_bytes: tuple[int, ...] = ()


class NoPointError(RequestError):
    """No point of the frontier is good enough; `frontier` has all of them."""

    def __init__(self, frontier: Frontier) -> None:
        super().__init__(
            f"no point of the frontier is good enough on {frontier.text}",
            hint="allow more bytes, or send the plain file",
        )
        self.frontier = frontier


class _Kept(Struct, frozen=True, kw_only=True):
    """A point in the journal."""

    chosen: Chosen
    reading: Reading


class _Refused(Struct, frozen=True, kw_only=True):
    """A budget in the journal for which there is no file."""

    reason: str


class FrontierBench:
    """The points of one frontier.

    Args:
        settings: Of the choice; a budget and the price to begin with are set for each point.
        kept: Of these models, this calibration and this text.
        file: Where `choose` leaves its file.
        choose: Chooses a file.
        read: Measures the file on the development text.
        report: Takes lines about the progress.
    """

    def __init__(
        self,
        settings: Settings,
        kept: Journal,
        file: Path,
        choose: Callable[[Settings], Chosen],
        read: Callable[[], Reading],
        report: Report,
    ) -> None:
        self._settings = settings
        self._kept = kept
        self._file = file
        self._choose = choose
        self._read = read
        self._report = report

    def measure(self, budgets: Sequence[Budget]) -> tuple[list[Made], list[str]]:
        """The points that could be made, by their budgets, and a note for each of the others.

        Each search for a price begins where those of smaller budgets say that it lies. That is in the settings of what was chosen, and
        follows from the budgets alone: the same budgets give the same files.
        """
        points: list[Made] = []
        notes: list[str] = []
        for budget in sorted(budgets, key=lambda each: each.bytes):
            settings = replace(
                self._settings, budget_bytes=budget.bytes, first_price=first_price(budget.bytes, points)
            )
            kept = self._point(budget, settings)
            if isinstance(kept, _Refused):
                notes.append(f"{budget.name}: {kept.reason}")
                continue
            each_bytes = tuple(each.delta_bytes for each in kept.chosen.sent)
            points.append(Made(budget.name, kept.chosen.delta_bytes, kept.reading, kept.chosen, each_bytes))
        return points, notes

    def remake(self, chosen: Chosen) -> None:
        """Have the file of a point in its place again.

        Raises:
            StorageError: It has other bytes now: something that the choice depends on has changed unnoticed.
        """
        if not self._file.exists() or sha256_of(self._file) != chosen.sources.result:
            self._report(f"the chosen point again, at {chosen.price:.3g} nats a bit")
            settings = chosen.settings
            # What reads text depends on the budget and on prices on the way; a descent alone depends on the last price.
            if not settings.distillation and not settings.learned:
                settings = replace(settings, budget_bytes=None, first_price=None, price=chosen.price)
            self._choose(settings)
        if sha256_of(self._file) != chosen.sources.result:
            raise StorageError(
                f"the file at {chosen.price:.3g} nats a bit has other bytes than when it was measured",
                hint="numerical libraries or the machine have changed: give another --cache, so that all points are made again",
            )

    def _point(self, budget: Budget, settings: Settings) -> _Kept | _Refused:
        key = f"point:{budget.bytes}:{settings.first_price!r}"
        known = self._kept.get(key, _Kept) or self._kept.get(key, _Refused)
        if known is not None:
            self._report(f"{budget.name}: known")
            return known
        self._report(f"{budget.name}: {budget.bytes:,} bytes")
        found: _Kept | _Refused
        try:
            found = _Kept(chosen=self._choose(settings), reading=self._read())
        except SmallBudgetError as error:
            self._report(error.message)
            found = _Refused(reason=error.message)
        self._kept.put(key, found)
        return found


def first_price(budget: int, points: Sequence[Made]) -> float | None:
    """A price at which a file of a budget is expected, from the files that were coded for smaller ones; None where there are none.

    Price over bytes is nearly a straight line where both are logarithms: through the longest file, and a clearly shorter one.
    """
    coded = {
        length: price for made in points if made.chosen is not None for price, length in made.chosen.rounds
    }
    if not coded:
        return None
    longest = max(coded)
    shorter = max((each for each in coded if 0 < each <= longest / _RATIO_MIN), default=None)
    slope = _SLOPE
    if shorter is not None and coded[longest] > 0 and coded[shorter] > 0:
        found = math.log(coded[longest] / coded[shorter]) / math.log(longest / shorter)
        slope = min(max(found, _SLOPE_MIN), _SLOPE_MAX)
    aim = budget * (1 + BUDGET_USED_MIN) / 2
    return coded[longest] * math.exp(slope * math.log(aim / longest))


@contextmanager
def points_journal(
    evaluator: Evaluator,
    files: Mapping[str, Path | None],
    calibration: Calibration,
    settings: Settings,
    text: Text,
) -> Iterator[Journal]:
    """The journal of what was chosen from the same files in the same way, and measured on the same text.

    Args:
        evaluator: Whose folder it lies in, and which measures.
        files: That the choice depends on, by what they are.
        calibration: Likewise.
        settings: Likewise; how many processes there are changes nothing.
        text: The development text.

    Raises:
        RequestError: Another process measures the same frontier.
        StorageError: The folder cannot be written.
    """
    identity: dict[str, object] = {
        "chosen_by": CHOSEN_BY,
        "files": {name: None if path is None else sha256_of(path) for name, path in files.items()},
        "calibration": calibration.identity,
        "settings": settings.identity,
        "text": text.digest,
        "runtime_version": runtime_version("llama"),
        "threads": evaluator.threads,
    }
    with journal(evaluator.folder, digest_of(msgspec.json.encode(identity)), identity) as kept:
        yield kept


def draw(
    controls: Sequence[Made],
    points: Sequence[Made],
    notes: Sequence[str],
    rule: Rule,
    text: Text,
    new: Path,
    installed: Path,
    extrapolation: float,
    fleet: Sequence[Share] = (),
) -> Frontier:
    """The frontier of what was measured, with the point that the rule chooses.

    Args:
        controls: What could be sent without choosing; `nothing sent` and `plain` among them.
        points: Chosen files.
        notes: Of budgets without a file.
        rule: How a point is chosen.
        text: The development text.
        new: The new model in floats.
        installed: The quantized file that devices have.
        extrapolation: With which points were chosen.
        fleet: Of several installed files, all of them, that one first.

    Raises:
        StorageError: A file cannot be read.
    """
    by_name = {each.name: each.reading for each in controls}
    sent_nothing, plain = by_name[NOTHING], by_name[PLAIN]
    found: list[Point] = []
    everything = [*controls, *points]
    for index, made in enumerate(everything):
        here = figures(made.reading, sent_nothing, plain)
        found.append(
            Point(
                name=made.name,
                budget_bytes=None if made.chosen is None else made.chosen.settings.budget_bytes,
                price=None if made.chosen is None else made.chosen.price,
                delta_bytes=made.delta_bytes,
                each_bytes=made.each_bytes,
                kl=here.kl,
                flips=here.flips,
                gain=here.gain,
                differences=tuple(_less(made, other) for other in everything[:index]),
            )
        )
    frontier = Frontier(
        new=sha256_of(new),
        installed=sha256_of(installed),
        fleet=tuple(fleet),
        file_bytes=installed.stat().st_size,
        text=text.name,
        tokens=len(plain.nll),
        extrapolation=extrapolation,
        rule=rule,
        points=tuple(found),
        notes=tuple(notes),
    )
    check_frontier(frontier, "what was measured")
    picked = pick(frontier)
    return frontier if picked is None else replace(frontier, chosen=picked.name)


def with_verdict(frontier: Frontier, table: Sequence[Row], result: str | None) -> Frontier:
    """The frontier with how the chosen file was judged.

    Args:
        frontier: Of which the file is.
        table: The rows on held-out texts.
        result: SHA-256 of the file; None where it was not written.
    """
    chosen, plain = (next(each for each in table if each.name == name) for name in (CHOSEN, PLAIN))
    held_out = tuple(
        HeldOut(
            text=name,
            tokens=found.tokens,
            kl=found.kl,
            flips=found.flips,
            plain_kl=plain.texts[name].kl,
            plain_flips=plain.texts[name].flips,
        )
        for name, found in chosen.texts.items()
    )
    return replace(frontier, held_out=held_out, result=UNSET if result is None else result)


def write_frontier(out: Path, frontier: Frontier) -> Path:
    """Write beside the chosen file from which frontier it is, and say where.

    Raises:
        StorageError: It cannot be written.
    """
    path = out.with_name(f"{out.name}{FRONTIER_SUFFIX}")
    write_file(path, encode_frontier(frontier))
    return path


def _less(made: Made, other: Made) -> Difference:
    return Difference(
        other=other.name,
        kl=difference("kl", made.reading, other.reading),
        flips=difference("flips", made.reading, other.reading),
    )
