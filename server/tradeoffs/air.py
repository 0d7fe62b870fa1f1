"""What travels to a fleet for a version, by the ways that devices take themselves (`protocol/delta_graph.py`). Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from protocol.delta.format import Profile
from protocol.delta_graph import Edge, Route, wire_bytes
from protocol.ids import Digest
from protocol.release import DeltaName, Release, delta_target, file_target
from server.fleet.registry import DeviceRecord
from server.ports import DeltaSize
from server.releases.catalog import Catalog
from server.releases.delta_graph import BUILD_BYTES_PER_S, FleetGraph, Group
from server.releases.delta_planner import is_worthwhile, pairs_for
from server.tradeoffs.records import Air, Missing, Way, WayKind

WAYS_MAX: Final = 64
"""Shown of one version on one tier, those of most devices first; all of them are counted."""


class Field:
    """The devices of a family, and the ways from what they run to any version, published or not.

    Args:
        catalog: What is signed.
        releases: All of the family, drafts too: deltas start from and lead to their files.
        devices: Of the family, without those that are away for good.
        sizes: Of deltas that were built to see how large they are.
        refused: Deltas that were built and are not worth sending.
    """

    def __init__(
        self,
        catalog: Catalog,
        releases: Sequence[Release],
        devices: Sequence[DeviceRecord],
        sizes: Mapping[tuple[Digest, Digest], DeltaSize],
        refused: Iterable[tuple[Digest, Digest]],
    ) -> None:
        self._lengths = {Digest(file.sha256): file.length for each in releases for file in each.files}
        self._versions = {Digest(file.sha256): each.version for each in releases for file in each.files}
        self._kinds = _kinds(devices)
        self._sizes = sizes
        self._refused = set(refused)
        self._estimated = {edge.path: edge for edge in self._unsigned_deltas(catalog)}
        self._graph = FleetGraph(catalog, [*self._unsigned_files(catalog), *self._estimated.values()])
        self._deltas = {(edge.base, edge.result) for edge in self._graph.edges if edge.base is not None}

    def air(self, release: Release, tier: str | None) -> Air:
        """What travels to the devices of a tier; of all tiers, if it is None."""
        ways: Counter[Way] = Counter()
        undelivered = 0
        for (version, group), count in self._groups(release, tier).items():
            routes = self._graph.routes(release, group)
            found = [routes.get(Digest(file.sha256), Route()) for file in release.files]
            edges = list(dict.fromkeys(edge for route in found for edge in route.edges))
            size = sum(edge.wire_bytes for edge in edges)
            ways[Way(version=version, devices=0, kind=self._kind(edges), wire_bytes=size)] += count
        for _, count in self._missing(release, tier):
            undelivered += count
        devices = sum(ways.values())
        total = sum(way.wire_bytes * count for way, count in ways.items())
        first = sum(wire_bytes(file.length) for file in release.files)
        return Air(
            devices=devices,
            total_bytes=total,
            mean_bytes=total / devices if devices else first,
            ways=[
                Way(version=way.version, devices=count, kind=way.kind, wire_bytes=way.wire_bytes)
                for way, count in ways.most_common(WAYS_MAX)
            ],
            undelivered=undelivered,
        )

    def holders(self, digest: Digest, tier: str | None) -> int:
        """How many devices of a tier have a file; of all tiers, if it is None."""
        return sum(
            count
            for device, count in self._kinds
            if (tier is None or device.tier == tier)
            and device.report is not None
            and digest in device.report.files.values()
        )

    def version_of(self, digest: Digest) -> str:
        """The version that has a file; empty where none has."""
        return self._versions.get(digest, "")

    def missing(self, release: Release) -> tuple[list[Missing], list[DeltaName]]:
        """Deltas to a version that are not there and that devices could use, those for most devices first."""
        counts: Counter[tuple[Digest, Digest]] = Counter()
        for pairs, count in self._missing(release, None):
            counts.update(dict.fromkeys(pairs, count))
        rows: defaultdict[str, list[tuple[tuple[Digest, Digest], int]]] = defaultdict(list)
        for pair, count in counts.most_common():
            rows[self._versions[pair[0]]].append((pair, count))
        found = [
            Missing(
                base=base,
                version=release.version,
                devices=max(count for _, count in pairs),
                seconds=sum(self._lengths[pair[1]] for pair, _ in pairs) / BUILD_BYTES_PER_S,
            )
            for base, pairs in rows.items()
        ]
        return found, [DeltaName(*pair) for pair in counts]

    def _groups(self, release: Release, tier: str | None) -> Counter[tuple[str, Group]]:
        groups: Counter[tuple[str, Group]] = Counter()
        for device, count in self._kinds:
            if tier is None or device.tier == tier:
                groups[device.version, self._graph.group(release, device.report)] += count
        return groups

    def _missing(
        self, release: Release, tier: str | None
    ) -> Iterable[tuple[tuple[tuple[Digest, Digest], ...], int]]:
        """Pairs of which nothing is known, whose result devices fetch as a whole; with how many of them."""
        counts: Counter[tuple[tuple[Digest, Digest], ...]] = Counter()
        for device, count in self._kinds:
            if tier is not None and device.tier != tier:
                continue
            routes = self._graph.routes(release, self._graph.group(release, device.report))
            pairs = tuple(
                pair
                for pair in pairs_for(release, device.report)
                if self._is_open(pair)
                and any(edge.base is None for edge in routes.get(pair[1], Route()).edges)
            )
            counts[pairs] += count
        return [(pairs, count) for pairs, count in counts.items() if pairs]

    def _is_open(self, pair: tuple[Digest, Digest]) -> bool:
        is_known = pair in self._sizes or pair in self._refused or pair in self._deltas
        return not is_known and set(pair) <= set(self._lengths)

    def _kind(self, edges: Sequence[Edge]) -> WayKind:
        if not edges:
            return "there"
        if any(edge.path in self._estimated for edge in edges):
            return "estimated"
        return "whole" if any(edge.base is None for edge in edges) else "delta"

    def _unsigned_files(self, catalog: Catalog) -> list[Edge]:
        return [
            Edge(file_target(digest), None, digest, wire_bytes(length), length)
            for digest, length in self._lengths.items()
            if catalog.file(digest) is None
        ]

    def _unsigned_deltas(self, catalog: Catalog) -> list[Edge]:
        return [
            Edge(
                delta_target(*pair),
                pair[0],
                pair[1],
                wire_bytes(size.length),
                self._lengths[pair[1]],
                Profile.SMALL,
                size.memory_bytes,
                size.in_place,
            )
            for pair, size in self._sizes.items()
            if set(pair) <= set(self._lengths)
            and catalog.delta(*pair) is None
            and is_worthwhile(size.length, self._lengths[pair[1]])
        ]


def _kinds(devices: Iterable[DeviceRecord]) -> list[tuple[DeviceRecord, int]]:
    """Devices that are alike, by one of them; so that a fleet is looked at once, however many versions and tiers there are."""
    found: dict[tuple[object, ...], tuple[DeviceRecord, int]] = {}
    for device in devices:
        report = device.report
        key: tuple[object, ...] = (device.tier, device.version)
        if report is not None:
            key += (*report.files.items(), report.capacity)
        first, count = found.get(key, (device, 0))
        found[key] = first, count + 1
    return list(found.values())
