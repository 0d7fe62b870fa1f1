"""When a device asks for its next certificate. Pure: the certificate's life and the instant in, a decision out."""

import random
from dataclasses import dataclass
from typing import Final

RETRY_MS: Final = 6 * 3600 * 1000
"""Between two requests: a third of a life is a month, and a server may be mended within days."""

SPREAD: Final = 30
"""Devices that were enrolled together renew within a thirtieth of the life: three days for 90."""


@dataclass(frozen=True, slots=True)
class Life:
    """From when until when a certificate is valid, milliseconds since 1970."""

    start_ms: int
    end_ms: int

    def holds(self, now_ms: int) -> bool:
        """Whether it is valid; where it is not, the clock may be wrong just as well."""
        return self.start_ms <= now_ms < self.end_ms


class Renewal:
    """Decides when to ask: after two thirds of the life, and again every few hours until there is an answer.

    Args:
        rng: Source of jitter.
    """

    def __init__(self, rng: random.Random) -> None:
        self._share = rng.random() / SPREAD
        self._rng = rng
        self._next_ms = 0

    def is_due(self, life: Life, now_ms: int) -> bool:
        """Whether to ask now; whoever is told so has asked."""
        length_ms = life.end_ms - life.start_ms
        if now_ms < life.start_ms + length_ms * 2 // 3 + int(length_ms * self._share):
            return False
        if (
            now_ms < self._next_ms <= now_ms + RETRY_MS
        ):  # an instant further away was set by a clock that was wrong
            return False
        self._next_ms = now_ms + RETRY_MS - int(self._rng.random() * RETRY_MS / 2)
        return True
