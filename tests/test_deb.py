"""The Debian package, the unit and the installer, with the real dpkg-deb, systemd-analyze and sh."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from device.adapters.doctor import SERVICE_FOLDER, SERVICE_USER
from device.config import load_config
from tools import deb

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "whimbrel-device.service").read_text()
LOCK = (ROOT / "locks" / "device.lock").read_text()
EXPOSURE_MAX = 20  # tenths; systemd calls up to 2.0 "OK"

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def run(*command: str | Path, code: int = 0) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package without the wheels that it would carry: they take minutes to be fetched and packed."""
    folder = tmp_path_factory.mktemp("deb")
    root = folder / "root"
    site = deb.make_environment(root, "3.11")
    shutil.copytree(ROOT / "device", site / "device", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "some-1.0.dist-info").mkdir()
    (site / "some-1.0.dist-info" / "WHEEL").write_text(
        "Tag: cp311-cp311-manylinux_2_27_x86_64\nTag: cp311-cp311-manylinux_2_28_x86_64\n"
    )
    deb.copy_files(root)
    deb.write_control(root, "1.2.3+py311", "arm64", "3.11", deb.glibc_needed(site))
    result = folder / "package.deb"
    run("dpkg-deb", "--root-owner-group", "--build", root, result)
    return result


@needs_dpkg
def test_the_package_says_what_it_is_and_needs(package: Path) -> None:
    shown = run("dpkg-deb", "--field", package)
    for line in (
        "Package: whimbrel-device",
        "Version: 1.2.3+py311",
        "Architecture: arm64",
        "Depends: python3.11, libc6 (>= 2.27), libstdc++6, adduser",
    ):
        assert line in shown.splitlines()


@needs_dpkg
def test_the_package_brings_its_files_to_their_places_and_nothing_is_writable(
    package: Path, tmp_path: Path
) -> None:
    listed = [line.split() for line in run("dpkg-deb", "--contents", package).splitlines()]
    names = {fields[5] for fields in listed}
    assert {
        "./usr/lib/systemd/system/whimbrel-device.service",
        "./etc/whimbrel/device.toml",
        "./etc/whimbrel/device.d/",
        "./usr/bin/whimbrel-device",
        "./usr/share/doc/whimbrel-device/device.md",
        "./usr/share/doc/whimbrel-device/copyright",
    } <= names
    for fields in listed:
        assert fields[1] == "root/root"
        assert fields[0][0] == "l" or fields[0][5] + fields[0][8] == "--", fields
    run("dpkg-deb", "--raw-extract", package, tmp_path / "all")
    for line in (tmp_path / "all" / "DEBIAN" / "md5sums").read_text().splitlines():
        digest, name = line.split("  ")
        assert run("md5sum", tmp_path / "all" / name).split()[0] == digest
    assert os.access(tmp_path / "all" / "usr" / "lib" / "whimbrel" / "bin" / "whimbrel-device", os.X_OK)
    for name in ("postinst", "prerm", "postrm"):
        assert os.access(tmp_path / "all" / "DEBIAN" / name, os.X_OK)
        run("sh", "-n", tmp_path / "all" / "DEBIAN" / name)


@needs_systemd
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "whimbrel-device.service"
    unit.write_text(UNIT.replace("/usr/lib/whimbrel/bin/whimbrel-device", sys.executable))
    assert run("systemd-analyze", "verify", "--man=no", unit) == ""
    unit.write_text(UNIT.replace("Type=notify", "Type=notify\nNonsense=yes"))
    assert (
        "Nonsense"
        in subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
        ).stderr
    )


@needs_systemd
def test_the_sandbox_is_as_tight_as_it_says(tmp_path: Path) -> None:
    unit = tmp_path / "whimbrel-device.service"
    unit.write_text(UNIT)
    if "--offline" not in run("systemd-analyze", "--help"):
        pytest.skip("systemd is older than 250")
    run("systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", "--no-pager", unit)


