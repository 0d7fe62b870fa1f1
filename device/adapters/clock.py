"""The machine's clock and its entropy."""

import random
import time
from typing import Final

_MS_PER_S: Final = 1000


class SystemClock:
    """Milliseconds since 1970 that never go back while the process runs, whatever happens to the wall clock."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now_ms(self) -> int:
        """The instant."""
        return int((self._offset_s + time.monotonic()) * _MS_PER_S)


def system_rng() -> random.Random:
    """A source of chance that differs on every start: for jitter and client ids, never for secrets."""
    return random.SystemRandom()
