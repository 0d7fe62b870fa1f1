"""How much memory this process has, from Linux."""

from pathlib import Path
from typing import Final

_STATUS: Final = Path("/proc/self/status")


def resident_bytes() -> int:
    """The resident set, files that are mapped included."""
    return _field(b"VmRSS:")


def peak_bytes() -> int:
    """The largest resident set so far; `getrusage` would count the parent's, as it was at the fork."""
    return _field(b"VmHWM:")


def _field(name: bytes) -> int:
    for line in _STATUS.read_bytes().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024  # proc_pid_status(5): in KiB
    return 0
