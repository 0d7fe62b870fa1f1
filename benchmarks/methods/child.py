"""What the measured processes share: arguments, and the CPU time of the work without the interpreter's start.

Each is called as `python -m benchmarks.methods.NAME build BASE NEW PATCH [OPTION ...]` or
`... apply BASE PATCH OUT [OPTION ...]`, and prints one JSON line.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

Work = Callable[[Path, Path, Path, list[str]], None]


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(build: Work, apply: Work) -> None:
    """Does what the command line says, and prints what the work itself took."""
    action, first, second, third, *options = sys.argv[1:]
    before = cpu_seconds()
    {"build": build, "apply": apply}[action](Path(first), Path(second), Path(third), options)
    print(json.dumps({"work_cpu_s": round(cpu_seconds() - before, 4)}))
