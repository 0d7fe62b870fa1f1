"""Any number of paho clients on one selector loop, in one thread. The only importer of paho on a device.

paho's own thread per client ends at 340 clients (`select` and three descriptors each); a loop that drives its
socket callbacks carries thousands. The traps of such a loop, all met here: `connect` blocks, so it runs on a thread; paho does not
reconnect by itself outside its own loops; with TLS, bytes that were decrypted already must be drained, since the socket does not
become readable for them.
"""

import contextlib
import heapq
import logging
import random
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from device.reconnect import Backoff
from protocol.errors import WhimbrelError

KEEPALIVE_S: Final = 30
CONNECT_TIMEOUT_S: Final = 10.0
QUEUED_MESSAGES_MAX: Final = 256
"""Messages that wait in paho for the socket: reports and requests are few, and the next one says it all again."""

CONNECTORS_MAX: Final = 32
"""Connections of one process that are being opened at a time; the others wait for their turn."""

_LOG: Final = logging.getLogger(__name__)
_MISC_INTERVAL_S: Final = 1.0
_POLL_MAX_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the broker is, and how to speak to it.

    Attributes:
        host: Its name or address.
        port: Its port.
        tls: Gives what a connection is made with, for each anew and on a thread of its own; plain connections where there is none.
    """

    host: str
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for a client that vanished."""

    topic: str
    payload: bytes


class Watcher(Protocol):
    """Whoever has a socket on a loop."""

    def on_ready(self, mask: int) -> None:
        """The socket can be read from or written to."""


