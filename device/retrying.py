"""When something is tried again that nobody answered, or that failed for now: full jitter, so that a fleet never comes back at one instant. Pure."""

import random
from typing import Final

RETRY_BASE_MS: Final = 5_000
RETRY_CAP_MS: Final = 600_000
"""Full jitter: a retry waits for a random time up to `RETRY_BASE_MS` doubled per attempt, at most this."""

_DOUBLED_MAX: Final = 16
"""More often than that changes nothing."""


def retry_wait_ms(rng: random.Random, attempts: int) -> int:
    """How long to wait before the next attempt.

    Args:
        rng: Source of jitter.
        attempts: That have failed, from 1.
    """
    longest_ms = min(RETRY_BASE_MS << min(attempts, _DOUBLED_MAX), RETRY_CAP_MS)
    return rng.randint(RETRY_BASE_MS // 5, longest_ms)
