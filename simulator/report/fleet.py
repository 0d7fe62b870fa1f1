"""The page about one simulated run: one HTML file with everything in it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
from markupsafe import Markup

from simulator.report.animation import SCRIPT, animation_data
from simulator.report.files import write_page
from simulator.report.fleet_bands import FLEET_CLASSES, Counts, classes_of, counts_of
from simulator.report.fleet_charts import (
    blast_radius,
    bytes_per_update,
    completion,
    faults_by_kind,
    load_over_time,
    marks_of,
    percentile,
    spread_points,
    states_over_time,
    time_to_update,
)
from simulator.report.fleet_words import Reach, figures, headline, main_reach, reaches, story, verdict
from simulator.report.templates import render
from simulator.report.timescale import TimeScale, time_scale
from simulator.report.transfers import Transfer, file_lengths, measure_transfers
from simulator.report.units import devices, duration, share, size
from simulator.results import FleetResult
from simulator.scenario import Scenario, encode_scenario

STORY_LINES_MAX: Final = 200
"""Last lines of a device's story that are shown; `whimbrel-sim replay` prints all."""

QUIET_SHARE: Final = 0.02
"""Of all changes of state: a long time with fewer than that is cut short."""


def write_fleet_report(path: Path, scenario: Scenario, result: FleetResult) -> None:
    """Write the page about a run.

    Args:
        path: Where.
        scenario: What was run.
        result: What came of it; without a recording there is no animation, and curves are coarser.

    Raises:
        StorageError: The file cannot be written.
    """
    write_page(path, render_fleet(scenario, result))


def render_fleet(scenario: Scenario, result: FleetResult) -> str:
    """The page: a complete document that needs nothing from outside."""
    counts = counts_of(result)
    scale = scale_of(result, counts)
    found = reaches(result)
    transfers = measure_transfers(result)
    data = animation_data(result, result.recording, scale) if result.recording is not None else None
    return render(
        "fleet.html.j2",
        result=result,
        recording=result.recording,
        title=headline(result),
        headline=headline(result),
        story=story(result),
        verdict=verdict(result),
        figures=figures(result),
        kinds=FLEET_CLASSES,
        legend=legend_of(result, counts),
        states=Markup(states_over_time(scenario, counts, scale, marks_of(result))),  # noqa: S704 - built by us, every text in it is escaped
        completion=_completion(result, found),
        times=_times(result),
        updates=result.updates,
        transfers=transfers,
        transfer=_main_transfer(transfers, main_reach(found)),
        bytes_chart=lambda transfer: Markup(bytes_per_update(transfer)),  # noqa: S704 - likewise
        traffic_note=_traffic_note(result, found),
        blast=_blast(result, found),
        load=Markup(load_over_time(counts, scale)),  # noqa: S704 - likewise
        faults=Markup(faults_by_kind(result)) if any(result.faults.values()) else "",  # noqa: S704 - likewise
        reaches=found,
        scenario_text=msgspec.json.format(encode_scenario(scenario), indent=2).decode(),
        shrunk_text=encode_scenario(result.shrunk).decode() if result.shrunk is not None else "",
        story_lines=result.story[-STORY_LINES_MAX:],
        data=data,
        script=Markup(SCRIPT.read_text("utf-8")) if data is not None else "",  # noqa: S704 - our own
        times_by_kind=_times_by_kind(result),
        percentile=percentile,
        devices=devices,
        duration=duration,
        share=share,
        size=size,
    )


def scale_of(result: FleetResult, counts: Sequence[Counts]) -> TimeScale:
    """The time axis of a run: from its first rollout to its end."""
    begin_s = first_begin_s(result)
    return time_scale(begin_s, result.virtual_s, active_instants(counts, begin_s))


def first_begin_s(result: FleetResult) -> float:
    """When the first rollout began."""
    return min((each.begun_s for each in result.rollouts if each.begun_s is not None), default=0.0)


def active_instants(counts: Sequence[Counts], begin_s: float) -> list[float]:
    """Instants after `begin_s` at which another `QUIET_SHARE` of all changes had happened."""
    changes = [(late.at_s, _changed(early, late)) for early, late in pairwise(counts) if late.at_s > begin_s]
    step = QUIET_SHARE * sum(change for _, change in changes)
    active, done, wanted = [], 0.0, 0.0
    for at_s, change in changes:
        done += change
        if change and done >= wanted:
            active.append(at_s)
            wanted = done + step
    return active


def _changed(early: Counts, late: Counts) -> int:
    """Devices that do something else, twice."""
    names = early.bands | late.bands
    return sum(abs(late.bands.get(name, 0) - early.bands.get(name, 0)) for name in names)


def legend_of(result: FleetResult, counts: Sequence[Counts]) -> list[tuple[str, str]]:
    """What devices did, with its CSS class."""
    shown = {name for each in counts for name in each.bands}
    return [(name, kind) for name, kind in classes_of(result.scenario).items() if name in shown]


def _completion(result: FleetResult, found: list[Reach]) -> Markup | str:
    main = main_reach(found)
    points = spread_points(result, main.version) if main is not None else []
    if main is None or not points:
        return ""
    return Markup(completion([(main.version, "v2", points)]))  # noqa: S704 - built by us, every text in it is escaped


def _times(result: FleetResult) -> Markup | str:
    """By true time where it was recorded; otherwise by the devices' clocks."""
    if result.recording is not None and result.recording.times:
        times = result.recording.times[0]
        return Markup(time_to_update(times.values_s, times.updates))  # noqa: S704 - likewise
    values = result.completion_s
    return Markup(time_to_update(values, len(values))) if values else ""  # noqa: S704 - likewise


def _times_by_kind(result: FleetResult) -> dict[str, list[float]]:
    times = [] if result.recording is None else result.recording.times
    return {each.kind: each.values_s for each in times}


def _main_transfer(transfers: list[Transfer], main: Reach | None) -> Transfer | None:
    """The step to the version that the run is about, from the version closest to it."""
    return next(
        (each for each in reversed(transfers) if main is not None and each.version == main.version), None
    )


def _blast(result: FleetResult, found: list[Reach]) -> Markup | str:
    bad = [(each.version, each.asked, each.tried, each.kept) for each in found if each.kind != "good"]
    return Markup(blast_radius(result, bad)) if bad else ""  # noqa: S704 - likewise


def _traffic_note(result: FleetResult, found: list[Reach]) -> str:
    """What went over the air against whole files for the same devices."""
    lengths = file_lengths(result)
    if not lengths or result.recording is None:
        return ""
    whole = sum(each.tried * lengths[each.version] for each in found)
    times = sum(each.tried for each in found)
    return (
        f"Over the air, everything included that reached devices: {size(result.down_bytes)}. Whole files for the"
        f" same {times:,} downloads would have taken {size(whole)}, nothing else included."
    )
