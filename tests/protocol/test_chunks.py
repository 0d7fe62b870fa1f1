import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chunks import (
    Bitmap,
    BlobPlan,
    build_tree,
    child_plan,
    chunk_count,
    decode_chunk,
    encode_chunk,
    index_lengths,
    index_name,
    root_plan,
    tree_levels,
)
from protocol.constants import CHUNK_BYTES, CHUNK_HEADER_BYTES, CHUNK_MESSAGE_BYTES_MAX, INDEX_FANOUT
from protocol.errors import ChunkError
from protocol.ids import Digest, digest_of
from protocol.release import ChunkTree


def parts(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


def walk(data: bytes) -> tuple[BlobPlan, ChunkTree]:
    """Descend the tree of `data` as a device does, checking every chunk on the way."""
    tree, indexes = build_tree(hashlib.sha256(part).digest() for part in parts(data))
    plan = root_plan(digest_of(data), len(data), tree)
    for level in range(tree.levels, 0, -1):
        index = indexes[level - 1]
        assert plan.name == index_name(tree, level)
        assert plan.length == len(index)
        assert all(plan.accepts(number, part) for number, part in enumerate(parts(index)))
        plan = child_plan(digest_of(data), len(data), tree, level, index)
    return plan, tree


@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 9 * CHUNK_BYTES - 1])
def test_every_chunk_of_a_blob_is_reached_and_accepted_from_its_root(length: int) -> None:
    data = random.Random(length).randbytes(length)
    plan, tree = walk(data)
    assert plan.name == digest_of(data)
    assert plan.count == chunk_count(length)
    assert tree.levels == tree_levels(length)
    assert all(plan.accepts(number, part) for number, part in enumerate(parts(data)))
    assert not plan.accepts(plan.count, b"x")
    assert not plan.accepts(-1, b"x")


def test_a_large_blob_has_two_levels_of_index() -> None:
    count = INDEX_FANOUT + 300
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(count)]
    tree, indexes = build_tree(digests)
    length = (count - 1) * CHUNK_BYTES + 1
    assert tree.levels == 2
    assert [len(index) for index in indexes] == index_lengths(length)
    name = digest_of(b"large")
    top = root_plan(name, length, tree)
    assert top.accepts(0, indexes[1])
    middle = child_plan(name, length, tree, 2, indexes[1])
    assert all(middle.accepts(number, part) for number, part in enumerate(parts(indexes[0])))
    data = child_plan(name, length, tree, 1, indexes[0])
    assert data.chunk_digests == b"".join(digests)
    assert len({top.name, middle.name, data.name}) == 3


@settings(max_examples=60)
@given(st.data())
def test_flipping_any_byte_of_a_chunk_message_makes_it_another_chunk_or_none(data: st.DataObject) -> None:
    """Whatever is flipped, a device never takes other bytes for a chunk than those that were signed."""
    blob = random.Random(5).randbytes(3 * CHUNK_BYTES + 500)
    plan, _ = walk(blob)
    number = data.draw(st.integers(0, 3))
    payload = parts(blob)[number]
    message = bytearray(encode_chunk(plan.name, number, payload))
    at = data.draw(st.integers(0, len(message) - 1) | st.integers(0, CHUNK_HEADER_BYTES - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    try:
        chunk = decode_chunk(bytes(message))
    except ChunkError:
        return
    assert chunk.blob != plan.name or not plan.accepts(chunk.index, chunk.payload)


@pytest.mark.parametrize("length", [0, 1, CHUNK_HEADER_BYTES, CHUNK_MESSAGE_BYTES_MAX + 1])
def test_a_chunk_message_of_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ChunkError):
        decode_chunk(b"WB\x01\x00" + b"\0" * (length - 4) if length > 4 else b"W" * length)


@pytest.mark.parametrize(
    ("name", "length", "tree"),
    [
        (digest_of(b"a"), 1, ChunkTree(root=digest_of(b"b"), levels=0)),
        (digest_of(b"a"), CHUNK_BYTES + 1, ChunkTree(root=digest_of(b"a"), levels=0)),
        (digest_of(b"a"), 1, ChunkTree(root=digest_of(b"a"), levels=1)),
        (digest_of(b"a"), (1 << 40) + 1, ChunkTree(root=digest_of(b"a"), levels=2)),
        (digest_of(b"a"), -1, ChunkTree(root=digest_of(b"a"), levels=0)),
    ],
)
def test_a_tree_that_contradicts_its_blob_is_refused(name: Digest, length: int, tree: ChunkTree) -> None:
    with pytest.raises(ChunkError):
        root_plan(name, length, tree)


@given(st.integers(1, 300), st.sets(st.integers(0, 299)))
def test_a_bitmap_knows_what_is_missing(count: int, added: set[int]) -> None:
    bitmap = Bitmap(count)
    added = {index for index in added if index < count}
    for index in sorted(added) * 2:
        bitmap.add(index)
    assert bitmap.present == len(added)
    assert set(bitmap.missing(0, count + 8)) == set(range(count)) - added
    assert bitmap.is_complete == (len(added) == count)
