"""The local endpoint over real sockets, with a real classifier: answers, refusals, limits, and what ends a connection."""

import http.client
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from device import cli
from device.adapters import endpoint as endpoint_module
from device.adapters.clock import SystemClock
from device.adapters.endpoint import CONNECTIONS_MAX, Endpoint
from device.adapters.endpoint_requests import BODY_BYTES_MAX, Limits
from device.adapters.engine_onnx import load_onnx
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import AgentConfig, DeviceConfig, ServingConfig
from device.leases import Leases
from device.ports import Classified
from device.runtime import DeviceRuntime
from protocol.errors import EngineError, StorageError
from protocol.ids import DeviceId, Family, FleetId
from protocol.release import Prompt
from tests.models import CLASSES, FEATURES, prompts, write_classifier

WAIT_S = 20.0
QUESTION = {"input": prompts()[0].input}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("models") / "classifier.onnx", seed=1)


@pytest.fixture
def leases(classifier: Path) -> Iterator[Leases]:
    leases = Leases()
    leases.swap(load_onnx(str(classifier)), "v1")
    yield leases
    leases.let_go()


@pytest.fixture
def endpoint(leases: Leases) -> Iterator[Endpoint]:
    endpoint = Endpoint(("127.0.0.1", 0), "digits", leases, Limits(requests_max=2, request_s_max=5))
    yield endpoint
    endpoint.close(0.5)


def connect(endpoint: Endpoint) -> http.client.HTTPConnection:
    host, _, port = endpoint.address.rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=WAIT_S)


