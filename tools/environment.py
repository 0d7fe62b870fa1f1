"""Bring .venv to what a lock file says, once per lock file: `python tools/environment.py locks/dev.lock`.

A stamp remembers the digest of the lock file and of pyproject.toml, so that a second `make` starts at once. A lock file
that pins a subset of what is installed needs nothing either.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(sys.prefix) / "whimbrel-environment.json"


def main(lock: Path) -> int:
    """Install what is missing; returns the exit code."""
    wanted = hashlib.sha256(lock.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if done.get(lock.name) == wanted:
        return 0
    print(f"installing what {lock} pins", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if is_missing(lock.read_text(), "llama-cpp-python"):
        print("compiling llama.cpp: about eight minutes on two cores", flush=True)
        os.environ.setdefault("CMAKE_ARGS", "-DLLAVA_BUILD=OFF")  # image input, which nothing here uses
    for command in (
        [*pip, "--require-hashes", "--requirement", str(lock)],
        [*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    ):
        result = subprocess.run(command, check=False)
        if result.returncode:
            print(f"whimbrel: set-up failed: {' '.join(command)}", file=sys.stderr)
            return result.returncode
    STAMP.write_text(json.dumps({**done, lock.name: wanted}))
    return 0


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
