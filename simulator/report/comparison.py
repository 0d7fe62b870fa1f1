"""The page about two simulated runs beside each other: the same plots on the same axes, and what differs in a table."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup
from msgspec import Struct
from msgspec.structs import asdict

from simulator.report.files import write_page
from simulator.report.fleet import active_instants, first_begin_s, legend_of
from simulator.report.fleet_bands import FLEET_CLASSES, Counts, counts_of
from simulator.report.fleet_charts import (
    HALF,
    LOAD_COLUMNS,
    PERCENTILES,
    WIDE,
    completion,
    grouped_bars,
    marks_of,
    percentile,
    rates,
    spread_points,
    states_over_time,
    time_axes,
    value_frame,
)
from simulator.report.fleet_words import main_reach, reaches
from simulator.report.svg import axes, picture, polyline
from simulator.report.templates import render
from simulator.report.timescale import TimeScale, time_frame, time_scale
from simulator.report.units import devices, duration, size
from simulator.results import FleetResult

CLASSES: Final = ("fetching", "back")
"""Colours of the two runs."""

RATIO_MIN: Final = 3
"""From which on a figure is told as a multiple of the other one, not as a change in per cent."""

_NOTHING: Final = "\N{EN DASH}"
_SAME: Final = 0.0005
"""Part of a figure below which a change is called none."""


class Row(Struct, frozen=True, kw_only=True):
    """One figure of both runs."""

    name: str
    before: str
    after: str
    change: str
    is_better: bool | None  # None where there is no better, or no change


def write_comparison(path: Path, a: FleetResult, b: FleetResult) -> None:
    """Write the page about two runs.

    Args:
        path: Where.
        a: What is compared with.
        b: What is compared.

    Raises:
        StorageError: The file cannot be written.
    """
    write_page(path, render_comparison(a, b))


def render_comparison(a: FleetResult, b: FleetResult) -> str:
    """The page: a complete document that needs nothing from outside."""
    pair = (a, b)
    counts = [_since_begin(each) for each in pair]
    scale = _common_scale(pair, counts)
    marks = [[(at_s - first_begin_s(each), label) for at_s, label in marks_of(each)] for each in pair]
    return render(
        "comparison.html.j2",
        runs=list(zip("AB", pair, CLASSES, strict=True)),
        headline=headline(a, b),
        rows=compared(a, b),
        settings=settings(a, b),
        kinds=FLEET_CLASSES,
        legends=[legend_of(result, each) for result, each in zip(pair, counts, strict=True)],
        states=[
            Markup(states_over_time(result.scenario, each, scale, mark))  # noqa: S704 - built by us, every text in it is escaped
            for result, each, mark in zip(pair, counts, marks, strict=True)
        ],
        completion=_completion(pair),
        times=_times(pair),
        load=Markup(_load(counts, scale)),  # noqa: S704 - likewise
        traffic=Markup(_traffic(pair)),  # noqa: S704 - likewise
        faults=_faults(pair),
        devices=devices,
        duration=duration,
    )


def headline(a: FleetResult, b: FleetResult) -> str:
    """What differs most, in one sentence."""
    for name, result, other in (("A", a, b), ("B", b, a)):
        if result.failure is not None and other.failure is None:
            return f"{name} broke a promise, the other run none"
    before, after = _updated_s(a, 99), _updated_s(b, 99)
    each = (a.down_bytes / a.scenario.devices, b.down_bytes / b.scenario.devices)
    traffic = f"each device took {size(each[1])} instead of {size(each[0])}"
    if before is None or after is None:
        return f"In B {traffic}"
    return f"B had 99 % of the fleet after {duration(after)} instead of {duration(before)}; {traffic}"


def compared(a: FleetResult, b: FleetResult) -> list[Row]:
    """Figures of both runs, and the change from the first to the second."""
    rows = [
        _row(
            f"until {percent}\N{NO-BREAK SPACE}% of the fleet ran the version",
            _updated_s(a, percent),
            _updated_s(b, percent),
            duration,
        )
        for percent in PERCENTILES
    ]
    rows += [
        _row(f"time to update, p{percent}", _time_s(a, percent), _time_s(b, percent), duration)
        for percent in PERCENTILES
    ]
    figures: list[tuple[str, Callable[[FleetResult], float], Callable[[float], str], bool | None]] = [
        ("to each device, on average", lambda run: run.down_bytes / run.scenario.devices, size, True),
        ("to the median device", lambda run: run.down_bytes_per_device[1], size, True),
        ("to the device that took most", lambda run: run.down_bytes_per_device[3], size, True),
        ("from each device, on average", lambda run: run.up_bytes / run.scenario.devices, size, True),
        ("sent by the broker", lambda run: run.broker.bytes_out, size, True),
        ("kept by the broker, at most", lambda run: run.broker.retained_bytes_peak, size, True),
        ("messages sent by the broker", lambda run: run.broker.messages_out, _whole, True),
        ("messages dropped for slow devices", _dropped, _whole, True),
        ("work of the server", lambda run: run.server.busy_s, duration, True),
        ("devices that tried a bad version", _blast, _whole, True),
        ("devices that did not converge", lambda run: run.not_converged, _whole, True),
        ("commits", lambda run: run.updates, _whole, None),
        ("faults injected", lambda run: sum(run.faults.values()), _whole, None),
        ("virtual time", lambda run: run.virtual_s, duration, None),
    ]
    rows += [
        _row(name, value(a), value(b), words, less_is_better=less) for name, value, words, less in figures
    ]
    return rows


def settings(a: FleetResult, b: FleetResult) -> list[tuple[str, str, str]]:
    """Fields of the scenarios that differ: path, value of the first, value of the second."""
    before, after = (dict(_fields("", each.scenario)) for each in (a, b))
    return [
        (path, before.get(path, _NOTHING), after.get(path, _NOTHING))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _fields(path: str, value: Any) -> list[tuple[str, str]]:
    items: list[tuple[str, Any]]
    match value:
        case Struct():
            items = [(f"{path}.{name}".lstrip("."), each) for name, each in asdict(value).items()]
        case tuple():
            items = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
        case _:
            return [(path, str(value))]
    return [pair for name, each in items for pair in _fields(name, each)]


def _row(
    name: str,
    before: float | None,
    after: float | None,
    words: Callable[[float], str],
    *,
    less_is_better: bool | None = True,
) -> Row:
    texts = [_NOTHING if value is None else words(value) for value in (before, after)]
    if before is None or after is None:
        is_better = None if before is after else after is not None
        return Row(name=name, before=texts[0], after=texts[1], change=_NOTHING, is_better=is_better)
    if abs(after - before) <= _SAME * max(abs(before), abs(after)):
        return Row(name=name, before=texts[0], after=texts[1], change="same", is_better=None)
    change = f"+{words(after)}" if not before else _change(after / before)
    is_better = None if less_is_better is None else (after < before) == less_is_better
    return Row(name=name, before=texts[0], after=texts[1], change=change, is_better=is_better)


def _change(ratio: float) -> str:
    if ratio >= RATIO_MIN:
        return f"\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}{ratio:,.1f}"
    return f"{100 * (ratio - 1):+,.1f}\N{NO-BREAK SPACE}%"


def _updated_s(result: FleetResult, percent: int) -> float | None:
    main = main_reach(reaches(result))
    return None if main is None else main.updated_s.get(percent)


def _time_s(result: FleetResult, percent: int) -> float | None:
    values = _update_times(result)
    return percentile(values, percent) if values else None


def _update_times(result: FleetResult) -> Sequence[float]:
    if result.recording is not None and result.recording.times:
        return result.recording.times[0].values_s
    return result.completion_s


def _dropped(result: FleetResult) -> float:
    return result.broker.dropped_slow_consumer + result.broker.dropped_queue_full


def _blast(result: FleetResult) -> float:
    return sum(each.tried for each in reaches(result) if each.kind != "good")


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _since_begin(result: FleetResult) -> list[Counts]:
    begin_s = first_begin_s(result)
    return [replace(each, at_s=each.at_s - begin_s) for each in counts_of(result)]


def _common_scale(pair: Sequence[FleetResult], counts: Sequence[list[Counts]]) -> TimeScale:
    end_s = max(result.virtual_s - first_begin_s(result) for result in pair)
    active = sorted(at_s for each in counts for at_s in active_instants(each, 0.0))
    return time_scale(0.0, end_s, active)


def _completion(pair: Sequence[FleetResult]) -> Markup | str:
    curves = []
    for name, result, kind in zip("AB", pair, CLASSES, strict=True):
        main = main_reach(reaches(result))
        points = spread_points(result, main.version) if main is not None else []
        if points:
            curves.append((name, kind, points))
    return Markup(completion(curves)) if curves else ""  # noqa: S704 - built by us, every text in it is escaped


def _times(pair: Sequence[FleetResult]) -> Markup | str:
    """Share of the updates that took no longer than a time."""
    runs = [
        (values, kind)
        for result, kind in zip(pair, CLASSES, strict=True)
        if (values := _update_times(result))
    ]
    if not runs:
        return ""
    frame = value_frame([value for values, _ in runs for value in values], 56, 34, HALF - 76, 200, 100)
    parts = axes(frame, x_title="seconds from request to commit", y_title="% of the updates")
    for values, kind in runs:
        points = [
            (frame.x(value), frame.y(100 * (index + 1) / len(values))) for index, value in enumerate(values)
        ]
        parts.append(polyline([(points[0][0], frame.bottom), *points], f"curve strongline {kind}"))
    return Markup(picture(HALF, 284, parts, "Share of the updates that were done, by time"))  # noqa: S704 - likewise


def _load(counts: Sequence[Sequence[Counts]], scale: TimeScale) -> str:
    """What the broker sent and the server handled in both runs."""
    edges = [scale.instant(column / LOAD_COLUMNS) for column in range(LOAD_COLUMNS + 1)]
    readings: tuple[tuple[str, Callable[[Counts], float]], ...] = (
        ("broker, MB/s sent", lambda each: each.broker_bytes / 1e6),
        ("server, events/s", lambda each: each.server_events),
    )
    parts: list[str] = []
    for row, (title, value) in enumerate(readings):
        series = [rates(each, edges, value) for each in counts]
        frame = time_frame(64, 30 + row * 190, WIDE - 76, 120, scale, max(map(max, series)) * 1.08 or 1)
        parts += time_axes(frame, title, y_format="{:,.6g}", y_ticks=3)
        for values, kind in zip(series, CLASSES, strict=True):
            points = [
                point
                for (early, late), reading in zip(pairwise(edges), values, strict=True)
                for point in ((frame.x(early), frame.y(reading)), (frame.x(late), frame.y(reading)))
            ]
            parts.append(polyline(points, f"curve strongline {kind}"))
        parts += frame.break_marks()
    return picture(WIDE, 30 + 2 * 190, parts, "Load on the broker and on the server in both runs")


def _traffic(pair: Sequence[FleetResult]) -> str:
    labels = ("smallest", "median", "95th percentile", "largest")
    rows = [
        (
            label,
            [
                (result.down_bytes_per_device[index], kind, size(result.down_bytes_per_device[index]))
                for result, kind in zip(pair, CLASSES, strict=True)
            ],
        )
        for index, label in enumerate(labels)
    ]
    return grouped_bars(rows, "Bytes to a device in both runs")


def _faults(pair: Sequence[FleetResult]) -> Markup | str:
    kinds = sorted({kind for result in pair for kind, count in result.faults.items() if count})
    rows = [
        (
            kind,
            [
                (result.faults.get(kind, 0), color, f"{result.faults.get(kind, 0):,}")
                for result, color in zip(pair, CLASSES, strict=True)
            ],
        )
        for kind in kinds
    ]
    return Markup(grouped_bars(rows, "Faults by kind in both runs")) if rows else ""  # noqa: S704 - likewise
