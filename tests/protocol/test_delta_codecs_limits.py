"""Edges of what the decoders of frames and of bsdiff instructions take."""

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard

from protocol.delta.bsdiff import decode_bsdiff
from protocol.delta.compression import compress, decompress, decompress_up_to
from protocol.errors import PatchError

_WINDOW = b"0123456789"
_WINDOW_BYTES_MAX = 32 << 20

Instructions = Sequence[tuple[int, int, int]]


def columns(instructions: Instructions) -> bytes:
    """Instructions as a stream has them: sign and magnitude, column by column."""
    words = [value if value >= 0 else (1 << 63) - value for row in instructions for value in row]
    control = np.frombuffer(b"".join(word.to_bytes(8, "little") for word in words), np.uint8)
    return control.reshape(-1, 24).T.tobytes()


def streams(*contents: bytes) -> bytes:
    return b"".join(struct.pack("<II", len(content), 0) + content for content in contents)


def decode(
    instructions: Instructions, difference: bytes, extra: bytes, length: int, window: bytes = _WINDOW
) -> bytes:
    return decode_bsdiff(streams(columns(instructions), difference, extra), window, length)


# --- bsdiff -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instructions", "difference", "extra", "result"),
    [
        ([(10, 0, 0)], bytes(10), b"", _WINDOW),
        ([(0, 3, 0)], b"", b"abc", b"abc"),
        ([(0, 0, 9), (1, 0, 0)], b"\x01", b"", b":"),
        ([(2, 0, -2), (2, 0, 0)], bytes(4), b"", b"0101"),
        ([(0, 0, 1)] + [(1, 0, 0)] * 5, bytes(5), b"", b"12345"),
        ([(0, 0, -5), (0, 2, 5), (1, 0, 1 << 40)], b"\x00", b"xy", b"xy0"),
        ([(0, 1, -(1 << 40))], b"", b"z", b"z"),
    ],
)
def test_instructions_up_to_their_bounds_are_followed(
    instructions: Instructions, difference: bytes, extra: bytes, result: bytes
) -> None:
    assert decode(instructions, difference, extra, len(result)) == result


