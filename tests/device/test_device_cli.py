"""The `whimbrel-device` command from end to end, each time as a person would type it."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from device.adapters.disk import RealDisk
from device.cli import main
from device.config import load_config
from device.journal import InstallItem, Journal, UpdateRecord
from device.slots import SlotName, measure_slot
from device.states import State
from protocol.ids import digest_of
from protocol.messages import Desired
from protocol.release import InPlaceNeeds, encode_release
from server.operations import add_release, export_release, init_repository, publish_release
from tests.models import FEATURES, prompts, write_classifier, write_health_plan
from tests.server.brokers import embedded_broker, free_port, stop, wait_until

Run = Callable[..., str]
Agent = Callable[[], AbstractContextManager["subprocess.Popen[str]"]]
WAIT_S = 30.0

SETTINGS = {
    "device": "shelf-7",
    "fleet": "lab",
    "family": "digits",
    "state_folder": "state",
    "tier": "pi",
}


def write_settings(path: Path, **changes: str | int) -> Path:
    """A configuration file; a JSON string or number is a TOML value too."""
    fields = {**SETTINGS, **changes}
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()))
    return path


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command with `device.toml`; returns what it prints, or its one error line where it fails with 1."""
    monkeypatch.chdir(tmp_path)
    write_settings(tmp_path / "device.toml")

    def run(command: str, *words: object, code: int = 0, config: str = "device.toml") -> str:
        capsys.readouterr()
        assert main([command, "--config", config, *map(str, words)]) == code
        out, err = capsys.readouterr()
        if code == 0:
            assert err == ""
            return out
        assert out == ""
        assert err.startswith("whimbrel-device: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)  # `run` takes them over


@pytest.fixture
def shipped(tmp_path: Path) -> list[str]:
    """What an installer gets from the server, as the words of `provision`: description, file, start of trust."""
    server = tmp_path / "server"
    root = init_repository(server, "lab", port=0)
    model = write_classifier(tmp_path / "model.onnx", seed=1)
    health = write_health_plan(tmp_path / "health.json")
    record = add_release(server, "digits", "1.0", [model], runtime="onnx", health=health)
    description = tmp_path / "release.json"
    description.write_bytes(encode_release(record.release))
    return ["--release", str(description), "--file", str(model), "--root", str(root)]


@pytest.fixture
def agent(tmp_path: Path, run: Run, shipped: list[str]) -> Agent:
    """Starts `run` in a process of its own on a provisioned device; it is stopped by its pid in the end."""
    run("provision", *shipped)

    @contextmanager
    def started() -> Iterator["subprocess.Popen[str]"]:
        trace = tmp_path / "trace.jsonl"
        boots = count_boots(trace)
        process = subprocess.Popen(
            [sys.executable, "-m", "device.cli", "run", "--config", "device.toml", "--trace", trace.name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        try:
            assert wait_until(lambda: process.poll() is not None or count_boots(trace) > boots, WAIT_S)
            yield process
        finally:
            stop(process)

    return started


def count_boots(trace: Path) -> int:
    return trace.read_text().count('"kind": "boot"') if trace.exists() else 0


def test_a_device_is_provisioned_looked_at_and_asked(run: Run, shipped: list[str], tmp_path: Path) -> None:
    assert run("provision", *shipped) == "shelf-7 is provisioned with digits 1.0\n"
    shown = run("status")
    assert "shelf-7" in shown
    assert "1.0" in shown
    assert "good" in shown
    question = tmp_path / "question.json"
    for prompt in prompts():
        question.write_text(json.dumps(prompt.input))
        assert run("infer", "--input", question) == f"{prompt.label}\n"


def test_an_exported_release_is_all_that_an_installer_needs(
    run: Run, shipped: list[str], tmp_path: Path
) -> None:
    del shipped
    publish_release(tmp_path / "server", "digits", "1.0")
    export_release(tmp_path / "server", "digits", "1.0", tmp_path / "factory")
    assert run("provision", "--from", "factory") == "shelf-7 is provisioned with digits 1.0\n"
    assert json.loads(run("status", "--json"))["slots"]["a"]["version"] == "1.0"


def test_a_folder_that_is_no_export_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty/release.json: No such file" in run("provision", "--from", "empty", code=1)


def test_the_status_for_programs_says_the_same(run: Run, shipped: list[str], tmp_path: Path) -> None:
    run("provision", *shipped)
    shown = json.loads(run("status", "--json"))
    assert shown["device"] == "shelf-7"
    assert shown["state"] == "idle"
    assert shown["active"] == "a"
    assert shown["update"] is None
    config = load_config(tmp_path / "device.toml")
    assert shown["slots"]["a"]["files"] == measure_slot(RealDisk(config.folder), SlotName.A)
    assert shown["slots"]["b"]["health"] == "empty"


def test_status_and_infer_change_nothing(run: Run, shipped: list[str], tmp_path: Path) -> None:
    run("provision", *shipped)
    question = tmp_path / "question.json"
    question.write_text(json.dumps([1.0] * FEATURES))
    before = state_of(tmp_path / "state")
    run("status")
    run("infer", "--input", question)
    assert state_of(tmp_path / "state") == before


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_provision_is_refused_and_changes_nothing(
    run: Run, shipped: list[str], tmp_path: Path
) -> None:
    run("provision", *shipped)
    before = state_of(tmp_path / "state")
    assert "this device is provisioned" in run("provision", *shipped, code=1)
    assert state_of(tmp_path / "state") == before


def test_a_file_that_is_not_the_release_is_refused_and_removed(
    run: Run, shipped: list[str], tmp_path: Path
) -> None:
    write_classifier(tmp_path / "model.onnx", seed=2)
    assert "is not the file model.onnx" in run("provision", *shipped, code=1)
    assert list((tmp_path / "state" / "slots").rglob("*.onnx")) == []
    write_classifier(tmp_path / "model.onnx", seed=1)
    run("provision", *shipped)


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--release", None, "No such file"),
        ("--release", b"{", "release description"),
        ("--release", b'{"v":1}', "release description"),
        ("--root", None, "No such file"),
        ("--root", b"no root", "root"),
        ("--file", None, "No such file"),
    ],
)
def test_a_missing_or_damaged_input_of_provision_is_named(
    run: Run, shipped: list[str], tmp_path: Path, option: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    words = shipped.copy()
    words[words.index(option) + 1] = str(path)
    assert said in run("provision", *words, code=1)
    assert "no device lives here" in run("status", code=1)


def test_a_release_whose_file_is_not_given_is_refused(run: Run, shipped: list[str]) -> None:
    place = shipped.index("--file")
    assert "model.onnx of the release is not given" in run(
        "provision", *shipped[:place], *shipped[place + 2 :], code=1
    )


@pytest.mark.parametrize("command", [("run",), ("status",), ("infer", "--prompt", "hello")])
def test_a_missing_configuration_is_named(run: Run, command: tuple[str, ...]) -> None:
    said = run(*command, code=1, config="nowhere.toml")
    assert "nowhere.toml: No such file" in said
    assert "device/README.md" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"brokr": "127.0.0.1:1883"}, "unknown field `brokr`"),
        ({"broker": "127.0.0.1"}, "broker '127.0.0.1' is not of the form host:port"),
        ({"broker": "127.0.0.1:0"}, "not of the form host:port"),
        ({"broker": "127.0.0.1:70000"}, "not of the form host:port"),
        ({"broker": ":1883"}, "not of the form host:port"),
        ({"device": "a/b"}, "a/b"),
        ({"fleet": "#"}, "#"),
        ({"memory_mb_max": 0}, "memory_mb_max"),
        ({"link_kb_per_s": 0}, "link_kb_per_s"),
        ({"processor_percent": 10_001}, "processor_percent"),
        ({"memory_mb_max": "much"}, "memory_mb_max"),
    ],
)
def test_a_wrong_setting_is_named(run: Run, tmp_path: Path, changes: dict[str, str | int], said: str) -> None:
    write_settings(tmp_path / "wrong.toml", **changes)
    shown = run("status", code=1, config="wrong.toml")
    assert "wrong.toml" in shown
    assert said in shown


