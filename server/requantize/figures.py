"""What readings of one file say beside those of others: means, differences and shares with their intervals. Pure.

All intervals are 95 % and come from one bootstrap over blocks of `BLOCK_TOKENS` consecutive tokens (Carlstein 1986): tokens near each other are
hard together, so that single tokens would promise too much. Files are compared on the same tokens, and blocks are drawn for all of them at
once: what makes a text hard for every file cancels.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from server.requantize.readings import Reading
from server.requantize.texts import RUN_TOKENS
from server.scorecard.statistics import Interval, clustered_mean, clustered_ratio

BLOCK_TOKENS: Final = 64
"""Of a text of 8 runs there are 64 blocks, enough for a bootstrap."""

_Values = npt.NDArray[np.float64]


class TextFigures(Struct, frozen=True, kw_only=True):
    """One file on one text.

    Attributes:
        tokens: That were predicted.
        nll: Mean negative log-likelihood, in nats.
        kl: Mean divergence from the float model, in nats.
        flips: Share of tokens at which the file and the float model would choose differently.
        gain: Share of what the plain file gains in `nll` over the installed one; None where that gain is not above 0 with confidence.
    """

    tokens: int
    nll: Interval
    kl: Interval
    flips: Interval
    gain: Interval | None = None


def figures(reading: Reading, installed: Reading | None = None, plain: Reading | None = None) -> TextFigures:
    """Means of one file on one text, and its share of the gain where the other two are given."""
    gain = None
    if installed is not None and plain is not None:
        gain = share_of_gain(reading, installed, plain)
    return TextFigures(
        tokens=len(reading.nll),
        nll=_mean(reading.nll),
        kl=_mean(reading.kl),
        flips=_mean(_flips(reading)),
        gain=gain,
    )


def share_of_gain(reading: Reading, installed: Reading, full: Reading) -> Interval | None:
    """What part of the gain in likelihood from `installed` to `full` a file keeps.

    Returns:
        None where `full` is not better than `installed` with confidence: there is nothing to have a share of.
    """
    whole = np.subtract(installed.nll, full.nll)
    if _mean(whole).low <= 0:
        return None
    part = np.subtract(installed.nll, reading.nll)
    return clustered_ratio(_sums(part), _sums(whole))


def difference(kind: str, reading: Reading, other: Reading) -> Interval:
    """Mean of a file less that of another one, on the same tokens.

    Args:
        kind: `kl` or `flips`.
        reading: Of the one.
        other: Of the other, on the same text.
    """
    values = (np.asarray(each.kl) if kind == "kl" else _flips(each) for each in (reading, other))
    return _mean(np.subtract(*values))


def _flips(reading: Reading) -> _Values:
    return 1.0 - np.asarray(reading.same, np.float64)


def _mean(values: Sequence[float] | _Values) -> Interval:
    array = np.asarray(values, np.float64)
    return clustered_mean(_sums(array), [len(block) for block in blocks(array)])


def _sums(values: _Values) -> list[float]:
    return [float(block.sum()) for block in blocks(values)]


def blocks(values: _Values) -> list[_Values]:
    """Consecutive values in blocks of about `BLOCK_TOKENS`, none of which spans two runs."""
    per_run = RUN_TOKENS - 1
    count = round(per_run / BLOCK_TOKENS)
    return [
        block
        for start in range(0, len(values), per_run)
        for block in np.array_split(values[start : start + per_run], count)
    ]
