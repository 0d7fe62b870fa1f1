"""Build the wheels of a release into a folder, and check their libraries: `python -m tools.wheels dist [target ...]`.

One for x86-64, one for ARM (aarch64), cross-compiled for systems with glibc 2.17 or newer, and a pure one for everything else; pip takes the
one that fits. The targets are those of hatch_build.py.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from hatch_build import LIBRARY, platform

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("x86_64-linux-gnu.2.17", "aarch64-linux-gnu.2.17", "pure")
# ELF header, e_machine at offset 18: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html
MACHINES = {"x86_64": 62, "aarch64": 183}


def build(folder: Path, target: str) -> Path:
    """Build the wheel for one target; gives its path."""
    cache = str(ROOT / ".cache" / "zig")
    environment = {
        **os.environ,
        "WHIMBREL_TARGET": target,
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
    }
    tag = "any" if target == "pure" else platform(target)
    for old in folder.glob(f"whimbrel-*-{tag}.whl"):
        old.unlink()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"whimbrel: the wheel for {target} cannot be built:\n{run.stdout}{run.stderr}")
    (wheel,) = folder.glob(f"whimbrel-*-py3-none-{tag}.whl")
    return wheel


def problems(library: bytes, machine: str, glibc: tuple[int, int]) -> list[str]:
    """What keeps a library from running on `machine` with the C library `glibc`, one line each."""
    found = []
    if library[:4] != b"\x7fELF" or int.from_bytes(library[18:20], "little") != MACHINES[machine]:
        found.append(f"it is not a library for {machine}")
    # The names of the versions that the dynamic linker asks for stand in the string table, and nowhere else.
    needed = {(int(major), int(minor)) for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    found += [f"it needs glibc {major}.{minor}" for major, minor in sorted(needed) if (major, minor) > glibc]
    return found


def check(wheel: Path) -> None:
    """End the program where a wheel's library does not keep what the wheel's tag promises."""
    names = zipfile.ZipFile(wheel).namelist()
    named = re.search(r"-manylinux_(\d+)_(\d+)_(\w+)\.whl$", wheel.name)
    if named is None:
        found = [f"it is pure and has {name}" for name in names if name.endswith(".so")]
    elif str(LIBRARY) in names:
        library = zipfile.ZipFile(wheel).read(str(LIBRARY))
        found = problems(library, named[3], (int(named[1]), int(named[2])))
    else:
        found = [f"{LIBRARY} is missing"]
    if found:
        raise SystemExit(f"whimbrel: {wheel.name}: {'; '.join(found)}")


def main(folder: Path, targets: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets or TARGETS:
        wheel = build(folder, target)
        check(wheel)
        print(f"{wheel} ({wheel.stat().st_size / 1000:.0f} kB)", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
