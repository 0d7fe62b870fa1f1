"""What the project's own delta from one file to another weighs, without keeping it."""

from collections.abc import Iterable
from pathlib import Path

from protocol.delta.writer import make_delta
from protocol.errors import RequestError
from server.adapters.blobs import FileSource, storage_errors
from server.releases.chain_workers import ChainWorkers, workers_for


def delta_bytes(base: Path, new: Path, workers: int | None = None) -> int:
    """Length of the delta that a server makes and devices fetch, in the profile for few bytes.

    Args:
        base: The file that devices have.
        new: The one that they shall have.
        workers: Processes at most, None for as many as there are processors; small files take one. They change nothing but the time.

    Raises:
        RequestError: There is no such file.
        StorageError: One cannot be read.
    """
    sink = _Counter()
    for path in (base, new):
        if not path.is_file():
            raise RequestError(f"{path}: no such file", hint="give a model file")
    with storage_errors(base), base.open("rb", buffering=0) as first, new.open("rb", buffering=0) as second:
        old, fresh = FileSource(first), FileSource(second)
        count = workers_for(fresh.length, workers)
        encode = ChainWorkers(base, new, count) if count > 1 else None
        # As a server makes it, so that what is promised is what devices fetch.
        make_delta(old, fresh, sink, in_place=None, encode_chains=encode)
    return sink.bytes


def delta_sizes(bases: Iterable[Path], new: Path, workers: int | None = None) -> tuple[int, ...]:
    """As `delta_bytes`, from each of several files."""
    return tuple(delta_bytes(base, new, workers) for base in bases)


class _Counter:
    """Takes a delta and keeps its length."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes, /) -> None:
        """Count."""
        self.bytes += len(data)
