"""What the page shows beside what the core holds: tiers with what fits them, scorecards side by side, versions of a family."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from protocol.ids import Family, Version, parse_family, parse_version
from protocol.release import Release, release_target
from server.documents import read_card
from server.home import Home, opened
from server.operations import find_release
from server.ports import ReleaseRecord
from server.scorecard.card import Scorecard
from server.scorecard.comparing import CardComparison, compare_cards
from server.signing import signed_paths
from server.tiers.files import Tier, read_tiers
from server.tiers.fit import Fit
from server.tiers.judging import Judge
from server.tradeoffs.weighing import VERSIONS_MAX

RELEASES_MAX: Final = 50
"""Judged for each tier, the newest first; withdrawn ones are left out."""


class TierRelease(Struct, frozen=True, kw_only=True):
    """A release on a tier, and whether it is signed for it."""

    release: Release
    state: Literal["draft", "published"]
    fit: Fit


class TierOverview(Struct, frozen=True, kw_only=True):
    """A tier, and the releases of its runtime."""

    name: str
    tier: Tier
    releases: list[TierRelease]


def tiers_overview(folder: Path) -> list[TierOverview]:
    """Every tier with the newest releases.

    Raises:
        RequestError: A tier file is malformed.
        StorageError: A file of a release cannot be read.
    """
    with opened(folder) as home:
        tiers = read_tiers(folder)
        records = _standing(home)[:RELEASES_MAX] if tiers else []
        judge = Judge(home)
        return [
            TierOverview(
                name=name,
                tier=tier,
                releases=[
                    TierRelease(
                        release=each.release,
                        state="draft" if each.published_ms is None else "published",
                        fit=judge.fit(each.release, name, tier),
                    )
                    for each in records
                    if each.release.runtime == tier.runtime
                ],
            )
            for name, tier in tiers.items()
        ]


def compare_with_before(folder: Path, family: str, version: str) -> CardComparison | None:
    """A version's scorecard beside that of the one which it replaces: with which it was compared, or else the one that was added before.

    Returns:
        None where the version has no scorecard, or there is no other version.

    Raises:
        UnknownReleaseError: There is no such release.
        StorageError: A scorecard is missing or damaged.
    """
    with opened(folder) as home:
        record = find_release(home, parse_family(family), parse_version(version))
        card = read_card(home, record.release)
        others = [
            each.release
            for each in _standing(home)
            if each.release.family == family
            and each.release.version != version
            and each.added_ms <= record.added_ms
        ]
        if card is None:
            return None
        if card.drift is not None:
            return _comparison(home, card, card.drift.against.version, is_paired=True)
        return _comparison(home, card, others[0].version, is_paired=False) if others else None


def comparable_versions(folder: Path, family: str) -> list[str]:
    """Versions of a family that can be compared: those of the newest one's runtime that were not withdrawn, oldest first."""
    with opened(folder) as home:
        records = [each.release for each in _standing(home) if each.release.family == family]
        alike = [each.version for each in records if each.runtime == records[0].runtime]
        return alike[:VERSIONS_MAX][::-1]


def _comparison(home: Home, card: Scorecard, version: str, *, is_paired: bool) -> CardComparison:
    record = home.store.release(Family(card.subject.family), Version(version))
    before = None if record is None else read_card(home, record.release)
    return CardComparison(version=version, is_paired=is_paired, rows=compare_cards(card, before))


def _standing(home: Home) -> Sequence[ReleaseRecord]:
    """Drafts and published releases that were not withdrawn, newest first."""
    signed = signed_paths(home)
    return [
        record
        for record in reversed(home.store.releases())
        if record.published_ms is None
        or release_target(Family(record.release.family), Version(record.release.version)) in signed
    ]
