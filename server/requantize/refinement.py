"""From the first descent to the file that is asked for, by what files say when they read the calibration text.

The metric of `calibration.py`, which a descent follows, looks at each matrix as if all others were exact. Three ways see the file as it is: how far beyond the new
weights it has to aim is learned (`extrapolation.py`), its own gradient corrects it (`correction.py`), its codes are distilled (`distillation.py`).
"""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from threadpoolctl import threadpool_limits

from server.requantize.calibration import SEQUENCES
from server.requantize.controls import write_nearest
from server.requantize.correction import measure_divergence, measure_slopes
from server.requantize.distillation import Distillation
from server.requantize.learned import LearnedExtrapolation
from server.requantize.model import ModelFile, opened_gguf
from server.requantize.pairing import changed_codes
from server.requantize.rounds import Round, Rounds
from server.requantize.settings import Settings
from server.requantize.standing import standings_of

LINE_SEARCH_MAX: Final = 5
LINE_SEARCH_SHRINK_MIN: Final = 0.1
"""Where a correction goes too far, the next one is as long as a parabola through what is known says, and no shorter than this."""

LOOK_RUNS: Final = SEQUENCES
"""Of the calibration text that the divergence is measured on after each round of learned extrapolation: as many as there are by default."""

FITS_MAX: Final = 6
FIT_SHARE: Final = 0.995
"""A distilled file that is too long is cut down in proportion, and a little more, until it fits."""


class Refinement:
    """The first descent, and what follows it.

    Args:
        rounds: Makes files, all in one place.
        new: The new model in floats.
        settings: What is asked for.
        folder: For what lies beside on the way.
        floor: Bytes that are sent whatever the price.
        report: Takes lines about the progress.

    Attributes:
        divergences: As in `choice.Chosen`.
    """

    def __init__(
        self,
        rounds: Rounds,
        new: ModelFile,
        settings: Settings,
        folder: Path,
        floor: int,
        report: Callable[[str], None],
    ) -> None:
        self._rounds = rounds
        self._new = new
        self._settings = settings
        self._folder = folder
        self._floor = floor
        self._report = report
        self.divergences: list[float] = []

    def run(self) -> Round:
        """The first descent, and all that is asked for after it; the result is in place."""
        best = self._learned() if self._settings.learned else self._rounds.search(self._floor)
        if self._settings.corrections:
            best = self._corrected(best)
        if self._settings.distillation:
            best = self._distilled(best)
        return best

    def _learned(self) -> Round:
        files, settings = self._rounds.files, self._settings
        with standings_of(files, settings, self._report) as standings:
            extrapolation = LearnedExtrapolation(
                rounds=self._rounds,
                new=self._new,
                count=settings.learned,
                folder=self._folder,
                floor=self._floor,
                standings=standings,
                divergence=lambda: self._divergence(files.out, LOOK_RUNS),
                report=self._report,
            )
            best = extrapolation.run()
        self.divergences += extrapolation.divergences
        return best

    def _corrected(self, best: Round) -> Round:
        """From what was chosen to what is better by its own gradient, as long as that is so."""
        first, kept = self._rounds.files, self._folder / "kept.gguf"
        after = math.inf
        for _ in range(self._settings.corrections):
            shutil.copyfile(first.out, kept)
            slopes = measure_slopes(
                first.new,
                kept,
                first.calibration,
                self._folder / "slopes",
                self._report,
                workers=self._rounds.workers,
            )
            self.divergences.append(slopes.divergence)
            trust = self._settings.trust
            for _ in range(LINE_SEARCH_MAX):
                self._rounds.files = replace(first, start=kept, slopes=slopes, trust=trust)
                found = self._rounds.search(self._floor)
                if found.promised > 2 * slopes.divergence:  # along a parabola that is beyond where it began
                    self._report(f"correction, trust {trust:.3g}: too far")
                    trust *= slopes.divergence / found.promised
                    continue
                after = self._divergence(first.out)
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

    def _distilled(self, best: Round) -> Round:
        """From what was chosen, or from the nearest codes if they fit and are better, to what distillation makes of it, if that is better."""
        out, start = self._rounds.files.out, self._folder / "start.gguf"
        shutil.copyfile(out, start)
        before = self._divergence(start)
        nearest = self._nearest(best)
        if nearest is not None and (other := self._divergence(out)) < before:
            best, before = nearest, other
            shutil.copyfile(out, start)
        self.divergences.append(before)
        with (
            opened_gguf(start) as candidate,
            threadpool_limits(1),
            ThreadPoolExecutor(self._rounds.workers) as pool,
        ):
            text = self._rounds.files.calibration.text
            distillation = Distillation(
                self._new, self._rounds.installed, candidate, text, pool, self._report
            )
            distillation.begin()
            budget, room = self._settings.budget_bytes, distillation.moved()
            if budget is not None:
                room = int(room * (budget - self._floor) / max(1, best.bytes - self._floor))
            distillation.run(self._settings.distillation, room)
            shutil.copyfile(start, out)
            changed, size, sizes = self._fitted(distillation, room)
        after = self._divergence(out)
        self._report(f"distillation: {size:,} bytes, divergence {before:.4g} to {after:.4g}")
        self.divergences.append(after)
        if after < before and (budget is None or size <= budget):
            best = replace(best, bytes=size, sizes=sizes, changed={**best.changed, **changed})
        else:
            shutil.copyfile(start, out)
        return replace(best, after=self._rounds.cost(out))

    def _fitted(self, distillation: Distillation, room: int) -> tuple[dict[str, int], int, tuple[int, ...]]:
        """Write as many of the moved codes as the budget has room for, those that want to move most; what they are, and what they weigh."""
        budget = self._settings.budget_bytes
        for _ in range(FITS_MAX):
            changed = distillation.write(self._rounds.files.out)
            sizes = self._rounds.sizes()
            size = self._rounds.mean(sizes)
            if budget is None or size <= budget:
                break
            room = int(
                min(room, sum(changed.values())) * FIT_SHARE * (budget - self._floor) / (size - self._floor)
            )
            self._report(f"distillation: {size:,} bytes are too many, room for {room:,} codes")
            distillation.room_for(room)
        return changed, size, sizes

    def _nearest(self, best: Round) -> Round | None:
        """The nearest codes on the installed scales, if the budget has room for so many changes; left as the result."""
        budget = self._settings.budget_bytes
        if budget is None:
            return None
        out = self._rounds.files.out
        write_nearest(self._new, self._rounds.installed, out, self._folder / "nearest.gguf")
        shutil.copyfile(self._folder / "nearest.gguf", out)
        sizes = self._rounds.sizes()
        size = self._rounds.mean(sizes)
        self._report(f"distillation: the nearest codes take {size:,} bytes")
        if size > budget:
            return None
        with opened_gguf(out) as made:
            changed = {name: changed_codes(made, self._rounds.installed, name) for name in self._rounds.names}
        scales = dict.fromkeys(self._rounds.names, 0)
        return replace(best, bytes=size, sizes=sizes, changed=changed, scales=scales)

    def _divergence(self, file: Path, runs_max: int | None = None) -> float:
        """Of a file from the float model, on the calibration text."""
        return measure_divergence(
            self._rounds.files.new,
            file,
            self._rounds.files.calibration,
            self._folder / "look",
            self._report,
            workers=self._rounds.workers,
            runs_max=runs_max,
        )
