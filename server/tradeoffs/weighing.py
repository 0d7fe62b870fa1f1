"""Draws the trade-off report together: scorecards, tier files, the fleet's census and its deltas. The edge between them and the pure parts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from protocol.errors import RequestError
from protocol.ids import Digest, digest_of, parse_family, parse_version
from protocol.release import Release
from server.documents import read_card
from server.fleet.registry import DeviceRecord
from server.home import Home, opened
from server.operations import find_release
from server.releases.catalog import Catalog
from server.releases.delta_garbage import is_absent
from server.releases.publisher import Publisher
from server.scorecard.card import Scorecard, encode_card
from server.scorecard.statistics import CONFIDENCE, paired
from server.scorecard.verdict import questions_needed
from server.tiers.files import Tier
from server.tiers.fit import Fit
from server.tiers.judging import Judge, read_named
from server.tradeoffs.air import Field
from server.tradeoffs.deltas import Progress, measure_deltas, read_sizes
from server.tradeoffs.dominance import Beaten, Contender, beaten, contrast, known_axes
from server.tradeoffs.energy import MODEL
from server.tradeoffs.frontiers import frontier_tables
from server.tradeoffs.paragraph import write_paragraph
from server.tradeoffs.prices import MB, Prices
from server.tradeoffs.records import (
    DEFAULT_AXES,
    Air,
    Axis,
    Candidate,
    Comparison,
    Figure,
    Margins,
    Missing,
    Option,
    Shortfall,
    SuiteFlips,
    TierTable,
    TradeoffReport,
)
from server.tradeoffs.standing import Entry, candidate, files_of, flips_between, likely_reference

VERSIONS_MAX: Final = 16
"""A table of more is no longer read, and each version is judged for every tier."""

ANY_TIER: Final = "all devices"


class Question(Struct, frozen=True, kw_only=True):
    """What is asked for.

    Attributes:
        family: Of the versions.
        versions: At least one, drafts or published.
        reference: Version that their scorecards were compared with; empty for the one that most of them were.
        tiers: Names; none for all of the runtime.
        axes: On which versions are compared.
        margins: How much is no difference.
        prices: Of data; None without.
        cards: Scorecards beside those that releases name, for versions with the same files.
        is_building: Build the deltas that are missing, to see how large they are.
    """

    family: str
    versions: tuple[str, ...]
    reference: str = ""
    tiers: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = DEFAULT_AXES
    margins: Margins = Margins()
    prices: Prices | None = None
    cards: tuple[Scorecard, ...] = ()
    is_building: bool = False


class _Table(Struct, frozen=True, kw_only=True):
    """A tier that gets a table: its file if there is one, and which devices are of it; None for all."""

    name: str
    tier: Tier | None
    devices_of: str | None


def weigh(
    folder: Path, question: Question, progress: Progress = lambda _done, _total, _what: None
) -> TradeoffReport:
    """Compare versions.

    Args:
        folder: The server's.
        question: What is asked for.
        progress: Told how building deltas goes.

    Raises:
        RequestError: There is no such version or tier, versions are of different runtimes, or a tier file is malformed.
        StorageError: A file of a release, or a scorecard, is missing or damaged.
    """
    with opened(folder) as home:
        entries = _entries(home, question)
        reference = _reference(home, question, entries)
        candidates = [candidate(entry, reference) for entry in entries]
        devices = _devices(home, question.family)
        field, missing = _field(home, question, entries, devices, progress)
        tables = _tables(home, question, entries[0].release)
        judge = Judge(home)
        report = TradeoffReport(
            family=question.family,
            runtime=entries[0].release.runtime,
            reference="" if reference is None else reference.release.version,
            axes=list(question.axes),
            margins=question.margins,
            confidence=CONFIDENCE,
            currency="" if question.prices is None else question.prices.currency,
            candidates=candidates,
            comparisons=list(_comparisons(candidates, question.margins)),
            tiers=[
                _tier_table(judge, question, each, entries, candidates, field, devices) for each in tables
            ],
            strays=_strays(tables, devices),
            missing=missing,
            notes=[],
        )
    report = msgspec.structs.replace(report, notes=list(_notes(report)))
    return msgspec.structs.replace(report, paragraph=write_paragraph(report))


def _entries(home: Home, question: Question) -> list[Entry]:
    names = list(dict.fromkeys(question.versions))
    if not 1 <= len(names) <= VERSIONS_MAX:
        raise RequestError(f"{len(names)} versions, possible are 1 to {VERSIONS_MAX}", hint="name fewer")
    entries = [_entry(home, question, name) for name in names]
    first = entries[0].release
    for entry in entries:
        if entry.release.runtime != first.runtime:
            raise RequestError(
                f"{first.family} {first.version} runs under {first.runtime}, {entry.release.version} under {entry.release.runtime}",
                hint="compare versions of one runtime",
            )
    unused = [
        card for card in question.cards if files_of(card.subject) not in {each.files for each in entries}
    ]
    if unused:
        subject = unused[0].subject
        raise RequestError(
            f"a scorecard is about other files than those of the versions: {subject.family} {subject.version}",
            hint="give scorecards of the versions that are compared",
        )
    return entries


def _entry(home: Home, question: Question, version: str) -> Entry:
    release = find_release(home, parse_family(question.family), parse_version(version)).release
    files = tuple(file.sha256 for file in release.files)
    card = next((card for card in reversed(question.cards) if files_of(card.subject) == files), None)
    if card is not None:
        return Entry(release=release, card=card, digest=digest_of(encode_card(card)))
    return Entry(release=release, card=read_card(home, release), digest=release.scorecard_sha256 or "")


def _reference(home: Home, question: Question, entries: Sequence[Entry]) -> Entry | None:
    if question.reference:
        return _entry(home, question, question.reference)
    found = likely_reference(entries)
    if found is None:
        return None
    records = [record.release for record in home.store.releases() if record.release.family == question.family]
    known = [*entries, *(Entry(release=release, card=None) for release in records)]
    same = [entry for entry in known if entry.files == files_of(found)]
    return min(same, key=lambda entry: entry.release.version != found.version, default=None)


def _devices(home: Home, family: str) -> list[DeviceRecord]:
    now_ms = home.clock.now_ms()
    return [each for each in home.store.devices() if each.family == family and not is_absent(each, now_ms)]


def _field(
    home: Home,
    question: Question,
    entries: Sequence[Entry],
    devices: Sequence[DeviceRecord],
    progress: Progress,
) -> tuple[Field, list[Missing]]:
    """The ways of the fleet, and the deltas that are missing on them; those that were missing are built, if that is asked for."""
    records = home.store.releases()
    repository = home.store.repository()
    assert repository is not None, "an open folder has been signed"
    published = Publisher({}).checked(repository, home.clock.now_ms())  # whoever looks needs no keys
    catalog = Catalog.of(
        published.targets,
        [record.release for record in records if record.published_ms is not None],
        published.refresh_ms,
    )
    releases = [record.release for record in records if record.release.family == question.family]
    refused = {(each.base, each.result) for each in home.store.refusals()}

    def look() -> Field:
        return Field(catalog, releases, devices, read_sizes(home.config.folder), refused)

    field = look()
    found = [field.missing(entry.release) for entry in entries]
    if question.is_building and any(names for _, names in found):
        wanted = [name for _, names in found for name in names]
        measure_deltas(home.blobs, home.config.folder, wanted, releases, progress)
        field = look()
        found = [field.missing(entry.release) for entry in entries]
    return field, [each for missing, _ in found for each in missing]


def _tables(home: Home, question: Question, release: Release) -> list[_Table]:
    tiers = read_named(home, question.tiers)
    if tiers:
        return [
            _Table(name=name, tier=tier, devices_of=name)
            for name, tier in tiers.items()
            if question.tiers or tier.runtime == release.runtime
        ]
    if question.tiers:
        return [_Table(name=name, tier=None, devices_of=name) for name in dict.fromkeys(question.tiers)]
    return [_Table(name=ANY_TIER, tier=None, devices_of=None)]


def _strays(tables: Sequence[_Table], devices: Sequence[DeviceRecord]) -> int:
    names = {each.devices_of for each in tables}
    return 0 if None in names else sum(device.tier not in names for device in devices)


def _tier_table(
    judge: Judge,
    question: Question,
    table: _Table,
    entries: Sequence[Entry],
    candidates: Sequence[Candidate],
    field: Field,
    devices: Sequence[DeviceRecord],
) -> TierTable:
    here = [each for each in devices if table.devices_of is None or each.tier == table.devices_of]
    price = None if question.prices is None else question.prices.per_mb_of(table.name)
    options = [
        _option(judge, table, entry, each, field.air(entry.release, table.devices_of), price)
        for entry, each in zip(entries, candidates, strict=True)
    ]
    contenders = {
        option.version: Contender(candidate=each, figures=_figures(option))
        for option, each in zip(options, candidates, strict=True)
        if option.is_eligible
    }
    axes = known_axes(list(contenders.values()), question.axes)
    found = dict(zip(contenders, beaten(list(contenders.values()), axes, question.margins), strict=True))
    return TierTable(
        name=table.name,
        memory_mb=None if table.tier is None else table.tier.memory_mb,
        disk_mb=None if table.tier is None else table.tier.disk_mb,
        token_ms_max=None if table.tier is None else table.tier.token_ms_max,
        devices=len(here),
        running=dict(Counter(each.version for each in here).most_common(VERSIONS_MAX)),
        price_per_mb=price,
        axes=axes,
        options=[_judged(option, found.get(option.version)) for option in options],
        frontiers=frontier_tables(entries, field, table.devices_of, price, question.margins),
    )


def _judged(option: Option, found: Beaten | None) -> Option:
    if found is None:
        return option
    return msgspec.structs.replace(
        option, is_best=not found.surely, beaten_by=found.surely, perhaps_beaten_by=found.perhaps
    )


def _option(
    judge: Judge, table: _Table, entry: Entry, about: Candidate, air: Air, price: float | None
) -> Option:
    found = None
    if table.tier is not None:
        found = judge.fit(entry.release, table.name, table.tier)
    fits = None if found is None else found.is_good
    return Option(
        version=about.version,
        is_eligible=about.standing == "scored" and fits is not False,
        is_best=False,
        beaten_by=[],
        perhaps_beaten_by=[],
        fits=fits,
        broken=[]
        if found is None
        else [
            Shortfall(budget=each.budget, needed=each.needed, available=each.available, detail=each.detail)
            for each in found.broken
        ],
        would_fit=[] if found is None else found.would_fit,
        latency=_latency(table.tier, table.name, entry, found),
        memory=_memory(entry.card, found),
        swap_bytes=None if found is None else found.swap_bytes,
        disk_bytes=None if found is None else found.disk_bytes,
        energy=None
        if about.energy_mj is None
        else Figure.exact(about.energy_mj, f"proxy of {about.inference}"),
        air=air,
        cost=None if price is None or not air.devices else air.total_bytes / MB * price,
    )


def _latency(tier: Tier | None, name: str, entry: Entry, found: Fit | None) -> Figure | None:
    """Measured on the tier; else modelled for it; else that of the machine which kept score."""
    if tier is not None and found is not None and found.token_ms is not None:
        known = tier.measurement(Digest(entry.release.files[0].sha256))
        if known is not None and known.tokens_per_s is not None:
            return Figure.exact(found.token_ms, f"measured on {name}")
        return Figure.exact(found.token_ms, f"modelled: all weights at {tier.memory_gb_per_s:g} GB/s")
    card = entry.card
    if card is None or card.speed is None:
        return None
    p50 = card.speed.p50_ms
    threads = f"{card.settings.threads} thread{'' if card.settings.threads == 1 else 's'}"
    basis = (
        f"p50 on the scorecard's machine: {card.machine}, {card.runtime} {card.runtime_version}, {threads}"
    )
    return Figure(value=p50.value, low=p50.low, high=p50.high, basis=basis)


def _memory(card: Scorecard | None, found: Fit | None) -> Figure | None:
    if found is not None:
        return Figure.exact(found.model_bytes, found.source)
    if card is None or card.memory is None or not card.memory.contexts:
        return None
    context = card.memory.contexts[0]
    tokens = f" with {context.tokens} tokens" if context.tokens else ""
    return Figure.exact(context.peak_bytes, f"peak{tokens} on the scorecard's machine: {card.machine}")


def _figures(option: Option) -> dict[Axis, Figure]:
    found: dict[Axis, Figure | None] = {
        "latency": option.latency,
        "memory": option.memory,
        "bytes": Figure.exact(option.air.mean_bytes, "air"),
        "energy": option.energy,
        "cost": None if option.cost is None else Figure.exact(option.cost, "air"),
    }
    return {axis: figure for axis, figure in found.items() if figure is not None}


def _comparisons(candidates: Sequence[Candidate], margins: Margins) -> Iterator[Comparison]:
    known = [each for each in candidates if each.standing in {"scored", "failed"}]
    for one, other in combinations(known, 2):
        suites = flips_between(one, other)
        first, second = Contender(candidate=one, figures={}), Contender(candidate=other, figures={})
        outcome = contrast("accuracy", first, second, margins)
        needed = [
            questions_needed(each, margins.accuracy)
            for flips in suites.values()
            for each in (flips, paired(flips.lost, flips.gained, flips.count))
        ]
        yield Comparison(
            version=one.version,
            other=other.version,
            suites=[SuiteFlips(name=name, flips=flips) for name, flips in suites.items()],
            accuracy=outcome,
            drift=contrast("drift", first, second, margins),
            questions_needed=max(needed) if needed and outcome == "undecided" else None,
        )


def _notes(report: TradeoffReport) -> Iterator[str]:
    if report.reference:
        yield f"Changes of answers and drift are against {report.reference}."
    else:
        yield "There is no reference: score the versions with --against one of them, so that they can be compared."
    yield (
        f"A version is out where another is no worse on every axis and better on one, with {100 * report.confidence:g} % confidence;"
        f" no difference are {100 * report.margins.accuracy:g} points of right answers, {report.margins.drift:g} nats of drift and"
        f" {100 * report.margins.latency:g} % of a measured latency. Figures of different origin are not compared."
    )
    for table in report.tiers:
        left_out = [axis for axis in report.axes if axis not in table.axes]
        if left_out and any(option.is_eligible for option in table.options):
            yield f"{table.name}: nothing is known of {', '.join(left_out)}, which is left out."
    if any(each.energy_mj is not None for each in report.candidates):
        yield MODEL
    if any(
        way.kind == "estimated"
        for table in report.tiers
        for option in table.options
        for way in option.air.ways
    ):
        yield "Some bytes are of deltas that were built for this report and are not signed; a server builds those that pay once a rollout begins."
    if any(table.frontiers for table in report.tiers):
        yield (
            "What could be sent instead of a requantized version is compared in bytes over the air, divergence from the float model and flips, on the"
            f" text on which it was chosen; no difference are {report.margins.drift:g} nats and what the choice allowed of flips."
        )
    if report.strays:
        yield f"Devices of the family whose tier is not shown here: {report.strays:,}."
