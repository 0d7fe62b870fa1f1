"""Chance: for every purpose and every device a stream of its own, all derived from one seed.

A fault that is switched off so changes nothing of the others, and a device more or less nothing of its neighbours.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Final, TypeVar

_Item = TypeVar("_Item")

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_PER_UNIT: Final = 1.0 / (1 << 53)


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one purpose: SHA-256 over the names, so that it is the same in every process."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(seed: int, *names: object) -> random.Random:
    """A generator of the standard library, for code that takes one."""
    return random.Random(derived_seed(seed, *names))  # noqa: S311 - replayed from the seed, no secrets


class Stream:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 8 bytes of state where the standard generator has 2,500."""

    __slots__ = ("_state",)

    def __init__(self, seed: int, *names: object) -> None:
        self._state = derived_seed(seed, *names)

    def bits(self) -> int:
        """64 random bits."""
        state = self._state = (self._state + _GOLDEN) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)

    def random(self) -> float:
        """From 0 up to but not including 1."""
        return (self.bits() >> 11) * _PER_UNIT

    def chance(self, probability: float) -> bool:
        """Whether something happens that has this probability; what cannot happen takes nothing from the stream."""
        return probability > 0 and self.random() < probability

    def uniform(self, low: float, high: float) -> float:
        """Between two numbers."""
        return low + (high - low) * self.random()

    def randrange(self, count: int) -> int:
        """A number below `count`."""
        return self.bits() % count

    def choice(self, items: Sequence[_Item]) -> _Item:
        """One of them."""
        return items[self.bits() % len(items)]

    def exponential(self, mean: float) -> float:
        """Wait until the next of events that come at random, `mean` apart."""
        return -mean * math.log(1.0 - self.random())

    def spread(self, middle: float, factor: float) -> float:
        """Log-uniform between `middle / factor` and `middle * factor`."""
        return middle * math.exp(math.log(factor) * self.uniform(-1.0, 1.0))
