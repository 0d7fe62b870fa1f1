"""From what was observed to the record of a run. Pure but for reading the clock's date."""

from collections.abc import Mapping

from server.operations import RolloutStatus
from simulator.live.observer import Observer
from simulator.live.population import DevicePlan
from simulator.report.record import DeviceResult, Member, Rollout, Traffic


def rollout_of(status: RolloutStatus, started_ms: int) -> Rollout:
    """What the server knows of a rollout, with instants since the start of the run."""
    record = status.rollout
    return Rollout(
        rollout=record.id,
        version=record.version,
        state=str(record.state),
        reason=record.reason,
        canary_count=record.canary_count,
        created_ms=record.created_ms - started_ms,
        finished_ms=None if record.finished_ms is None else record.finished_ms - started_ms,
        members=[
            Member(
                device=member.device,
                wave=member.wave,
                status=member.status,
                code=member.code,
                detail=member.detail,
                asked_ms=member.asked_ms - started_ms,
                decided_ms=None if member.decided_ms is None else member.decided_ms - started_ms,
                prompts_passed=evidence.prompts_passed if evidence else None,
                prompts_total=evidence.prompts_total if evidence else None,
                latency_p99_ms=evidence.latency.p99_ms if evidence and evidence.latency else None,
                memory_peak_bytes=evidence.memory_peak_bytes if evidence else None,
            )
            for member in sorted(status.members, key=lambda each: (each.asked_ms, each.device))
            for evidence in [member.update.evidence if member.update else None]
        ],
    )


def device_result(
    plan: DevicePlan,
    observer: Observer,
    good: RolloutStatus,
    bad: RolloutStatus | None,
    *,
    air_bytes: int,
) -> DeviceResult:
    """One device: what the observer saw of it, what it reported, and what its link carried."""
    sight = observer.sights[plan.device]
    member = {str(each.device): each for each in good.members}.get(plan.device)
    tried = {str(each.device): each for each in bad.members}.get(plan.device) if bad is not None else None
    update = member.update if member is not None else None
    reports = [each.update for each in (member, tried) if each is not None and each.update is not None]
    faults = [each for each in observer.faults if each.device == plan.device and each.is_mid_update]
    return DeviceResult(
        device=plan.device,
        tier=plan.tier,
        link=plan.link.name,
        bandwidth_bytes_s=plan.link.bandwidth_bytes_s,
        latency_ms=plan.link.latency_ms,
        is_sleeper=plan.link.asleep_ms > 0,
        is_process=plan.kill is not None,
        factory_version=plan.factory,
        final_version=sight.version,
        is_canary=member is not None and member.wave == "canary",
        is_delta=update is not None and 0 < update.transfer_bytes_total < update.full_bytes_total,
        update_ms=_time_to_update(observer, plan.device, good.rollout.version),
        transfer_bytes=update.transfer_bytes_total if update is not None else 0,
        full_bytes=update.full_bytes_total if update is not None else 0,
        air_bytes=air_bytes,
        chunks_stored=len(sight.chunks),
        chunks_twice=sum(count - 1 for count in sight.chunks.values()),
        redundant_chunks=sum(report.redundant_chunks for report in reports),
        resumes=sum(report.resumes for report in reports),
        cuts=sum(each.kind != "kill" for each in faults),
        kills=sum(each.kind == "kill" for each in faults),
        asked=sight.asked,
        answered=sight.answered,
        failed=sight.failed,
        bad_outcome=tried.status if tried is not None else "",
        bad_code=tried.code if tried is not None else "",
    )


def _time_to_update(observer: Observer, device: str, version: str) -> int | None:
    """From the first transition of an update to its commit, by the device's own trace."""
    own = [each for each in observer.transitions if each.device == device and each.version == version]
    begun = [each.at_ms for each in own if each.target == "syncing"]
    committed = [each.at_ms for each in own if (each.source, each.target) == ("committing", "idle")]
    return max(committed) - min(begun) if begun and committed else None


def traffic_of(
    status: RolloutStatus, lengths: Mapping[str, int], air: Mapping[str, int], delta_bytes: int
) -> Traffic:
    """What a rollout put on the air.

    Args:
        status: The rollout.
        lengths: Length of the file of each version.
        air: Bytes that reached each device while it went on.
        delta_bytes: Length of the delta from the version before, 0 where there was none.
    """
    file_bytes = lengths[status.rollout.version]
    members = [member.device for member in status.members]
    return Traffic(
        version=status.rollout.version,
        devices=len(members),
        delta_bytes=delta_bytes,
        file_bytes=file_bytes,
        air_bytes=sum(air[device] for device in members),
        full_bytes=file_bytes * len(members),
    )
