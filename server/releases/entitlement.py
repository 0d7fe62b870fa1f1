"""Which encrypted artifacts a device may read. Pure.

Not whatever its family has, but what leads to the release that it was asked to run: what an operator never sent to a device, it gets no key for.
"""

from protocol.delta_graph import leading_to
from protocol.ids import Digest, Family, Version
from server.fleet.registry import DeviceRecord
from server.releases.delta_graph import FleetGraph


def readable_blobs(graph: FleetGraph, device: DeviceRecord) -> frozenset[Digest]:
    """Encrypted artifacts that lead to what a device was asked to run, on whatever way.

    Args:
        graph: What is signed.
        device: Which.
    """
    desired, catalog = device.desired, graph.catalog
    release = None if desired is None else catalog.release(Family(desired.family), Version(desired.version))
    if release is None:
        return frozenset()
    files = {Digest(file.sha256) for file in release.files}
    deltas = {edge.path: edge for edge in leading_to(graph.edges, files)}
    on_the_way = files | {edge.base for edge in deltas.values()}
    return frozenset(
        catalog.targets[edge.path].digest
        for edge in graph.edges
        if edge.is_encrypted and (edge.path in deltas or (edge.base is None and edge.result in on_the_way))
    )
