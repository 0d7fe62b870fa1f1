"""One run of a fleet in virtual time: a scenario in, a result out; and what is done when a promise is broken."""

import gc
import resource
import time
import traceback
from collections import Counter
from typing import Final

import msgspec

from device.states import UnlistedTransitionError
from simulator.checks.safety import PromiseBrokenError
from simulator.loop import US_PER_S
from simulator.recording import Recorder
from simulator.results import (
    BrokerLoad,
    Failure,
    FleetResult,
    KindTotals,
    RolloutOutcome,
    ServerLoad,
)
from simulator.scenario import Scenario
from simulator.trace import Trace
from simulator.world import World

_KILOBYTE: Final = 1024
GC_THRESHOLDS: Final = (100_000, 20, 50)
"""A fleet is millions of objects that stay; looking through them as often as Python would takes a third of the time."""

CODE_LINES: Final = 3
"""Last lines of a traceback that a failure of the code quotes."""


def run_fleet(
    scenario: Scenario, *, follow: int = -1, command: str = "", recorder: Recorder | None = None
) -> FleetResult:
    """Run a scenario to its end.

    Args:
        scenario: What to simulate.
        follow: Number of a device whose story is kept.
        command: How to replay it, for the result.
        recorder: Keeps what a page about the run shows; the run itself does not depend on it.

    Raises:
        RequestError: The scenario contradicts itself.
    """
    begun, spent = time.monotonic(), time.process_time()  # noqa: TID251 - how long the run took, for the result
    world = World(scenario, Trace(follow), recorder)
    failure = None
    thresholds = gc.get_threshold()
    gc.collect()  # the run before, whose devices and world hold each other
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        world.run()
    except PromiseBrokenError as error:
        failure = Failure(
            promise=error.promise,
            device=error.device,
            detail=error.detail,
            at_s=world.loop.now_us / US_PER_S,
        )
    except (AssertionError, UnlistedTransitionError, KeyError, IndexError, TypeError, ValueError) as error:
        lines = "".join(traceback.format_exception(error)[-CODE_LINES:])
        failure = Failure(promise=0, device=-1, detail=lines, at_s=world.loop.now_us / US_PER_S)
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    result = _result(world, failure, command)
    return msgspec.structs.replace(
        result,
        wall_s=time.monotonic() - begun,  # noqa: TID251 - likewise
        cpu_s=time.process_time() - spent,
    )


def _result(world: World, failure: Failure | None, command: str) -> FleetResult:
    devices = world.devices
    down = sorted(device.path.down_bytes for device in devices)
    versions = Counter(device.version or "none" for device in devices)
    outcomes: Counter[str] = Counter()
    for device in devices:
        update = None if device.agent is None else device.agent.record.update
        if update is not None:
            outcomes[f"{update.outcome} {update.code}".strip()] += 1
    server = world.server
    return FleetResult(
        scenario=world.scenario,
        command=command,
        failure=failure,
        virtual_s=world.loop.now_us / US_PER_S,
        events=world.loop.events,
        checks=world.checks.done,
        trace_digest=world.trace.digest(),
        versions=dict(sorted(versions.items())),
        states={state: count for state, count in sorted(world.states.items()) if count},
        outcomes=dict(sorted(outcomes.items())),
        updates=world.updates,
        not_converged=world.not_converged,
        excused=world.excused,
        faults=dict(sorted(world.faults.counts.items())),
        completion_s=sorted(world.completion_s),
        reached_s=_reached_s(world),
        samples=world.samples,
        rollouts=[_outcome(world, rollout, plan.kind) for rollout, plan in world.rollouts],
        down_bytes=sum(down),
        up_bytes=sum(device.path.up_bytes for device in devices),
        down_bytes_per_device=[down[0], down[len(down) // 2], down[len(down) * 95 // 100], down[-1]],
        kinds=_kinds(world),
        broker=_broker(world),
        server=ServerLoad(
            events=server.events_handled,
            busy_s=server.busy_us / US_PER_S,
            records_saved=server.store.records_saved,
            transactions=server.store.transactions,
            counters=dict(sorted(server.counters.items())),
        ),
        delta_bytes=world.delta_lengths(),
        story=world.trace.story,
        recording=None if world.recorder is None else world.recorder.finish(),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILOBYTE,
    )


def _outcome(world: World, rollout: str, kind: str) -> RolloutOutcome:
    record = world.server.rollout(rollout)
    campaign = world.server.coordinator.campaigns.get(rollout)
    start_ms = world.clock_start_ms

    def seconds(instant_ms: int | None) -> float | None:
        return None if instant_ms is None else (instant_ms - start_ms) / 1_000

    return RolloutOutcome(
        rollout=rollout,
        version=record.version,
        kind=kind,
        state=record.state.value,
        reason=record.reason,
        begun_s=seconds(record.begun_ms),
        finished_s=seconds(record.finished_ms),
        counts={} if campaign is None else dict(sorted(campaign.counts().items())),
    )


def _reached_s(world: World) -> list[float]:
    """When the server knew of each device that runs the last good release; a device may be in several rollouts of it."""
    version = next((plan.version for plan in reversed(world.scenario.releases) if plan.kind == "good"), "")
    campaigns = [
        campaign
        for campaign in map(world.server.coordinator.campaigns.get, (name for name, _ in world.rollouts))
        if campaign is not None and campaign.record.version == version
    ]
    first_ms: dict[str, int] = {}
    for campaign in campaigns:
        for device, member in campaign.members.items():
            if member.status == "committed" and member.decided_ms is not None:
                first_ms[device] = min(member.decided_ms, first_ms.get(device, member.decided_ms))
    begun_ms = min(
        (each.record.begun_ms for each in campaigns if each.record.begun_ms is not None), default=0
    )
    return sorted((instant_ms - begun_ms) / 1_000 for instant_ms in first_ms.values())


def _kinds(world: World) -> dict[str, KindTotals]:
    totals: dict[str, list[int]] = {}
    for device in world.devices:
        total = totals.setdefault(device.kind.name, [0, 0, 0, 0])
        total[0] += 1
        total[1] += device.path.down_bytes
        total[2] += device.path.up_bytes
        if device.kind.link.metered:
            total[3] += device.path.down_bytes + device.path.up_bytes
    return {
        name: KindTotals(devices=devices, down_bytes=down, up_bytes=up, metered_bytes=metered)
        for name, (devices, down, up, metered) in sorted(totals.items())
    }


def _broker(world: World) -> BrokerLoad:
    counts = world.broker_statistics()
    return BrokerLoad(
        bytes_in=counts.bytes_in,
        bytes_out=counts.bytes_out,
        messages_in=counts.messages_in,
        messages_out=counts.messages_out,
        connections_peak=counts.connections_peak,
        retained_bytes_peak=counts.retained_payload_bytes_peak,
        dropped_slow_consumer=counts.dropped_slow_consumer,
        dropped_queue_full=counts.dropped_queue_full,
        keep_alive_expired=counts.keep_alive_expired,
    )
