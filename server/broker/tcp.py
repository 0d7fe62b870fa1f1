"""The embedded broker on loopback TCP: sockets and the clock around the pure `core.BrokerCore`.

What lives here moves bytes and nothing else. No decision about MQTT is taken: those are in `core.py`.

There is no authentication and no TLS, so it refuses to listen anywhere but on loopback.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from protocol.errors import RequestError, TransportError
from server.broker.core import BrokerCore, Output, Send
from server.broker.limits import BrokerLimits, BrokerStatistics
from server.broker.listening import Acceptor, listen, loopback_address
from server.broker.packets import Packet, PacketReader, Publish, encode

_LOG = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 256 << 10
"""One receive buffer for all connections: each read is parsed before the next one starts."""

TRANSPORT_BYTES_HIGH: Final = 128 << 10
"""What asyncio may hold for a connection, copied: two chunks. The rest waits in our own queue, where the bytes of a
message are shared by everyone who gets it."""

COALESCE_BYTES: Final = 64 << 10
"""Small packets are joined up to this size, since a system call costs more than the copy."""

OUTPUTS_TOGETHER: Final = 32
"""Outputs of the core that are collected over the packets of one read before they are carried out."""

ENCODED_CACHE_BYTES: Final = 32 << 20
"""Encoded QoS 0 messages that are remembered: the groups that a fleet is taking at the moment."""

LINGER_S: Final = 2.0
"""How long a closed connection may take to accept its last bytes."""

START_S_MAX: Final = 10.0
"""How long starting and stopping the thread may take; both are a few system calls."""


class _EncodedCache:
    """The bytes of messages that go to many connections, by identity of the message, oldest out first."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Publish, bytes]] = {}
        self._byte_count = 0

    def encoded(self, packet: Packet) -> bytes:
        if type(packet) is not Publish or packet.qos:
            return encode(packet)
        entry = self._entries.get(id(packet))
        if entry is not None:
            return entry[1]
        data = encode(packet)
        # The entry holds the message, so that its identity is not given to another one.
        self._entries[id(packet)] = (packet, data)
        self._byte_count += len(data)
        while self._byte_count > ENCODED_CACHE_BYTES:
            oldest = next(iter(self._entries))
            self._byte_count -= len(self._entries.pop(oldest)[1])
        return data

    def clear(self) -> None:
        self._entries.clear()
        self._byte_count = 0


class _Connection(asyncio.BufferedProtocol):
    """One socket: bytes to packets on the way in, a bounded queue of shared bytes on the way out."""

    def __init__(self, edge: "_Edge") -> None:
        self._edge = edge
        self.connection_id = 0
        self.reader = PacketReader(edge.limits.packet_bytes_max)
        self._transport: asyncio.Transport | None = None
        self.waiting: deque[bytes] = deque()  # filled by the edge
        self._is_paused = False
        self._is_closing = False
        self._linger: asyncio.TimerHandle | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a TCP server makes stream transports"
        self._transport = transport
        transport.set_write_buffer_limits(high=TRANSPORT_BYTES_HIGH)
        self._edge.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._edge.receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._is_closing:
            self._edge.received(self, self._edge.receive_buffer[:nbytes])

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if not self._is_closing:
            self._edge.writable(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why does not matter to MQTT
        if self._linger is not None:
            self._linger.cancel()
        self._transport = None
        self.waiting.clear()
        self._edge.lost(self)

    # The edge's side

    def flush(self) -> int:
        """Hand over what the socket takes now; return how many bytes that was."""
        transport, waiting = self._transport, self.waiting
        if transport is None or transport.is_closing():
            return 0
        if len(waiting) == 1 and not self._is_paused:  # nearly always in a fan-out
            data = waiting.popleft()
            transport.write(data)
            return len(data)
        byte_count = 0
        # A write that finds the peer gone closes the transport; each further one would be a warning in the log.
        while waiting and not self._is_paused and not transport.is_closing():
            data = waiting.popleft()
            if waiting and len(data) + len(waiting[0]) <= COALESCE_BYTES:
                data = self._joined(data)
            byte_count += len(data)
            transport.write(data)
        return byte_count

    def _joined(self, first: bytes) -> bytes:
        parts, byte_count, waiting = [first], len(first), self.waiting
        while waiting and byte_count + len(waiting[0]) <= COALESCE_BYTES:
            byte_count += len(waiting[0])
            parts.append(waiting.popleft())
        return b"".join(parts)

    def close(self) -> None:
        """Close after the last bytes, within a bounded time."""
        if self._transport is None or self._is_closing:
            return
        self.flush()
        self._is_closing = True
        self.waiting.clear()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.abort)

    def abort(self) -> None:
        """Close at once."""
        self._is_closing = True
        if self._transport is not None:
            self._transport.abort()


