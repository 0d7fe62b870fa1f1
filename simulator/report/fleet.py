"""The page about one simulated run: one HTML file with everything in it."""

from pathlib import Path
from typing import Final

import msgspec
from markupsafe import Markup

from protocol.errors import StorageError
from simulator.report.animation import SCRIPT, animation_data
from simulator.report.fleet_bands import FLEET_CLASSES, Counts, classes_of, counts_of
from simulator.report.fleet_charts import (
    blast_radius,
    bytes_per_update,
    completion,
    faults_by_kind,
    load_over_time,
    states_over_time,
    time_to_update,
)
from simulator.report.fleet_words import Reach, figures, headline, main_reach, reaches, story, verdict
from simulator.report.peers import file_lengths, measure_transfers
from simulator.report.templates import render
from simulator.report.timescale import TimeScale, time_scale
from simulator.report.units import devices, duration, share, size
from simulator.results import FleetResult
from simulator.scenario import Scenario, encode_scenario

STORY_LINES_MAX: Final = 200
"""Last lines of a device's story that are shown; `whimbrel-sim replay` prints all."""


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


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="choose another --report") from error


def render_fleet(scenario: Scenario, result: FleetResult) -> str:
    """The page: a complete document that needs nothing from outside."""
    counts, scale = counts_of(result), scale_of(result)
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
        legend=_legend(result, counts),
        states=Markup(states_over_time(result, counts, scale)),  # noqa: S704 - built by us, every text in it is escaped
        completion=_completion(result, found),
        times=Markup(time_to_update(result)) if result.completion_s else "",  # noqa: S704 - likewise
        transfers=Markup(bytes_per_update(transfers)) if transfers else "",  # noqa: S704 - likewise
        traffic_note=_traffic_note(result, found),
        blast=_blast(result, found),
        load=Markup(load_over_time(result, counts, scale)),  # noqa: S704 - likewise
        faults=Markup(faults_by_kind(result)) if any(result.faults.values()) else "",  # noqa: S704 - likewise
        reaches=found,
        scenario_text=msgspec.json.format(encode_scenario(scenario), indent=2).decode(),
        shrunk_text=encode_scenario(result.shrunk).decode() if result.shrunk is not None else "",
        story_lines=result.story[-STORY_LINES_MAX:],
        data=data,
        script=Markup(SCRIPT.read_text("utf-8")) if data is not None else "",  # noqa: S704 - our own
        devices=devices,
        duration=duration,
        share=share,
        size=size,
    )


def scale_of(result: FleetResult) -> TimeScale:
    """The time axis of a run: from its first rollout to its end."""
    counts = counts_of(result)
    begun = [rollout.begun_s for rollout in result.rollouts if rollout.begun_s is not None]
    active = [late.at_s for early, late in zip(counts, counts[1:], strict=False) if early.bands != late.bands]
    return time_scale(min(begun, default=0.0), result.virtual_s, active)


def _legend(result: FleetResult, counts: list[Counts]) -> list[tuple[str, str]]:
    shown = {name for each in counts for name in each.bands}
    return [(name, kind) for name, kind in classes_of(result.scenario).items() if name in shown]


def _completion(result: FleetResult, found: list[Reach]) -> Markup | str:
    main = main_reach(found)
    if result.recording is None or main is None or not main.kept:
        return ""
    spread = next(each for each in result.recording.versions if each.version == main.version)
    begun_s = next(each.begun_s for each in result.rollouts if each.version == main.version)
    return Markup(completion(result, spread, begun_s or 0.0))  # noqa: S704 - built by us, every text in it is escaped


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
