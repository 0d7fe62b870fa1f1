"""Which deltas to build for the versions that the fleet really has, and which blobs the broker should retain. Pure."""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from protocol.ids import Digest
from protocol.messages import Report
from protocol.release import Release
from protocol.trust import Target
from server.releases.catalog import Catalog, target_blobs

DELTA_SHARE_MAX: Final = 0.9
"""A delta of more than this share of the whole file is not worth the device's work and a place in the metadata."""

TARGETS_SOFT_MAX: Final = 400
"""Signed targets above which deltas that no rollout needs are dropped; about two thirds of the size limit of targets."""

Pair = tuple[Digest, Digest]


def pairs_for(release: Release, report: Report | None) -> list[Pair]:
    """Base and result of the deltas that could bring a device to `release`.

    The base of a file is what the device measured under the same name, or at the same position of its release: file
    names often carry the version. Files that are there already need nothing.
    """
    if report is None:
        return []
    installed = [Digest(digest) for digest in report.files.values()]
    pairs = []
    for position, file in enumerate(release.files):
        named = report.files.get(file.name)
        base = Digest(named) if named else (installed[position] if position < len(installed) else None)
        if base is not None and file.sha256 not in installed:
            pairs.append((base, Digest(file.sha256)))
    return pairs


def can_build(catalog: Catalog, pair: Pair) -> bool:
    """Whether both files are known here; a base that only the device has leads to the whole file."""
    return catalog.file(pair[0]) is not None and catalog.file(pair[1]) is not None


def is_worthwhile(delta_length: int, full_length: int) -> bool:
    """Whether sending the delta is better than sending the whole file."""
    return delta_length <= full_length * DELTA_SHARE_MAX


def artifacts_for(catalog: Catalog, release: Release, report: Report | None) -> list[Target]:
    """Targets that a device has to fetch for `release`: its description, and a delta or the whole of each file."""
    installed = set(report.files.values()) if report else set()
    deltas = {pair[1]: catalog.delta(*pair) for pair in pairs_for(release, report)}
    targets = [catalog.description(release)]
    for file in release.files:
        if file.sha256 in installed:
            continue
        target = deltas.get(Digest(file.sha256)) or catalog.file(Digest(file.sha256))
        if target is not None:
            targets.append(target)
    return targets


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


def retired_deltas(catalog: Catalog, needed: set[str], added: int) -> tuple[str, ...]:
    """Paths of delta targets to drop before `added` more are signed, so that the metadata stays small.

    Args:
        catalog: What is signed now.
        needed: Digests of the files of releases that are being rolled out.
        added: How many targets will be added.
    """
    if len(catalog.targets) + added <= TARGETS_SOFT_MAX:
        return ()
    return tuple(
        target.path
        for base, result in catalog.deltas()
        if result not in needed and (target := catalog.delta(base, result)) is not None
    )
