"""The delta file's byte layout: header, segment headers, end record. SPEC section 6.

Only packing, unpacking and the checks that need nothing but the bytes themselves. All integers are little-endian. CRC-32
finds every damage of up to 32 bits in a row at once, before a decoder runs; it protects against nobody. What protects
is the signature over the whole file, the SHA-256 of the result, and the digest of each segment.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from protocol.constants import BLOB_BYTES_MAX
from protocol.errors import PatchError, PatchLimitError

# --- Specification constants ------------------------------------------------------------------------------------

MAGIC = b"\x89WBD\r\n\x1a\n"
"""As PNG does it: a file that went through a text conversion is recognised."""

FORMAT_VERSION = 1
CODEC_REVISION = 2
"""Raised when a codec of the ladder changes its meaning; a reader refuses a later one before the first segment."""

SEGMENT_BYTES_MAX = 4 << 20
"""Result of one segment: what a device redoes at most after a power cut."""

WINDOW_BYTES_MAX = 8 << 20
"""Base window of one segment."""

PARAMETER_BYTES_MAX = 65_535

PAYLOAD_SLACK_BYTES = 1024
"""A payload may be that much longer than its segment's result; a longer one would be sent raw."""

NOTES_BYTES_MAX = 256 << 10
NOTES_MAX = 16
"""Note records in one file, and bytes of one."""

SEGMENT_DIGEST_BYTES = 16
"""SHA-256 cut to 128 bits: no second preimage can be found, and the whole result is verified with all 256."""

_HEADER = struct.Struct("<8sHHBBHQQ32s32sQI")
HEADER_PREFIX_BYTES = 12
HEADER_BYTES = _HEADER.size + 4
HEADER_BYTES_MAX = 4096

_SEGMENT = struct.Struct("<BBHIIIQ16sI")
_END = struct.Struct("<BBHIQQ16sI")
RECORD_BYTES = _SEGMENT.size + 4
_REACH = struct.Struct("<II")  # extension of the header with FLAG_IN_PLACE
_CRC = struct.Struct("<I")
_OFFSET = struct.Struct("<Q")


class Codec(IntEnum):
    """The ladder. Numbers are never reused."""

    COPY = 0  # the base window as it is
    RAW = 1  # the payload as it is
    SELF = 2  # zstd, without a base
    BSDIFF = 3
    TENSOR = 4  # fields and residuals, compressed with zstd
    CONTEXT = 5  # fields under an adaptive model of how weights move
    TABLES = 6  # side information for the context segments that follow, no result
    NOTES = 7  # for people who inspect the file, no result
    END = 255


class Profile(IntEnum):
    """What the writer optimised for; the reader needs no knowledge of it."""

    FAST = 1
    SMALL = 2


FLAG_CONTINUES = 1
"""Segment flag: a context segment goes on with the model that the one before left behind."""

FLAG_IN_PLACE = 2
"""Header flag: made for application in place. Flag 1 is reserved for descending order; this version neither sets nor accepts it."""

REACH_BYTES_MAX = 8 << 20
"""How far behind its own result a segment of a file made for application in place may look: what a device keeps of the bytes that
it has overwritten. Enough for a header or a vocabulary that grew."""

WITHOUT_RESULT = frozenset({Codec.TABLES, Codec.NOTES})

