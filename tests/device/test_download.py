"""How long a download waits before it asks for what does not come."""

import hashlib
import random
from collections.abc import Iterable

import pytest

from device.download import (
    PATIENCE_BARREN_MS,
    PATIENCE_CHUNKS,
    PATIENCE_FIRST_MS,
    PATIENCE_MAX_MS,
    PATIENCE_MIN_MS,
    BlobDownload,
    Pacer,
    Tally,
)
from device.effects import Effect, Publish, Subscribe
from protocol.chunks import Bitmap, Chunk, build_tree, child_plan
from protocol.constants import CHUNK_BYTES, GROUP_CHUNKS
from protocol.delta_graph import LINK_BYTES_PER_S
from protocol.ids import DeviceId, FleetId, digest_of
from protocol.topics import Topics

CONTENT = random.Random(1).randbytes(3 * CHUNK_BYTES)
PARTS = [CONTENT[at : at + CHUNK_BYTES] for at in range(0, len(CONTENT), CHUNK_BYTES)]
NAME = digest_of(CONTENT)


LEAST_MS = max(PATIENCE_BARREN_MS, CHUNK_BYTES * 1000 // LINK_BYTES_PER_S)


def download(link_bytes_per_s: int = LINK_BYTES_PER_S, tally: Tally | None = None) -> BlobDownload:
    tree, (index,) = build_tree(hashlib.sha256(part).digest() for part in PARTS)
    plan = child_plan(NAME, len(CONTENT), tree, 1, index)
    return BlobDownload(
        plan,
        Bitmap(plan.count),
        Topics(FleetId("lab")),
        DeviceId("shelf-7"),
        rng=random.Random(1),
        tally=tally or Tally(),
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
    assert waits == [10_000, 5_000, 2_500, 1_250, LEAST_MS, LEAST_MS]


def test_an_update_that_starts_with_the_same_blob_on_every_connection_gets_to_ask_too() -> None:
    tally = Tally()
    waits = []
    for now_ms in range(0, 60_000, 10_000):
        fetching = download(tally=tally)
        waits.append(resume(fetching, now_ms))
        fetching.pause()
    assert waits == [10_000, 5_000, 2_500, 1_250, LEAST_MS, LEAST_MS]


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


# --- a limit on bandwidth ----------------------------------------------------------------------------------

RATE = 64_000
GROUP_MS = GROUP_CHUNKS * CHUNK_BYTES * 1000 // RATE
LONG_PARTS = [random.Random(number).randbytes(CHUNK_BYTES) for number in range(4 * GROUP_CHUNKS)]
LONG_NAME = digest_of(b"".join(LONG_PARTS))


class Link:
    """A broker that sends what is subscribed to, a chunk every `chunk_ms`, to a download under a limit."""

    def __init__(self, pacer: Pacer, chunk_ms: int = 10, *, is_deaf: bool = False) -> None:
        tree, (index,) = build_tree(hashlib.sha256(part).digest() for part in LONG_PARTS)
        plan = child_plan(LONG_NAME, len(LONG_PARTS) * CHUNK_BYTES, tree, 1, index)
        self.fetching = BlobDownload(
            plan,
            Bitmap(plan.count),
            Topics(FleetId("lab")),
            DeviceId("shelf-7"),
            rng=random.Random(1),
            tally=Tally(),
            groups_outstanding=2,
            link_bytes_per_s=LINK_BYTES_PER_S,
            pacer=pacer,
        )
        self.now_ms = 0
        self.chunk_ms = chunk_ms
        self.is_deaf = is_deaf
        self.asked_ms: list[int] = []  # when each group was subscribed to
        self.requests_ms: list[int] = []
        self._sending: list[int] = []

    def order(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Subscribe):
                self.asked_ms.append(self.now_ms)
                first = int(effect.filters[0].split(".")[-1].split("/")[0]) * GROUP_CHUNKS
                self._sending += [] if self.is_deaf else range(first, first + GROUP_CHUNKS)
            elif isinstance(effect, Publish):
                self.requests_ms.append(self.now_ms)

    def run(self, until_ms: int = 1 << 40) -> None:
        while not self.fetching.is_complete:
            assert self.fetching.deadline_ms is not None
            next_ms = self.now_ms + self.chunk_ms if self._sending else self.fetching.deadline_ms
            if next_ms > until_ms:
                return
            self.now_ms = max(self.now_ms, next_ms)
            if self._sending:
                index = self._sending.pop(0)
                self.order(self.fetching.receive(Chunk(LONG_NAME, index, LONG_PARTS[index]), self.now_ms))
            else:
                self.order(self.fetching.timeout(self.now_ms))


def test_groups_are_asked_for_no_faster_than_the_limit_and_nobody_takes_the_pause_for_a_stall() -> None:
    link = Link(Pacer(RATE))
    link.order(link.fetching.resume(0))
    link.run()
    assert link.asked_ms == [0, GROUP_MS, 2 * GROUP_MS, 3 * GROUP_MS]
    assert link.requests_ms == []


def test_a_limit_above_what_the_link_carries_changes_nothing_and_is_not_saved_up() -> None:
    free, limited = Link(Pacer(), chunk_ms=1000), Link(Pacer(RATE * 10), chunk_ms=1000)
    for link in (free, limited):
        link.order(link.fetching.resume(0))
        link.run()
    assert free.now_ms == limited.now_ms == len(LONG_PARTS) * 1000
    assert limited.requests_ms == []
    pacer = Pacer(RATE)
    pacer.spend(RATE, 0)
    pacer.spend(RATE, 1_000_000)
    assert pacer.ready_ms == 1_001_000


def test_what_does_not_come_is_asked_for_although_the_limit_allows_no_more() -> None:
    link = Link(Pacer(1_000), is_deaf=True)  # a group takes nine minutes
    link.order(link.fetching.resume(0))
    link.run(until_ms=60_000)
    assert link.asked_ms == [0]
    assert link.requests_ms[0] == PATIENCE_FIRST_MS
    assert len(link.requests_ms) > 1


def test_patience_begins_when_the_limit_lets_it_ask_again() -> None:
    link = Link(Pacer(RATE))
    link.order(link.fetching.resume(0))
    link.run(until_ms=GROUP_MS - 1)
    assert link.fetching.deadline_ms == GROUP_MS
    link.is_deaf = True
    link.run(until_ms=GROUP_MS)
    assert link.asked_ms == [0, GROUP_MS]
    link.run(until_ms=2 * GROUP_MS)
    assert link.requests_ms == []  # more may be asked for before anything is late
    link.run(until_ms=GROUP_MS + PATIENCE_FIRST_MS)
    assert link.requests_ms


def test_a_limit_counts_over_lost_connections_and_over_blobs() -> None:
    pacer = Pacer(RATE)
    link = Link(pacer)
    link.order(link.fetching.resume(0))
    link.run(until_ms=30)
    link.fetching.pause()
    link.now_ms = 1000
    assert list(link.fetching.resume(1000)) == []
    assert link.fetching.deadline_ms == GROUP_MS
    other = Link(pacer)
    assert list(other.fetching.resume(1000)) == []
    link.now_ms = GROUP_MS
    (effect,) = link.fetching.timeout(GROUP_MS)
    assert isinstance(effect, Subscribe)
    assert len(effect.filters) == GROUP_CHUNKS - 3  # chunk by chunk: what came is not sent again
    assert other.fetching.deadline_ms == GROUP_MS


def test_a_connection_on_which_nothing_might_be_asked_for_is_not_called_barren() -> None:
    pacer = Pacer(RATE)
    link = Link(pacer)
    link.order(link.fetching.resume(0))
    for now_ms in range(1, 6):
        link.fetching.pause()
        list(link.fetching.resume(now_ms))
    link.now_ms = GROUP_MS
    link.order(link.fetching.timeout(GROUP_MS))
    assert link.fetching.deadline_ms is not None
    assert (
        link.fetching.deadline_ms - GROUP_MS == PATIENCE_FIRST_MS // 2
    )  # one connection, on which nothing came
