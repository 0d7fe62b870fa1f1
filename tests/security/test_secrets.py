"""Private keys and passwords stay where they belong: whatever is logged, printed or reported, at every level of detail."""

import base64
import logging
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from device.config import load_config
from device.states import State
from protocol.errors import RequestError
from server import operations
from server.cli import main
from server.display import address_text
from server.home import KEYS_FOLDER
from server.operations import rollout_status, start_rollout
from tests.device.test_runtime import Lab, version_of
from tests.server.samples import write_health, write_model

PASSWORD = "hunter2-and-more"
_LETTERS_MIN = 20  # shorter pieces of base64 are found in anything


def private_keys(folder: Path) -> list[Path]:
    """Files that hold a private key, of whatever kind."""
    return [
        path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()[:200]
    ]


def spellings(pem: bytes) -> set[str]:
    """How a private key could be written down: lines of its file, and its bytes in the usual ways."""
    lines = {
        line for line in pem.decode().splitlines() if not line.startswith("-") and len(line) >= _LETTERS_MIN
    }
    key = load_pem_private_key(pem, None)
    raw = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return lines | {
        raw.hex(),
        base64.b64encode(raw).decode(),
        base64.urlsafe_b64encode(raw).decode(),
        repr(raw)[2:-1],
    }


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All loggers of the process, libraries too, at their most talkative."""
    caplog.set_level(logging.DEBUG)
    return caplog


def _said(log: pytest.LogCaptureFixture, capture: pytest.CaptureFixture[str]) -> str:
    out, err = capture.readouterr()
    return f"{log.text}\n{out}\n{err}"


def test_an_update_from_the_key_to_the_trial_tells_no_key(
    tmp_path: Path, everything: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path, "embedded")
    try:
        device = lab.start(lab.provision("device-0"), 0)
        lab.wait(lambda: device.transport.is_connected and device.executor.model is not None)
        for version, shift, state in (("v2", 0, State.IDLE), ("v3", 1, State.ROLLED_BACK)):
            lab.publish(version, seed=int(version[1]), shift=shift)
            rollout = start_rollout(lab.server_folder, "digits", version, canary_count=1)
            lab.wait(
                lambda rollout=rollout: (
                    rollout_status(lab.server_folder, rollout.id).rollout.state.value  # type: ignore[misc]  # bound now
                    in {"finished", "stopped"}
                )
            )
            assert device.agent.state is state
        assert version_of(device) == "v2"
    finally:
        lab.close()
    said = _said(everything, capfd)
    assert "trial confined" in said
    keys = private_keys(tmp_path)
    assert len(keys) >= len(list((lab.server_folder / KEYS_FOLDER).iterdir())) > 0
    for path in keys:
        found = [text for text in spellings(path.read_bytes()) if text in said]
        assert not found, f"{path.name} was told"
    # What devices report, and what they are told, is in these as well.
    trace = (lab.folder / "device-0.trace").read_text()
    for path in keys:
        assert not any(text in trace for text in spellings(path.read_bytes()))


@pytest.mark.parametrize("damage", ["cut", "other kind", "two keys", "not PEM"])
def test_a_key_that_cannot_be_used_is_named_and_not_shown(
    tmp_path: Path, everything: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab")
    path = home / KEYS_FOLDER / "targets.pem"
    pem = path.read_bytes()
    secrets = spellings(pem)
    body = pem.split(b"\n")[1]
    path.write_bytes(
        {
            "cut": pem[:-40],
            "other kind": pem.replace(b"PRIVATE KEY", b"EC PRIVATE KEY"),
            "two keys": pem.replace(body, body[::-1]) + pem,
            "not PEM": body,
        }[damage]
    )
    model, health = write_model(tmp_path / "m.onnx", 1), write_health(tmp_path / "h.json")
    operations.add_release(home, "digits", "1", [model], runtime="onnx", health=health)
    assert main(["release", "publish", "digits", "1", "--dir", str(home)]) == 1
    said = _said(everything, capsys)
    assert "key targets cannot be read" in said
    assert not [text for text in secrets | {body.decode(), body[::-1].decode()} if text in said]


def test_keys_and_what_leads_to_them_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        operations.init_repository(tmp_path / "server", "lab")
    finally:
        os.umask(before)
    keys = private_keys(tmp_path)
    assert keys
    for path in keys:
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "url",
    [
        f"nonsense://me:{PASSWORD}@host/db",
        f"postgresql://me:{PASSWORD}@127.0.0.1:1/db",
        f"postgresql://127.0.0.1:1/db?password={PASSWORD}",
        f"me:{PASSWORD}@host",
    ],
)
def test_the_password_of_a_database_is_not_told(
    tmp_path: Path, everything: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab")
    with (home / "whimbrel.toml").open("a") as file:
        file.write(f"database = '{url}'\n")
    for words in (["release", "list"], ["devices"], ["serve"]):
        assert main([*words, "--dir", str(home)]) == 1
    said = _said(everything, capsys)
    assert "database" in said
    assert PASSWORD not in said


@pytest.mark.parametrize(
    "broker",
    [f"mqtts://me:{PASSWORD}@broker", f"mqtts://me:{PASSWORD}@broker:8883", f"me:{PASSWORD}@broker:1"],
)
def test_a_password_in_an_address_of_the_broker_is_not_told(
    tmp_path: Path, everything: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], broker: str
) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab")
    assert main(["serve", "--broker", broker, "--dir", str(home)]) == 1
    settings = tmp_path / "device.toml"
    settings.write_text(
        f'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "s"\nbroker = "{broker}"\n'
    )
    with pytest.raises(RequestError) as refused:
        load_config(settings)
    assert "broker" in str(refused.value)
    assert PASSWORD not in f"{refused.value} {_said(everything, capsys)}"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql+psycopg://me:a@b?c@host:5432/db?sslmode=require", "postgresql+psycopg://host:5432/db"),
        ("sqlite:////var/lib/whimbrel/x.sqlite", "sqlite:////var/lib/whimbrel/x.sqlite"),
        ("host:1883", "host:1883"),
    ],
)
def test_addresses_are_shown_without_what_opens_them(address: str, shown: str) -> None:
    assert address_text(address) == shown
