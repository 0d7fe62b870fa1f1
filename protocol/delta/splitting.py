"""Cuts a segment without tensors into what stands in the base as it is and the bytes between.

A few edits in a long header cost least so: a copy is a dozen bytes however long it is, and goes on in the copies around it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

COPY_BYTES_MIN: Final = 32
"""A shorter one costs more than its bytes, with the record that goes on after it."""

STRETCHES_MAX: Final = 64
"""What falls into more pieces is better described by bsdiff."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a segment's result.

    Attributes:
        start: Where they start in the result.
        length: How many.
        window_start: Where in the base window the same bytes stand; None for bytes that have to be sent.
    """

    start: int
    length: int
    window_start: int | None


def split(
    result: bytes, window: bytes, instructions: Sequence[tuple[int, int, int]], moved: tuple[int, int]
) -> list[Stretch]:
    """Return the stretches of a result in order, or nothing if there are too many.

    Args:
        result: Of the segment.
        window: Its base window.
        instructions: Of bsdiff: `add`, `insert` and `move` of each.
        moved: The least and the most by which a copy may lie further on in the window than in the result.
    """
    stretches: list[Stretch] = []
    end = 0
    for start, window_start, length in _equal(result, window, instructions):
        if not moved[0] <= window_start - start <= moved[1]:
            continue
        if start > end:
            stretches.append(Stretch(end, start - end, None))
        stretches.append(Stretch(start, length, window_start))
        end = start + length
        if len(stretches) >= STRETCHES_MAX:
            return []
    if end < len(result):
        stretches.append(Stretch(end, len(result) - end, None))
    return stretches


def _equal(
    result: bytes, window: bytes, instructions: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Yield start in the result, start in the window, and length of what both have, where a copy may pay."""
    ours, theirs = np.frombuffer(result, np.uint8), np.frombuffer(window, np.uint8)
    start = at = 0
    for add, insert, move in instructions:
        differ = np.flatnonzero(ours[start : start + add] != theirs[at : at + add])
        edges = np.concatenate(([-1], differ, [add]))
        lengths = np.diff(edges) - 1
        for index in np.flatnonzero(lengths >= COPY_BYTES_MIN):
            inside = int(edges[index]) + 1
            yield start + inside, at + inside, int(lengths[index])
        start += add + insert
        at += add + move
