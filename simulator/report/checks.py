"""The promises of a run and whether it kept them, from measured figures only. Pure."""

from collections.abc import Sequence
from typing import Final

from protocol.chunks import chunk_count
from simulator.report.record import Check, DeviceResult, ModelVersion, Rollout, Totals, Traffic

DELTA_CHUNKS_MIN: Final = 20
KILLED_MIN: Final = 5
"""In a fleet of `FLEET_FULL` and more; a smaller one must have its share of them."""

FLEET_FULL: Final = 30

FLEET_PROMPT: Final = 200
LATE_SHARE_MAX: Final = 0.05
"""One process carries the links of the whole fleet. In a larger one than `FLEET_PROMPT` chunks may stand in its queues for longer than a device
waits, which then asks for them again: few may come twice that way, and none because of a lost connection or a restart."""


def sum_up(devices: Sequence[DeviceResult], traffic: Sequence[Traffic], good_version: str) -> Totals:
    """Add up what the devices went through; bytes are those of the good rollout."""
    good = next(each for each in traffic if each.version == good_version)
    delta_bytes = good.delta_bytes
    times = sorted(device.update_ms for device in devices if device.update_ms is not None)
    return Totals(
        devices=len(devices),
        on_good_version=sum(device.final_version == good_version for device in devices),
        cut_devices=sum(device.cuts > 0 for device in devices),
        cuts=sum(device.cuts for device in devices),
        killed_devices=sum(device.kills > 0 for device in devices),
        kills=sum(device.kills for device in devices),
        chunks_stored=sum(device.chunks_stored for device in devices),
        chunks_twice=sum(device.chunks_twice for device in devices),
        redundant_chunks=sum(device.redundant_chunks for device in devices),
        resumes=sum(device.resumes for device in devices),
        delta_chunks=chunk_count(delta_bytes) if delta_bytes else 0,
        delta_bytes=delta_bytes,
        air_bytes=good.air_bytes,
        full_bytes=good.full_bytes,
        asked=sum(device.asked for device in devices),
        answered=sum(device.answered for device in devices),
        failed=sum(device.failed for device in devices),
        update_p50_ms=times[len(times) // 2] if times else None,
        update_max_ms=times[-1] if times else None,
    )


def check_run(
    totals: Totals,
    devices: Sequence[DeviceResult],
    models: Sequence[ModelVersion],
    good: Rollout,
    bad: Rollout | None,
    offered: dict[str, set[str]],
    tried: dict[str, set[str]],
) -> list[Check]:
    """Judge a run.

    Args:
        totals: From `sum_up`.
        devices: Every device.
        models: From the factory, the good one, the bad one.
        good: Rollout of the good version.
        bad: Rollout of the bad version; `None` where it did not come to that.
        offered: Versions that each device was ever asked to take, by its own trace.
        tried: Versions of which each device ever began a trial, likewise. Fewer: a rollout may be stopped in between.
    """
    return [
        _reached(totals, good),
        *_taken_back(devices, bad, offered, tried),
        *_disturbed(totals),
        *_transferred(totals),
        Check(
            name="inference never failed",
            wanted="every question answered",
            measured=f"{totals.answered:,} of {totals.asked:,} answered, {totals.failed:,} failed",
            is_passed=totals.failed == 0 and totals.answered == totals.asked > 0,
        ),
        _models_differ(models),
    ]


def _reached(totals: Totals, good: Rollout) -> Check:
    return Check(
        name=f"every device runs {good.version}",
        wanted=f"{totals.devices} devices, rollout finished",
        measured=f"{totals.on_good_version} devices, rollout {good.state}",
        is_passed=totals.on_good_version == totals.devices and good.state == "finished",
    )


def _taken_back(
    devices: Sequence[DeviceResult],
    bad: Rollout | None,
    offered: dict[str, set[str]],
    tried: dict[str, set[str]],
) -> list[Check]:
    names = ("the bad version is rolled back on each canary", "the bad version reaches nobody else")
    if bad is None:
        return [
            Check(name=name, wanted="a rollout", measured="none was started", is_passed=False)
            for name in names
        ]
    reached = {device for device, versions in offered.items() if bad.version in versions}
    triers = {device for device, versions in tried.items() if bad.version in versions}
    asked = {member.device for member in bad.members}
    canaries = {member.device for member in bad.members if member.wave == "canary"}
    back = {device.device for device in devices if device.bad_outcome == "rolled_back"}
    others = len(devices) - len(canaries)
    strays = (asked | reached | triers) - canaries
    return [
        Check(
            name=names[0],
            wanted="each one that tried it, rollout stopped",
            measured=f"{len(back & triers)} of {len(triers)} rolled back, rollout {bad.state}",
            is_passed=bool(triers) and back == triers and bad.state == "stopped",
        ),
        Check(
            name=names[1],
            wanted=f"0 of {others} other devices",
            measured=f"{len(strays)} of {others} other devices",
            is_passed=not strays,
        ),
    ]


def _disturbed(totals: Totals) -> list[Check]:
    cut_min = max(1, -(-totals.devices // 3))
    killed_min = KILLED_MIN if totals.devices >= FLEET_FULL else max(1, totals.devices // 6)
    return [
        Check(
            name="connections were lost in the middle of an update",
            wanted=f"at least {cut_min} devices",
            measured=f"{totals.cut_devices} of {totals.devices} devices, {totals.cuts} times in all",
            is_passed=totals.cut_devices >= cut_min,
        ),
        Check(
            name="devices were killed (SIGKILL) in the middle of an update",
            wanted=f"at least {killed_min}",
            measured=f"{totals.killed_devices} of {totals.devices} devices, {totals.kills} times in all",
            is_passed=totals.killed_devices >= killed_min,
        ),
    ]


def _transferred(totals: Totals) -> list[Check]:
    saved = 1 - totals.air_bytes / totals.full_bytes if totals.full_bytes else 0.0
    late_max = int(totals.chunks_stored * LATE_SHARE_MAX) if totals.devices > FLEET_PROMPT else 0
    return [
        Check(
            name="no chunk was fetched twice",
            wanted="0 stored twice, 0 redundant"
            if not late_max
            else f"0 stored twice, at most {LATE_SHARE_MAX:.0%} redundant",
            measured=f"{totals.chunks_twice} stored twice, {totals.redundant_chunks} redundant"
            f" of {totals.chunks_stored:,}",
            is_passed=totals.chunks_twice == 0 < totals.chunks_stored and totals.redundant_chunks <= late_max,
        ),
        Check(
            name="the delta is a real one",
            wanted=f"at least {DELTA_CHUNKS_MIN} chunks",
            measured=f"{totals.delta_chunks} chunks, {totals.delta_bytes:,} bytes",
            is_passed=totals.delta_chunks >= DELTA_CHUNKS_MIN,
        ),
        Check(
            name="less goes over the air than with whole files",
            wanted=f"less than {totals.full_bytes / 1e6:,.1f} MB",
            measured=f"{totals.air_bytes / 1e6:,.1f} MB, {saved:.0%} less",
            is_passed=0 < totals.air_bytes < totals.full_bytes,
        ),
    ]


def _models_differ(models: Sequence[ModelVersion]) -> Check:
    scores = [model.score for model in models]
    measured = ", ".join(
        f"{model.version} {model.score:.1%}" if model.score is not None else f"{model.version} not measured"
        for model in models
    )
    known = [score for score in scores if score is not None]
    return Check(
        name="the good version is better, the bad one worse",
        wanted="v1 < v2, v3 < v1",
        measured=measured,
        is_passed=len(known) == 3 and known[2] < known[0] < known[1],
    )
