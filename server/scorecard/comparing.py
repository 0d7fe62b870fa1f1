"""Two scorecards side by side: that of a version and that of the one before it. Pure."""

from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

from server.scorecard.card import Scorecard
from server.scorecard.statistics import Interval

Unit = Literal["bytes", "ms", "per second", "operations", "share", "nats"]


class Row(Struct, frozen=True, kw_only=True):
    """One figure of both.

    Attributes:
        name: What it is.
        unit: Of the values; an interval of a change of shares is one of shares.
        before: Of the version before; None where it is not known.
        now: Of the version, likewise.
        change: With its 95 % interval, where both were measured on the same questions or texts.
        is_better: Whether that is for certain; None where the interval does not say.
    """

    name: str
    unit: Unit
    before: float | None
    now: float | None
    change: Interval | None = None
    is_better: bool | None = None


class CardComparison(Struct, frozen=True, kw_only=True):
    """The scorecard of a version beside that of another.

    Attributes:
        version: The other one.
        is_paired: Whether the scorecard was made against it, on the same questions.
        rows: Figures of both.
    """

    version: str
    is_paired: bool
    rows: list[Row]


def compare_cards(now: Scorecard, before: Scorecard | None) -> list[Row]:
    """Figures of both, those of resources first.

    Args:
        now: Of the version.
        before: Of the version before; None if nobody kept it: what the newer one found out about it is there all the same.
    """
    return [*_resources(now, before), *_suites(now, before), *_drift(now)]


def _resources(now: Scorecard, before: Scorecard | None) -> Iterator[Row]:
    cards = (before, now)
    size = [None if card is None else float(card.resources.size_bytes) for card in cards]
    yield Row(name="size of all files", unit="bytes", before=size[0], now=size[1])
    peaks = [
        None if card is None or card.memory is None or not card.memory.contexts else card.memory.contexts[0]
        for card in cards
    ]
    if any(peaks):
        values = [None if peak is None else float(peak.peak_bytes) for peak in peaks]
        yield Row(name="peak memory, smallest context", unit="bytes", before=values[0], now=values[1])
    step = now.speed.step if now.speed is not None else "inference"
    for share in ("p50", "p99"):
        values = [
            None if card is None or card.speed is None else float(getattr(card.speed, f"{share}_ms").value)
            for card in cards
        ]
        yield Row(name=f"{share} of one {step}", unit="ms", before=values[0], now=values[1])
    values = [None if card is None or card.speed is None else card.speed.steps_per_s for card in cards]
    yield Row(name=f"{step}s per second", unit="per second", before=values[0], now=values[1])
    if now.resources.costs:
        what = now.resources.costs[0].what
        costs = [
            None if card is None else next((cost for cost in card.resources.costs if cost.what == what), None)
            for card in cards
        ]
        values = [None if cost is None else float(cost.moved_bytes) for cost in costs]
        yield Row(name=f"moved for {what}", unit="bytes", before=values[0], now=values[1])
        values = [None if cost is None else float(cost.operations) for cost in costs]
        yield Row(name=f"operations for {what}", unit="operations", before=values[0], now=values[1])


def _suites(now: Scorecard, before: Scorecard | None) -> Iterator[Row]:
    changes = {} if now.drift is None else {each.name: each for each in now.drift.suites}
    earlier = {} if before is None else {each.name: each.accuracy for each in before.suites}
    for suite in now.suites:
        if suite.accuracy is None:
            continue
        name = f"{suite.name}, right of {suite.count:,}"
        change = changes.get(suite.name)
        if change is None:
            known = earlier.get(suite.name)
            yield Row(
                name=name,
                unit="share",
                before=None if known is None else known.value,
                now=suite.accuracy.value,
            )
            continue
        difference = change.paired.difference
        yield Row(
            name=name,
            unit="share",
            before=change.before.value,
            now=suite.accuracy.value,
            change=difference,
            is_better=True if difference.low > 0 else False if difference.high < 0 else None,
        )


def _drift(now: Scorecard) -> Iterator[Row]:
    texts = now.drift.texts if now.drift is not None else None
    if texts is not None:
        yield Row(
            name=f"KL divergence, mean of {texts.positions:,}",
            unit="nats",
            before=0.0,
            now=texts.mean.value,
            change=texts.mean,
        )
        yield Row(name="same first choice", unit="share", before=1.0, now=texts.same)
