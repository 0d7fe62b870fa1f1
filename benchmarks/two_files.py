"""What the benchmarks that apply deltas between two files have in common: their command line, and the profiles one after the other."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from protocol.delta.format import Profile


def arguments(description: str, *, rounds: int) -> argparse.Namespace:
    """Read the command line.

    Args:
        description: Of the benchmark, one line.
        rounds: How often each thing is done, if nobody says otherwise.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--profile", choices=("small", "fast"), action="append")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--folder", type=Path, help="where to work; the disk that is to be measured")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def profiles(args: argparse.Namespace) -> Iterator[tuple[Profile, Path]]:
    """Each profile that is asked for, with an empty folder to work in."""
    for name in args.profile or ("fast", "small"):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            yield Profile[name.upper()], Path(folder)
