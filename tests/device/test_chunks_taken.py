"""Chunks from the air: taken if they are what was signed, at their place, once; everything else changes nothing but counts."""

import hashlib
import random

import pytest

from device.download import SYNC_CHUNKS, BlobDownload, Pacer, Tally
from device.effects import Effect, OpenBlob, ReadBlob, SyncBlob, WriteChunk
from device.transfer import Artifact, Requester, Transfer
from protocol.chunks import Bitmap, BlobPlan, Chunk, build_tree, index_name
from protocol.constants import CHUNK_BYTES, INDEX_FANOUT
from protocol.ids import DeviceId, FleetId, digest_of
from protocol.topics import Topics

PARTS = [bytes([number]) * CHUNK_BYTES for number in range(3)] + [b"end"]
CONTENT = b"".join(PARTS)
BLOB = digest_of(CONTENT)
DIGESTS = [hashlib.sha256(part).digest() for part in PARTS]
TREE, (INDEX,) = build_tree(DIGESTS)
PLAN = BlobPlan(BLOB, len(CONTENT), b"".join(DIGESTS))
OTHER = digest_of(b"other")


def requester() -> Requester:
    return Requester(Topics(FleetId("lab")), DeviceId("shelf-7"), random.Random(1), 2, 1 << 20, Pacer())


def download(plan: BlobPlan, tally: Tally) -> BlobDownload:
    topics, device, rng, groups_outstanding, link_bytes_per_s, pacer = requester()
    fetching = BlobDownload(
        plan,
        Bitmap(plan.count),
        topics,
        device,
        rng=rng,
        tally=tally,
        groups_outstanding=groups_outstanding,
        link_bytes_per_s=link_bytes_per_s,
        pacer=pacer,
    )
    list(fetching.resume(0))
    return fetching


def stored(effects: list[Effect]) -> list[Effect]:
    """What reaches the disk."""
    return [effect for effect in effects if isinstance(effect, WriteChunk | SyncBlob)]


def take(fetching: BlobDownload, index: int, payload: bytes, now_ms: int = 1) -> list[Effect]:
    return stored(list(fetching.receive(Chunk(BLOB, index, payload), now_ms)))


def test_a_chunk_that_was_signed_is_stored_once() -> None:
    tally = Tally()
    fetching = download(PLAN, tally)
    assert take(fetching, 1, PARTS[1]) == [WriteChunk(BLOB, 1, PARTS[1])]
    assert 1 in fetching.present
    assert take(fetching, 1, PARTS[1]) == []
    assert (tally.received_chunks, tally.received_bytes) == (2, 2 * CHUNK_BYTES)
    assert (tally.redundant_chunks, tally.invalid_chunks) == (1, 0)


@pytest.mark.parametrize(
    ("index", "payload"),
    [(0, PARTS[1]), (1, PARTS[0]), (3, PARTS[0]), (3, b"End"), (3, b"end."), (3, b""), (4, PARTS[0])],
)
def test_a_chunk_that_was_not_signed_is_counted_and_dropped(index: int, payload: bytes) -> None:
    tally = Tally()
    fetching = download(PLAN, tally)
    assert take(fetching, index, payload) == []
    assert fetching.present.present == 0
    assert (tally.received_chunks, tally.received_bytes, tally.invalid_chunks) == (1, len(payload), 1)
    assert take(fetching, 0, PARTS[0]) == [WriteChunk(BLOB, 0, PARTS[0])]


def test_the_last_chunk_makes_all_of_them_durable() -> None:
    fetching = download(PLAN, Tally())
    for index in (3, 0, 2):
        assert take(fetching, index, PARTS[index]) == [WriteChunk(BLOB, index, PARTS[index])]
    assert take(fetching, 1, PARTS[1]) == [WriteChunk(BLOB, 1, PARTS[1]), SyncBlob(BLOB)]
    assert fetching.is_complete


def test_chunks_are_made_durable_in_between() -> None:
    count = 2 * SYNC_CHUNKS + 2
    zeros = bytes(CHUNK_BYTES)
    plan = BlobPlan(BLOB, count * CHUNK_BYTES, hashlib.sha256(zeros).digest() * count)
    fetching = download(plan, Tally())
    synced = [index for index in range(count) if SyncBlob(BLOB) in take(fetching, index, zeros)]
    assert synced == [SYNC_CHUNKS - 1, 2 * SYNC_CHUNKS - 1, count - 1]


def test_what_arrives_ends_the_wait_and_moves_the_deadline() -> None:
    tally = Tally()
    fetching = download(PLAN, tally)
    before = fetching.deadline_ms
    assert before is not None
    tally.is_waiting, tally.barren = True, 3
    take(fetching, 0, PARTS[1], now_ms=500)
    assert (tally.is_waiting, tally.barren) == (False, 0)
    assert fetching.deadline_ms == before, "what was not signed is no progress"
    take(fetching, 0, PARTS[0], now_ms=before - 1)
    assert fetching.deadline_ms > before


