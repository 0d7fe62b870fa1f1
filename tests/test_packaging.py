"""The distribution as a user gets it: built, installed with pip into an environment of its own, looked at."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import protocol

ROOT = Path(__file__).parent.parent
SERVER_ONLY = {"sqlalchemy", "matplotlib", "jinja2", "rich", "scikit-learn", "onnx", "gguf", "pytest"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"protocol", "device", "server", "simulator"}
    assert not [name for name in names if "test" in name.lower()]
    assert "protocol/py.typed" in names


def test_protocol_is_ours() -> None:
    assert Path(protocol.__file__).parent == ROOT / "protocol"


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