_SETTINGS = b'device = "shelf-7"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'


def test_updating_in_place_is_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "chosen.toml"
    path.write_bytes(_SETTINGS)
    assert not load_config(path).agent.is_in_place
    path.write_bytes(_SETTINGS + b"[slots]\nin_place = true\n")
    assert load_config(path).agent.is_in_place


def test_a_model_that_is_being_rewritten_is_not_asked(run: Run, shipped: list[str], tmp_path: Path) -> None:
    run("provision", *shipped)
    journal = Journal(RealDisk(load_config(tmp_path / "device.toml").folder))
    record = journal.load()
    assert record is not None
    item = InstallItem(
        name="model.onnx",
        sha256=digest_of(b"new"),
        length=3,
        action="delta",
        in_place=InPlaceNeeds(base_bytes=3, reach_bytes=0, inverse_bytes=3),
    )
    desired = Desired(sequence=1, rollout="r1", family="digits", version="2.0")
    update = UpdateRecord(desired=desired, started_ms=0, items=(item,))
    journal.save(replace(record, state=State.INSTALLING, update=update))
    said = run("infer", "--prompt", "Hello", code=1)
    assert "is being rewritten in place, in state installing" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "missing required field"),
        (b'device = "shelf-7', "wrong.toml"),
        (b"\xff\xfe", "wrong.toml"),
        (b"device = 1\nfleet = 1\nfamily = 1\nstate_folder = 1\n", "device"),
        (_SETTINGS + b'[slots]\nin_place = "yes"\n', "Expected `bool`, got `str` - at `$.slots.in_place`"),
        (_SETTINGS + b"[slots]\ninplace = true\n", "unknown field `inplace` - at `$.slots`"),
    ],
)
def test_a_configuration_that_is_none_is_refused(run: Run, tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "wrong.toml").write_bytes(text)
    assert said in run("status", code=1, config="wrong.toml")


