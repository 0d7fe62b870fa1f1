"""Plants one defect after the other, and counts the seeds that the simulator needs to find it."""

import argparse
import sys
from typing import Final

from simulator.soak import run_seed
from tests.defects.planted import DEFECTS

SEEDS_MAX: Final = 20
"""A defect that is not found within so many seeds is a hole in the simulator."""

DEVICES: Final = 40


def seeds_needed(name: str, seeds_max: int, first: int = 1) -> tuple[int, str]:
    """How many seeds it took to find a defect, and what was found; 0 when it was not.

    Raises:
        AssertionError: Something else was found.
    """
    plant, promises = DEFECTS[name]
    with plant():
        for count in range(1, seeds_max + 1):
            failure = run_seed(first + count - 1, DEVICES).failure
            if failure is not None:
                assert failure.promise in promises, f"{name}: found instead: {failure}"
                return count, f"promise {failure.promise}: {failure.detail}"
    return 0, "not found"


def main() -> int:
    """Print a line per defect; returns 1 when one was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=SEEDS_MAX, help="tried per defect (default: %(default)s)"
    )
    seeds_max = parser.parse_args().seeds
    is_complete = True
    for name in DEFECTS:
        count, detail = seeds_needed(name, seeds_max)
        is_complete = is_complete and count > 0
        found = f"found by seed {count}: {detail}" if count else f"NOT FOUND in {seeds_max} seeds"
        sys.stdout.write(f"{name:30} {found}\n")
        sys.stdout.flush()
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
