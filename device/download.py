"""Which chunks next: a window of groups, retries with full jitter, a bitmap that is never wrong. Pure.

A device subscribes to a few groups of chunks at QoS 0 and takes what the broker's cache sends (SPEC section 5.4). What does
not come within an adaptive time it asks for by bitmap. A group of which some chunks are there already is subscribed to chunk by
chunk, so that a lost connection makes nothing come twice.
"""

import random
from collections.abc import Iterator
from typing import Final

from device.effects import Effect, Publish, Subscribe, SyncBlob, Unsubscribe, WriteChunk
from protocol.chunks import Bitmap, BlobPlan, Chunk
from protocol.constants import CHUNK_BYTES, GROUP_CHUNKS
from protocol.errors import TransportError
from protocol.ids import DeviceId
from protocol.messages import ChunkRequest, encode_message, encode_window
from protocol.topics import Topics

PATIENCE_FIRST_MS: Final = 10_000
"""Wait for the first chunk after a subscription or a request: a broker that serves a whole fleet at once takes seconds (measured)."""

PATIENCE_MIN_MS: Final = 5_000
"""Wait for the next chunk: a mobile link stands still for seconds between two cells, and then goes on with what was under way."""

PATIENCE_MAX_MS: Final = 60_000
PATIENCE_BARREN_MS: Final = 1_000
"""What is left of the first patience at least, on a link that is never up for long."""

PATIENCE_CHUNKS: Final = 3
"""First and longest patience are at least the time in which the link carries so many chunks: one that asks for what is on its way
gets it twice. Every connection on which nothing comes halves the first: on a link that is never up for so long, nobody would ask."""

PATIENCE_GAPS: Final = 6
"""Patience, in multiples of the longest recent gap between chunks. A fixed time made a third of the bytes come twice."""

STALLS_MAX: Final = 12
"""Requests in a row without an answer before the transfer is given up for now: with the waits above, ten minutes."""

SYNC_CHUNKS: Final = 128
"""Chunks between two syncs: at most 8 MiB are fetched again after a power cut."""


class StalledError(TransportError):
    """Connected, and yet nothing comes."""

    code = "transport.stalled"


class Tally:
    """What has come from the air.

    Attributes:
        barren: Connections in a row on which something was asked for and nothing came; over all blobs, since an update that is
            interrupted early begins with the same one again.
        is_waiting: Something was asked for, and nothing came since.
    """

    __slots__ = (
        "barren",
        "invalid_chunks",
        "is_waiting",
        "received_bytes",
        "received_chunks",
        "redundant_chunks",
        "resumes",
    )

    def __init__(self) -> None:
        self.received_bytes = 0
        self.received_chunks = 0
        self.redundant_chunks = 0
        self.invalid_chunks = 0
        self.resumes = 0
        self.barren = 0
        self.is_waiting = False


class Pacer:
    """Spaces out what is asked for, so that no more comes than a rate, on average over groups of chunks.

    What is asked for a second time did not come the first time, and is not counted again.

    Args:
        bytes_per_s: The rate; 0 for none.
    """

    def __init__(self, bytes_per_s: int = 0) -> None:
        self.ready_ms = 0  # when more may be asked for
        self._bytes_per_s = bytes_per_s

    @property
    def is_limited(self) -> bool:
        """Whether there is a rate."""
        return self._bytes_per_s > 0

    def spend(self, count: int, now_ms: int) -> None:
        """Note that so many bytes were asked for."""
        if self.is_limited:
            self.ready_ms = max(now_ms, self.ready_ms) + count * 1000 // self._bytes_per_s


class _Group:
    """A group that is under way."""

    __slots__ = ("filters", "missing", "number")

    def __init__(self, number: int, filters: tuple[str, ...], missing: int) -> None:
        self.number = number
        self.filters = filters  # empty once it was asked for directly
        self.missing = missing  # chunks that are still to come


