"""All targets: `python -m tests.fuzz --minutes 30 --workers 2`. Prints a table; fails if anything was found."""

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.fuzz.targets import TARGETS

ROOT: Final = Path(__file__).resolve().parent.parent.parent
WORK: Final = ROOT / ".cache" / "fuzz"
_LATE_S: Final = 120
"""The fuzzer ends by itself; a child that is that late hangs where no alarm reaches it."""

_STALL_S_MAX: Final = 5
"""Of the processor, to start the interpreter and take the input once."""


@dataclass(frozen=True)
class Run:
    """What came of one target."""

    target: str
    executions: int
    peak_mib: int
    inputs: int
    findings: list[str]


def run(target: str, seconds: int, seed: int) -> Run:
    """Fuzz one target in child processes until the time is over or something is found."""
    folder = WORK / target
    folder.mkdir(parents=True, exist_ok=True)
    before = set((folder / "findings").glob("*"))
    done = Run(target, 0, 0, 0, [])
    end = time.monotonic() + seconds
    while (left := round(end - time.monotonic())) > 0:
        part, code = _run_child(target, left, seed)
        found = set((folder / "findings").glob("*")) - before
        stalls = {path for path in found if path.name.startswith("timeout-") and _is_stall(target, path)}
        for path in stalls:
            path.unlink()
        findings = [str(path.relative_to(ROOT)) for path in sorted(found - stalls)]
        if code and not found:
            findings = [f"ended with code {code}, see {(folder / 'log').relative_to(ROOT)}"]
        done = Run(
            target,
            done.executions + part.executions,
            max(done.peak_mib, part.peak_mib),
            len(list((folder / "corpus").glob("*"))),
            findings,
        )
        if findings or not stalls:
            break
    return done


def _run_child(target: str, seconds: int, seed: int) -> tuple[Run, int]:
    """Run the fuzzer once; returns its statistics and its exit code, or -1 if it did not end."""
    log = WORK / target / "log"
    command = [
        sys.executable,
        "-m",
        f"tests.fuzz.fuzz_{target}",
        f"-max_total_time={seconds}",
        f"-seed={seed}",
    ]
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=seconds + _LATE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            out.write(b"\nkilled: did not end\n")
            code = -1
    text = log.read_text(errors="replace")
    run = Run(target, _statistic(text, "number_of_executed_units"), _statistic(text, "peak_rss_mb"), 0, [])
    return run, code


def _is_stall(target: str, path: Path) -> bool:
    """Whether an input that took too long by the clock takes the processor hardly any time: the machine stood still."""
    command = [sys.executable, "-m", f"tests.fuzz.fuzz_{target}", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (_STALL_S_MAX, _STALL_S_MAX))
        try:
            return process.wait(_LATE_S) == 0  # beyond its limit the kernel kills it
        except subprocess.TimeoutExpired:
            process.kill()
            return False


def _statistic(text: str, name: str) -> int:
    found = re.findall(rf"stat::{name}:\s+(\d+)", text)
    return int(found[-1]) if found else 0


def main() -> int:
    """Fuzz and report; the exit code is 1 if anything was found, or nothing was run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer; 0 for another one each time")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="targets at a time (default: as many as there are processors)",
    )
    parser.add_argument(
        "targets", nargs="*", metavar="target", help=f"some of {', '.join(TARGETS)} (default: all)"
    )
    args = parser.parse_args()
    chosen = args.targets or list(TARGETS)
    unknown = set(chosen) - set(TARGETS)
    if unknown:
        parser.error(f"no target is called {', '.join(sorted(unknown))}")
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    sys.stdout.write(f"{'target':<14}{'executions':>12}{'corpus':>9}{'peak MiB':>10}  findings\n")
    fuzz = partial(run, seconds=max(1, round(60 * args.minutes)), seed=args.seed)
    with ThreadPoolExecutor(args.workers) as workers:
        sound = [_tell(done) for done in workers.map(fuzz, chosen)]
    return 0 if all(sound) else 1


def _tell(done: Run) -> bool:
    """Print a row of the table; returns whether anything was run and nothing found."""
    sys.stdout.write(
        f"{done.target:<14}{done.executions:>12,}{done.inputs:>9,}{done.peak_mib:>10}  {len(done.findings)}\n"
    )
    sys.stdout.writelines(f"    {finding}\n" for finding in done.findings)
    sys.stdout.flush()
    return done.executions > 0 and not done.findings


if __name__ == "__main__":
    sys.exit(main())
