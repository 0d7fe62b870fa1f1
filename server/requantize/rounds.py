"""Files of one choice, made at one price after the other: what they weigh, and which price gives the bytes that are wanted."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from protocol.errors import ModelFileError
from server.requantize.codes import LINEAR_LAYOUTS
from server.requantize.descent import Price
from server.requantize.model import FLOAT_LAYOUTS, ModelFile
from server.requantize.portions import mean_bytes, shares_of
from server.requantize.search import SmallBudgetError, price_of_budget
from server.requantize.settings import Settings
from server.requantize.weighing import delta_sizes
from server.requantize.work import Files, gain_at, run_all, stretches_of

FIRST_BITS: Final = 9.0
FURTHER_BITS: Final = 2.0
"""What the delta engine takes for a code that changes where one in a few hundred does, and for each step beyond the first."""

SCALE_BITS: Final = 10.0
"""The same for the scale of a block, however far it moves: a sixth more than for a code (`python -m benchmarks.requantize_scales`, at 1e-8)."""

_DEAR: Final = 1e6
"""Nats a bit: no code is worth that."""

_PROBE_EVERY: Final = 16


def price_of_bits(nats: float, shares: tuple[float, ...] = (), *, moves_scales: bool = False) -> Price:
    """What changed codes cost, and scales if they may move, at a price in nats a bit.

    Args:
        nats: Of a bit.
        shares: As in `Price`.
        moves_scales: Whether scales of blocks may move.
    """
    scale = nats * SCALE_BITS if moves_scales else None
    return Price(first=nats * FIRST_BITS, further=nats * FURTHER_BITS, shares=shares, scale=scale)


@dataclass(frozen=True, slots=True)
class Round:
    """One file that was made and coded.

    Attributes:
        price: Nats per token and bit.
        bytes: Of its delta; the mean over the fleet.
        sizes: From each of several installed files.
        before: What the installed codes cost, in nats per token.
        after: What the chosen ones cost.
        promised: What the divergence falls by, if the gradient that was measured holds all the way.
        changed: Codes that differ from the installed ones, by tensor.
        scales: Scales of blocks that do.
    """

    price: float
    bytes: int
    sizes: tuple[int, ...]
    before: float
    after: float
    promised: float
    changed: dict[str, int] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)


class Rounds:
    """Makes files in one place, which holds the last one.

    Attributes:
        files: What the next one is made from.
        installed: The quantized file that devices have.
        made: All files that were made, in order.
        names: Tensors whose codes are chosen.
        kept: Tensors that stay as installed, as their layout has no linear codes.
        codes: How many codes there are in the chosen tensors.
        workers: Processes, and threads of what is done beside.
    """

    def __init__(
        self,
        files: Files,
        installed: ModelFile,
        settings: Settings,
        report: Callable[[str], None],
    ) -> None:
        self.files = files
        self.installed = installed
        self._settings = settings
        self._report = report
        self.workers = settings.workers or min(8, len(os.sched_getaffinity(0)))
        self.made: list[Round] = []
        self.names: list[str] = []
        kept: list[str] = []
        for name, region in installed.tensors.items():
            if region.layout in LINEAR_LAYOUTS:
                self.names.append(name)
            elif region.layout not in FLOAT_LAYOUTS:
                kept.append(name)
        self.kept = tuple(kept)
        self.codes = sum(math.prod(installed.tensors[name].dims) for name in self.names)
        if not self.names:
            raise ModelFileError(
                f"{installed.path}: no tensor has codes that can be chosen",
                hint=f"known are {', '.join(sorted(LINEAR_LAYOUTS))}",
            )

    def floor(self) -> int:
        """What is sent whatever the price: to one version what is no code; to several also what they differ by."""
        if not self.files.also:
            return self.mean(self.sizes())
        floor = self.make(_DEAR).bytes
        self.made.clear()
        return floor

    def search(self, floor: int) -> Round:
        """The file of the price that was given, or of one that the budget gives."""
        if self._settings.price is not None:
            return self.make(self._settings.price)
        budget = self._settings.budget_bytes
        assert budget is not None
        if self.files.also and floor >= budget:
            raise SmallBudgetError(
                f"what the installed files differ by takes {floor:,} bytes on average whatever is chosen, the budget is {budget:,}",
                hint="allow more, or leave out a file that few devices have",
            )
        first = self.made[-1].price if self.made else self._settings.first_price
        if first is None:
            first = self._first_price(budget - floor)
        price = price_of_budget(budget, floor, first, lambda each: self.make(each).bytes)
        return self.made[-1] if self.made[-1].price == price else self.make(price)

    def cost(self, file: Path) -> float:
        """What the codes of a file cost, as the metric sees it."""
        stretches = stretches_of(self.installed, self.names, None)
        files = replace(self.files, start=file, slopes=None)
        return sum(each.after for each in run_all(files, stretches, self.workers))

    def make(self, price: float) -> Round:
        """Descend at a price and code the result."""
        self._report(f"round {len(self.made) + 1}: descent at {price:.3g} nats a bit")
        bits = price_of_bits(price, shares_of(self.files.also), moves_scales=self._settings.moves_scales)
        changed, scales = dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0)
        before = after = promised = 0.0
        stretches = stretches_of(self.installed, self.names, bits)
        for outcome in run_all(self.files, stretches, self.workers):
            changed[outcome.name] += outcome.changed
            scales[outcome.name] += outcome.scales
            before, after = before + outcome.before, after + outcome.after
            promised += outcome.promised
        sizes = self.sizes()
        size = self.mean(sizes)
        each = f" ({', '.join(f'{count:,}' for count in sizes)})" if self.files.also else ""
        moved = f" and {sum(scales.values()):,} scales" if self._settings.moves_scales else ""
        self._report(
            f"round {len(self.made) + 1}: {sum(changed.values()):,} codes{moved} changed, {size:,} bytes{each}, objective {before:.4g} to {after:.4g}"
        )
        self.made.append(Round(price, size, sizes, before, after, promised, changed, scales))
        return self.made[-1]

    def sizes(self) -> tuple[int, ...]:
        """Of the delta from each installed file."""
        bases = (self.files.installed, *(each.path for each in self.files.also))
        return delta_sizes(bases, self.files.out, self.workers)

    def mean(self, sizes: tuple[int, ...]) -> int:
        """Over the fleet."""
        return mean_bytes(sizes, self.files.also)

    def _first_price(self, budget: int) -> float:
        """At which as many single steps pay as the budget has room for, by a look at a part of the rows."""
        stretches = list(stretches_of(self.installed, self.names, None))[::_PROBE_EVERY]
        share = sum(
            (each.stop - each.start) * self.installed.region(each.name).dims[-1] for each in stretches
        ) / max(1, self.codes)
        gains = np.sum([each.gains for each in run_all(self.files, stretches, self.workers)], axis=0)
        steps = np.cumsum(gains[::-1])[::-1]  # that gain as much or more
        # Of all that pay at all the lesser half says nothing of a price: other steps come to pay on the way.
        wanted = max(1.0, min(8 * budget / FIRST_BITS * share, steps[0] / 2))
        enough = np.nonzero(steps >= wanted)[0]
        return gain_at(int(enough[-1]) if len(enough) else 0) / FIRST_BITS
