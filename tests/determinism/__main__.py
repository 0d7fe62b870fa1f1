"""Runs every seed twice, in two processes with other hashes side by side, and compares the digests of their traces."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def digests(first: int, count: int, devices: int, hash_seed: str) -> dict[int, str]:
    """The digest of each seed's trace, from a process of its own."""
    command = [sys.executable, "-m", "simulator.cli", "soak", "--json", "--devices", str(devices)]
    done = subprocess.run(
        [*command, "--first", str(first), "--count", str(count)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
        check=False,  # a seed that fails ends the process: it is missing then, and shown on the error output
    )
    lines = map(json.loads, done.stdout.splitlines())
    return {line["seed"]: line["digest"] for line in lines}


def main() -> int:
    """Returns 1 when a seed gave two digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, help="first seed (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=24, help="of each seed (default: %(default)s)")
    given = parser.parse_args()

    def run(hash_seed: str) -> dict[int, str]:
        return digests(given.first, given.count, given.devices, hash_seed)

    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(run, ("1", "4711")))
    differing = [seed for seed in runs[0] if runs[0][seed] != runs[1].get(seed)]
    sys.stdout.write(f"{len(runs[0])} seeds run twice, {len(differing)} with two digests {differing or ''}\n")
    return 1 if differing or len(runs[0]) != given.count else 0


if __name__ == "__main__":
    sys.exit(main())
