"""What splitting costs a delta: `python -m benchmarks.split OLD NEW`, two versions of one GGUF model.

Both are cut into shards of about one length, at tensors, and each shard of NEW is coded against the one of OLD that a server takes
for it; beside it stands what one delta of the whole model takes, and one against all shards of OLD as a single base, which devices
cannot do.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gguf_files import read_stored, write_gguf
from benchmarks.rows import aligned
from protocol.delta.writer import make_delta
from protocol.ids import Digest, digest_of
from protocol.messages import Report
from protocol.release import HealthPlan, Release, ReleaseFile, Resources
from protocol.tensors import BytesSource, JoinedSource, join_maps, map_regions
from server.releases.delta_planner import pairs_for

SPLITS = ((1, 1), (3, 3), (2, 3), (3, 2), (1, 3))
"""Shards of OLD and of NEW."""

Shards = dict[str, BytesSource]


def shards_of(model: Path, count: int, folder: Path) -> Shards:
    """A model cut into shards, by name."""
    tensors = read_stored(model)
    ends = list(accumulate(tensor.data.nbytes for tensor in tensors))
    shards: Shards = {}
    for number in range(count):
        chosen = [
            tensor
            for tensor, end in zip(tensors, ends, strict=True)
            if (end - tensor.data.nbytes // 2) * count // (ends[-1] + 1) == number
        ]
        path = folder / f"model-{number + 1:05}-of-{count:05}.gguf"
        write_gguf(model, path, chosen, {})
        shards[path.name] = BytesSource(path.read_bytes())
    return shards


def delta_bytes(old: Shards, new: Shards) -> tuple[int, int]:
    """Bytes of the deltas, and of the shards that have no base."""
    blobs = {digest_of(each.read_at(0, each.length)): each for each in (*old.values(), *new.values())}
    names = {id(each): digest for digest, each in blobs.items()}
    report = Report(
        device="d",
        sequence=1,
        state="idle",
        family="f",
        version="1",
        files={name: names[id(each)] for name, each in old.items()},
    )
    files = [ReleaseFile(name=name, length=each.length, sha256=names[id(each)]) for name, each in new.items()]
    pairs = {result: base for base, result in pairs_for(_release(files), report)}
    total = alone = 0
    for file in files:
        base = pairs.get(Digest(file.sha256))
        if base is None:
            alone += file.length
            continue
        total += make_delta(blobs[base], blobs[Digest(file.sha256)], io.BytesIO()).patch_length
    return total, alone


def joined_bytes(old: Shards, new: Shards) -> int:
    """Bytes of a delta between all shards of both, as if each were one file."""
    sources = [list(each.values()) for each in (old, new)]
    maps = [
        join_maps([map_regions(shard) for shard in shards], [shard.length for shard in shards])
        for shards in sources
    ]
    base, result = (JoinedSource(shards) for shards in sources)
    return make_delta(base, result, io.BytesIO(), maps=(maps[0], maps[1])).patch_length


def _release(files: list[ReleaseFile]) -> Release:
    """Only the files of it are looked at."""
    health = HealthPlan(prompts=[], latency_p99_ms_max=1, memory_peak_bytes_max=1)
    return Release(
        family="f",
        version="2",
        runtime="llama",
        runtime_version_min="0.3",
        files=files,
        resources=Resources(),
        health=health,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.split", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    options = parser.parse_args(arguments)
    lines: list[Sequence[str]] = [("shards", "deltas", "without a base", "as one base")]
    for before, after in SPLITS:
        with TemporaryDirectory() as folder:
            (Path(folder) / "old").mkdir()
            old = shards_of(options.old, before, Path(folder) / "old")
            new = shards_of(options.new, after, Path(folder))
        total, alone = delta_bytes(old, new)
        lines.append((f"{before} to {after}", f"{total:,}", f"{alone:,}", f"{joined_bytes(old, new):,}"))
    print(aligned(lines, left=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
