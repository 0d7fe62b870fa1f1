"""Scorecards as `whimbrel score` makes them, of counts that a test chooses: no model runs for them."""

from pathlib import Path
from typing import Any

import msgspec

from protocol.ids import Digest, Family, Version, digest_of
from protocol.release import Release
from server.home import opened
from server.scorecard.card import (
    Check,
    Drift,
    Scorecard,
    Settings,
    Subject,
    SuiteDrift,
    SuiteScore,
    TextDrift,
    encode_card,
)
from server.scorecard.resources import Cost, Resources
from server.scorecard.statistics import Interval, paired, wilson
from server.scorecard.suites import Asking
from server.scorecard.summary import score_speed
from server.scorecard.work import ContextMemory, Memory, Speed

COUNT = 300
RIGHT = 270
QUESTIONS = digest_of(b"questions")


def make_card(
    release: Release,
    against: Release | None = None,
    *,
    flips: tuple[int, int] = (0, 0),
    kl: tuple[float, float, float] = (0.0, 0.0, 0.0),
    **changes: Any,
) -> Scorecard:
    """A scorecard that passed.

    Args:
        release: What it is about.
        against: What it was compared with.
        flips: Answers gained and lost against that, of 300, of which it had 270 right.
        kl: Mean divergence and its interval.
        changes: Fields that are otherwise.
    """
    right = RIGHT + flips[0] - flips[1]
    suite = SuiteScore(
        name="classes",
        kind="classes",
        digest=QUESTIONS,
        total=COUNT,
        asked=COUNT,
        count=COUNT,
        right=right,
        accuracy=wilson(right, COUNT),
        groups=(),
        prompts=(),
        notes=(),
    )
    plan = msgspec.structs.replace(
        suite, name="health plan", kind="golden", asked=8, count=8, right=8, accuracy=wilson(8, 8)
    )
    weights = release.bytes_total
    card = Scorecard(
        subject=_subject(release),
        runtime=release.runtime,
        runtime_version="1.0",
        machine="a small machine",
        settings=Settings(threads=1, context_tokens=4096, asking=Asking(), drift_texts=64),
        verdict="passed",
        checks=(Check(name="health plan", status="passed", detail=""),),
        speed=score_speed(
            Speed(load_ms=(5.0,), step_ms=tuple(weights / 1e6 * (1 + n / 4000) for n in range(400)))
        ),
        memory=Memory(
            runtime_bytes=60 << 20,
            weights_bytes=weights,
            contexts=(ContextMemory(tokens=0, cache_bytes=0, peak_bytes=(70 << 20) + 2 * weights),),
        ),
        resources=Resources(
            size_bytes=weights,
            parameters=weights // 4,
            cache_bytes_per_token=None,
            costs=(Cost(what="one input", operations=weights // 2, moved_bytes=weights),),
        ),
        suites=(plan, suite),
        drift=None if against is None else _drift(against, flips, kl),
        missing=(),
        missing_count=0,
    )
    return msgspec.structs.replace(card, **changes)


def bind_card(home: Path, card: Scorecard) -> None:
    """Have a draft name a scorecard, as `whimbrel score` does."""
    with opened(home) as there:
        record = there.store.release(Family(card.subject.family), Version(card.subject.version))
        assert record is not None
        digest = there.blobs.put(encode_card(card)).digest
        release = msgspec.structs.replace(record.release, scorecard_sha256=Digest(digest))
        there.store.add_release(msgspec.structs.replace(record, release=release))


def _subject(release: Release) -> Subject:
    return Subject(family=release.family, version=release.version, files=tuple(release.files))


def _drift(against: Release, flips: tuple[int, int], kl: tuple[float, float, float]) -> Drift:
    return Drift(
        against=_subject(against),
        suites=(
            SuiteDrift(
                name="classes",
                kind="classes",
                before=wilson(RIGHT, COUNT),
                paired=paired(*flips, COUNT),
                changed=sum(flips),
                groups=(),
            ),
        ),
        texts=TextDrift(
            texts=10,
            positions=100,
            mean=Interval(value=kl[0], low=kl[1], high=kl[2]),
            median=kl[0],
            p99=kl[2],
            largest=kl[2],
            same=0.98,
        ),
        divergences=(),
    )
