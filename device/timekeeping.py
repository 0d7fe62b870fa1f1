"""What a device takes for the time when it judges signed documents (SPEC section 8.5). Pure.

A clock that is known to be wrong counts for nothing but the time that passes: what counts then is what a server has signed for this device.
"""

from typing import Final

CLOCK_MS_MIN: Final = 1_577_836_800_000
"""2020: nothing of this protocol was signed before. A board without a battery wakes up in 1970, or when its image was made."""

CLOCK_BEHIND_MS_MAX: Final = 86_400_000
"""A clock may be this far behind what was signed: clocks of servers differ a little. One that is further behind is wrong."""


class Timekeeping:
    """Time that signed documents are judged by.

    Args:
        is_clock_set: Whether somebody who knows the time has set the device's clock since it started.
    """

    def __init__(self, *, is_clock_set: bool) -> None:
        self._is_clock_set = is_clock_set
        self._attested: tuple[int, int] | None = None  # what a server said, and the device's clock then

    def is_clock_right(self, now_ms: int, signed_ms: int) -> bool:
        """Whether the device's own clock can be believed.

        Args:
            now_ms: What it shows.
            signed_ms: The latest instant that is known from what was signed.
        """
        return self._is_clock_set and now_ms >= max(CLOCK_MS_MIN, signed_ms - CLOCK_BEHIND_MS_MAX)

    def attested(self, time_ms: int, now_ms: int) -> None:
        """A server has said what time it is, in answer to a question of this moment."""
        self._attested = (time_ms, now_ms)

    def time_ms(self, now_ms: int, signed_ms: int) -> int | None:
        """The time; `None` where it is not known.

        Args:
            now_ms: What the device's clock shows.
            signed_ms: As for `is_clock_right`; it is at least as late as that.
        """
        if self.is_clock_right(now_ms, signed_ms):
            return max(now_ms, signed_ms)
        if self._attested is None:
            return None
        time_ms, at_ms = self._attested
        return max(time_ms + now_ms - at_ms, signed_ms)
