"""Says how much memory a fresh process took for verification: `python -m benchmarks.trust_memory STAGE [FOLDER NOW_MS]`.

The stages are `nothing`, `import` and `verify`, each of which does what the one before does. The folder holds documents as
`trust.py` writes them. What is printed is the peak of resident memory in bytes (VmHWM of proc(5)), which begins anew with each program.
"""

import sys
from pathlib import Path


def peak_bytes() -> int:
    """The peak of this process so far."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("whimbrel: /proc/self/status does not say VmHWM; Linux is needed")


def main(arguments: list[str]) -> int:
    stage, *rest = arguments
    if stage != "nothing":
        from protocol.trust import Documents, Floors, verify  # noqa: PLC0415 - what is to be measured

        if stage == "verify":
            folder, now_ms = Path(rest[0]), int(rest[1])
            documents = {path.name: path.read_bytes() for path in folder.iterdir()}
            root = documents.pop("root")
            timestamp, snapshot, targets = (
                documents.pop(role) for role in ("timestamp", "snapshot", "targets")
            )
            delegated = tuple(documents.items())
            found = Documents(timestamp=timestamp, snapshot=snapshot, targets=targets, delegated=delegated)
            verify(root, found, Floors(), now_ms, tuple(documents))
    sys.stdout.write(f"{peak_bytes()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
