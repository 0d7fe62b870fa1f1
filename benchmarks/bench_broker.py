"""How fast brokers hand one artifact to many clients: the embedded broker against mosquitto, on this machine.

    python -m benchmarks.bench_broker [--clients 200] [--chunks 160] [--rounds 3] [--brokers embedded mosquitto] [--json]

Clients take groups of eight retained 64 KiB chunks at QoS 0, two groups outstanding, as devices do; then everyone gets
live messages of 64 KiB and of 200 bytes. Prints seconds, processor seconds of the broker, and its memory. Shared
machines are noisy: read ratios within a round.
"""

import argparse
import dataclasses
import json
import select
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import psutil

from server.broker.packets import Connect, Packet, Puback, Publish, Subscribe, Unsubscribe, encode
from tests.server.brokers import Address, Wire, embedded_broker_process, mosquitto_broker

CHUNK_BYTES: Final = 65_536
GROUP_CHUNKS: Final = 8
WAIT_S: Final = 120.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One broker, one round. Seconds; processor seconds are the broker's; `rss_mb` at the end."""

    broker: str
    connect_s: float
    windows_s: float
    windows_cpu_s: float
    windows_mb_per_s: float
    large_s: float
    large_cpu_s: float
    small_s: float
    small_cpu_s: float
    rss_mb: float


