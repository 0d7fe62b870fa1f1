"""What other ways of sending a version would take, computed from the very files of a run; nothing is estimated."""

from typing import Final

from msgspec import Struct

from protocol.errors import RequestError
from simulator.models import FACTORY, contents_of
from simulator.peers import bsdiff_bytes, compressed_bytes
from simulator.results import FleetResult

PEER_BYTES_MAX: Final = 4 << 20
"""Of a file that peers are tried on: bsdiff takes about a second and 17 MiB of memory for a mebibyte."""


class Transfer(Struct, frozen=True, kw_only=True):
    """What one step from a version to another takes, in bytes; a peer that was not measured is not there."""

    base: str
    version: str
    deltas: dict[str, int]  # of Whimbrel, by profile, as signed
    peers: dict[str, int]


def measure_transfers(result: FleetResult) -> list[Transfer]:
    """Every step for which the run signed a delta, in the order of the releases.

    Returns:
        Nothing where real model files were given that are not there any more.
    """
    try:
        contents = contents_of(result.scenario)
    except RequestError:
        return []
    versions = [FACTORY, *(release.version for release in result.scenario.releases)]
    transfers = []
    for base in versions:
        for version in versions:
            prefix = f"{base}-{version} "
            deltas = {
                label.removeprefix(prefix): length
                for label, length in result.delta_bytes.items()
                if label.startswith(prefix)
            }
            if deltas:
                peers = _peers(contents[base], contents[version])
                transfers.append(Transfer(base=base, version=version, deltas=deltas, peers=peers))
    return transfers


def file_lengths(result: FleetResult) -> dict[str, int]:
    """Length of each version's file in bytes; empty where the files are not there any more."""
    try:
        return {version: len(data) for version, data in contents_of(result.scenario).items()}
    except RequestError:
        return {}


def _peers(base: bytes, data: bytes) -> dict[str, int]:
    peers = {"whole file": len(data)}
    if max(len(base), len(data)) <= PEER_BYTES_MAX:
        peers |= {"whole file, zstd": compressed_bytes(data), "bsdiff4": bsdiff_bytes(base, data)}
    return peers
