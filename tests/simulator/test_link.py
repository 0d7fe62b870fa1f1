"""A link is as slow and as late as its profile says, and a cut is a reset that nobody announces."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from simulator.live.link import Cause, Link, LinkEmulator
from simulator.live.population import LinkProfile

WAIT_S = 10.0


def wait_until(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class Peer:
    """What the links lead to: takes connections and keeps the last one."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listener.getsockname()
        return host, port

    def last(self) -> socket.socket:
        assert wait_until(lambda: self.connections)
        return self.connections[-1]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connections.append(self.listener.accept()[0])

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@contextlib.contextmanager
def emulated(peer: Peer, profile: LinkProfile, lost: list[Cause] | None = None) -> Iterator[Link]:
    emulator = LinkEmulator(
        peer.address, lambda _link, cause: (lost if lost is not None else []).append(cause)
    )
    emulator.start()
    try:
        yield emulator.add("device-01", profile)
    finally:
        emulator.stop()


def connected(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=WAIT_S)


def received(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return data


def test_bytes_arrive_whole_late_and_no_faster_than_the_bandwidth(peer: Peer) -> None:
    with emulated(peer, LinkProfile("test", 200_000, 50)) as link, connected(link) as device:
        data = bytes(range(256)) * 400
        begin = time.monotonic()
        threading.Thread(target=peer.last().sendall, args=(data,), daemon=True).start()
        assert received(device, len(data)) == data
        took = time.monotonic() - begin
        assert took >= 0.9 * (len(data) / 200_000 + 0.05)
        # Counted once they are sent, which is a moment before or after they are read.
        assert wait_until(lambda: link.bytes_down == len(data))


def test_a_cut_resets_the_connection_and_later_ones_until_the_link_is_back(peer: Peer) -> None:
    lost: list[Cause] = []
    with emulated(peer, LinkProfile("test", 1_000_000, 1), lost) as link:
        with connected(link) as device:
            peer.last().sendall(b"hello")
            assert received(device, 5) == b"hello"
            link.cut(400)
            with pytest.raises(ConnectionResetError):
                device.recv(1)
        assert lost == ["cut"]
        with contextlib.suppress(ConnectionError), connected(link) as refused:
            assert refused.recv(1) == b""
        assert wait_until(lambda: link.is_up)
        before = len(peer.connections)
        with connected(link) as device:
            assert wait_until(lambda: len(peer.connections) > before)
            peer.last().sendall(b"again")
            assert received(device, 5) == b"again"


def test_an_armed_link_acts_once_so_many_bytes_have_come_through(peer: Peer) -> None:
    with emulated(peer, LinkProfile("test", 10_000_000, 0)) as link, connected(link) as device:
        counts: list[int] = []
        link.arm(10_000, lambda: counts.append(link.bytes_down))
        peer.last().sendall(bytes(50_000))
        assert len(received(device, 50_000)) == 50_000
        assert wait_until(lambda: counts)
        assert len(counts) == 1
        assert counts[0] >= 10_000
