"""`whimbrel delta graph`: what is signed as a graph, and the way that each version in the field takes through it."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from protocol.delta.format import Profile
from protocol.delta_graph import Edge, Route
from protocol.errors import RequestError
from protocol.ids import Digest, parse_family
from protocol.messages import Capacity
from protocol.release import Release, parse_delta_target
from server.display import bytes_text, table
from server.home import Home, opened
from server.releases.catalog import Catalog
from server.releases.delta_garbage import head_releases, is_absent, needed_deltas
from server.releases.delta_graph import FleetGraph

WAYS_MAX: Final = 1_000
"""Rows about the field, the largest groups of devices first: any client of the broker can invent devices."""

_FIELDS_OF_AN_EDGE: Final = ["FAMILY", "FILE", "FROM", "TO", "KIND", "FETCH", "MEMORY", "NEEDED"]
_FIELDS_OF_A_WAY: Final = [
    "FAMILY", "RUNS", "DEVICES", "LINK", "CORE", "TO", "FILE", "WAY", "FETCH", "OF WHOLE", "TIME",
]  # fmt: skip


class EdgeRow(Struct, frozen=True, kw_only=True):
    """One delta, or one whole file."""

    family: str
    file: str
    base: str  # version; empty for a whole file
    result: str  # version
    kind: str  # profile of a delta, or "whole"
    wire_bytes: int
    result_bytes: int
    memory_bytes: int
    is_needed: bool
    idle_since_ms: int | None  # of a delta that nobody needs, once the server has noticed
    target: str


class WayRow(Struct, frozen=True, kw_only=True):
    """What devices that are alike have before them, for one file."""

    family: str
    version: str  # that they run; empty for none
    devices: int
    capacity: Capacity | None  # their class; null where they say nothing of themselves
    to: str  # version that they are on their way to
    file: str
    targets: list[str]  # in the order in which they are applied
    versions: list[str]  # where each of them leads
    wire_bytes: int
    whole_bytes: int
    seconds: float  # as the device estimates it


class GraphReport(Struct, frozen=True, kw_only=True):
    """The delta graph of a server."""

    edges: list[EdgeRow]
    ways: list[WayRow]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register `graph` among the commands of `delta`."""
    graph = commands.add_parser(
        "graph", parents=[common], help="show the signed deltas and files, and which way each version takes"
    )
    graph.add_argument("--family", default="", help="of models; all if not given")
    graph.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        RequestError: There is no repository, or no such family.
    """
    report = graph_report(arguments.dir, arguments.family)
    text = msgspec.json.encode(report).decode() if arguments.json else "\n".join(graph_lines(report))
    sys.stdout.write(f"{text}\n")
    return 0


def graph_report(folder: Path, family: str = "") -> GraphReport:
    """Look at what is signed and at what the fleet reported.

    Args:
        folder: The server's.
        family: Show this one only; empty for all.

    Raises:
        RequestError: There is no repository, or no such family.
    """
    with opened(folder) as home:
        repository = home.store.repository()
        assert repository is not None, "`init` signs one"
        now_ms = home.clock.now_ms()
        published = home.publisher().checked(repository, now_ms)
        releases = [each.release for each in home.store.releases() if each.published_ms is not None]
        if family and parse_family(family) not in {release.family for release in releases}:
            raise RequestError(f"there is no published family {family}", hint="see `whimbrel release list`")
        catalog = Catalog.of(published.targets, releases, published.refresh_ms)
        return _View(home, catalog, now_ms).report(family)


def graph_lines(report: GraphReport) -> list[str]:
    """The report for people."""
    edges = [
        [
            row.family,
            row.file,
            row.base or "nothing",
            row.result,
            row.kind,
            bytes_text(row.wire_bytes),
            "-" if row.kind == "whole" else bytes_text(row.memory_bytes),
            "yes" if row.is_needed else "no",
        ]
        for row in report.edges
    ]
    ways = [
        [
            row.family,
            row.version or "nothing",
            str(row.devices),
            f"{bytes_text(row.capacity.link_bytes_per_s)}/s" if row.capacity else "-",
            f"{row.capacity.processor_percent} %" if row.capacity else "-",
            row.to,
            row.file,
            _way(row),
            bytes_text(row.wire_bytes),
            f"{100 * row.wire_bytes / row.whole_bytes:.1f} %" if row.whole_bytes else "-",
            f"{row.seconds:.1f} s",
        ]
        for row in report.ways
    ]
    field = table(_FIELDS_OF_A_WAY, ways) or ["No device has reported yet, or none has anywhere to go"]
    return [*(table(_FIELDS_OF_AN_EDGE, edges) or ["Nothing is published yet"]), "", *field]


def _way(row: WayRow) -> str:
    """For example `1.0 > 1.1 > 2.0 (fast)`, or `whole 2.0`."""
    if not row.targets:
        return "is there"
    names = [parse_delta_target(target) for target in row.targets]
    steps = [
        f"{version} (fast)" if name and name.profile is Profile.FAST else version
        for name, version in zip(names, row.versions, strict=True)
    ]
    if names[0] is None:
        return " > ".join([f"whole {steps[0]}", *steps[1:]])
    return " > ".join([row.version, *steps])


class _View:
    """The graph of an open folder with names that people know."""

    def __init__(self, home: Home, catalog: Catalog, now_ms: int) -> None:
        self._graph = FleetGraph(catalog)
        self._devices = [device for device in home.store.devices() if not is_absent(device, now_ms)]
        self._idle = {idle.path: idle.since_ms for idle in home.store.idle_deltas()}
        heads = head_releases(catalog, home.store.rollouts())
        self._needed = needed_deltas(self._graph, self._devices, heads, now_ms)
        # A family that nothing was rolled out of yet is shown on its way to what was published last.
        known = {release.family for release in heads}
        last = {
            release.family: release for release in catalog.releases.values() if release.family not in known
        }
        self._heads = [*last.values(), *heads]
        self._names = {
            Digest(file.sha256): (release, file.name)
            for release in reversed(list(catalog.releases.values()))
            for file in release.files
        }

    def report(self, family: str) -> GraphReport:
        edges = [row for edge in self._graph.edges if (row := self._edge(edge)) is not None]
        ways = [row for release in self._heads for row in self._ways(release)]
        ways.sort(key=lambda row: -row.devices)
        return GraphReport(
            edges=[row for row in edges if family in {"", row.family}],
            ways=[row for row in ways if family in {"", row.family}][:WAYS_MAX],
        )

    def _edge(self, edge: Edge) -> EdgeRow | None:
        if edge.result not in self._names:
            return None  # of a release that was signed and is not in the database: nothing leads there
        release, file = self._names[edge.result]
        return EdgeRow(
            family=release.family,
            file=file,
            base="" if edge.base is None else self._version(edge.base),
            result=release.version,
            kind="whole" if edge.profile is None else edge.profile.name.lower(),
            wire_bytes=edge.wire_bytes,
            result_bytes=edge.result_bytes,
            memory_bytes=edge.memory_bytes,
            is_needed=edge.profile is None or edge.path in self._needed,
            idle_since_ms=self._idle.get(edge.path),
            target=edge.path,
        )

    def _ways(self, release: Release) -> Iterator[WayRow]:
        groups = Counter(
            (device.version, self._graph.group(release, device.report))
            for device in self._devices
            if device.family == release.family
        )
        for (version, group), count in groups.items():
            routes = self._graph.routes(release, group)
            for file in release.files:
                route = routes.get(Digest(file.sha256), Route())
                yield WayRow(
                    family=release.family,
                    version=version,
                    devices=count,
                    capacity=group.capacity,
                    to=release.version,
                    file=file.name,
                    targets=[edge.path for edge in route.edges],
                    versions=[self._version(edge.result) for edge in route.edges],
                    wire_bytes=route.wire_bytes,
                    whole_bytes=file.length,
                    seconds=route.cost_us / 1e6,
                )

    def _version(self, digest: Digest) -> str:
        known = self._names.get(digest)
        return digest[:12] if known is None else known[0].version
