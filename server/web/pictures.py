"""Answers of the API from what the server's core and its store hold. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from protocol.delta.format import Profile
from protocol.ids import Family, Version
from protocol.release import delta_target, release_digest
from server.coordinator import Coordinator
from server.fleet.history import DeviceEvent
from server.fleet.registry import DeviceRecord
from server.ports import ReleaseRecord
from server.releases.provenance import Statement
from server.rollouts.campaign import Campaign
from server.rollouts.decisions import rate_text, standing
from server.rollouts.evidence import RateTest
from server.rollouts.records import Decision, MemberRecord, MemberStatus, RolloutRecord
from server.scorecard.card import Scorecard
from server.scorecard.comparing import CardComparison
from server.scorecard.report import text_lines
from server.web.views import (
    AirBytes,
    CardComparisonView,
    CardRow,
    DecisionView,
    Delta,
    Device,
    DeviceMoment,
    DevicePage,
    DeviceStory,
    Evidence,
    Fleet,
    Latency,
    Member,
    ReleaseDetails,
    ReleaseFileView,
    ReleaseSummary,
    RolloutDetails,
    RolloutSummary,
    ScorecardView,
    Trial,
    VersionCount,
    WaveView,
)

ROLLOUTS_MAX: Final = 50
"""Rollouts on the first page, the newest."""

STOP_LINE_MIN: Final = 60
STOP_LINE_MAX: Final = 1_000
"""Devices that the line is drawn for at which a rollout stops; it is nearly straight beyond."""

COURSE_MAX: Final = 500

_GOOD: Final = frozenset({"committed", "asked", "running", "withdrawn", "deferred"})


class MemberPage(NamedTuple):
    """Which devices of a rollout are asked for."""

    status: str = ""
    offset: int = 0
    limit: int = 100


def fleet_picture(
    coordinator: Coordinator, fleet: str, broker: str, now_ms: int, *, is_connected: bool
) -> Fleet:
    """The fleet at a glance."""
    devices = list(coordinator.registry)
    reports = [device.report for device in devices if device.report is not None]
    versions = Counter((report.family, report.version) for report in reports)
    return Fleet(
        fleet=fleet,
        at_ms=now_ms,
        is_connected=is_connected,
        broker=broker,
        devices=len(devices),
        online=sum(device.is_online for device in devices),
        states=dict(Counter(report.state for report in reports).most_common()),
        versions=[
            VersionCount(family=family, version=version, devices=count)
            for (family, version), count in sorted(versions.items())
        ],
        tiers=dict(sorted(Counter(report.tier for report in reports if report.tier).items())),
        air=air_bytes(coordinator.campaigns.values()),
        rollouts=rollout_list(coordinator)[:ROLLOUTS_MAX],
    )


def air_bytes(campaigns: Iterable[Campaign]) -> AirBytes:
    """What updates took that were begun, beside what whole files would have taken."""
    updates = [
        member.update for campaign in campaigns for member in campaign.members.values() if member.update
    ]
    received = sum(update.received_bytes for update in updates)
    full = sum(update.full_bytes_total for update in updates if update.received_bytes)
    return AirBytes(
        received_bytes=received, full_bytes=full, saved_share=1 - received / full if full else None
    )


def rollout_list(coordinator: Coordinator, stored: Iterable[RolloutRecord] = ()) -> list[RolloutSummary]:
    """All rollouts, newest first; of `stored` those that the coordinator has not taken up, or did not need to remember."""
    known = coordinator.campaigns
    summaries = [rollout_summary(campaign.record, campaign.counts()) for campaign in known.values()]
    summaries += [rollout_summary(record, {}) for record in stored if record.id not in known]
    return sorted(summaries, key=lambda each: (each.created_ms, each.id), reverse=True)


def rollout_summary(record: RolloutRecord, counts: Mapping[MemberStatus, int]) -> RolloutSummary:
    """A rollout, and how many devices have come how far."""
    return RolloutSummary(
        id=record.id,
        family=record.family,
        version=record.version,
        state=record.state,
        reason=record.reason,
        created_ms=record.created_ms,
        begun_ms=record.begun_ms,
        finished_ms=record.finished_ms,
        counts={str(status): count for status, count in (counts or record.counts).items()},
    )


def rollout_details(
    campaign: Campaign, decisions: Iterable[Decision], orders: int, now_ms: int, page: MemberPage
) -> RolloutDetails:
    """One rollout with a page of its devices: those that failed first, then those under way."""
    record = campaign.record
    members = [each for each in campaign.members.values() if page.status in {"", each.status}]
    members.sort(key=lambda each: (_urgency(each), each.device))
    waves: dict[str, Counter[str]] = {}
    codes: Counter[str] = Counter()
    for member in campaign.members.values():
        waves.setdefault(member.wave, Counter())[member.status] += 1
        if member.code and member.status not in _GOOD:
            codes[member.code] += 1
    return RolloutDetails(
        **rollout_summary(record, campaign.counts()).model_dump(),
        created_by=record.created_by,
        wave=record.wave,
        waves=[
            WaveView(
                name=wave.name,
                size=wave.size_text,
                soak_ms=wave.soak_ms,
                counts=dict(waves.get(wave.name, {})),
            )
            for wave in record.plan
        ],
        in_flight=campaign.in_flight,
        in_flight_max=record.in_flight_max,
        pace_per_minute=record.pace_per_minute,
        failures_max=record.failures_max,
        standing=standing(campaign, now_ms),
        evidence=None if campaign.rates is None else _evidence(campaign.rates),
        decisions=[_decision(each) for each in decisions],
        orders=orders,
        codes=dict(codes.most_common()),
        members=[_member(each) for each in members[page.offset : page.offset + page.limit]],
        members_total=len(members),
    )


def _evidence(rates: RateTest) -> Evidence:
    course = rates.evidence.course()
    return Evidence(
        text=rate_text(rates),
        odds=rates.evidence.finding().odds,
        limit=rates.rules.limit,
        is_proved=rates.is_proved,
        stop_line=rates.stop_line(min(STOP_LINE_MAX, max(STOP_LINE_MIN, rates.evidence.counted * 5 // 4))),
        course=course[-COURSE_MAX:],
    )


def _decision(decision: Decision) -> DecisionView:
    return DecisionView(
        at_ms=decision.at_ms,
        by=decision.by,
        action=decision.action,
        wave=decision.wave,
        text=decision.text,
        reason=decision.reason,
        numbers=decision.numbers,
    )


def device_page(
    coordinator: Coordinator, wanted: Mapping[str, str], text: str, after: str, limit: int
) -> DevicePage:
    """Devices whose fields are as wanted and whose name contains `text`.

    Args:
        coordinator: Knows them.
        wanted: Values of fields of `Device`; empty ones ask for nothing.
        text: Part of a name.
        after: The last name of the page before.
        limit: Devices on a page.
    """
    asked = {name: value for name, value in wanted.items() if value}
    views = (device_view(record) for record in coordinator.registry if text in record.device)
    found = [view for view in views if all(getattr(view, name) == value for name, value in asked.items())]
    found.sort(key=lambda view: view.device)
    rest = [device for device in found if device.device > after]
    page = rest[:limit]
    return DevicePage(devices=page, total=len(found), after=page[-1].device if len(rest) > limit else "")


def device_view(record: DeviceRecord) -> Device:
    """A device as it reported itself last."""
    report = record.report
    update = report.update if report else None
    return Device(
        device=record.device,
        is_online=record.is_online,
        family=record.family,
        version=record.version,
        state=report.state if report else "",
        tier=report.tier if report else "",
        seen_ms=record.seen_ms,
        rollout=update.rollout if update else "",
        target=update.version if update else "",
        outcome=update.outcome if update else "",
        code=update.code if update else "",
        detail=update.detail if update else "",
        received_bytes=update.received_bytes if update else 0,
        full_bytes=update.full_bytes_total if update else 0,
    )


def device_story(record: DeviceRecord, events: Iterable[DeviceEvent]) -> DeviceStory:
    """Everything that is known about a device."""
    report = record.report
    update = report.update if report else None
    evidence = update.evidence if update else None
    return DeviceStory(
        **device_view(record).model_dump(),
        files=dict(report.files) if report else {},
        runtimes=dict(report.runtimes) if report else {},
        disk_free_bytes=report.disk_free_bytes if report else 0,
        memory_bytes=report.memory_bytes if report else 0,
        desired_version=record.desired.version if record.desired else "",
        tries=update.tries if update else 0,
        resumes=update.resumes if update else 0,
        redundant_chunks=update.redundant_chunks if update else 0,
        invalid_chunks=update.invalid_chunks if update else 0,
        states_ms=dict(update.states_ms) if update else {},
        trial=None
        if evidence is None
        else Trial(
            prompts_passed=evidence.prompts_passed,
            prompts_total=evidence.prompts_total,
            load_ms=evidence.load_ms,
            latency=Latency(**msgspec.structs.asdict(evidence.latency)) if evidence.latency else None,
            memory_peak_bytes=evidence.memory_peak_bytes,
            detail=evidence.detail,
        ),
        moments=[
            DeviceMoment(
                at_ms=event.at_ms,
                is_online=event.is_online,
                state=event.state,
                version=event.version,
                rollout=event.rollout,
                target=event.target,
                outcome=event.outcome,
                code=event.code,
                detail=event.detail,
                received_bytes=event.received_bytes,
                full_bytes=event.full_bytes_total,
            )
            for event in events
        ],
    )


def release_summary(coordinator: Coordinator, record: ReleaseRecord, *, is_withdrawn: bool) -> ReleaseSummary:
    """A release, and where it stands by the store: the core learns of what was just signed a moment later."""
    release = record.release
    family, version = Family(release.family), Version(release.version)
    state = "draft" if record.published_ms is None else "withdrawn" if is_withdrawn else "published"
    return ReleaseSummary.model_validate(
        {
            "family": family,
            "version": version,
            "runtime": release.runtime,
            "bytes": release.bytes_total,
            "added_ms": record.added_ms,
            "published_ms": record.published_ms,
            "state": state,
            "devices": sum(device.version == version for device in coordinator.registry.of_family(family)),
        }
    )


def release_details(
    coordinator: Coordinator,
    record: ReleaseRecord,
    provenance: Statement | None,
    card: Scorecard | None,
    comparison: CardComparison | None,
    *,
    is_withdrawn: bool,
) -> ReleaseDetails:
    """A release with what leads to it, and what is known about it."""
    release = record.release
    return ReleaseDetails(
        **release_summary(coordinator, record, is_withdrawn=is_withdrawn).model_dump(),
        digest=release_digest(release),
        files=[
            ReleaseFileView(name=file.name, bytes=file.length, sha256=file.sha256) for file in release.files
        ],
        memory_bytes=release.resources.memory_bytes,
        tiers=list(release.resources.tiers),
        prompts=len(release.health.prompts),
        deltas=_deltas_to(coordinator, record),
        provenance=None if provenance is None else msgspec.to_builtins(provenance),
        scorecard=None if card is None else ScorecardView(verdict=card.verdict, lines=text_lines(card)),
        comparison=None if comparison is None else _comparison(comparison),
    )


def _comparison(found: CardComparison) -> CardComparisonView:
    return CardComparisonView(
        version=found.version,
        is_paired=found.is_paired,
        rows=[
            CardRow(
                name=row.name,
                unit=row.unit,
                before=row.before,
                now=row.now,
                change=None if row.change is None else (row.change.value, row.change.low, row.change.high),
                is_better=row.is_better,
            )
            for row in found.rows
        ],
    )


def _deltas_to(coordinator: Coordinator, record: ReleaseRecord) -> list[Delta]:
    catalog = coordinator.catalog
    names = {file.sha256: file for file in record.release.files}
    versions = {
        file.sha256: release.version for release in catalog.releases.values() for file in release.files
    }
    deltas = []
    for name in catalog.deltas():
        file = names.get(name.result)
        if file is not None:
            target = catalog.targets[delta_target(name.base, name.result, name.profile)]
            deltas.append(
                Delta(
                    base=versions.get(name.base, ""),
                    file=file.name,
                    profile=Profile(name.profile).name.lower(),
                    bytes=target.length,
                    whole_bytes=file.length,
                )
            )
    return sorted(deltas, key=lambda delta: (delta.file, delta.base, delta.profile))


def _member(record: MemberRecord) -> Member:
    update = record.update
    return Member(
        device=record.device,
        wave=record.wave,
        status=record.status,
        code=record.code,
        detail=record.detail,
        asked_ms=record.asked_ms,
        decided_ms=record.decided_ms,
        received_bytes=update.received_bytes if update else 0,
        full_bytes=update.full_bytes_total if update else 0,
    )


def _urgency(member: MemberRecord) -> int:
    if member.status in {"rolled_back", "failed", "silent"}:
        return 0
    return 1 if member.status in {"asked", "running", "rejected"} else 2
