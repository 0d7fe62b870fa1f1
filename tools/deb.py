"""Build the Debian package of the device's agent into a folder: `python -m tools.deb dist [--arch arm64] [--python 3.13]`.

The package holds an environment of its own in /usr/lib/whimbrel with every wheel that locks/device.lock pins and our own, so that it is
installed without a network and without pip; the interpreter is the system's. Wheels are chosen by pip for the processor and the
Python that are asked for, whatever this machine is, and packed by dpkg-deb alone. One package per processor and Python: wheels have both in their names.

Beside the packages stand install.sh and SHA256SUMS: the folder is what a web server offers to new devices.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from packaging.markers import Marker

from tools.wheels import build, check

ROOT: Final = Path(__file__).resolve().parent.parent
DEPLOY: Final = ROOT / "deploy"
LOCK: Final = ROOT / "locks" / "device.lock"
HOME: Final = "usr/lib/whimbrel"
MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
# Python of a distribution and the minor version of its glibc: Debian 12 and Raspberry Pi OS, Ubuntu 24.04, Debian 13.
GLIBC: Final = {"3.11": 36, "3.12": 39, "3.13": 41}
DOCUMENTS: Final = {
    "device/README.md": "README.md",
    "docs/device.md": "device.md",
    "CHANGELOG.md": "changelog.md",
}
START: Final = """#!/usr/lib/whimbrel/bin/python3 -I
import sys

from device.cli import main

sys.exit(main())
"""


def run(*command: str | Path, **environment: str) -> str:
    """Run a program that must succeed; gives its output."""
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )
    if result.returncode:
        raise SystemExit(f"whimbrel: {command[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout.strip()


def requirements(lock: str, machine: str, python: str) -> str:
    """The lines of a lock file that count for a processor and a Python: pip judges markers by the Python that runs it."""
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    chosen = []
    for pinned, marker, hashes in re.findall(
        r"^([\w.-]+==\S+)(?: ; (.*?))? \\\n((?:    --hash.*\n)+)", lock, re.MULTILINE
    ):
        if not marker or Marker(marker).evaluate(environment):
            chosen.append(f"{pinned} \\\n{hashes}")
    return "".join(chosen)


def install_wheels(site: Path, wheel: Path, machine: str, python: str) -> None:
    """Unpack the wheels that `machine` and `python` need into a folder."""
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(17, GLIBC[python] + 1)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    target = [
        "--no-deps",
        "--only-binary=:all:",
        f"--target={site}",
        "--implementation=cp",
        f"--python-version={python}",
    ]
    target += [f"--platform=manylinux2014_{machine}", *platforms]
    pinned = site.parent / "requirements.txt"
    pinned.write_text(requirements(LOCK.read_text(), machine, python))
    run(*pip, *target, "--require-hashes", "--requirement", pinned)
    pinned.unlink()
    run(*pip, *target, "--upgrade", wheel)
    shutil.rmtree(site / "bin", ignore_errors=True)  # programs for this machine's interpreter
    for folder in [*site.rglob("tests"), *site.rglob("__pycache__")]:
        shutil.rmtree(folder, ignore_errors=True)


def glibc_needed(site: Path) -> int:
    """The minor version of the glibc that every wheel is content with, by their tags."""
    needed = [17]
    for path in site.glob("*.dist-info/WHEEL"):
        minors = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", path.read_text())]
        if "manylinux2014" in path.read_text():
            minors.append(17)
        needed += [min(minors)] if minors else []
    return max(needed)


def make_environment(root: Path, python: str) -> Path:
    """Lay out the environment, without its packages; gives the folder for those."""
    home = root / HOME
    site = home / "lib" / f"python{python}" / "site-packages"
    site.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "bin" / "python3").symlink_to(f"/usr/bin/python{python}")
    (home / "bin" / "whimbrel-device").write_text(START)
    (home / "bin" / "whimbrel-device").chmod(0o755)
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n"
    )
    return site


def copy_files(root: Path) -> None:
    """What stands outside of the environment."""
    for source, target in {
        DEPLOY / "whimbrel-device.service": "usr/lib/systemd/system/whimbrel-device.service",
        DEPLOY / "device.toml": "etc/whimbrel/device.toml",
        DEPLOY / "debian" / "copyright": "usr/share/doc/whimbrel-device/copyright",
        **{ROOT / source: f"usr/share/doc/whimbrel-device/{name}" for source, name in DOCUMENTS.items()},
    }.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root / target)
    (root / "etc" / "whimbrel" / "device.d").mkdir()
    (root / "usr" / "bin").mkdir()
    (root / "usr" / "bin" / "whimbrel-device").symlink_to(f"/{HOME}/bin/whimbrel-device")


def write_control(root: Path, version: str, architecture: str, python: str, glibc: int) -> None:
    """The package's own description, its scripts, and the digests of its files."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    folder = root / "DEBIAN"
    folder.mkdir()
    fields = {
        "version": version,
        "architecture": architecture,
        "python": python,
        "glibc": f"2.{glibc}",
        "installed_kb": str(sum(-(-path.stat().st_size // 1024) for path in files)),
    }
    (folder / "control").write_text((DEPLOY / "debian" / "control").read_text().format(**fields))
    shutil.copyfile(DEPLOY / "debian" / "conffiles", folder / "conffiles")
    for name in ("postinst", "prerm", "postrm"):
        shutil.copyfile(DEPLOY / "debian" / name, folder / name)
        (folder / name).chmod(0o755)
    digests = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files)  # noqa: S324 - dpkg's format
    (folder / "md5sums").write_text("".join(digests))
    for path in root.rglob("*"):
        if not path.is_symlink():
            is_program = path.is_dir() or path.parent.name in {"DEBIAN", "bin"}
            path.chmod(
                0o755 if is_program and path.name not in {"control", "conffiles", "md5sums"} else 0o644
            )


def write_sums(folder: Path) -> None:
    """SHA256SUMS of everything that a device may fetch."""
    names = sorted([*folder.glob("*.deb"), folder / "install.sh"])
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def package(folder: Path, architecture: str, python: str) -> Path:
    """Build one package; gives its path."""
    machine = MACHINES[architecture]
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch), f"{machine}-linux-gnu.2.17")
        check(wheel)
        (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
        version = metadata.split("-")[1].removesuffix(".dist")
        version = f"{version}+py{python.replace('.', '')}"
        root = Path(scratch) / "root"
        site = make_environment(root, python)
        install_wheels(site, wheel, machine, python)
        copy_files(root)
        write_control(root, version, architecture, python, glibc_needed(site))
        made = Path(scratch) / f"whimbrel-device_{version}_{architecture}.deb"
        run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", root, made, SOURCE_DATE_EPOCH=epoch)
        for old in folder.glob(f"whimbrel-device_*+py{python.replace('.', '')}_{architecture}.deb"):
            old.unlink()
        return Path(shutil.move(made, folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.deb", description="Build Debian packages of the agent."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", action="append", choices=MACHINES, help="default: both")
    parser.add_argument("--python", action="append", choices=GLIBC, help="default: 3.11, that of Debian 12")
    arguments = parser.parse_args()
    if shutil.which("dpkg-deb") is None:
        raise SystemExit("whimbrel: dpkg-deb is missing (apt-get install dpkg)")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for architecture in arguments.arch or MACHINES:
        for python in arguments.python or ["3.11"]:
            path = package(arguments.folder, architecture, python)
            print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
    shutil.copyfile(DEPLOY / "install.sh", arguments.folder / "install.sh")
    write_sums(arguments.folder)


if __name__ == "__main__":
    main()
