"""How a file is chosen, and what of that contradicts itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from protocol.errors import RequestError
from server.requantize.distillation import STEPS_MAX
from server.requantize.extrapolation import ROUNDS_MAX
from server.requantize.portions import Portion
from server.requantize.work import MetricName

CHOSEN_BY: Final = 1
"""Grows when files are chosen in another way, so that nothing which was made before is gone on with."""

TRUST: Final = 0.0005
"""All matrices are corrected side by side for what they have done wrong together: a whole step of each goes a thousand times too far."""

PAIRS: Final = 4


class Settings(Struct, frozen=True, kw_only=True):
    """How a file is chosen.

    Attributes:
        budget_bytes: What the delta from the installed file may weigh, from several files on average over the fleet; or
        price: Nats per token that a bit of the delta must save. Exactly one of both.
        first_price: With which the search for the budget's price begins; None for a look at the matrices.
        extrapolation: How far beyond the new weights the target lies, in steps from the installed version's to the new ones.
        learned: Rounds in which what was chosen reads the calibration text, and how far beyond the new weights the target lies is learned of each
            matrix, row, column and strong direction (`extrapolation.py`), on top of `extrapolation`; 0 for none.
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
    def identity(self) -> dict[str, object]:
        """What a choice depends on: not how many processes there are."""
        found: dict[str, object] = msgspec.to_builtins(replace(self, workers=None))
        return found

    @property
    def is_extrapolated(self) -> bool:
        """Whether the target lies beyond the new weights, for which the installed version in floats is needed."""
        return bool(self.extrapolation or self.learned)


def check_settings(settings: Settings, before: Path | None) -> None:
    """That they say one thing, and that what they need is there.

    Raises:
        RequestError: They do not.
    """
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


def check_start(settings: Settings, start: Path | None, also: Sequence[Portion]) -> None:
    """That what is asked for goes with the files that it begins with.

    Raises:
        RequestError: It does not.
    """
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
