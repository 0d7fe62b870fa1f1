"""What the project's own delta from one file to another weighs, without keeping it."""

from collections.abc import Iterable
from pathlib import Path

from protocol.delta.writer import make_delta
from server.releases.chain_workers import ChainWorkers, workers_for
from server.requantize.model import opened_gguf


def delta_bytes(base: Path, new: Path, workers: int | None = None) -> int:
    """Length of the delta that a server makes and devices fetch, in the profile for few bytes.

    Args:
        base: The GGUF file that devices have.
        new: The one that they shall have.
        workers: Processes at most, None for as many as there are processors; small files take one. They change nothing but the time.

    Raises:
        RequestError: There is no such file.
        ModelFileError: One of them is damaged.
    """
    sink = _Counter()
    with opened_gguf(base) as old, opened_gguf(new) as fresh:
        count = workers_for(fresh.source.length, workers)
        encode = ChainWorkers(base, new, count) if count > 1 else None
        # As a server makes it, so that what is promised is what devices fetch.
        make_delta(old.source, fresh.source, sink, in_place=None, encode_chains=encode)
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
