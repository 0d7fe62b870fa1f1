"""The `whimbrel` command from end to end, each time as a person would type it."""

import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.errors import RequestError
from protocol.trust import check_root
from server import operations
from server.cli import main
from server.config import ServerConfig, config_text, parse_broker, read_config
from tests.server.brokers import wait_until
from tests.server.samples import publish_models, write_health, write_model

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in the folder `server`; returns its JSON, or its error line when it fails with `code`."""
    monkeypatch.setenv("WHIMBREL_DIR", str(tmp_path / "server"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"] if code == 0 else words) == code
        out, err = capsys.readouterr()
        if code == 0:
            assert err == ""
            return json.loads(out)
        if code == 1:
            assert err.startswith("whimbrel: ")
            assert err.count("\n") == 1
            assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A model and its health plan."""
    return str(write_model(tmp_path / "m.onnx", 1)), str(write_health(tmp_path / "h.json"))


def test_a_release_goes_from_a_file_to_a_rollout(run: Run, files: tuple[str, str], tmp_path: Path) -> None:
    model, health = files
    made = run("init", "server", "--fleet", "lab")
    assert check_root(Path(made["root"]).read_bytes()) == 1
    added = run(
        "release", "add", "digits", "1.0", model, "--runtime", "onnx", "--health", health,
        "--memory-bytes", "1000", "--tier", "small", "--tier", "large", "--runtime-version-min", "1.20",
    )  # fmt: skip
    assert added["published_ms"] is None
    assert added["release"]["resources"] == {"memory_bytes": 1000, "tiers": ["small", "large"]}
    assert run("release", "publish", "digits", "1.0")["published_ms"] > 0
    (listed,) = run("release", "list")
    assert listed["release"]["files"][0]["length"] == Path(model).stat().st_size
    started = run(
        "rollout", "start", "digits", "1.0", "--canary", "3", "--wave-timeout", "60", "--max-failures", "1"
    )
    assert (started["id"], started["wave_timeout_ms"], started["is_served"]) == ("r1", 60_000, False)
    assert run("rollout", "status", "r1")["state"] == "created"
    assert [rollout["id"] for rollout in run("rollout", "list")] == ["r1"]
    assert run("rollout", "status") == run("rollout", "list")
    assert run("devices") == []
    metadata = tmp_path / "server/metadata"
    assert list(json.loads((metadata / "releases.digits.json").read_bytes())["signed"]["targets"]) == [
        "releases/digits/1.0.json"
    ]
    assert json.loads((metadata / "targets.json").read_bytes())["signed"]["targets"] == {}


@pytest.mark.usefixtures("run")
def test_every_command_prints_for_people_too(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, health = files
    texts = {}
    for words in (
        ["init", "server"],
        ["release", "list"],
        ["rollout", "list"],
        ["devices"],
        ["release", "add", "digits", "1", model, "--runtime", "onnx", "--health", health],
        ["release", "publish", "digits", "1"],
        ["rollout", "start", "digits", "1"],
        ["release", "list"],
        ["rollout", "status"],
        ["rollout", "status", "r1"],
    ):
        assert main(words) == 0
        texts[" ".join(words[:2])] = capsys.readouterr().out
    assert "1.root.json" in texts["init server"]
    assert "takes effect once `whimbrel serve` does" in texts["rollout start"]
    assert "published 20" in texts["release list"]
    assert "created" in texts["rollout status"]
    assert texts["devices"] == "No device has reported yet\n"


def test_init_never_overwrites(run: Run, tmp_path: Path) -> None:
    run("init", "server")
    before = (tmp_path / "server/keys/targets.pem").read_bytes()
    assert "holds a repository already" in run("init", "server", code=1)
    assert (tmp_path / "server/keys/targets.pem").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert "not empty" in run("init", "other", code=1)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "words",
    [
        ["--fleet", "Not A Name"],
        ["--broker", "nowhere"],
        ["--broker", "host:99999"],
        ["--database", "mysql://host/db"],
    ],
)
def test_a_wrong_setting_leaves_no_folder_behind(run: Run, tmp_path: Path, words: list[str]) -> None:
    run("init", "server", *words, code=1)
    assert not (tmp_path / "server").exists()


