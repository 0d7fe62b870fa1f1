"""The local endpoint: applications on the device ask the model over HTTP, on loopback or a Unix socket (ADR 19).

A thread accepts, one per connection answers, and all are bounded; the agent's loop takes no part. Each request leases the model
once (`device/leases.py`), so it begins and ends on one version, which the answer names.
"""

import logging
import select
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from device.adapters.control import listen_unix
from device.adapters.endpoint_requests import (
    BUSY_RETRY_S,
    IDLE_S_MAX,
    WRITE_S_MAX,
    Handler,
    Limits,
    Service,
    busy,
)
from device.leases import Leases
from protocol.errors import StorageError

CONNECTIONS_MAX: Final = 32
"""Applications on one device; each connection has a thread. Beyond it they are told to come back."""

CLOSE_S_MAX: Final = 5.0
"""How long requests may go on once the agent is told to end."""

_BACKLOG: Final = 128
_SWEEP_S: Final = 1.0
_ACCEPT_RETRY_S: Final = 0.1
"""After a connection could not be taken, for want of descriptors: it stays in the kernel's queue, and would be told of at once."""

_LOG: Final = logging.getLogger(__name__)


class Endpoint:
    """Answers applications until it is closed.

    Args:
        listen: A Unix socket, or address and port of loopback; port 0 for any.
        family: The model's name.
        leases: The model.
        limits: What it bears.

    Raises:
        StorageError: It cannot listen there.
    """

    def __init__(
        self, listen: Path | tuple[str, int], family: str, leases: Leases, limits: Limits | None = None
    ) -> None:
        self._path: Final = listen if isinstance(listen, Path) else None
        self._service: Final = Service(family, leases, limits or Limits(), self._path is not None)
        self._listener: Final = _listener(listen)
        self._open: Final[set[_Connection]] = set()
        self._changed: Final = threading.Condition()
        self._is_closed: Final = threading.Event()
        self._waker, self._woken = socket.socketpair()
        self._thread: Final = threading.Thread(target=self._accept, name="whimbrel-endpoint", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, as the configuration would say it."""
        if self._path is not None:
            return f"unix:{self._path}"
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self, patience_s: float = CLOSE_S_MAX) -> None:
        """Take no more requests, let those under way end for a while, and hang up."""
        self._is_closed.set()
        self._waker.close()
        self._thread.join()
        self._woken.close()
        self._listener.close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        with self._changed:
            for connection in self._open:
                if not connection.is_busy:
                    connection.hang_up()
            if not self._changed.wait_for(lambda: not self._open, patience_s):
                for connection in self._open:
                    connection.hang_up()
                self._changed.wait_for(lambda: not self._open, WRITE_S_MAX)

    def _accept(self) -> None:
        ready = select.poll()
        for each in (self._listener, self._woken):
            ready.register(each, select.POLLIN)
        swept_s = time.monotonic()
        while not self._is_closed.is_set():
            is_called = ready.poll(_SWEEP_S * 1000 if self._open else None)  # without clients it sleeps
            if is_called and not self._is_closed.is_set():
                try:
                    accepted, _ = self._listener.accept()
                except OSError:
                    self._is_closed.wait(_ACCEPT_RETRY_S)
                else:
                    self._take(accepted)
            if time.monotonic() - swept_s > _SWEEP_S:
                swept_s = time.monotonic()
                self._sweep(swept_s)

    def _take(self, accepted: socket.socket) -> None:
        if self._path is None:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(accepted, self._service, self._is_closed)
        with self._changed:
            is_full = len(self._open) >= CONNECTIONS_MAX
            if not is_full:
                self._open.add(connection)
        if is_full:
            connection.turn_away()
            return
        try:
            threading.Thread(
                target=self._run, args=(connection,), name="whimbrel-request", daemon=True
            ).start()
        except RuntimeError:  # the system has no more threads
            connection.turn_away()
            self._ended(connection)

    def _run(self, connection: "_Connection") -> None:
        try:
            connection.run()
        finally:
            self._ended(connection)

    def _ended(self, connection: "_Connection") -> None:
        with self._changed:
            self._open.discard(connection)
            self._changed.notify_all()

    def _sweep(self, now_s: float) -> None:
        """Hang up on whoever is slower than an honest client; a timeout per read would let a byte a minute pass."""
        with self._changed:
            for connection in self._open:
                if now_s > connection.read_until_s:
                    connection.hang_up()


def _listener(listen: Path | tuple[str, int]) -> socket.socket:
    if isinstance(listen, Path):
        return listen_unix(listen, mode=0o666, backlog=_BACKLOG)
    host, port = listen
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StorageError(
            f"the endpoint cannot listen on {host}:{port}: {error.strerror or error}",
            hint="[serving] listen names it",
        ) from error
    return listener


class _Connection:
    """One client; its methods are called from the endpoint's thread and its own."""

    def __init__(self, accepted: socket.socket, service: Service, is_closed: threading.Event) -> None:
        self.is_busy = False
        self.read_until_s = time.monotonic() + IDLE_S_MAX
        self._socket = accepted
        self._service = service
        self._is_closed = is_closed

    def run(self) -> None:
        """Answer request after request."""
        try:
            Handler(self._socket, self._service, self)
        except OSError:
            pass  # it hung up; there is nobody to tell
        except Exception:  # noqa: BLE001 - nobody else would ever see it
            _LOG.exception("a request ended in a bug")
        finally:
            with suppress(OSError):
                self._socket.close()

    def is_gone(self) -> bool:
        """Whether the client hung up."""
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        try:
            return bool(ready.poll(0)) and not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def is_last(self) -> bool:
        """Whether the connection is to end after the request under way."""
        return self._is_closed.is_set()

    def end_writing(self) -> None:
        """Say that nothing more will come."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        """What it reads or writes ends now."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def turn_away(self) -> None:
        """There are too many."""
        body = busy().body()
        with suppress(OSError), self._socket:
            self._socket.setblocking(False)
            self._socket.send(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Retry-After: %d\r\nContent-Length: %d\r\n\r\n%b" % (BUSY_RETRY_S, len(body), body)
            )
            self._socket.shutdown(socket.SHUT_WR)
