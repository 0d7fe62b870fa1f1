"""Ways from the files that a device has to the file that it should have (SPEC section 7.1). Pure.

Nodes are files, by digest. An edge is a signed delta, or a signed whole file, which needs nothing to begin with. The
cost of an edge is time on one device, in microseconds:

    wire bytes / link rate  +  result bytes / measuring rate  +  (deltas) result bytes / applying rate of the profile

A way costs the sum of its edges, as a device fetches everything first and then makes one file after the other. A delta
that needs more memory than the device gives is no edge for it, and a way has a bounded number of edges.

Device and server plan by this module, the device for itself and the server for what it builds and keeps, so that they
come to the same way. Where they do not (a report is older than the configuration), a device asks for chunks that are not cached.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from protocol.chunks import index_lengths
from protocol.delta.format import Profile
from protocol.ids import Digest
from protocol.messages import Capacity
from protocol.release import Encryption, InPlaceNeeds, Release, parse_delta_target, parse_file_target
from protocol.trust import Target

LINKS_MAX: Final = 4
"""Edges of one way: each makes a whole file on the device, which wears its flash, and room for two of them is needed."""

APPLY_BYTES_PER_S: Final[Mapping[Profile, int]] = {Profile.SMALL: 6_000_000, Profile.FAST: 50_000_000}
"""Bytes of the result that one core of the reference, a server processor, makes: the least that the format aims at."""

MEASURE_BYTES_PER_S: Final = 100_000_000
"""Reading a file back from the medium and hashing it, on the reference."""

LINK_BYTES_PER_S: Final = 64_000
"""Assumed of a device that says nothing about its link: half a megabit, a weak cell of a mobile network."""

UNSTATED: Final = Capacity(
    link_bytes_per_s=LINK_BYTES_PER_S, processor_percent=100, delta_memory_bytes=(1 << 53) - 1, links_max=1
)
"""A device whose report carries no capacity."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A delta, or a whole file, and what it takes.

    Attributes:
        path: Of the signed target, or of one that is not built yet.
        base: What it applies to; None for a whole file.
        result: What it gives.
        wire_bytes: Its length with its chunk indexes.
        result_bytes: Length of the result.
        profile: Of a delta.
        memory_bytes: What its decoder declares.
        in_place: What it takes where its base is rewritten; None if it was not made for that.
        is_encrypted: Whether it takes a key.
    """

    path: str
    base: Digest | None
    result: Digest
    wire_bytes: int
    result_bytes: int
    profile: Profile | None = None
    memory_bytes: int = 0
    in_place: InPlaceNeeds | None = None
    is_encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Edges in the order in which they are made, and their cost; without edges: the file is there."""

    edges: tuple[Edge, ...] = ()
    cost_us: int = 0

    @property
    def wire_bytes(self) -> int:
        """What has to be fetched."""
        return sum(edge.wire_bytes for edge in self.edges)

    @property
    def rank(self) -> tuple[int, int, int, tuple[str, ...]]:
        """Cheaper first; among equals fewer edges, fewer bytes, and then the names decide, the same way everywhere."""
        return self.cost_us, len(self.edges), self.wire_bytes, tuple(edge.path for edge in self.edges)


def edge_cost_us(edge: Edge, capacity: Capacity) -> int:
    """Time that an edge takes on a device, microseconds."""
    cost_us = _time_us(edge.wire_bytes, capacity.link_bytes_per_s * 100)
    cost_us += _time_us(edge.result_bytes, MEASURE_BYTES_PER_S * capacity.processor_percent)
    if edge.profile is not None:
        cost_us += _time_us(edge.result_bytes, APPLY_BYTES_PER_S[edge.profile] * capacity.processor_percent)
    return cost_us


def edges_of(targets: Mapping[str, Target], lengths: Mapping[Digest, int]) -> list[Edge]:
    """What signed targets offer.

    Args:
        targets: By path.
        lengths: Of files beside those that are signed as targets themselves. A delta to a file of which nobody signed
            how long it is cannot be planned with, and is left out.
    """
    sizes = dict(lengths)
    wholes = {path: file for path, target in targets.items() if (file := _whole_file(target)) is not None}
    sizes.update((file, targets[path].length) for path, file in wholes.items())
    edges = [
        Edge(
            path,
            None,
            file,
            wire_bytes(targets[path].length),
            targets[path].length,
            is_encrypted=targets[path].custom.encryption is not None,
        )
        for path, file in wholes.items()
    ]
    for path, target in targets.items():
        name, encryption = parse_delta_target(path), target.custom.encryption
        if name is None or name.result not in sizes or not _agrees(encryption, name.is_encrypted):
            continue
        edges.append(
            Edge(
                path,
                name.base,
                name.result,
                wire_bytes(target.length),
                sizes[name.result],
                name.profile,
                target.custom.memory_bytes,
                target.custom.in_place,
                name.is_encrypted,
            )
        )
    return edges


