"""The control socket: how commands at the device reach the agent that runs there.

A Unix socket on the agent's own loop; whoever may open it may command the device, and nobody else: the permissions of its
folder decide. One line of JSON each way, then it is closed. It costs nothing while nobody asks.
"""

import contextlib
import logging
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol

import msgspec
from msgspec import Struct

from device.adapters.mqtt import MqttLoop
from device.events import Wish
from protocol.errors import RequestError, StorageError

REQUEST_BYTES_MAX: Final = 1024
ANSWER_BYTES_MAX: Final = 16_384
CONNECTIONS_MAX: Final = 8
"""People and monitoring; more wait in the kernel's queue."""

REQUEST_TIMEOUT_S: Final = 10.0
"""Whoever opens the socket and says nothing is hung up on."""

ANSWER_TIMEOUT_S: Final = 900.0
"""A rollback measures the version before first: gigabytes from a slow card."""

_LOG: Final = logging.getLogger(__name__)
_PEER: Final = struct.Struct("3i")  # pid, uid, gid, see unix(7), SO_PEERCRED


class ControlRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked for."""

    v: Literal[1] = 1
    wish: Literal["status", "pause", "resume", "rollback"]


class Held(Struct, frozen=True, kw_only=True):
    """Why the update under way does not go on, or why the next one would not begin: a stable code, and one line."""

    code: str
    text: str


class Status(Struct, frozen=True, kw_only=True):
    """How the running agent stands; what is durable is in the record."""

    pid: int
    state: str
    serving: str  # version that answers, empty for none
    is_connected: bool
    broker: str
    trouble: str  # why there is no connection
    paused_ms: int | None
    held: Held | None = None


class ControlAnswer(Struct, frozen=True, kw_only=True):
    """What became of it.

    Attributes:
        code: Stable code of a refusal, empty where it is done.
        text: One line.
        status: Where that was asked for.
    """

    v: int = 1
    code: str = ""
    text: str = ""
    status: Status | None = None


class AgentNotRunningError(RequestError):
    """Nobody listens on the control socket."""

    code = "operator.not_running"


class RefusedError(RequestError):
    """The agent says no."""

    code = "operator.refused"


class Controlled(Protocol):
    """What the socket needs of the agent's driver."""

    def status(self) -> Status:
        """How it stands."""

    def ask(self, wish: Wish, answer: Callable[[str, str], None]) -> None:
        """Pass a wish on; `answer` is called once, with a code and a text."""


class ControlServer:
    """Listens on the agent's loop.

    Args:
        loop: The loop.
        path: The socket; an old one of that name is replaced, so the caller holds the lock of the state folder.
        agent: Who is asked.

    Raises:
        StorageError: The socket cannot be made; the agent can run without.
    """

    def __init__(self, loop: MqttLoop, path: Path, agent: Controlled) -> None:
        self._loop = loop
        self._path = path
        self._agent = agent
        self._open: set[_Connection] = set()
        self._listener = listen_unix(path, mode=0o660, backlog=CONNECTIONS_MAX)
        loop.watch(self._listener, selectors.EVENT_READ, self)

    def close(self) -> None:
        """Hang up on everybody, and take the name away."""
        for connection in tuple(self._open):
            connection.close()
        self._loop.watch(self._listener, 0, self)
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def on_ready(self, _mask: int) -> None:
        """Somebody calls."""
        if len(self._open) >= CONNECTIONS_MAX:
            oldest = next((each for each in self._open if not each.is_asked), None)
            if oldest is not None:
                oldest.close()
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            accepted.setblocking(False)
            self._open.add(_Connection(self._loop, accepted, self._agent, self._open.discard))


def listen_unix(path: Path, *, mode: int, backlog: int) -> socket.socket:
    """A listening socket that does not block, in place of an old one of that name.

    Raises:
        StorageError: It cannot be made.
    """
    if path.exists() and not path.is_socket():
        raise StorageError(f"{path} is there and no socket", hint="remove it")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with _address(path) as address:
            listener.bind(address)
        path.chmod(mode)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise StorageError(f"{path}: {error.strerror or error}") from error
    return listener


