"""Bytes of tokens in, text out, up to the first stop word. Pure."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Text that comes token by token. What may still become a stop word, or half a character, is held back.

    Args:
        stop: The text ends before the first of these.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.is_stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> str:
        """Take the bytes of a token; returns what can be said now."""
        return self._said(self._decoder.decode(data), is_end=False)

    def finish(self) -> str:
        """The text ends here; returns what was held back."""
        return self._said(self._decoder.decode(b"", final=True), is_end=True)

    def _said(self, text: str, *, is_end: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        keep = 0 if is_end else self._may_become_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_become_stop(self, text: str) -> int:
        longest = max((len(word) for word in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-length:]) for word in self._stop):
                return length
        return 0