def _whole_file(target: Target) -> Digest | None:
    """Which whole file a target is. Its path and its digest say the same, unless what travels is not the file itself."""
    name = parse_file_target(target.path)
    if name is None or not _agrees(target.custom.encryption, name.is_encrypted):
        return None
    return name.digest if name.is_encrypted or name.digest == target.digest else None


def _agrees(encryption: Encryption | None, is_encrypted: bool) -> bool:  # noqa: FBT001 - what the path says
    """Whether an artifact is what its path says, and can be read with its key."""
    if encryption is None:
        return not is_encrypted
    return is_encrypted and encryption.is_understood


def wire_bytes(length: int) -> int:
    """Bytes of a blob with its chunk indexes."""
    return length + sum(index_lengths(length))


def cheapest_routes(
    edges: Iterable[Edge], held: Iterable[Digest], capacity: Capacity | None
) -> dict[Digest, Route]:
    """The cheapest way to every file that can be made.

    Args:
        edges: What there is.
        held: Files that the device has.
        capacity: What the device can spend; None for one that does not say, which takes a single `small` delta.
    """
    leaving: dict[Digest | None, list[tuple[Edge, int]]] = defaultdict(list)
    for edge in edges:
        if _is_usable(edge, capacity):
            leaving[edge.base].append((edge, edge_cost_us(edge, capacity or UNSTATED)))
    capacity = capacity or UNSTATED
    found = {digest: Route() for digest in held}
    ends: list[tuple[Digest | None, Route]] = [(None, Route()), *found.items()]
    # Round by round the ways get one edge longer. A way to a file that a shorter or cheaper one reaches is not
    # followed on, since that one does everything better.
    for _ in range(min(capacity.links_max, LINKS_MAX)):
        reached: dict[Digest, Route] = {}
        for node, route in ends:
            for edge, edge_us in leaving.get(node, ()):
                cost_us = route.cost_us + edge_us
                known = reached.get(edge.result) or found.get(edge.result)
                if known is not None and cost_us > known.cost_us:
                    continue
                candidate = Route((*route.edges, edge), cost_us)
                if known is None or candidate.rank < known.rank:
                    reached[edge.result] = candidate
        found.update(reached)
        ends = list(reached.items())
    return found


def release_routes(
    release: Release, edges: Iterable[Edge], held: Iterable[Digest], capacity: Capacity | None
) -> dict[Digest, Route]:
    """The cheapest way to each file of a release; files to which none leads are left out.

    A whole file of the release itself is no base for another of its files: it moves into its place once it is there. Who rewrites its
    files takes a delta wherever there is one, whatever it costs: beside a whole file there is hardly room for the old one.
    """
    edges, held = list(edges), list(held)
    own = dict.fromkeys(Digest(file.sha256) for file in release.files)
    routes = {}
    for digest in own:
        usable = [
            edge for edge in edges if edge.base is not None or edge.result == digest or edge.result not in own
        ]
        found = None
        if capacity is not None and capacity.in_place:
            deltas = [edge for edge in usable if edge.base is not None]
            found = cheapest_routes(deltas, held, capacity).get(digest)
        found = found or cheapest_routes(usable, held, capacity).get(digest)
        if found is not None:
            routes[digest] = found
    return routes


def leading_to(edges: Iterable[Edge], results: Iterable[Digest]) -> Iterator[Edge]:
    """Deltas that may be part of any way to `results`, whatever a device has and can spend."""
    arriving: dict[Digest, list[Edge]] = defaultdict(list)
    for edge in edges:
        if edge.base is not None:
            arriving[edge.result].append(edge)
    seen = set(results)
    ends = list(seen)
    for _ in range(LINKS_MAX):
        deltas = [edge for digest in ends for edge in arriving[digest]]
        yield from deltas
        ends = list({edge.base: None for edge in deltas if edge.base is not None and edge.base not in seen})
        seen.update(ends)


def _is_usable(edge: Edge, capacity: Capacity | None) -> bool:
    if capacity is None:
        return edge.profile is not Profile.FAST
    if capacity.in_place and edge.base is not None and edge.in_place is None:
        return False
    return edge.memory_bytes <= capacity.delta_memory_bytes


def _time_us(count: int, per_100_s: int) -> int:
    """Rounded up, so that nothing is free and sums do not depend on floating point."""
    return -(-count * 100_000_000 // per_100_s)
