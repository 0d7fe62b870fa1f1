"""bsdiff for regions without tensor layout; the only importer of `bsdiff4`.

Only the algorithm comes from bsdiff4. Its file format is not used: bz2 blocks of unknown size would be decompressed
before anything is known about them. The three streams are framed here, compressed with zstd and checked before the C code
sees them. Layout: SPEC section 6.5.
"""

import struct
from collections.abc import Sequence

import numpy as np
from bsdiff4 import core

from protocol.delta.compression import compress, decompress
from protocol.errors import PatchError

_STREAM = struct.Struct("<II")  # length, length as stored (0: not compressed)
_TUPLE_BYTES = 24


def encode_bsdiff(result: bytes, window: bytes, effort: str) -> bytes:
    """Return the payload that gives `result` from the base window.

    The time is about a second for a mebibyte, the memory 17 times the window: callers bound both.
    """
    control, difference, extra = core.diff(window, result)
    return _pack(control, difference, extra, effort)


def encode_instructions(
    instructions: Sequence[tuple[int, int, int]], differences: bytes, insertions: bytes, effort: str
) -> bytes:
    """Return the payload for instructions that are known already; linear in time.

    Args:
        instructions: `add`, `insert` and `move` of each (SPEC section 6.5).
        differences: What is added, for all instructions.
        insertions: Likewise.
        effort: As in `compress`.
    """
    values = np.array(instructions, np.int64).reshape(-1)
    words = np.where(values < 0, -values, values).astype("<u8") | np.where(
        values < 0, np.uint64(1 << 63), np.uint64(0)
    )
    return _pack(words.astype("<u8").tobytes(), differences, insertions, effort)


def read_instructions(payload: bytes, result_length: int) -> list[tuple[int, int, int]]:
    """Return the instructions of a payload that `decode_bsdiff` accepted."""
    length, stored = _STREAM.unpack_from(payload)
    assert length <= (result_length + 1) * _TUPLE_BYTES
    data = payload[_STREAM.size : _STREAM.size + (stored or length)]
    return _instructions(_unpack_control(decompress(data, length) if stored else data))


def _pack(control: bytes, difference: bytes, extra: bytes, effort: str) -> bytes:
    out = bytearray()
    for stream in (_pack_control(control), difference, extra):
        frame = compress(stream, effort)
        if len(frame) >= len(stream):
            out += _STREAM.pack(len(stream), 0) + stream
        else:
            out += _STREAM.pack(len(stream), len(frame)) + frame
    return bytes(out)


def decode_bsdiff(payload: bytes, window: bytes, result_length: int) -> bytes:
    """Return the segment's bytes; the inverse of `encode_bsdiff`.

    Raises:
        PatchError: Streams are damaged, or an instruction leaves the window or the result.
    """
    # Every instruction gives at least one byte, apart from one that only moves.
    limits = ((result_length + 1) * _TUPLE_BYTES, result_length, result_length)
    streams: list[bytes] = []
    position = 0
    for limit in limits:
        if position + _STREAM.size > len(payload):
            raise PatchError("a bsdiff segment ends inside a stream header")
        length, stored = _STREAM.unpack_from(payload, position)
        position += _STREAM.size
        if length > limit:
            raise PatchError(f"a bsdiff stream of {length} bytes is longer than {limit}")
        end = position + (stored or length)
        if end > len(payload):
            raise PatchError("a bsdiff segment ends inside a stream")
        data = payload[position:end]
        streams.append(decompress(data, length) if stored else data)
        position = end
    if position != len(payload):
        raise PatchError("a bsdiff segment has bytes after its streams")
    control = _unpack_control(streams[0])
    _check(control, len(window), len(streams[1]), len(streams[2]), result_length)
    try:
        result: bytes = core.patch(window, result_length, control, streams[1], streams[2])
    except (ValueError, MemoryError, OverflowError) as error:
        raise PatchError("a bsdiff segment cannot be applied") from error
    return result


def _pack_control(control: bytes) -> bytes:
    """Instructions as columns: lengths and moves compress better beside their like."""
    return np.frombuffer(control, np.uint8).reshape(-1, _TUPLE_BYTES).T.tobytes()


def _unpack_control(data: bytes) -> bytes:
    if len(data) % _TUPLE_BYTES:
        raise PatchError("bsdiff instructions have a wrong length")
    return np.frombuffer(data, np.uint8).reshape(_TUPLE_BYTES, -1).T.tobytes()


def _instructions(control: bytes) -> list[tuple[int, int, int]]:
    """Read sign-and-magnitude integers of 64 bits, as bsdiff writes them."""
    words = np.frombuffer(control, "<u8").reshape(-1, 3)
    magnitude = (words & np.uint64((1 << 63) - 1)).astype(np.int64)
    values = np.where(words >> np.uint64(63), -magnitude, magnitude)
    return [(add, insert, move) for add, insert, move in values.tolist()]


def _check(
    control: bytes,
    window_length: int,
    difference_length: int,
    extra_length: int,
    result_length: int,
) -> None:
    """Follow the instructions without executing them (the class of bugs of CVE-2014-9862)."""
    position = added = inserted = 0
    for add, insert, move in _instructions(control):
        if add < 0 or insert < 0 or abs(move) > 1 << 40:
            raise PatchError("a bsdiff instruction has a length out of bounds")
        if add and not 0 <= position <= window_length - add:
            raise PatchError("a bsdiff instruction leaves the base window")
        added += add
        inserted += insert
        if added > difference_length or inserted > extra_length:
            raise PatchError("a bsdiff instruction reads more than its stream has")
        position += add + move
    if added != difference_length or inserted != extra_length or added + inserted != result_length:
        raise PatchError("bsdiff instructions do not give the announced result")
