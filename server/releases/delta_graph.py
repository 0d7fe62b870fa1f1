"""Which way the devices of a fleet take to a release, and which deltas pay to be built for them. Pure.

The search and its cost are those of the devices, see `protocol/delta_graph.py`. Devices that have the same files and can
spend about the same are one group, so that planning does not grow with the fleet. A delta is built where the time that it
saves, over all devices that would use it, is ten times what building it takes; a version that few devices run is so
left to a chain of deltas that are there, and one that many run gets a delta of its own, in the profile that suits them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

from msgspec.structs import replace

from protocol.delta.format import Profile
from protocol.delta_graph import (
    LINKS_MAX,
    UNSTATED,
    Edge,
    Route,
    cheapest_routes,
    edge_cost_us,
    edges_of,
    release_routes,
    wire_bytes,
)
from protocol.ids import Digest
from protocol.messages import Capacity, Report
from protocol.release import DeltaName, Release, delta_target, parse_delta_target
from protocol.trust import Target
from server.releases.catalog import Catalog
from server.releases.delta_planner import Pair, can_build, pairs_for

BUILD_BYTES_PER_S: Final = 4_000_000
"""Result bytes that one builder makes, assumed: it only has to be right to an order of magnitude."""

BUILD_WEIGHT: Final = 10
"""Seconds of devices that a second of building has to save: a rollout waits for it, and every device fetches the metadata
that lists its result. So one device gets a delta in place of a whole file over a slow link, and a few get
one in place of a chain."""

SAVING_SHARE_MIN: Final = 0.2
"""A delta counts as a gain for devices whose way it shortens by this share or more: estimates are not better than that."""

DELTA_SHARE_EXPECTED: Final = 0.2
"""Of the whole file, for a delta of which nothing is known: between a fine-tune and a vendor's update."""

FAST_SIZE_EXPECTED: Final = 1.25
"""Size of a delta of profile `fast` against `small`: the most that the format aims at."""

BUILDS_MAX: Final = 32
"""Deltas to one file that a rollout waits for; what gains most comes first, the others take what there is."""

GROUPS_MAX: Final = 64
"""Groups that deltas are built for, the largest first: any client of the broker can invent devices, one by one."""

MEMORY_MAX: Final = 10_000
"""Kinds of devices, and ways of groups, that are remembered; a fleet has dozens."""


class Group(NamedTuple):
    """Devices that are alike for what leads to a release."""

    held: frozenset[Digest]  # files that they have, of those that matter
    pairs: tuple[Pair, ...]  # base and result of deltas that could be built for them
    capacity: Capacity | None


@dataclass(slots=True)
class _User:
    """A group, and what the cheapest way to one file costs it so far."""

    group: Group
    devices: int
    reach: Mapping[Digest, Route]  # what it can get to, with one link to spare
    cost_us: int

    def saved_us(self, edge: Edge) -> int:
        """What one device would save if there were this delta."""
        if edge.base not in self.reach or (self.group.capacity is None and edge.profile is Profile.FAST):
            return 0
        saved_us = self.cost_us - self.via_us(edge)
        return saved_us if saved_us >= self.cost_us * SAVING_SHARE_MIN else 0

    def via_us(self, edge: Edge) -> int:
        """Cost of the way that ends with a delta whose base is in reach."""
        assert edge.base is not None
        return self.reach[edge.base].cost_us + edge_cost_us(edge, self.group.capacity or UNSTATED)