TABLES_BYTES_MAX = 65_536
"""Content of one tables record, unpacked and packed."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far from their own place the segments of a file that was made for application in place look (SPEC 6.12).

    Attributes:
        behind_bytes: The most that a base window starts before the segment's result does.
        ahead_bytes: The most that a base window ends after the segment's result does, at most `REACH_BYTES_MAX`; what is further
            ahead counts as that. It becomes the `behind_bytes` of the inverse.
    """

    behind_bytes: int
    ahead_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a delta file promises.

    Attributes:
        profile: What it was optimised for.
        base_length: Length of the file it applies to, in bytes.
        base_sha256: Digest of that file; whoever applies the delta compares it with one measured now.
        result_length: Length of the file it gives.
        result_sha256: Digest of that file.
        decoder_memory_bytes: What a reader needs besides itself, by the rule of `segment_memory_bytes`.
        segment_bytes_max: No segment's result is longer.
        reach: Set for a file that can be applied in place.
    """

    profile: Profile
    base_length: int
    base_sha256: bytes
    result_length: int
    result_sha256: bytes
    decoder_memory_bytes: int
    segment_bytes_max: int
    reach: Reach | None = None

    def pack(self) -> bytes:
        """Return the header with its checksum."""
        extension = _REACH.pack(self.reach.behind_bytes, self.reach.ahead_bytes) if self.reach else b""
        body = _HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            HEADER_BYTES + len(extension),
            self.profile,
            FLAG_IN_PLACE if self.reach else 0,
            CODEC_REVISION,
            self.base_length,
            self.result_length,
            self.base_sha256,
            self.result_sha256,
            self.decoder_memory_bytes,
            self.segment_bytes_max,
        )
        body += extension
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Read a header of the length that `header_length` found.

        Raises:
            PatchError: It is damaged or of a later version.
            PatchLimitError: It announces more than the format allows.
        """
        if zlib.crc32(data[:-4]) != _CRC.unpack(data[-4:])[0]:
            raise PatchError("the delta file's header is damaged")
        fields = _HEADER.unpack_from(data)
        _, _, _, profile, flags, revision, base_length, result_length, base, result, memory, segment_bytes = (
            fields
        )
        if revision > CODEC_REVISION:
            raise PatchError(
                f"the delta file needs codec revision {revision}", hint="install a newer Whimbrel"
            )
        if flags & ~FLAG_IN_PLACE:
            raise PatchError(f"the delta file has unknown flags {flags:#x}", hint="install a newer Whimbrel")
        if profile not in set(Profile):
            raise PatchError(f"the delta file has the unknown profile {profile}")
        if max(base_length, result_length) > BLOB_BYTES_MAX:
            raise PatchLimitError(f"the delta file is for files of more than {BLOB_BYTES_MAX} bytes")
        if not 1 <= segment_bytes <= SEGMENT_BYTES_MAX:
            raise PatchLimitError(
                f"the delta file has segments of {segment_bytes} bytes, limit {SEGMENT_BYTES_MAX}"
            )
        reach = _read_reach(data[_HEADER.size : -4]) if flags & FLAG_IN_PLACE else None
        return cls(Profile(profile), base_length, base, result_length, result, memory, segment_bytes, reach)


def _read_reach(extension: bytes) -> Reach:
    if len(extension) < _REACH.size:
        raise PatchError("the delta file is for application in place and does not say how far it reaches")
    reach = Reach(*_REACH.unpack_from(extension))
    if max(reach.behind_bytes, reach.ahead_bytes) > REACH_BYTES_MAX:
        raise PatchLimitError(
            f"the delta file reaches {reach.behind_bytes} bytes behind its result, limit {REACH_BYTES_MAX}"
        )
    return reach


