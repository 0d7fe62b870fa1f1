"""What happened, as a digest of bounded size over every step, and as a story of one device that was asked for."""

import hashlib
from typing import Final

from simulator.loop import US_PER_S

_TOGETHER: Final = 4_096
STORY_LINES_MAX: Final = 20_000


class Trace:
    """Running digest of a run.

    Args:
        follow: Number of the device whose story is kept; -1 for none.
    """

    __slots__ = ("_digest", "_follow", "_lines", "story")

    def __init__(self, follow: int = -1) -> None:
        self.story: list[str] = []
        self._follow = follow
        self._digest = hashlib.sha256()
        self._lines: list[str] = []

    def note(self, instant_us: int, device: int, text: str) -> None:
        """Something happened; device -1 stands for the world around the devices."""
        self._lines.append(f"{instant_us} {device} {text}\n")
        if len(self._lines) >= _TOGETHER:
            self._flush()
        if self._follow >= 0 and device in {self._follow, -1}:
            self.tell(instant_us, device, text)

    def tell(self, instant_us: int, device: int, text: str) -> None:
        """A line for the story alone."""
        if len(self.story) < STORY_LINES_MAX:
            who = "world" if device < 0 else f"device {device}"
            self.story.append(f"{instant_us / US_PER_S:12.6f} s  {who}: {text}")

    def follows(self, device: int) -> bool:
        """Whether the story of this device is kept."""
        return device == self._follow

    def digest(self) -> str:
        """SHA-256 over everything so far."""
        self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        self._digest.update("".join(self._lines).encode())
        self._lines.clear()
