"""The distribution as a user gets it: built, installed with pip into an environment of its own, looked at."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import protocol

ROOT = Path(__file__).parent.parent
SERVER_ONLY = {"sqlalchemy", "matplotlib", "jinja2", "rich", "scikit-learn", "onnx", "gguf", "pytest"}


LIBRARY = "protocol/delta/native/libwhimbrel_delta.so"
VECTOR = ROOT / "tests" / "vectors" / "delta" / "q4_0.json"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def build(folder: Path, *options: str, **environment: str) -> tuple[Path, str]:
    """What the build left in the folder, and what it said."""
    run = subprocess.run(
        [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    (result,) = folder.iterdir()
    return result, run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"), "--wheel")[0]


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pure"), "--wheel", WHIMBREL_TARGET="pure")[0]


def applied(wheel: Path, folder: Path) -> tuple[bool, str]:
    """Install the wheel where no compiler can be found, and apply a golden vector with it.

    Gives whether the library was used, and the digest of the result.
    """
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": "", "CC": ""},
    )
    program = f"""
import hashlib, json, pathlib, protocol
from protocol.delta.native import library
from protocol.delta.reader import DeltaReader
from protocol.tensors import BytesSource
assert pathlib.Path(protocol.__file__).is_relative_to({str(folder)!r})
vector = json.loads(pathlib.Path({str(VECTOR)!r}).read_text())
reader = DeltaReader(BytesSource(bytes.fromhex(vector["base"])))
result = b"".join(piece.data for piece in reader.feed(bytes.fromhex(vector["delta"])))
reader.finish()
print(json.dumps([library() is not None, hashlib.sha256(result).hexdigest()]))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "", "PYTHONPATH": str(folder), "WHIMBREL_NATIVE": "1"},
    )
    is_native, digest = json.loads(run.stdout)
    return is_native, digest


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"protocol", "device", "server", "simulator"}
    assert not [name for name in names if "test" in name.lower()]
    assert {"protocol/py.typed", "simulator/scenarios/release.toml"} <= set(names)


def test_protocol_is_ours() -> None:
    assert Path(protocol.__file__).parent == ROOT / "protocol"


@needs_compiler
def test_a_wheel_has_the_library_and_the_tag_of_its_platform(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith((".so", ".c", ".h"))] == [LIBRARY]
    assert "-py3-none-linux_" in wheel.name
    metadata = next(name for name in names if name.endswith(".dist-info/WHEEL"))
    assert b"Root-Is-Purelib: false" in zipfile.ZipFile(wheel).read(metadata)


@needs_compiler
def test_building_a_wheel_leaves_the_library_of_the_working_tree_alone(tmp_path: Path) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (ROOT / LIBRARY).parent.iterdir() if path.is_file()}

    before = files()
    build(tmp_path, "--wheel")
    assert files() == before


@needs_compiler
def test_a_wheel_needs_no_compiler_to_be_installed_and_used(wheel: Path, tmp_path: Path) -> None:
    expected = json.loads(VECTOR.read_text())["result_sha256"]
    assert applied(wheel, tmp_path) == (True, expected)


def test_a_pure_wheel_has_no_library_and_gives_the_same_result(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith((".so", ".c", ".h"))]
    expected = json.loads(VECTOR.read_text())["result_sha256"]
    assert applied(pure_wheel, tmp_path) == (False, expected)


def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_so(tmp_path: Path) -> None:
    wheel, said = build(tmp_path, "--wheel", PATH="", CC="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert len([line for line in said.splitlines() if "no C compiler" in line]) == 1


def test_the_source_distribution_carries_the_c_sources_and_what_compiles_them(tmp_path: Path) -> None:
    sdist, _ = build(tmp_path, "--sdist")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / LIBRARY).parent.glob("*.[ch]")}
    assert sources
    assert sources | {"hatch_build.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
def test_the_device_extra_brings_nothing_that_only_the_server_needs(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"{wheel}[device]"], check=True, capture_output=True)
    listed = subprocess.run(
        [*pip, "list", "--format=json"], check=True, capture_output=True, text=True
    ).stdout
    installed = {package["name"].lower() for package in json.loads(listed)}
    assert "paho-mqtt" in installed
    assert "transitions" in installed
    assert not installed & SERVER_ONLY
    run = subprocess.run(
        [python.parent / "whimbrel-device", "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "provision" in run.stdout
