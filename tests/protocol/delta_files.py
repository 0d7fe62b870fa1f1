"""Making, applying and doctoring delta files in tests."""

import io
import zlib
from collections.abc import Iterable

from protocol.delta.format import HEADER_BYTES, RECORD_BYTES, Codec, Header, Position
from protocol.delta.reader import DeltaReader
from protocol.delta.writer import DeltaStats, make_delta
from protocol.tensors import BytesSource


def delta(
    base: bytes, new: bytes, segment_bytes: int = 4096, *, is_portable: bool = False
) -> tuple[bytes, DeltaStats]:
    """Return the delta file and its statistics."""
    out = io.BytesIO()
    stats = make_delta(
        BytesSource(base), BytesSource(new), out, segment_bytes=segment_bytes, is_portable=is_portable
    )
    return out.getvalue(), stats


def apply(base: bytes, patch: bytes, *, memory_limit_bytes: int = 64 << 20) -> bytes:
    """Return the result of a delta file, fed at once."""
    return apply_parts(base, [patch], memory_limit_bytes=memory_limit_bytes)


def apply_parts(base: bytes, parts: Iterable[bytes], *, memory_limit_bytes: int = 64 << 20) -> bytes:
    """Return the result of a delta file, fed piece by piece."""
    reader = DeltaReader(BytesSource(base), memory_limit_bytes=memory_limit_bytes)
    out = bytearray()
    for part in parts:
        for piece in reader.feed(part):
            assert piece.offset == len(out)
            out += piece.data
    reader.finish()
    assert reader.is_result_verified
    return bytes(out)


def records(patch: bytes) -> list[tuple[int, int, int]]:
    """Return `(offset, body length, result length)` of each record of a delta file, the end record last."""
    found: list[tuple[int, int, int]] = []
    position = HEADER_BYTES
    while True:
        codec = patch[position]
        if codec == Codec.END:
            return [*found, (position, 0, 0)]
        parameters = int.from_bytes(patch[position + 2 : position + 4], "little")
        result = int.from_bytes(patch[position + 4 : position + 8], "little")
        payload = int.from_bytes(patch[position + 12 : position + 16], "little")
        found.append((position, parameters + payload, result))
        position += RECORD_BYTES + parameters + payload


def sealed(patch: bytes, layout: list[tuple[int, int, int]]) -> bytes:
    """Compute all checksums of a doctored file anew, as someone who wants to be believed would."""
    out = bytearray(patch)
    out[HEADER_BYTES - 4 : HEADER_BYTES] = _crc(out[: HEADER_BYTES - 4])
    header_crc = int.from_bytes(out[HEADER_BYTES - 4 : HEADER_BYTES], "little")
    result_offset = 0
    for offset, body_length, result_length in layout:
        body = out[offset + RECORD_BYTES : offset + RECORD_BYTES + body_length]
        if out[offset] != Codec.END:
            out[offset + RECORD_BYTES - 8 : offset + RECORD_BYTES - 4] = _crc(body)
        seed = Position(header_crc, offset, result_offset).seed()
        fixed = out[offset : offset + RECORD_BYTES - 4]
        out[offset + RECORD_BYTES - 4 : offset + RECORD_BYTES] = zlib.crc32(fixed, seed).to_bytes(4, "little")
        result_offset += result_length
    return bytes(out)


def header_of(patch: bytes) -> Header:
    """Return the header of a delta file."""
    return Header.unpack(patch[:HEADER_BYTES])


def _crc(data: bytes | bytearray) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
