"""Blobs cut into chunks, the tree of their digests, and the bitmap of what is there (SPEC section 5).

A blob is any byte string that devices fetch: a delta, a whole file, a release description, an index. Its chunks are
`CHUNK_BYTES` long, the last one shorter. Signed metadata carries the root of a tree of digests, so that every single
chunk is checked on arrival, whoever sent it:

- a blob of one chunk: the root is the digest of the blob itself, `levels` is 0;
- otherwise the digests of its chunks, concatenated, are the *index blob* of level 1, which is cut into chunks like any
  other; the root is the digest of the index blob that fits into one chunk, and `levels` says how many there are.

All chunks of all levels travel alike. The name of a blob is its digest; an index blob below the root is not signed
by itself, so its name is derived from the root (`index_name`).
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from protocol.constants import (
    BLOB_BYTES_MAX,
    CHUNK_BYTES,
    CHUNK_HEADER_BYTES,
    CHUNK_MESSAGE_BYTES_MAX,
    DIGEST_BYTES,
    INDEX_LEVELS_MAX,
    PROTOCOL_VERSION,
)
from protocol.errors import ChunkError
from protocol.ids import Digest, digest_of
from protocol.release import ChunkTree

_MAGIC: Final = b"WB"
_HEADER: Final = struct.Struct("<2sBBI32s")
assert _HEADER.size == CHUNK_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk as it came from the air; nothing about it is believed yet."""

    blob: Digest
    index: int
    payload: bytes


def encode_chunk(blob: Digest, index: int, payload: bytes) -> bytes:
    """Frame a chunk for one MQTT message."""
    assert 0 < len(payload) <= CHUNK_BYTES
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION, 0, index, bytes.fromhex(blob)) + payload


def decode_chunk(message: bytes) -> Chunk:
    """Take the frame off.

    Raises:
        ChunkError: Not a chunk of this protocol version.
    """
    if not CHUNK_HEADER_BYTES < len(message) <= CHUNK_MESSAGE_BYTES_MAX:
        raise ChunkError(f"chunk message of {len(message)} bytes")
    magic, version, flags, index, blob = _HEADER.unpack_from(message)
    if magic != _MAGIC or version != PROTOCOL_VERSION or flags != 0:
        raise ChunkError("chunk message with an unknown header")
    return Chunk(Digest(blob.hex()), index, message[CHUNK_HEADER_BYTES:])


def chunk_count(length: int) -> int:
    """How many chunks a blob of `length` bytes has; an empty blob has none."""
    return -(-length // CHUNK_BYTES)


def tree_levels(length: int) -> int:
    """How many index levels a blob of `length` bytes has."""
    levels = 0
    while chunk_count(length) > 1:
        length = chunk_count(length) * DIGEST_BYTES
        levels += 1
    return levels


def index_lengths(length: int) -> list[int]:
    """Lengths of the index blobs of levels 1, 2, … of a blob of `length` bytes."""
    lengths = []
    while chunk_count(length) > 1:
        length = chunk_count(length) * DIGEST_BYTES
        lengths.append(length)
    return lengths


def build_tree(chunk_digests: Iterable[bytes]) -> tuple[ChunkTree, list[bytes]]:
    """Digest tree over the chunks of a blob.

    Args:
        chunk_digests: SHA-256 of each chunk in order; for an empty blob, none.

    Returns:
        The tree and its index blobs, level 1 first.
    """
    digests = list(chunk_digests)
    if not digests:
        return ChunkTree(root=digest_of(b""), levels=0), []
    indexes: list[bytes] = []
    while len(digests) > 1:
        index = b"".join(digests)
        indexes.append(index)
        digests = [hashlib.sha256(part).digest() for part in _parts(index)]
    return ChunkTree(root=digests[0].hex(), levels=len(indexes)), indexes


def index_name(tree: ChunkTree, level: int) -> Digest:
    """Name of the index blob of `level` (1 is next to the data)."""
    assert 1 <= level <= tree.levels
    if level == tree.levels:
        return Digest(tree.root)
    return digest_of(bytes.fromhex(tree.root) + bytes([level]))


@dataclass(frozen=True, slots=True)
class BlobPlan:
    """A blob whose chunk digests are known: what can be fetched and checked."""

    name: Digest
    length: int
    chunk_digests: bytes  # concatenated SHA-256

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.chunk_digests) // DIGEST_BYTES

    def chunk_length(self, index: int) -> int:
        """Length of chunk `index`."""
        return min(CHUNK_BYTES, self.length - index * CHUNK_BYTES)

    def accepts(self, index: int, payload: bytes) -> bool:
        """Whether `payload` is chunk `index` of this blob, by length and digest."""
        if not 0 <= index < self.count or len(payload) != self.chunk_length(index):
            return False
        at = index * DIGEST_BYTES
        return hashlib.sha256(payload).digest() == self.chunk_digests[at : at + DIGEST_BYTES]


def root_plan(name: Digest, length: int, tree: ChunkTree) -> BlobPlan:
    """Plan of the first blob to fetch: the only one whose digest is signed directly.

    Args:
        name: Digest of the data blob.
        length: Length of the data blob.
        tree: Its signed digest tree.

    Raises:
        ChunkError: The signed figures contradict each other or pass a limit.
    """
    if not 0 <= length <= BLOB_BYTES_MAX:
        raise ChunkError(f"blob of {length} bytes, allowed are {BLOB_BYTES_MAX}")
    lengths = index_lengths(length)
    if tree.levels != len(lengths) or tree.levels > INDEX_LEVELS_MAX:
        raise ChunkError(f"digest tree of {tree.levels} levels for {length} bytes, {len(lengths)} expected")
    if tree.levels == 0:
        if tree.root != name:
            raise ChunkError("digest tree without levels whose root is not the blob's digest")
        return BlobPlan(name, length, bytes.fromhex(tree.root) if length else b"")
    return BlobPlan(index_name(tree, tree.levels), lengths[-1], bytes.fromhex(tree.root))


def child_plan(name: Digest, length: int, tree: ChunkTree, level: int, index: bytes) -> BlobPlan:
    """Plan of the blob below index level `level`, from the verified bytes of that index.

    Args:
        name: Digest of the data blob.
        length: Length of the data blob.
        tree: Its signed digest tree.
        level: Which index `index` is; 1 leads to the data.
        index: Verified bytes of the index blob.
    """
    assert 1 <= level <= tree.levels
    if level == 1:
        return BlobPlan(name, length, index)
    return BlobPlan(index_name(tree, level - 1), index_lengths(length)[level - 2], index)


class Bitmap:
    """Which chunks of a blob are there.

    Args:
        count: Number of chunks.
    """

    __slots__ = ("_bits", "count", "present")

    def __init__(self, count: int) -> None:
        self._bits = bytearray(-(-count // 8))
        self.count = count
        self.present = 0

    def __contains__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] & (0x80 >> (index & 7)))

    def add(self, index: int) -> None:
        """Note that chunk `index` is there."""
        if index not in self:
            self._bits[index >> 3] |= 0x80 >> (index & 7)
            self.present += 1

    def missing(self, first: int, end: int) -> Iterator[int]:
        """Chunks of `first` up to but not including `end` that are not there."""
        return (index for index in range(first, min(end, self.count)) if index not in self)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return self.present == self.count


def _parts(data: bytes) -> Iterator[bytes]:
    return (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))
