"""Edges of the delta file's layout: what a header and a record may just say, and what they may just not (SPEC section 6)."""

import zlib
from dataclasses import replace
from typing import Any

import pytest

from protocol.constants import BLOB_BYTES_MAX
from protocol.delta.format import (
    CODEC_REVISION,
    FORMAT_VERSION,
    HEADER_BYTES_MAX,
    HEADER_BYTES_MIN,
    HEADER_PREFIX_BYTES,
    MAGIC,
    NOTES_BYTES_MAX,
    PARAMETER_BYTES_MAX,
    PAYLOAD_SLACK_BYTES,
    REACH_BYTES_MAX,
    RECORD_BYTES_MAX,
    SEGMENT_BYTES_MAX,
    SEGMENT_DIGEST_BYTES,
    TABLES_BYTES_MAX,
    WINDOW_BYTES_MAX,
    WITH_DIGEST,
    Codec,
    EndRecord,
    Header,
    Position,
    Profile,
    Reach,
    SegmentHeader,
    check_memory,
    check_segment,
    header_length,
    joined_checksum,
    segment_memory_bytes,
    unpack_record,
)
from protocol.errors import PatchError, PatchLimitError

_MEMORY = 1 << 40
HEADER = Header(Profile.FAST, 10_000_000, b"b" * 32, 20_000_000, b"r" * 32, _MEMORY, SEGMENT_BYTES_MAX)
PLACE = Position(0x1234_5678, 300, 1000)


def sealed(header: bytes) -> bytes:
    """A header's bytes with the length and the checksum that they then have."""
    data = header[:10] + (len(header)).to_bytes(2, "little") + header[12:-4]
    return data + zlib.crc32(data).to_bytes(4, "little")


# --- header -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        replace(HEADER, profile=Profile.SMALL, base_length=0, result_length=0, decoder_memory_bytes=0),
        replace(HEADER, base_length=BLOB_BYTES_MAX, result_length=BLOB_BYTES_MAX),
        replace(HEADER, segment_bytes_max=1),
        replace(HEADER, reach=Reach(0, 0)),
        replace(HEADER, reach=Reach(REACH_BYTES_MAX, 0)),
        replace(HEADER, reach=Reach(0, REACH_BYTES_MAX)),
    ],
)
def test_a_header_is_read_as_it_was_written_up_to_its_limits(header: Header) -> None:
    data = header.pack()
    assert header_length(data[:HEADER_PREFIX_BYTES]) == len(data)
    assert Header.unpack(data) == header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_length": BLOB_BYTES_MAX + 1}, "files of more than"),
        ({"result_length": BLOB_BYTES_MAX + 1}, "files of more than"),
        ({"segment_bytes_max": 0}, "segments of 0 bytes"),
        ({"segment_bytes_max": SEGMENT_BYTES_MAX + 1}, "segments of"),
        ({"reach": Reach(REACH_BYTES_MAX + 1, 0)}, "behind its result"),
        ({"reach": Reach(0, REACH_BYTES_MAX + 1)}, "behind its result"),
    ],
)
def test_a_header_beyond_a_limit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchLimitError, match=message):
        Header.unpack(replace(HEADER, **change).pack())


@pytest.mark.parametrize(
    ("at", "values", "message"),
    [
        (12, (0, 3, 255), "unknown profile"),
        (13, (1, 3, 4, 0x80), "unknown flags"),
        (14, (CODEC_REVISION + 1, 255), "codec revision"),
    ],
)
def test_a_header_of_another_kind_is_refused(at: int, values: tuple[int, ...], message: str) -> None:
    for value in values:
        data = bytearray(HEADER.pack())
        data[at] = value
        with pytest.raises(PatchError, match=message):
            Header.unpack(sealed(bytes(data)))


def test_a_file_of_an_earlier_codec_revision_is_read() -> None:
    data = bytearray(HEADER.pack())
    data[14] = CODEC_REVISION - 1
    assert Header.unpack(sealed(bytes(data))) == HEADER


def test_a_header_that_ends_inside_a_field_is_refused_although_its_checksum_agrees() -> None:
    for header in (HEADER, replace(HEADER, reach=Reach(5, 1 << 20))):
        data = header.pack()
        for cut in range(1, len(data) - HEADER_PREFIX_BYTES - 4):
            with pytest.raises(PatchError, match="ends inside a field"):
                Header.unpack(sealed(data[: -4 - cut] + data[-4:]))


