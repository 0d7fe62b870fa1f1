"""Links: a loopback port per device, behind which bytes reach the broker late, slowly, or not at all.

Real sockets on both sides, so agents, brokers and their queues meet what they would meet in the field. A cut is a reset
of the connection without a word; while a link is down every attempt to connect is reset too.
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, Final, Literal

from protocol.errors import TransportError
from simulator.live.population import LinkProfile

PIECE_MS: Final = 20
"""Bytes travel in pieces of this much time on the link."""

PIECE_BYTES_MIN: Final = 4_096
PIECE_BYTES_MAX: Final = 32_768
SOCKET_BUFFER_BYTES: Final = 65_536
"""What the kernel may hold on each side: little, so that a slow link is felt by the broker's queue and not hidden."""

START_S_MAX: Final = 10.0

Cause = Literal["cut", "sleep"]


class Link:
    """One device's way to the broker; all public methods may be called from any thread."""

    def __init__(self, emulator: "LinkEmulator", device: str, profile: LinkProfile) -> None:
        self.device = device
        self.profile = profile
        self.port = 0
        self.bytes_down = 0  # delivered to the device
        self.bytes_up = 0
        self.is_up = True
        self._emulator = emulator
        self._transports: set[asyncio.WriteTransport] = set()
        self._armed: list[tuple[int, Callable[[], None]]] = []

    def arm(self, bytes_more: int, action: Callable[[], None]) -> None:
        """Call `action` on the link's thread once `bytes_more` bytes have reached the device from now on."""
        self._armed.append((self.bytes_down + bytes_more, action))

    def cut(self, offline_ms: int) -> None:
        """Reset the connection and stay down for a while."""
        self._emulator.soon(lambda: self._go_down("cut", offline_ms))

    def _go_down(self, cause: Cause, offline_ms: int) -> None:
        if self.is_up:
            self._lose(cause)
            asyncio.get_running_loop().call_later(offline_ms / 1000, self._come_up)

    def _lose(self, cause: Cause) -> None:
        self.is_up = False
        had_connection = self.reset_connection()
        if had_connection:
            self._emulator.on_lost(self, cause)

    def reset_connection(self) -> bool:
        """Reset the connection, on the emulator's thread; what was under way is lost. Returns whether there was one."""
        had_connection = bool(self._transports)
        for transport in list(self._transports):
            reset(transport)
        self._transports.clear()
        return had_connection

    def _come_up(self) -> None:
        self.is_up = True

    def delivered(self, count: int) -> None:
        """Note bytes that reached the device."""
        self.bytes_down += count
        for entry in [entry for entry in self._armed if self.bytes_down >= entry[0]]:
            self._armed.remove(entry)
            entry[1]()

    async def connect(self, device: asyncio.StreamReader, to_device: asyncio.StreamWriter) -> None:
        """Carry one connection until either side ends it."""
        broker: asyncio.StreamWriter | None = None
        try:
            if not self.is_up:
                return
            from_broker, broker = await asyncio.open_connection(*self._emulator.broker, limit=PIECE_BYTES_MAX)
            _narrow(broker)
            _narrow(to_device)
            self._transports |= {to_device.transport, broker.transport}
            profile = self.profile
            down_rate, up_rate = profile.bandwidth_bytes_s, profile.up_bytes_s or profile.bandwidth_bytes_s
            down = asyncio.create_task(self._carry(from_broker, to_device, self.delivered, down_rate))
            up = asyncio.create_task(self._carry(device, broker, self._sent, up_rate))
            _, pending = await asyncio.wait({down, up}, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(down, up, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the broker is not there, the device has gone again, or the emulator ends
        finally:
            for writer in (to_device, broker):
                if writer is not None:
                    self._transports.discard(writer.transport)
                    reset(writer.transport)

    def _sent(self, count: int) -> None:
        self.bytes_up += count

    async def _carry(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        count: Callable[[int], None],
        bytes_s: int,
    ) -> None:
        """Move bytes at a rate, each piece `latency_ms` after it went in."""
        profile = self.profile
        piece = min(max(bytes_s * PIECE_MS // 1000, PIECE_BYTES_MIN), PIECE_BYTES_MAX)
        travelling = 2 + bytes_s * profile.latency_ms // 1000 // piece
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(travelling)
        arriving = asyncio.create_task(_arrive(queue, target, count))
        try:
            free_at = 0.0
            while data := await source.read(piece):
                now = time.monotonic()
                free_at = max(now, free_at) + len(data) * (1 + profile.overhead) / bytes_s
                await queue.put((free_at + profile.latency_ms / 1000, data))
                if free_at > now + PIECE_MS / 4000:
                    await asyncio.sleep(free_at - now)
                if arriving.done():
                    return
            await queue.put((0.0, b""))
            await arriving
        except OSError:
            pass
        finally:
            arriving.cancel()

    def follow(self, begun_s: float, changes: Iterator[tuple[float, bool]]) -> None:
        """Come and go at set instants.

        Args:
            begun_s: By the monotonic clock.
            changes: Seconds since then, ascending, and whether the link is there from then on.
        """
        self._emulator.soon(lambda: self._emulator.keep(self._follow(begun_s, changes)))

    async def _follow(self, begun_s: float, changes: Iterator[tuple[float, bool]]) -> None:
        for at_s, is_up in changes:
            await asyncio.sleep(begun_s + at_s - time.monotonic())
            if is_up:
                self._come_up()
            else:
                self._lose("sleep")

    async def sleep_in_cycles(self) -> None:
        """Follow the duty cycle."""
        profile = self.profile
        if not profile.asleep_ms:
            return
        await asyncio.sleep(profile.phase_ms / 1000)
        while True:
            self._go_down("sleep", profile.asleep_ms)
            await asyncio.sleep((profile.asleep_ms + profile.awake_ms) / 1000)


async def _arrive(
    queue: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter, count: Callable[[int], None]
) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, data = await queue.get()
            if not data:
                return
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            target.write(data)
            await target.drain()
            count(len(data))


class LinkEmulator:
    """All links of a fleet, on one thread.

    Args:
        broker: Where they lead.
        on_lost: Told on the emulator's thread when a link goes down under a connection.
    """

    def __init__(self, broker: tuple[str, int], on_lost: Callable[[Link, Cause], None]) -> None:
        self.broker = broker
        self.on_lost = on_lost
        self.links: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)
        self._servers: list[asyncio.Server] = []
        self._cycles: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to carry bytes."""
        self._thread.start()

    def add(self, device: str, profile: LinkProfile) -> Link:
        """Open the port of a device; its duty cycle begins with `start_cycles`.

        Raises:
            TransportError: No port is left.
        """
        link = Link(self, device, profile)
        self._wait(self._listen(link))
        self.links[device] = link
        return link

    def start_cycles(self) -> None:
        """Let the links that have a duty cycle begin to sleep."""

        async def start() -> None:
            self._cycles += [asyncio.create_task(link.sleep_in_cycles()) for link in self.links.values()]

        self._wait(start())

    def lose_all(self) -> None:
        """Reset every connection and wait until it is done: the machine that they lead to is gone, links stay up."""

        async def lose() -> None:
            for link in self.links.values():
                link.reset_connection()

        self._wait(lose())

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something go on until the end, on the emulator's thread."""
        self._cycles.append(asyncio.create_task(work))

    def soon(self, action: Callable[[], None]) -> None:
        """Run `action` on the emulator's thread."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(action)

    def stop(self) -> None:
        """Reset every connection and close every port."""
        if self._thread.is_alive():
            self.soon(self._loop.stop)
            self._thread.join(START_S_MAX)

    async def _listen(self, link: Link) -> None:
        try:
            server = await asyncio.start_server(link.connect, "127.0.0.1", 0, limit=PIECE_BYTES_MAX)
        except OSError as error:
            raise TransportError(f"no port for the link of {link.device}: {error.strerror}") from error
        self._servers.append(server)
        link.port = server.sockets[0].getsockname()[1]

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.result(START_S_MAX)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for server in self._servers:
                server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()


def reset(transport: asyncio.BaseTransport) -> None:
    """End a connection with a reset, as a link that breaks looks to whoever sends next."""
    endpoint = transport.get_extra_info("socket")
    if endpoint is not None:
        with contextlib.suppress(OSError):
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()


def _narrow(writer: asyncio.StreamWriter) -> None:
    endpoint = writer.get_extra_info("socket")
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    writer.transport.set_write_buffer_limits(high=PIECE_BYTES_MAX)
