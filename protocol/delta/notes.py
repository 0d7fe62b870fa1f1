"""Notes in a delta file for whoever inspects it: which tensors changed, how much, and what they were coded against.

Written by the writer, passed over by devices, believed by nobody. SPEC section 6.3.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.delta.compression import compress, decompress_up_to
from protocol.delta.format import NOTES_BYTES_MAX
from protocol.delta.matching import ALIKE_MIN, Basis, Match
from protocol.delta.planner import SegmentPlan
from protocol.errors import PatchError
from protocol.tensors.regions import Region

TENSORS_MAX = 8192
"""More changed tensors than that are not told apart by anyone; the largest are noted."""

_TEXT_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class TensorNote:
    """A tensor that changed, as the writer noted it; nothing is checked against anything.

    Attributes:
        name: The tensor's name.
        layout: How its bytes are arranged.
        length: In bytes.
        changed_bytes: How many bytes differ from the base; None where it was coded without a base.
        matched_by: By what its counterpart was found, or why there is none: a value of `Basis`; "" if not noted.
        counterpart: What is different about the counterpart: its name, or its layout for a retyped tensor; else "".
        correlation: Of the codes of both versions, None where there is no counterpart or it was not noted.
    """

    name: str
    layout: str
    length: int
    changed_bytes: int | None
    matched_by: str = ""
    counterpart: str = ""
    correlation: float | None = None

    @property
    def reason(self) -> str:
        """Why it costs what it costs, in words; "" where the writer did not say."""
        if self.correlation is not None and self.correlation < ALIKE_MIN:
            return f"retrained: codes share nothing (correlation {self.correlation:.2f})"
        counterpart = self.counterpart or "its namesake"
        words: dict[str, str] = {
            Basis.NAME: "a version of its namesake",
            Basis.CONTENT: f"a version of {counterpart}",
            Basis.SHAPE: f"coded against {counterpart}, which has its shape",
            Basis.NOTHING: "new: the base has nothing like it",
            Basis.RETYPED: f"retyped: was {counterpart}",
            Basis.RESHAPED: "reshaped: rows have another length",
        }
        return words.get(self.matched_by, "")


class Notes:
    """Collects what changed while segments are written.

    Args:
        regions: The new file's map.
        matches: What each region was matched with.

    Attributes:
        changed: Changed bytes of each tensor, by its index in the map.
    """

    def __init__(self, regions: Sequence[Region], matches: Sequence[Match]) -> None:
        self._regions = regions
        self._matches = matches
        self._offsets = [region.offset for region in regions]
        self.changed: dict[int, int] = {}

    def add(self, plan: SegmentPlan, result: bytes, window: bytes, *, is_copy: bool) -> None:
        """Count the changed bytes of the tensors in a segment.

        Args:
            plan: The segment.
            result: Its bytes.
            window: The bytes of the base that it was planned with.
            is_copy: Nothing changed.
        """
        if is_copy:
            return
        position = 0
        for run, place in zip(plan.runs, plan.places, strict=True):
            new = result[position : position + run.length]
            if place is not None and run.base_offset is not None:
                self._count(place.tensor, new, window[run.base_offset : run.base_offset + run.length])
            elif place is not None:
                self._count(place.tensor, new, b"")
            position += run.length
        if not plan.runs:
            self._add_raw(plan, result, window)

    def merge(self, changed: Mapping[int, int]) -> None:
        """Take in what was counted elsewhere."""
        for index, count in changed.items():
            self.changed[index] = self.changed.get(index, 0) + count

    def _add_raw(self, plan: SegmentPlan, result: bytes, window: bytes) -> None:
        """Count a segment of a tensor whose inside is not known; each is planned by itself."""
        index = bisect_right(self._offsets, plan.result_offset) - 1
        region, base = self._regions[index], self._matches[index].base
        if not region.name:
            return
        start = base.offset + plan.result_offset - region.offset - plan.window_offset if base else -1
        self._count(index, result, window[start : start + len(result)] if start >= 0 else b"")

    def _count(self, index: int, new: bytes, old: bytes) -> None:
        size = min(len(new), len(old))
        ours, theirs = np.frombuffer(new, np.uint8, size), np.frombuffer(old, np.uint8, size)
        changed = int(np.count_nonzero(ours != theirs)) + len(new) - size
        if changed:
            self.changed[index] = self.changed.get(index, 0) + changed

    def pack(self) -> bytes:
        """Return the record's payload, or nothing where there is nothing to say or it would be too long."""
        largest = sorted(self.changed, key=lambda index: -self._regions[index].length)[:TENSORS_MAX]
        tensors = [self._row(index) for index in sorted(largest)]
        if not tensors:
            return b""
        text = json.dumps({"tensors": tensors}, separators=(",", ":"), ensure_ascii=False).encode()
        packed = compress(text, "smallest")
        return packed if len(packed) <= NOTES_BYTES_MAX and len(text) <= _TEXT_BYTES_MAX else b""

    def _row(self, index: int) -> list[str | int | float | None]:
        region, match = self._regions[index], self._matches[index]
        counterpart = ""
        if match.region is not None and match.by is Basis.RETYPED:
            counterpart = match.region.layout.value
        elif match.region is not None and match.region.name != region.name:
            counterpart = match.region.name
        return [
            region.name,
            region.layout.value,
            region.length,
            None if match.base is None else self.changed[index],
            match.by.value,
            counterpart,
            None if match.correlation is None else round(match.correlation, 3),
        ]


def read_notes(payload: bytes) -> list[TensorNote]:
    """Return what a note record says about tensors.

    Raises:
        PatchError: It is not what a writer writes.
    """
    try:
        notes = json.loads(decompress_up_to(payload, _TEXT_BYTES_MAX))
        return [_note(*row) for row in notes["tensors"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise PatchError("a note record is not readable") from error


def _note(
    name: str,
    layout: str,
    length: int,
    changed: int | None,
    by: str = "",
    counterpart: str = "",
    correlation: float | None = None,
) -> TensorNote:
    return TensorNote(
        str(name),
        str(layout),
        int(length),
        None if changed is None else int(changed),
        str(by),
        str(counterpart),
        None if correlation is None else float(correlation),
    )
