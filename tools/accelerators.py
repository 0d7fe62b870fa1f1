"""Run models on accelerators without the hardware: `python -m tools.accelerators openvino cuda vulkan`.

Each name is a real build of a runtime, pinned by its lock file and put in front of the ordinary one on the path, and a module of
tests/accelerators that is run with it:

- openvino: onnxruntime with a second execution provider, Intel's, which runs on any processor of theirs or AMD's;
- cuda: onnxruntime with CUDA and TensorRT, of which a machine without their libraries or a device must get a clear word;
- vulkan: llama.cpp compiled for Vulkan (twenty minutes), with Mesa's driver that is a program: layers move to a device with
  memory of its own, as on a GPU. Needs the Debian packages glslc, libvulkan-dev, spirv-headers, mesa-vulkan-drivers and a C++ compiler.

What is fetched stays in .cache/accelerators, once per lock file.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tools.environment import LLAMA_OPTIONS

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / ".cache" / "accelerators"
NAMES: Final = ("openvino", "cuda", "vulkan")
LAVAPIPE: Final = Path("/usr/share/vulkan/icd.d")
ENVIRONMENT: Final[dict[str, dict[str, str]]] = {
    # A device that is a program is passed over by llama.cpp, unless it is asked for by number.
    "vulkan": {"GGML_VK_VISIBLE_DEVICES": "0"},
}


def main(names: list[str]) -> int:
    """Install and run what is named; returns the exit code."""
    unknown = set(names) - set(NAMES)
    if unknown or not names:
        print(
            f"whimbrel: {', '.join(sorted(unknown)) or 'nothing'} is no accelerator of {', '.join(NAMES)}\n{__doc__}"
        )
        return 2
    if "vulkan" in names and (trouble := vulkan_trouble()):
        print(f"whimbrel: {trouble}", file=sys.stderr)
        return 1
    return max(run(name, install(name)) for name in names)


def install(name: str) -> Path:
    """Bring the folder of a runtime to what its lock file says."""
    folder, lock = FOLDER / name, ROOT / "locks" / f"{name}.lock"
    stamp, wanted = FOLDER / f"{name}.stamp", hashlib.sha256(lock.read_bytes()).hexdigest()
    if folder.is_dir() and stamp.exists() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing what {lock.relative_to(ROOT)} pins", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    environment = dict(os.environ)
    if name == "vulkan":
        print("compiling llama.cpp for Vulkan: twenty minutes on two cores", flush=True)
        environment["CMAKE_ARGS"] = shlex.join(("-DGGML_VULKAN=ON", *LLAMA_OPTIONS))
        pip.append("--no-cache-dir")  # or pip would take the one that was compiled without
    command = [*pip, "--require-hashes", "--requirement", str(lock), "--target", str(folder)]
    if subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit(f"whimbrel: {name} could not be installed, see above")
    stamp.write_text(wanted)
    return folder


def run(name: str, folder: Path) -> int:
    """Run the tests of a runtime; returns pytest's exit code."""
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, **ENVIRONMENT.get(name, {}), "PYTHONPATH": paths}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/accelerators/{name}.py",
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def vulkan_trouble() -> str:
    """What is missing for Vulkan, empty where nothing is."""
    lacking = [
        package
        for package, is_there in {
            "glslc": shutil.which("glslc") is not None,
            "libvulkan-dev": Path("/usr/include/vulkan/vulkan.h").exists(),
            "spirv-headers": Path("/usr/include/spirv").exists(),
            "mesa-vulkan-drivers": any(LAVAPIPE.glob("lvp_icd.*.json")),
        }.items()
        if not is_there
    ]
    return f"{', '.join(lacking)} is missing (apt-get install {' '.join(lacking)})" if lacking else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
