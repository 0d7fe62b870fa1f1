"""What is compared: the project's coder in both profiles and its peers, as commands to run."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.rows import OURS

_LEVEL = 19
_XDELTA3_WINDOW_BYTES_MAX = 1 << 31
_MODULES = {"bsdiff4": "bsdiff", "hdiffpatch": "hdiff", "xz": "xz"}


@dataclass(frozen=True, slots=True)
class Contender:
    """A method.

    Attributes:
        name: As the table shows it.
        version: Of its library or program, or None where it is not installed.
        install: How to get it.
        build: The command that makes a patch, from paths of base, new and patch.
        apply: The command that applies it, from paths of base, patch and result.
    """

    name: str
    version: str | None
    install: str
    build: Callable[[Path, Path, Path], list[str]]
    apply: Callable[[Path, Path, Path], list[str]]

    @property
    def is_ours(self) -> bool:
        """Whether this is the project's own coder."""
        return self.name in OURS


def contenders() -> list[Contender]:
    """All methods; those that are not installed have no version."""
    return [
        *(
            _module(profile, "whimbrel", _distribution("whimbrel") or "source", "", profile)
            for profile in OURS
        ),
        *(
            _module(name, _MODULES[name], _distribution(name), f"pip install {name}")
            for name in ("bsdiff4", "hdiffpatch")
        ),
        Contender(
            "zstd",
            _program("zstd", "--version"),
            "apt-get install zstd",
            lambda base, new, patch: [
                *_ZSTD,
                f"-{_LEVEL}",
                f"--patch-from={base}",
                str(new),
                "-o",
                str(patch),
            ],
            lambda base, patch, out: [*_ZSTD, "-d", f"--patch-from={base}", str(patch), "-o", str(out)],
        ),
        Contender(
            "xdelta3",
            _program("xdelta3", "-V"),
            "apt-get install xdelta3",
            lambda base, new, patch: [*_xdelta3(base), "-e", "-9", "-s", str(base), str(new), str(patch)],
            lambda base, patch, out: [*_xdelta3(base), "-d", "-s", str(base), str(patch), str(out)],
        ),
        _module("xz", "xz", sys.version.split()[0], ""),
    ]


# Quiet, replacing what is there; `--patch-from` chooses a window that covers the base by itself.
_ZSTD = ["zstd", "--quiet", "--force"]


def _xdelta3(base: Path) -> list[str]:
    # The source window must cover the base, or what lies further back is not found.
    window = 1 << max(20, (base.stat().st_size - 1).bit_length())
    return ["xdelta3", "-f", "-B", str(min(window, _XDELTA3_WINDOW_BYTES_MAX))]


def _module(name: str, module: str, version: str | None, install: str, *options: str) -> Contender:
    command = [sys.executable, "-m", f"benchmarks.methods.{module}"]
    return Contender(
        name,
        version,
        install,
        lambda base, new, patch: [*command, "build", *map(os.fspath, (base, new, patch)), *options],
        lambda base, patch, out: [*command, "apply", *map(os.fspath, (base, patch, out)), *options],
    )


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _program(name: str, option: str) -> str | None:
    """A program's version as it says it itself, or None when it is not on the PATH."""
    path = shutil.which(name)
    if path is None:
        return None
    result = subprocess.run([path, option], capture_output=True, text=True, check=False)
    number = re.search(r"\d+(\.\d+)+", result.stdout + result.stderr)
    return number[0] if number else "unknown"
