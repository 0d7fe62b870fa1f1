"""How alike two tensors are, from a few thousand of their codes at the same places.

Only the writer comes here: floating point decides what is coded against what, and nobody needs to decide it again.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS, Array
from protocol.tensors.regions import Layout, ReadAt, Region

SAMPLE_CODES = 4096
"""Codes of tensors that share nothing correlate by chance with a deviation of 1/64."""

_SPOTS = 64
_USUAL_BELOW = 1e15  # no weight is larger; an infinity or what is no number is not smaller

Sample = npt.NDArray[np.float32]

_NUMBERS = {
    Layout.RAW: "u1",
    Layout.U8: "u1",
    Layout.I8: "i1",
    Layout.I16: "<i2",
    Layout.I32: "<i4",
    Layout.I64: "<i8",
    Layout.F16: "<f2",
    Layout.F32: "<f4",
    Layout.F64: "<f8",
}


def sample(source: ReadAt, region: Region, length: int) -> Sample:
    """Return codes, or numbers, from places that depend on the layout and on `length` only.

    Args:
        source: The file.
        region: A tensor of it.
        length: How much of the tensor is looked at, in bytes; at most its own length.

    Returns:
        Up to `SAMPLE_CODES` finite numbers, in the order of the tensor.
    """
    layout = LAYOUTS[region.layout]
    blocks = min(length, region.length) // layout.block_bytes
    spot_blocks = max(1, SAMPLE_CODES // _SPOTS // layout.codes.count)
    spots = max(1, min(SAMPLE_CODES // (spot_blocks * layout.codes.count), -(-blocks // spot_blocks)))
    size = spot_blocks * layout.block_bytes
    parts: list[bytes] = []
    for spot in range(spots):
        first = spot * blocks // spots
        parts.append(
            source.read_at(
                region.offset + first * layout.block_bytes,
                min(size, (blocks - first) * layout.block_bytes),
            )
        )
    data = b"".join(parts)
    return _numbers(region.layout, data[: len(data) // layout.block_bytes * layout.block_bytes])


def _numbers(kind: Layout, data: bytes) -> Sample:
    if kind in _NUMBERS:
        found: Array = np.frombuffer(data, _NUMBERS[kind])
    elif kind is Layout.BF16:
        found = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        layout = LAYOUTS[kind]
        codes = layout.codes.split(np.frombuffer(data, np.uint8).reshape(-1, layout.block_bytes)).reshape(-1)
        if layout.codebook:
            found = np.array(layout.codebook, np.float32)[codes]
        elif kind is Layout.F8:
            # Sign and magnitude: nearly the logarithm of the number, which is alike where the numbers are.
            found = np.where(codes & 0x80, -(codes & 0x7F).astype(np.float32), codes)
        else:
            found = codes.view(np.int8) if layout.is_signed else codes
    if found.dtype.kind != "f":
        return found.astype(np.float32)
    # One number of 1e38 would drown all others.
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = found.astype(np.float64)
    numbers: Sample = np.where(np.abs(wide) < _USUAL_BELOW, wide, 0).astype(np.float32)
    return numbers


def normalized(samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
    """Return samples of the same length as rows of mean 0 and length 1; a row of zeros where all values are equal."""
    rows = np.stack(samples).astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def correlation(old: Sample, new: Sample) -> float:
    """Return the correlation of two samples of the same length: 1 for equal ones, 0 for what shares nothing."""
    if np.array_equal(old, new):
        return 1.0
    rows = normalized([old, new])
    return float(rows[0] @ rows[1])


def equal_share(old: Sample, new: Sample) -> float:
    """Return the share of values that are the same in both samples."""
    return float(np.mean(old == new)) if len(old) else 0.0
