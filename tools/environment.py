"""Bring .venv to what a lock file says, once per lock file: `python tools/environment.py locks/dev.lock`.

A stamp remembers the digest of the lock file and of pyproject.toml, so that a second `make` starts at once. It also remembers
the digest of the C sources: when only those changed, only they are compiled.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "protocol/delta/native/libwhimbrel_delta.so"
# Neither image input nor the chat programs' library, which nothing here uses: half of what would be compiled.
LLAMA_OPTIONS = (
    "-DLLAVA_BUILD=OFF",
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ROOT / 'tools' / 'llama.cmake'}",
)
STAMP = Path(sys.prefix) / "whimbrel-environment.json"


def main(lock: Path) -> int:
    """Install and compile what is missing; returns the exit code."""
    wanted = hashlib.sha256(lock.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    native = native_digest()
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    is_installed = done.get(lock.name) == wanted
    if is_installed and done.get("native") == native and LIBRARY.exists():
        return 0
    if is_installed:
        commands = []
    else:
        print(f"installing what {lock} pins", flush=True)
        commands = install_commands(lock)
    for command in [*commands, [sys.executable, str(ROOT / "hatch_build.py")]]:
        result = subprocess.run(command, check=False)
        if result.returncode:
            print(f"whimbrel: set-up failed: {' '.join(command)}", file=sys.stderr)
            return result.returncode
    STAMP.write_text(json.dumps({**done, lock.name: wanted, "native": native}))
    return 0


def native_digest() -> str:
    """What the compiled library follows from: its sources, and how they are compiled."""
    digest = hashlib.sha256((ROOT / "hatch_build.py").read_bytes())
    for path in sorted(LIBRARY.parent.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def install_commands(lock: Path) -> list[list[str]]:
    """The pip commands that bring the environment to what `lock` pins, and the project into it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if is_missing(lock.read_text(), "llama-cpp-python"):
        print("compiling llama.cpp: four to eight minutes on two cores", flush=True)
        os.environ.setdefault("CMAKE_ARGS", shlex.join(LLAMA_OPTIONS))
    return [
        [*pip, "--require-hashes", "--requirement", str(lock)],
        [*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    ]


def is_missing(lock: str, name: str) -> bool:
    """Whether the lock file pins `name` in a version that is not installed."""
    pinned = re.search(rf"^{re.escape(name)}==(\S+)", lock, re.MULTILINE)
    if pinned is None:
        return False
    try:
        return version(name) != pinned[1]
    except PackageNotFoundError:
        return True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
