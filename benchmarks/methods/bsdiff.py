"""bsdiff4: suffix sorting and bzip2 (Percival, 2003)."""

from pathlib import Path

import bsdiff4

from benchmarks.methods.child import run


def build(base: Path, new: Path, patch: Path, _options: list[str]) -> None:
    """Writes a patch."""
    patch.write_bytes(bsdiff4.diff(base.read_bytes(), new.read_bytes()))


def apply(base: Path, patch: Path, out: Path, _options: list[str]) -> None:
    """Applies one."""
    out.write_bytes(bsdiff4.patch(base.read_bytes(), patch.read_bytes()))


if __name__ == "__main__":
    run(build, apply)