def test_a_damaged_header_is_refused() -> None:
    data = bytearray(HEADER.pack())
    data[-1] ^= 1
    with pytest.raises(PatchError, match="header is damaged"):
        Header.unpack(bytes(data))


def test_a_length_of_more_than_six_bytes_is_refused() -> None:
    data = HEADER.pack()
    for number, is_one in [(b"\xff" * 5 + b"\x00", True), (b"\xff" * 6 + b"\x00", False)]:
        changed = sealed(data[:15] + number + data[19:])  # in place of the base's length
        if is_one:
            assert Header.unpack(changed).base_length == (1 << 35) - 1
        else:
            with pytest.raises(PatchError, match="more than 6 bytes"):
                Header.unpack(changed)


def prefix(length: int, version: int = FORMAT_VERSION, magic: bytes = MAGIC) -> bytes:
    return magic + version.to_bytes(2, "little") + length.to_bytes(2, "little")


def test_the_length_of_a_header_lies_between_its_limits() -> None:
    for length in (HEADER_BYTES_MIN, HEADER_BYTES_MAX):
        assert header_length(prefix(length)) == length
    for length in (HEADER_BYTES_MIN - 1, HEADER_BYTES_MAX + 1):
        with pytest.raises(PatchError, match=f"wrong length of {length}"):
            header_length(prefix(length))


def test_another_format_is_named_with_what_to_do() -> None:
    for version, advice in [
        (FORMAT_VERSION + 1, "install a newer"),
        (FORMAT_VERSION - 1, "make the delta again"),
    ]:
        with pytest.raises(PatchError, match=f"format version {version}") as refused:
            header_length(prefix(100, version))
        assert advice in refused.value.hint
    for at in range(8):
        magic = bytearray(MAGIC)
        magic[at] ^= 0x20
        with pytest.raises(PatchError, match="not a delta file"):
            header_length(prefix(100, magic=bytes(magic)))


# --- records ----------------------------------------------------------------------------------------------------


def segment(codec: Codec, **changes: Any) -> SegmentHeader:
    """A segment that is right at `PLACE`."""
    has_window = codec in {Codec.COPY, Codec.BSDIFF, Codec.TENSOR, Codec.CONTEXT}
    has_result = codec not in {Codec.TABLES, Codec.NOTES}
    has_parameters = codec in {Codec.TENSOR, Codec.CONTEXT}
    usual: dict[str, Any] = {
        "parameter_length": 9 if has_parameters else 0,
        "result_length": 5000 if has_result else 0,
        "window_offset": 700 if has_window else 0,
        "window_length": 5000 if has_window else 0,
        "payload_length": {Codec.COPY: 0, Codec.RAW: 5000}.get(codec, 400),
        "digest": b"d" * SEGMENT_DIGEST_BYTES if codec in WITH_DIGEST else b"",
        "checksum": 0xCAFE,
    }
    return SegmentHeader(codec, **{**usual, **changes})


CODECS = [codec for codec in Codec if codec is not Codec.END]


@pytest.mark.parametrize("codec", CODECS)
def test_a_record_is_read_as_it_was_written_and_only_whole(codec: Codec) -> None:
    written = segment(codec)
    data = written.pack(PLACE)
    assert len(data) <= RECORD_BYTES_MAX
    assert unpack_record(data + b"more", PLACE) == (written, len(data))
    for length in range(len(data)):
        assert unpack_record(data[:length], PLACE) is None


def test_a_window_may_lie_on_both_sides_and_be_of_any_length() -> None:
    for offset, length in [(0, 5000), (999, 4999), (1000, 5001), (1001, 1), (1 << 40, 0), (0, 1 << 40)]:
        written = segment(Codec.BSDIFF, window_offset=offset, window_length=length)
        assert unpack_record(written.pack(PLACE), PLACE) == (written, len(written.pack(PLACE)))


def test_only_a_context_segment_goes_on_with_a_model() -> None:
    written = segment(Codec.CONTEXT, continues=True)
    assert unpack_record(written.pack(PLACE), PLACE) == (written, len(written.pack(PLACE)))
    for codec in set(CODECS) - {Codec.CONTEXT}:
        with pytest.raises(PatchError, match=f"unknown kind {0x80 | codec}"):
            unpack_record(segment(codec, continues=True).pack(PLACE), PLACE)


