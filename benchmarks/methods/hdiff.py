"""HDiffPatch with LZMA2, its best setting in the measurements that its authors publish."""

from pathlib import Path

import hdiffpatch

from benchmarks.methods.child import run

_LEVEL = 9


def build(base: Path, new: Path, patch: Path, _options: list[str]) -> None:
    """Writes a patch; the library's own check by applying is left out, since the result is compared here anyway."""
    compression = hdiffpatch.Lzma2Config(level=_LEVEL)
    patch.write_bytes(hdiffpatch.diff(base.read_bytes(), new.read_bytes(), compression, validate=False))


def apply(base: Path, patch: Path, out: Path, _options: list[str]) -> None:
    """Applies one."""
    out.write_bytes(hdiffpatch.apply(base.read_bytes(), patch.read_bytes()))


if __name__ == "__main__":
    run(build, apply)
