"""The plan of a rollout: which devices are asked when. Pure.

A wave is `SIZE` or `SIZE@SELECTOR`: a number of devices (`5`), a share of the fleet (`10%`), or `proof`: as many as it takes until
Wald's test accepts the release. A selector is `tier:NAME` or `label:NAME`, several joined by `+`: a device has to match all of them.

**Cohorts.** In each rollout every device has a point between 0 and 1, from a digest of both names. A wave of 10 % is the devices below 0.1,
a wave of a number those with the lowest points. So the place of a device in a rollout depends on nothing but the two names: it is the
same after a restart, and whichever devices come and go; and it is another one in every rollout, so that it is not always the same devices that go first.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Final

from msgspec import Meta, Struct

from protocol.errors import RequestError
from protocol.ids import DeviceId

WAVES_MAX: Final = 32
SELECTORS_MAX: Final = 8
_DIGITS_MAX: Final = 8
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,62}")
_POINT_BITS: Final = 53  # exact in a float


class Wave(Struct, frozen=True, kw_only=True):
    """One step of a plan.

    Attributes:
        name: For people, unique in a plan.
        count: Devices; None for a share.
        percent: Of the devices that match, the waves before included; None for a number.
        is_proof: Neither: as many as the proof takes.
        tiers: Hardware tiers; a device of any of them matches. Empty for all.
        labels: That a device has to have, all of them.
        soak_ms: To wait once every device is decided, before the next wave begins or the rollout finishes.
    """

    name: str
    count: Annotated[int, Meta(ge=1)] | None = None
    percent: Annotated[float, Meta(gt=0, le=100)] | None = None
    is_proof: bool = False
    tiers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    soak_ms: Annotated[int, Meta(ge=0)] = 0

    @property
    def size_text(self) -> str:
        """As it is written in a plan."""
        size = "proof" if self.is_proof else str(self.count)
        if self.percent is not None:
            size = f"{self.percent:g}%"
        selectors = [f"tier:{tier}" for tier in self.tiers] + [f"label:{label}" for label in self.labels]
        return f"{size}@{'+'.join(selectors)}" if selectors else size

    def matches(self, tier: str, labels: frozenset[str]) -> bool:
        """Whether a device belongs to those of which this wave takes some."""
        return (not self.tiers or tier in self.tiers) and labels.issuperset(self.labels)

    def holds(self, place: float) -> bool:
        """Whether the device at a point belongs to the share of this wave; none does where it is a number."""
        return self.percent is not None and place * 100 < self.percent


def rank(rollout: str, device: DeviceId) -> bytes:
    """Sort key of a device in a rollout: stable, and another one in every rollout."""
    return hashlib.sha256(f"{rollout}/{device}".encode()).digest()


def point(rank_bytes: bytes) -> float:
    """The place of a device between 0 (included) and 1 (excluded), by its rank: in the same order."""
    return float((int.from_bytes(rank_bytes[:8], "big") >> (64 - _POINT_BITS)) / (1 << _POINT_BITS))


def plain_waves(canary_count: int) -> tuple[Wave, ...]:
    """A few devices, then all."""
    return Wave(name="canary", count=canary_count), Wave(name="rest", percent=100)


def parse_waves(text: str, soak_ms: Sequence[int] = (0,)) -> tuple[Wave, ...]:
    """Read a plan such as `3@label:lab,59,10%,50%,100%`.

    Args:
        text: Waves, joined by commas.
        soak_ms: One for all waves, or one for each.

    Raises:
        RequestError: A wave cannot be understood, is too much, or does not go beyond the one before it.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > WAVES_MAX:
        raise RequestError(f"{len(parts)} waves, allowed are {WAVES_MAX}", hint="join some of them")
    if len(soak_ms) not in {1, len(parts)}:
        raise RequestError(
            f"{len(soak_ms)} soak times for {len(parts)} waves",
            hint="give one for all waves, or one for each",
        )
    waves: list[Wave] = []
    for number, part in enumerate(parts):
        wave = _parse_wave(part, _wave_name(number, len(parts)), soak_ms[number % len(soak_ms)])
        if waves and _is_backward(waves[-1], wave):
            raise RequestError(
                f"wave {part!r} is no larger than the one before",
                hint="shares are of the whole fleet, the waves before included: let them grow",
            )
        waves.append(wave)
    return tuple(waves)


def _wave_name(number: int, count: int) -> str:
    if number == 0:
        return "canary"
    return "rest" if number == count - 1 else f"wave {number + 1}"


def _is_backward(before: Wave, wave: Wave) -> bool:
    same = (before.tiers, before.labels) == (wave.tiers, wave.labels)
    return same and before.percent is not None and wave.percent is not None and wave.percent <= before.percent


def _parse_wave(text: str, name: str, soak_ms: int) -> Wave:
    size, separator, selectors = text.partition("@")
    tiers, labels = _parse_selectors(text, selectors) if separator else ((), ())
    if size == "proof":
        return Wave(name=name, is_proof=True, tiers=tiers, labels=labels, soak_ms=soak_ms)
    try:
        if size.endswith("%"):
            percent = float(size[:-1])
            if 0 < percent <= 100:
                return Wave(name=name, percent=percent, tiers=tiers, labels=labels, soak_ms=soak_ms)
        elif size.isascii() and size.isdigit() and len(size) < _DIGITS_MAX and int(size):
            return Wave(name=name, count=int(size), tiers=tiers, labels=labels, soak_ms=soak_ms)
    except ValueError:
        pass
    raise RequestError(
        f"wave {text[:60]!r}: {size[:20]!r} is no size",
        hint="give a number from 1 to 9999999, a share such as 10%, or proof",
    )


def _parse_selectors(text: str, selectors: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found: dict[str, list[str]] = {"tier": [], "label": []}
    parts = selectors.split("+")
    for part in parts:
        kind, _, value = part.partition(":")
        if kind not in found or not _NAME.fullmatch(value):
            raise RequestError(
                f"wave {text[:60]!r}: {part[:40]!r} selects nothing",
                hint="give tier:NAME or label:NAME, several joined by +",
            )
        found[kind].append(value)
    if len(parts) > SELECTORS_MAX:
        raise RequestError(f"wave {text[:60]!r} has more than {SELECTORS_MAX} selectors")
    return tuple(found["tier"]), tuple(found["label"])


def parse_label(text: str) -> str:
    """A label that a wave can select.

    Raises:
        RequestError: It has characters that a plan cannot spell.
    """
    if not _NAME.fullmatch(text):
        raise RequestError(
            f"{text[:60]!r} is no label", hint="use letters, digits and . _ = -, at most 63 of them"
        )
    return text
