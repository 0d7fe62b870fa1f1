"""How long a download waits before it asks for what does not come."""

import hashlib
import random

import pytest

from device.download import (
    PATIENCE_CHUNKS,
    PATIENCE_FIRST_MS,
    PATIENCE_MAX_MS,
    PATIENCE_MIN_MS,
    BlobDownload,
    Tally,
)
from device.effects import Publish, Subscribe
from protocol.chunks import Bitmap, Chunk, build_tree, child_plan
from protocol.constants import CHUNK_BYTES
from protocol.delta_graph import LINK_BYTES_PER_S
from protocol.ids import DeviceId, FleetId, digest_of
from protocol.topics import Topics

CONTENT = random.Random(1).randbytes(3 * CHUNK_BYTES)
PARTS = [CONTENT[at : at + CHUNK_BYTES] for at in range(0, len(CONTENT), CHUNK_BYTES)]
NAME = digest_of(CONTENT)


def download(link_bytes_per_s: int = LINK_BYTES_PER_S) -> BlobDownload:
    tree, (index,) = build_tree(hashlib.sha256(part).digest() for part in PARTS)
    plan = child_plan(NAME, len(CONTENT), tree, 1, index)
    return BlobDownload(
        plan,
        Bitmap(plan.count),
        Topics(FleetId("lab")),
        DeviceId("shelf-7"),
        rng=random.Random(1),
        tally=Tally(),
        groups_outstanding=2,
        link_bytes_per_s=link_bytes_per_s,
    )


def resume(fetching: BlobDownload, now_ms: int) -> int:
    """Connect; how long it waits from now on."""
    (effect,) = fetching.resume(now_ms)
    assert isinstance(effect, Subscribe)
    assert fetching.deadline_ms is not None
    return fetching.deadline_ms - now_ms


def receive(fetching: BlobDownload, index: int, now_ms: int) -> None:
    list(fetching.receive(Chunk(NAME, index, PARTS[index]), now_ms))


def test_the_first_patience_is_ten_seconds_on_a_link_that_carries_a_chunk_in_less() -> None:
    assert resume(download(), 0) == PATIENCE_FIRST_MS


@pytest.mark.parametrize("link_bytes_per_s", [500, 1_000, 4_000])
def test_nothing_is_asked_for_while_a_slow_link_still_carries_it(link_bytes_per_s: int) -> None:
    chunk_ms = CHUNK_BYTES * 1000 // link_bytes_per_s
    fetching = download(link_bytes_per_s)
    assert resume(fetching, 0) >= PATIENCE_CHUNKS * chunk_ms
    for index in range(2):
        now_ms = (index + 1) * chunk_ms
        receive(fetching, index, now_ms)
        assert fetching.deadline_ms is not None
        assert fetching.deadline_ms - now_ms >= PATIENCE_CHUNKS * chunk_ms


def test_a_link_that_is_never_up_for_long_gets_to_ask_in_the_end() -> None:
    fetching = download()
    waits = []
    for now_ms in range(0, 60_000, 10_000):
        waits.append(resume(fetching, now_ms))
        fetching.pause()
    assert waits == [PATIENCE_FIRST_MS, *[PATIENCE_MIN_MS] * 5]


def test_a_connection_on_which_something_came_is_not_held_against_the_link() -> None:
    fetching = download()
    assert resume(fetching, 0) == PATIENCE_FIRST_MS
    fetching.pause()
    assert resume(fetching, 20_000) == PATIENCE_FIRST_MS // 2
    receive(fetching, 0, 21_000)
    fetching.pause()
    effects = list(fetching.resume(40_000))
    assert [type(effect) for effect in effects] == [Subscribe]
    assert fetching.deadline_ms == 40_000 + PATIENCE_FIRST_MS


def test_a_new_connection_gets_the_first_patience_however_fast_the_one_before_was() -> None:
    fetching = download()
    resume(fetching, 0)
    for index in range(2):
        receive(fetching, index, 100 * (index + 1))
    assert fetching.deadline_ms == 200 + PATIENCE_MIN_MS
    fetching.pause()
    assert resume(fetching, 1_000) == PATIENCE_FIRST_MS


def test_it_asks_for_what_is_missing_and_then_waits_longer_up_to_a_limit() -> None:
    fetching = download()
    resume(fetching, 0)
    receive(fetching, 1, 100)
    now_ms = 100
    for _ in range(12):
        asked = [effect for effect in fetching.timeout(now_ms) if isinstance(effect, Publish)]
        assert len(asked) == 1
        assert fetching.deadline_ms is not None
        assert fetching.deadline_ms - now_ms <= PATIENCE_MAX_MS
        now_ms = fetching.deadline_ms
