"""What a simulated run comes to, in sentences and key figures. Pure."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from simulator.report.fleet_charts import PERCENTILES, percentile
from simulator.report.units import devices, duration, share, size
from simulator.results import FleetResult, RolloutOutcome, VersionSpread

PROMISES: Final = {
    0: "the code under test crashed",
    1: "a device ran bytes that nobody signed",
    2: "a device had no model that can be started",
    3: "something was fetched again because of a restart",
    4: "an update that could not succeed was begun",
    5: "a rollout did not stop by itself",
    6: "inference did not go on",
    7: "something was reported that was not measured",
    8: "devices came back as a herd",
    9: "the fleet did not converge",
}
"""What it means when a promise is broken; numbers are those of `Failure.promise`."""


class Reach(Struct, frozen=True, kw_only=True):
    """How far a version got."""

    version: str
    kind: str
    asked: int
    tried: int
    kept: int
    updated_s: dict[int, float | None]  # since its first rollout began, by per cent of the fleet; None: never


def reaches(result: FleetResult) -> list[Reach]:
    """Every version that was rolled out, in the order of the releases."""
    spreads = {} if result.recording is None else {each.version: each for each in result.recording.versions}
    found = []
    for release in result.scenario.releases:
        rollouts = [each for each in result.rollouts if each.version == release.version]
        if rollouts:
            found.append(_reach(result, rollouts, spreads.get(release.version), release.kind))
    return found


def _reach(
    result: FleetResult, rollouts: Sequence[RolloutOutcome], spread: VersionSpread | None, kind: str
) -> Reach:
    asked = max(_asked(result, rollout) for rollout in rollouts)
    if spread is None:
        most = rollouts[0].counts
        kept = most.get("committed", 0)
        return Reach(
            version=rollouts[0].version,
            kind=kind,
            asked=asked,
            tried=kept + most.get("rolled_back", 0),
            kept=kept,
            updated_s={},
        )
    begun_s = rollouts[0].begun_s or 0.0
    total = result.scenario.devices
    updated_s = {
        percent: next(
            (at_s - begun_s for at_s, count in spread.committed if 100 * count >= percent * total), None
        )
        for percent in PERCENTILES
    }
    return Reach(
        version=rollouts[0].version,
        kind=kind,
        asked=asked,
        tried=spread.tried[-1][1] if spread.tried else 0,
        kept=spread.committed[-1][1] if spread.committed else 0,
        updated_s=updated_s,
    )


def _asked(result: FleetResult, rollout: RolloutOutcome) -> int:
    """Devices that were sent a request; members that ran the version already were not."""
    if result.recording is None:
        return sum(rollout.counts.values())
    return sum(wave.asked for wave in result.recording.waves if wave.rollout == rollout.rollout)


def main_reach(found: Sequence[Reach]) -> Reach | None:
    """The version that the run is about: the last good one that a device kept."""
    good = [each for each in found if each.kind == "good"]
    return next((each for each in reversed(good) if each.kept), good[-1] if good else None)


def headline(result: FleetResult) -> str:
    """What happened, in one sentence."""
    if result.failure is not None:
        return f"Failed after {duration(result.failure.at_s)}: {PROMISES.get(result.failure.promise, 'a check failed')}"
    main = main_reach(reaches(result))
    total = result.scenario.devices
    if main is None:
        return f"No good version was rolled out to {devices(total)}"
    late = main.updated_s.get(99)
    if late is None:
        return f"{share(main.kept, total)} of {devices(total)} went to {main.version}"
    return f"99 % of {devices(total)} ran {main.version} {duration(late)} after its rollout began"


def story(result: FleetResult) -> str:
    """What happened, in some sentences."""
    found = reaches(result)
    return " ".join(
        sentence
        for sentence in (
            _speed(result, main_reach(found)),
            _traffic(result),
            _trouble(result),
            _stopped(result, found),
        )
        if sentence
    )


def _speed(result: FleetResult, main: Reach | None) -> str:
    if main is None or not main.updated_s:
        return ""
    reached = [
        f"{percent} % after {duration(at_s)}" for percent, at_s in main.updated_s.items() if at_s is not None
    ]
    if len(reached) == len(main.updated_s):
        return f"{main.version} ran on {', '.join(reached)}."
    most = f"{share(main.kept, result.scenario.devices)} of the fleet in the end"
    return f"{main.version} ran on {', '.join([*reached, most])}."


def _traffic(result: FleetResult) -> str:
    each = result.down_bytes / result.scenario.devices
    return (
        f"{size(result.down_bytes)} went to devices, {size(each)} to each on average and {size(result.down_bytes_per_device[3])} at most;"
        f" {size(result.up_bytes)} came back."
    )


def _trouble(result: FleetResult) -> str:
    faults = sum(result.faults.values())
    if not faults:
        return "No fault was injected."
    end_s = result.scenario.faults.end_s
    if result.virtual_s < end_s:
        return f"{faults:,} faults of {len(result.faults)} kinds were injected."
    return (
        f"{faults:,} faults of {len(result.faults)} kinds were injected, for {duration(end_s)};"
        " then the fleet was left to itself."
    )


def _stopped(result: FleetResult, found: Sequence[Reach]) -> str:
    sentences = []
    for each in found:
        stopped = next(
            (
                rollout
                for rollout in result.rollouts
                if rollout.version == each.version and rollout.state == "stopped"
            ),
            None,
        )
        if stopped is not None:
            kept = f"{devices(each.kept)} kept it" if each.kept else "none kept it"
            sentences.append(f"{each.version} was stopped after {devices(each.tried)} had tried it; {kept}.")
    return " ".join(sentences)


def figures(result: FleetResult) -> list[tuple[str, str]]:
    """Key figures: value and meaning."""
    found = reaches(result)
    main = main_reach(found)
    cards = []
    if main is not None and main.updated_s:
        for percent, value in main.updated_s.items():
            cards.append(
                (
                    "never" if value is None else duration(value),
                    f"until {percent} % of the fleet ran {main.version}",
                )
            )
    elif result.completion_s:
        cards += [
            (
                duration(percentile(result.completion_s, percent)),
                f"from request to commit, {percent}th percentile",
            )
            for percent in PERCENTILES
        ]
    bad = [each for each in found if each.kind != "good"]
    cards.append(
        (
            size(result.down_bytes),
            f"to devices; the median device took {size(result.down_bytes_per_device[1])}",
        )
    )
    if bad:
        tried = sum(each.tried for each in bad)
        cards.append(
            (
                f"{tried:,}",
                f"devices tried a bad version, {share(tried, result.scenario.devices)} of the fleet",
            )
        )
    cards.append(
        (
            f"{sum(result.faults.values()):,}",
            f"faults injected; {result.not_converged:,} devices did not converge",
        )
    )
    cards.append(
        (
            f"{result.checks:,}",
            "checks of the promises, " + ("one broken" if result.failure else "none broken"),
        )
    )
    return cards


def verdict(result: FleetResult) -> str:
    """Whether the promises were kept."""
    return "every promise kept" if result.is_passed else "a promise was broken"
