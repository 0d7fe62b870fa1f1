"""Fetching artifacts one after the other: for each its index blobs, top first, then the data. Pure.

What is on disk is found when a blob is opened, so a transfer can be begun anew at any time and goes on where it was.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from device.download import BlobDownload, Pacer, Tally
from device.effects import Effect, OpenBlob, ReadBlob
from protocol.chunks import Bitmap, BlobPlan, Chunk, child_plan, index_name, root_plan
from protocol.ids import DeviceId, Digest
from protocol.release import ChunkTree
from protocol.topics import Topics


class Artifact(NamedTuple):
    """A blob that signed metadata names."""

    name: Digest
    length: int
    tree: ChunkTree
    key: str = ""  # name of its content key, where it is encrypted; its indexes are not

    @property
    def blobs(self) -> frozenset[Digest]:
        """Names of the data and of every index."""
        return frozenset(
            {self.name, *(index_name(self.tree, level) for level in range(1, self.tree.levels + 1))}
        )


class Requester(NamedTuple):
    """Who fetches, and how."""

    topics: Topics
    device: DeviceId
    rng: random.Random
    groups_outstanding: int
    link_bytes_per_s: int
    pacer: Pacer


class Transfer:
    """Fetches a list of artifacts.

    Args:
        artifacts: What to fetch, in order.
        requester: Who asks.
        tally: Counts what arrives.
        ask: Gives a serial for an effect whose answer is waited for.
        read_last: Read the content of the last artifact once it is there, into `content`.
    """

    def __init__(
        self,
        artifacts: list[Artifact],
        requester: Requester,
        tally: Tally,
        ask: Callable[[], int],
        *,
        read_last: bool = False,
    ) -> None:
        self.content: bytes | None = None
        self.is_finished = not artifacts
        self._artifacts = artifacts
        self._requester = requester
        self._tally = tally
        self._ask = ask
        self._read_last = read_last
        self._at = 0
        self._level = 0
        self._plan: BlobPlan | None = None
        self._download: BlobDownload | None = None
        self._is_waiting = False  # for storage

    @property
    def deadline_ms(self) -> int | None:
        """When to call `timeout`."""
        return None if self._download is None else self._download.deadline_ms

    def resume(self, now_ms: int) -> Iterator[Effect]:
        """The connection is up: begin, or go on."""
        if self._download is not None and not self._download.is_complete:
            yield from self._download.resume(now_ms)
        elif not self._is_waiting and not self.is_finished:
            yield from self._open_artifact()

    def pause(self) -> None:
        """The connection is gone."""
        if self._download is not None:
            self._download.pause()

    def stop(self) -> Iterator[Effect]:
        """Nothing of this is wanted any more."""
        if self._download is not None:
            yield from self._download.stop()

    def opened(self, present: Bitmap, now_ms: int, *, connected: bool) -> Iterator[Effect]:
        """Storage for the current blob is ready."""
        assert self._plan is not None
        self._is_waiting = False
        topics, device, rng, groups_outstanding, link_bytes_per_s, pacer = self._requester
        self._download = BlobDownload(
            self._plan,
            present,
            topics,
            device,
            rng=rng,
            tally=self._tally,
            groups_outstanding=groups_outstanding,
            link_bytes_per_s=link_bytes_per_s,
            pacer=pacer,
            key=self._key,
        )
        if self._download.is_complete:
            yield from self._blob_complete()
        elif connected:
            yield from self._download.resume(now_ms)

    def receive(self, chunk: Chunk, now_ms: int) -> Iterator[Effect]:
        """Take a chunk; one of another blob, or a late one, is dropped."""
        download = self._download
        if download is None or chunk.blob != download.plan.name or download.is_complete:
            return
        yield from download.receive(chunk, now_ms)
        if download.present.is_complete:
            yield from self._blob_complete()

    def read(self, data: bytes) -> Iterator[Effect]:
        """Content of the current blob: an index, or what `read_last` asked for."""
        self._is_waiting = False
        if self._level == 0:
            self.content = data
            self.is_finished = True
            return
        artifact = self._artifacts[self._at]
        self._plan = child_plan(artifact.name, artifact.length, artifact.tree, self._level, data)
        self._level -= 1
        yield from self._open_blob()

    def timeout(self, now_ms: int) -> Iterator[Effect]:
        """Nothing came for too long.

        Raises:
            StalledError: As `BlobDownload.timeout`.
        """
        if self._download is not None:
            yield from self._download.timeout(now_ms)

    def _open_artifact(self) -> Iterator[Effect]:
        artifact = self._artifacts[self._at]
        self._level = artifact.tree.levels
        self._plan = root_plan(artifact.name, artifact.length, artifact.tree)
        yield from self._open_blob()

    @property
    def _key(self) -> str:
        """Name of the key of the current blob."""
        return "" if self._level else self._artifacts[self._at].key

    def _open_blob(self) -> Iterator[Effect]:
        assert self._plan is not None
        self._download = None
        self._is_waiting = True
        yield OpenBlob(self._ask(), self._plan, self._key)

    def _blob_complete(self) -> Iterator[Effect]:
        assert self._plan is not None
        is_last = self._at + 1 == len(self._artifacts)
        if self._level > 0 or (is_last and self._read_last):
            self._is_waiting = True
            yield ReadBlob(self._ask(), self._plan.name, self._plan.length)
        elif is_last:
            self.is_finished = True
        else:
            self._at += 1
            yield from self._open_artifact()
