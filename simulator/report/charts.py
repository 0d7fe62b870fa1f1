"""The plots of a run as SVG. Pure."""

import itertools
from collections.abc import Sequence
from typing import Final

from simulator.report.bands import band, moment
from simulator.report.record import DeviceResult, Member, Rollout, Run, Transition
from simulator.report.svg import (
    BAND_CLASSES,
    Frame,
    area,
    axes,
    circle,
    line,
    number,
    picture,
    rect,
    text,
)

_WIDTH: Final = 1040
_HALF: Final = 480
_COLUMNS: Final = 480
"""Instants at which the fleet is counted for the plot over time: as many as the eye can tell apart."""

_MARGIN_MS: Final = 300
_LABEL_WIDTH: Final = 130
_FAULT_WORDS: Final = {"cut": "connection lost", "sleep": "link gone to sleep", "kill": "killed"}


def time_span(run: Run) -> tuple[int, int]:
    """Instants between which something happened to the fleet."""
    moments = [each.at_ms for each in run.transitions] or [0, run.duration_ms]
    begin = min([phase.begin_ms for phase in run.phases if "release" in phase.name] or [moments[0]])
    return max(0, begin - _MARGIN_MS), max(moments) + _MARGIN_MS


def fleet_over_time(run: Run) -> str:
    """Devices by what they are doing, stacked, over time."""
    begin, end = time_span(run)
    frame = Frame(52, 44, _WIDTH - 64, 270, begin / 1000, end / 1000, len(run.devices))
    columns = _counts_over_time(run, begin, end)
    parts = axes(frame, x_title="seconds since the start", y_title="devices")
    base = [0] * len(columns)
    width = frame.width / len(columns)
    for name, kind in BAND_CLASSES.items():
        heights = [column.get(name, 0) for column in columns]
        if not any(heights):
            continue
        top = [low + height for low, height in zip(base, heights, strict=True)]
        parts.append(area(frame, base, top, width, f"fill {kind}", name))
        base = top
    parts += _phase_marks(run, frame)
    parts += _fault_marks(run, frame)
    return picture(_WIDTH, 370, parts, "Number of devices in each state over the time of the run")


def _counts_over_time(run: Run, begin: int, end: int) -> list[dict[str, int]]:
    states = {device.device: "idle" for device in run.devices}
    versions = {device.device: device.factory_version for device in run.devices}
    position = 0
    columns: list[dict[str, int]] = []
    for column in range(_COLUMNS):
        until = begin + (end - begin) * (column + 1) // _COLUMNS
        while position < len(run.transitions) and run.transitions[position].at_ms <= until:
            each = run.transitions[position]
            position += 1
            states[each.device] = each.target
            if each.source == "committing" and each.target == "idle":
                versions[each.device] = each.version
        counts: dict[str, int] = {}
        for device, state in states.items():
            name = band(state, versions[device])
            counts[name] = counts.get(name, 0) + 1
        columns.append(counts)
    return columns


def _phase_marks(run: Run, frame: Frame) -> list[str]:
    parts = []
    for phase in run.phases:
        if "release" not in phase.name:
            continue
        x = frame.x(phase.begin_ms / 1000)
        is_far_right = x > frame.right - _LABEL_WIDTH
        parts.append(line(x, frame.top - 38, x, frame.bottom, "phase"))
        parts.append(
            text(
                x - 6 if is_far_right else x + 6,
                frame.top - 28,
                phase.name,
                kind="strong",
                anchor="end" if is_far_right else "start",
            )
        )
    return parts


def _fault_marks(run: Run, frame: Frame) -> list[str]:
    parts = []
    for fault in run.faults:
        if fault.is_mid_update:
            x = frame.x(fault.at_ms / 1000)
            title = f"{fault.device}: {_FAULT_WORDS[fault.kind]} {moment(fault.state)}, {fault.at_ms / 1000:.1f} s"
            kind = "killed" if fault.kind == "kill" else "offline"
            size = 4.5 if fault.kind == "kill" else 3.5
            parts.append(circle(x, frame.top - 4, size, f"fill {kind} ringed", title))
    return parts


def bytes_over_the_air(run: Run) -> str:
    """For each rollout: what went over the air beside what whole files would have taken."""
    rows = [traffic for traffic in run.traffic if traffic.devices]
    most = max([traffic.full_bytes for traffic in rows] or [1]) / 1e6
    height = 24 + 110 * len(rows)
    frame = Frame(4, 0, _HALF - 168, height, 0, most)
    parts = []
    for position, traffic in enumerate(rows):
        y = 8 + position * 110
        devices = f"{traffic.devices} device{'s' if traffic.devices != 1 else ''}"
        parts.append(text(4, y + 12, f"{traffic.version} to {devices}", kind="strong"))
        for offset, value, kind, label in (
            (20, traffic.full_bytes, "neutral", "whole files"),
            (56, traffic.air_bytes, "fetching", "measured"),
        ):
            width = frame.x(value / 1e6) - frame.left
            parts.append(rect(4, y + offset, max(width, 2), 26, f"fill {kind}", f"{label}: {value:,} bytes"))
            parts.append(text(12 + max(width, 2), y + offset + 18, f"{value / 1e6:,.1f} MB  {label}"))
    return picture(_HALF, height, parts, "Bytes over the air against full-file updates")


