"""What a version's scorecard says about it, and whether it can be compared with the others. Pure.

Versions are compared by way of one reference, with which the scorecard of each was made: its scorecard tells which answers were gained and
lost on which questions, and how far distributions have moved.
"""

from collections import Counter
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from protocol.ids import digest_of
from protocol.release import Release
from server.scorecard.card import Scorecard, Subject, SuiteScore
from server.scorecard.statistics import Interval, Paired, paired
from server.tradeoffs.energy import energy_mj
from server.tradeoffs.records import Candidate, Drift, Standing, Suite

_NOTHING = Interval(value=0.0, low=0.0, high=0.0)


class Entry(Struct, frozen=True, kw_only=True):
    """A version and its scorecard.

    Attributes:
        release: The version.
        card: None if nobody kept score.
        digest: Of the scorecard's bytes.
    """

    release: Release
    card: Scorecard | None
    digest: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Digests of the files, by which a version is known to a scorecard."""
        return tuple(file.sha256 for file in self.release.files)


def files_of(subject: Subject) -> tuple[str, ...]:
    """Digests of the files that a scorecard is about."""
    return tuple(file.sha256 for file in subject.files)


def likely_reference(entries: Iterable[Entry]) -> Subject | None:
    """What most of the scorecards were compared with; the one that comes first among equals, None if there is none."""
    subjects = {
        files_of(entry.card.drift.against): entry.card.drift.against
        for entry in entries
        if entry.card is not None and entry.card.drift is not None
    }
    counted = Counter(
        files_of(entry.card.drift.against)
        for entry in entries
        if entry.card is not None and entry.card.drift is not None
    )
    return subjects[counted.most_common(1)[0][0]] if counted else None


def candidate(entry: Entry, reference: Entry | None) -> Candidate:
    """A version as its scorecard has it.

    Args:
        entry: The version.
        reference: What all are compared with; None if there is none.
    """
    card = entry.card
    is_reference = reference is not None and entry.files == reference.files
    standing, reason, remedy = _standing(entry, reference, is_reference=is_reference)
    found = Candidate(
        version=entry.release.version,
        is_reference=is_reference,
        standing=standing,
        reason=reason,
        remedy=remedy,
        verdict=None if card is None else card.verdict,
        scorecard_sha256=entry.digest,
        size_bytes=entry.release.bytes_total,
    )
    if card is None:
        return found
    is_compared = standing in {"scored", "failed"}
    cost = card.resources.costs[0] if card.resources.costs else None
    return msgspec.structs.replace(
        found,
        suites=[
            each
            for suite in card.suites
            if (each := _suite(card, suite, is_reference=is_reference, is_compared=is_compared)) is not None
        ],
        drift=_drift(card, is_reference=is_reference) if is_compared else None,
        inference="" if cost is None else cost.what,
        operations=None if cost is None else cost.operations,
        moved_bytes=None if cost is None else cost.moved_bytes,
        energy_mj=None if cost is None else energy_mj(cost.operations, cost.moved_bytes),
    )


def _standing(entry: Entry, reference: Entry | None, *, is_reference: bool) -> tuple[Standing, str, str]:
    """Standing, reason and remedy."""
    card, release = entry.card, entry.release
    command = f"whimbrel score {release.family} {release.version}"
    if not is_reference:
        command += f" --against {'VERSION' if reference is None else reference.release.version}"
    if card is None:
        return "unscored", "no scorecard", command
    if card.missing_count or card.verdict == "incomplete":
        return "incomplete", f"scorecard not complete, {card.missing_count} missing", command
    if reference is None:
        return "apart", "scorecard without a comparison", command
    if not is_reference and (card.drift is None or files_of(card.drift.against) != reference.files):
        if card.drift is None:
            return "apart", "scorecard without a comparison", command
        return "apart", f"scorecard against {card.drift.against.version}", command
    if card.verdict == "failed":
        names = [check.name for check in card.checks if check.status == "failed"]
        return "failed", f"scorecard failed in {', '.join(names)}", ""
    return "scored", "", ""


def _suite(card: Scorecard, suite: SuiteScore, *, is_reference: bool, is_compared: bool) -> Suite | None:
    if suite.accuracy is None:
        return None
    changes = {} if card.drift is None else {each.name: each.paired for each in card.drift.suites}
    return Suite(
        name=suite.name,
        kind=suite.kind,
        count=suite.count,
        right=suite.right,
        accuracy=suite.accuracy,
        change=changes.get(suite.name) if is_compared and not is_reference else None,
        question_set=_question_set(card, suite),
    )


def _question_set(card: Scorecard, suite: SuiteScore) -> str:
    """The same for the same questions, drawn and asked in the same way."""
    asked = [
        suite.kind,
        suite.digest,
        suite.asked,
        suite.count,
        card.settings.asking,
        card.settings.context_tokens,
    ]
    return digest_of(msgspec.json.encode(asked))[:16]


def _drift(card: Scorecard, *, is_reference: bool) -> Drift | None:
    if is_reference:
        return Drift(mean=_NOTHING, same_choice=1.0, positions=0)
    texts = card.drift.texts if card.drift is not None else None
    if texts is None:
        return None
    return Drift(mean=texts.mean, same_choice=texts.same, positions=texts.positions)


def flips_between(one: Candidate, other: Candidate) -> dict[str, Paired]:
    """How the answers of `one` differ from those of `other`, suite by suite; those that both were asked alike and that are not prompts.

    Either was compared with the reference. An answer that one has right and the other wrong was gained by the one or lost by the other, so
    that there are at most that many of them, and their difference is known exactly: the interval is the widest that the two scorecards allow.
    """
    theirs = {(suite.name, suite.question_set): suite for suite in other.suites}
    found = {}
    for suite in one.suites:
        same = theirs.get((suite.name, suite.question_set))
        if suite.kind in {"golden", "edge"} or same is None:
            continue
        gained, lost = _flips(one, suite)
        their_gained, their_lost = _flips(other, same)
        if None in {gained, their_gained}:
            continue
        found[suite.name] = paired(
            (gained or 0) + (their_lost or 0), (lost or 0) + (their_gained or 0), suite.count
        )
    return found


def _flips(candidate: Candidate, suite: Suite) -> tuple[int | None, int | None]:
    """Answers gained and lost against the reference; None where that is not known for all questions."""
    if candidate.is_reference:
        return 0, 0
    if suite.change is None or suite.change.count != suite.count:
        return None, None
    return suite.change.gained, suite.change.lost
