"""From a checked segment and its bytes to its part of the result: the one place where codecs are told apart."""

import hashlib
import zlib

from protocol.delta.bsdiff import decode_bsdiff
from protocol.delta.compression import decompress, decompress_up_to
from protocol.delta.context import ContextModel
from protocol.delta.format import (
    SEGMENT_DIGEST_BYTES,
    TABLES_BYTES_MAX,
    WITH_DIGEST,
    Codec,
    Header,
    SegmentHeader,
    check_memory,
)
from protocol.delta.runs import Basis, read_context_runs
from protocol.delta.tensor import decode_tensor, read_runs, working_bytes
from protocol.errors import PatchError, WrongBaseError
from protocol.tensors.regions import ReadAt


def read_window(base: ReadAt, offset: int, length: int) -> bytes:
    """Return a window of the base.

    Raises:
        WrongBaseError: The base is shorter than it said.
    """
    window = base.read_at(offset, length) if length else b""
    if len(window) != length:
        raise WrongBaseError(f"the base could not be read at byte {offset + len(window)}")
    return window


def segment_digest(codec: Codec, result: bytes) -> bytes:
    """Return the digest that a segment header carries, if it carries one."""
    return hashlib.sha256(result).digest()[:SEGMENT_DIGEST_BYTES] if codec in WITH_DIGEST else b""


def segment_checksum(codec: Codec, result: bytes, body: bytes) -> int:
    """Return the checksum that a segment header carries."""
    return zlib.crc32(result if codec is Codec.COPY else body)


def wrong_base(offset: int) -> WrongBaseError:
    """Return the error of a base that does not give what was announced, though the delta is whole."""
    return WrongBaseError(
        f"the base at byte {offset} does not give the announced result",
        hint="the delta was made for another file, or the base is damaged",
    )


def read_tables(segment: SegmentHeader, body: bytes) -> Basis:
    """Return what a tables record brings.

    Raises:
        PatchError: It is damaged, or out of bounds.
    """
    _check_body(segment, body)
    return Basis.unpack(decompress_up_to(body, TABLES_BYTES_MAX))


def _check_body(segment: SegmentHeader, body: bytes) -> None:
    if zlib.crc32(body) != segment.checksum:
        raise PatchError(f"the payload of a {segment.codec.name.lower()} record is damaged")


def decode_segment(
    segment: SegmentHeader, body: bytes, base: ReadAt, header: Header, model: ContextModel
) -> bytes:
    """Return the result of a segment that `check_segment` accepted, verified by its digest.

    Args:
        segment: Its header; not of a copy, which may be too long to be made at once.
        body: Parameters and payload.
        base: The base.
        header: Of the file.
        model: What context segments go on from; moved on by them.

    Raises:
        PatchError: The body is damaged.
        PatchLimitError: Its runs need more memory than the header declared.
        WrongBaseError: The body is whole, and the base does not give the result.
    """
    _check_body(segment, body)
    window = read_window(base, segment.window_offset, segment.window_length)
    result = _decode(segment, body, window, header, model)
    if len(result) != segment.result_length or segment_digest(segment.codec, result) != segment.digest:
        if segment.window_length:
            raise wrong_base(segment.window_offset)
        raise PatchError("a segment does not give the announced result")
    return result


def _decode(segment: SegmentHeader, body: bytes, window: bytes, header: Header, model: ContextModel) -> bytes:
    codec = segment.codec
    if codec is Codec.RAW:
        return body
    if codec is Codec.SELF:
        return decompress(body, segment.result_length)
    if codec is Codec.BSDIFF:
        return decode_bsdiff(body, window, segment.result_length)
    parameters, payload = body[: segment.parameter_length], body[segment.parameter_length :]
    if codec is Codec.CONTEXT:
        if not segment.continues:
            model.reset()
        context_runs = read_context_runs(parameters, segment.result_length, len(window), model.basis)
        return model.decode(context_runs, window, payload)
    if codec is Codec.TENSOR:
        runs = read_runs(parameters, segment.result_length, len(window))
        check_memory(segment, header, working_bytes(runs))
        return decode_tensor(payload, window, runs)
    raise PatchError(f"codec {codec} gives no result")
