"""Runs contenders on pairs, each build and each apply in a process of its own, and compares every result."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import Contender
from benchmarks.rows import Cost, Estimate, Row
from protocol.errors import RequestError

_ROOT = Path(__file__).parent.parent
_MEASURE = Path(__file__).with_name("measure.py")


@dataclass(frozen=True, slots=True)
class Files:
    """A pair's files, measured once.

    Attributes:
        pair: Name of the pair.
        base: What devices have.
        new: What they shall have.
        base_sha256: Digest of `base`.
        new_sha256: Digest of `new`.
    """

    pair: str
    base: Path
    new: Path
    base_sha256: str
    new_sha256: str


def open_files(pair: str, base: Path, new: Path) -> Files:
    """Takes the digests of a pair's files.

    Raises:
        RequestError: One cannot be read.
    """
    return Files(pair, base.resolve(), new.resolve(), sha256(base), sha256(new))


def sha256(path: Path) -> str:
    """Digest of a file.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error


def empty_row(files: Files, contender: Contender, error: str) -> Row:
    """A row without figures."""
    length = files.new.stat().st_size
    version = contender.version or ""
    return Row(files.pair, contender.name, version, files.base_sha256, files.new_sha256, length, error=error)


def run(contender: Contender, files: Files, folder: Path, timeout_s: float) -> Row:
    """Builds a patch, applies it, and compares the result with the new file.

    Args:
        contender: The method.
        files: The pair.
        folder: For patch and result, which are removed again.
        timeout_s: For each of the two processes.

    Returns:
        A row; one with an error where the method failed.
    """
    if contender.version is None:
        return empty_row(files, contender, f"not installed: {contender.install}")
    with tempfile.TemporaryDirectory(dir=folder) as own:
        patch, out = Path(own) / "patch", Path(own) / "out"
        build = measured(contender.build(files.base, files.new, patch), timeout_s)
        if isinstance(build, str):
            return empty_row(files, contender, f"build failed: {build}")
        apply = measured(contender.apply(files.base, patch, out), timeout_s)
        if isinstance(apply, str):
            return empty_row(files, contender, f"apply failed: {apply}")
        if not out.is_file() or sha256(out) != files.new_sha256:
            return empty_row(files, contender, "the result is another file")
        return Row(
            files.pair,
            contender.name,
            contender.version,
            files.base_sha256,
            files.new_sha256,
            files.new.stat().st_size,
            patch.stat().st_size,
            build,
            apply,
        )


def measured(command: list[str], timeout_s: float) -> Cost | str:
    """Runs one command and returns its cost, or why it failed."""
    with tempfile.NamedTemporaryFile() as report:
        launcher = [sys.executable, "-I", "-S", os.fspath(_MEASURE), report.name, str(timeout_s)]
        result = subprocess.run(
            [*launcher, *command], cwd=_ROOT, capture_output=True, text=True, errors="replace", check=False
        )
        if result.returncode != 0:
            return _last_line(result.stderr)
        figures = json.load(report)
    if figures["exit_code"] != 0:
        return f"exit code {figures['exit_code']}, {_last_line(result.stderr)}"
    # A program that is no interpreter says nothing of its own work: the process is the work.
    own = json.loads(result.stdout)["work_cpu_s"] if result.stdout.startswith("{") else figures["cpu_s"]
    return Cost(own, figures["cpu_s"], figures["wall_s"], figures["peak_bytes"])


def estimate(files: Files, weights: tuple[Path, Path] | None) -> Estimate:
    """The entropies of a pair, from a process of its own, which needs much memory.

    Raises:
        RequestError: It failed.
    """
    command = [sys.executable, "-m", "benchmarks.entropy", os.fspath(files.base), os.fspath(files.new)]
    if weights:
        command += ["--weights", *(os.fspath(path.resolve()) for path in weights)]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RequestError(f"no estimate for {files.pair}: {_last_line(result.stderr)}")
    return Estimate(**json.loads(result.stdout))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "without a word"
