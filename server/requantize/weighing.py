"""What the project's own delta from one file to another weighs, without keeping it."""

from pathlib import Path

from protocol.delta.writer import make_delta
from protocol.errors import RequestError
from server.adapters.blobs import FileSource, storage_errors
from server.releases.chain_workers import ChainWorkers, workers_for


def delta_bytes(base: Path, new: Path, workers: int | None = None) -> int:
    """Length of a delta in the profile for few bytes.

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
        make_delta(old, fresh, sink, encode_chains=encode)
    return sink.bytes


class _Counter:
    """Takes a delta and keeps its length."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes, /) -> None:
        """Count."""
        self.bytes += len(data)