def time_to_update(run: Run) -> str:
    """Share of the fleet that is updated, over the time since each device was asked."""
    done = sorted(
        (device for device in run.devices if device.update_ms is not None),
        key=lambda each: each.update_ms or 0,
    )
    longest = max([device.update_ms or 0 for device in done] or [1000]) / 1000
    frame = Frame(52, 34, _HALF - 72, 196, 0, longest * 1.04, 100)
    parts = axes(frame, x_title="seconds from request to commit", y_title="% of the fleet", y_format="{:.0f}")
    points = [f"{number(frame.x(0))},{number(frame.y(0))}"]
    share = 0.0
    dots = []
    for position, device in enumerate(done):
        x = frame.x((device.update_ms or 0) / 1000)
        points.append(f"{number(x)},{number(frame.y(share))}")
        share = 100 * (position + 1) / len(run.devices)
        points.append(f"{number(x)},{number(frame.y(share))}")
        dots.append(circle(x, frame.y(share), 4, f"fill {_trouble(device)} ringed", _story(device)))
    parts.append(f'<polyline class="curve" points="{" ".join(points)}"/>')
    return picture(_HALF, 280, parts + dots, "Distribution of the time to update")


def _trouble(device: DeviceResult) -> str:
    if device.kills:
        return "killed"
    return "offline" if device.cuts else "v2"


def _story(device: DeviceResult) -> str:
    parts = [f"{device.device}: {(device.update_ms or 0) / 1000:.1f} s over {device.link}"]
    if device.cuts:
        parts.append(f"{device.cuts} connections lost")
    if device.kills:
        parts.append(f"{device.kills} times killed")
    return ", ".join(parts)


def bad_release(run: Run, rollout: Rollout) -> str:
    """What the bad version met on each device that was asked to try it."""
    members = sorted(rollout.members, key=lambda each: each.asked_ms)
    steps = [each for each in run.transitions if each.version == rollout.version]
    begin = min([each.at_ms for each in steps] + [rollout.created_ms])
    end = max([each.at_ms for each in steps] + [rollout.finished_ms or rollout.created_ms]) + _MARGIN_MS
    height = 46.0 * len(members)
    frame = Frame(104, 40, _WIDTH - 470, height, 0, (end - begin) / 1000)
    parts = axes(frame, x_title="seconds since the rollout began", y_title="", y_ticks=1, y_format="")
    for position, member in enumerate(members):
        y = 48 + position * 46.0
        parts.append(text(frame.left - 10, y + 17, member.device, anchor="end"))
        parts += _member_bars(frame, y, [each for each in steps if each.device == member.device], begin)
        parts.append(text(frame.right + 14, y + 11, _outcome(member), kind="strong"))
        parts.append(text(frame.right + 14, y + 27, _reason(member)))
    if rollout.finished_ms is not None:
        x = frame.x((rollout.finished_ms - begin) / 1000)
        parts.append(line(x, 26, x, frame.bottom, "stop"))
        parts.append(
            text(
                x,
                18,
                f"the server {rollout.state} the rollout" if rollout.state == "stopped" else rollout.state,
                kind="strong",
                anchor="middle",
            )
        )
    return picture(_WIDTH, height + 90, parts, "What happened to the bad release on each canary")


def _member_bars(frame: Frame, y: float, steps: Sequence[Transition], begin: int) -> list[str]:
    parts = []
    for each, following in itertools.pairwise(steps):
        kind = BAND_CLASSES.get(band(each.target, ""), "neutral")
        left, right = frame.x((each.at_ms - begin) / 1000), frame.x((following.at_ms - begin) / 1000)
        seconds = (following.at_ms - each.at_ms) / 1000
        parts.append(
            rect(left, y, max(right - left, 1.5), 26, f"fill {kind}", f"{each.target}: {seconds:.2f} s")
        )
    if steps:
        x = frame.x((steps[-1].at_ms - begin) / 1000)
        kind = "back" if steps[-1].target == "rolled_back" else "neutral"
        parts.append(circle(x, y + 13, 7, f"fill {kind} ringed", steps[-1].target))
    return parts


def _outcome(member: Member) -> str:
    words = {
        "rolled_back": "tried it, rolled back",
        "withdrawn": "request taken back before it began",
        "committed": "kept it",
    }
    return words.get(member.status, member.status)


def _reason(member: Member) -> str:
    if member.prompts_total is not None:
        return f"{member.prompts_passed} of {member.prompts_total} golden prompts right ({member.code})"
    return f"{member.code} {member.detail}".strip()[:60]


def scores(run: Run) -> str:
    """How good each version is, as its builder measured it."""
    frame = Frame(4, 0, _HALF - 100, 0, 0, 1)
    kinds = ("v1", "v2", "v3")
    parts = []
    for position, (model, kind) in enumerate(zip(run.models, kinds, strict=False)):
        y = 6 + position * 62
        score = model.score or 0.0
        width = max(frame.x(score) - frame.left, 2)
        parts.append(rect(4, y, width, 26, f"fill {kind}"))
        label = "not measured" if model.score is None else f"{model.score:.1%}"
        parts.append(text(12 + width, y + 18, f"{model.version}: {label}", kind="strong"))
        parts.append(text(4, y + 43, model.story))
    return picture(_HALF, 12 + 62 * len(run.models), parts, f"{run.score_name}, by version")