class _Connection:
    """One question and its answer."""

    def __init__(
        self,
        loop: MqttLoop,
        accepted: socket.socket,
        agent: Controlled,
        on_closed: Callable[["_Connection"], None],
    ) -> None:
        self.is_asked = False
        self._loop = loop
        self._socket = accepted
        self._agent = agent
        self._on_closed = on_closed
        self._is_closed = False
        self._received = b""
        loop.watch(accepted, selectors.EVENT_READ, self)
        loop.call_later(REQUEST_TIMEOUT_S, self._timeout)

    def on_ready(self, _mask: int) -> None:
        try:
            data = self._socket.recv(REQUEST_BYTES_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self.is_asked:  # hung up, or more than one line
            self.close()
            return
        self._received += data
        if len(self._received) > REQUEST_BYTES_MAX:
            self.close()
        elif b"\n" in self._received:
            self.is_asked = True
            self._ask()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._loop.watch(self._socket, 0, self)
            self._socket.close()
            self._on_closed(self)

    def _timeout(self) -> None:
        if not self.is_asked:
            self.close()

    def _ask(self) -> None:
        try:
            request = msgspec.json.decode(self._received, type=ControlRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._answer(ControlAnswer(code="operator.unknown", text=f"not understood: {error}"))
            return
        if request.wish == "status":
            self._answer(ControlAnswer(status=self._agent.status()))
            return
        _LOG.info("%s is asked for by user %d", request.wish, self._uid())
        self._agent.ask(Wish(request.wish), partial(self._told, request.wish))

    def _told(self, wish: str, code: str, text: str) -> None:
        _LOG.info("%s: %s", wish, text)
        self._answer(ControlAnswer(code=code, text=text))

    def _answer(self, answer: ControlAnswer) -> None:
        if not self._is_closed:
            with contextlib.suppress(OSError):  # who does not listen any more needs no answer
                self._socket.sendall(msgspec.json.encode(answer) + b"\n")
            self.close()

    def _uid(self) -> int:
        peer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        return int(_PEER.unpack(peer)[1])


def ask_agent(path: Path, wish: Literal["status", "pause", "resume", "rollback"]) -> ControlAnswer:
    """Ask the agent behind a socket, and wait for its answer.

    Raises:
        AgentNotRunningError: Nobody listens there.
        RequestError: The socket may not be opened, or no answer came.
        RefusedError: The agent says no, and why.
    """
    data = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(REQUEST_TIMEOUT_S)
            with _address(path) as address:
                connection.connect(address)
            connection.settimeout(ANSWER_TIMEOUT_S if wish == "rollback" else REQUEST_TIMEOUT_S)
            connection.sendall(msgspec.json.encode(ControlRequest(wish=wish)) + b"\n")
            while b"\n" not in data and len(data) <= ANSWER_BYTES_MAX:
                piece = connection.recv(ANSWER_BYTES_MAX)
                if not piece:
                    break
                data += piece
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise AgentNotRunningError(
                "the agent does not run", hint="whimbrel-device run, or systemctl start whimbrel-device"
            ) from error
        except PermissionError as error:
            raise RequestError(
                f"{path}: {error.strerror}", hint="use sudo, or join the agent's group"
            ) from error
        except TimeoutError as error:
            raise RequestError("the agent does not answer", hint="look at its log") from error
        except OSError as error:
            raise RequestError(
                f"{path}: {error.strerror or error}", hint="look at the agent's log"
            ) from error
    try:
        answer = msgspec.json.decode(data, type=ControlAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError("the agent ended before it answered", hint="look at its log") from error
    if answer.code:
        raise RefusedError(answer.text, hint=answer.code)
    return answer


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The name of a socket, whatever the length of its folder's: the kernel takes 107 bytes."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
