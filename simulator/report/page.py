"""The page that presents a run: one HTML file with everything in it. Pure: a record in, text out."""

from collections import Counter
from datetime import datetime
from typing import Final

from markupsafe import Markup

from simulator.report.charts import (
    bad_release,
    bytes_over_the_air,
    fleet_over_time,
    scores,
    time_to_update,
)
from simulator.report.diagram import state_diagram
from simulator.report.record import DeviceResult, Rollout, Run
from simulator.report.svg import BAND_CLASSES
from simulator.report.templates import render

PAGE_BYTES_MAX: Final = 3_000_000
"""What a report may weigh; the largest fleet stays far below it."""

_NOTHING: Final = "\N{EN DASH}"
_BAD_LEGEND: Final = ("fetching", "installing", "trial", "rolled back")


def render_page(run: Run) -> str:
    """The page.

    Returns:
        A complete document that needs nothing from outside.
    """
    bad = run.rollouts[1] if len(run.rollouts) > 1 else None
    shown = {name for name in BAND_CLASSES if _occurs(run, name)}
    return render(
        "page.html.j2",
        run=run,
        title=headline(run),
        headline=headline(run),
        story=story(run),
        verdict=verdict(run),
        started=datetime.fromisoformat(run.started).strftime("%-d %B %Y, %H:%M UTC"),
        seconds=seconds,
        figures=figures(run),
        kinds=list(BAND_CLASSES.values()),
        legend=[(name, kind) for name, kind in BAND_CLASSES.items() if name in shown],
        bad_legend=[(name, BAND_CLASSES[name]) for name in _BAD_LEGEND],
        fleet=Markup(fleet_over_time(run)),  # noqa: S704 - built by us, every text in it is escaped
        air=Markup(bytes_over_the_air(run)),  # noqa: S704 - likewise
        times=Markup(time_to_update(run)),  # noqa: S704 - likewise
        bad=Markup(bad_release(run, bad)) if bad and bad.members else "",  # noqa: S704 - likewise
        bad_story=bad_story(run, bad) if bad else "",
        scores=Markup(scores(run)),  # noqa: S704 - likewise
        diagram=Markup(state_diagram(run)),  # noqa: S704 - likewise
        device_note=device_note(run),
        counts=counts,
        came_as=came_as,
        question=question,
    )


def headline(run: Run) -> str:
    """What happened, in one sentence."""
    totals = run.totals
    good = run.rollouts[0].version
    if totals.on_good_version == totals.devices:
        text = f"All {totals.devices} devices went to {good}"
    else:
        text = f"{totals.on_good_version} of {totals.devices} devices run {good}"
    if len(run.rollouts) < 2:
        return text
    bad = run.rollouts[1]
    back = sum(device.bad_outcome == "rolled_back" for device in run.devices)
    tried = sum(
        device.bad_outcome not in {"", "withdrawn"} and device.bad_code != "update.withdrawn"
        for device in run.devices
    )
    if tried and back == tried:
        return f"{text}; the bad {bad.version} was taken back on each of the {tried} that tried it"
    return f"{text}; the bad {bad.version} was taken back on {back} of {tried} that tried it"


def story(run: Run) -> str:
    """What happened, in three sentences."""
    totals = run.totals
    saved = 1 - totals.air_bytes / totals.full_bytes if totals.full_bytes else 0
    again = "nothing was fetched twice because of it"
    if totals.chunks_twice:
        again = f"{totals.chunks_twice + totals.redundant_chunks} chunks were fetched twice"
    elif totals.redundant_chunks:
        again += f", and {totals.redundant_chunks} chunks that were late were asked for again"
    failed = "without a single failed answer" if not totals.failed else f"with {totals.failed} failed answers"
    return (
        f"The update travelled as a signed delta of {totals.delta_bytes / 1e6:.2f} MB over MQTT, {saved:.0%} less than whole"
        f" files. {totals.cut_devices} of {totals.devices} devices lost their connection in the middle of it,"
        f" {totals.killed_devices} were killed; {again}. All the while applications asked the models on the devices {totals.asked:,} times, {failed}."
    )


def verdict(run: Run) -> str:
    """How many checks passed."""
    passed = sum(check.is_passed for check in run.checks)
    return f"all {passed} checks passed" if run.is_passed else f"{passed} of {len(run.checks)} checks passed"


def figures(run: Run) -> list[tuple[str, str]]:
    """Key figures: value and meaning."""
    totals = run.totals
    middle = _NOTHING if totals.update_p50_ms is None else f"{totals.update_p50_ms / 1000:.1f} s"
    longest = _NOTHING if totals.update_max_ms is None else f"{totals.update_max_ms / 1000:.1f} s"
    return [
        (f"{totals.on_good_version} / {totals.devices}", f"devices on {run.rollouts[0].version}"),
        (f"{totals.air_bytes / 1e6:.1f} MB", f"over the air, whole files: {totals.full_bytes / 1e6:.1f} MB"),
        (middle, f"median time to update, the slowest took {longest}"),
        (
            f"{totals.cut_devices} + {totals.killed_devices}",
            "devices cut off + killed in the middle of an update",
        ),
        (
            str(totals.chunks_twice + totals.redundant_chunks),
            f"chunks fetched twice, of {totals.chunks_stored:,}",
        ),
        (f"{totals.failed}", f"failed answers, of {totals.asked:,} asked during the run"),
    ]


def bad_story(run: Run, bad: Rollout) -> str:
    """What became of the bad version, in a sentence or two."""
    others = len(run.devices) - len(bad.members)
    reason = f" ({bad.reason})" if bad.reason else ""
    return (
        f"{len(bad.members)} canaries were asked to run {bad.version}. The server {bad.state} the rollout{reason};"
        f" the other {others} devices were never offered it."
    )


def device_note(run: Run) -> str:
    """What the columns mean."""
    processes = sum(device.is_process for device in run.devices)
    return (
        "Lost and killed count what happened in the middle of an update. "
        f"{processes} devices ran in a process of their own, so that they could be killed; the others share one process,"
        " each with its own MQTT client, files and durable record."
    )


def counts(rollout: Rollout) -> str:
    """Members of a rollout by status."""
    found = Counter(member.status for member in rollout.members)
    return ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in found.most_common())


def came_as(device: DeviceResult) -> str:
    """How the good version travelled to a device."""
    return "delta" if device.is_delta else "whole file"


def question(prompt: str) -> str:
    """What a prompt asks, without the frame that makes the model answer."""
    return prompt.removeprefix("User: ").removesuffix("\nAssistant:")


def seconds(duration_ms: int) -> str:
    """A duration for people."""
    return f"{duration_ms / 1000:.0f} s"


def _occurs(run: Run, name: str) -> bool:
    match name:
        case "runs v0" | "runs v1":
            return any(f"runs {device.factory_version}" == name for device in run.devices)
        case "runs v2" | "runs v3":
            version = name.removeprefix("runs ")
            return any(each.target == "idle" and each.version == version for each in run.transitions)
        case "killed":
            return any(fault.kind == "kill" for fault in run.faults)
    return True