@pytest.mark.parametrize(
    ("instructions", "difference", "extra", "length", "message"),
    [
        ([(-1, 6, 0)], b"", b"abcde", 5, "out of bounds"),
        ([(5, 0, 0), (0, -1, 0)], bytes(5), b"", 5, "out of bounds"),
        ([(0, 1, (1 << 40) + 1)], b"", b"a", 1, "out of bounds"),
        ([(0, 1, -(1 << 40) - 1)], b"", b"a", 1, "out of bounds"),
        ([(11, 0, 0)], bytes(11), b"", 11, "leaves the base window"),
        ([(0, 0, 10), (1, 0, 0)], b"\x00", b"", 1, "leaves the base window"),
        ([(0, 0, -1), (1, 0, 0)], b"\x00", b"", 1, "leaves the base window"),
        ([(2, 0, 0), (1, 0, 0)], bytes(2), b"", 3, "more than its stream"),
        ([(0, 2, 0), (0, 1, 0)], b"", b"ab", 3, "more than its stream"),
        ([(1, 0, 0)], bytes(2), b"", 2, "announced result"),
        ([(0, 1, 0)], b"", b"ab", 2, "announced result"),
        ([(1, 1, 0)], bytes(1), b"a", 3, "announced result"),
        ([(1, 2, 0)], bytes(2), b"ab", 3, "announced result"),
        ([(2, 1, 0)], bytes(2), b"ab", 3, "announced result"),
        ([(0, 0, 0)] * 3, b"", b"", 1, "stream of 72 bytes is longer than 48"),
        ([(2, 0, 0)], bytes(2), b"", 1, "stream of 2 bytes is longer than 1"),
        ([(0, 2, 0)], b"", b"ab", 1, "stream of 2 bytes is longer than 1"),
    ],
)
def test_instructions_beyond_a_bound_are_refused(
    instructions: Instructions, difference: bytes, extra: bytes, length: int, message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        decode(instructions, difference, extra, length)


def test_streams_that_are_cut_off_or_followed_by_bytes_are_refused() -> None:
    payload = streams(columns([(2, 1, 0)]), bytes(2), b"x")
    assert decode_bsdiff(payload, _WINDOW, 3) == b"01x"
    heads = [0, 8 + 24, 8 + 24 + 8 + 2]
    for length in range(len(payload)):
        inside_head = any(head <= length < head + 8 for head in heads)
        message = "inside a stream header" if inside_head else "inside a stream$"
        with pytest.raises(PatchError, match=message):
            decode_bsdiff(payload[:length], _WINDOW, 3)
    with pytest.raises(PatchError, match="bytes after its streams"):
        decode_bsdiff(payload + b"\0", _WINDOW, 3)


def test_half_an_instruction_is_refused() -> None:
    with pytest.raises(PatchError, match="wrong length"):
        decode_bsdiff(streams(columns([(2, 0, 0)])[:-1], bytes(2), b""), _WINDOW, 2)


def test_compressed_streams_are_read_to_their_end() -> None:
    difference = bytes(1000)
    frame = compress(difference, "fast")
    stored = struct.pack("<II", 1000, len(frame)) + frame
    payload = streams(columns([(1000, 0, 0)])) + stored + streams(b"")
    assert decode_bsdiff(payload, bytes(1000), 1000) == bytes(1000)
    with pytest.raises(PatchError, match=r"inside a stream$"):
        decode_bsdiff(streams(columns([(1000, 0, 0)])) + stored[:-1], bytes(1000), 1000)


@pytest.mark.parametrize("kind", [ValueError, MemoryError, OverflowError])
def test_what_the_library_still_refuses_is_a_bad_file_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def patch(*_: object) -> bytes:
        raise kind

    monkeypatch.setattr("bsdiff4.core.patch", patch)
    with pytest.raises(PatchError, match="cannot be applied"):
        decode([(10, 0, 0)], bytes(10), b"", 10)


# --- zstd -------------------------------------------------------------------------------------------------------


def test_a_frame_holds_exactly_the_announced_number_of_bytes() -> None:
    for data in (b"", b"x", b"text " * 100):
        frame = compress(data, "fast")
        assert decompress(frame, len(data)) == data
        for length in {len(data) + 1, max(len(data) - 1, 0)} - {len(data)}:
            with pytest.raises(PatchError, match="announced number"):
                decompress(frame, length)


def test_a_frame_that_does_not_say_its_length_is_refused() -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    frame = stream.compress(b"text " * 100) + stream.flush()
    with pytest.raises(PatchError, match="announced number"):
        decompress(frame, 500)
    with pytest.raises(PatchError, match="more than 500 bytes"):
        decompress_up_to(frame, 500)


def test_a_frame_that_needs_a_dictionary_is_refused() -> None:
    samples: list[bytes | bytearray | memoryview] = [
        b"sample %d of many samples %d" % (number, number * 7) for number in range(2000)
    ]
    dictionary = zstandard.train_dictionary(1024, samples)
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[5])
    assert zstandard.get_frame_parameters(frame).dict_id
    with pytest.raises(PatchError, match="announced number"):
        decompress(frame, len(samples[5]))


def test_a_frame_may_need_the_largest_window_and_no_larger_one() -> None:
    for length, is_taken in [(_WINDOW_BYTES_MAX, True), (_WINDOW_BYTES_MAX + 1, False)]:
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=26)
        frame = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(length))
        assert zstandard.get_frame_parameters(frame).window_size == length
        if is_taken:
            assert len(decompress(frame, length)) == length
        else:
            with pytest.raises(PatchError, match="needs a window of"):
                decompress(frame, length)


def test_what_is_no_frame_is_refused() -> None:
    good = compress(b"text " * 100, "fast")
    for frame in (b"", b"no frame at all", good[:5], good[:-1]):
        with pytest.raises(PatchError, match="zstd frame"):
            decompress(frame, 500)
    for frame in (b"", b"no frame at all", good[:-1]):
        with pytest.raises(PatchError, match="zstd frame"):
            decompress_up_to(frame, 500)


def test_a_frame_of_unknown_length_is_read_up_to_the_limit() -> None:
    frame = compress(b"text " * 100, "fast")
    assert decompress_up_to(frame, 500) == b"text " * 100
    with pytest.raises(PatchError, match="holds more than 499 bytes"):
        decompress_up_to(frame, 499)
