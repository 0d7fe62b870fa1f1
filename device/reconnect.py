"""When a client that lost its broker comes back: full jitter, so that a fleet never comes back at one instant. Pure.

What a connection was good for decides how soon the next one is tried:

- it held for `STABLE_S`: at once, as if nothing had failed before;
- it was short, but brought something that will not have to come again: soon. The broker serves, only the link is bad, and
  each such connection brings the end nearer, so that there is a bounded number of them;
- it carried nothing, or there was none: later and later. That is a broker that is away, that accepts and then closes, because of its
  access rules or since two devices share an identity, or that a whole fleet has just brought to its knees.
"""

import random
from typing import Final

RECONNECT_BASE_S: Final = 0.5
RECONNECT_CAP_S: Final = 60.0
"""Full jitter: a device waits for a random time up to the base doubled per attempt, at most the cap."""

STABLE_S: Final = 5.0
"""A connection that was lost sooner counts as a failed attempt."""

ATTEMPTS_AFTER_PROGRESS: Final = 3
"""As many failed attempts are remembered after progress, at most: the next wait is up to 4 s. Not none, for a broker that is
overloaded also brings something before it drops everybody."""

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

    def progressed(self) -> None:
        """The connection has brought something that will not have to come again."""
        self._attempts = min(self._attempts, ATTEMPTS_AFTER_PROGRESS)

    def ended(self, connected_s: float) -> None:
        """A connection that lasted for `connected_s` is gone."""
        if connected_s > STABLE_S:
            self._attempts = 0

    def wait_s(self) -> float:
        """How long to wait before the next attempt; counts it."""
        longest_s = min(RECONNECT_BASE_S * 2**self._attempts, RECONNECT_CAP_S)
        self._attempts = min(self._attempts + 1, _ATTEMPTS_MAX)
        return self._rng.uniform(0, longest_s)