def test_commands_without_a_repository_say_what_to_do(run: Run, files: tuple[str, str]) -> None:
    model, health = files
    for words in (
        ["release", "list"],
        ["release", "add", "digits", "1", model, "--runtime", "onnx", "--health", health],
        ["rollout", "start", "digits", "1"],
        ["devices"],
        ["delta", "graph"],
        ["serve"],
    ):
        assert "whimbrel init" in run(*words, code=1)


def test_a_file_that_is_not_what_it_says_is_refused(run: Run, files: tuple[str, str], tmp_path: Path) -> None:
    model, health = files
    run("init", "server")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(1000))
    (tmp_path / "short").write_bytes(Path(model).read_bytes()[:-1000])
    (tmp_path / "bad.json").write_text('{"prompts": []}')

    def add(path: str, runtime: str = "onnx", plan: str = health, name: str = "digits") -> str:
        words = ["release", "add", name, "1", path, "--runtime", runtime, "--health", plan]
        return str(run(*words, code=1))

    for name in ("empty", "noise", "short", "missing", "."):
        assert name in add(str(tmp_path / name)) or name == "."
    assert "bad.json" in add(model, plan=str(tmp_path / "bad.json"))
    assert "missing.json" in add(model, plan="missing.json")
    text = {"kind": "text", "name": "hello", "prompt": "a", "completion": "b", "logprob_mean_min": -1.0}
    (tmp_path / "text.json").write_text(
        json.dumps(json.loads(Path(health).read_text()) | {"prompts": [text]})
    )
    assert "'hello'" in add(model, plan=str(tmp_path / "text.json"))
    assert "GGUF" in add(model, runtime="llama", plan=str(tmp_path / "text.json"))
    assert "lower-case" in add(model, name="Digits")
    two = ["release", "add", "digits", "1", model, model, "--runtime", "onnx", "--health", health]
    assert "one name" in run(*two, code=1)
    assert run("release", "list") == []
    assert [path for path in (tmp_path / "server/blobs").rglob("*") if path.is_file()] == []


def test_a_release_is_published_once(run: Run, files: tuple[str, str]) -> None:
    model, health = files
    add = ["release", "add", "digits", "1", model, "--runtime", "onnx", "--health", health]
    run("init", "server")
    run(*add)
    run(*add)
    run("release", "publish", "digits", "1")
    assert "is published" in run(*add, code=1)
    assert "is published" in run("release", "publish", "digits", "1", code=1)


def test_unknown_names_are_told_apart(run: Run, files: tuple[str, str]) -> None:
    model, health = files
    run("init", "server")
    assert "no model family digits" in run("release", "publish", "digits", "1", code=1)
    run("release", "add", "digits", "1", model, "--runtime", "onnx", "--health", health)
    assert "digits has no version 2" in run("release", "publish", "digits", "2", code=1)
    assert "known are digits" in run("rollout", "start", "letters", "1", code=1)
    assert "release publish digits 1" in run("rollout", "start", "digits", "1", code=1)
    assert "no rollout 'r9'" in run("rollout", "status", "r9", code=1)


def test_a_family_has_one_rollout_at_a_time(run: Run, tmp_path: Path) -> None:
    publish_models(tmp_path, {"1": 1, "2": 2})
    run("rollout", "start", "digits", "1")
    assert "r1 of digits 1 is under way" in run("rollout", "start", "digits", "2", code=1)


def test_a_missing_or_damaged_key_is_named(run: Run, files: tuple[str, str], tmp_path: Path) -> None:
    model, health = files
    run("init", "server")
    run("release", "add", "digits", "1", model, "--runtime", "onnx", "--health", health)
    key = tmp_path / "server/keys/snapshot.pem"
    pem = key.read_bytes()
    key.unlink()
    assert "role snapshot is missing" in run("release", "publish", "digits", "1", code=1)
    key.write_bytes(b"nonsense")
    assert "key snapshot cannot be read" in run("release", "publish", "digits", "1", code=1)
    assert run("release", "list")[0]["published_ms"] is None
    key.write_bytes(pem)
    run("release", "publish", "digits", "1")