class _Edge:
    """Carries packets between connections and a core; lives in one event loop."""

    def __init__(self, limits: BrokerLimits) -> None:
        self.limits = limits
        self.core = BrokerCore(limits)
        self.receive_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._connections: dict[int, _Connection] = {}
        self._all: set[_Connection] = set()
        self._everyone_left = asyncio.Event()
        self._everyone_left.set()
        self._encoded = _EncodedCache()
        self._last_connection_id = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0

    def now_ms(self) -> int:
        return int(self._loop.time() * 1_000)

    def opened(self, connection: _Connection) -> None:
        self._last_connection_id += 1
        connection.connection_id = self._last_connection_id
        self._connections[connection.connection_id] = connection
        self._all.add(connection)
        self._everyone_left.clear()
        self._carry_out(self.core.connected(connection.connection_id, self.now_ms()))

    def received(self, connection: _Connection, data: memoryview) -> None:
        now_ms = self.now_ms()
        outputs: list[Output] = []
        for packet in connection.reader.feed(data):
            outputs += self.core.received(connection.connection_id, packet, now_ms)
            # Answers to many small packets leave together; more would count as unsent without being so.
            if len(outputs) > OUTPUTS_TOGETHER:
                self._carry_out(outputs)
                outputs = []
        self._carry_out(outputs)
        self._arm()

    def writable(self, connection: _Connection) -> None:
        byte_count = connection.flush()
        if byte_count:
            self._carry_out(self.core.sent(connection.connection_id, byte_count, self.now_ms()))

    def lost(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if not self._all:
            self._everyone_left.set()
        if self._connections.pop(connection.connection_id, None) is not None:
            self._carry_out(self.core.disconnected(connection.connection_id, self.now_ms()))

    def forget_retained(self) -> None:
        self.core.forget_retained()
        self._encoded.clear()

    def restart(self) -> None:
        """Lose everything, as a broker without persistence does when its process dies."""
        self.core = BrokerCore(self.limits)
        self._encoded.clear()
        self._connections.clear()
        for connection in self._all:
            connection.abort()

    async def stop(self) -> None:
        """Close all connections and wait until they are gone; the port must be closed already."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._connections.clear()
        for connection in self._all:
            connection.abort()
        await self._everyone_left.wait()

    def _carry_out(self, outputs: list[Output]) -> None:
        connections, encoded, sent = self._connections, self._encoded.encoded, self.core.sent
        while outputs:
            touched: dict[int, _Connection] = {}
            last: Packet | None = None
            data = b""
            for output in outputs:
                connection_id = output[0]
                connection = connections.get(connection_id)
                if connection is None:
                    continue
                if type(output) is Send:
                    packet = output[1]
                    if packet is not last:
                        last, data = packet, encoded(packet)
                    connection.waiting.append(data)
                    touched[connection_id] = connection
                else:
                    self._close(connection, output[1])
                    touched.pop(connection_id, None)
            outputs = []
            now_ms = self.now_ms()
            for connection_id, connection in touched.items():
                byte_count = connection.flush()
                if byte_count:
                    outputs += sent(connection_id, byte_count, now_ms)

    def _close(self, connection: _Connection, reason: object) -> None:
        _LOG.debug("connection %d closed: %s", connection.connection_id, reason)
        del self._connections[connection.connection_id]
        connection.close()

    def _arm(self) -> None:
        """Have `_expire` called at the core's deadline; a timer that is early enough is kept."""
        deadline_ms = self.core.deadline()
        if deadline_ms is None or (self._timer is not None and self._timer_ms <= deadline_ms):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = deadline_ms
        # One millisecond later: the loop's clock is finer than ours.
        self._timer = self._loop.call_at((deadline_ms + 1) / 1_000, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._carry_out(self.core.expire(self.now_ms()))
        self._arm()


class EmbeddedBroker:
    """An MQTT 3.1.1 broker inside this process, for one machine: demo, tests, `whimbrel serve` without a setting.

    Use it as a context manager (a thread with an event loop of its own), or `start()` and `stop()` it in a loop that
    runs already.

    Args:
        host: A loopback address, or `localhost`, which means 127.0.0.1.
        port: 0 lets the system choose; `port` is exact once started.
        limits: What clients may make the broker hold.

    Raises:
        RequestError: `host` is not a loopback address, or `port` is none.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, limits: BrokerLimits | None = None) -> None:
        self.host = loopback_address(host)
        if not 0 <= port <= 65_535:
            raise RequestError(f"{port} is no TCP port", hint="choose 0 to 65535; 0 takes a free one")
        self.port = port
        self._limits = limits or BrokerLimits()
        self._edge: _Edge | None = None
        self._acceptor: Acceptor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop_wanted: asyncio.Event | None = None
        self._last_statistics = BrokerStatistics()

    # In a running loop

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            PortInUseError: Another program listens there.
            RequestError: The system does not allow it.
        """
        assert self._acceptor is None, "a broker is started once at a time"
        listener = listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        edge = _Edge(self._limits)
        self._acceptor = Acceptor(listener, lambda: _Connection(edge))
        self._edge, self._loop = edge, asyncio.get_running_loop()
        return self.port

    async def stop(self) -> None:
        """Close the port and every connection; what the broker held is gone."""
        if self._acceptor is None or self._edge is None:
            return
        await self._acceptor.stop()
        await self._edge.stop()
        self._last_statistics = self._edge.core.statistics
        self._acceptor = self._edge = self._loop = None

    # In a thread of its own

    def start_in_thread(self) -> int:
        """Listen in a new thread, and return the port; errors are those of `start`."""
        assert self._thread is None, "a broker is started once at a time"
        ready = threading.Event()
        failures: list[BaseException] = []
        self._thread = threading.Thread(
            target=self._run, args=(ready, failures), name=f"mqtt-broker-{self.host}", daemon=True
        )
        self._thread.start()
        if not ready.wait(START_S_MAX):
            raise TransportError(
                "the embedded broker did not start in time", hint="the machine is overloaded"
            )
        if failures:
            self._thread.join()
            self._thread = None
            raise failures[0]
        return self.port

    def close(self) -> None:
        """Stop the thread and wait for it; harmless when it does not run."""
        thread, loop, stop_wanted = self._thread, self._loop, self._stop_wanted
        if thread is None:
            return
        if loop is not None and stop_wanted is not None:
            # The loop may be ending by itself at this very moment.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop_wanted.set)
        thread.join(START_S_MAX)
        if thread.is_alive():
            raise TransportError("the embedded broker did not stop in time", hint="the machine is overloaded")
        self._thread = None

    def __enter__(self) -> Self:
        self.start_in_thread()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # While it runs, from any thread

    def statistics(self) -> BrokerStatistics:
        """Return the counters: live while it runs, the last ones afterwards. Do not change them."""
        return self._edge.core.statistics if self._edge is not None else self._last_statistics

    def forget_retained(self) -> None:
        """Lose the retained messages; done when this returns."""
        self._call(lambda edge: edge.forget_retained())

    def restart(self) -> None:
        """Cut all connections and lose sessions, queues and retained messages; the port stays open."""
        self._call(lambda edge: edge.restart())

    # Inside

    def _call(self, action: Callable[[_Edge], None]) -> None:
        """Run an action in the broker's loop, and wait for it unless this is the loop itself."""
        loop, edge = self._loop, self._edge
        if loop is None or edge is None:
            raise RequestError("the embedded broker is not running", hint="start it first")
        if self._thread is None or threading.current_thread() is self._thread:
            action(edge)
            return
        done = threading.Event()

        def run() -> None:
            action(edge)
            done.set()

        loop.call_soon_threadsafe(run)
        if not done.wait(START_S_MAX):
            raise TransportError("the embedded broker does not answer", hint="the machine is overloaded")

    def _run(self, ready: threading.Event, failures: list[BaseException]) -> None:
        asyncio.run(self._serve_until_stopped(ready, failures))

    async def _serve_until_stopped(self, ready: threading.Event, failures: list[BaseException]) -> None:
        self._stop_wanted = asyncio.Event()
        try:
            await self.start()
        except RequestError as error:
            failures.append(error)
            return
        finally:
            ready.set()
        await self._stop_wanted.wait()
        await self.stop()
