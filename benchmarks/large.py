"""Whether time stays linear and memory bounded: pairs of 0.1, 1 and 4 GB (`make bench-delta-large`).

A pair is made of the real tensors of a fine-tuned model and its base, repeated under other names. In each repetition the
rows of both are rotated by the same number, so that differences stay real and no stretch is literally the same as
another. Files are written tensor by tensor. Build and apply run as in `delta.py`, in processes of their own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from benchmarks.catalog import CACHE, PAIRS, missing
from benchmarks.contenders import Contender, contenders
from benchmarks.gguf_files import Stored, read_stored, start_gguf
from benchmarks.rows import OURS, Row, aligned, megabytes_per_second
from benchmarks.running import open_files, run
from protocol.errors import RequestError, StorageError, WhimbrelError

PAIR = next(pair for pair in PAIRS if pair.name == "large.q4_0")
SIZES_GB = (0.1, 1.0, 4.0)
BUILD_BYTES_MAX = 600e6
APPLY_BYTES_MAX = 128e6
LINEAR_MAX = 1.25
"""How much more CPU time a byte of the largest file may take than a byte of the smallest."""

_ROOT = Path(__file__).parent.parent
_ROTATION_ROWS = 37
_TIMEOUT_S = 7200.0
_GIGABYTE = 1e9


def main(arguments: list[str] | None = None) -> int:
    """Measure all sizes in both profiles; 0 when memory and time stay within their bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.splitlines()[0])
    sizes = ",".join(map(str, SIZES_GB))
    parser.add_argument("--sizes", default=sizes, metavar="GB,...", help="(default: %(default)s)")
    parser.add_argument(
        "--profiles", default=",".join(OURS), metavar="NAME,...", help="(default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        rows = _measure(_sizes(options.sizes), _methods(options.profiles), options.cache)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_table(rows))
    found = complaints(rows)
    print("\n".join(found) or "time is linear and memory bounded")
    return 1 if found else 0


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(f"--sizes {text}: not numbers of gigabytes") from error
    if not all(0 < size <= 64 for size in sizes):
        raise RequestError(f"--sizes {text}: each must be more than 0 and at most 64")
    return sorted(sizes)


def _methods(text: str) -> list[Contender]:
    known = {contender.name: contender for contender in contenders() if contender.is_ours}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise RequestError(f"no profile is called {unknown[0]}", hint=f"there are {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def _measure(sizes: list[float], methods: list[Contender], cache: Path) -> list[Row]:
    if missing(PAIR, cache):
        command = [sys.executable, "-m", "benchmarks.pairs", "--cache", os.fspath(cache.resolve()), PAIR.name]
        if subprocess.run(command, cwd=_ROOT, stdout=sys.stderr, check=False).returncode != 0:
            raise RequestError(
                "the pair could not be made", hint="`make bench-delta-large` sets up what is needed"
            )
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".large-") as folder:
            base, new = Path(folder) / "base.gguf", Path(folder) / "new.gguf"
            try:
                write_repeated(cache / PAIR.base, base, round(size * _GIGABYTE))
                write_repeated(cache / PAIR.new, new, round(size * _GIGABYTE))
            except OSError as error:
                raise StorageError(
                    f"cannot write {size} GB in {cache}: {error.strerror}", hint="see --cache and --sizes"
                ) from error
            files = open_files(f"{size:g} GB", base, new)
            for method in methods:
                rows.append(run(method, files, Path(folder), _TIMEOUT_S))
                print("  ".join(_cells(rows[-1])), file=sys.stderr, flush=True)
    return rows


def write_repeated(source: Path, out: Path, length: int) -> None:
    """Writes a valid GGUF file of about `length` bytes from the tensors of a small one; memory holds one tensor."""
    copies = max(1, round(length / source.stat().st_size))
    layers = int(gguf.GGUFReader(source).fields["llama.block_count"].contents())
    writer = start_gguf(source, out, {"llama.block_count": layers * copies})
    stored = read_stored(source)
    for tensor, name, _ in _repeated(stored, layers, copies):
        writer.add_tensor_info(
            name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, raw_dtype=tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, _, rotation in _repeated(stored, layers, copies):
        writer.write_tensor_data(np.roll(tensor.data, rotation, axis=0))
    writer.close()


def _repeated(stored: list[Stored], layers: int, copies: int) -> Iterator[tuple[Stored, str, int]]:
    """Each tensor of each copy, its name there, and by how many rows it is rotated."""
    for copy in range(copies):
        for tensor in stored:
            head, _, rest = tensor.name.partition(".")
            if head == "blk":
                number, _, rest = rest.partition(".")
                name = f"blk.{int(number) + copy * layers}.{rest}"
            else:
                name = tensor.name if copy == 0 else f"copy.{copy}.{tensor.name}"
            yield tensor, name, copy * _ROTATION_ROWS


def _table(rows: list[Row]) -> str:
    headings = (
        "size",
        "profile",
        "bytes of new",
        "% of new",
        "build CPU s",
        "MB/s",
        "MB",
        "apply CPU s",
        "MB/s",
        "MB",
    )
    return aligned([headings, *(_cells(row) for row in rows)])


def _cells(row: Row) -> list[str]:
    cells = [row.pair, row.method, f"{row.new_bytes:,}"]
    if row.patch_bytes is None:
        return [*cells, row.error, *[""] * 6]
    cells.append(f"{100 * row.patch_bytes / row.new_bytes:.3f}")
    for cost in (row.build, row.apply):
        assert cost is not None  # a row with a length has both
        speed = megabytes_per_second(row, cost) or 0.0
        cells += [f"{cost.cpu_s:.1f}", f"{speed:.1f}", f"{cost.peak_bytes / 1e6:.0f}"]
    return cells


def complaints(rows: list[Row]) -> list[str]:
    """What is out of bounds, in words; nothing when all is well."""
    found = [f"{row.pair} {row.method}: {row.error}" for row in rows if row.error]
    done = [row for row in rows if row.build and row.apply]
    for row in done:
        for what, cost, limit in (
            ("build", row.build, BUILD_BYTES_MAX),
            ("apply", row.apply, APPLY_BYTES_MAX),
        ):
            if cost and cost.peak_bytes > limit:
                found.append(
                    f"{row.pair} {row.method}: {what} takes {cost.peak_bytes / 1e6:.0f} MB, more than {limit / 1e6:.0f}"
                )
    for method in dict.fromkeys(row.method for row in done):
        same = [row for row in done if row.method == method]
        for what in ("build", "apply"):
            slower = _seconds_per_byte(same[-1], what) / _seconds_per_byte(same[0], what)
            if slower > LINEAR_MAX:
                found.append(
                    f"{method}: a byte of {same[-1].pair} takes {slower:.2f} times the {what} time of one of {same[0].pair}"
                )
    return found


def _seconds_per_byte(row: Row, what: str) -> float:
    cost = row.build if what == "build" else row.apply
    assert cost is not None  # only complete rows are compared
    return cost.cpu_s / row.new_bytes


if __name__ == "__main__":
    sys.exit(main())