class FleetGraph:
    """Everything signed as a graph, and the ways through it.

    Args:
        catalog: What is signed.
        beside: Files and deltas that are not signed yet, to see what ways there would be.
    """

    def __init__(self, catalog: Catalog, beside: Iterable[Edge] = ()) -> None:
        self.catalog = catalog
        self.edges = [*edges_of(catalog.targets, {}), *beside]
        self._nodes = {edge.base for edge in self.edges} | {edge.result for edge in self.edges}
        self._groups: dict[tuple[object, ...], Group] = {}
        self._routes: dict[tuple[str, str, frozenset[Digest], Capacity | None], dict[Digest, Route]] = {}

    def group(self, release: Release, report: Report | None) -> Group:
        """What planning for `release` has to know about a device."""
        if report is None:
            return Group(frozenset(), (), None)
        key = (release.family, release.version, *report.files.items(), report.capacity)
        found = self._groups.get(key)
        if found is None:
            if len(self._groups) >= MEMORY_MAX:
                self._groups.clear()
            found = self._groups[key] = self._grouped(release, report)
        return found

    def _grouped(self, release: Release, report: Report) -> Group:
        held = frozenset(Digest(digest) for digest in report.files.values() if digest in self._nodes)
        pairs = tuple(pair for pair in pairs_for(release, report) if can_build(self.catalog, pair))
        return Group(held, pairs, device_class(report.capacity))

    def groups(self, release: Release, reports: Iterable[Report | None]) -> Counter[Group]:
        """How many devices there are of each kind."""
        return Counter(self.group(release, report) for report in reports)

    def routes(self, release: Release, group: Group) -> dict[Digest, Route]:
        """The way of a group to each file of a release; files to which none leads are left out."""
        key = (release.family, release.version, group.held, group.capacity)
        found = self._routes.get(key)
        if found is None:
            if len(self._routes) >= MEMORY_MAX:
                self._routes.clear()
            found = self._routes[key] = release_routes(release, self.edges, group.held, group.capacity)
        return found

    def artifacts(self, release: Release, report: Report | None) -> list[Target]:
        """Targets that a device has to fetch for `release`: its description, and what leads to its files."""
        routes = self.routes(release, self.group(release, report))
        paths = dict.fromkeys(
            edge.path for file in release.files for edge in routes.get(Digest(file.sha256), Route()).edges
        )
        return [self.catalog.description(release), *(self.catalog.targets[path] for path in paths)]

    def builds(
        self, release: Release, groups: Mapping[Group, int], is_closed: Callable[[DeltaName], bool]
    ) -> dict[DeltaName, list[Group]]:
        """Deltas that pay to be built, and who will use them.

        Args:
            release: What the groups should run.
            groups: How many devices there are of each kind.
            is_closed: Whether a delta was built or tried before, and will not be there.
        """
        planned: dict[DeltaName, list[Group]] = {}
        for result in dict.fromkeys(Digest(file.sha256) for file in release.files):
            users = [
                self._user(release, group, devices, result)
                for group, devices in Counter(groups).most_common(GROUPS_MAX)
                if any(pair[1] == result for pair in group.pairs)
                or (result not in group.held and group.capacity is not None)
            ]
            candidates = dict.fromkeys(
                DeltaName(*pair, profile, any(self.catalog.is_secret(file) for file in pair))
                for user in users
                for pair, profile in product(user.group.pairs, Profile)
                if pair[1] == result
            )
            edges = [
                self._expected(name)
                for name in candidates
                if self.catalog.delta(*name) is None and not is_closed(name)
            ]
            planned.update(_choose(edges, users))
        return planned

    def _user(self, release: Release, group: Group, devices: int, result: Digest) -> _User:
        route = self.routes(release, group).get(result)
        if route is not None and group.capacity is not None and group.capacity.in_place:
            route = None if any(edge.base is None for edge in route.edges) else route
        reach = {digest: Route() for digest in group.held}
        if group.capacity is not None:
            shorter = replace(group.capacity, links_max=min(group.capacity.links_max, LINKS_MAX) - 1)
            reach = cheapest_routes(self.edges, group.held, shorter)
        # Where nothing leads to the file, or only what a device has hardly room for, any way is a gain.
        return _User(group, devices, reach, route.cost_us if route is not None else 1 << 62)

    def _expected(self, name: DeltaName) -> Edge:
        """A delta that is not there, with the length that it will probably have."""
        whole = self.catalog.file(name.result)
        assert whole is not None
        length = self._expected_small_bytes(name, whole.length)
        if name.profile is Profile.FAST:
            length = int(length * FAST_SIZE_EXPECTED)
        path = delta_target(*name)
        return Edge(path, name.base, name.result, wire_bytes(length), whole.length, name.profile)

    def _expected_small_bytes(self, name: DeltaName, whole_bytes: int) -> int:
        for profile, factor in ((Profile.SMALL, 1.0), (Profile.FAST, 1 / FAST_SIZE_EXPECTED)):
            sibling = self.catalog.delta(*name._replace(profile=profile))
            if sibling is not None:
                return int(sibling.length * factor)
        deltas = [edge for edge in self.edges if edge.base is not None]
        chain = cheapest_routes(deltas, [name.base], replace(UNSTATED, links_max=LINKS_MAX)).get(name.result)
        if chain is not None:
            # One delta over several steps is about as large as the largest of them, and never more than their sum.
            return max(edge.wire_bytes for edge in chain.edges)
        return int(whole_bytes * DELTA_SHARE_EXPECTED)


def _choose(edges: list[Edge], users: list[_User]) -> dict[DeltaName, list[Group]]:
    """The deltas that save more than they take, the largest saving first; each changes what the others save."""
    chosen: dict[DeltaName, list[Group]] = {}
    while edges and len(chosen) < BUILDS_MAX:
        gains = [
            (sum(user.devices * user.saved_us(edge) for user in users) - _build_us(edge), edge)
            for edge in edges
        ]
        gain_us, best = max(gains, key=lambda gain: (gain[0], gain[1].path))
        if gain_us <= 0:
            break
        name = parse_delta_target(best.path)
        assert name is not None
        chosen[name] = []
        for user in users:
            if user.saved_us(best):
                user.cost_us = user.via_us(best)
                chosen[name].append(user.group)
        edges.remove(best)
    return chosen


def _build_us(edge: Edge) -> int:
    return edge.result_bytes * 1_000_000 * BUILD_WEIGHT // BUILD_BYTES_PER_S


def device_class(capacity: Capacity | None) -> Capacity | None:
    """Capacities rounded down to powers of two: devices that differ by less are planned for together."""
    if capacity is None:
        return None
    return Capacity(
        link_bytes_per_s=_power_of_two(capacity.link_bytes_per_s),
        processor_percent=_power_of_two(capacity.processor_percent),
        delta_memory_bytes=_power_of_two(capacity.delta_memory_bytes),
        links_max=min(capacity.links_max, LINKS_MAX),
        in_place=capacity.in_place,
    )


def _power_of_two(number: int) -> int:
    return 1 << number.bit_length() - 1 if number else 0
