"""The delta file's byte layout: header, segment headers, end record. SPEC section 6.

Only packing, unpacking and the checks that need nothing but the bytes themselves. All integers are little-endian. CRC-32
finds damage before a decoder runs; it protects against nobody. What protects is the signature over the whole file, the
SHA-256 of the result, and the digest of each segment that is computed from the base.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from protocol.constants import BLOB_BYTES_MAX
from protocol.delta.varints import write_signed, write_varint
from protocol.errors import PatchError, PatchLimitError

# --- Specification constants ------------------------------------------------------------------------------------

MAGIC = b"\x89WBD\r\n\x1a\n"
"""As PNG does it: a file that went through a text conversion is recognised."""

FORMAT_VERSION = 2
CODEC_REVISION = 2
"""Raised when a codec of the ladder changes its meaning; a reader refuses a later one before the first segment."""

SEGMENT_BYTES_MAX = 4 << 20
"""Result of one segment, or of one piece of a copy: what a device redoes at most after a power cut."""

DEFAULT_SEGMENT_BYTES = 1 << 20
"""A compromise: shorter segments cost headers and statistics, longer ones memory on the device."""

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

_PREFIX = struct.Struct("<8sHH")
HEADER_PREFIX_BYTES = _PREFIX.size
HEADER_BYTES_MIN = HEADER_PREFIX_BYTES + 3 + 4 + 64 + 4
"""With lengths of one byte each, and without an extension."""

HEADER_BYTES_MAX = 4096
_KIND = struct.Struct("<BBB")  # profile, flags, codec revision
_DIGESTS = struct.Struct("<32s32s")

VARINT_BYTES_MAX = 6
"""Offsets and lengths are at most 2**40, differences of them twice that."""

_CRC = struct.Struct("<I")
_SEED = struct.Struct("<QQ")


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


FLAG_CONTINUES = 0x80
"""In a record's first byte: a context segment goes on with the model that the one before left behind."""

FLAG_IN_PLACE = 2
"""Header flag: made for application in place. Flag 1 is reserved for descending order; this version neither sets nor accepts it."""

REACH_BYTES_MAX = 8 << 20
"""How far behind its own result a segment of a file made for application in place may look: what a device keeps of the bytes that
it has overwritten. Enough for a header or a vocabulary that grew."""

WITHOUT_RESULT = frozenset({Codec.TABLES, Codec.NOTES})

_LENGTHS: dict[Codec, tuple[str, ...]] = {
    Codec.COPY: ("result_length", "window_offset"),
    Codec.RAW: ("result_length",),
    Codec.SELF: ("result_length", "payload_length"),
    Codec.BSDIFF: ("result_length", "payload_length", "window_offset", "window_length"),
    Codec.TENSOR: ("result_length", "payload_length", "window_offset", "window_length", "parameter_length"),
    Codec.CONTEXT: ("result_length", "payload_length", "window_offset", "window_length", "parameter_length"),
    Codec.TABLES: ("payload_length",),
    Codec.NOTES: ("payload_length",),
}
"""Which offsets and lengths the record of a codec holds, in order; what is missing is 0, or follows from the result's length."""

WITH_DIGEST = frozenset({Codec.BSDIFF, Codec.TENSOR, Codec.CONTEXT})
"""Codecs that compute with the base. The checksum of all others is one of their result, or of what alone decides it."""

