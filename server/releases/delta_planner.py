"""Between which files deltas can be built, when one is worth sending, and which blobs the broker should retain. Pure.

Which of these deltas pay is decided in `delta_graph.py`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from protocol.ids import Digest
from protocol.messages import Report
from protocol.release import Release
from protocol.trust import Target
from server.releases.catalog import Catalog, target_blobs

DELTA_SHARE_MAX: Final = 0.9
"""A delta of more than this share of the whole file is not worth the device's work and a place in the metadata."""

Pair = tuple[Digest, Digest]

_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")


def pairs_for(release: Release, report: Report | None) -> list[Pair]:
    """Base and result of the deltas that could bring a device to `release`.

    The base of a file is what the device measured under the same name, or the shard that lies where this one does in
    a model that is split otherwise now, or what is at the same position of its release: file names often carry the version.
    Files that are there already need nothing.
    """
    if report is None:
        return []
    installed = [Digest(digest) for digest in report.files.values()]
    shards = sorted(name for name in report.files if _SHARD.search(name))
    pairs = []
    for position, file in enumerate(release.files):
        named = report.files.get(file.name) or report.files.get(_shard_alike(file.name, shards))
        base = Digest(named) if named else (installed[position] if position < len(installed) else None)
        if base is not None and file.sha256 not in installed:
            pairs.append((base, Digest(file.sha256)))
    return pairs


def _shard_alike(name: str, shards: Sequence[str]) -> str:
    """The one of the shards of a model in which the middle of this one was before, if shards are of about one length."""
    found = _SHARD.search(name)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not shards or not 1 <= number <= count:
        return ""
    return shards[(2 * number - 1) * len(shards) // (2 * count)]


def can_build(catalog: Catalog, pair: Pair) -> bool:
    """Whether both files are known here; a base that only the device has leads to the whole file."""
    return catalog.file(pair[0]) is not None and catalog.file(pair[1]) is not None


def is_worthwhile(delta_length: int, full_length: int) -> bool:
    """Whether sending the delta is better than sending the whole file."""
    return delta_length <= full_length * DELTA_SHARE_MAX


def plan_cache(needs: Iterable[Iterable[Target]], bytes_max: int) -> dict[Digest, int]:
    """Blobs that the broker should retain, with their lengths.

    Args:
        needs: Per device, what it has to fetch.
        bytes_max: Budget of retained bytes; retained messages are the broker's memory.

    Returns:
        The artifacts that most devices need, as long as they fit as a whole; the others go by request.
    """
    wanted: Counter[str] = Counter()
    targets: dict[str, Target] = {}
    for artifacts in needs:
        for target in artifacts:
            wanted[target.path] += 1
            targets[target.path] = target
    chosen: dict[Digest, int] = {}
    used = 0
    for path in sorted(wanted, key=lambda path: (-wanted[path], targets[path].length, path)):
        blobs = {
            name: length for name, length in target_blobs(targets[path]) if name not in chosen and length
        }
        if used + sum(blobs.values()) <= bytes_max:
            chosen.update(blobs)
            used += sum(blobs.values())
    return chosen
