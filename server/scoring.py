"""Scorecards of the releases of a server: made, kept by their digests, and bound to drafts so that they are signed with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from protocol.errors import ReleaseError, RequestError
from protocol.ids import Digest, Family, Version, digest_of, parse_family, parse_version
from protocol.release import Release, release_target
from server.alerts.records import Alert, new_alert
from server.audit import Details
from server.documents import read_card, read_statement
from server.home import Home, opened
from server.operations import find_release
from server.ports import ReleaseRecord
from server.releases.provenance import scorecard_digests, with_scorecard
from server.scorecard.card import Scorecard, encode_card
from server.scorecard.frontier import Frontier
from server.scorecard.items import Suite, SuiteKind
from server.scorecard.keeping import WORK_FOLDER, Plan, keep_score
from server.scorecard.runner import Progress
from server.scorecard.suites import read_suite
from server.signing import read_waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A scorecard that was made.

    Attributes:
        card: What it says.
        digest: Of its bytes.
        is_bound: Whether the release names it, so that it is signed with it.
        note: Why not, for people; empty if it does.
    """

    card: Scorecard
    digest: Digest
    is_bound: bool
    note: str


def score_release(
    folder: Path,
    family: str,
    version: str,
    *,
    suites: Sequence[tuple[SuiteKind, Path]],
    plan: Plan,
    against: str | None = None,
    frontier: Frontier | None = None,
    progress: Progress = lambda _done, _total, _what: None,
) -> Scored:
    """Measure a release, and bind the scorecard to it where it is a draft.

    Args:
        folder: The server's.
        family: Model family.
        version: Of it.
        suites: What is asked beside the prompts of the health plan, each by its kind and file or folder.
        plan: How it is done.
        against: The version that it replaces.
        frontier: From which its file was chosen; by default the one that its scorecard has already.
        progress: Told how it goes.

    Raises:
        RequestError: There is no such release, a suite is malformed, the frontier is that of another file, or somebody else measures the
            same model.
        EngineError: The runtime is not installed.
        StorageError: A file is missing or damaged, or there is no room.
    """
    read = _read_suites(suites, plan)
    with opened(folder) as home:
        record = find_release(home, parse_family(family), parse_version(version))
        chosen_from = _frontier_of(home, record.release, frontier)
        before = None
        if against is not None:
            before = find_release(home, parse_family(family), parse_version(against)).release
            _check_comparable(record.release, before)
        card = keep_score(home.blobs, folder / WORK_FOLDER, record.release, before, read, plan, progress)
        card = msgspec.structs.replace(card, frontier=chosen_from)
        data = encode_card(card)
        note = _obstacle(home, record, card)
        if not note:
            note = _bind(home, record, data, card.verdict)
        if card.verdict == "failed":
            home.store.save([_failed(home, record, card, digest_of(data))])
        return Scored(card=card, digest=digest_of(data), is_bound=not note, note=note)


def _read_suites(named: Sequence[tuple[SuiteKind, Path]], plan: Plan) -> list[Suite]:
    kinds = [kind for kind, _ in named]
    suites = []
    for kind, path in named:
        suite = read_suite(kind, path, plan.asking)
        if kinds.count(kind) > 1:
            suite = msgspec.structs.replace(suite, name=f"{kind}:{path.name}")
        suites.append(suite)
    names = [suite.name for suite in suites]
    if len(set(names)) != len(names):
        raise RequestError(
            f"two suites of one kind are files called {max(names, key=names.count).partition(':')[2]}",
            hint="give them other names",
        )
    return suites


def _frontier_of(home: Home, release: Release, given: Frontier | None) -> Frontier | UnsetType:
    """How the file of a release was chosen, as far as anybody has said so."""
    digests = {file.sha256 for file in release.files}
    if given is not None:
        if given.result is UNSET:
            raise RequestError(
                f"the frontier on {given.text} has no result: no file was written from it",
                hint="give the one that lies beside the file of the release",
            )
        if given.result not in digests:
            raise RequestError(
                f"the frontier is that of a file with sha256 {given.result[:16]}…, which {release.family} {release.version} does not have",
                hint="give the one that lies beside the file of the release",
            )
        return given
    card = read_card(home, release)
    known: Frontier | UnsetType = UNSET if card is None else card.frontier
    return known if known is not UNSET and known.result in digests else UNSET


def _check_comparable(release: Release, before: Release) -> None:
    if before.runtime != release.runtime:
        raise RequestError(
            f"{before.family} {before.version} runs under {before.runtime}, {release.version} under {release.runtime}",
            hint="compare versions of one runtime",
        )


def _obstacle(home: Home, record: ReleaseRecord, card: Scorecard) -> str:
    """Why a release cannot name a new scorecard; empty if it can."""
    release = record.release
    if card.missing_count:
        return "it is not complete"
    if record.published_ms is not None:
        return "the release is published, and does not change any more"
    target = release_target(Family(release.family), Version(release.version))
    if read_waiting(home)[1].digest(target) is not None:
        return "the release waits for signatures, and does not change any more"
    return ""


def _failed(home: Home, record: ReleaseRecord, card: Scorecard, digest: Digest) -> Alert:
    """What is told of a version that is not good enough; once for each scorecard."""
    name = f"{record.release.family} {record.release.version}"
    broken = [f"{check.name}: {check.detail}" for check in card.checks if check.status == "failed"]
    text = f"The scorecard of {name} failed: {'; '.join(broken) or 'see `whimbrel score`'}"
    details: Details = {"release": name, "failed": len(broken), "scorecard": digest}
    return new_alert("scorecard.failed", name, home.clock.now_ms(), text, key=digest, details=details)


def _bind(home: Home, record: ReleaseRecord, data: bytes, verdict: str) -> str:
    """Have the draft name the scorecard; gives why it cannot."""
    release = msgspec.structs.replace(record.release, scorecard_sha256=digest_of(data))
    if release == record.release:
        return ""
    statement = read_statement(home, record.release)
    if statement is not None and scorecard_digests(statement) != {release.scorecard_sha256}:
        try:
            provenance = with_scorecard(statement, release)
        except ReleaseError as error:
            return str(error)
        release = msgspec.structs.replace(release, provenance_sha256=home.blobs.put(provenance).digest)
    home.blobs.put(data)
    name = f"{release.family} {release.version}"
    act = home.act("scorecard.bind", name, verdict=verdict, scorecard=digest_of(data))
    home.store.add_release(msgspec.structs.replace(record, release=release), [act])
    return ""