def test_a_blob_that_was_damaged_is_not_signed(run: Run, files: tuple[str, str], tmp_path: Path) -> None:
    model, health = files
    run("init", "server")
    run("release", "add", "digits", "1", model, "--runtime", "onnx", "--health", health)
    digest = run("release", "list")[0]["release"]["files"][0]["sha256"]
    blob = tmp_path / "server/blobs" / digest[:2] / digest
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert "damaged" in run("release", "publish", "digits", "1", code=1)
    assert run("release", "list")[0]["published_ms"] is None


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["release"],
        ["rollout", "start", "digits"],
        ["rollout", "start", "digits", "1", "--canary", "0"],
        ["rollout", "start", "digits", "1", "--max-failures", "x"],
        ["serve", "--port", "70000"],
        ["fly"],
    ],
)
def test_wrong_usage_ends_with_2(run: Run, words: list[str]) -> None:
    assert "usage: whimbrel" in run(*words, code=2)


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("init", "release", "rollout", "devices", "serve", "delta"):
        assert command in text


def test_settings_survive_being_written(tmp_path: Path) -> None:
    made = operations.init_repository(tmp_path / "a", "lab", broker="[::1]:1884", port=7)
    config = read_config(made.parents[1])
    assert (config.fleet, config.broker, config.port) == ("lab", "[::1]:1884", 7)
    assert config.address == ("::1", 1884)
    changed = msgspec.structs.replace(
        config, retained_bytes_max=1 << 20, database="sqlite:///x", delta_workers=3
    )
    (config.folder / "whimbrel.toml").write_text(config_text(changed))
    assert read_config(config.folder) == changed


@pytest.mark.parametrize(
    "text", ["fleet = 1", "fleet = 'lab'\nport = -1", "fleet = 'lab'\ncolour = 1", "= ="]
)
def test_a_wrong_settings_file_is_named(run: Run, tmp_path: Path, text: str) -> None:
    run("init", "server")
    (tmp_path / "server/whimbrel.toml").write_text(text)
    assert "whimbrel.toml" in run("devices", code=1)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:x", "host:65536"])
def test_a_broker_setting_is_checked(text: str) -> None:
    with pytest.raises(RequestError):
        parse_broker(text)


def test_a_port_in_use_is_named(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run("init", "server", "--port", port)
        assert port in run("serve", code=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_listens_and_ends_cleanly(run: Run, tmp_path: Path, number: int) -> None:
    run("init", "server", "--port", "0")
    command = [sys.executable, "-m", "server.cli", "serve", "--dir", str(tmp_path / "server"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            said = json.loads(serving.stdout.readline())
            with socket.create_connection((said["host"], said["port"]), timeout=5):
                pass
            assert operations.is_served(tmp_path / "server")
            assert "another server" in run("serve", code=1)
            serving.send_signal(number)
            out, err = serving.communicate(timeout=20)
        finally:
            serving.kill()
    assert (serving.returncode, out, err) == (0, "", "")
    assert not operations.is_served(tmp_path / "server")


def test_a_broker_that_is_not_there_is_one_line_and_the_server_keeps_trying(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run("init", "server", "--broker", f"127.0.0.1:{port}")
    command = [sys.executable, "-m", "server.cli", "serve", "--dir", str(tmp_path / "server")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stderr is not None
            assert f"127.0.0.1:{port}" in serving.stderr.readline()
            assert serving.poll() is None
            with socket.create_server(("127.0.0.1", port)) as late:
                late.settimeout(20)
                late.accept()[0].close()
            serving.send_signal(signal.SIGTERM)
            _, err = serving.communicate(timeout=30)
        finally:
            serving.kill()
    assert serving.returncode == 0
    assert "Traceback" not in err


def test_a_reader_that_has_enough_is_no_error(run: Run) -> None:
    run("init", "server")
    command = [sys.executable, "-m", "server.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as helping:
        assert helping.stdout is not None
        helping.stdout.close()
        assert helping.stderr is not None
        assert helping.stderr.read() == b""
    assert wait_until(lambda: helping.returncode is not None)


def test_plain_calls_do_what_the_commands_do(tmp_path: Path) -> None:
    publish_models(tmp_path, {"1": 1})
    home = tmp_path / "server"
    record = operations.start_rollout(home, "digits", "1")
    assert operations.rollout_status(home, record.id).rollout == record
    assert [status.rollout for status in operations.list_rollouts(home)] == [record]
    assert operations.list_devices(home) == []
    assert isinstance(read_config(home), ServerConfig)
    with pytest.raises(RequestError):
        operations.start_rollout(home, "digits", "1", canary_count=0)
