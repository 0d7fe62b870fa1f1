"""Requests to the local endpoint: HTTP from a connection, a question to the leased model, an answer or an error object.

The base class of the standard library reads requests; `openai.py` has their language, `endpoint.py` the connections.
"""

import ipaddress
import itertools
import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Final, Protocol

import msgspec

from device.adapters.openai import (
    ApiError,
    ChatForm,
    ChatRequest,
    CompletionForm,
    CompletionRequest,
    TextForm,
    TextRequest,
    read_classify_request,
    read_text_request,
)
from device.leases import Lease, Leases, NoModelError
from device.ports import ClassModel, QuestionError, TextModel
from protocol.errors import EngineError

BODY_BYTES_MAX: Final = 2 << 20
"""A conversation, or an input of 65,536 numbers, with room to spare."""

IDLE_S_MAX: Final = 60.0
"""A connection that says nothing is hung up on; nor may a request take longer to come in."""

WRITE_S_MAX: Final = 5.0
"""Who does not read for so long is hung up on: a stream is written while the model is held, and others wait for it."""

BUSY_RETRY_S: Final = 1
"""When to come back while others are answered."""

NO_MODEL_RETRY_S: Final = 5
"""When to come back while no model answers."""

VERSION_HEADER: Final = "x-whimbrel-version"

_LINGER_BYTES_MAX: Final = 16 << 20
"""Of a refused body, read so that the refusal is not lost with it."""