class MqttLoop:
    """The loop: sockets, timers, and calls from other threads."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._calls: deque[Callable[[], None]] = deque()
        self._transports: set[MqttTransport] = set()
        self._connectors = 0
        self._connects: deque[Callable[[], None]] = deque()
        self._misc_at = 0.0
        self._is_stopping = False
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, None)

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        """Run `call` in the loop's thread; the only method that other threads may use."""
        self._calls.append(call)
        with contextlib.suppress(
            OSError
        ):  # full means that a wake-up is under way; closed, that nobody listens
            self._wake_sender.send(b"\0")

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Run `call` in the loop's thread after `delay_s`."""
        self._serial += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._serial, call))

    def run_until(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        """Run until `is_done` says so; whether it did in time."""
        end = time.monotonic() + timeout_s
        while not is_done():
            if time.monotonic() >= end:
                return False
            self.step(0.05)
        return True

    def run_forever(self) -> None:
        """Run until `stop`."""
        while not self._is_stopping:
            self.step(_POLL_MAX_S)

    def stop(self) -> None:
        """Let `run_forever` return; from any thread."""
        self.call_soon_threadsafe(self._stop)

    def step(self, timeout_s: float) -> None:
        """Wait for at most `timeout_s`, and do what is to be done."""
        now = time.monotonic()
        if self._timers:
            timeout_s = min(timeout_s, max(0.0, self._timers[0][0] - now))
        for key, mask in self._selector.select(0 if self._calls else timeout_s):
            if key.data is None:
                self._drain_wakeups()
            else:
                key.data.on_ready(mask)
        for _ in range(len(self._calls)):
            self._calls.popleft()()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        if now >= self._misc_at:
            self._misc_at = now + _MISC_INTERVAL_S
            for transport in tuple(self._transports):
                transport.on_tick()

    def close(self) -> None:
        """Close the transports that are left, and give the loop's own descriptors back."""
        for transport in tuple(self._transports):
            transport.close()
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def register(self, transport: "MqttTransport") -> None:
        """Let a transport live on this loop."""
        self._transports.add(transport)

    def forget(self, transport: "MqttTransport") -> None:
        """A transport is closed."""
        self._transports.discard(transport)

    def run_connector(self, connect: Callable[[], None]) -> None:
        """Run what opens a connection, and blocks meanwhile, on a thread; in its turn where there are many."""
        if self._connectors >= CONNECTORS_MAX:
            self._connects.append(connect)
            return
        self._connectors += 1

        def run() -> None:
            connect()
            self.call_soon_threadsafe(self._connector_ended)

        # A daemon: a network that swallows everything must not hold up the end of the process.
        threading.Thread(target=run, name="whimbrel-connect", daemon=True).start()

    def watch(self, sock: socket.socket, mask: int, watcher: Watcher) -> None:
        """Watch a socket for the events of `mask`; none of them stops it."""
        if sock.fileno() < 0:
            return  # closed, and forgotten when it was
        known = sock.fileno() in self._selector.get_map()
        if not mask:
            if known:
                self._selector.unregister(sock)
        elif known:
            self._selector.modify(sock, mask, watcher)
        else:
            self._selector.register(sock, mask, watcher)

    def _connector_ended(self) -> None:
        self._connectors -= 1
        if self._connects:
            self.run_connector(self._connects.popleft())

    def _stop(self) -> None:
        self._is_stopping = True

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_receiver.recv(4096):
                pass


class MqttTransport:
    """One connection to the broker that comes back by itself: the `Transport` port.

    Args:
        loop: Where it lives; all methods are for the loop's thread.
        address: The broker.
        client_id: Identity on the broker.
        rng: Source of jitter.
        will: Said by the broker when the connection is lost.
        on_connected: The broker accepted us.
        on_disconnected: The connection is gone.
        on_message: Something was delivered: topic and payload.
    """

    def __init__(
        self,
        loop: MqttLoop,
        address: BrokerAddress,
        client_id: str,
        rng: random.Random,
        *,
        will: Will | None,
        on_connected: Callable[[], None],
        on_disconnected: Callable[[], None],
        on_message: Callable[[str, bytes], None],
    ) -> None:
        self.error = ""  # why there is no connection
        self._loop = loop
        self._address = address
        self._backoff = Backoff(rng)
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_message = on_message
        self._is_enabled = False
        self._is_connecting = False
        self._is_connected = False
        self._connected_at = 0.0
        self._wants_write = False
        self._refusal = ""  # what the broker said in its answer
        self._generation = 0  # of the wish to connect: a timer of an earlier one is void
        self._client_id = client_id
        self._will = will
        self._client: Client | None = None  # a new one for each connection: nothing of an old one lingers
        self._socket: Any = None
        loop.register(self)

    @property
    def is_connected(self) -> bool:
        """Whether the broker accepted us."""
        return self._is_connected

    # --- the port -------------------------------------------------------------------------------------------

    def subscribe(self, filters: tuple[str, ...], qos: int) -> None:
        """As `Transport.subscribe`."""
        if self._is_connected and self._client is not None:
            self._client.subscribe([(pattern, qos) for pattern in filters])

    def unsubscribe(self, filters: tuple[str, ...]) -> None:
        """As `Transport.unsubscribe`."""
        if self._is_connected and self._client is not None:
            self._client.unsubscribe(list(filters))

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """As `Transport.publish`."""
        if self._is_connected and self._client is not None:
            self._client.publish(topic, payload, qos, retain)

    def progressed(self) -> None:
        """As `Transport.progressed`."""
        self._backoff.progressed()

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, and go on connecting after every loss."""
        self._is_enabled = True
        self._backoff.reset()
        self._generation += 1
        self._connect()

    def drop(self, *, stay_away: bool = False) -> None:
        """Lose the connection without a word, as a link does.

        Args:
            stay_away: Do not come back before `start`.
        """
        self._is_enabled = self._is_enabled and not stay_away
        self._generation += 1
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._lost("connection dropped")

    def close(self) -> None:
        """Say goodbye and stay away."""
        self._is_enabled = False
        self._generation += 1
        if self._client is not None and self._socket is not None:
            self._client.disconnect()
            self._client.loop_write()
            self._lost("closed")
        self._loop.forget(self)

    # --- the loop's side ------------------------------------------------------------------------------------

    def on_ready(self, mask: int) -> None:
        """The socket can be read from or written to."""
        client = self._client
        if client is None:
            return
        if mask & selectors.EVENT_WRITE:
            client.loop_write()
        if mask & selectors.EVENT_READ and client is self._client:
            client.loop_read()
            while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
                client.loop_read()

    def on_tick(self) -> None:
        """Once a second: keep-alive and acknowledgements that never came."""
        if self._client is not None and self._socket is not None:
            self._client.loop_misc()

    # --- connecting -----------------------------------------------------------------------------------------

    def _make_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=MQTTv311, clean_session=True
        )
        client.max_queued_messages_set(QUEUED_MESSAGES_MAX)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=1, retain=True)
        client.on_connect = self._paho_connected
        client.on_disconnect = self._paho_disconnected
        client.on_message = self._paho_message
        client.on_subscribe = self._paho_subscribed
        client.on_socket_open = self._paho_socket_opened
        client.on_socket_close = self._paho_socket_closed
        client.on_socket_register_write = self._paho_wants_write
        client.on_socket_unregister_write = self._paho_wants_no_write
        return client

    def _connect(self) -> None:
        """Open the connection on a thread of its own: paho's `connect` blocks for as long as the network likes."""
        if self._is_connecting or self._socket is not None or not self._is_enabled:
            return
        self._is_connecting = True
        self._wants_write = False
        self._refusal = ""
        client = self._client = self._make_client()
        arguments = (client, self._address.host, self._address.port)
        self._loop.run_connector(partial(self._connect_blocking, *arguments))

    def _connect_blocking(self, client: Client, host: str, port: int) -> None:
        reason = ""
        try:
            if self._address.tls is not None:
                client.tls_set_context(self._address.tls())
            client.connect(host, port, KEEPALIVE_S)
        except (OSError, ValueError, WhimbrelError) as error:
            reason = f"{host}:{port}: {error}"
        self._loop.call_soon_threadsafe(lambda: self._connect_ended(client, reason))

    def _connect_ended(self, client: Client, reason: str) -> None:
        self._is_connecting = False
        if reason:
            self._lost(reason)
            return
        self._socket = client.socket()
        if not self._is_enabled:
            self.drop(stay_away=True)
        elif self._socket is None:
            self._lost("the broker closed the connection")
        else:
            self._watch()

    def _reconnect_later(self) -> None:
        if not self._is_enabled:
            return
        self._generation += 1
        generation = self._generation
        self._loop.call_later(self._backoff.wait_s(), lambda: self._reconnect(generation))

    def _reconnect(self, generation: int) -> None:
        if generation == self._generation:
            self._connect()

    def _lost(self, reason: str) -> None:
        """The connection is gone: close the socket, say so once, and come back later."""
        if self._socket is not None:
            self._loop.watch(self._socket, 0, self)
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None
        if self._client is not None:
            # paho tidies up when it is collected, long after; nobody listens by then.
            self._client.on_socket_close = self._client.on_disconnect = None
            self._client = None
        if reason != self.error and self._is_enabled:
            _LOG.info("%s: not connected: %s", self._client_id, reason)
        self.error = reason
        was_connected, self._is_connected = self._is_connected, False
        if was_connected:
            self._backoff.ended(time.monotonic() - self._connected_at)
            self._on_disconnected()
        self._reconnect_later()

    def _suspected(self) -> str:
        """TLS 1.3 lets a client in before its certificate was looked at: a broker that does not like it hangs up then."""
        if self._address.tls is None or self._is_connected:
            return ""
        return (
            f"{self._address.host}:{self._address.port}: the broker hangs up; it may not accept this certificate "
            "(expired, revoked, or of another authority)"
        )

    def _watch(self) -> None:
        if self._socket is not None:
            mask = selectors.EVENT_READ
            self._loop.watch(self._socket, mask | (selectors.EVENT_WRITE if self._wants_write else 0), self)

    # --- paho's callbacks -----------------------------------------------------------------------------------

    def _paho_connected(
        self,
        client: Client,
        _user: object,
        _flags: ConnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if client is not self._client:
            return
        if code.is_failure:
            self.error = self._refusal = f"the broker refuses the connection: {code}"
            return
        self._is_connected = True
        self._connected_at = time.monotonic()
        self.error = ""
        _LOG.info("%s: connected to %s:%d", self._client_id, self._address.host, self._address.port)
        self._on_connected()

    def _paho_disconnected(
        self,
        client: Client,
        _user: object,
        _flags: DisconnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if client is self._client and self._socket is not None:
            self._lost(self._refusal or self._suspected() or self.error or str(code))

    def _paho_subscribed(
        self,
        _client: Client,
        _user: object,
        _message_id: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        """A refusal is for a person to mend; what the subscription would have brought is asked for after a while."""
        if any(code.is_failure for code in codes):
            _LOG.warning("%s: the broker refuses a subscription; look at its access rules", self._client_id)

    def _paho_message(self, client: Client, _user: object, message: MQTTMessage) -> None:
        if client is self._client:
            self._on_message(message.topic, bytes(message.payload))

    def _paho_socket_opened(self, _client: Client, _user: object, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _paho_socket_closed(self, _client: Client, _user: object, sock: Any) -> None:
        if sock is self._socket:
            self._loop.watch(sock, 0, self)

    def _paho_wants_write(self, client: Client, _user: object, _sock: Any) -> None:
        if client is self._client:
            self._wants_write = True
            self._watch()

    def _paho_wants_no_write(self, client: Client, _user: object, _sock: Any) -> None:
        if client is self._client:
            self._wants_write = False
            self._watch()
