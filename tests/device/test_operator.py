"""What people do at a device: pause, resume, rollback, history, and the socket by which that reaches the agent."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from device.adapters.control import (
    CONNECTIONS_MAX,
    REQUEST_BYTES_MAX,
    AgentNotRunningError,
    ControlServer,
    RefusedError,
    Status,
    ask_agent,
)
from device.adapters.mqtt import MqttLoop
from device.cli import main
from device.config import load_config
from device.events import Wish
from protocol.errors import RequestError, StorageError
from server.config import read_config
from server.operations import add_release, export_release, init_repository, publish_release, start_rollout
from server.runtime import Server
from tests.models import prompts, write_classifier, write_health_plan
from tests.server.brokers import stop, wait_until

WAIT_S = 60.0
Tell = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A server with three versions, and a device that is provisioned with the first."""
    folder = tmp_path / "server"
    init_repository(folder, "lab", port=0)
    health = write_health_plan(tmp_path / "health.json")
    for version, seed in (("v1", 1), ("v2", 2), ("v3", 3)):
        model = write_classifier(tmp_path / f"{version}.onnx", seed)
        add_release(folder, "digits", version, [model], runtime="onnx", health=health)
        publish_release(folder, "digits", version)
    export_release(folder, "digits", "v1", tmp_path / "factory")
    server = Server(read_config(folder), seed=1)
    server.start()
    host, port = server.broker_address
    (tmp_path / "device.toml").write_text(
        f'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\nbroker = "{host}:{port}"\n'
    )
    assert (
        main(["provision", "--config", str(tmp_path / "device.toml"), "--from", str(tmp_path / "factory")])
        == 0
    )
    yield tmp_path
    server.stop()


@pytest.fixture
def tell(home: Path, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Run a command on the device; gives what it printed, or its error line where it is to fail."""

    def run(command: str, *words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([command, "--config", str(home / "device.toml"), *words]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


@contextmanager
def agent(home: Path) -> "Iterator[subprocess.Popen[str]]":
    config = load_config(home / "device.toml")
    process = subprocess.Popen(
        [sys.executable, "-m", "device.cli", "run", "--config", "device.toml", "--trace", "trace.jsonl"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )

    def is_up() -> bool:
        try:
            answer = ask_agent(config.control, "status")
        except RequestError:
            return process.poll() is not None
        return answer.status is not None and answer.status.is_connected and bool(answer.status.serving)

    try:
        assert wait_until(is_up, WAIT_S)
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield process
    finally:
        stop(process)


def requested_versions(home: Path) -> list[str]:
    lines = [json.loads(line) for line in (home / "trace.jsonl").read_text().splitlines()]
    return [line["version"] for line in lines if line["kind"] == "transition" and line["to"] == "syncing"]


def test_a_real_device_goes_back_and_is_paused_over_a_kill(home: Path, tell: Tell) -> None:
    def is_resting_with(version: str, state: str) -> bool:
        shown = json.loads(tell("status", "--json"))
        slot = shown["slots"][shown["active"]]
        return (slot["version"], shown["state"], shown["agent"]["serving"]) == (version, state, version)

    question = home / "question.json"
    question.write_text(json.dumps(prompts()[0].input))
    with agent(home) as process:
        assert "there is no version before v1" in tell("rollback", code=1)
        start_rollout(home / "server", "digits", "v2", canary_count=1)
        assert wait_until(lambda: is_resting_with("v2", "idle"), WAIT_S), tell("status")
        assert tell("rollback") == "going back from v2 to v1\n"
        assert wait_until(lambda: is_resting_with("v1", "rolled_back"), WAIT_S), tell("status")
        assert tell("infer", "--input", str(question)) == f"{prompts()[0].label}\n"
        assert "no version before" in tell("rollback", code=1)
        assert tell("pause") == "updates are paused\n"
        process.kill()
        process.wait()
    assert "paused since" in tell("status")
    with agent(home) as process:
        start_rollout(home / "server", "digits", "v3", canary_count=1)
        assert not wait_until(lambda: "v3" in requested_versions(home), 1.0)
        shown = tell("status")
        assert "paused since" in shown
        assert "v1" in shown
        assert tell("resume") == "updates go on\n"
        assert wait_until(lambda: is_resting_with("v3", "idle"), WAIT_S), tell("status")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    assert not load_config(home / "device.toml").control.exists()
    history = json.loads(tell("history", "--json"))
    assert [(past["version"], past["outcome"], past["code"], past["active"]) for past in history] == [
        ("v2", "committed", "", "v2"),
        ("v2", "rolled_back", "operator.rollback", "v1"),
        ("v3", "committed", "", "v3"),
    ]
    lines = tell("history").splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["v3", "v2", "v2"]
    assert "operator.rollback: the operator went back to v1" in lines[2]


def test_what_an_agent_at_rest_is_told_it_finds_when_it_starts(home: Path, tell: Tell) -> None:
    assert tell("pause") == "the agent does not run; updates are paused once it does\n"
    with agent(home):
        assert "paused since" in tell("status")
    assert tell("resume") == "the agent does not run; updates go on once it does\n"
    assert "updates   allowed" in tell("status")
    assert "the agent does not run" in tell("rollback", code=1)
    assert tell("history") == "no update has come to its end yet\n"


# --- the socket --------------------------------------------------------------------------------------------


class Person:
    """Stands for the agent's driver: says no to rollbacks, and yes to the rest."""

    def __init__(self) -> None:
        self.wishes: list[Wish] = []

    def status(self) -> Status:
        return Status(
            pid=1, state="idle", serving="v1", is_connected=True, broker="b:1", trouble="", paused_ms=None
        )

    def ask(self, wish: Wish, answer: Callable[[str, str], None]) -> None:
        self.wishes.append(wish)
        answer("operator.busy" if wish is Wish.ROLLBACK else "", f"about {wish.value}")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, Person, MqttLoop]]:
    path, person = tmp_path / ("long" * 50) / "pi-1.sock", Person()
    with closing(MqttLoop()) as loop, closing(ControlServer(loop, path, person)):
        yield path, person, loop