_READ_BYTES: Final = 1 << 16
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one endpoint bears.

    Attributes:
        requests_max: Answered, or waiting for the model, at a time.
        request_s_max: From the lease to the answer; so long may a model that was replaced stay in memory.
    """

    requests_max: int = 8
    request_s_max: float = 60.0


@dataclass(frozen=True, slots=True)
class Service:
    """What all requests of one endpoint share.

    Attributes:
        family: The model's name; `family:version` names one version.
        leases: The model.
        limits: What the endpoint bears.
        is_for_all: No check of who asks beyond the permissions of a socket's folder.
    """

    family: str
    leases: Leases
    limits: Limits
    is_for_all: bool
    slots: threading.BoundedSemaphore = field(init=False)
    serials: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", threading.BoundedSemaphore(self.limits.requests_max))


class Client(Protocol):
    """What requests need of their connection."""

    is_busy: bool
    read_until_s: float

    def is_gone(self) -> bool:
        """Whether the client hung up."""

    def is_last(self) -> bool:
        """Whether the connection is to end after the request under way."""

    def end_writing(self) -> None:
        """Say that nothing more will come."""


class _GoneError(EngineError):
    """Nobody waits for the answer any more."""

    code = "endpoint.gone"


class Handler(BaseHTTPRequestHandler):
    """Reads and answers the requests of one connection, until it ends.

    Args:
        accepted: The connection's socket.
        service: What all requests share.
        client: The connection.
    """

    protocol_version = "HTTP/1.1"
    server_version = "whimbrel"
    sys_version = ""
    wbufsize = -1  # head and body in one piece

    def __init__(self, accepted: Any, service: Service, client: Client) -> None:
        self._service = service
        self._client = client
        self._is_streaming = False
        super().__init__(accepted, ("", 0), None)  # type: ignore[arg-type]  # no server of the library is behind it

    def handle_one_request(self) -> None:
        """Read a request and answer it."""
        self._client.is_busy = False
        self._client.read_until_s = time.monotonic() + IDLE_S_MAX
        self.connection.settimeout(IDLE_S_MAX)
        self.close_connection = True
        if not self._client.is_last():
            super().handle_one_request()

    def do_GET(self) -> None:
        """Models, and whether one answers."""
        if self.headers.get("Content-Length", "0") != "0" or self.headers.get("Transfer-Encoding"):
            self.close_connection = True  # nobody reads that body
        self._carry_out(self._get)

    def do_POST(self) -> None:
        """Questions."""
        self._carry_out(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, in the same form as all other refusals."""
        del explain
        self.close_connection = True
        self._refuse(ApiError(code, "bad_request", message or "bad request"))

    def log_message(self, *_arguments: Any) -> None:
        """Nothing: a line per request would fill a device's log."""

    def _carry_out(self, answer: Callable[[], None]) -> None:
        self._client.is_busy = True
        self._is_streaming = False
        try:
            self._check_origin()
            answer()
        except ApiError as error:
            self._refuse(error)
        except QuestionError as error:
            self._refuse(ApiError(400, "invalid_value", str(error)))
        except NoModelError as error:
            self._refuse(_unavailable(str(error)))
        except _GoneError:
            self.close_connection = True
        except EngineError as error:
            _LOG.error("a request got no answer: %s", error)
            self._refuse(ApiError(500, "engine_failed", str(error), kind="server_error"))

    def _check_origin(self) -> None:
        """Refuse what a web page has a browser on this device send: by another name of it (DNS rebinding), or from another origin.

        Raises:
            ApiError: Host or Origin is not loopback.
        """
        if self._service.is_for_all:
            return
        names = [urllib.parse.urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname]
        origin = self.headers.get("Origin")
        if origin is not None:
            names.append(urllib.parse.urlsplit(origin).hostname)
        if not all(_is_loopback(name or "") for name in names):
            self.close_connection = True
            message = "Host, and Origin if there is one, must be loopback: only programs on this device are answered"
            raise ApiError(403, "forbidden", message, kind="permission_error")

    def _get(self) -> None:
        route = urllib.parse.urlsplit(self.path).path.rstrip("/")
        if route == "/health":
            with self._service.leases.lease() as lease:
                self._send(200, {"status": "ok", "model": self._name(lease)}, lease.version)
            return
        if route != "/v1/models" and not route.startswith("/v1/models/"):
            raise _unknown(route)
        try:
            with self._service.leases.lease() as lease:
                entry = {"id": self._service.family, "object": "model", "created": 0, "owned_by": "whimbrel"}
                entry["version"] = version = lease.version
        except NoModelError:
            if route == "/v1/models":
                self._send(200, {"object": "list", "data": []})
                return
            raise
        if route == "/v1/models":
            self._send(200, {"object": "list", "data": [entry]}, version)
            return
        self._check_model(urllib.parse.unquote(route.removeprefix("/v1/models/")), version)
        self._send(200, entry, version)

    def _post(self) -> None:
        body = self._body()
        route = urllib.parse.urlsplit(self.path).path.rstrip("/")
        questions: dict[str, Callable[[bytes], None]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/classify": self._classify,
        }
        if route not in questions:
            raise _unknown(route)
        if not self._service.slots.acquire(blocking=False):
            raise busy()
        try:
            questions[route](body)
        finally:
            self._service.slots.release()

    def _body(self) -> bytes:
        given = self.headers.get("Content-Length")
        if given is None or self.headers.get("Transfer-Encoding") is not None:
            self.close_connection = True
            raise ApiError(411, "length_required", "send the body with a Content-Length")
        if not given.isascii() or not given.isdigit():
            self.close_connection = True
            raise ApiError(400, "bad_request", "the Content-Length is no number")
        length = int(given[:12])
        if length > BODY_BYTES_MAX:
            self.close_connection = True
            raise ApiError(413, "body_too_long", f"a body of {length} bytes, allowed are {BODY_BYTES_MAX}")
        data = self.rfile.read(length)
        if len(data) < length:
            raise _GoneError("the body ended early")
        self._client.read_until_s = float("inf")
        self.connection.settimeout(WRITE_S_MAX)
        return data

    def _classify(self, body: bytes) -> None:
        name, inputs = read_classify_request(body)
        with self._service.leases.lease() as lease:
            self._check_model(name, lease.version)
            goes_on = self._limit(lease)
            data = []
            for index, values in enumerate(inputs):
                model = lease.model
                if not isinstance(model, ClassModel):
                    raise ApiError(400, "wrong_model", "a text model answers: ask /v1/chat/completions")
                goes_on()
                try:
                    found = model.classify(values)
                except EngineError:
                    goes_on()  # the model was taken away: that is no failure of it
                    raise
                data.append({"index": index, "label": found.label, "scores": found.scores or None})
            answer = {"object": "list", "model": self._name(lease), "data": data}
            self._send(200, answer, lease.version)

    def _chat(self, body: bytes) -> None:
        request = read_text_request(body, ChatRequest)
        with self._service.leases.lease() as lease:
            model = self._text_model(lease, request)
            prompt = model.chat_prompt([message.said for message in request.messages])
            self._write(lease, request, prompt, request.tokens_max, is_chat=True)

    def _complete(self, body: bytes) -> None:
        request = read_text_request(body, CompletionRequest)
        with self._service.leases.lease() as lease:
            self._text_model(lease, request)
            self._write(lease, request, request.text, request.tokens_max, is_chat=False)

    def _text_model(self, lease: Lease, request: TextRequest) -> TextModel:
        self._check_model(request.model, lease.version)
        if not isinstance(lease.model, TextModel):
            raise ApiError(400, "wrong_model", "a classifier answers: ask /v1/classify")
        return lease.model

    def _write(
        self, lease: Lease, request: TextRequest, prompt: str, tokens_max: int | None, *, is_chat: bool
    ) -> None:
        model = lease.model
        assert isinstance(model, TextModel)
        form = ChatForm if is_chat else CompletionForm
        name = f"{form.prefix}-{os.getpid():x}-{next(self._service.serials):x}"
        said = form(name, self._name(lease), int(time.time()))
        pieces: list[str] = []
        goes_on = self._limit(lease)

        def tell(text: str) -> None:
            goes_on()
            if not request.stream:
                pieces.append(text)
            elif text:
                self._begin_stream(lease.version, said)
                self._event(said.piece(text, None))

        try:
            written = model.write(prompt, request.sampling(tokens_max), tell)
        except QuestionError as error:
            raise ApiError(400, "context_length_exceeded", str(error)) from error
        except (ApiError, NoModelError, _GoneError):
            raise
        except EngineError:
            goes_on()
            raise
        if not request.stream:
            self._send(200, said.whole("".join(pieces), written), lease.version)
            return
        self._begin_stream(lease.version, said)
        self._event(said.piece(None, written.ending))
        if request.wants_usage:
            self._event(said.usage(written))
        self._event(b"[DONE]")
        self._end_stream()

    def _limit(self, lease: Lease) -> Callable[[], None]:
        """What ends a request that goes on for too long, that nobody waits for, or whose model is taken away."""
        until_s = time.monotonic() + self._service.limits.request_s_max

        def check() -> None:
            if lease.is_revoked:
                raise NoModelError("the model is being replaced on the disk", hint="ask again later")
            if time.monotonic() > until_s:
                seconds = self._service.limits.request_s_max
                message = f"no answer within {seconds:g} seconds; ask for less, or raise request_s_max"
                raise ApiError(504, "timeout", message, kind="server_error")
            if self._client.is_gone():
                raise _GoneError("the client hung up")

        return check

    def _check_model(self, name: str, version: str) -> None:
        family = self._service.family
        if name not in {"", family, f"{family}:{version}"}:
            message = f"model {name!r} does not answer here; {family!r} does, now as {family}:{version}"
            raise ApiError(404, "model_not_found", message, param="model")

    def _name(self, lease: Lease) -> str:
        return f"{self._service.family}:{lease.version}"

    def _refuse(self, error: ApiError) -> None:
        if self._is_streaming:  # the status was told long ago
            self._event(error.body())
            self._end_stream()
            self.close_connection = True
            return
        self._send(error.status, error.body(), retry_s=error.retry_s)
        if self.close_connection:
            self._linger()

    def _linger(self) -> None:
        """Take what is still sent, for a while: a connection that is closed over unread bytes loses the answer."""
        self._client.end_writing()
        left = _LINGER_BYTES_MAX
        while left > 0 and (piece := self.rfile.read1(_READ_BYTES)):
            left -= len(piece)

    def _send(self, status: int, body: Any, version: str = "", *, retry_s: int | None = None) -> None:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if version:
            self.send_header(VERSION_HEADER, version)
        if retry_s is not None:
            self.send_header("Retry-After", str(retry_s))
        if self.close_connection or self._client.is_last():
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _begin_stream(self, version: str, said: TextForm) -> None:
        if self._is_streaming:
            return
        self._is_streaming = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header(VERSION_HEADER, version)
        if self.request_version == "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.end_headers()
        for event in said.opening():
            self._event(event)

    def _event(self, data: bytes) -> None:
        self._write_piece(b"data: %b\n\n" % data)

    def _end_stream(self) -> None:
        self._write_piece(b"")

    def _write_piece(self, data: bytes) -> None:
        if self.request_version == "HTTP/1.1":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.wfile.write(data)
        self.wfile.flush()


def busy() -> ApiError:
    """There are too many requests or connections."""
    message = "too many requests at a time; ask again"
    return ApiError(503, "overloaded", message, kind="server_error", retry_s=BUSY_RETRY_S)


def _unavailable(message: str) -> ApiError:
    return ApiError(503, "no_model", message, kind="server_error", retry_s=NO_MODEL_RETRY_S)


def _unknown(route: str) -> ApiError:
    known = "/v1/chat/completions, /v1/completions, /v1/classify, /v1/models and /health"
    return ApiError(404, "unknown_url", f"{route or '/'} is unknown; there are {known}")


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
