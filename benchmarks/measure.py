"""Runs one command and says what it cost: `python -I -S measure.py REPORT TIMEOUT_S COMMAND ...`.

CPU seconds and peak memory come from the kernel, for the command and all processes that it waited for. The kernel counts
what a process held before it became the command as well: so this file, which imports next to nothing, stands between
the command and whoever asks. Where the command has processes of its own, the peak is the largest sum over all of them
that was seen.
"""

import json
import os
import sys
import time

_SAMPLE_S = 0.02
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TIMED_OUT = 124  # as timeout(1) says it


def main(arguments: list[str]) -> int:
    """Runs the command, writes the report, and returns 0 whatever the command returned."""
    report, timeout_s, *command = arguments
    started = time.monotonic()
    try:
        child = os.posix_spawnp(command[0], command, os.environ)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 1
    is_late = False
    tree_bytes = 0
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        tree_bytes = max(tree_bytes, tree_resident_bytes(child))
        if not is_late and time.monotonic() - started > float(timeout_s):
            os.kill(child, 9)
            is_late = True
        time.sleep(_SAMPLE_S)
    measured = {
        "exit_code": _TIMED_OUT if is_late else os.waitstatus_to_exitcode(status),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "wall_s": round(time.monotonic() - started, 3),
        "peak_bytes": max(usage.ru_maxrss * 1024, tree_bytes),
    }
    with open(report, "w", encoding="utf-8") as file:  # noqa: PTH123 - pathlib would be half of this process
        json.dump(measured, file)
    return 0


def tree_resident_bytes(root: int) -> int:
    """Resident memory of the processes below `root`, itself among them; 0 when it stands alone.

    The kernel's own high-water mark is exact for a process that stands alone.
    """
    processes = [root]
    for process in processes:
        processes += _children(process)
    if len(processes) == 1:
        return 0
    return sum(_resident_bytes(process) for process in processes)


def _children(process: int) -> list[int]:
    try:
        with open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:  # noqa: PTH123
            return [int(child) for child in file.read().split()]
    except OSError:  # it has ended meanwhile
        return []


def _resident_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
