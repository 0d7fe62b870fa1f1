"""Where in the base bytes without tensor layout have gone: a bounded index of sampled blocks.

Every so many bytes of the base a block of 64 is hashed; the hash of such a block at *every* position of a new piece then tells by
how much most of it moved. Only a hint for the planner: a wrong answer costs bytes, never correctness.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocol.tensors.regions import Layout, ReadAt, Region

_BLOCK_BYTES = 64
_ENTRIES_MAX = 1 << 18  # 4 MiB of index, whatever the length of the base
_READ_BYTES = 1 << 20
_PROBE_BYTES = 64 << 10
_VOTES_MIN = 2

# A polynomial hash modulo 2**64; the multiplier is odd, so it has an inverse.
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)

Hashes = npt.NDArray[np.uint64]


def _powers(base: int, count: int) -> Hashes:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


_POWERS = _powers(_MULTIPLIER, _PROBE_BYTES)
_INVERSE_POWERS = _powers(_INVERSE, _PROBE_BYTES)


class Anchors:
    """The index of one base.

    Args:
        base: What is indexed, on first use.
        regions: Its map; only raw regions count.
    """

    def __init__(self, base: ReadAt, regions: Sequence[Region]) -> None:
        self._base = base
        self._regions = [region for region in regions if region.layout is Layout.RAW]
        self._hashes: Hashes | None = None
        self._offsets: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def locate(self, data: bytes) -> int | None:
        """Return where in the base the counterpart of `data` would start, or None if nothing is recognised."""
        if self._hashes is None:
            self._build()
        votes: list[npt.NDArray[np.int64]] = []
        starts = {0, max(0, len(data) // 2 - _PROBE_BYTES // 2), max(0, len(data) - _PROBE_BYTES)}
        for start in sorted(starts):
            found, offsets = self._lookup(data[start : start + _PROBE_BYTES])
            votes.append(offsets - found - start)
        values, counts = np.unique(np.concatenate(votes), return_counts=True)
        if not len(values) or counts.max() < min(_VOTES_MIN, max(1, len(data) // (2 * _BLOCK_BYTES))):
            return None
        return int(values[counts.argmax()])

    def _build(self) -> None:
        total = sum(region.length for region in self._regions)
        stride = _BLOCK_BYTES * max(1, -(-total // (_ENTRIES_MAX * _BLOCK_BYTES)))
        hashes: list[Hashes] = [np.zeros(0, np.uint64)]
        offsets: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        step = max(stride, _READ_BYTES // stride * stride)
        for region in self._regions:
            for start in range(region.offset, region.end, step):
                data = self._base.read_at(start, min(step, region.end - start))
                blocks = _blocks(data, stride)
                # Runs of one byte are everywhere and say nothing.
                telling = (blocks != blocks[:, :1]).any(axis=1)
                hashes.append((blocks[telling] + np.uint64(1)) @ _POWERS[:_BLOCK_BYTES])
                offsets.append(start + stride * np.flatnonzero(telling).astype(np.int64))
        unique, first = np.unique(np.concatenate(hashes), return_index=True)
        self._hashes, self._offsets = unique, np.concatenate(offsets)[first]

    def _lookup(self, data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return positions in `data` whose block is indexed, and where in the base it is."""
        assert self._hashes is not None
        if len(data) < _BLOCK_BYTES or not len(self._hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        values = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
        sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * _POWERS[: len(values)], out=sums[1:])
        rolling = (sums[_BLOCK_BYTES:] - sums[:-_BLOCK_BYTES]) * _INVERSE_POWERS[
            : len(values) - _BLOCK_BYTES + 1
        ]
        places = np.minimum(np.searchsorted(self._hashes, rolling), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[places] == rolling)
        return hits.astype(np.int64), self._offsets[places[hits]]


def _blocks(data: bytes, stride: int) -> Hashes:
    count = len(data) // stride if len(data) % stride < _BLOCK_BYTES else len(data) // stride + 1
    if not count:
        return np.zeros((0, _BLOCK_BYTES), np.uint64)
    view = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _BLOCK_BYTES)
    return view[::stride][:count].astype(np.uint64)
