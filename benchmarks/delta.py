"""Our delta coder and its peers on real pairs of model versions (`make bench-delta`).

Prints one table, the requirements with the measured figures beside them, and with `--json` a line for each row. Every
patch is applied and the result compared by digest. Build and apply run in processes of their own: CPU seconds and peak
memory are the kernel's. Speeds are megabytes of the result for each second of CPU time, interpreters started; memory is
the whole process. Compare within one run only, and give the machine nothing else to do.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import acceptance
from benchmarks.catalog import CACHE, PAIRS, Pair, missing, select
from benchmarks.contenders import Contender, contenders
from benchmarks.rows import OURS, Estimate, Results, Row, json_line, parse_line, table
from benchmarks.running import Files, estimate, open_files, run
from protocol.errors import RequestError, WhimbrelError

_ROOT = Path(__file__).parent.parent
_TIMEOUT_S = 3600.0


def main(arguments: list[str] | None = None) -> int:
    """Run every method on every pair; 0 when all that ran meets what it must."""
    options = _options(arguments)
    try:
        results = _earlier(options.measured) if options.measured else _run(options)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    print()
    print(acceptance.report(results))
    failed = [row for row in results.rows if row.error and not row.error.startswith("not installed")]
    return 0 if not failed and acceptance.is_reached(results) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    names = [contender.name for contender in contenders()]
    peers = [name for name in names if name not in OURS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delta", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default="*", metavar="GLOB,...", help="which pairs (default: all)")
    parser.add_argument(
        "--profiles", default=",".join(OURS), metavar="NAME,...", help="(default: %(default)s)"
    )
    parser.add_argument("--peers", default=",".join(peers), metavar="NAME,...", help="(default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=_TIMEOUT_S, metavar="S", help="for each process")
    parser.add_argument("--no-estimates", action="store_true", help="leave out the entropies")
    parser.add_argument(
        "--peers-from",
        type=Path,
        metavar="FILE",
        help="take the peers' rows from JSON lines of an earlier run where pair, files and version are the same",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON line for each row, too")
    parser.add_argument(
        "--measured",
        type=Path,
        action="append",
        metavar="FILE",
        help="measure nothing: print the tables of the JSON lines of earlier runs (repeatable; of one pair the last file's)",
    )
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> Results:
    pairs = select(options.pairs.split(","))
    if not pairs:
        raise RequestError(
            f"no pair is called {options.pairs}", hint=f"there are {', '.join(pair.name for pair in PAIRS)}"
        )
    methods = _methods(options)
    earlier = _earlier_rows(options.peers_from) if options.peers_from else []
    _make(pairs, options.cache)
    results = Results()
    for pair in pairs:
        files = open_files(pair.name, options.cache / pair.base, options.cache / pair.new)
        if not options.no_estimates:
            weights = (
                (options.cache / pair.weights[0], options.cache / pair.weights[1]) if pair.weights else None
            )
            results.estimates[pair.name] = estimate(files, weights)
        for method in methods:
            row = _known(earlier, files, method)
            if row is None:
                with tempfile.TemporaryDirectory(dir=options.cache, prefix=".bench-") as folder:
                    row = run(method, files, Path(folder), options.timeout)
            results.rows.append(row)
            _progress(row)
        if (
            options.json
        ):  # pair by pair, so that `--peers-from` can use what a run that was stopped has measured
            for row in results.rows[-len(methods) :]:
                print(json_line(results, row), flush=True)
    return results


def _methods(options: argparse.Namespace) -> list[Contender]:
    known = {contender.name: contender for contender in contenders()}
    names = [name for part in (options.profiles, options.peers) for name in part.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RequestError(f"no method is called {unknown[0]}", hint=f"there are {', '.join(known)}")
    return [known[name] for name in names]


def _make(pairs: list[Pair], cache: Path) -> None:
    """Makes missing files in a process of its own, because training needs libraries that nothing else here does."""
    names = [pair.name for pair in pairs if missing(pair, cache)]
    if not names:
        return
    command = [sys.executable, "-m", "benchmarks.pairs", "--cache", os.fspath(cache.resolve()), *names]
    if subprocess.run(command, cwd=_ROOT, stdout=sys.stderr, check=False).returncode != 0:
        raise RequestError("the pairs could not be made", hint="`make bench-delta` sets up what is needed")


def _earlier(paths: Sequence[Path]) -> Results:
    """What earlier runs measured. A pair is taken from one run as a whole, since speeds compare within a run only."""
    pairs: dict[str, Results] = {}
    for path in paths:
        found = _lines_of(path)
        pairs |= {
            pair: Results(
                rows=[row for row, _ in found if row.pair == pair],
                estimates={row.pair: estimate for row, estimate in found if row.pair == pair},
            )
            for pair in {row.pair for row, _ in found}
        }
    known = [pairs[name] for name in (pair.name for pair in PAIRS) if name in pairs]
    return Results(
        rows=[row for each in known for row in each.rows],
        estimates={pair: estimate for each in known for pair, estimate in each.estimates.items()},
    )


def _earlier_rows(path: Path) -> list[Row]:
    """The peers' rows of an earlier run."""
    return [row for row, _ in _lines_of(path) if not row.is_ours and row.patch_bytes is not None]


def _lines_of(path: Path) -> list[tuple[Row, Estimate]]:
    """The rows that a run printed; lines that are no rows, such as a table, are passed over.

    Raises:
        RequestError: The file cannot be read, or holds a broken row.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("{")]
        return [parse_line(line) for line in lines]
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: no JSON lines of an earlier run") from error


def _known(earlier: list[Row], files: Files, method: Contender) -> Row | None:
    wanted = (files.pair, method.name, method.version, files.base_sha256, files.new_sha256)
    found = (
        row
        for row in earlier
        if (row.pair, row.method, row.version, row.base_sha256, row.new_sha256) == wanted
    )
    return next(found, None)


def _progress(row: Row) -> None:
    size = row.error if row.patch_bytes is None else f"{row.patch_bytes:,} bytes"
    print(f"{row.pair} {row.method}: {size}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