class BlobDownload:
    """Fetches what is missing of one blob.

    Args:
        plan: The blob and the digests of its chunks.
        present: What is on disk; changed as chunks arrive.
        topics: Topics of the fleet.
        device: Who asks.
        rng: Source of jitter.
        tally: Counts what arrives.
        groups_outstanding: How many groups are under way at a time.
        link_bytes_per_s: What the link carries, by the device's configuration.
        pacer: Shared by all downloads of a device.
        use_cache: Look into the broker's cache first; without it a server is asked at once.
        key: Name of the content key, where the blob is encrypted; chunks are checked as they travel, without it.
    """

    def __init__(
        self,
        plan: BlobPlan,
        present: Bitmap,
        topics: Topics,
        device: DeviceId,
        *,
        rng: random.Random,
        tally: Tally,
        groups_outstanding: int,
        link_bytes_per_s: int,
        pacer: Pacer | None = None,
        use_cache: bool = True,
        key: str = "",
    ) -> None:
        self.plan = plan
        self.present = present
        self.deadline_ms: int | None = None
        self._topics = topics
        self._device = device
        self._rng = rng
        self._tally = tally
        self._groups_outstanding = groups_outstanding
        self._pacer = pacer or Pacer()
        self._key = key
        self._groups: dict[int, _Group] = {}
        self._next_group = 0
        chunk_ms = CHUNK_BYTES * 1000 // link_bytes_per_s
        self._patience_first_ms = max(PATIENCE_FIRST_MS, PATIENCE_CHUNKS * chunk_ms)
        self._patience_min_ms = max(PATIENCE_MIN_MS, chunk_ms)
        self._patience_barren_ms = max(PATIENCE_BARREN_MS, chunk_ms)
        self._patience_max_ms = max(PATIENCE_MAX_MS, PATIENCE_CHUNKS * chunk_ms)
        self._stall_ms = 0  # when it has taken too long until something came
        self._use_cache = use_cache
        self._direct = not use_cache  # the cache has nothing: ask at once
        self._stalls = 0
        self._gap_ms = 0
        self._progress_ms: int | None = None  # last chunk on this connection
        self._is_flowing = False  # a chunk came since we last asked
        self._unsynced = 0

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is on disk."""
        return self.present.is_complete

    def resume(self, now_ms: int) -> Iterator[Effect]:
        """The connection is up: subscribe to what is missing."""
        self._groups.clear()
        self._next_group = 0
        self._direct = not self._use_cache
        self._stalls = 0
        self._tally.barren += self._tally.is_waiting
        self._tally.is_waiting = False
        self._progress_ms = None
        self._is_flowing = False
        yield from self._fill(now_ms)
        self._wait(now_ms)

    def pause(self) -> None:
        """The connection is gone, and every subscription with it."""
        self._groups.clear()
        self.deadline_ms = None

    def stop(self) -> Iterator[Effect]:
        """Nothing of this blob is wanted any more."""
        for group in self._groups.values():
            if group.filters:
                yield Unsubscribe(group.filters)
        self.pause()

    def receive(self, chunk: Chunk, now_ms: int) -> Iterator[Effect]:
        """Take a chunk of this blob; store it if it is what was signed."""
        self._tally.is_waiting = False
        self._tally.barren = 0
        self._tally.received_chunks += 1
        self._tally.received_bytes += len(chunk.payload)
        if not self.plan.accepts(chunk.index, chunk.payload):
            self._tally.invalid_chunks += 1
            return
        if chunk.index in self.present:
            self._tally.redundant_chunks += 1
            return
        self.present.add(chunk.index)
        yield WriteChunk(self.plan.name, chunk.index, chunk.payload, self._key)
        self._unsynced += 1
        if self._unsynced >= SYNC_CHUNKS or self.is_complete:
            self._unsynced = 0
            yield SyncBlob(self.plan.name)
        yield from self._note_arrival(chunk.index // GROUP_CHUNKS, now_ms)
        self._note_progress(now_ms)

    def timeout(self, now_ms: int) -> Iterator[Effect]:
        """Nothing came for too long: ask for what is missing by bitmap. Or more may be asked for: do so.

        Raises:
            StalledError: Asked often enough.
        """
        if (
            self._has_more
            and now_ms >= self._pacer.ready_ms
            and (not self._groups or now_ms < self._stall_ms)
        ):
            yield from self._ask_more(now_ms)
            return
        self._stalls += 1
        self._is_flowing = False
        if self._stalls > STALLS_MAX:
            raise StalledError(f"no chunk came after {STALLS_MAX} requests", hint="is a server running?")
        self._direct = True
        for group in self._groups.values():
            if group.filters:
                yield Unsubscribe(group.filters)
                group.filters = ()
            yield self._request(group.number)
        self._wait(now_ms)

    @property
    def _has_more(self) -> bool:
        """Whether a rate is all that keeps more from being asked for."""
        if not self._pacer.is_limited or len(self._groups) >= self._groups_outstanding:
            return False
        groups = -(-self.plan.count // GROUP_CHUNKS)
        return any(self._missing(number) for number in range(self._next_group, groups))

    def _ask_more(self, now_ms: int) -> Iterator[Effect]:
        """The rate allows more. Where nothing was under way, patience begins anew: what was not asked for was not late."""
        was_idle = not self._groups
        yield from self._fill(now_ms)
        if not was_idle:
            self._arm()
            return
        self._is_flowing = False
        if self._progress_ms is not None:
            self._progress_ms = now_ms
        self._wait(now_ms)

    def _fill(self, now_ms: int) -> Iterator[Effect]:
        groups = -(-self.plan.count // GROUP_CHUNKS)
        while len(self._groups) < self._groups_outstanding and self._next_group < groups:
            if self._pacer.ready_ms > now_ms:
                break
            number = self._next_group
            self._next_group += 1
            missing = self._missing(number)
            if not missing:
                continue
            self._tally.is_waiting = True
            self._pacer.spend(min(len(missing) * CHUNK_BYTES, self.plan.length), now_ms)
            filters = () if self._direct else self._filters(number, missing)
            self._groups[number] = _Group(number, filters, len(missing))
            yield Subscribe(filters, 0) if filters else self._request(number)

    def _filters(self, number: int, missing: list[int]) -> tuple[str, ...]:
        size = min(GROUP_CHUNKS, self.plan.count - number * GROUP_CHUNKS)
        if len(missing) == size:
            return (self._topics.chunk_group(self.plan.name, number),)
        return tuple(self._topics.chunk(self.plan.name, index) for index in missing)

    def _request(self, number: int) -> Publish:
        missing = self._missing(number)
        first = number * GROUP_CHUNKS
        request = ChunkRequest(blob=self.plan.name, first=first, wanted=encode_window(missing, first))
        return Publish(self._topics.request(self._device), encode_message(request), 1, retain=False)

    def _note_arrival(self, number: int, now_ms: int) -> Iterator[Effect]:
        group = self._groups.get(number)
        if group is None:
            return
        group.missing -= 1
        if group.missing:
            return
        del self._groups[number]
        if group.filters:
            yield Unsubscribe(group.filters)
        yield from self._fill(now_ms)

    def _missing(self, number: int) -> list[int]:
        return list(self.present.missing(number * GROUP_CHUNKS, (number + 1) * GROUP_CHUNKS))

    def _note_progress(self, now_ms: int) -> None:
        if self._progress_ms is not None:
            self._gap_ms = max(now_ms - self._progress_ms, self._gap_ms * 15 // 16)
        self._progress_ms = now_ms
        self._is_flowing = True
        self._stalls = 0
        self._wait(now_ms)

    def _wait(self, now_ms: int) -> None:
        if self.is_complete:
            self.deadline_ms = None
            return
        patience_ms = PATIENCE_GAPS * self._gap_ms
        if self._tally.barren:
            patience_ms = max(self._patience_first_ms >> self._tally.barren, self._patience_barren_ms)
        elif self._is_flowing and self._gap_ms:
            patience_ms = max(patience_ms, self._patience_min_ms)
        else:
            patience_ms = max(patience_ms, self._patience_first_ms)
        patience_ms = min(patience_ms, self._patience_max_ms)
        longest_ms = min(patience_ms << self._stalls, self._patience_max_ms)
        self._stall_ms = now_ms + self._rng.randint(patience_ms, max(patience_ms, longest_ms))
        self._arm()

    def _arm(self) -> None:
        """Wake when something is late, or when more may be asked for, whatever is first."""
        self.deadline_ms = self._stall_ms
        if self._has_more:
            ready_ms = self._pacer.ready_ms
            self.deadline_ms = min(ready_ms, self._stall_ms) if self._groups else ready_ms