def test_an_empty_folder_is_no_device(run: Run) -> None:
    assert "no device lives here (run whimbrel-device provision)" in run("status", code=1)
    assert "no device lives here" in run("infer", "--prompt", "hello", code=1)


def test_an_agent_that_was_never_provisioned_does_not_run(run: Run) -> None:
    assert "root.json is missing (provision the device" in run("run", code=1)


def test_a_damaged_record_is_reported_and_never_written_over(
    run: Run, shipped: list[str], tmp_path: Path
) -> None:
    run("provision", *shipped)
    for path in (tmp_path / "state").glob("record.*"):
        path.write_bytes(b"damaged" * 100)
    before = state_of(tmp_path / "state")
    for command in (("status",), ("infer", "--prompt", "hello"), ("run",), ("provision", *shipped)):
        assert "both copies of the durable record are damaged" in run(*command, code=1)
    records = [path for path in before if "record." in path]
    assert records
    assert {path: state_of(tmp_path / "state")[path] for path in records} == {
        path: before[path] for path in records
    }


def test_questions_that_cannot_be_asked_are_refused(run: Run, shipped: list[str], tmp_path: Path) -> None:
    run("provision", *shipped)
    question = tmp_path / "question.json"
    assert "No such file" in run("infer", "--input", question, code=1)
    question.write_text("1, 2")
    assert "a JSON list of numbers is expected" in run("infer", "--input", question, code=1)
    question.write_text("[1, 2]")
    assert "has 2 values" in run("infer", "--input", question, code=1)
    assert "class prompts only" in run("infer", "--prompt", "hello", code=1)


def test_a_model_that_was_damaged_on_the_disk_is_an_error_line(
    run: Run, shipped: list[str], tmp_path: Path
) -> None:
    run("provision", *shipped)
    (tmp_path / "state" / "slots" / "a" / "model.onnx").write_bytes(b"damaged")
    assert "cannot load the file" in run("infer", "--prompt", "hello", code=1)


def test_wrong_usage_is_2(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["dance"], ["infer"], ["provision"], ["provision", "--root", "r"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert "usage: whimbrel-device" in capsys.readouterr().err
    del run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_that_is_asked_to_end_ends_with_0(
    tmp_path: Path, agent: Agent, number: signal.Signals
) -> None:
    with embedded_broker() as broker:
        write_settings(tmp_path / "device.toml", broker=f"127.0.0.1:{broker.port}")
        with agent() as process:
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(WAIT_S) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""


def test_an_agent_without_a_broker_runs_on_and_ends_with_0(tmp_path: Path, agent: Agent) -> None:
    write_settings(tmp_path / "device.toml", broker=f"127.0.0.1:{free_port()}")
    with agent() as process:
        assert process.poll() is None
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_two_agents_on_one_folder_are_refused_until_the_first_is_gone(
    tmp_path: Path, agent: Agent, run: Run
) -> None:
    write_settings(tmp_path / "device.toml", broker=f"127.0.0.1:{free_port()}")
    with agent() as first:
        with agent() as second:
            assert second.wait(WAIT_S) == 1
            assert second.stderr is not None
            assert second.stderr.read().startswith("whimbrel-device: ")
        assert first.poll() is None
        assert "another agent runs on this folder (stop it first)" in run("run", code=1)
        assert "1.0" in run("status")  # looking does no harm
        first.kill()
        first.wait()
    with agent() as third:
        assert third.poll() is None


def test_an_agent_at_rest_has_loaded_no_decoder_and_no_runtime() -> None:
    heavy = ("numpy", "onnxruntime", "llama_cpp", "bsdiff4")
    code = f"import sys, device.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
