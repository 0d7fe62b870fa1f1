"""When a client that lost its broker comes back: full jitter, so that a fleet never comes back at one instant. Pure."""

import random
from typing import Final

RECONNECT_BASE_S: Final = 0.5
RECONNECT_CAP_S: Final = 60.0
"""Full jitter: a device waits for a random time up to the base doubled per attempt, at most the cap."""

STABLE_S: Final = 5.0
"""A connection that was lost sooner counts as a failed attempt: a broker that accepts and then closes, because of its
access rules or since two devices share an identity, is not hammered."""

_ATTEMPTS_MAX: Final = 16


class Backoff:
    """Waits between attempts to connect.

    Args:
        rng: Source of jitter.
    """

    __slots__ = ("_attempts", "_rng")

    def __init__(self, rng: random.Random) -> None:
        self._attempts = 0
        self._rng = rng

    def reset(self) -> None:
        """Begin anew, as after a good connection."""
        self._attempts = 0

    def ended(self, connected_s: float) -> None:
        """A connection that lasted for `connected_s` is gone."""
        if connected_s > STABLE_S:
            self._attempts = 0

    def wait_s(self) -> float:
        """How long to wait before the next attempt; counts it."""
        longest_s = min(RECONNECT_BASE_S * 2**self._attempts, RECONNECT_CAP_S)
        self._attempts = min(self._attempts + 1, _ATTEMPTS_MAX)
        return self._rng.uniform(0, longest_s)
