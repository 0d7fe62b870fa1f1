"""Run test modules on a 64-bit ARM processor that qemu emulates: `python -m tools.arm64 tests/protocol/test_delta_vectors.py`.

Nothing is imitated but the processor: Debian's CPython for ARM, the wheels for ARM that locks/vectors.lock pins, and our own wheel,
cross-compiled, all installed by that CPython's pip as on a device. The modules run with the library and with the reference. What
is fetched stays in .cache/arm64, and the system is not changed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pip

from tools.wheels import build, check

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "arm64"
SYSTEM = FOLDER / "system"
LOCK = ROOT / "locks" / "vectors.lock"
# CPython with its standard library, and what numpy's wheel takes from the system.
DEBIAN_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
TARGET = "aarch64-linux-gnu.2.17"
# Says what the modules are about to run on; fails if that is not what was asked for.
WHO = """
import os, platform, numpy, protocol.delta.native
library = protocol.delta.native.library()
assert (library is not None) == (os.environ["WHIMBREL_NATIVE"] == "1"), library
print(platform.machine(), platform.python_implementation(), platform.python_version(), "numpy", numpy.__version__,
      "with the library" if library else "with the reference", flush=True)
"""


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is under way, and how long it took."""
    print(f"{what} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    given: bytes | None = None,
    output: int | None = None,
) -> bytes:
    """Run a command that must succeed; gives its output if `output` asks for it."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, input=given, stdout=output, check=False
    )
    if result.returncode:
        raise SystemExit(f"whimbrel: failed: {' '.join(map(str, command))}")
    return result.stdout or b""


def emulator() -> str:
    """The user-mode emulator; ends the program with what to install where something is missing."""
    for name in ("apt-get", "dpkg-deb"):
        if shutil.which(name) is None:
            raise SystemExit(
                f"whimbrel: {name} is missing: CPython for ARM is taken from Debian, on Debian only"
            )
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if found is None:
        raise SystemExit("whimbrel: qemu-aarch64-static is missing (apt-get install qemu-user-static)")
    return found


def fetch_system() -> None:
    """Unpack Debian's packages for ARM, of the release that this machine runs, into SYSTEM."""
    state, cache = FOLDER / "apt-state", FOLDER / "apt-cache"
    for folder in (state / "lists/partial", cache / "archives/partial", SYSTEM / "usr/lib"):
        folder.mkdir(parents=True)
    status = state / "status"
    status.touch()  # nothing is installed, so apt fetches whatever the packages depend on
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::Cache": cache,
        "Dir::State": state,
        "Dir::State::status": status,
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run([*apt, "update"])
    run([*apt, "--yes", "--no-install-recommends", "--download-only", "install", *DEBIAN_PACKAGES])
    # Older packages have files in /lib, newer ones only in /usr/lib.
    (SYSTEM / "lib").symlink_to("usr/lib")
    for package in sorted((cache / "archives").glob("*.deb")):
        archive = run(["dpkg-deb", "--fsys-tarfile", package], output=subprocess.PIPE)
        run(["tar", "--extract", "--keep-directory-symlink", "--directory", SYSTEM], given=archive)
    shutil.rmtree(state)
    shutil.rmtree(cache)


def interpreter(qemu: str) -> list[str | Path]:
    """The command that starts CPython for ARM."""
    found = [SYSTEM / "usr/bin" / f"python3.{minor}" for minor in (11, 12, 13)]
    python = next((path for path in found if path.exists()), None)
    if python is None:
        raise SystemExit("whimbrel: this release of Debian has no Python 3.11 to 3.13 for ARM")
    return [qemu, "-L", SYSTEM, python]


def set_up(qemu: str) -> None:
    """Bring .cache/arm64 to what LOCK says, once per lock file."""
    stamp = FOLDER / "stamp"
    wanted = hashlib.sha256(LOCK.read_bytes() + " ".join(DEBIAN_PACKAGES).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    with step("fetching Debian's CPython for ARM"):
        fetch_system()
    with step("installing numpy and others for ARM, in the emulator"):
        pip_install(qemu, "packages", ["--only-binary", ":all:", "--require-hashes", "--requirement", LOCK])
    stamp.write_text(wanted)


def pip_install(qemu: str, folder: str, what: Iterable[str | Path]) -> None:
    """Install into a folder with this environment's pip, run by CPython for ARM: it chooses what a device would."""
    install: list[str | Path] = [
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",  # in the emulator that takes longer than everything else
        "--no-deps",
        "--target",
        FOLDER / folder,
    ]
    run(
        [*interpreter(qemu), Path(pip.__file__).parent, *install, *what],
        environment={"PYTHONNOUSERSITE": "1", "PIP_ROOT_USER_ACTION": "ignore"},
    )


def main(modules: list[str]) -> None:
    qemu = emulator()
    set_up(qemu)
    with step("building and installing our wheel for ARM"):
        wheel = build(FOLDER, TARGET)
        check(wheel)
        shutil.rmtree(FOLDER / "whimbrel", ignore_errors=True)
        pip_install(qemu, "whimbrel", [wheel])
    # A copy, because the packages beside the tests of the working tree would be imported instead of the wheel's.
    run_folder = FOLDER / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests", run_folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", run_folder)
    with step("the modules with the library and with the reference"), ThreadPoolExecutor() as threads:
        list(threads.map(partial(run_modules, qemu, run_folder, modules), ("1", "0")))


def run_modules(qemu: str, folder: Path, modules: Sequence[str], native: str) -> None:
    """Run test modules with one value of WHIMBREL_NATIVE, and print all that they say in one piece."""
    environment = {
        "PYTHONPATH": os.pathsep.join(str(FOLDER / name) for name in ("whimbrel", "packages", "run")),
        "PYTHONNOUSERSITE": "1",
        "WHIMBREL_NATIVE": native,
    }
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=1800"]
    commands = (["-W", "error", "-c", WHO], [*pytest, *modules])
    with tempfile.TemporaryFile() as told:
        try:
            for command in commands:
                run([*interpreter(qemu), *command], cwd=folder, environment=environment, output=told.fileno())
        finally:
            told.seek(0)
            print(told.read().decode(errors="replace"), end="", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit(f"whimbrel: no test module is named\n{__doc__}")
    main(sys.argv[1:])
