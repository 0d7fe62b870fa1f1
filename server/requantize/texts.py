"""Texts on which quantized files are judged: runs of tokens, and whether calibration has seen any of them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.errors import RequestError
from protocol.ids import Digest, digest_of

RUN_TOKENS: Final = 512
"""Tokens that a model reads in one piece: all but the first are predicted."""

RUNS: Final = 8
"""4,088 predicted tokens, if a text has as many. On SmolLM2-135M they tell a chosen file from plain to about 5 % of the mean divergence and 1.5
points of flips; four times as many tell half of that."""

RUNS_MIN: Final = 2
"""With fewer an interval says nothing of the text, only of one place in it."""

WINDOW_TOKENS: Final = 64
"""Two texts that share so many tokens in a row share more than a phrase: a licence's header has as many."""

_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)  # odd; its powers mix all bits but the lowest

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Text:
    """A text in a model's vocabulary.

    Attributes:
        name: For people; unique among the texts of a measurement.
        tokens: All of it.
        runs_max: How many runs of it are read, if it is long enough.
    """

    name: str
    tokens: Tokens
    runs_max: int = RUNS

    @property
    def runs_there(self) -> int:
        """How many runs it is long enough for."""
        return len(self.tokens) // RUN_TOKENS

    def runs(self) -> Tokens:
        """What is read: runs that do not overlap, at even distances, shape (runs, `RUN_TOKENS`).

        Raises:
            RequestError: The text is too short.
        """
        count = min(self.runs_max, self.runs_there)
        if count < RUNS_MIN:
            raise RequestError(
                f"{self.name} has {len(self.tokens)} tokens, {RUNS_MIN * RUN_TOKENS} are needed at least",
                hint=f"give a longer text: {self.runs_max * RUN_TOKENS} tokens are used",
            )
        starts = np.linspace(0, len(self.tokens) - RUN_TOKENS, count).astype(np.int64)
        return np.stack([self.tokens[start : start + RUN_TOKENS] for start in starts])

    @property
    def digest(self) -> Digest:
        """Of the runs."""
        return digest_of_tokens(self.runs())


def digest_of_tokens(tokens: Tokens) -> Digest:
    """SHA-256 of tokens, as little-endian int32."""
    return digest_of(np.ascontiguousarray(tokens, "<i4").tobytes())


def check_unseen(texts: Sequence[Text], seen: Sequence[Text]) -> None:
    """Refuse texts that share `WINDOW_TOKENS` tokens in a row with each other, or with what was seen before.

    Args:
        texts: On which files are judged.
        seen: By which they were chosen: the calibration text, the text on which settings were chosen.

    Raises:
        RequestError: Names both texts and the place.
    """
    known = [(text, window_hashes(text.tokens)) for text in seen]
    for text in texts:
        hashes = window_hashes(text.tokens)
        for other, theirs in known:
            found = _shared(text, hashes, other, theirs)
            if found is not None:
                raise RequestError(
                    f"{text.name} has {WINDOW_TOKENS} tokens in a row, from token {found} on, that {other.name} has too",
                    hint="judge on text that was not used before",
                )
        known.append((text, hashes))


def window_hashes(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """A number for each run of `WINDOW_TOKENS` tokens: equal runs have equal ones, and others hardly ever."""
    if len(tokens) < WINDOW_TOKENS:
        return np.empty(0, np.uint64)
    mixed = _mixed(tokens)
    power = np.uint64(1)
    total = np.zeros(len(tokens) - WINDOW_TOKENS + 1, np.uint64)
    for place in range(WINDOW_TOKENS):  # arithmetic modulo 2^64
        total += mixed[place : place + len(total)] * power
        power = np.multiply(power, _MULTIPLIER)
    return total


def _mixed(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """Tokens spread over 64 bits (the finalizer of SplitMix64, Steele et al. 2014), so that sums of small numbers do not meet."""
    value = tokens.astype(np.uint64) + _MULTIPLIER
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _shared(
    text: Text, hashes: npt.NDArray[np.uint64], other: Text, theirs: npt.NDArray[np.uint64]
) -> int | None:
    """Where a text first has a window of another one."""
    order = np.argsort(theirs, kind="stable")
    sorted_hashes = theirs[order]
    for place in np.flatnonzero(np.isin(hashes, theirs)):
        at = order[np.searchsorted(sorted_hashes, hashes[place])]
        window = slice(place, place + WINDOW_TOKENS)
        if np.array_equal(text.tokens[window], other.tokens[at : at + WINDOW_TOKENS]):
            return int(place)
    return None
