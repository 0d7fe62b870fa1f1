"""Changes checks one by one, and looks whether a test notices; also whether tests run every line and branch of them."""

import argparse
import os
import sys

from tests.mutation.campaign import Options, report, run
from tests.mutation.targets import GROUPS


def main() -> int:
    """Returns 1 when a mutant survived that is not listed, too few were killed, or a branch is never taken."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"which modules (default: all of {', '.join(GROUPS)})"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    parser.add_argument("--sample", type=int, default=0, metavar="COUNT", help="so many mutants, not all")
    parser.add_argument(
        "--incremental",
        action="store_true",
        help="do not try again what was killed before tests were changed",
    )
    given = parser.parse_args()
    if unknown := sorted(set(given.groups) - set(GROUPS)):
        parser.error(f"no group {unknown[0]}: choose from {', '.join(GROUPS)}")
    sampled = [name for name, group in GROUPS.items() if group.is_sampled]
    names = given.groups or (sampled if given.sample else list(GROUPS))
    outcome = run(Options(names, max(1, given.workers), given.sample, given.incremental))
    return 0 if report(outcome, sys.stdout) else 1


if __name__ == "__main__":
    sys.exit(main())
