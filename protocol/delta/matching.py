"""Which region of the base a region of the new file is coded against.

By name first; what is left by content, then by layout and shape in file order. Nothing here can fail: a region without a
counterpart is coded without one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from protocol.tensors.regions import Layout, ReadAt, Region

_READ_BYTES = 1 << 20


def match_regions(
    base_regions: Sequence[Region], new_regions: Sequence[Region], base: ReadAt, new: ReadAt
) -> list[Region | None]:
    """Return for each new region its counterpart in the base, or None.

    A counterpart of a tensor has the same layout, and rows of the same length or the same length altogether; it may
    have fewer or more rows (a grown vocabulary).
    """
    by_key = {_key(region, before): region for before, region in _with_predecessor(base_regions)}
    matches: list[Region | None] = []
    for before, region in _with_predecessor(new_regions):
        candidate = by_key.get(_key(region, before))
        matches.append(candidate if candidate is not None and _fits(candidate, region) else None)
    used = {region.offset for region in matches if region is not None}
    free = [region for region in base_regions if _is_tensor(region) and region.offset not in used]
    if free:
        _match_rest(matches, new_regions, free, base, new)
    return matches


def _is_tensor(region: Region) -> bool:
    return bool(region.name) and region.layout is not Layout.RAW


def _with_predecessor(regions: Iterable[Region]) -> Iterable[tuple[str, Region]]:
    before = ""
    for region in regions:
        yield before, region
        before = region.name or before


def _key(region: Region, before: str) -> tuple[bool, str]:
    """Bytes between tensors are named by the tensor that they follow."""
    return (True, region.name) if region.name else (False, before)


def _fits(old: Region, new: Region) -> bool:
    if new.layout is Layout.RAW or old.layout is not new.layout:
        return old.layout is new.layout
    return old.row_bytes == new.row_bytes or old.length == new.length


def _match_rest(
    matches: list[Region | None],
    new_regions: Sequence[Region],
    free: Sequence[Region],
    base: ReadAt,
    new: ReadAt,
) -> None:
    """Pair what names did not: equal content, then equal layout and shape in file order."""
    open_indices = [i for i, region in enumerate(new_regions) if matches[i] is None and _is_tensor(region)]
    sizes = {(new_regions[i].layout, new_regions[i].length) for i in open_indices}
    by_digest = {_digest(base, region): region for region in free if (region.layout, region.length) in sizes}
    base_sizes = {(region.layout, region.length) for region in by_digest.values()}
    taken: set[int] = set()
    for i in open_indices:
        region = new_regions[i]
        if (region.layout, region.length) not in base_sizes:
            continue
        same = by_digest.get(_digest(new, region))
        if same is not None:
            matches[i] = same
            taken.add(same.offset)
    by_shape: defaultdict[tuple[Layout, tuple[int, ...]], list[Region]] = defaultdict(list)
    for region in reversed(free):
        if region.offset not in taken:
            by_shape[region.layout, region.dims].append(region)
    for i in open_indices:
        if matches[i] is None:
            candidates = by_shape[new_regions[i].layout, new_regions[i].dims]
            matches[i] = candidates.pop() if candidates else None


def _digest(source: ReadAt, region: Region) -> bytes:
    digest = hashlib.sha256()
    for offset in range(region.offset, region.end, _READ_BYTES):
        digest.update(source.read_at(offset, min(_READ_BYTES, region.end - offset)))
    return digest.digest()