class Sink:
    """A client that counts PUBLISH packets and skips their payloads, cheap enough to run hundreds beside a broker."""

    def __init__(self, address: Address, client_id: str) -> None:
        self.socket = socket.create_connection((address.host, address.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.packets = self.messages = self.bytes = self._skip = 0
        self._head = b""
        self.send(Connect(client_id))

    def send(self, packet: Packet) -> None:
        """Send one packet."""
        self.socket.sendall(encode(packet))

    def take(self, data: bytes) -> None:
        """Count what is complete; only fixed headers are looked at."""
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                position += step
                self._skip -= step
                if not self._skip:
                    self._count()
                continue
            self._head += data[position : position + 1]
            position += 1
            if len(self._head) > 1 and self._head[-1] < 0x80:
                self._skip = sum((byte & 0x7F) << 7 * index for index, byte in enumerate(self._head[1:]))
                self.bytes += self._skip
                if not self._skip:
                    self._count()

    def _count(self) -> None:
        self.packets += 1
        self.messages += self._head[0] >> 4 == 3
        self._head = b""


class Swarm:
    """Sinks on one epoll loop."""

    def __init__(self, address: Address, client_count: int) -> None:
        self.sinks = [Sink(address, f"sink-{number}") for number in range(client_count)]
        self._by_descriptor = {sink.socket.fileno(): sink for sink in self.sinks}
        self._epoll = select.epoll()
        for descriptor in self._by_descriptor:
            self._epoll.register(descriptor, select.EPOLLIN)

    def run(self, is_done: Callable[[], bool], on_data: Callable[[Sink], None] | None = None) -> float:
        """Serve until done; return the seconds it took."""
        start = time.perf_counter()
        while not is_done():
            if time.perf_counter() - start > WAIT_S:
                raise SystemExit("error: the broker did not deliver everything in time")
            for descriptor, _ in self._epoll.poll(0.2, 512):
                sink = self._by_descriptor[descriptor]
                sink.take(sink.socket.recv(1 << 18))
                if on_data is not None:
                    on_data(sink)
        return time.perf_counter() - start

    def step(self) -> None:
        """Serve what is there, without waiting."""
        for descriptor, _ in self._epoll.poll(0, 512):
            sink = self._by_descriptor[descriptor]
            sink.take(sink.socket.recv(1 << 18))

    def close(self) -> None:
        """Leave without a word."""
        self._epoll.close()
        for sink in self.sinks:
            sink.socket.close()


def _processor_s(address: Address) -> float:
    times = psutil.Process(address.pid).cpu_times()
    return times.user + times.system


def _group(number: int) -> str:
    return f"wb1.bench/b/digest.{number}/+"


def _windows(address: Address, swarm: Swarm, chunk_count: int) -> tuple[float, float]:
    group_count = chunk_count // GROUP_CHUNKS
    done: dict[Sink, int] = dict.fromkeys(swarm.sinks, 0)

    def on_data(sink: Sink) -> None:
        while sink.messages >= GROUP_CHUNKS * (done[sink] + 1):
            sink.send(Unsubscribe(1, (_group(done[sink]),)))
            done[sink] += 1
            if done[sink] + 1 < group_count:
                sink.send(Subscribe(1, ((_group(done[sink] + 1), 0),)))

    before = _processor_s(address)
    for sink in swarm.sinks:
        sink.send(Subscribe(1, ((_group(0), 0), (_group(1), 0))))
    seconds = swarm.run(lambda: all(count == group_count for count in done.values()), on_data)
    return seconds, _processor_s(address) - before


def _live(address: Address, swarm: Swarm, publisher: Wire, count: int, payload: bytes) -> tuple[float, float]:
    goal = {sink: sink.messages + count for sink in swarm.sinks}
    before, start = _processor_s(address), time.perf_counter()
    publisher.socket.settimeout(0.0005)
    for number in range(count):
        publisher.send(Publish(f"live/{number % 50}", payload, 1, packet_id=number % 60_000 + 1))
        while not publisher.packets:
            swarm.step()
            try:
                publisher.read()
            except TimeoutError:
                continue
        publisher.packets.clear()
    publisher.socket.settimeout(WAIT_S)
    swarm.run(lambda: all(sink.messages >= goal[sink] for sink in swarm.sinks))
    return time.perf_counter() - start, _processor_s(address) - before


def measure(address: Address, client_count: int, chunk_count: int) -> Result:
    """Run all parts against one broker that has just been started."""
    with Wire(address) as publisher:
        publisher.connect(Connect("publisher"))
        for number in range(chunk_count):
            topic = f"wb1.bench/b/digest.{number // GROUP_CHUNKS}/{number}"
            publisher.send(Publish(topic, bytes(CHUNK_BYTES), 1, retain=True, packet_id=number + 1))
            publisher.expect(Puback)
        start = time.perf_counter()
        swarm = Swarm(address, client_count)
        swarm.run(lambda: all(sink.packets for sink in swarm.sinks))
        connect_s = time.perf_counter() - start
        windows_s, windows_cpu_s = _windows(address, swarm, chunk_count)
        for sink in swarm.sinks:
            sink.send(Subscribe(2, (("live/+", 0),)))
        packets = {sink: sink.packets for sink in swarm.sinks}
        swarm.run(lambda: all(sink.packets > packets[sink] for sink in swarm.sinks))
        large_s, large_cpu_s = _live(address, swarm, publisher, 64, bytes(CHUNK_BYTES))
        small_s, small_cpu_s = _live(address, swarm, publisher, 500, bytes(200))
        rss_mb = psutil.Process(address.pid).memory_info().rss / 1e6
        swarm.close()
    megabytes = client_count * chunk_count * CHUNK_BYTES / 1e6
    return Result(
        address.name,
        connect_s,
        windows_s,
        windows_cpu_s,
        megabytes / windows_s,
        large_s,
        large_cpu_s,
        small_s,
        small_cpu_s,
        rss_mb,
    )


def _started(name: str, folder: Path) -> AbstractContextManager[Address]:
    return embedded_broker_process() if name == "embedded" else mosquitto_broker(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=160, help="a multiple of 8, at least 16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--brokers", nargs="+", choices=["embedded", "mosquitto"], default=["embedded", "mosquitto"]
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.chunks < 2 * GROUP_CHUNKS or options.chunks % GROUP_CHUNKS:
        parser.error("--chunks is a multiple of 8, at least 16")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in options.brokers:
                with _started(name, Path(folder)) as address:
                    results.append(measure(address, options.clients, options.chunks))
                if not options.json:
                    shown = dataclasses.asdict(results[-1])
                    del shown["broker"]
                    print(f"{name:10s}", *(f"{key} {value:.2f}" for key, value in shown.items()), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
