"""Where the runs of a sweep are done: in processes of this machine, or by Dask on several. Both are executors of Python.

A run is a function of its scenario, so that the engine decides when it is done and never what comes of it.
"""

import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from multiprocessing import active_children, get_context
from typing import Any, Final

from protocol.errors import RequestError

WORKERS_MAX: Final = 256
"""Of one machine; a mistyped number must not start thousands of interpreters."""

CONNECT_TIMEOUT_S: Final = 10
_PACKAGES: Final = ("protocol", "device", "server", "simulator")


def memory_share_bytes(workers: int) -> int:
    """What each of so many workers may use of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // workers


@contextmanager
def local_engine(workers: int) -> Iterator[Executor]:
    """Processes of this machine, each with its share of the memory; they end with the context, whatever ends it.

    Raises:
        RequestError: There cannot be so many.
    """
    _check_workers(workers)
    before = set(active_children())
    # A fresh interpreter each: nothing of this process is in theirs.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_prepare, initargs=(memory_share_bytes(workers),)
    )
    try:
        yield pool
    except BaseException:
        for child in set(active_children()) - before:
            child.terminate()  # a run may have minutes to go
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def dask_engine(workers: int, address: str = "") -> Iterator[Executor]:
    """A Dask cluster, or one of processes of this machine where no address is given.

    Args:
        workers: Processes, where there is no cluster yet.
        address: Of a scheduler, as `tcp://host:8786`.

    Raises:
        RequestError: Dask is not installed, the cluster cannot be reached, or its workers have other code than we have.
    """
    _check_workers(workers)
    try:
        from distributed import Client, LocalCluster  # noqa: PLC0415 - an extra that few need
    except ImportError as error:
        raise RequestError(
            "the engine dask needs the package distributed", hint="pip install 'whimbrel[dask]'"
        ) from error
    with _cluster(LocalCluster, workers, address) as cluster:
        try:
            client = Client(cluster, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise RequestError(
                f"no Dask scheduler answers at {address}", hint="start one with `dask scheduler`"
            ) from error
        with client:
            ours, theirs = code_digest(), client.run(code_digest)
            if not theirs:
                raise RequestError(
                    f"the scheduler at {address} has no workers",
                    hint=f"start some with `dask worker {address}`",
                )
            for worker, digest in sorted(theirs.items()):
                if digest != ours:
                    raise RequestError(
                        f"worker {worker} runs other code than this machine",
                        hint="install one version on all",
                    )
            yield client.get_executor(pure=False)


def code_digest() -> str:
    """SHA-256 of the code that a run depends on."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for source in _sources(files(package)):
            digest.update(source.name.encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()


@contextmanager
def _cluster(local: Any, workers: int, address: str) -> Iterator[Any]:
    if address:
        yield address
        return
    with local(
        n_workers=workers,
        threads_per_worker=1,
        memory_limit=memory_share_bytes(workers),
        dashboard_address=None,
    ) as cluster:
        yield cluster


def _check_workers(workers: int) -> None:
    if not 1 <= workers <= WORKERS_MAX:
        raise RequestError(f"{workers} workers are not between 1 and {WORKERS_MAX}", hint="choose --workers")


def _prepare(memory_bytes: int) -> None:
    """In a worker: an interrupt is for the parent, which ends us; more memory than our share is an error, not swapping."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _sources(folder: Traversable) -> Iterator[Traversable]:
    """Python files below a folder, always in the same order."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry
