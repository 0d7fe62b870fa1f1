"""The local endpoint with a real language model: completions, conversations, streams, and a swap in the middle of one."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device.adapters.endpoint import Endpoint
from device.adapters.endpoint_requests import Limits
from device.adapters.engine_llama import CONTEXT_TOKENS, LlamaModel, load_llama
from device.leases import Leases
from device.ports import QuestionError, Sampling
from protocol.errors import EngineError
from tests.models import language_model
from tests.swap_load.__main__ import other_language_model

pytestmark = pytest.mark.llama

WAIT_S = 120.0
PROMPT = "The capital of France is"
CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}],
    },
]


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaModel]:
    model = load_llama(str(language_model()))
    yield model
    model.close()


@pytest.fixture(scope="module")
def endpoint(llama: LlamaModel) -> Iterator[Endpoint]:
    leases = Leases()
    leases.swap(llama, "1.0")
    endpoint = Endpoint(("127.0.0.1", 0), "smol", leases)
    yield endpoint
    endpoint.close()


def connect(endpoint: Endpoint) -> http.client.HTTPConnection:
    host, _, port = endpoint.address.rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=WAIT_S)


def ask(endpoint: Endpoint, path: str, **fields: object) -> tuple[int, bytes]:
    connection = connect(endpoint)
    connection.request("POST", path, json.dumps({"model": "smol", **fields}))
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data


def events(data: bytes) -> list[dict[str, Any]]:
    *found, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


def test_a_completion_has_the_form_of_openai(endpoint: Endpoint) -> None:
    status, data = ask(endpoint, "/v1/completions", prompt=PROMPT, max_tokens=3, temperature=0, user="me")
    answer = json.loads(data)
    assert status == 200
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "smol:1.0")
    (choice,) = answer["choices"]
    assert choice["text"].startswith(" Paris")
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    usage = answer["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (3, usage["prompt_tokens"] + 3)


def test_a_conversation_is_read_in_the_models_own_template(endpoint: Endpoint, llama: LlamaModel) -> None:
    status, data = ask(
        endpoint, "/v1/chat/completions", messages=CHAT, max_completion_tokens=12, temperature=0
    )
    answer = json.loads(data)
    assert (status, answer["object"]) == (200, "chat.completion")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "Paris" in choice["message"]["content"]
    prompt = llama.chat_prompt([("user", "Hello")])
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_a_stream_says_the_same_piece_by_piece(endpoint: Endpoint) -> None:
    fields: dict[str, object] = {"messages": CHAT, "max_tokens": 8, "temperature": 0}
    whole = json.loads(ask(endpoint, "/v1/chat/completions", **fields)[1])
    status, data = ask(
        endpoint, "/v1/chat/completions", stream=True, stream_options={"include_usage": True}, **fields
    )
    assert status == 200
    opening, *pieces, ending, usage = events(data)
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {each["object"] for each in pieces} == {"chat.completion.chunk"}
    assert {each["model"] for each in (opening, *pieces, ending, usage)} == {"smol:1.0"}
    text = "".join(each["choices"][0]["delta"]["content"] for each in pieces)
    assert text == whole["choices"][0]["message"]["content"]
    assert ending["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_a_seed_makes_chance_repeat_itself_and_top_p_leaves_the_likeliest(endpoint: Endpoint) -> None:
    def text(**fields: object) -> str:
        status, data = ask(endpoint, "/v1/completions", prompt="Once upon a time", max_tokens=6, **fields)
        assert status == 200
        return str(json.loads(data)["choices"][0]["text"])

    assert text(seed=1, temperature=1.5) == text(seed=1, temperature=1.5)
    assert len({text(seed=seed, temperature=1.5) for seed in range(4)}) > 1
    assert text(top_p=1e-9, seed=1) == text(temperature=0)


def test_a_stop_word_ends_the_answer_and_is_not_part_of_it(endpoint: Endpoint) -> None:
    status, data = ask(
        endpoint, "/v1/completions", prompt="1, 2, 3, 4,", max_tokens=12, temperature=0, stop=[" 6"]
    )
    (choice,) = json.loads(data)["choices"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, " 5,", "stop")


def test_no_answer_depends_on_those_before(llama: LlamaModel) -> None:
    def write(prompt: str) -> str:
        pieces: list[str] = []
        llama.write(prompt, Sampling(tokens_max=6), pieces.append)
        return "".join(pieces)

    first = write(PROMPT)
    write("def add(a, b):")
    assert write(PROMPT) == first


def test_a_prompt_without_tokens_or_room_is_refused(
    endpoint: Endpoint, llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, data = ask(endpoint, "/v1/completions", prompt="word " * CONTEXT_TOKENS)
    assert (status, json.loads(data)["error"]["code"]) == (400, "context_length_exceeded")
    with pytest.raises(QuestionError, match="0 tokens"):
        llama.write("", Sampling(), lambda _text: None)
    monkeypatch.setattr("device.adapters.engine_llama.CONTEXT_TOKENS", 12)
    written = llama.write("1, 2, 3,", Sampling(tokens_max=100), lambda _text: None)
    assert (written.prompt_tokens + written.tokens, written.ending) == (12, "length")


def test_a_text_model_does_not_classify(endpoint: Endpoint) -> None:
    status, data = ask(endpoint, "/v1/classify", input=[1.0])
    assert (status, json.loads(data)["error"]["code"]) == (400, "wrong_model")


def test_a_client_that_hangs_up_ends_its_request(endpoint: Endpoint, llama: LlamaModel) -> None:
    host, _, port = endpoint.address.rpartition(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "temperature": 1.5, "seed": 3})
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body.encode())
        )
        end = time.monotonic() + WAIT_S
        while not llama._lock.locked():
            assert time.monotonic() < end
    with llama._lock:
        assert llama._llama is not None
        assert llama._llama.n_tokens < 100


def test_a_stream_ends_on_the_model_on_which_it_began_and_the_next_begins_with_nothing_of_it(
    tmp_path: Path,
) -> None:
    leases = Leases()
    old = load_llama(str(language_model()))
    new_path = str(other_language_model(language_model(), tmp_path))
    leases.swap(old, "old")
    endpoint = Endpoint(("127.0.0.1", 0), "smol", leases)
    fields = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    expected = json.loads(ask(endpoint, "/v1/completions", **fields)[1])["choices"][0]["text"]
    connection = connect(endpoint)
    connection.request("POST", "/v1/completions", json.dumps({**fields, "stream": True}))
    response = connection.getresponse()
    first = response.readline()  # it has begun
    new = load_llama(new_path)
    assert leases.swap(new, "new")
    after = json.loads(ask(endpoint, "/v1/completions", **fields)[1])
    streamed = events(first + response.read())
    assert "".join(each["choices"][0]["text"] for each in streamed) == expected
    assert {each["model"] for each in streamed} == {"smol:old"}
    fresh = load_llama(new_path)  # that has never seen anything
    pieces: list[str] = []
    fresh.write(PROMPT, Sampling(tokens_max=24), pieces.append)
    assert (after["model"], after["choices"][0]["text"]) == ("smol:new", "".join(pieces))
    assert "".join(pieces) != expected
    connection.close()
    endpoint.close()
    leases.let_go()
    fresh.close()
    with pytest.raises(EngineError, match="closed"):
        old.write(PROMPT, Sampling(), lambda _text: None)


def test_a_stream_whose_model_is_taken_away_says_so(llama: LlamaModel) -> None:
    leases = Leases()
    model = load_llama(str(language_model()))
    leases.swap(model, "old")
    endpoint = Endpoint(("127.0.0.1", 0), "smol", leases, Limits())
    connection = connect(endpoint)
    body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 1.5, "seed": 3, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    response.readline()
    leases.let_go(0.0)
    events_then_error = response.read()
    assert b"[DONE]" not in events_then_error
    error = json.loads(events_then_error.split(b"data: ")[-1])["error"]
    assert (error["code"], error["type"]) == ("no_model", "server_error")
    connection.close()
    endpoint.close()
    assert llama.logprob_mean(PROMPT, " Paris") < 0  # another of the same file is not concerned