def ask(served: tuple[Path, Person, MqttLoop], data: bytes) -> bytes:
    """Send bytes to the socket while the loop turns; gives what comes back until it hangs up."""
    path, _, loop = served
    received = []
    with connected(path) as client:
        client.sendall(data)
        client.setblocking(False)

        def is_over() -> bool:
            try:
                received.append(client.recv(4096))
            except BlockingIOError:
                return False
            return not received[-1]

        assert loop.run_until(is_over, 5.0)
    return b"".join(received)


def connected(path: Path) -> socket.socket:
    """A connection, by a short way to a long name."""
    client = socket.socket(socket.AF_UNIX)
    folder = path.parent

    descriptor = os.open(folder, os.O_PATH)
    try:
        client.connect(f"/proc/self/fd/{descriptor}/{path.name}")
    finally:
        os.close(descriptor)
    return client


def test_the_socket_answers_one_line_and_hangs_up(served: tuple[Path, Person, MqttLoop]) -> None:
    answer = json.loads(ask(served, b'{"wish":"status"}\n'))
    assert (answer["code"], answer["status"]["serving"]) == ("", "v1")
    assert json.loads(ask(served, b'{"v":1,"wish":"pause"}\n'))["text"] == "about pause"
    assert json.loads(ask(served, b'{"wish":"rollback"}\n'))["code"] == "operator.busy"
    assert served[1].wishes == [Wish.PAUSE, Wish.ROLLBACK]


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"pause\n",
        b'{"wish":"dance"}\n',
        b'{"v":2,"wish":"pause"}\n',
        b'{"wish":"pause","x":1}\n',
        b"\xff\xfe\n",
        b'{"wish":"pause"' + b" " * 900 + b"\n",
    ],
)
def test_what_the_socket_does_not_understand_it_says_so_and_does_nothing(
    served: tuple[Path, Person, MqttLoop], data: bytes
) -> None:
    assert json.loads(ask(served, data))["code"] == "operator.unknown"
    assert served[1].wishes == []


def test_a_caller_who_does_not_come_to_the_point_is_hung_up_on(served: tuple[Path, Person, MqttLoop]) -> None:
    path, person, loop = served
    with connected(path) as client:
        client.sendall(b'{"wish":"pause"' + b" " * REQUEST_BYTES_MAX + b"}\n")
        for _ in range(3):
            loop.step(0.01)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    assert person.wishes == []


def test_callers_who_say_nothing_do_not_keep_others_out(served: tuple[Path, Person, MqttLoop]) -> None:
    path, _, loop = served
    silent = []
    for _ in range(CONNECTIONS_MAX * 2):
        silent.append(connected(path))
        loop.step(0.01)
    assert json.loads(ask(served, b'{"wish":"status"}\n'))["status"]["pid"] == 1
    for client in silent:
        client.close()
    loop.step(0.01)


def test_a_caller_who_hangs_up_before_the_answer_does_no_harm(served: tuple[Path, Person, MqttLoop]) -> None:
    with connected(served[0]) as client:
        client.sendall(b'{"wish":"pause"}\n')
    served[2].step(0.1)
    served[2].step(0.1)
    assert json.loads(ask(served, b'{"wish":"status"}\n'))["status"]["pid"] == 1


def test_only_the_agents_user_and_group_may_use_the_socket(served: tuple[Path, Person, MqttLoop]) -> None:
    assert served[0].stat().st_mode & 0o777 == 0o660


def test_a_socket_that_a_killed_agent_left_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(left))
    with pytest.raises(AgentNotRunningError):
        ask_agent(left, "status")
    with closing(MqttLoop()) as loop:
        ControlServer(loop, left, Person()).close()
        assert not left.exists()
        left.write_text("precious")
        with pytest.raises(StorageError, match="is there and no socket"):
            ControlServer(loop, left, Person())
    assert left.read_text() == "precious"


def answered(listener: socket.socket, said: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(100)
        connection.sendall(said)


def test_whoever_asks_gets_a_line_whatever_the_other_side_does(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with pytest.raises(AgentNotRunningError):
        ask_agent(path, "status")
    for said, error in (
        (b"", "ended before it answered"),
        (b"nonsense\n", "ended before it answered"),
        (b'{"code":"operator.busy","text":"not now"}\n', "not now"),
    ):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            other = threading.Thread(target=answered, args=(listener, said))
            other.start()
            with pytest.raises(RequestError, match=error):
                ask_agent(path, "rollback")
            other.join(WAIT_S)
        path.unlink()
    assert issubclass(RefusedError, RequestError)
