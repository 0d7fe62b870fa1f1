"""What the devices of a simulated fleet do, in few words and colours, and how many did what when. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from simulator.models import FACTORY
from simulator.report.bands import DOWN, band
from simulator.results import FleetResult
from simulator.scenario import Scenario

_WAY: Final = {
    "no power": "killed",
    "offline": "offline",
    "fetching": "fetching",
    "installing": "installing",
    "trial": "trial",
    "refused": "refused",
    "gave up": "gaveup",
    "rolled back": "back",
}
"""CSS class of everything but running a version, in the order of the plot from below."""

AT_REST: Final = "at rest"
"""What a device does of which only the state is known, not the version."""

_OLDER: Final = ("older1", "older2", "older3")
FLEET_CLASSES: Final = ("neutral", "v1", *_WAY.values(), "v3", *_OLDER, "v2")


@dataclass(frozen=True, slots=True)
class Counts:
    """How many devices did what, and what broker and server had done, at one instant."""

    at_s: float
    bands: dict[str, int]
    connections: int
    broker_bytes: int
    server_events: int


def classes_of(scenario: Scenario) -> dict[str, str]:
    """CSS class of everything that a device of this scenario can do, in the order of the plot from below."""
    good = [release.version for release in scenario.releases if release.kind == "good"]
    bad = [release.version for release in scenario.releases if release.kind != "good"]
    older = {f"runs {version}": _OLDER[index % len(_OLDER)] for index, version in enumerate(good[:-1])}
    newest = {f"runs {version}": "v2" for version in good[-1:]}
    return (
        {AT_REST: "neutral", f"runs {FACTORY}": "v1"}
        | _WAY
        | {f"runs {version}": "v3" for version in bad}
        | older
        | newest
    )


def band_of(label: str) -> str:
    """What a device does that has this label of a recording, or is in this state."""
    state, _, version = label.partition(" ")
    match state:
        case _ if state == DOWN:
            return "no power"
        case "rejected":
            return "refused"
        case "failed":
            return "gave up"
        case "idle" if not version:
            return AT_REST
    return band(state, version)


def counts_of(result: FleetResult) -> list[Counts]:
    """The fleet over time, as finely as the result has it."""
    recording = result.recording
    if recording is not None:
        bands = [band_of(label) for label in recording.labels]
        return [
            Counts(
                moment.at_s,
                _summed(zip(bands, moment.counts, strict=True)),
                moment.connections,
                moment.broker_bytes,
                moment.server_events,
            )
            for moment in recording.moments
        ]
    return [
        Counts(
            sample.at_s,
            _summed((band_of(state), count) for state, count in sample.states.items()),
            sample.connections,
            sample.broker_bytes,
            sample.server_events,
        )
        for sample in result.samples
    ]


def at_instant(counts: Sequence[Counts], at_s: float) -> Counts:
    """The last counts until an instant."""
    return counts[position(counts, at_s)]


def position(counts: Sequence[Counts], at_s: float) -> int:
    """Which counts are the last until an instant; the first where it is before all."""
    return max(0, bisect_right(counts, at_s, key=lambda each: each.at_s) - 1)


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for name, count in pairs:
        if count:
            total[name] = total.get(name, 0) + count
    return total
