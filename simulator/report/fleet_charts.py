"""The plots of one simulated run as SVG. Pure; time axes are those of `timescale`."""

import math
from collections.abc import Callable, Sequence
from typing import Final

from simulator.report.fleet_bands import Counts, at_instant, classes_of, position
from simulator.report.svg import Frame, LogFrame, area, axes, circle, line, picture, polyline, rect, text
from simulator.report.timescale import TimeFrame, TimeScale, time_frame
from simulator.report.transfers import Transfer
from simulator.report.units import devices, duration, share, size
from simulator.results import FleetResult
from simulator.scenario import Scenario

WIDE: Final = 1040
HALF: Final = 480
COLUMNS: Final = 400
LOAD_COLUMNS: Final = 200
BINS: Final = 40
LABEL_ROOM: Final = 120
LOG_FROM: Final = 20
"""A distribution whose largest value is more than so many times its smallest has a logarithmic axis."""

PERCENTILES: Final = (50, 95, 99)
TICKED_WHOLE: Final = 5
"""From which on an axis has whole numbers only."""

_BAR: Final = 22
_BAR_ROOM: Final = 150
_WORDS_ROOM: Final = 90


def states_over_time(
    scenario: Scenario, counts: Sequence[Counts], scale: TimeScale, marks: Sequence[tuple[float, str]]
) -> str:
    """Devices by what they do, stacked; `marks` are instants and what begins or ends there, ascending."""
    frame = time_frame(56, 62, WIDE - 68, 280, scale, scenario.devices)
    columns = [at_instant(counts, scale.instant((column + 1) / COLUMNS)).bands for column in range(COLUMNS)]
    parts = time_axes(frame, "")
    base = [0] * COLUMNS
    for name, kind in classes_of(scenario).items():
        heights = [column.get(name, 0) for column in columns]
        if any(heights):
            top = [low + height for low, height in zip(base, heights, strict=True)]
            parts.append(area(frame, base, top, frame.width / COLUMNS, f"fill {kind}", name))
            base = top
    parts += frame.break_marks() + _drawn_marks(marks, frame)
    return picture(WIDE, 402, parts, "Number of devices in each state over the time of the run")


def time_axes(frame: TimeFrame, y_title: str, *, y_format: str = "{:,.0f}", y_ticks: int = 5) -> list[str]:
    """Axes of a plot over the time of the run."""
    assert frame.scale is not None
    x_title = f"{frame.scale.unit} since the first rollout began"
    return axes(frame, x_title=x_title, y_title=y_title, y_format=y_format, y_ticks=y_ticks)


def marks_of(result: FleetResult) -> list[tuple[float, str]]:
    """Where each version's first rollout begins, and where faults end."""
    marks: list[tuple[float, str]] = []
    seen: set[str] = set()
    for rollout in result.rollouts:
        if rollout.begun_s is not None and rollout.version not in seen:
            seen.add(rollout.version)
            marks.append((rollout.begun_s, f"{rollout.version} begins"))
    faults_end_s = result.scenario.faults.end_s
    if 0 < faults_end_s < result.virtual_s:
        marks.append((faults_end_s, "faults end"))
    return sorted(marks)


def _drawn_marks(marks: Sequence[tuple[float, str]], frame: TimeFrame) -> list[str]:
    parts, free = [], [-math.inf, -math.inf]
    for at_s, label in marks:
        x = frame.x(at_s)
        parts.append(line(x, frame.top - 8, x, frame.bottom, "phase"))
        is_far_right = x > frame.right - LABEL_ROOM
        left, right = (x - LABEL_ROOM, x) if is_far_right else (x, x + LABEL_ROOM)
        row = next((row for row, free_x in enumerate(free) if left >= free_x), None)
        if row is not None:
            free[row] = right
            anchor = "end" if is_far_right else "start"
            parts.append(text(x, frame.top - 14 - 18 * row, label, kind="strong", anchor=anchor))
    return parts


def completion(curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]) -> str:
    """Share of the fleet that runs a version, over the time since its rollout began.

    Args:
        curves: Name, CSS class, and points (seconds, per cent) of each; at least one point each.
    """
    frame = value_frame([at_s for _, _, points in curves for at_s, _ in points], 56, 34, HALF - 76, 200, 100)
    parts = axes(frame, x_title="seconds since its rollout began", y_title="% of the fleet")
    for name, kind, points in curves:
        parts.append(polyline(_steps(frame, points), f"curve strongline {kind}", name))
        for percent in PERCENTILES:
            reached = next((at_s for at_s, value in points if value >= percent), None)
            if reached is not None:
                x, y = frame.x(reached), frame.y(percent)
                parts.append(line(x, y, x, frame.bottom, "phase"))
                title = f"{name}: {percent} % after {duration(reached)}"
                parts.append(circle(x, y, 4.5, f"fill {kind} ringed", title))
    return picture(HALF, 284, parts, "Share of the fleet that runs the version, over time")


