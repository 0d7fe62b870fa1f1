"""C with ctypes against numba, Cython, Rust and pure Python, as far as they matter to a device (`make bench-native`).

One loop, an adaptive binary range decoder, in all of them: how much a device must install for it, how long it takes until the first decoded bit
once numpy is there, how much memory stays resident, and how many bits per second come out, here and on an ARM processor that
qemu emulates. Every option must decode the same bits.

Times are CPU times; those in the emulator compare options with each other, and say nothing about a device.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hatch_build import FLAGS
from hatch_build import FOLDER as NATIVE
from tools import arm64

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
LOCK = ROOT / "locks" / "bench-native.lock"
CACHE = ROOT / ".cache" / "bench-native"
ONES = 0.05  # as rare as changed values in a delta
PYTHON_SHARE = 20  # pure Python decodes only one bit of so many
ZIG = (sys.executable, "-m", "ziglang", "cc", "-target")

Command = Sequence[str | Path]
Weight = tuple[int, int]
"""What is downloaded and what it takes on disk, in bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=20_000_000)
    parser.add_argument("--starts", type=int, default=5, help="the median is shown")
    parser.add_argument("--no-arm64", action="store_true", help="leave the emulated processor out")
    parser.add_argument("--json", action="store_true", help="one line per row instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = list(rows_here(Path(name), arguments))
        if not arguments.no_arm64:
            rows += rows_emulated(Path(name), arguments)
    for row in rows:
        print(json.dumps(row) if arguments.json else line_of(row), flush=True)
    if len({row["sha256"] for row in rows if row["option"] != "python"}) != 1:
        raise SystemExit("whimbrel: the options decoded different bits")


def rows_here(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every option on this machine; leaves the coded bits in the folder."""
    python = environment()
    compile_c(["cc"], folder / "coder.so")
    write_stream(folder, arguments.bits)
    library = weight(folder / "coder.so")
    weights = {"c": library, "c with AVX2": library, "cython": weight(compile_cython(folder, python))}
    if shutil.which("rustc"):
        weights["rust"] = weight(compile_rust(folder))
    weights |= {"numba": weight_of_numba("x86_64"), "python": (0, 0)}
    for option, size in weights.items():
        yield row_of("x86-64", option, size, [python], folder, arguments)


def rows_emulated(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What can be run on the emulated processor without a whole tool chain for it."""
    qemu = arm64.emulator()
    arm64.set_up(qemu)
    if not (arm64.FOLDER / "numba").exists():
        arm64.pip_install(
            qemu, "numba", ["--only-binary", ":all:", "--require-hashes", "--requirement", LOCK]
        )
    compile_c([*ZIG, arm64.TARGET], folder / "coder.so")
    weights = {"c": weight(folder / "coder.so"), "numba": weight_of_numba("aarch64"), "python": (0, 0)}
    for option, size in weights.items():
        command = arm64.interpreter(qemu)
        yield row_of("aarch64 in qemu", option, size, command, folder, arguments, arm64.FOLDER / "numba")


def row_of(
    machine: str,
    option: str,
    size: Weight,
    python: Command,
    folder: Path,
    arguments: argparse.Namespace,
    packages: Path | None = None,
) -> dict[str, Any]:
    """Run an option in fresh processes: the first start alone, then the median of the others, then the speed."""
    cache = folder / f"numba-{machine}"
    where = {"PYTHONPATH": str(packages)} if packages else {}
    command = [*python, HERE / "options.py", option, folder]

    def run(bits: int) -> dict[str, Any]:
        output = run_program([*command, str(bits)], {"NUMBA_CACHE_DIR": str(cache), **where})
        return dict(json.loads(output))

    first = run(1000)
    others = [run(1000) for _ in range(arguments.starts)]
    speed = run(arguments.bits // PYTHON_SHARE if option == "python" else arguments.bits)
    return {
        "machine": machine,
        "option": option,
        "download_bytes": size[0],
        "installed_bytes": size[1],
        "first_start_s": first["start_s"],
        "start_s": statistics.median(other["start_s"] for other in others),
        "memory_bytes": statistics.median(other["memory_bytes"] for other in others),
        "bits_per_s": speed["bits_per_s"],
        "sha256": speed["sha256"],
    }


def line_of(row: Mapping[str, Any]) -> str:
    return (
        f"{row['machine']:<16} {row['option']:<12}"
        f" download {row['download_bytes'] / 1e6:8.3f} MB, installed {row['installed_bytes'] / 1e6:8.3f} MB,"
        f" first start {row['first_start_s'] * 1e3:7.0f} ms, start {row['start_s'] * 1e3:7.1f} ms,"
        f" memory {row['memory_bytes'] / 1e6:6.1f} MB, {row['bits_per_s'] / 1e6:7.2f} Mbit/s"
    )


def write_stream(folder: Path, count: int) -> None:
    """Code seeded random bits with the C encoder."""
    bits = (np.random.default_rng(1).random(count) < ONES).astype(np.uint8)
    coded = np.empty(count + 16, np.uint8)
    encode = ctypes.CDLL(str(folder / "coder.so")).encode
    encode.restype = ctypes.c_uint64
    encode.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    length = encode(bits.ctypes.data, count, coded.ctypes.data)
    (folder / "coded").write_bytes(coded[:length].tobytes())
    out = np.empty(count, np.uint8)
    decode = ctypes.CDLL(str(folder / "coder.so")).decode
    decode.restype = None
    decode.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    decode(coded.ctypes.data, count, out.ctypes.data)
    if not np.array_equal(bits, out):
        raise SystemExit("whimbrel: the C decoder does not give back what was coded")


def environment() -> Path:
    """The interpreter of an environment with numba and Cython, made once per lock file."""
    python, stamp = CACHE / "bin" / "python", CACHE / "lock"
    if not stamp.exists() or stamp.read_bytes() != LOCK.read_bytes():
        venv.create(CACHE, clear=True, with_pip=True)
        pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        run_program([*pip, "--require-hashes", "--requirement", LOCK])
        stamp.write_bytes(LOCK.read_bytes())
    return python


def compile_c(compiler: Command, result: Path) -> None:
    """As hatch_build.py does."""
    sources = [HERE / "coder.c", ROOT / NATIVE / "processor.c"]
    run_program([*compiler, *FLAGS, "-I", ROOT / NATIVE, "-o", result, *sources])


def compile_cython(folder: Path, python: Path) -> Path:
    """The extension module, stripped; it serves one version of one interpreter."""
    source, result = folder / "decoder.c", folder / f"decoder{sysconfig.get_config_var('EXT_SUFFIX')}"
    run_program([python.parent / "cython", HERE / "decoder.pyx", "-o", source])
    flags = ["-O3", "-shared", "-fPIC", "-s", "-I", sysconfig.get_paths()["include"]]
    run_program(["cc", *flags, "-o", result, source])
    return result


def compile_rust(folder: Path) -> Path:
    """A library for ctypes like the one in C."""
    options = ["opt-level=3", "panic=abort", "strip=symbols", "lto=fat"]
    flags = [word for option in options for word in ("-C", option)]
    result = folder / "decoder.so"
    run_program(["rustc", "--crate-type", "cdylib", *flags, "-o", result, HERE / "decoder.rs"])
    return result


def weight(library: Path) -> Weight:
    """Of a library as a wheel would carry it: deflated, and as it is."""
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(library, library.name)
        return file.tell(), library.stat().st_size


def weight_of_numba(machine: str) -> Weight:
    """Of the wheels of numba and llvmlite in the lock file."""
    pins = re.findall(r"^((?:numba|llvmlite)==[^ ]+)", LOCK.read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as name:
        platforms = [
            word for tag in ("2_28", "2_27", "2_17") for word in ("--platform", f"manylinux_{tag}_{machine}")
        ]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        run_program(
            [*pip, "--only-binary", ":all:", "--python-version", "3.11", *platforms, "--dest", name, *pins]
        )
        wheels = list(Path(name).glob("*.whl"))
        installed = sum(entry.file_size for wheel in wheels for entry in zipfile.ZipFile(wheel).infolist())
        return sum(wheel.stat().st_size for wheel in wheels), installed


def run_program(command: Command, environment: Mapping[str, str] | None = None) -> str:
    """Run a program that must succeed; gives what it printed."""
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONNOUSERSITE": "1", **(environment or {})},
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"whimbrel: failed: {' '.join(map(str, command))}")
    return run.stdout


if __name__ == "__main__":
    main()
