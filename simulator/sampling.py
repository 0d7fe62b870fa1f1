"""A fleet too large to be simulated whole: some of its devices in shards, each a fleet of its own, and how far off that may be.

A shard has devices of the large fleet, with the links, clocks and luck that they have there, the same model and deltas,
and its share of the broker's line and of the server's time. What a shard cannot show: queues in front of a broker and a
server that serve everybody, limits on the number of connections and messages, and failures that add up over the fleet.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from protocol.errors import RequestError
from simulator.intervals import half_width
from simulator.scenario import Scenario
from simulator.sweep import Row, Task

SHARDS_MIN: Final = 2
"""Fewer say nothing about their error."""

EVENT_US_MAX: Final = 1_000_000.0
"""Bound of `Server.event_us`."""

AS_IS: Final = (
    "t50_s",
    "t95_s",
    "t99_s",
    "update_median_s",
    "update_p99_s",
    "server_busy_s",
    "down_bytes_median",
)
"""Figures that are of a shard what they are of the fleet."""

IN_PROPORTION: Final = (
    "down_bytes",
    "up_bytes",
    "metered_bytes",
    "committed",
    "rejected",
    "rolled_back",
    "failed",
    "silent",
    "broker_bytes_per_s_peak",
    "broker_connections_peak",
)
"""Figures that grow with the number of devices."""


class Estimate(Struct, frozen=True, kw_only=True):
    """A figure of the whole fleet; the interval holds it with 95 % confidence, as far as shards can show it."""

    figure: str
    value: float | None  # None if a shard has no such figure, as a share that it never reached
    low: float | None
    high: float | None


class SampleResult(Struct, frozen=True, kw_only=True):
    """What a sample says of a fleet."""

    scenario: Scenario
    shards: int
    shard_devices: int
    failed: int  # shards that broke a promise
    estimates: list[Estimate]


def plan_sample(scenario: Scenario, shards: int, shard_devices: int) -> list[Task]:
    """The shards of a fleet, spread evenly over it.

    Raises:
        RequestError: They do not fit into the fleet, or are too few.
    """
    devices = scenario.devices
    if shards < SHARDS_MIN or shard_devices < 1 or shards * shard_devices > devices:
        raise RequestError(
            f"{shards} shards of {shard_devices} devices are no sample of {devices} devices",
            hint=f"take at least {SHARDS_MIN}, and not more devices than there are",
        )
    share = shard_devices / devices
    broker = replace(scenario.broker, bytes_per_s=max(1, int(scenario.broker.bytes_per_s * share)))
    server = replace(
        scenario.server,
        event_us=min(EVENT_US_MAX, scenario.server.event_us / share),
        bytes_per_s=max(1, int(scenario.server.bytes_per_s * share)),
    )
    return [
        Task(
            cell={},
            scenario=replace(
                scenario,
                devices=shard_devices,
                first_device=scenario.first_device + index * devices // shards,
                broker=broker,
                server=server,
            ),
        )
        for index in range(shards)
    ]


def sampled(scenario: Scenario, shard_devices: int, rows: Sequence[Row]) -> SampleResult:
    """What the shards say of the fleet.

    The interval is Student's over the shards, with the correction for a sample that is a good part of the whole.
    """
    factor = scenario.devices / shard_devices
    rest = math.sqrt(max(0.0, 1 - len(rows) / factor))
    estimates = [
        _estimate(name, [getattr(row.figures, name) for row in rows], scale, rest)
        for names, scale in ((AS_IS, 1.0), (IN_PROPORTION, factor))
        for name in names
    ]
    return SampleResult(
        scenario=scenario,
        shards=len(rows),
        shard_devices=shard_devices,
        failed=sum(bool(row.figures.failure) for row in rows),
        estimates=estimates,
    )


def _estimate(name: str, values: Sequence[float | None], scale: float, rest: float) -> Estimate:
    numbers = [value * scale for value in values if value is not None]
    half = half_width(numbers)
    if len(numbers) < len(values) or half is None:
        return Estimate(figure=name, value=None, low=None, high=None)
    mean = fmean(numbers)
    return Estimate(figure=name, value=mean, low=mean - half * rest, high=mean + half * rest)