def test_the_end_record_says_only_where_it_stands() -> None:
    data = EndRecord().pack(PLACE)
    assert unpack_record(data, PLACE) == (EndRecord(), 5)
    assert unpack_record(data[:4], PLACE) is None


@pytest.mark.parametrize("field", ["header_crc", "patch_offset", "result_offset"])
def test_a_record_is_good_at_its_own_place_only(field: str) -> None:
    other = replace(PLACE, **{field: getattr(PLACE, field) + 1})
    for data in (segment(Codec.RAW).pack(PLACE), EndRecord().pack(PLACE)):
        with pytest.raises(PatchError, match=r"record at byte 30[01] of the delta file is damaged"):
            unpack_record(data, other)


@pytest.mark.parametrize(
    ("first", "second"), [(b"", b""), (b"abc", b""), (b"", b"x"), (b"abc", b"defgh" * 99)]
)
def test_checksums_of_neighbours_give_that_of_both(first: bytes, second: bytes) -> None:
    assert joined_checksum(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


# --- a segment against its header -------------------------------------------------------------------------------

AT = 6_000_000
_WITH_REACH = replace(HEADER, reach=Reach(1000, 0))


@pytest.mark.parametrize("codec", CODECS)
def test_a_usual_segment_is_taken(codec: Codec) -> None:
    check_segment(segment(codec), HEADER, AT)


ACCEPTED: list[tuple[Codec, dict[str, int], Header, int]] = [
    (Codec.SELF, {"result_length": 1, "payload_length": 1}, HEADER, AT),
    (Codec.SELF, {"result_length": SEGMENT_BYTES_MAX}, HEADER, AT),
    (Codec.SELF, {"result_length": 100}, replace(HEADER, segment_bytes_max=100), AT),
    (Codec.COPY, {"result_length": 9_000_000, "window_length": 9_000_000}, HEADER, AT),
    (Codec.SELF, {"result_length": 5000}, HEADER, HEADER.result_length - 5000),
    (Codec.SELF, {"payload_length": 5000 + PAYLOAD_SLACK_BYTES}, HEADER, AT),
    (Codec.BSDIFF, {"window_length": WINDOW_BYTES_MAX}, HEADER, AT),
    (Codec.BSDIFF, {"window_length": 0}, HEADER, AT),
    (Codec.BSDIFF, {"window_offset": 0}, HEADER, AT),
    (Codec.BSDIFF, {"window_offset": HEADER.base_length - 5000}, HEADER, AT),
    (Codec.BSDIFF, {"window_offset": AT - 1000, "window_length": 1}, _WITH_REACH, AT),
    (Codec.BSDIFF, {"window_offset": AT + 9, "window_length": 1}, _WITH_REACH, AT),
    (Codec.BSDIFF, {"window_offset": 0, "window_length": 0}, _WITH_REACH, AT),
    (Codec.BSDIFF, {"window_offset": 0, "window_length": 0}, replace(HEADER, reach=Reach(0, 0)), AT),
    (Codec.TENSOR, {"parameter_length": 1}, HEADER, AT),
    (Codec.CONTEXT, {"parameter_length": PARAMETER_BYTES_MAX}, HEADER, AT),
    (Codec.NOTES, {"payload_length": NOTES_BYTES_MAX}, HEADER, AT),
    (Codec.TABLES, {"payload_length": TABLES_BYTES_MAX}, HEADER, AT),
]


@pytest.mark.parametrize(("codec", "change", "header", "at"), ACCEPTED)
def test_a_segment_at_a_limit_is_taken(codec: Codec, change: dict[str, int], header: Header, at: int) -> None:
    check_segment(segment(codec, **change), header, at)


REFUSED: list[tuple[Codec, dict[str, int], Header, int, str]] = [
    (Codec.SELF, {"result_length": 0}, HEADER, AT, "segment has 0 bytes, limit"),
    (Codec.SELF, {"result_length": SEGMENT_BYTES_MAX + 1}, HEADER, AT, "bytes, limit"),
    (Codec.SELF, {"result_length": 101}, replace(HEADER, segment_bytes_max=100), AT, "bytes, limit 100"),
    (Codec.COPY, {"result_length": HEADER.result_length + 1}, HEADER, 0, "bytes, limit"),
    (Codec.SELF, {"result_length": 5001}, HEADER, HEADER.result_length - 5000, "past the end of the result"),
    (Codec.SELF, {"payload_length": 5001 + PAYLOAD_SLACK_BYTES}, HEADER, AT, "more than its result"),
    (Codec.BSDIFF, {"window_length": WINDOW_BYTES_MAX + 1}, HEADER, AT, "base window of 8388609 bytes"),
    (Codec.BSDIFF, {"window_length": -1}, HEADER, AT, "base window of -1 bytes"),
    (Codec.BSDIFF, {"window_offset": -1}, HEADER, AT, "leaves the base"),
    (Codec.BSDIFF, {"window_offset": HEADER.base_length - 4999}, HEADER, AT, "leaves the base"),
    (Codec.COPY, {"window_offset": HEADER.base_length - 4999}, HEADER, AT, "leaves the base"),
    (
        Codec.BSDIFF,
        {"window_offset": AT - 1001, "window_length": 1},
        _WITH_REACH,
        AT,
        "reaches 1001 bytes behind",
    ),
    (Codec.COPY, {"window_offset": AT - 1001}, _WITH_REACH, AT, "reaches 1001 bytes behind"),
    (Codec.TENSOR, {"parameter_length": 0}, HEADER, AT, "a tensor segment has no parameters"),
    (Codec.CONTEXT, {"parameter_length": 0}, HEADER, AT, "a context segment has no parameters"),
    (Codec.SELF, {"parameter_length": 1}, HEADER, AT, "a self segment has no parameters"),
    (Codec.CONTEXT, {"parameter_length": PARAMETER_BYTES_MAX + 1}, HEADER, AT, "65536 bytes of parameters"),
    (Codec.NOTES, {"payload_length": NOTES_BYTES_MAX + 1}, HEADER, AT, "a notes record has 262145 bytes"),
    (Codec.TABLES, {"payload_length": TABLES_BYTES_MAX + 1}, HEADER, AT, "a tables record has 65537 bytes"),
]


@pytest.mark.parametrize(("codec", "change", "header", "at", "message"), REFUSED)
def test_a_segment_beyond_a_limit_is_refused(
    codec: Codec, change: dict[str, int], header: Header, at: int, message: str
) -> None:
    with pytest.raises(PatchError, match=message):
        check_segment(segment(codec, **change), header, at)


# --- memory -----------------------------------------------------------------------------------------------------

_FIXED = 4 << 20


@pytest.mark.parametrize(
    ("codec", "factor"),
    [
        (Codec.COPY, 0),
        (Codec.RAW, 0),
        (Codec.SELF, 1),
        (Codec.BSDIFF, 4),
        (Codec.TENSOR, 2),
        (Codec.CONTEXT, 16),
    ],
)
def test_the_memory_of_a_segment_is_the_sum_of_the_specification(codec: Codec, factor: int) -> None:
    needed = segment_memory_bytes(codec, 1000, 70, 9)
    assert needed == _FIXED + 9 + 70 + 1000 + factor * 1000
    assert segment_memory_bytes(codec, 1000, 70, 9, factor * 1000 + 5) == needed + 5


@pytest.mark.parametrize(
    ("codec", "needed"),
    [
        (Codec.COPY, _FIXED + 3000 + 3000),
        (Codec.RAW, _FIXED + 5000 + 3000),
        (Codec.SELF, _FIXED + 400 + 3000 + 3000),
        (Codec.TENSOR, _FIXED + 400 + 9 + 5000 + 3000 + 6000),
    ],
)
def test_a_segment_takes_the_memory_that_was_declared_and_not_a_byte_more(codec: Codec, needed: int) -> None:
    header = replace(HEADER, segment_bytes_max=3000, decoder_memory_bytes=needed)
    check_memory(segment(codec), header)
    with pytest.raises(PatchLimitError, match=f"needs {needed} bytes of memory, {needed - 1} were declared"):
        check_memory(segment(codec), replace(header, decoder_memory_bytes=needed - 1))


def test_what_runs_need_beyond_the_usual_counts() -> None:
    header = replace(HEADER, decoder_memory_bytes=_FIXED + 409 + 5000 + 5000 + 10_001)
    check_memory(segment(Codec.TENSOR), header, 10_001)
    with pytest.raises(PatchLimitError):
        check_memory(segment(Codec.TENSOR), header, 10_002)
    with pytest.raises(PatchLimitError, match="of memory"):
        check_segment(segment(Codec.TENSOR), replace(header, decoder_memory_bytes=_FIXED), AT)