def raw(endpoint: Endpoint) -> socket.socket:
    host, _, port = endpoint.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def ask(
    endpoint: Endpoint,
    path: str,
    body: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    connection = connect(endpoint)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer, {name.lower(): value for name, value in response.getheaders()}


class Slow:
    """A model that answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.is_asked = threading.Event()
        self.is_closed = False

    def answer(self, prompt: Prompt) -> str:
        return self.classify(prompt).label

    def classify(self, values: object) -> Classified:
        del values
        self.is_asked.set()
        assert self.may_answer.wait(WAIT_S)
        if self.is_closed:
            raise EngineError("the model is closed")
        return Classified("7", ())

    def close(self) -> None:
        self.is_closed = True


def test_one_input_gets_its_label_its_scores_and_the_version(endpoint: Endpoint) -> None:
    for prompt in prompts():
        status, answer, headers = ask(endpoint, "/v1/classify", {"model": "digits", "input": prompt.input})
        assert (status, answer["model"], headers["x-whimbrel-version"]) == (200, "digits:v1", "v1")
        (found,) = answer["data"]
        assert (found["index"], found["label"]) == (0, str(prompt.label))
        assert len(found["scores"]) == CLASSES
        assert max(found["scores"]) == found["scores"][prompt.label]


def test_several_inputs_are_answered_in_their_order(endpoint: Endpoint) -> None:
    status, answer, _ = ask(endpoint, "/v1/classify", {"input": [prompt.input for prompt in prompts()]})
    assert status == 200
    assert [each["label"] for each in answer["data"]] == [str(prompt.label) for prompt in prompts()]
    assert [each["index"] for each in answer["data"]] == list(range(len(prompts())))


def test_a_connection_is_used_again_and_again(endpoint: Endpoint) -> None:
    connection = connect(endpoint)
    for path in ("/v1/models", "/nothing", "/v1/models/digits", "/v1/models/other", "/health"):
        connection.request("GET", path)
        sock = connection.sock
        connection.getresponse().read()
        assert connection.sock is sock, path
        connection.request("POST", "/v1/classify", json.dumps(QUESTION))
        assert connection.getresponse().read().startswith(b'{"object":"list","model":"digits:v1"')
    connection.close()


def test_models_and_health_name_what_answers(endpoint: Endpoint) -> None:
    entry = {"id": "digits", "object": "model", "created": 0, "owned_by": "whimbrel", "version": "v1"}
    assert ask(endpoint, "/v1/models")[:2] == (200, {"object": "list", "data": [entry]})
    for name in ("digits", "digits:v1", "digits%3Av1"):
        assert ask(endpoint, f"/v1/models/{name}")[:2] == (200, entry)
    assert ask(endpoint, "/health")[:2] == (200, {"status": "ok", "model": "digits:v1"})


def test_without_a_model_requests_are_told_when_to_come_back(endpoint: Endpoint, leases: Leases) -> None:
    leases.let_go()
    for path, body in (("/v1/classify", QUESTION), ("/health", None), ("/v1/models/digits", None)):
        status, answer, headers = ask(endpoint, path, body)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "no_model", "5")
    assert ask(endpoint, "/v1/models")[:2] == (200, {"object": "list", "data": []})


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "said"),
    [
        ("/v1/classify", b"{", 400, "invalid_json", "no JSON"),
        ("/v1/classify", b"\xff\xfe", 400, "invalid_", ""),
        ("/v1/classify", b"[]", 400, "invalid_value", "Expected `object`"),
        ("/v1/classify", {}, 400, "invalid_value", "missing required field `input`"),
        ("/v1/classify", {"input": []}, 400, "invalid_value", "length >= 1"),
        ("/v1/classify", {"input": [[]]}, 400, "invalid_value", "length >= 1"),
        ("/v1/classify", {"input": ["a"]}, 400, "invalid_value", "Expected `float`"),
        ("/v1/classify", {"input": [[1], 2]}, 400, "invalid_value", "Expected `array`"),
        ("/v1/classify", {"input": [1e39] * FEATURES}, 400, "invalid_value", "3.4e"),
        ("/v1/classify", {"input": [1, 2, 3]}, 400, "invalid_value", "the input has 3 values"),
        ("/v1/classify", {"input": [[1.0]] * 65}, 400, "invalid_value", "65 inputs, allowed are 64"),
        ("/v1/classify", {"model": "gpt-4o", **QUESTION}, 404, "model_not_found", "'digits' does"),
        ("/v1/classify", {"model": "digits:v0", **QUESTION}, 404, "model_not_found", "now as digits:v1"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "invalid_json", "no JSON"),
        ("/v1/completions", b'{"x": ' + b"[" * 100_000, 400, "invalid_json", "no JSON"),
        (
            "/v1/completions",
            b'{"prompt": "x", "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
            400,
            "invalid_json",
            "",
        ),
        ("/v1/embeddings", {"input": "x"}, 404, "unknown_url", "/v1/classify"),
        ("/v1/completions", {"prompt": "x"}, 400, "wrong_model", "ask /v1/classify"),
        ("/v1/completions", {"prompt": ["x", "y"]}, 400, "invalid_value", "length <= 1"),
        ("/v1/completions", {"prompt": "x", "n": 2}, 400, "unsupported_parameter", "n is not supported"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_value", "length >= 1"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            400,
            "invalid_value",
            "image_url",
        ),
    ],
)
def test_a_mistake_is_told_in_the_form_of_openai(
    endpoint: Endpoint, path: str, body: Any, status: int, code: str, said: str
) -> None:
    got, answer, headers = ask(endpoint, path, body)
    assert got == status
    assert headers["content-type"] == "application/json"
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"].startswith(code)
    assert said in error["message"]


def test_the_field_of_a_mistake_is_named(endpoint: Endpoint) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 3}
    assert ask(endpoint, "/v1/chat/completions", body)[1]["error"]["param"] == "temperature"
    assert ask(endpoint, "/v1/completions", {"prompt": "x", "logprobs": 5})[1]["error"]["param"] == "logprobs"


def test_a_method_that_there_is_not_is_refused(endpoint: Endpoint) -> None:
    status, answer, _ = ask(endpoint, "/v1/classify", QUESTION, method="PUT")
    assert (status, answer["error"]["code"]) == (501, "bad_request")


def test_a_body_that_is_too_long_or_has_no_length_is_refused_before_it_is_read(endpoint: Endpoint) -> None:
    status, answer, headers = ask(endpoint, "/v1/classify", b" " * (BODY_BYTES_MAX + 1))
    assert (status, answer["error"]["code"], headers["connection"]) == (413, "body_too_long", "close")
    connection = connect(endpoint)
    connection.request("POST", "/v1/classify", iter([b"{}"]))  # chunked
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (411, "length_required")
    connection.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:8091"}, 403),
        ({"Host": "192.168.1.10"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8091", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "[::1]:8091"}, 200),
    ],
)
def test_a_web_page_of_elsewhere_is_not_answered(
    endpoint: Endpoint, headers: dict[str, str], status: int
) -> None:
    assert ask(endpoint, "/v1/classify", QUESTION, headers=headers)[0] == status
    assert ask(endpoint, "/v1/models", headers=headers)[0] == status


def test_more_requests_than_are_borne_are_told_to_come_back(endpoint: Endpoint, leases: Leases) -> None:
    slow = Slow()
    leases.swap(slow, "v2")
    waiting = [connect(endpoint) for _ in range(2)]
    for connection in waiting:
        slow.is_asked.clear()
        connection.request("POST", "/v1/classify", json.dumps(QUESTION))
        assert slow.is_asked.wait(WAIT_S)
    status, answer, headers = ask(endpoint, "/v1/classify", QUESTION)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
    slow.may_answer.set()
    for connection in waiting:
        assert json.loads(connection.getresponse().read())["data"][0] == {
            "index": 0,
            "label": "7",
            "scores": None,
        }
        connection.close()
    assert ask(endpoint, "/v1/classify", QUESTION)[0] == 200


def test_a_request_that_outlives_its_model_gets_that_models_answer(
    endpoint: Endpoint, leases: Leases, classifier: Path
) -> None:
    slow = Slow()
    leases.swap(slow, "v2")
    connection = connect(endpoint)
    connection.request("POST", "/v1/classify", json.dumps(QUESTION))
    assert slow.is_asked.wait(WAIT_S)
    leases.swap(load_onnx(str(classifier)), "v3")
    assert ask(endpoint, "/v1/classify", QUESTION)[1]["model"] == "digits:v3"
    assert not slow.is_closed
    slow.may_answer.set()
    response = connection.getresponse()
    assert json.loads(response.read())["model"] == "digits:v2"
    connection.close()


def test_a_model_that_is_taken_away_ends_its_requests_with_when_to_come_back(
    endpoint: Endpoint, leases: Leases
) -> None:
    slow = Slow()
    leases.swap(slow, "v2")
    connection = connect(endpoint)
    connection.request("POST", "/v1/classify", json.dumps(QUESTION))
    assert slow.is_asked.wait(WAIT_S)
    leases.let_go(0.01)
    slow.may_answer.set()
    response = connection.getresponse()
    assert (response.status, response.getheader("Retry-After")) == (503, "5")
    response.read()
    connection.close()


def test_a_request_that_takes_too_long_is_given_up(leases: Leases) -> None:
    endpoint = Endpoint(("127.0.0.1", 0), "digits", leases, Limits(request_s_max=0))
    status, answer, _ = ask(endpoint, "/v1/classify", QUESTION)
    assert (status, answer["error"]["code"]) == (504, "timeout")
    endpoint.close()


def test_too_many_connections_are_turned_away_and_the_others_go_on(endpoint: Endpoint) -> None:
    held = [raw(endpoint) for _ in range(CONNECTIONS_MAX)]
    held[0].sendall(b"GET /health HTTP/1.1\r\n\r\n")
    assert held[0].recv(100).startswith(b"HTTP/1.1 200")
    status, answer, headers = ask(endpoint, "/health")
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
    for each in held:
        each.close()
    end = time.monotonic() + WAIT_S
    while ask(endpoint, "/health")[0] != 200:
        assert time.monotonic() < end


def test_a_client_that_sends_a_byte_now_and_then_is_hung_up_on(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "_SWEEP_S", 0.1)
    monkeypatch.setattr("device.adapters.endpoint_requests.IDLE_S_MAX", 0.5)
    with raw(endpoint) as slow:
        end = time.monotonic() + WAIT_S
        with pytest.raises(OSError):  # noqa: PT012 - a reset or a broken pipe, at one of them
            while time.monotonic() < end:
                slow.sendall(b"x")
                time.sleep(0.05)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b""]
)
def test_nonsense_ends_its_connection_and_nothing_else(endpoint: Endpoint, data: bytes) -> None:
    with raw(endpoint) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1000):
            pass
    assert ask(endpoint, "/health")[0] == 200


def test_closing_lets_a_request_end_and_takes_no_other(leases: Leases) -> None:
    endpoint = Endpoint(("127.0.0.1", 0), "digits", leases)
    slow = Slow()
    leases.swap(slow, "v2")
    connection, idle = connect(endpoint), raw(endpoint)
    connection.request("POST", "/v1/classify", json.dumps(QUESTION))
    assert slow.is_asked.wait(WAIT_S)
    closing = threading.Thread(target=endpoint.close, args=(WAIT_S,))
    closing.start()
    assert idle.recv(1) == b""
    slow.may_answer.set()
    response = connection.getresponse()
    assert (response.status, response.getheader("Connection")) == (200, "close")
    response.read()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    idle.close()
    connection.close()


def test_a_unix_socket_answers_and_replaces_one_that_was_left_behind(leases: Leases, tmp_path: Path) -> None:
    path = tmp_path / ("deep" * 30) / "model.sock"
    for is_left in (True, False):
        endpoint = Endpoint(path, "digits", leases)
        descriptor = socket.socket(socket.AF_UNIX)
        with descriptor:
            descriptor.settimeout(WAIT_S)
            short = tmp_path / "s"
            short.unlink(missing_ok=True)
            short.symlink_to(path)
            descriptor.connect(str(short))
            descriptor.sendall(b"GET /v1/models HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
            data = b""
            while piece := descriptor.recv(4096):
                data += piece
        assert data.startswith(b"HTTP/1.1 200")
        if is_left:
            path.rename(path.with_suffix(".kept"))  # as a killed agent leaves it
            endpoint.close()
            path.with_suffix(".kept").rename(path)
        else:
            endpoint.close()
            assert not path.exists()


def test_an_address_that_is_taken_is_named(endpoint: Endpoint, leases: Leases, tmp_path: Path) -> None:
    host, _, port = endpoint.address.rpartition(":")
    with pytest.raises(StorageError, match=f"{host}:{port}: Address already in use"):
        Endpoint((host, int(port)), "digits", leases)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StorageError, match="no socket"):
        Endpoint(tmp_path / "file", "digits", leases)


def test_an_agent_whose_endpoint_cannot_listen_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cli, "_LISTEN_S", 0.05)
    taken = socket.create_server(("127.0.0.1", 0))
    address: tuple[str, int] = taken.getsockname()
    config = DeviceConfig(
        agent=AgentConfig(device=DeviceId("serve"), fleet=FleetId("lab"), family=Family("digits")),
        folder=tmp_path,
        broker_host="127.0.0.1",
        broker_port=1,
        serving=ServingConfig(listen=address, requests_max=8, request_s_max=60),
    )
    loop, pool = MqttLoop(), WorkerPool(threads=1)
    runtime = DeviceRuntime(config, loop, pool, clock=SystemClock(), rng=random.Random(1))
    with ExitStack() as stack, caplog.at_level(logging.INFO):
        for each in (pool.close, loop.close, runtime.stop):
            stack.callback(each)
        cli._open_endpoint(config, loop, runtime, stack)
        assert "Address already in use" in caplog.text
        taken.close()
        assert loop.run_until(lambda: "may ask the model" in caplog.text, WAIT_S)
        connection = http.client.HTTPConnection(*address, timeout=WAIT_S)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["error"]["code"] == "no_model"
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
