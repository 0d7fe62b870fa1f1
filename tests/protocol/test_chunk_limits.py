"""Edges of chunks and their trees: what is just allowed, what just not, and signed figures that contradict each other."""

import hashlib

import pytest

from protocol.chunks import (
    Bitmap,
    BlobPlan,
    Chunk,
    build_tree,
    decode_chunk,
    encode_chunk,
    index_name,
    root_plan,
    tree_levels,
)
from protocol.constants import (
    BLOB_BYTES_MAX,
    CHUNK_BYTES,
    CHUNK_HEADER_BYTES,
    CHUNK_MESSAGE_BYTES_MAX,
    DIGEST_BYTES,
    INDEX_FANOUT,
)
from protocol.errors import ChunkError
from protocol.ids import digest_of
from protocol.release import ChunkTree

BLOB = digest_of(b"blob")


@pytest.mark.parametrize("length", [1, 500, CHUNK_BYTES])
def test_a_chunk_is_read_as_it_was_framed_up_to_the_longest(length: int) -> None:
    payload = bytes(range(250)) * (length // 250) + b"x" * (length % 250)
    message = encode_chunk(BLOB, 7, payload)
    assert len(message) == CHUNK_HEADER_BYTES + length <= CHUNK_MESSAGE_BYTES_MAX
    assert decode_chunk(message) == Chunk(BLOB, 7, payload)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, ord("w")), (1, ord("b")), (2, 2), (3, 1)],
    ids=["magic", "magic", "version", "flags"],
)
def test_a_chunk_of_another_protocol_is_refused(at: int, value: int) -> None:
    message = bytearray(encode_chunk(BLOB, 0, b"payload"))
    message[at] = value
    with pytest.raises(ChunkError, match="unknown header"):
        decode_chunk(bytes(message))


@pytest.mark.parametrize(
    "length", [0, CHUNK_HEADER_BYTES - 1, CHUNK_HEADER_BYTES, CHUNK_MESSAGE_BYTES_MAX + 1]
)
def test_a_message_that_is_too_short_or_too_long_says_its_length(length: int) -> None:
    message = encode_chunk(BLOB, 0, b"x").ljust(length, b"\0")[:length]
    with pytest.raises(ChunkError, match=f"of {length} bytes"):
        decode_chunk(message)


def test_a_chunk_is_accepted_at_its_own_place_only() -> None:
    parts = [bytes([number]) * CHUNK_BYTES for number in range(3)] + [b"end"]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    plan = BlobPlan(BLOB, 3 * CHUNK_BYTES + 3, digests)
    for number, part in enumerate(parts):
        accepting = [index for index in range(-6, 7) if plan.accepts(index, part)]
        assert accepting == [number]


def test_a_chunk_that_has_its_digest_but_not_its_length_is_refused() -> None:
    """The signer's length and the signer's digests contradict each other: the file would not be as long as it was signed."""
    digest = hashlib.sha256(b"six by").digest()
    for length, is_right in [(5, False), (6, True), (7, False)]:
        assert BlobPlan(BLOB, length, digest).accepts(0, b"six by") is is_right


@pytest.mark.parametrize(
    ("length", "levels"),
    [
        (0, 0),
        (CHUNK_BYTES, 0),
        (CHUNK_BYTES + 1, 1),
        (CHUNK_BYTES * INDEX_FANOUT, 1),
        (CHUNK_BYTES * INDEX_FANOUT + 1, 2),
        (CHUNK_BYTES * (INDEX_FANOUT * CHUNK_BYTES // DIGEST_BYTES), 2),
        (CHUNK_BYTES * (INDEX_FANOUT * CHUNK_BYTES // DIGEST_BYTES) + 1, 3),
    ],
)
def test_a_level_more_is_needed_once_an_index_no_longer_fits_into_a_chunk(length: int, levels: int) -> None:
    assert tree_levels(length) == levels
    assert root_plan(BLOB, length, ChunkTree(root=BLOB, levels=levels)).chunk_digests == (
        bytes.fromhex(BLOB) if length else b""
    )
    for wrong in {0, 1, 2, 3, 4} - {levels}:
        with pytest.raises(ChunkError, match=f"{wrong} levels"):
            root_plan(BLOB, length, ChunkTree(root=BLOB, levels=wrong))


def test_the_first_blob_that_is_asked_for_is_the_one_whose_digest_was_signed() -> None:
    tree, indexes = build_tree(hashlib.sha256(bytes([n % 256])).digest() for n in range(INDEX_FANOUT + 1))
    assert index_name(tree, 2) == tree.root == digest_of(indexes[1])
    assert index_name(tree, 1) not in {tree.root, digest_of(indexes[0])}
    length = INDEX_FANOUT * CHUNK_BYTES + 1
    assert root_plan(BLOB, length, tree).name == tree.root


def test_a_blob_of_exactly_the_largest_size_can_be_named_and_no_larger_one() -> None:
    tree = ChunkTree(root=digest_of(b"root"), levels=3)
    assert root_plan(BLOB, BLOB_BYTES_MAX, tree).name == tree.root
    for length in (BLOB_BYTES_MAX + 1, -1):
        with pytest.raises(ChunkError, match="allowed are"):
            root_plan(BLOB, length, tree)


def test_a_bitmap_takes_one_bit_for_each_chunk() -> None:
    for count, length in [(0, 0), (1, 1), (8, 1), (9, 2), (1 << 24, 1 << 21)]:
        assert len(Bitmap(count)._bits) == length