RECORD_BYTES_MAX = 1 + 5 * VARINT_BYTES_MAX + SEGMENT_DIGEST_BYTES + 4 + 4

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
        body = bytearray(_KIND.pack(self.profile, FLAG_IN_PLACE if self.reach else 0, CODEC_REVISION))
        for length in (
            self.base_length,
            self.result_length,
            self.decoder_memory_bytes,
            self.segment_bytes_max,
        ):
            write_varint(length, body)
        body += _DIGESTS.pack(self.base_sha256, self.result_sha256)
        if self.reach:
            write_varint(self.reach.behind_bytes, body)
            write_varint(self.reach.ahead_bytes, body)
        packed = _PREFIX.pack(MAGIC, FORMAT_VERSION, HEADER_PREFIX_BYTES + len(body) + _CRC.size) + body
        return packed + _CRC.pack(zlib.crc32(packed))

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Read a header of the length that `header_length` found.

        Raises:
            PatchError: It is damaged or of a later version.
            PatchLimitError: It announces more than the format allows.
        """
        if zlib.crc32(data[:-4]) != _CRC.unpack(data[-4:])[0]:
            raise PatchError("the delta file's header is damaged")
        fields = _Fields(data[:-4], HEADER_PREFIX_BYTES)
        try:
            profile, flags, revision = _KIND.unpack(fields.take(_KIND.size))
            if revision > CODEC_REVISION:
                raise PatchError(
                    f"the delta file needs codec revision {revision}", hint="install a newer Whimbrel"
                )
            if flags & ~FLAG_IN_PLACE:
                raise PatchError(
                    f"the delta file has unknown flags {flags:#x}", hint="install a newer Whimbrel"
                )
            if profile not in set(Profile):
                raise PatchError(f"the delta file has the unknown profile {profile}")
            base_length, result_length, memory, segment_bytes = (fields.varint() for _ in range(4))
            base, result = _DIGESTS.unpack(fields.take(_DIGESTS.size))
            reach = Reach(fields.varint(), fields.varint()) if flags & FLAG_IN_PLACE else None
        except _CutError:
            raise PatchError("the delta file's header ends inside a field") from None
        if max(base_length, result_length) > BLOB_BYTES_MAX:
            raise PatchLimitError(f"the delta file is for files of more than {BLOB_BYTES_MAX} bytes")
        if not 1 <= segment_bytes <= SEGMENT_BYTES_MAX:
            raise PatchLimitError(
                f"the delta file has segments of {segment_bytes} bytes, limit {SEGMENT_BYTES_MAX}"
            )
        if reach and max(reach.behind_bytes, reach.ahead_bytes) > REACH_BYTES_MAX:
            raise PatchLimitError(
                f"the delta file reaches {reach.behind_bytes} bytes behind its result, limit {REACH_BYTES_MAX}"
            )
        return cls(Profile(profile), base_length, base, result_length, result, memory, segment_bytes, reach)


class _CutError(Exception):
    """A field goes on after the bytes that are there."""


class _Fields:
    """Reads the fields of a header or a record forward; a signed varint and a varint are those of SPEC section 6.

    Raises:
        _CutError: From every method: there are too few bytes.
    """

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self.position = position

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._data):
            raise _CutError
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def varint(self) -> int:
        value = 0
        for shift in range(0, 7 * VARINT_BYTES_MAX, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise PatchError(f"a number in the delta file has more than {VARINT_BYTES_MAX} bytes")

    def signed(self) -> int:
        value = self.varint()
        return -(value + 1 >> 1) if value & 1 else value >> 1


def header_length(prefix: bytes) -> int:
    """Return the header's length from its first `HEADER_PREFIX_BYTES` bytes.

    Raises:
        PatchError: This is no delta file, or one of another format version.
    """
    if prefix[:8] != MAGIC:
        raise PatchError(
            "not a delta file", hint="the first bytes are not those that `whimbrel delta make` writes"
        )
    _, version, length = _PREFIX.unpack_from(prefix)
    if version > FORMAT_VERSION:
        raise PatchError(f"the delta file has format version {version}", hint="install a newer Whimbrel")
    if version < FORMAT_VERSION:
        raise PatchError(f"the delta file has format version {version}", hint="make the delta again")
    if not HEADER_BYTES_MIN <= length <= HEADER_BYTES_MAX:
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
        digest: First half of the SHA-256 of the segment's result; empty for codecs that are not in `WITH_DIGEST`.
        checksum: CRC-32 of parameters and payload; of the result for a copy.
        continues: The segment needs the model that the context segment before it left behind.
    """

    codec: Codec
    parameter_length: int
    result_length: int
    window_offset: int
    window_length: int
    payload_length: int
    digest: bytes
    checksum: int
    continues: bool = False

    @property
    def body_length(self) -> int:
        """Bytes that follow the header."""
        return self.parameter_length + self.payload_length

    def pack(self, position: "Position") -> bytes:
        """Return the record, bound to its place in this file."""
        body = bytearray((self.codec | (FLAG_CONTINUES if self.continues else 0),))
        for name in _LENGTHS[self.codec]:
            if name == "window_offset":
                write_signed(self.window_offset - position.result_offset, body)
            elif name == "window_length":
                write_signed(self.window_length - self.result_length, body)
            else:
                write_varint(getattr(self, name), body)
        if self.codec in WITH_DIGEST:
            body += self.digest
        body += _CRC.pack(self.checksum)
        return bytes(body) + _CRC.pack(zlib.crc32(body, position.seed()))


@dataclass(frozen=True, slots=True)
class EndRecord:
    """The last record. That it stands where it stands says how long the file is, and its result."""

    def pack(self, position: "Position") -> bytes:
        """Return the record, bound to its place in this file."""
        body = bytes((Codec.END,))
        return body + _CRC.pack(zlib.crc32(body, position.seed()))


END_BYTES = 1 + _CRC.size


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
        return zlib.crc32(_SEED.pack(self.patch_offset, self.result_offset), self.header_crc)


def unpack_record(data: bytes, position: Position) -> tuple[SegmentHeader | EndRecord, int] | None:
    """Read the record at `position`.

    Args:
        data: Bytes from there on; `RECORD_BYTES_MAX` are always enough.
        position: Where it stands.

    Returns:
        The record and its length in bytes; None if it goes on after `data`.

    Raises:
        PatchError: It is damaged, or of a kind that this version does not know.
    """
    fields = _Fields(data, 0)
    try:
        record = _read_record(fields, position)
        end = fields.position
        (crc,) = _CRC.unpack(fields.take(_CRC.size))
    except _CutError:
        return None
    if zlib.crc32(data[:end], position.seed()) != crc:
        raise PatchError(f"the record at byte {position.patch_offset} of the delta file is damaged")
    return record, fields.position