def header_length(prefix: bytes) -> int:
    """Return the header's length from its first `HEADER_PREFIX_BYTES` bytes.

    Raises:
        PatchError: This is no delta file, or one of another format version.
    """
    if prefix[:8] != MAGIC:
        raise PatchError(
            "not a delta file", hint="the first bytes are not those that `whimbrel delta make` writes"
        )
    version, length = struct.unpack_from("<HH", prefix, 8)
    if version != FORMAT_VERSION:
        raise PatchError(f"the delta file has format version {version}", hint="install a newer Whimbrel")
    if not HEADER_BYTES <= length <= HEADER_BYTES_MAX:
        raise PatchError(f"the delta file's header has a wrong length of {length}")
    return int(length)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """One segment: how to get its part of the result.

    Attributes:
        codec: A rung of the ladder.
        parameter_length: Bytes of codec parameters after the header.
        result_length: Bytes of result; 0 only for records without a result.
        window_offset: Where the base window starts.
        window_length: Bytes of base that the codec may look at.
        payload_length: Bytes after the parameters.
        digest: First half of the SHA-256 of the segment's result.
        body_crc: CRC-32 of parameters and payload.
        continues: The segment needs the model that the context segment before it left behind.
    """

    SIZE: ClassVar[int] = RECORD_BYTES

    codec: Codec
    parameter_length: int
    result_length: int
    window_offset: int
    window_length: int
    payload_length: int
    digest: bytes
    body_crc: int
    continues: bool = False

    @property
    def body_length(self) -> int:
        """Bytes that follow the header."""
        return self.parameter_length + self.payload_length

    def pack(self, position: "Position") -> bytes:
        """Return the record, bound to its place in this file."""
        body = _SEGMENT.pack(
            self.codec,
            FLAG_CONTINUES if self.continues else 0,
            self.parameter_length,
            self.result_length,
            self.window_length,
            self.payload_length,
            self.window_offset,
            self.digest,
            self.body_crc,
        )
        return body + _CRC.pack(zlib.crc32(body, position.seed()))


@dataclass(frozen=True, slots=True)
class EndRecord:
    """The last record: what must have been seen by then."""

    segments: int
    result_length: int
    patch_length: int
    digest: bytes

    def pack(self, position: "Position") -> bytes:
        """Return the record, bound to its place in this file."""
        body = _END.pack(
            Codec.END, 0, 0, self.segments, self.result_length, self.patch_length, self.digest, 0
        )
        return body + _CRC.pack(zlib.crc32(body, position.seed()))


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record stands; part of its checksum, so that none can be taken for another.

    Attributes:
        header_crc: Checksum of the file's header.
        patch_offset: Of the record's first byte.
        result_offset: Of the first byte that the record gives.
    """

    header_crc: int
    patch_offset: int
    result_offset: int

    def seed(self) -> int:
        """Return the value that the record's CRC-32 starts from."""
        return zlib.crc32(_OFFSET.pack(self.patch_offset) + _OFFSET.pack(self.result_offset), self.header_crc)


def unpack_record(data: bytes, position: Position) -> SegmentHeader | EndRecord:
    """Read the record at `position`.

    Raises:
        PatchError: It is damaged, or of a kind that this version does not know.
    """
    if zlib.crc32(data[:-4], position.seed()) != _CRC.unpack(data[-4:])[0]:
        raise PatchError(f"the record at byte {position.patch_offset} of the delta file is damaged")
    if data[1] & ~(FLAG_CONTINUES if data[0] == Codec.CONTEXT else 0):
        raise PatchError(f"a segment has unknown flags {data[1]:#x}", hint="install a newer Whimbrel")
    if data[0] == Codec.END:
        _, _, zero, segments, result_length, patch_length, digest, zeros = _END.unpack_from(data)
        if zero or zeros:
            raise PatchError("the end record has unknown fields")
        return EndRecord(segments, result_length, patch_length, digest)
    codec, flags, parameters, result_length, window_length, payload, window_offset, digest, crc = (
        _SEGMENT.unpack_from(data)
    )
    if codec not in set(Codec):
        raise PatchError(f"a segment has the unknown codec {codec}", hint="install a newer Whimbrel")
    return SegmentHeader(
        Codec(codec),
        parameters,
        result_length,
        window_offset,
        window_length,
        payload,
        digest,
        crc,
        bool(flags & FLAG_CONTINUES),
    )


