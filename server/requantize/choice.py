"""Chooses the next quantized file: codes by descent at one price for all tensors, the price by what the delta then weighs."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct
from threadpoolctl import threadpool_limits

from protocol.errors import ModelFileError, RequestError
from protocol.tensors import Layout
from server.adapters.blobs import storage_errors
from server.requantize.calibration import Calibration
from server.requantize.codes import LINEAR_LAYOUTS
from server.requantize.controls import write_nearest
from server.requantize.correction import measure_divergence, measure_slopes
from server.requantize.descent import Price
from server.requantize.distillation import STEPS_MAX, Distillation
from server.requantize.extrapolation import REACH, ROUNDS_MAX, STEPS, Factors, Learning
from server.requantize.header import start_file
from server.requantize.model import FLOAT_LAYOUTS, ModelFile, opened_gguf
from server.requantize.pairing import changed_codes, check_pair
from server.requantize.passes import save
from server.requantize.portions import Portion, check_fleet, mean_bytes, shares_of
from server.requantize.provenance import Sources, sources_of
from server.requantize.search import SmallBudgetError, price_of_budget
from server.requantize.sent import Sent, sent_to
from server.requantize.student import check_readable
from server.requantize.weighing import delta_sizes
from server.requantize.work import Files, MetricName, gain_at, run_all, stretches_of

FIRST_BITS: Final = 9.0
FURTHER_BITS: Final = 2.0
"""What the delta engine takes for a code that changes where one in a few hundred does, and for each step beyond the first."""

SCALE_BITS: Final = 10.0
"""The same for the scale of a block, however far it moves: a sixth more than for a code (`python -m benchmarks.requantize_scales`, at 1e-8)."""

TRUST: Final = 0.0005
"""All matrices are corrected side by side for what they have done wrong together: a whole step of each goes a thousand times too far."""

LINE_SEARCH_MAX: Final = 5
LINE_SEARCH_SHRINK_MIN: Final = 0.1
"""Where a correction goes too far, the next one is as long as a parabola through what is known says, and no shorter than this."""

PAIRS: Final = 4

FITS_MAX: Final = 6
FIT_SHARE: Final = 0.995
"""A distilled file that is too long is cut down in proportion, and a little more, until it fits."""

_DEAR: Final = 1e6
"""Nats a bit: no code is worth that."""

_PROBE_EVERY: Final = 16


class Settings(Struct, frozen=True, kw_only=True):
    """How a file is chosen.

    Attributes:
        budget_bytes: What the delta from the installed file may weigh, from several files on average over the fleet; or
        price: Nats per token that a bit of the delta must save. Exactly one of both.
        first_price: With which the search for the budget's price begins; None for a look at the matrices.
        extrapolation: How far beyond the new weights the target lies, in steps from the installed version's to the new ones.
        learned: Rounds in which what was chosen reads the calibration text, and how far beyond the new weights the target lies is learned of each
            matrix, row and column (`extrapolation.py`), on top of `extrapolation`; 0 for none.
        metric: What is kept near: what the layers put out, or the plain weights, which is a trap (docs/requantize.md).
        is_afresh: Begin with the best codes for the new model instead of the installed ones, and go back to these where that saves more
            than it costs. Better where the budget is some percent of a file that is well quantized; worse for small ones.
        corrections: How often the divergence of what was chosen is measured, and the choice made again from there with its gradient.
        trust: How far a correction goes from the gradient that the metric expects towards the measured one.
        pairs: First steps that are tried for two together, where no single step pays; 0 for none.
        moves_scales: Whether scales of blocks move where that pays, for Q4_0 and Q5_0 and one installed file. Takes about three times as long.
        distillation: Steps of some hundred tokens each in which the choice reads the calibration text and is mended where it says something
            else than the new model (`distillation.py`); 0 for none. For one installed file.
        workers: Processes; None for as many as there are processors. They change nothing but the time.
    """

    budget_bytes: int | None = None
    price: float | None = None
    first_price: float | None = None
    extrapolation: float = 0.0
    learned: int = 0
    metric: MetricName = "outputs"
    is_afresh: bool = False
    corrections: int = 0
    trust: float = TRUST
    pairs: int = PAIRS
    moves_scales: bool = False
    distillation: int = 0
    workers: int | None = None

    @property
    def is_extrapolated(self) -> bool:
        """Whether the target lies beyond the new weights, for which the installed version in floats is needed."""
        return bool(self.extrapolation or self.learned)


class Chosen(Struct, frozen=True, kw_only=True):
    """A file that was chosen, and what it took.

    Attributes:
        price: Nats per token and bit, at which its codes stand.
        delta_bytes: Of the delta from the installed file, as devices fetch it; of several files, the mean over the fleet.
        file_bytes: Of the chosen file.
        changed: Codes that differ from the installed ones, by tensor; of several files, from those that are cheapest to the fleet.
        codes: How many codes there are in these tensors.
        kept: Tensors that stay as installed, as their layout has no linear codes.
        objective_before: What the installed codes cost, in nats per token, as the metric sees it.
        objective_after: What the chosen ones cost.
        rounds: Price and bytes of each file that was coded on the way.
        divergences: KL from the float model on the calibration text, nats per token: before extrapolation is learned and after each round; before each
            correction and after the last; before distillation and after it.
        seconds: From start to end.
        settings: What was asked for.
        sources: Digests of what went in and came out.
        sent: What goes to the devices of each installed file; empty where all have the same.
        scales: Scales of blocks that differ from the installed ones, by tensor.
    """

    price: float
    delta_bytes: int
    file_bytes: int
    changed: dict[str, int]
    codes: int
    kept: tuple[str, ...]
    objective_before: float
    objective_after: float
    rounds: tuple[tuple[float, int], ...]
    divergences: tuple[float, ...]
    seconds: float
    settings: Settings
    sources: Sources
    sent: tuple[Sent, ...] = ()
    scales: dict[str, int] = {}


def price_of_bits(nats: float, shares: tuple[float, ...] = (), *, moves_scales: bool = False) -> Price:
    """What changed codes cost, and scales if they may move, at a price in nats a bit.

    Args:
        nats: Of a bit.
        shares: As in `Price`.
        moves_scales: Whether scales of blocks may move.
    """
    scale = nats * SCALE_BITS if moves_scales else None
    return Price(first=nats * FIRST_BITS, further=nats * FURTHER_BITS, shares=shares, scale=scale)


def choose(
    new: Path,
    installed: Path,
    calibration: Calibration,
    settings: Settings,
    out: Path,
    report: Callable[[str], None],
    *,
    start: Path | None = None,
    before: Path | None = None,
    also: Sequence[Portion] = (),
) -> Chosen:
    """Write the quantized file of the new model that is worth most for what its delta from the installed one weighs.

    Layouts are the installed file's, and so are tensors whose layout has no linear codes, and scales, unless they may move. Float tensors are the
    new ones. Of several installed files each block has the scales that most of the fleet has.

    Args:
        new: The new model in floats, GGUF.
        installed: The quantized file that devices have, GGUF.
        calibration: Moments of the new model.
        settings: Budget or price, and how.
        out: The result; appears under its name when it is whole.
        report: Takes lines about the progress.
        start: A quantized file whose codes the descent begins with, and those of its scales that a move can lead to; the price stays
            relative to the installed ones.
        before: The installed version in floats; needed for extrapolation.
        also: Further files that a part of the devices has instead of `installed`, none of them more devices than have that.

    Raises:
        RequestError: The settings contradict each other, or a file is not there.
        ModelFileError: The files do not belong together, or one is damaged.
        StorageError: The result cannot be written.
    """
    _check(settings, before)
    _check_start(settings, start, also)
    check_fleet(installed, also)
    began = time.perf_counter()
    partial = out.with_name(f".partial-{out.name}")
    try:
        files = Files(
            new=new,
            installed=installed,
            calibration=calibration,
            before=before,
            start=start,
            out=partial,
            metric=settings.metric,
            extrapolation=settings.extrapolation,
            pairs=settings.pairs,
            is_afresh=settings.is_afresh,
            also=tuple(also),
        )
        with opened_gguf(new) as fresh, opened_gguf(installed) as old:
            check_pair(fresh, old)
            if settings.distillation:
                check_readable(old, calibration.text, "--distill")
            if settings.learned:
                check_readable(old, calibration.text, "--learn-extrapolation")
            for each in also:
                with opened_gguf(each.path) as other:
                    check_pair(fresh, other)
            start_file(fresh, old, partial)
            choice = _Choice(files, fresh, old, settings, report)
            result = choice.run()
        with storage_errors(out):
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    return Chosen(
        price=result.price,
        delta_bytes=result.bytes,
        file_bytes=out.stat().st_size,
        changed=result.changed,
        codes=choice.codes,
        kept=choice.kept,
        objective_before=result.before,
        objective_after=result.after,
        rounds=tuple((each.price, each.bytes) for each in choice.rounds),
        divergences=tuple(choice.divergences),
        seconds=seconds,
        settings=settings,
        sources=sources_of(
            new,
            installed,
            before,
            start,
            calibration,
            out,
            is_read=settings.distillation + settings.learned > 0,
        ),
        sent=sent_to(installed, also, result.sizes),
        scales=result.scales,
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """One file that was made and coded; `bytes` is the mean of the sizes over the fleet."""

    price: float
    bytes: int
    sizes: tuple[int, ...]
    before: float
    after: float
    promised: float
    changed: dict[str, int] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)


class _Choice:
    """The search for the price, around the work on the tensors."""

    def __init__(
        self,
        files: Files,
        new: ModelFile,
        installed: ModelFile,
        settings: Settings,
        report: Callable[[str], None],
    ) -> None:
        self._files = files
        self._new = new
        self._installed = installed
        self._settings = settings
        self._report = report
        self._workers = settings.workers or min(8, len(os.sched_getaffinity(0)))
        self.rounds: list[_Round] = []
        self.divergences: list[float] = []
        self._names: list[str] = []
        kept: list[str] = []
        for name, region in installed.tensors.items():
            if region.layout in LINEAR_LAYOUTS:
                self._names.append(name)
            elif region.layout not in FLOAT_LAYOUTS:
                kept.append(name)
        self.kept = tuple(kept)
        self.codes = sum(math.prod(installed.tensors[name].dims) for name in self._names)
        if not self._names:
            raise ModelFileError(
                f"{installed.path}: no tensor has codes that can be chosen",
                hint=f"known are {', '.join(sorted(LINEAR_LAYOUTS))}",
            )

    def run(self) -> _Round:
        """Leave the chosen file in place and say what it is."""
        self._write_floats()
        floor = self._floor() if self._settings.price is None else 0
        best = self._search(floor)
        with tempfile.TemporaryDirectory(dir=self._files.out.parent, prefix=".correction-") as name:
            folder = Path(name)
            if self._settings.learned:
                best = self._extrapolated(best, floor, folder)
            if self._settings.corrections:
                best = self._corrected(best, floor, folder)
            if self._settings.distillation:
                best = self._distilled(best, floor, folder)
        return best

    def _floor(self) -> int:
        """What is sent whatever the price: to one version what is no code; to several also what they differ by."""
        if not self._files.also:
            return self._mean(self._sizes())
        floor = self._round(_DEAR).bytes
        self.rounds.clear()
        return floor

    def _search(self, floor: int) -> _Round:
        """The file of the price that was given, or of one that the budget gives."""
        if self._settings.price is not None:
            return self._round(self._settings.price)
        budget = self._settings.budget_bytes
        assert budget is not None
        if self._files.also and floor >= budget:
            raise SmallBudgetError(
                f"what the installed files differ by takes {floor:,} bytes on average whatever is chosen, the budget is {budget:,}",
                hint="allow more, or leave out a file that few devices have",
            )
        first = self.rounds[-1].price if self.rounds else self._settings.first_price
        if first is None:
            first = self._first_price(budget - floor)
        price = price_of_budget(budget, floor, first, self._bytes_at)
        return self.rounds[-1] if self.rounds[-1].price == price else self._round(price)

    def _extrapolated(self, best: _Round, floor: int, folder: Path) -> _Round:
        """From what was chosen to what is chosen for a target that was learned from it, round after round as long as that is better."""
        start, kept = self._files, folder / "kept.gguf"
        shutil.copyfile(start.out, kept)
        least = self._divergence(kept, folder)
        self.divergences.append(least)
        nearest, factors = start, dict[str, Factors]()
        for number in range(1, self._settings.learned + 1):
            for name, more in self._learned(number).items():
                factors[name] = factors[name].plus(more, REACH) if name in factors else more
            place = folder / f"factors-{number}"
            # The better corner that a choice afresh ends in is not looked for again.
            self._files = replace(start, factors=place, start=kept if start.is_afresh else start.start)
            with storage_errors(place):
                place.mkdir()
            for name, each in factors.items():
                save(self._files.factors_of(name), each.values)
            found = self._search(floor)
            after = self._divergence(start.out, folder)
            self._report(f"extrapolation, round {number}: divergence {least:.4g} to {after:.4g}")
            self.divergences.append(after)
            if after >= least:
                break
            best, nearest, least = found, self._files, after
            shutil.copyfile(start.out, kept)
        self._files = nearest
        shutil.copyfile(kept, start.out)
        return best

    def _learned(self, number: int) -> dict[str, Factors]:
        """What the file that is in place lacks along the update."""
        assert self._files.before is not None
        with (
            opened_gguf(self._files.before) as before,
            opened_gguf(self._files.out) as candidate,
            threadpool_limits(1),
            ThreadPoolExecutor(self._workers) as pool,
        ):
            text = self._files.calibration.text
            return Learning(self._new, before, candidate, text, pool, self._report).run(STEPS, number)

    def _corrected(self, best: _Round, floor: int, folder: Path) -> _Round:
        """From what was chosen to what is better by its own gradient, as long as that is so."""
        first, kept = self._files, folder / "kept.gguf"
        after = math.inf
        for _ in range(self._settings.corrections):
            shutil.copyfile(first.out, kept)
            slopes = measure_slopes(
                first.new, kept, first.calibration, folder / "slopes", self._report, workers=self._workers
            )
            self.divergences.append(slopes.divergence)
            trust = self._settings.trust
            for _ in range(LINE_SEARCH_MAX):
                self._files = replace(first, start=kept, slopes=slopes, trust=trust)
                found = self._search(floor)
                if found.promised > 2 * slopes.divergence:  # along a parabola that is beyond where it began
                    self._report(f"correction, trust {trust:.3g}: too far")
                    trust *= slopes.divergence / found.promised
                    continue
                after = self._divergence(first.out, folder)
                self._report(
                    f"correction, trust {trust:.3g}: divergence {slopes.divergence:.4g} to {after:.4g}"
                )
                if after < slopes.divergence:
                    best = found
                    break
                if found.promised <= 0:
                    break
                bend = after - slopes.divergence + found.promised
                trust *= max(LINE_SEARCH_SHRINK_MIN, found.promised / (2 * bend))
            if best is not found:
                shutil.copyfile(kept, first.out)
                return best
        self.divergences.append(after)
        return best

    def _distilled(self, best: _Round, floor: int, folder: Path) -> _Round:
        """From what was chosen, or from the nearest codes if they fit and are better, to what distillation makes of it, if that is better."""
        out, start = self._files.out, folder / "start.gguf"
        shutil.copyfile(out, start)
        before = self._divergence(start, folder)
        nearest = self._nearest(best, folder)
        if nearest is not None and (other := self._divergence(out, folder)) < before:
            best, before = nearest, other
            shutil.copyfile(out, start)
        self.divergences.append(before)
        with (
            opened_gguf(start) as candidate,
            threadpool_limits(1),
            ThreadPoolExecutor(self._workers) as pool,
        ):
            text = self._files.calibration.text
            distillation = Distillation(self._new, self._installed, candidate, text, pool, self._report)
            distillation.begin()
            budget, room = self._settings.budget_bytes, distillation.moved()
            if budget is not None:
                room = int(room * (budget - floor) / max(1, best.bytes - floor))
            distillation.run(self._settings.distillation, room)
            shutil.copyfile(start, out)
            changed, size, sizes = self._fitted(distillation, room, floor)
        after = self._divergence(out, folder)
        self._report(f"distillation: {size:,} bytes, divergence {before:.4g} to {after:.4g}")
        self.divergences.append(after)
        if after < before and (budget is None or size <= budget):
            best = replace(best, bytes=size, sizes=sizes, changed={**best.changed, **changed})
        else:
            shutil.copyfile(start, out)
        return replace(best, after=self._cost(out))

    def _fitted(
        self, distillation: Distillation, room: int, floor: int
    ) -> tuple[dict[str, int], int, tuple[int, ...]]:
        """Write as many of the moved codes as the budget has room for, those that want to move most; what they are, and what they weigh."""
        budget = self._settings.budget_bytes
        for _ in range(FITS_MAX):
            changed = distillation.write(self._files.out)
            sizes = self._sizes()
            size = self._mean(sizes)
            if budget is None or size <= budget:
                break
            room = int(min(room, sum(changed.values())) * FIT_SHARE * (budget - floor) / (size - floor))
            self._report(f"distillation: {size:,} bytes are too many, room for {room:,} codes")
            distillation.room_for(room)
        return changed, size, sizes

    def _nearest(self, best: _Round, folder: Path) -> _Round | None:
        """The nearest codes on the installed scales, if the budget has room for so many changes; left as the result."""
        budget = self._settings.budget_bytes
        if budget is None:
            return None
        out = self._files.out
        write_nearest(self._new, self._installed, out, folder / "nearest.gguf")
        shutil.copyfile(folder / "nearest.gguf", out)
        sizes = self._sizes()
        size = self._mean(sizes)
        self._report(f"distillation: the nearest codes take {size:,} bytes")
        if size > budget:
            return None
        with opened_gguf(out) as made:
            changed = {name: changed_codes(made, self._installed, name) for name in self._names}
        scales = dict.fromkeys(self._names, 0)
        return replace(best, bytes=size, sizes=sizes, changed=changed, scales=scales)

    def _divergence(self, file: Path, folder: Path) -> float:
        """Of a file from the float model, on the calibration text."""
        files = self._files
        return measure_divergence(
            files.new, file, files.calibration, folder / "look", self._report, workers=self._workers
        )

    def _cost(self, file: Path) -> float:
        """What the codes of a file cost, as the metric sees it."""
        stretches = stretches_of(self._installed, self._names, None)
        files = replace(self._files, start=file, slopes=None)
        return sum(each.after for each in run_all(files, stretches, self._workers))

    def _bytes_at(self, price: float) -> int:
        return self._round(price).bytes

    def _round(self, price: float) -> _Round:
        """Descend at a price and code the result."""
        self._report(f"round {len(self.rounds) + 1}: descent at {price:.3g} nats a bit")
        bits = price_of_bits(price, shares_of(self._files.also), moves_scales=self._settings.moves_scales)
        changed, scales = dict.fromkeys(self._names, 0), dict.fromkeys(self._names, 0)
        before = after = promised = 0.0
        stretches = stretches_of(self._installed, self._names, bits)
        for outcome in run_all(self._files, stretches, self._workers):
            changed[outcome.name] += outcome.changed
            scales[outcome.name] += outcome.scales
            before, after = before + outcome.before, after + outcome.after
            promised += outcome.promised
        sizes = self._sizes()
        size = self._mean(sizes)
        each = f" ({', '.join(f'{count:,}' for count in sizes)})" if self._files.also else ""
        moved = f" and {sum(scales.values()):,} scales" if self._settings.moves_scales else ""
        self._report(
            f"round {len(self.rounds) + 1}: {sum(changed.values()):,} codes{moved} changed, {size:,} bytes{each}, objective {before:.4g} to {after:.4g}"
        )
        self.rounds.append(_Round(price, size, sizes, before, after, promised, changed, scales))
        return self.rounds[-1]

    def _sizes(self) -> tuple[int, ...]:
        """Of the delta from each installed file."""
        bases = (self._files.installed, *(each.path for each in self._files.also))
        return delta_sizes(bases, self._files.out, self._workers)

    def _mean(self, sizes: tuple[int, ...]) -> int:
        return mean_bytes(sizes, self._files.also)

    def _first_price(self, budget: int) -> float:
        """At which as many single steps pay as the budget has room for, by a look at a part of the rows."""
        stretches = list(stretches_of(self._installed, self._names, None))[::_PROBE_EVERY]
        share = sum(
            (each.stop - each.start) * self._installed.region(each.name).dims[-1] for each in stretches
        ) / max(1, self.codes)
        gains = np.sum([each.gains for each in run_all(self._files, stretches, self._workers)], axis=0)
        steps = np.cumsum(gains[::-1])[::-1]  # that gain as much or more
        # Of all that pay at all the lesser half says nothing of a price: other steps come to pay on the way.
        wanted = max(1.0, min(8 * budget / FIRST_BITS * share, steps[0] / 2))
        enough = np.nonzero(steps >= wanted)[0]
        return gain_at(int(enough[-1]) if len(enough) else 0) / FIRST_BITS

    def _write_floats(self) -> None:
        """Tensors that are floats in both files: the new ones, as the installed file has them."""
        with opened_gguf(self._files.out) as made:
            regions = made.tensors
        with storage_errors(self._files.out), self._files.out.open("r+b") as file:
            for name, region in regions.items():
                if region.layout in FLOAT_LAYOUTS:
                    file.seek(region.offset)
                    file.write(_stored(self._new.floats(name).reshape(-1), region.layout))


def _stored(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], layout: Layout) -> bytes:
    if layout is Layout.F32:
        return values.astype("<f4").tobytes()
    if layout is Layout.F16:
        return values.astype("<f2").tobytes()
    words = values.astype("<f4").view("<u4").astype(np.uint64)
    rounded = words + 0x7FFF + (words >> 16 & 1)  # to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()


def _check(settings: Settings, before: Path | None) -> None:
    if (settings.budget_bytes is None) == (settings.price is None):
        raise RequestError("a budget or a price is needed, and not both")
    if settings.budget_bytes is not None and settings.budget_bytes < 1:
        raise RequestError(f"a budget of {settings.budget_bytes} bytes holds nothing")
    if settings.price is not None and not 0 <= settings.price < math.inf:
        raise RequestError(f"a price of {settings.price} nats is none")
    if not 0 <= settings.distillation <= STEPS_MAX:
        raise RequestError(f"distillation takes up to {STEPS_MAX} steps, not {settings.distillation}")
    if not 0 <= settings.learned <= ROUNDS_MAX:
        raise RequestError(f"extrapolation is learned in up to {ROUNDS_MAX} rounds, not {settings.learned}")
    if settings.is_extrapolated and before is None:
        raise RequestError("the installed version in floats is needed to extrapolate")


def _check_start(settings: Settings, start: Path | None, also: Sequence[Portion]) -> None:
    """That what is asked for goes with the files that it begins with."""
    if settings.is_afresh and start is not None:
        raise RequestError(
            f"a choice afresh does not begin with {start}", hint="leave out --afresh, or --start"
        )
    for is_asked, what, option in (
        (settings.moves_scales, "scales stay", "--move-scales"),
        (settings.distillation, "a choice is not distilled", "--distill"),
    ):
        if is_asked and also:
            raise RequestError(
                f"{what} where devices have several files", hint=f"leave out {option}, or --also"
            )
