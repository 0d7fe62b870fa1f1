"""Which region of the base a region of the new file is coded against.

By name first; a tensor whose namesake is missing, of another type, or unlike it is looked for by content among all of
the base's tensors; what is left is paired by layout and shape in file order. Nothing here can fail: a region without a
counterpart is coded without one.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from protocol.delta.layouts import LAYOUTS
from protocol.delta.sampling import Sample, correlation, equal_share, normalized, sample
from protocol.tensors.regions import Layout, ReadAt, Region

ALIKE_MIN = 0.5
"""Correlation from which tensors are versions of each other. Fine-tuned ones measure above 0.9, retrained ones below 0.35."""

_BETTER_BY = 0.1  # a namesake is left only for a tensor that is clearly more alike
_FREE_BONUS = 0.001  # of equally good candidates, one that no other tensor has
_UNRELATED_BELOW = 0.05  # some three deviations of chance
# Equal values that no chance explains: words of 16 bits or more, and codes where most are equal.
_EQUAL_WORDS_MIN = 0.01
_EQUAL_CODES_MIN = 0.5
_CANDIDATES_MAX = (
    2048  # of one shape: bounds memory at 32 MiB, and time for models of very many equal tensors
)
_BATCH = 256
_PART_CODES_MIN = 256  # of a part of a tensor; fewer may be alike by chance


class Basis(StrEnum):
    """By what a region was matched, or why it was not."""

    NAME = "name"
    CONTENT = "content"
    SHAPE = "shape"
    NOTHING = "nothing"
    RETYPED = "retyped"  # the tensor of this name has another layout
    RESHAPED = "reshaped"  # the tensor of this name has rows of another length


@dataclass(frozen=True, slots=True)
class Match:
    """A region of the new file and its counterpart.

    Attributes:
        by: How the counterpart was found.
        region: The counterpart in the base; only a namesake if `by` is `RETYPED` or `RESHAPED`, None if it is `NOTHING`.
        correlation: Of sampled codes of both, from -1 to 1; None where they were not compared.
        is_related: Whether coding against the counterpart can pay.
    """

    by: Basis
    region: Region | None = None
    correlation: float | None = None
    is_related: bool = True

    @property
    def base(self) -> Region | None:
        """What the region is coded against, if anything."""
        return (
            self.region if self.is_related and self.by in {Basis.NAME, Basis.CONTENT, Basis.SHAPE} else None
        )


def match_regions(
    base_regions: Sequence[Region], new_regions: Sequence[Region], base: ReadAt, new: ReadAt
) -> list[Match]:
    """Return for each new region its counterpart in the base.

    A counterpart has the same layout, and rows of the same length or the same length altogether; it may have fewer or more
    rows (a grown vocabulary). One tensor of the base may be the counterpart of several (a head that was tied before).

    Args:
        base_regions: The base's map.
        new_regions: The new file's map.
        base: The base; a few places of its tensors are read.
        new: The new file, likewise.
    """
    matcher = _Matcher(base_regions, new_regions, base, new)
    matcher.by_name()
    matcher.by_content(lambda region: (region.layout, region.dims, region.length))
    matcher.by_content(lambda region: (region.layout, region.row_bytes), is_part=True)
    matcher.by_shape()
    return matcher.matches


class _Matcher:
    def __init__(
        self, base_regions: Sequence[Region], new_regions: Sequence[Region], base: ReadAt, new: ReadAt
    ) -> None:
        self._base_regions = base_regions
        self._new_regions = new_regions
        self._base = base
        self._new = new
        self.matches: list[Match] = []

    def by_name(self) -> None:
        """Fill `matches`; the n-th of several tensors of one name goes with the n-th of the base."""
        by_key: defaultdict[tuple[bool, str], list[Region]] = defaultdict(list)
        for key, region in _keyed(self._base_regions):
            by_key[key].append(region)
        seen: defaultdict[tuple[bool, str], int] = defaultdict(int)
        for key, region in _keyed(self._new_regions):
            namesakes = by_key.get(key, [])
            old = namesakes[min(seen[key], len(namesakes) - 1)] if namesakes else None
            seen[key] += 1
            if old is None:
                self.matches.append(Match(Basis.NOTHING))
            elif not region.name:
                self.matches.append(Match(Basis.NAME, old))
            elif old.layout is not region.layout:
                self.matches.append(Match(Basis.RETYPED, old))
            elif not _fits(old, region):
                self.matches.append(Match(Basis.RESHAPED, old))
            else:
                self.matches.append(self._judged(Basis.NAME, old, region))

    def by_content(self, key: Callable[[Region], Hashable], *, is_part: bool = False) -> None:
        """Replace matches of tensors that are unlike their namesakes by those that are alike.

        Args:
            key: Only tensors of one key are compared.
            is_part: Tensors of one key may have different lengths: compare what all of them have.
        """
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for index, (region, match) in enumerate(zip(self._new_regions, self.matches, strict=True)):
            if region.name and (match.base is None or (match.correlation or 0.0) < ALIKE_MIN):
                groups[key(region)].append(index)
        candidates: defaultdict[Hashable, list[Region]] = defaultdict(list)
        for region in self._base_regions if groups else ():
            if region.name and len(candidates[key(region)]) < _CANDIDATES_MAX:
                candidates[key(region)].append(region)
        for group, indices in groups.items():
            if candidates[group]:
                self._compare(indices, candidates[group], is_part=is_part)

    def _compare(self, indices: Sequence[int], candidates: Sequence[Region], *, is_part: bool) -> None:
        length = min(region.length for region in (*candidates, *(self._new_regions[i] for i in indices)))
        old = _whole(sample(self._base, region, length) for region in candidates)
        if old is None or (is_part and len(old[0]) < _PART_CODES_MIN):
            return
        rows = normalized(old)
        used = self._used()
        bonus = np.array([0.0 if region.offset in used else _FREE_BONUS for region in candidates])
        for start in range(0, len(indices), _BATCH):
            batch = indices[start : start + _BATCH]
            new = _whole(sample(self._new, self._new_regions[index], length) for index in batch)
            if new is None or len(new[0]) != len(old[0]):
                return
            for index, alike in zip(batch, normalized(new) @ rows.T, strict=True):
                best = int(np.argmax(alike + bonus))
                before = self.matches[index].correlation or 0.0
                if alike[best] >= max(ALIKE_MIN, before + _BETTER_BY):
                    self.matches[index] = self._judged(
                        Basis.CONTENT, candidates[best], self._new_regions[index]
                    )

    def by_shape(self) -> None:
        """Pair what is left on both sides, by layout and shape in file order."""
        used = self._used()
        free: defaultdict[Hashable, list[Region]] = defaultdict(list)
        for region in reversed(self._base_regions):
            if region.name and region.offset not in used:
                free[region.layout, region.dims].append(region)
        for index, (region, match) in enumerate(zip(self._new_regions, self.matches, strict=True)):
            if region.name and match.by is Basis.NOTHING and free[region.layout, region.dims]:
                old = free[region.layout, region.dims].pop()
                self.matches[index] = self._judged(Basis.SHAPE, old, region)

    def _used(self) -> set[int]:
        return {match.region.offset for match in self.matches if match.region is not None}

    def _judged(self, by: Basis, old: Region, new: Region) -> Match:
        length = min(old.length, new.length)
        samples = _whole(
            sample(source, region, length) for source, region in ((self._base, old), (self._new, new))
        )
        if samples is None:
            return Match(by, old)
        alike = correlation(*samples)
        equal_min = _EQUAL_WORDS_MIN if LAYOUTS[new.layout].codes.width > 8 else _EQUAL_CODES_MIN
        # Bytes whose inside nobody knows may share something where numbers do not.
        is_related = (
            new.layout is Layout.RAW or abs(alike) >= _UNRELATED_BELOW or equal_share(*samples) >= equal_min
        )
        return Match(by, old, alike, is_related)


def _whole(samples: Iterator[Sample]) -> list[Sample] | None:
    """Return samples of one length; None if a file ended while it was read, which the writer will report."""
    found = list(samples)
    return found if len({len(each) for each in found}) == 1 and len(found[0]) else None


def _keyed(regions: Sequence[Region]) -> Iterator[tuple[tuple[bool, str], Region]]:
    """Yield regions with what names them; bytes between tensors are named by the tensor that they follow."""
    before = ""
    for region in regions:
        yield (bool(region.name), region.name or before), region
        before = region.name or before


def _fits(old: Region, new: Region) -> bool:
    is_raw = new.layout is Layout.RAW
    is_vector = len(old.dims) <= 1 and len(new.dims) <= 1
    return is_raw or is_vector or old.row_bytes == new.row_bytes or old.length == new.length
