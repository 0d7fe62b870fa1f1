"""Where the embedded broker may listen, and how sockets become connections of an event loop.

asyncio's own server drops sockets that it was just accepting when it is closed (`Server._attach` in 3.11), which
leaks them; so accepting is done here, on the loop's public interface.
"""

import asyncio
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from protocol.errors import PortInUseError, RequestError

_LOG = logging.getLogger(__name__)

BACKLOG: Final = 4_096
"""Connections that the system completes before we take them: a fleet that comes back at once."""

ACCEPTS_TOGETHER: Final = 128
"""Sockets taken before other connections get their turn."""

PAUSE_S: Final = 0.5
"""How long to wait when the process has no descriptor left for one more."""


def loopback_address(host: str) -> str:
    """Return the address to listen on; `localhost` means 127.0.0.1.

    Raises:
        RequestError: It is not a loopback address.
    """
    address = "127.0.0.1" if host == "localhost" else host
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise RequestError(
            f"the embedded broker does not listen on {host!r}: it has neither authentication nor TLS and serves "
            "loopback addresses only",
            hint="run mosquitto or EMQX for other machines and give whimbrel its address",
        )
    return address


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        PortInUseError: Another program listens there.
        RequestError: The system does not allow it.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":
            # The port of a broker that was stopped is free at once, its connections may linger.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _listen_error(host, port, error) from error
    return listener


def _listen_error(host: str, port: int, error: OSError) -> RequestError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {port} on {host} is in use by another program",
            hint="stop that program, or choose another port; 0 takes a free one",
        )
    reason = error.strerror or str(error)
    return RequestError(
        f"cannot listen on {host} port {port}: {reason}",
        hint="choose a port from 1024 on; 0 takes a free one",
    )


class Acceptor:
    """Takes sockets from a listener and gives each a protocol, until it is stopped.

    Args:
        listener: Owned from now on.
        protocol_factory: Called once for each connection.
    """

    def __init__(
        self, listener: socket.socket, protocol_factory: Callable[[], asyncio.BufferedProtocol]
    ) -> None:
        self._listener = listener
        self._protocol_factory = protocol_factory
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._resume()

    async def stop(self) -> None:
        """Close the port; return when every socket that was taken has become a connection."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._starting:
            await asyncio.wait(self._starting)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_TOGETHER):
            try:
                accepted, _peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _LOG.warning("no more connections are accepted for %.1f s: %s", PAUSE_S, error)
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(PAUSE_S, self._resume)
                return
            accepted.setblocking(False)
            task = self._loop.create_task(self._start(accepted))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol_factory, accepted)
        except OSError as error:
            _LOG.debug("a connection was gone before it was served: %s", error)
            accepted.close()