def check_segment(segment: SegmentHeader, header: Header, result_offset: int) -> None:
    """Check a segment against the limits and against what the header announced, before its body is read.

    Raises:
        PatchError: Offsets or lengths leave their file, or contradict the codec.
        PatchLimitError: It is larger than the format or the header allows, or needs more memory.
    """
    if segment.codec in WITHOUT_RESULT:
        _check_without_result(segment)
        return
    if not 1 <= segment.result_length <= header.segment_bytes_max:
        raise PatchLimitError(
            f"a segment has {segment.result_length} bytes, limit {header.segment_bytes_max}"
        )
    if result_offset + segment.result_length > header.result_length:
        raise PatchError("a segment reaches past the end of the result")
    if segment.payload_length > segment.result_length + PAYLOAD_SLACK_BYTES:
        raise PatchLimitError(
            f"a segment has a payload of {segment.payload_length} bytes, more than its result"
        )
    if segment.window_length > WINDOW_BYTES_MAX:
        raise PatchLimitError(
            f"a segment has a base window of {segment.window_length} bytes, limit {WINDOW_BYTES_MAX}"
        )
    if segment.window_offset + segment.window_length > header.base_length:
        raise PatchError("a segment's base window reaches past the end of the base")
    behind = result_offset - segment.window_offset if segment.window_length else 0
    if header.reach is not None and behind > header.reach.behind_bytes:
        raise PatchError(
            f"a segment reaches {behind} bytes behind its result, {header.reach.behind_bytes} were declared"
        )
    _check_codec_lengths(segment)
    needed = segment_memory_bytes(
        segment.codec, segment.result_length, segment.window_length, segment.body_length
    )
    if needed > header.decoder_memory_bytes:
        raise PatchLimitError(
            f"a segment needs {needed} bytes of memory, {header.decoder_memory_bytes} were declared"
        )


def _check_without_result(segment: SegmentHeader) -> None:
    name = segment.codec.name.lower()
    limit = NOTES_BYTES_MAX if segment.codec is Codec.NOTES else TABLES_BYTES_MAX
    if segment.result_length or segment.window_length or segment.parameter_length:
        raise PatchError(f"a {name} record has a result")
    if segment.payload_length > limit:
        raise PatchLimitError(f"a {name} record has {segment.payload_length} bytes, limit {limit}")


def check_memory(segment: SegmentHeader, header: Header, working_bytes: int = 0) -> None:
    """Check what decoding a segment takes against what the header declared.

    Raises:
        PatchLimitError: It takes more.
    """
    needed = segment_memory_bytes(
        segment.codec, segment.result_length, segment.window_length, segment.body_length, working_bytes
    )
    if needed > header.decoder_memory_bytes:
        raise PatchLimitError(
            f"a segment needs {needed} bytes of memory, {header.decoder_memory_bytes} were declared"
        )


def _check_codec_lengths(segment: SegmentHeader) -> None:
    codec = segment.codec
    has_parameters = segment.parameter_length > 0
    if has_parameters != (codec in {Codec.TENSOR, Codec.CONTEXT}):
        raise PatchError(f"a {codec.name.lower()} segment has a wrong number of parameters")
    if codec is Codec.COPY and (segment.payload_length or segment.window_length != segment.result_length):
        raise PatchError("a copy segment has a payload or a window of another length")
    if codec in {Codec.RAW, Codec.SELF} and segment.window_length:
        raise PatchError(f"a {codec.name.lower()} segment has a base window")
    if codec is Codec.RAW and segment.payload_length != segment.result_length:
        raise PatchError("a raw segment has a payload of another length")


MEMORY_FIXED_BYTES = 4 << 20
"""Buffers of the reader and of zstd, temporaries that do not depend on a segment's size."""

# Bytes of working memory per byte of result, beside payload, base window and result. For tensor segments this is the
# least; their runs tell the rest (`tensor.working_bytes`).
_WORKING_FACTORS = {
    Codec.COPY: 0,
    Codec.RAW: 0,
    Codec.SELF: 1,
    Codec.BSDIFF: 4,
    Codec.TENSOR: 2,
    Codec.CONTEXT: 16,  # of the reference in Python; the library takes 2
}


def segment_memory_bytes(
    codec: Codec, result_length: int, window_length: int, body_length: int, working_bytes: int = 0
) -> int:
    """Return what decoding a segment may take (SPEC section 6.4): the rule by which a header declares memory."""
    working = max(working_bytes, _WORKING_FACTORS[codec] * result_length)
    return MEMORY_FIXED_BYTES + body_length + window_length + result_length + working
