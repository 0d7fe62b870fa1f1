"""xz -9 on the new file alone: what a compressor does without the old one."""

import lzma
import shutil
from pathlib import Path

from benchmarks.methods.child import run

_PRESET = 9


def build(_base: Path, new: Path, patch: Path, _options: list[str]) -> None:
    """Compresses the new file."""
    with new.open("rb") as source, lzma.open(patch, "wb", preset=_PRESET) as sink:
        shutil.copyfileobj(source, sink)


def apply(_base: Path, patch: Path, out: Path, _options: list[str]) -> None:
    """Decompresses it."""
    with lzma.open(patch, "rb") as source, out.open("wb") as sink:
        shutil.copyfileobj(source, sink)


if __name__ == "__main__":
    run(build, apply)
