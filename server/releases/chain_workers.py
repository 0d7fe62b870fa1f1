"""Chains of a delta file written side by side, in processes: one delta of a large model then uses all the cores there are.

Used by whoever builds a delta from two files on disk. Memory is bounded by the workers and one chain more than them.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final

from protocol.delta.chains import CHAIN_BYTES, ChainJob, ChainResult, encode_chain
from protocol.errors import EngineError
from server.adapters.blobs import FileSource

WORKERS_MAX: Final = 8
"""More would wait for the disk and for the one process that writes the file."""

PARALLEL_BYTES_MIN: Final = 2 * CHAIN_BYTES
"""Files that are shorter are done before a process has started."""

_sources: list[FileSource] = []
"""In a worker: the base and the new file."""


def workers_for(result_bytes: int, wanted: int | None = None) -> int:
    """Return how many processes should write the delta for a result of that length.

    Args:
        result_bytes: Length of the new file.
        wanted: What a person asked for; None for as many as there are cores.
    """
    cores = wanted or len(os.sched_getaffinity(0))
    return (
        1
        if result_bytes < PARALLEL_BYTES_MIN
        else max(1, min(cores, WORKERS_MAX, -(-result_bytes // CHAIN_BYTES)))
    )


class ChainWorkers:
    """What `make_delta` takes as `encode_chains`.

    Args:
        base: Path of the base.
        new: Path of the new file.
        workers: How many processes.
    """

    def __init__(self, base: Path, new: Path, workers: int) -> None:
        self._paths = (base, new)
        self._workers = workers

    def __call__(self, jobs: Iterable[ChainJob]) -> Iterator[ChainResult]:
        """Yield the chains' results in order.

        Raises:
            EngineError: A worker died, most likely for want of memory.
        """
        # Forking would copy threads of numerical libraries that it cannot copy.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, context, _open_sources, self._paths) as pool:
            waiting: deque[Future[ChainResult]] = deque()
            try:
                for job in jobs:
                    waiting.append(pool.submit(_encode, job))
                    if len(waiting) > self._workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool as error:
                raise EngineError(
                    "a process that builds the delta died",
                    hint="there may be too little memory: try --workers 1",
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _open_sources(*paths: Path) -> None:
    # The files stay open as long as the process lives.
    _sources.extend(FileSource(path.open("rb", buffering=0)) for path in paths)


def _encode(job: ChainJob) -> ChainResult:
    base, new = _sources
    return encode_chain(base, new, job)
