"""Somebody whose key is on a token signs for targets, by the commands of docs/keys.md; a device believes it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from protocol.trust import Floors, verify
from server.adapters.clock import SystemClock
from server.cli import main
from server.home import opened
from server.operations import init_repository

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "1234"


@pytest.fixture
def public_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The public key of one that was made on a token labelled `ana`."""
    assert MODULE.exists(), "install SoftHSM: apt install softhsm2 opensc"
    (tmp_path / "tokens").mkdir()
    config = tmp_path / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(config))
    monkeypatch.setenv("PYKCS11LIB", str(MODULE))
    run("softhsm2-util", "--init-token", "--free", "--label", "ana", "--pin", PIN, "--so-pin", "56789")
    tool = ("pkcs11-tool", "--module", str(MODULE), "--token-label", "ana")
    run(*tool, "--login", "--pin", PIN, "--keypairgen", "--key-type", "EC:prime256v1", "--id", "02")
    run(*tool, "--read-object", "--type", "pubkey", "--id", "02", "-o", str(tmp_path / "ana.der"))
    run(
        "openssl",
        "ec",
        "-pubin",
        "-inform",
        "DER",
        "-in",
        str(tmp_path / "ana.der"),
        "-out",
        str(tmp_path / "ana.pub"),
    )
    return tmp_path / "ana.pub"


def test_a_key_on_a_token_signs_and_devices_believe_it(
    tmp_path: Path, public_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "fleet"
    root = init_repository(home, "lab").read_bytes()
    assert main(["keys", "rotate", "targets", str(public_key), "--dir", str(home)]) == 0
    pin = tmp_path / "pin"
    sign = [
        "keys",
        "sign",
        "--key",
        "hsm:2?label=ana",
        "--public",
        str(public_key),
        "--passphrase-file",
        str(pin),
    ]
    pin.write_text("4321\n")
    assert main([*sign, "--dir", str(home)]) == 1
    assert "ana cannot sign" in capsys.readouterr().err
    pin.write_text(f"{PIN}\n")
    assert main([*sign, "--dir", str(home)]) == 0
    assert "Published" in capsys.readouterr().out
    with opened(home) as opened_home:
        repository = opened_home.store.repository()
    assert repository is not None
    documents = replace(repository.documents, roots=repository.roots[1:])
    verified = verify(root, documents, Floors(), SystemClock().now_ms())
    assert (verified.floors.root, verified.floors.targets) == (2, 2)


def run(*command: str) -> None:
    assert shutil.which(command[0]), f"install {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