def test_unit_configuration_package_and_doctor_mean_the_same_places(tmp_path: Path) -> None:
    fields = dict(re.findall(r"^(\w+)=(.*)$", UNIT, re.MULTILINE))
    assert fields["ExecStart"].split()[0] == f"/{deb.HOME}/bin/whimbrel-device"
    assert fields["User"] == SERVICE_USER
    assert (fields["StateDirectory"], fields["RuntimeDirectory"]) == ("whimbrel", "whimbrel")
    assert fields["ConditionPathExists"] == f"{SERVICE_FOLDER}/root.json"
    shutil.copy(DEPLOY / "device.toml", tmp_path / "device.toml")
    (tmp_path / "device.d").mkdir()
    example = re.findall(r"^#   (\w+ = .*)$", (DEPLOY / "device.toml").read_text(), re.MULTILINE)
    (tmp_path / "device.d" / "50-local.toml").write_text("\n".join(example))
    config = load_config(tmp_path / "device.toml")
    assert config.folder == SERVICE_FOLDER
    assert config.control == Path("/run/whimbrel/shelf-7.sock")


@pytest.mark.parametrize(
    ("python", "numpy"), [("3.11", "numpy==2.4"), ("3.12", "numpy==2.5"), ("3.13", "numpy==2.5")]
)
def test_the_wheels_are_those_that_the_lock_file_pins_for_a_python(python: str, numpy: str) -> None:
    chosen = deb.requirements(LOCK, "aarch64", python)
    pinned = re.findall(r"^(\S+) \\$", chosen, re.MULTILINE)
    assert next(name for name in pinned if name.startswith("numpy==")).startswith(numpy)
    assert len(pinned) == len({name.partition("==")[0] for name in pinned}) > 12
    assert chosen.count("--hash=sha256:") >= len(pinned)
    assert ";" not in chosen


def test_a_device_gets_what_development_tests() -> None:
    def pins(lock: str) -> set[str]:
        return set(re.findall(r"^(\S+==[^\s;]+)", lock, re.MULTILINE))

    assert pins(LOCK) <= pins((ROOT / "locks" / "dev.lock").read_text())


# --- install.sh --------------------------------------------------------------------------------------------

INSTALL = DEPLOY / "install.sh"
needs_root_and_dpkg = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("dpkg") is None, reason="the installer needs root and dpkg"
)


def offered(folder: Path, name: str, digest: str = "0" * 64) -> Path:
    folder.mkdir()
    (folder / "SHA256SUMS").write_text(f"{digest}  {name}\n")
    (folder / name).write_bytes(b"no package")
    return folder


def test_the_installer_is_plain_sh_and_explains_itself() -> None:
    run("sh", "-n", INSTALL)
    assert "--from DIRECTORY_OR_URL" in run("sh", INSTALL, "--help")
    assert "unknown option --frm" in run("sh", INSTALL, "--frm", "x", code=1)
    assert "--from needs a value" in run("sh", INSTALL, "--from", code=1)
    assert "say where the packages are" in run("sh", INSTALL, code=1)


@needs_root_and_dpkg
def test_the_installer_refuses_what_it_cannot_check_or_does_not_fit(tmp_path: Path) -> None:
    architecture = run("dpkg", "--print-architecture").strip()
    name = f"whimbrel-device_1.0+py311_{architecture}.deb"
    folder = offered(tmp_path / "damaged", name)
    assert "is damaged or another one" in run("sh", INSTALL, "--from", folder, code=1)
    digest = run("sha256sum", folder / name).split()[0]
    (folder / "SHA256SUMS").write_text(f"{digest}  {name}\n")
    assert "is damaged or another one" in run("sh", INSTALL, "--from", folder, "--sha256", "1" * 64, code=1)
    other = offered(tmp_path / "other", "whimbrel-device_1.0+py311_riscv64.deb")
    assert "has no package for" in run("sh", INSTALL, "--from", other, code=1)
    assert "SHA256SUMS is missing" in run("sh", INSTALL, "--from", tmp_path / "nowhere", code=1)
    assert "has no release.json" in run("sh", INSTALL, "--from", folder, "--factory", tmp_path, code=1)
    assert "together" in run("sh", INSTALL, "--from", folder, "--device", "pi", code=1)
    lost = tmp_path / "lost.claim"
    assert "whimbrel devices claim" in run("sh", INSTALL, "--from", folder, "--claim", lost, code=1)
    words = ["--device", 'a"b', "--fleet", "f", "--family", "f", "--broker", "b:1"]
    assert "has characters that no name" in run("sh", INSTALL, "--from", folder, *words, code=1)
    assert not Path("/etc/whimbrel/device.d/50-local.toml").exists()