def spread_points(result: FleetResult, version: str) -> list[tuple[float, float]]:
    """Seconds since a version's first rollout began, and the per cent of the fleet that kept it by then."""
    if result.recording is None:
        return []
    begun_s = next((each.begun_s for each in result.rollouts if each.version == version), None) or 0.0
    return [
        (max(at_s - begun_s, 1e-3), 100 * count / result.scenario.devices)
        for spread in result.recording.versions
        if spread.version == version
        for at_s, count in spread.committed
    ]


def _steps(frame: Frame, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of a line that stays where it is until the next point."""
    corners = [(frame.left, frame.y(0))]
    for at_s, value in points:
        corners += [(frame.x(at_s), corners[-1][1]), (frame.x(at_s), frame.y(value))]
    return [*corners, (frame.right, corners[-1][1])]


def value_frame(
    values: Sequence[float], left: float, top: float, width: float, height: float, y_to: float
) -> Frame:
    """A frame for these values (at least one), logarithmic where they are far apart."""
    smallest, largest = max(min(values), 1e-3), max(*values, 2e-3)
    if largest > LOG_FROM * smallest:
        return LogFrame(left, top, width, height, smallest / 1.1, largest * 1.1, y_to)
    return Frame(left, top, width, height, 0, largest * 1.05, y_to)


def histogram(values: Sequence[float], frame: Frame) -> list[int]:
    """How many values lie in each of `BINS` bins of equal width in the drawing."""
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, max(0, int((frame.x(value) - frame.left) / frame.width * BINS)))] += 1
    return counts


def percentile(ordered: Sequence[float], percent: int) -> float:
    """A percentile of ascending values by the nearest rank."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def time_to_update(values: Sequence[float], updates: int) -> str:
    """How long single devices took.

    Args:
        values: Seconds, ascending, at least one; each stands for as many updates as any other.
        updates: How many there were.
    """
    counts = histogram(values, value_frame(values, 56, 34, HALF - 76, 200, 1))
    each = updates / len(values)
    frame = value_frame(values, 56, 34, HALF - 76, 200, max(counts) * each * 1.08)
    parts = axes(frame, x_title="seconds from request to commit", y_title="updates", y_format="{:,.0f}")
    width = frame.width / BINS
    for index, count in enumerate(counts):
        if count:
            left, y = frame.left + index * width, frame.y(count * each)
            title = f"{count * each:,.0f} updates"
            parts.append(rect(left + 0.5, y, width - 1, frame.bottom - y, "fill fetching", title))
    for row, percent in enumerate(PERCENTILES):
        value = percentile(values, percent)
        x = frame.x(value)
        is_right = x > frame.left + frame.width * 0.62
        parts.append(line(x, frame.top, x, frame.bottom, "phase"))
        label, anchor = f"p{percent} {duration(value)}", "end" if is_right else "start"
        parts.append(
            text(x - 5 if is_right else x + 5, frame.top + 12 + 17 * row, label, kind="strong", anchor=anchor)
        )
    return picture(HALF, 284, parts, "Distribution of the time to update")


def bars(rows: Sequence[tuple[str, float, str, str]], description: str, *, most: float = 0.0) -> str:
    """Horizontal bars: label, value, CSS class, and the value in words; a row with a negative value is a heading."""
    largest = max([most, *(value for _, value, _, _ in rows)]) or 1.0
    frame = Frame(4, 0, HALF - _BAR_ROOM, 0, 0, largest)
    parts, y = [], 4.0
    for label, value, kind, words in rows:
        if value < 0:
            parts.append(text(4, y + 18, label, kind="strong"))
            y += 27
            continue
        width = max(frame.x(value) - frame.left, 2)
        parts.append(text(4, y + 13, label))
        parts.append(rect(4, y + 19, width, _BAR, f"fill {kind}", f"{label}: {words}"))
        parts.append(text(12 + width, y + 19 + 16, words, kind="strong"))
        y += 19 + _BAR + 8
    return picture(HALF, y + 4, parts, description)


def bytes_per_update(transfer: Transfer) -> str:
    """What the step between two versions takes, by each way of sending it."""
    rows = [(name, length, "neutral", size(length)) for name, length in transfer.peers.items()]
    rows += [
        (f"Whimbrel's signed delta ({profile})", length, "fetching", size(length))
        for profile, length in transfer.deltas.items()
    ]
    return bars(rows, f"Bytes of an update from {transfer.base} to {transfer.version}")


def blast_radius(result: FleetResult, bad: Sequence[tuple[str, int, int, int]]) -> str:
    """For each bad version: devices that were asked, that tried it, and that kept it."""
    total = result.scenario.devices
    rows: list[tuple[str, float, str, str]] = []
    for version, asked, tried, kept in bad:
        rows.append((f"{version}, of {devices(total)}", -1, "", ""))
        rows += [
            (label, count, kind, f"{count:,} ({share(count, total)})")
            for label, count, kind in (
                ("were asked to run it", asked, "trial"),
                ("tried it", tried, "back"),
                ("kept it", kept, "v3"),
            )
        ]
    return bars(rows, "Devices that bad versions reached", most=total)


def grouped_bars(rows: Sequence[tuple[str, Sequence[tuple[float, str, str]]]], description: str) -> str:
    """Horizontal bars beside their labels.

    Args:
        rows: Label, and value, CSS class and the value in words of each bar of it.
        description: For those who cannot see it.
    """
    largest = max((value for _, values in rows for value, _, _ in values), default=0.0) or 1.0
    frame = Frame(_BAR_ROOM, 0, HALF - _BAR_ROOM - _WORDS_ROOM, 0, 0, largest)
    parts, y = [], 4.0
    for label, values in rows:
        parts.append(text(4, y + 7 + 9 * len(values), label))
        for value, kind, words in values:
            width = max(frame.x(value) - frame.left, 2)
            parts.append(rect(frame.left, y + 2, width, 15, f"fill {kind}", f"{label}: {words}"))
            parts.append(text(frame.left + width + 8, y + 14, words, kind="strong"))
            y += 18
        y += 6
    return picture(HALF, y + 4, parts, description)


def faults_by_kind(result: FleetResult) -> str:
    """How often each kind of fault happened."""
    counts = sorted(result.faults.items(), key=lambda each: -each[1])
    rows = [(kind, [(count, "killed", f"{count:,}")]) for kind, count in counts if count]
    return grouped_bars(rows, "Faults by kind")


def load_over_time(counts: Sequence[Counts], scale: TimeScale) -> str:
    """What the broker sent, how many devices were connected, what the server handled, over the time of the run."""
    edges = [scale.instant(column / LOAD_COLUMNS) for column in range(LOAD_COLUMNS + 1)]
    rows = (
        ("broker, MB/s sent", rates(counts, edges, lambda each: each.broker_bytes / 1e6), "fetching"),
        (
            "connections to the broker",
            [float(at_instant(counts, edge).connections) for edge in edges[1:]],
            "offline",
        ),
        ("server, events/s", rates(counts, edges, lambda each: each.server_events), "installing"),
    )
    parts: list[str] = []
    for row, (title, values, kind) in enumerate(rows):
        frame = time_frame(64, 30 + row * 150, WIDE - 76, 92, scale, (max(values) or 1) * 1.08)
        y_format = "{:,.0f}" if max(values) >= TICKED_WHOLE else "{:,.3g}"
        parts += axes(frame, x_title="", y_title=title, y_format=y_format, y_ticks=3)
        parts.append(
            area(frame, [0.0] * len(values), values, frame.width / len(values), f"fill {kind}", title)
        )
        parts += frame.break_marks()
    unit = f"{scale.unit} since the first rollout began"
    parts.append(text(WIDE - 12, 30 + 2 * 150 + 92 + 38, unit, kind="title", anchor="end"))
    return picture(WIDE, 30 + 3 * 150, parts, "Load on the broker and on the server over the time of the run")


def rates(counts: Sequence[Counts], edges: Sequence[float], value: Callable[[Counts], float]) -> list[float]:
    """Growth per second of a counter between instants; straight between two counts."""
    at_edges = [_interpolated(counts, edge, value) for edge in edges]
    return [
        max(0.0, late - early) / max(end - begin, 1e-9)
        for early, late, begin, end in zip(at_edges, at_edges[1:], edges, edges[1:], strict=False)
    ]


def _interpolated(counts: Sequence[Counts], at_s: float, value: Callable[[Counts], float]) -> float:
    index = position(counts, at_s)
    before, following = counts[index], counts[min(index + 1, len(counts) - 1)]
    length = following.at_s - before.at_s
    part = min(1.0, max(0.0, (at_s - before.at_s) / length)) if length > 0 else 0.0
    return value(before) + part * (value(following) - value(before))
