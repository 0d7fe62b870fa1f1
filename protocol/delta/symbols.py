"""Streams of small unsigned numbers, mostly zero, as bytes: the entropy stage of the first tensor codec.

zstd's literals cost a whole bit at least, so a mostly-zero stream is turned into gaps between the other values first, and
those values, less one, are a stream again. SPEC section 6.9 gives the layout.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.delta.compression import compress, decompress
from protocol.delta.varints import write_varint
from protocol.errors import PatchError

Unsigned = npt.NDArray[Any]

_ALL_ZERO, _DENSE, _SPARSE = 0, 1, 2
_PLANE_ZERO, _PLANE_STORED, _PLANE_ZSTD = 0, 1, 2
_DEPTH_MAX = 3
_VARINT_BYTES_MAX = 9
_SCATTER_VALUES = 1 << 15  # positions made at once; a multiple of eight

# A gap plus 4 is written as its bit length and its three highest bits in one byte, and the bits below those.
_LEADING_BITS = 3
_LEADING = 1 << (_LEADING_BITS - 1)
_WIDTH_MAX = 24

# Which representations are worth trying, by the share of values that are not zero.
_SPARSE_ONLY_BELOW = 0.02
_DENSE_ONLY_ABOVE = (
    0.5  # a limit of the format too: above it gaps cannot win, and would cost the reader memory
)


class Payload:
    """Reads parameters and payloads forward, checking every length.

    Args:
        data: The bytes of one segment.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data)
        self._position = 0

    def take(self, length: int) -> memoryview:
        """Return the next `length` bytes.

        Raises:
            PatchError: Fewer are left.
        """
        end = self._position + length
        if end > len(self._data):
            raise PatchError("a segment's payload ends inside a field")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self, limit: int) -> int:
        """Return a non-negative integer of at most `limit`.

        Raises:
            PatchError: It is larger, or too long.
        """
        value = 0
        for index in range(_VARINT_BYTES_MAX):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if value > limit:
                    break
                return value
        raise PatchError(f"a number in a segment's payload is larger than {limit}")

    def signed(self, limit: int) -> int:
        """Return an integer between `-limit` and `limit`."""
        value = self.varint(2 * limit)
        return value >> 1 if value % 2 == 0 else -((value + 1) >> 1)

    def expect_end(self) -> None:
        """Refuse bytes that nothing accounts for.

        Raises:
            PatchError: There are some.
        """
        if self._position != len(self._data):
            raise PatchError(f"{len(self._data) - self._position} bytes of a segment's payload are not used")


def encode_symbols(symbols: Unsigned, effort: str, depth: int = _DEPTH_MAX) -> bytes:
    """Return `symbols` (one dimension, 8, 16 or 32 bits) as bytes; the shorter of dense and sparse.

    Args:
        symbols: The values; zeros should be frequent.
        effort: As for `compression.compress`.
        depth: How often values may be taken apart again.
    """
    positions = np.flatnonzero(symbols)
    if len(positions) == 0:
        return bytes([_ALL_ZERO])
    density = len(positions) / len(symbols)
    candidates: list[bytes] = []
    if depth == 0 or density >= _SPARSE_ONLY_BELOW:
        candidates.append(_encode_dense(symbols, effort))
    if depth > 0 and density <= _DENSE_ONLY_ABOVE:
        candidates.append(_encode_sparse(symbols, positions, effort, depth))
    return min(candidates, key=len)


def _encode_dense(symbols: Unsigned, effort: str) -> bytes:
    out = bytearray([_DENSE])
    _encode_planes(symbols, effort, out)
    return bytes(out)


def _encode_sparse(symbols: Unsigned, positions: npt.NDArray[np.intp], effort: str, depth: int) -> bytes:
    out = bytearray([_SPARSE])
    write_varint(len(positions), out)
    # Values come before gaps: a reader then never holds the gaps of two levels at once.
    out += encode_symbols(symbols[positions] - symbols.dtype.type(1), effort, depth - 1)
    _encode_gaps((np.diff(positions, prepend=-1) - 1).astype(np.uint32), effort, out)
    return bytes(out)


