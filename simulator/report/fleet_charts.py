"""The plots of one simulated run as SVG. Pure; time axes are those of `timescale`."""

import math
from collections.abc import Callable, Sequence
from typing import Final

from simulator.report.fleet_bands import Counts, at_instant, classes_of, position
from simulator.report.peers import Transfer
from simulator.report.svg import Frame, LogFrame, area, axes, line, picture, polyline, rect, text
from simulator.report.timescale import TimeFrame, TimeScale, time_frame
from simulator.report.units import devices, duration, share, size
from simulator.results import FleetResult, VersionSpread

WIDE: Final = 1040
HALF: Final = 480
COLUMNS: Final = 400
LOAD_COLUMNS: Final = 200
BINS: Final = 40
LABEL_ROOM: Final = 120
LOG_FROM: Final = 20
"""A distribution whose largest value is more than so many times its smallest has a logarithmic axis."""

PERCENTILES: Final = (50, 95, 99)
_BAR: Final = 22
_BAR_ROOM: Final = 150


def states_over_time(result: FleetResult, counts: Sequence[Counts], scale: TimeScale) -> str:
    """Devices by what they do, stacked."""
    frame = time_frame(56, 44, WIDE - 68, 280, scale, result.scenario.devices)
    columns = [
        at_instant(counts, scale.instant((column + 1) / COLUMNS)).bands for column in range(COLUMNS)
    ]
    parts = time_axes(frame, "devices")
    base = [0] * COLUMNS
    for name, kind in classes_of(result.scenario).items():
        heights = [column.get(name, 0) for column in columns]
        if any(heights):
            top = [low + height for low, height in zip(base, heights, strict=True)]
            parts.append(area(frame, base, top, frame.width / COLUMNS, f"fill {kind}", name))
            base = top
    parts += frame.break_marks() + _marks(result, frame)
    return picture(WIDE, 384, parts, "Number of devices in each state over the time of the run")


def time_axes(frame: TimeFrame, y_title: str, *, y_format: str = "{:,.0f}", y_ticks: int = 5) -> list[str]:
    """Axes of a plot over the time of the run."""
    assert frame.scale is not None
    x_title = f"{frame.scale.unit} since the first rollout began"
    return axes(frame, x_title=x_title, y_title=y_title, y_format=y_format, y_ticks=y_ticks)


def _marks(result: FleetResult, frame: TimeFrame) -> list[str]:
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
    parts, free_x = [], -math.inf
    for at_s, label in sorted(marks):
        x = frame.x(at_s)
        parts.append(line(x, frame.top - 8, x, frame.bottom, "phase"))
        anchor = "end" if x > frame.right - LABEL_ROOM else "start"
        left = x - LABEL_ROOM if anchor == "end" else x
        if left >= free_x:
            parts.append(text(x, frame.top - 14, label, kind="strong", anchor=anchor))
            free_x = x if anchor == "end" else x + LABEL_ROOM
    return parts


def completion(result: FleetResult, spread: VersionSpread, begun_s: float) -> str:
    """Share of the fleet that runs a version, over the time since its rollout began."""
    total = result.scenario.devices
    points = [(max(at_s - begun_s, 1e-3), 100 * count / total) for at_s, count in spread.committed]
    frame = value_frame([at_s for at_s, _ in points], 56, 34, HALF - 76, 200, 100)
    parts = axes(frame, x_title="seconds since its rollout began", y_title="% of the fleet")
    parts.append(polyline(steps(frame, points), "curve strongline v2"))
    for percent in PERCENTILES:
        reached = next((at_s for at_s, value in points if value >= percent), None)
        if reached is not None:
            x, y = frame.x(reached), frame.y(percent)
            parts.append(line(x, y, x, frame.bottom, "phase"))
            parts.append(f'<circle class="fill v2 ringed" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{percent} % after {duration(reached)}</title></circle>')
    return picture(HALF, 284, parts, f"Share of the fleet that runs {spread.version} over time")


def steps(frame: Frame, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of a line that stays where it is until the next point."""
    corners = [(frame.left, frame.y(0))]
    for at_s, value in points:
        corners += [(frame.x(at_s), corners[-1][1]), (frame.x(at_s), frame.y(value))]
    return [*corners, (frame.right, corners[-1][1])]


def value_frame(
    values: Sequence[float], left: float, top: float, width: float, height: float, y_to: float
) -> Frame:
    """A frame for these values (at least one), logarithmic where they are far apart."""
    smallest, largest = max(min(values), 1e-3), max(max(values), 2e-3)
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


def time_to_update(result: FleetResult) -> str:
    """How long single devices took, from the request to the commit."""
    values = result.completion_s
    counts = histogram(values, value_frame(values, 56, 34, HALF - 76, 200, 1))
    frame = value_frame(values, 56, 34, HALF - 76, 200, max(counts) * 1.08)
    parts = axes(frame, x_title="seconds from request to commit", y_title="updates", y_format="{:,.0f}")
    width = frame.width / BINS
    for index, count in enumerate(counts):
        if count:
            y = frame.y(count)
            parts.append(rect(frame.left + index * width + 0.5, y, width - 1, frame.bottom - y, "fill fetching", f"{count:,} updates"))
    for row, percent in enumerate(PERCENTILES):
        value = percentile(values, percent)
        x = frame.x(value)
        is_right = x > frame.left + frame.width * 0.62
        parts.append(line(x, frame.top, x, frame.bottom, "phase"))
        parts.append(text(x - 5 if is_right else x + 5, frame.top + 12 + 17 * row, f"p{percent} {duration(value)}", kind="strong", anchor="end" if is_right else "start"))
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


def bytes_per_update(transfers: Sequence[Transfer]) -> str:
    """What a step between two versions takes, by each way of sending it."""
    rows: list[tuple[str, float, str, str]] = []
    for transfer in transfers:
        rows.append((f"{transfer.base} to {transfer.version}", -1, "", ""))
        rows += [(name, length, "neutral", size(length)) for name, length in transfer.peers.items()]
        rows += [
            (f"Whimbrel's signed delta ({profile})", length, "fetching", size(length))
            for profile, length in transfer.deltas.items()
        ]
    return bars(rows, "Bytes of one update, by the way of sending it")


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


def faults_by_kind(result: FleetResult) -> str:
    """How often each kind of fault happened."""
    rows = [
        (kind, count, "killed", f"{count:,}")
        for kind, count in sorted(result.faults.items(), key=lambda each: -each[1])
        if count
    ]
    return bars(rows, "Faults by kind")


def load_over_time(result: FleetResult, counts: Sequence[Counts], scale: TimeScale) -> str:
    """What the broker sent, how many devices were connected, what the server handled, over the time of the run."""
    edges = [scale.instant(column / LOAD_COLUMNS) for column in range(LOAD_COLUMNS + 1)]
    rows = (
        ("broker, MB/s sent", rates(counts, edges, lambda each: each.broker_bytes / 1e6), "fetching"),
        ("connections to the broker", [float(at_instant(counts, edge).connections) for edge in edges[1:]], "offline"),
        ("server, events/s", rates(counts, edges, lambda each: each.server_events), "installing"),
    )
    parts: list[str] = []
    for row, (title, values, kind) in enumerate(rows):
        frame = time_frame(64, 30 + row * 150, WIDE - 76, 92, scale, (max(values) or 1) * 1.08)
        y_format = "{:,.0f}" if max(values) >= 5 else "{:,.2f}"
        parts += axes(frame, x_title="", y_title=title, y_format=y_format, y_ticks=3)
        parts.append(area(frame, [0.0] * len(values), values, frame.width / len(values), f"fill {kind}", title))
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