def _read_record(fields: _Fields, position: Position) -> SegmentHeader | EndRecord:
    """Read a record up to its own checksum; whatever it says is not to be believed before that was compared."""
    tag = fields.take(1)[0]
    if tag == Codec.END:
        return EndRecord()
    number, continues = tag & ~FLAG_CONTINUES, bool(tag & FLAG_CONTINUES)
    if number not in _LENGTHS or (continues and number != Codec.CONTEXT):
        raise PatchError(
            f"the record at byte {position.patch_offset} of the delta file has the unknown kind {tag}",
            hint="it is damaged, or made for a newer Whimbrel",
        )
    codec = Codec(number)
    names = _LENGTHS[codec]
    found = {name: fields.signed() if name.startswith("window") else fields.varint() for name in names}
    result_length = found.get("result_length", 0)
    window_offset = found["window_offset"] + position.result_offset if "window_offset" in found else 0
    window_length = found["window_length"] + result_length if "window_length" in found else 0
    digest = fields.take(SEGMENT_DIGEST_BYTES) if codec in WITH_DIGEST else b""
    return SegmentHeader(
        codec,
        found.get("parameter_length", 0),
        result_length,
        window_offset,
        result_length if codec is Codec.COPY else window_length,
        result_length if codec is Codec.RAW else found.get("payload_length", 0),
        digest,
        _CRC.unpack(fields.take(_CRC.size))[0],
        continues,
    )


def joined_checksum(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of two stretches, one after the other, from theirs.

    CRC-32 is linear: what the first one left runs on over as many zeros, beside the second.
    """
    zeros = bytes(second_length)
    return zlib.crc32(zeros, first) ^ zlib.crc32(zeros) ^ second


def check_segment(segment: SegmentHeader, header: Header, result_offset: int) -> None:
    """Check a segment against the limits and against what the header announced, before its body is read.

    Raises:
        PatchError: Offsets or lengths leave their file, or contradict the codec.
        PatchLimitError: It is larger than the format or the header allows, or needs more memory.
    """
    if segment.codec in WITHOUT_RESULT:
        _check_without_result(segment)
        return
    is_copy = segment.codec is Codec.COPY
    longest = header.result_length if is_copy else header.segment_bytes_max
    if not 1 <= segment.result_length <= longest:
        raise PatchLimitError(f"a segment has {segment.result_length} bytes, limit {longest}")
    if result_offset + segment.result_length > header.result_length:
        raise PatchError("a segment reaches past the end of the result")
    if segment.payload_length > segment.result_length + PAYLOAD_SLACK_BYTES:
        raise PatchLimitError(
            f"a segment has a payload of {segment.payload_length} bytes, more than its result"
        )
    if not is_copy and not 0 <= segment.window_length <= WINDOW_BYTES_MAX:
        raise PatchLimitError(
            f"a segment has a base window of {segment.window_length} bytes, limit {WINDOW_BYTES_MAX}"
        )
    if segment.window_offset < 0 or segment.window_offset + segment.window_length > header.base_length:
        raise PatchError("a segment's base window leaves the base")
    behind = result_offset - segment.window_offset if segment.window_length else 0
    if header.reach is not None and behind > header.reach.behind_bytes:
        raise PatchError(
            f"a segment reaches {behind} bytes behind its result, {header.reach.behind_bytes} were declared"
        )
    if (segment.parameter_length > 0) != (segment.codec in {Codec.TENSOR, Codec.CONTEXT}):
        raise PatchError(f"a {segment.codec.name.lower()} segment has no parameters")
    if segment.parameter_length > PARAMETER_BYTES_MAX:
        raise PatchLimitError(
            f"a segment has {segment.parameter_length} bytes of parameters, limit {PARAMETER_BYTES_MAX}"
        )
    check_memory(segment, header)


def _check_without_result(segment: SegmentHeader) -> None:
    name = segment.codec.name.lower()
    limit = NOTES_BYTES_MAX if segment.codec is Codec.NOTES else TABLES_BYTES_MAX
    if segment.payload_length > limit:
        raise PatchLimitError(f"a {name} record has {segment.payload_length} bytes, limit {limit}")


def check_memory(segment: SegmentHeader, header: Header, working_bytes: int = 0) -> None:
    """Check what decoding a segment takes against what the header declared.

    Raises:
        PatchLimitError: It takes more.
    """
    # A copy is made piece by piece, each as long as a segment may be.
    piece = min(segment.result_length, header.segment_bytes_max)
    window = piece if segment.codec is Codec.COPY else segment.window_length
    needed = segment_memory_bytes(segment.codec, piece, window, segment.body_length, working_bytes)
    if needed > header.decoder_memory_bytes:
        raise PatchLimitError(
            f"a segment needs {needed} bytes of memory, {header.decoder_memory_bytes} were declared"
        )


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
