"""Compiles the inner loops of the delta coder: every C file of protocol/delta/native becomes one shared library.

hatchling calls the hook below for each wheel. A wheel carries the library and its platform's tag; an editable install gets the
library beside its sources; without a compiler the wheel is a pure one, and deltas are decoded by the Python reference.
`python hatch_build.py` only compiles, for a working tree whose C sources changed. docs/adr/0011 says why this way.

WHIMBREL_TARGET chooses what to build for: unset is this machine, with $CC, cc, gcc or clang; `pure` compiles nothing; a name
like `aarch64-linux-gnu.2.17` cross-compiles for that processor and that glibc or newer, with the `ziglang` package.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

FOLDER: Final = Path("protocol/delta/native")
LIBRARY: Final = FOLDER / "libwhimbrel_delta.so"
NO_COMPILER: Final = (
    "whimbrel: no C compiler (cc, gcc, clang or $CC): deltas are decoded by the Python reference, slowly"
)
# No contraction and no fast-math: a result must not depend on the processor. -z defs finds a missing function here
# rather than on a device.
FLAGS: Final = (
    *("-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC", "-g0"),
    *("-Wall", "-Wextra", "-Werror", "-Wl,-z,defs", "-Wl,-z,relro,-z,now", "-Wl,-s"),
)
_TARGET: Final = re.compile(r"(x86_64|aarch64)-linux-gnu\.(2)\.([0-9]{2})")


class BuildError(Exception):
    """The library cannot be built as asked for; the message says what to change."""


def compiler(target: str) -> list[str]:
    """The command that compiles for `target` (see the top of this file), empty where nothing is to be compiled."""
    if target == "pure":
        return []
    if target:
        if not _TARGET.fullmatch(target):
            raise BuildError(
                f"WHIMBREL_TARGET is {target!r}: neither `pure` nor like `aarch64-linux-gnu.2.17`"
            )
        return [sys.executable, "-m", "ziglang", "cc", "-target", target]
    if chosen := shlex.split(os.environ.get("CC", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CC names {chosen[0]}, which is not on the PATH")
        return chosen
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def platform(target: str) -> str:
    """The platform part of the tag of a wheel that was compiled for `target`."""
    if named := _TARGET.fullmatch(target):
        return f"manylinux_{named[2]}_{named[3]}_{named[1]}"
    # What this machine compiles is promised to this machine only: its glibc may be newer than that of others.
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))


def build_library(root: Path, result: Path, target: str = "") -> bool:
    """Compile the C files below `root` into `result`; False where there is nothing to compile with.

    The library appears under its name only when it is complete, since running programs may have the one before mapped.

    Raises:
        BuildError: The compiler failed, or `target` is unknown.
    """
    command = compiler(target)
    if not command:
        return False
    sources = sorted(path.name for path in (root / FOLDER).glob("*.c"))
    partial = result.with_name(f"{result.name}.{os.getpid()}")
    # From within the folder, so that the library does not remember where it was built.
    arguments = [*command, *FLAGS, "-o", str(partial.resolve()), *sources]
    try:
        run = subprocess.run(arguments, cwd=root / FOLDER, check=False, capture_output=True, text=True)
        if run.returncode:
            raise BuildError(f"{shlex.join(arguments)} failed:\n{run.stdout}{run.stderr}")
        partial.replace(result)
    finally:
        partial.unlink(missing_ok=True)
    return True


class NativeBuildHook(BuildHookInterface[BuilderConfig]):
    """Puts the library where a wheel or an editable install needs it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling the file and the tag. The tree's own library is left alone by wheels."""
        target = os.environ.get("WHIMBREL_TARGET", "")
        root = Path(self.root)
        if version == "editable":
            is_built = build_library(root, root / LIBRARY)
        else:
            self._folder = tempfile.TemporaryDirectory()
            library = Path(self._folder.name) / LIBRARY.name
            is_built = build_library(root, library, target)
            if is_built:
                build_data["force_include"][str(library)] = str(LIBRARY)
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{platform(target)}"
        if not is_built and target != "pure":
            self.app.display_warning(NO_COMPILER)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove what was compiled: the wheel has it."""
        if version != "editable":
            self._folder.cleanup()


def main() -> int:
    """Compile for this machine into the working tree; returns the exit code."""
    root = Path(__file__).resolve().parent
    try:
        is_built = build_library(root, root / LIBRARY)
    except BuildError as error:
        print(f"whimbrel: {error}", file=sys.stderr)
        return 1
    if not is_built:
        print(NO_COMPILER, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