# --- a transfer -------------------------------------------------------------------------------------------------


def transfer(*artifacts: Artifact, read_last: bool = False) -> Transfer:
    serials = iter(range(100))
    return Transfer(list(artifacts), requester(), Tally(), lambda: next(serials), read_last=read_last)


ARTIFACT = Artifact(BLOB, len(CONTENT), TREE)
SMALL = Artifact(digest_of(b"small"), 5, build_tree([hashlib.sha256(b"small").digest()])[0])


def opened(fetching: Transfer, name: str, count: int) -> None:
    """Storage is ready for the blob that was asked for last."""
    assert fetching._plan is not None
    assert fetching._plan.name == name
    list(fetching.opened(Bitmap(count), 0, connected=True))


def test_the_index_is_fetched_first_and_leads_to_the_data() -> None:
    fetching = transfer(ARTIFACT)
    (effect,) = fetching.resume(0)
    assert isinstance(effect, OpenBlob)
    assert (effect.plan.name, effect.plan.length) == (TREE.root, len(INDEX))
    opened(fetching, TREE.root, 1)
    effects = list(fetching.receive(Chunk(digest_of(INDEX), 0, INDEX), 1))
    assert ReadBlob(1, digest_of(INDEX), len(INDEX)) in effects
    (effect,) = fetching.read(INDEX)
    assert isinstance(effect, OpenBlob)
    assert effect.plan == PLAN
    opened(fetching, BLOB, 4)
    for index, part in enumerate(PARTS):
        assert not fetching.is_finished
        list(fetching.receive(Chunk(BLOB, index, part), 2))
    assert fetching.is_finished
    assert fetching.content is None


def test_chunks_of_other_blobs_and_late_ones_change_nothing() -> None:
    fetching = transfer(ARTIFACT)
    chunk = Chunk(digest_of(INDEX), 0, INDEX)
    assert list(fetching.receive(chunk, 0)) == [], "nothing was asked for yet"
    list(fetching.resume(0))
    assert list(fetching.receive(chunk, 0)) == [], "there is no room for it yet"
    opened(fetching, TREE.root, 1)
    assert list(fetching.receive(Chunk(OTHER, 0, INDEX), 0)) == []
    assert list(fetching.receive(Chunk(digest_of(INDEX), 0, INDEX[:-1] + b"x"), 0)) == []
    assert stored(list(fetching.receive(chunk, 0)))
    assert list(fetching.receive(chunk, 0)) == [], "it is complete, and being read"


def test_the_content_of_the_last_artifact_is_given_out_when_it_is_wanted() -> None:
    fetching = transfer(SMALL, read_last=True)
    list(fetching.resume(0))
    opened(fetching, SMALL.name, 1)
    effects = list(fetching.receive(Chunk(SMALL.name, 0, b"small"), 0))
    assert ReadBlob(1, SMALL.name, 5) in effects
    assert not fetching.is_finished
    assert list(fetching.resume(1)) == [], "it waits for the disk"
    assert list(fetching.read(b"small")) == []
    assert (fetching.is_finished, fetching.content) == (True, b"small")


def test_an_artifact_of_three_levels_is_descended_step_by_step() -> None:
    digests = [hashlib.sha256(bytes([number % 7])).digest() for number in range(INDEX_FANOUT + 1)]
    tree, (lower, upper) = build_tree(digests)
    length = INDEX_FANOUT * CHUNK_BYTES + 1
    fetching = transfer(Artifact(BLOB, length, tree))
    list(fetching.resume(0))
    opened(fetching, tree.root, 1)
    list(fetching.receive(Chunk(digest_of(upper), 0, upper), 0))
    (effect,) = fetching.read(upper)
    assert isinstance(effect, OpenBlob)
    assert (effect.plan.name, effect.plan.length) == (index_name(tree, 1), len(lower))
    (effect,) = fetching.read(lower)
    assert isinstance(effect, OpenBlob)
    assert (effect.plan.name, effect.plan.length, effect.plan.count) == (BLOB, length, INDEX_FANOUT + 1)


def test_an_artifact_is_known_by_the_names_of_its_data_and_of_every_index() -> None:
    assert SMALL.blobs == {SMALL.name}
    assert ARTIFACT.blobs == {BLOB, TREE.root}
    tree, _ = build_tree(hashlib.sha256(bytes([number % 7])).digest() for number in range(INDEX_FANOUT + 1))
    blobs = Artifact(BLOB, INDEX_FANOUT * CHUNK_BYTES + 1, tree).blobs
    assert blobs == {BLOB, tree.root, index_name(tree, 1)}
