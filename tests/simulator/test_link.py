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


def test_each_direction_has_its_rate_and_pays_for_headers(peer: Peer) -> None:
    profile = LinkProfile("test", 10_000_000, 0, up_bytes_s=200_000, overhead=0.5)
    with emulated(peer, profile) as link, connected(link) as device:
        data = bytes(60_000)
        begin = time.monotonic()
        threading.Thread(target=device.sendall, args=(data,), daemon=True).start()
        assert received(peer.last(), len(data)) == data
        assert time.monotonic() - begin >= 0.9 * 1.5 * len(data) / 200_000
        begin = time.monotonic()
        threading.Thread(target=peer.last().sendall, args=(data,), daemon=True).start()
        assert received(device, len(data)) == data
        assert time.monotonic() - begin < 0.4


def test_a_link_comes_and_goes_at_set_instants(peer: Peer) -> None:
    lost: list[Cause] = []
    with emulated(peer, LinkProfile("test", 1_000_000, 1), lost) as link:
        with connected(link) as device:
            assert wait_until(lambda: peer.connections)
            begun = time.monotonic()
            link.follow(begun, iter([(0.0, True), (0.2, False), (0.6, True)]))
            with pytest.raises(ConnectionResetError):
                device.recv(1)
            assert 0.2 <= time.monotonic() - begun < 0.6
        assert lost == ["sleep"]
        assert wait_until(lambda: link.is_up)
        assert time.monotonic() - begun >= 0.6


def test_a_peer_whose_machine_is_gone_resets_connections_and_leaves_links_up(peer: Peer) -> None:
    emulator = LinkEmulator(peer.address, lambda _link, _cause: None)
    emulator.start()
    try:
        link = emulator.add("device-01", LinkProfile("test", 10_000, 1))
        with connected(link) as device:
            peer.last().sendall(bytes(100_000))  # ten seconds on this link
            assert received(device, 1_000)
            emulator.lose_all()
            before = time.monotonic()
            with pytest.raises(ConnectionResetError):
                received(device, 100_000)
            assert time.monotonic() - before < 5.0
        assert link.is_up
        with connected(link) as device:
            assert wait_until(lambda: len(peer.connections) == 2)
    finally:
        emulator.stop()
