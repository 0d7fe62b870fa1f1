"""Which signed deltas somebody still needs. Pure.

A delta is kept while it is on the cheapest way of some device to the release at the head of its family, and while it
leads, on whatever way, to a release that a device was asked to run and has not answered for good: that device
may be fetching it. Everything else may go after a time of grace.
"""

from collections.abc import Iterable
from typing import Final

from protocol.delta_graph import leading_to
from protocol.ids import Digest, Family, Version
from protocol.release import Release, parse_delta_target
from server.fleet.registry import DeviceRecord
from server.releases.catalog import Catalog
from server.releases.delta_graph import FleetGraph
from server.rollouts.records import RolloutRecord
from server.rollouts.states import RolloutState

ABSENT_MS: Final = 90 * 86_400_000
"""A device that was not heard of for so long keeps no delta alive; should it come back, it takes what there is."""


def head_releases(catalog: Catalog, rollouts: Iterable[RolloutRecord]) -> list[Release]:
    """What devices are on their way to: the releases of rollouts to come and under way, and of the last that finished.

    Args:
        catalog: What is published.
        rollouts: Oldest first.
    """
    finished: dict[Family, RolloutRecord] = {}
    heads: dict[tuple[Family, Version], None] = {}
    for rollout in rollouts:
        if rollout.state is RolloutState.FINISHED:
            finished[rollout.family] = rollout
        elif rollout.state is not RolloutState.STOPPED:
            heads[rollout.family, rollout.version] = None
    heads.update(((rollout.family, rollout.version), None) for rollout in finished.values())
    found = (catalog.release(*head) for head in heads)
    return [release for release in found if release is not None]


def needed_deltas(
    graph: FleetGraph, devices: Iterable[DeviceRecord], heads: Iterable[Release], now_ms: int
) -> set[str]:
    """Paths of the delta targets that must stay.

    Args:
        graph: What is signed.
        devices: The fleet.
        heads: From `head_releases`.
        now_ms: Server clock.
    """
    by_family: dict[str, list[Release]] = {}
    for release in heads:
        by_family.setdefault(release.family, []).append(release)
    needed: set[str] = set()
    offered: set[Digest] = set()
    for device in devices:
        if is_absent(device, now_ms):
            continue
        if has_open_offer(device):
            assert device.desired is not None
            wanted = graph.catalog.release(Family(device.desired.family), Version(device.desired.version))
            if wanted is not None:
                offered.update(Digest(file.sha256) for file in wanted.files)
        for release in by_family.get(device.family, ()):
            routes = graph.routes(release, graph.group(release, device.report))
            needed.update(edge.path for route in routes.values() for edge in route.edges)
    needed.update(edge.path for edge in leading_to(graph.edges, offered))
    return {path for path in needed if parse_delta_target(path) is not None}


def is_absent(device: DeviceRecord, now_ms: int) -> bool:
    """Whether a device is away for so long that nobody plans for it; one that is connected may have nothing to say."""
    return not device.is_online and device.seen_ms + ABSENT_MS <= now_ms


def has_open_offer(device: DeviceRecord) -> bool:
    """Whether a device was asked to run something and may still be at it, also when it never said so."""
    if device.desired is None or device.desired.version == device.version:
        return False
    update = device.report.update if device.report else None
    return update is None or update.sequence != device.desired.sequence or update.outcome == "running"
