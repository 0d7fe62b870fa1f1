"""What matters of a run, in some twenty numbers: what sweeps collect and comparisons compare. All are replayed exactly."""

from itertools import pairwise
from typing import Final

from msgspec import Struct

from simulator.results import FleetResult, RolloutOutcome

TOUCHED: Final = ("committed", "rolled_back", "failed", "running", "silent")
"""What became of devices that a bad release got to, or may have."""


class Figures(Struct, frozen=True, kw_only=True):
    """Figures of one run.

    Times to reach a share of the fleet run from the begin of the first rollout of the last good release until the server
    knew; they are None where that share was never reached.
    """

    failure: str  # empty if every promise was kept
    t50_s: float | None
    t95_s: float | None
    t99_s: float | None
    update_median_s: float | None  # on a device, from its begin to the commit
    update_p99_s: float | None
    virtual_s: float
    down_bytes: int
    up_bytes: int
    metered_bytes: int
    down_bytes_median: int  # of a device
    down_bytes_max: int
    broker_bytes_per_s_peak: float  # over the resolution of the samples
    broker_connections_peak: int
    broker_retained_bytes_peak: int
    broker_dropped: int  # messages, for whatever reason
    server_busy_s: float
    committed: int  # members of all rollouts, likewise below
    rejected: int
    rolled_back: int
    failed: int
    silent: int
    blast_radius: float  # largest share of the fleet that a bad release got to
    not_converged: int
    faults: int
    events: int
    trace_digest: str


def figures_of(result: FleetResult) -> Figures:
    """The figures of a result."""
    devices = result.scenario.devices
    reached = result.reached_s
    completion = result.completion_s
    totals = {status: _total(result.rollouts, status) for status in ("committed", "rejected", *TOUCHED)}
    failure = result.failure
    return Figures(
        failure="" if failure is None else f"promise {failure.promise}: {failure.detail}",
        t50_s=share_reached(reached, 0.50, devices),
        t95_s=share_reached(reached, 0.95, devices),
        t99_s=share_reached(reached, 0.99, devices),
        update_median_s=share_reached(completion, 0.50, len(completion)),
        update_p99_s=share_reached(completion, 0.99, len(completion)),
        virtual_s=result.virtual_s,
        down_bytes=result.down_bytes,
        up_bytes=result.up_bytes,
        metered_bytes=sum(kind.metered_bytes for kind in result.kinds.values()),
        down_bytes_median=result.down_bytes_per_device[1],
        down_bytes_max=result.down_bytes_per_device[3],
        broker_bytes_per_s_peak=max(
            (
                (after.broker_bytes - before.broker_bytes) / (after.at_s - before.at_s)
                for before, after in pairwise(result.samples)
            ),
            default=0.0,
        ),
        broker_connections_peak=result.broker.connections_peak,
        broker_retained_bytes_peak=result.broker.retained_bytes_peak,
        broker_dropped=result.broker.dropped_slow_consumer + result.broker.dropped_queue_full,
        server_busy_s=result.server.busy_s,
        committed=totals["committed"],
        rejected=totals["rejected"],
        rolled_back=totals["rolled_back"],
        failed=totals["failed"],
        silent=totals["silent"],
        blast_radius=max(
            (_touched(rollout) / devices for rollout in result.rollouts if rollout.kind != "good"),
            default=0.0,
        ),
        not_converged=result.not_converged,
        faults=sum(result.faults.values()),
        events=result.events,
        trace_digest=result.trace_digest,
    )


def share_reached(sorted_s: list[float], share: float, of: int) -> float | None:
    """When a share of so many had been counted, by their sorted instants; None if never."""
    count = max(1, -int(-share * of // 1))
    return sorted_s[count - 1] if count <= len(sorted_s) else None


def _total(rollouts: list[RolloutOutcome], status: str) -> int:
    return sum(rollout.counts.get(status, 0) for rollout in rollouts)


def _touched(rollout: RolloutOutcome) -> int:
    return sum(rollout.counts.get(status, 0) for status in TOUCHED)
