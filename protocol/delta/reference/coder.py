"""Adaptive binary range coder. SPEC section 6.11.

Writer and reader offer the same decisions, so that a model is written once: it passes what it wants to say, and goes on with what
it gets back. A reader ignores the wish.
"""

from typing import Final

from protocol.delta.context_tables import RATE

PROBABILITY_BITS: Final = 22
ONE: Final = 1 << PROBABILITY_BITS
COUNT_BITS: Final = 10
_COUNT_MASK: Final = (1 << COUNT_BITS) - 1
_COUNT_LIMIT: Final = 1000
_PROBABILITY_MIN: Final = 16
_PROBABILITY_TOP: Final = ONE - 1
_PROBABILITY_MAX: Final = _PROBABILITY_TOP - _PROBABILITY_MIN
_WORD: Final = 1 << 32
_MASK: Final = (1 << 64) - 1


def adapted(counter: int, bit: int) -> int:
    """Return a counter that has seen one more outcome."""
    count = counter & _COUNT_MASK
    p = counter >> COUNT_BITS
    if bit:
        p += ((_PROBABILITY_TOP - p) * RATE[count]) >> 16
        if p > _PROBABILITY_MAX:  # noqa: PLR1730 - a call costs more
            p = _PROBABILITY_MAX
    else:
        p += (-p * RATE[count]) >> 16
        if p < _PROBABILITY_MIN:  # noqa: PLR1730 - likewise
            p = _PROBABILITY_MIN
    return p << COUNT_BITS | (count + 1 if count < _COUNT_LIMIT else count)


class Encoder:
    """Writes decisions.

    Args:
        counters: Of the state; they adapt.
    """

    __slots__ = ("_counters", "_low", "_range", "_words")
    is_encoder: Final = True

    def __init__(self, counters: list[int]) -> None:
        self._counters = counters
        self._low = 0
        self._range = _MASK
        self._words = bytearray()

    def even(self, bit: int) -> int:
        """Code a decision that is as likely as not."""
        return self._bit(ONE // 2, bit)

    def code(self, at: int, bit: int) -> int:
        """Code a decision under the counter at `at`, and let it adapt."""
        counters = self._counters
        counter = counters[at]
        self._bit(counter >> COUNT_BITS, bit)
        counters[at] = adapted(counter, bit)
        return bit

    def code_two(self, first: int, second: int, share: int, bit: int) -> int:
        """Code a decision under two counters, of which the first has `share` quarters of the say."""
        counters = self._counters
        one, two = counters[first], counters[second]
        self._bit(((one >> COUNT_BITS) * share + (two >> COUNT_BITS) * (4 - share)) >> 2, bit)
        counters[first] = adapted(one, bit)
        counters[second] = adapted(two, bit)
        return bit

    def _bit(self, probability: int, bit: int) -> int:
        bound = (self._range >> PROBABILITY_BITS) * probability
        if bit:
            size = bound
        else:
            size = self._range - bound
            self._low += bound
            if self._low > _MASK:
                self._low &= _MASK
                self._carry()
        if size < _WORD:
            self._words += (self._low >> 32).to_bytes(4, "big")
            self._low = self._low << 32 & _MASK
            size <<= 32
        self._range = size
        return bit

    def _carry(self) -> None:
        """`low` passed 2**64: what was written is one too small."""
        at = len(self._words) - 1
        while self._words[at] == 255:
            self._words[at] = 0
            at -= 1
        self._words[at] += 1

    def finish(self, room: int) -> bytes | None:
        """Return the stream, as few bytes as tell it apart; None where they do not fit into `room`.

        The last word of a stream that is full was still written: what counts is its length before zeros at its end are left out.
        """
        low, kept = self._low, 0
        for zeros in range(56, -1, -8):
            mask = (1 << zeros) - 1
            up = (low + mask) & ~mask
            if up - low < self._range:
                low, kept = up, zeros
                break
        if low > _MASK:
            low &= _MASK
            self._carry()
        out = self._words + low.to_bytes(8, "big")[: 8 - kept // 8]
        return bytes(out.rstrip(b"\0")) if len(out) <= room else None


class Decoder:
    """Reads decisions. A payload that ends reads as zeros from there.

    Args:
        counters: Of the state; they adapt.
        payload: What an `Encoder` has written, or anything else.
    """

    __slots__ = ("_at", "_code", "_counters", "_payload", "_range")
    is_encoder: Final = False

    def __init__(self, counters: list[int], payload: bytes) -> None:
        self._counters = counters
        self._payload = payload
        self._at = 8
        self._range = _MASK
        self._code = int.from_bytes(payload[:8].ljust(8, b"\0"), "big")

    @property
    def is_used_up(self) -> bool:
        """Whether no byte of the payload is left."""
        return self._at >= len(self._payload)

    def even(self, bit: int) -> int:
        """Code a decision that is as likely as not."""
        return self._bit(ONE // 2, bit)

    def code(self, at: int, bit: int) -> int:
        """Code a decision under the counter at `at`, and let it adapt."""
        counters = self._counters
        counter = counters[at]
        bit = self._bit(counter >> COUNT_BITS, bit)
        counters[at] = adapted(counter, bit)
        return bit

    def code_two(self, first: int, second: int, share: int, bit: int) -> int:
        """Code a decision under two counters, of which the first has `share` quarters of the say."""
        counters = self._counters
        one, two = counters[first], counters[second]
        bit = self._bit(((one >> COUNT_BITS) * share + (two >> COUNT_BITS) * (4 - share)) >> 2, bit)
        counters[first] = adapted(one, bit)
        counters[second] = adapted(two, bit)
        return bit

    def _bit(self, probability: int, _bit: int) -> int:
        bound = (self._range >> PROBABILITY_BITS) * probability
        if self._code < bound:
            bit, size = 1, bound
        else:
            self._code -= bound
            bit, size = 0, self._range - bound
        if size < _WORD:
            size <<= 32
            self._renew()
        self._range = size
        return bit

    def _renew(self) -> None:
        word = self._payload[self._at : self._at + 4].ljust(4, b"\0")
        self._at += 4
        # Only bytes that no encoder writes can make the code as large as the range, or larger.
        self._code = (self._code << 32 | int.from_bytes(word, "big")) & _MASK


Coder = Encoder | Decoder