def _encode_gaps(gaps: Unsigned, effort: str, out: bytearray) -> None:
    """Magnitudes as bytes, which have a skewed distribution; the bits below them are noise and are packed as they are."""
    values = gaps + np.uint32(_LEADING)
    # Exact for integers below 2**53: frexp gives the bit length.
    widths = (np.frexp(values.astype(np.float64))[1] - _LEADING_BITS).astype(np.uint8)
    classes = (widths << (_LEADING_BITS - 1)) | ((values >> widths) & (_LEADING - 1)).astype(np.uint8)
    _encode_planes(classes, effort, out)
    for width in range(1, int(widths.max()) + 1):
        low = values[widths == width]
        bits = (low[:, None] >> np.arange(width, dtype=np.uint32)) & np.uint32(1)
        out += np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _encode_planes(values: Unsigned, effort: str, out: bytearray) -> None:
    planes = values.reshape(-1, 1).view(np.uint8)
    for plane in planes.T:
        if not plane.any():
            out.append(_PLANE_ZERO)
            continue
        data = plane.tobytes()
        frame = compress(data, effort)
        if len(frame) < len(data):
            out.append(_PLANE_ZSTD)
            write_varint(len(frame), out)
            out += frame
        else:
            out.append(_PLANE_STORED)
            out += data


def decode_symbols(payload: Payload, count: int, width: int, depth: int = _DEPTH_MAX) -> Unsigned:
    """Return `count` values of `width` bits that `encode_symbols` wrote.

    Raises:
        PatchError: The payload is damaged.
    """
    if count == 0:
        # An empty stream is written as nothing but zeros.
        if payload.byte() != _ALL_ZERO:
            raise PatchError("an empty stream has content")
        return np.zeros(0, f"<u{width // 8}")
    method = payload.byte()
    if method == _ALL_ZERO:
        return np.zeros(count, f"<u{width // 8}")
    if method == _DENSE:
        return _decode_planes(payload, count, width)
    if method == _SPARSE and depth > 0:
        return _decode_sparse(payload, count, width, depth)
    raise PatchError(f"a stream has the unknown method {method}")


def _decode_sparse(payload: Payload, count: int, width: int, depth: int) -> Unsigned:
    used = payload.varint(count // 2)
    values = decode_symbols(payload, used, width, depth - 1)
    values += values.dtype.type(1)
    gaps = _decode_gaps(payload, used)
    symbols: Unsigned = np.zeros(count, f"<u{width // 8}")
    before = -1
    for start in range(0, used, _SCATTER_VALUES):
        positions = gaps[start : start + _SCATTER_VALUES].astype(np.int64)
        positions += 1
        np.cumsum(positions, out=positions)
        positions += before
        before = int(positions[-1])
        if before >= count:
            raise PatchError("a stream has values after its end")
        symbols[positions] = values[start : start + _SCATTER_VALUES]
    return symbols


def _decode_gaps(payload: Payload, count: int) -> Unsigned:
    classes = _decode_planes(payload, count, 8)
    widths = classes >> (_LEADING_BITS - 1)
    gaps: Unsigned = (classes & (_LEADING - 1)).astype(np.uint32)
    gaps += np.uint32(_LEADING)
    widest = int(widths.max(initial=0))
    if widest > _WIDTH_MAX:
        raise PatchError(f"a gap of {widest} bits is longer than any segment")
    for width in range(1, widest + 1):
        places = np.flatnonzero(widths == width)
        packed = np.frombuffer(payload.take(-(-len(places) * width // 8)), np.uint8)
        for start in range(0, len(places), _SCATTER_VALUES):
            some = places[start : start + _SCATTER_VALUES]
            part = packed[start * width // 8 : -(-(start + len(some)) * width // 8)]
            bits = np.zeros((len(some), 32), np.uint8)
            bits[:, :width] = np.unpackbits(part, count=len(some) * width, bitorder="little").reshape(
                -1, width
            )
            low = np.packbits(bits, axis=1, bitorder="little").view("<u4").reshape(-1)
            gaps[some] = (gaps[some] << np.uint32(width)) | low
    gaps -= np.uint32(_LEADING)
    return gaps


def _decode_planes(payload: Payload, count: int, width: int) -> Unsigned:
    planes = np.zeros((count, width // 8), np.uint8)
    for index in range(width // 8):
        method = payload.byte()
        if method == _PLANE_ZERO:
            continue
        if method == _PLANE_STORED:
            data = bytes(payload.take(count))
        elif method == _PLANE_ZSTD:
            frame = payload.take(payload.varint(count))
            data = decompress(bytes(frame), count)
        else:
            raise PatchError(f"a plane has the unknown method {method}")
        planes[:, index] = np.frombuffer(data, np.uint8)
    return planes.view(f"<u{width // 8}").reshape(-1)
