"""Chunk delivery to a fleet: chunks cached by the broker, against a reply to every device (`make bench-transport`).

One artifact goes to many devices. The devices are the real download code over real paho clients, in two processes with a loop each, so that the
devices' share of the work does not hide the rest; the server is the real MQTT adapter in a process of its own; the broker is mosquitto, or the embedded one,
in a process of its own. Measured
in one run: time until the last device has everything, publishes and CPU of the server, CPU, memory and bytes of the
broker, and the bytes that came although they were there already, with and without devices that drop out.

Times are for comparison within one run only. The devices share this machine's cores, which none of them would do: so the digests of chunks
are not computed unless `--check-digests` is given, and what remains is the cost of the transport.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport
from device.download import BlobDownload, Tally
from device.effects import Effect, Publish, Subscribe, Unsubscribe
from protocol.chunks import Bitmap, BlobPlan, decode_chunk
from protocol.constants import CHUNK_BYTES
from protocol.delta_graph import LINK_BYTES_PER_S
from protocol.errors import ChunkError
from protocol.ids import DeviceId, FleetId, digest_of
from protocol.messages import ChunkRequest, decode_window
from protocol.topics import Topics
from server.adapters.mqtt import MqttTransport as ServerTransport
from server.events import Event, RequestReceived
from tests.server.brokers import Address, embedded_broker_process, mosquitto_broker

FLEET = FleetId("bench")
TOPICS = Topics(FLEET)
TIMEOUT_S = 120.0


def main() -> int:
    """Run every combination and print one table; `--json` prints a line per row as well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3, help="the table shows the median round by time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="the devices are spread over so many")
    parser.add_argument("--broker", action="append", choices=["mosquitto", "embedded"])
    parser.add_argument(
        "--check-digests", action="store_true", help="devices check every chunk, as real ones do"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    blob = random.Random(options.seed).randbytes(int(options.megabytes * (1 << 20)))
    rows: list[dict[str, Any]] = []
    for broker in options.broker or ["mosquitto", "embedded"]:
        for churn in (0.0, 0.3):
            # The two designs take turns, so that the machine's moods fall on both.
            runs: dict[str, list[dict[str, Any]]] = {"cached groups": [], "replies": []}
            for _ in range(options.rounds):
                for design, results in runs.items():
                    results.append(measure(broker, design, blob, churn, options))
                    print(".", end="", file=sys.stderr, flush=True)
            medians = {
                design: sorted(results, key=lambda row: float(row["seconds"]))[len(results) // 2]
                for design, results in runs.items()
            }
            ratio = medians["replies"]["seconds"] / medians["cached groups"]["seconds"]
            medians["cached groups"]["times_faster"] = round(ratio, 2)
            rows += medians.values()
    print(file=sys.stderr)
    print_table(rows, options.devices, len(blob))
    if options.json:
        for row in rows:
            print(json.dumps(row))
    return 0 if all(row["finished"] == options.devices for row in rows) else 1


def measure(
    broker: str, design: str, blob: bytes, churn: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One artifact to all devices, once."""
    use_cache = design == "cached groups"
    with tempfile.TemporaryDirectory() as folder, started(broker, Path(folder)) as address:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, address.port, blob, use_cache), daemon=True
        )
        server.start()
        try:
            assert ours.recv() == "ready"
            row = {"broker": broker, "design": design, "dropping_out": churn}
            return row | run_devices(use_cache, blob, churn, options, address, server.pid or 0, ours)
        finally:
            server.terminate()
            server.join()


@contextlib.contextmanager
def started(broker: str, folder: Path) -> Iterator[Address]:
    """The broker in a process of its own."""
    runner = embedded_broker_process() if broker == "embedded" else mosquitto_broker(folder)
    with runner as address:
        yield address


def serve(pipe: Connection, port: int, blob: bytes, use_cache: bool) -> None:  # noqa: FBT001 - one of two designs
    """The server's process: cache the chunks once, or answer every request."""
    name = digest_of(blob)
    count = -(-len(blob) // CHUNK_BYTES)
    transport: ServerTransport

    def answer(event: Event) -> None:
        if isinstance(event, RequestReceived) and isinstance(event.request, ChunkRequest):
            transport.answer_chunks(
                event.device, name, [index for index in decode_window(event.request) if index < count]
            )

    transport = ServerTransport(
        "127.0.0.1",
        port,
        FLEET,
        lambda _name, index: blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES],
        answer,
        random.Random(0),
    )
    transport.start()
    assert transport.wait_connected(10)
    if use_cache:
        transport.cache_blob(name, count)
        while transport.counters.chunks_cached < count:
            time.sleep(0.01)
    pipe.send("ready")
    pipe.recv()
    pipe.send(transport.counters.messages_published)


class TrustingPlan(BlobPlan):
    """A plan that takes a chunk by its number and length."""

    def accepts(self, index: int, payload: bytes) -> bool:
        """Leave the digest out; see the module's docstring."""
        return 0 <= index < self.count and len(payload) == self.chunk_length(index)


class Device:
    """The download of one device over its own connection; may drop out once."""

    def __init__(self, fleet: "Fleet", number: int, drop_at: int | None) -> None:
        self.fleet = fleet
        self.id = DeviceId(f"device-{number}")
        self.tally = Tally()
        self.drop_at = drop_at
        self.finished_s: float | None = None
        self.is_ready = False
        rng = random.Random(number)
        self.download = BlobDownload(
            fleet.plan,
            Bitmap(fleet.plan.count),
            TOPICS,
            self.id,
            rng=rng,
            tally=self.tally,
            groups_outstanding=2,
            link_bytes_per_s=LINK_BYTES_PER_S,
            use_cache=fleet.use_cache,
        )
        self.transport = MqttTransport(
            fleet.loop,
            BrokerAddress("127.0.0.1", fleet.port),
            self.id,
            rng,
            will=None,
            on_connected=self.on_connected,
            on_disconnected=self.download.pause,
            on_message=self.on_message,
        )

    def on_connected(self) -> None:
        self.transport.subscribe((TOPICS.chunk_answer(self.id),), 0)
        self.is_ready = True
        if self.fleet.started_s is not None and self.finished_s is None:
            self.begin()

    def begin(self) -> None:
        for effect in self.download.resume(self.fleet.now_ms()):
            self.carry_out(effect)

    def on_message(self, _topic: str, payload: bytes) -> None:
        try:
            chunk = decode_chunk(payload)
        except ChunkError:
            return
        for effect in self.download.receive(chunk, self.fleet.now_ms()):
            self.carry_out(effect)
        if self.download.is_complete and self.finished_s is None:
            self.finished_s = time.monotonic()
            self.fleet.finished += 1
        elif self.drop_at is not None and self.download.present.present >= self.drop_at:
            self.drop_at = None
            self.transport.drop()

    def on_tick(self) -> None:
        deadline_ms = self.download.deadline_ms
        if deadline_ms is not None and self.fleet.now_ms() >= deadline_ms:
            for effect in self.download.timeout(self.fleet.now_ms()):
                self.carry_out(effect)

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case Subscribe(filters, qos):
                self.transport.subscribe(filters, qos)
            case Unsubscribe(filters):
                self.transport.unsubscribe(filters)
            case Publish(topic, payload, qos, retain):
                self.transport.publish(topic, payload, qos, retain=retain)
            case _:
                pass  # chunks are checked and counted, not stored: the disk is not measured here


class Fleet:
    """What all devices share."""

    def __init__(self, plan: BlobPlan, port: int, *, use_cache: bool) -> None:
        self.plan = plan
        self.port = port
        self.use_cache = use_cache
        self.loop = MqttLoop()
        self.started_s: float | None = None
        self.finished = 0

    def now_ms(self) -> int:
        return int(time.monotonic() * 1000)


def run_devices(
    use_cache: bool,  # noqa: FBT001 - one of two designs
    blob: bytes,
    churn: float,
    options: argparse.Namespace,
    address: Address,
    server_pid: int,
    pipe: Connection,
) -> dict[str, Any]:
    """Connect everybody, let them fetch, and count; the devices are spread over processes."""
    count = options.devices
    rng = random.Random(options.seed)
    last = -(-len(blob) // CHUNK_BYTES) - 1
    drops = {number: rng.randrange(1, last) if rng.random() < churn else None for number in range(count)}
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for part in range(options.processes):
        ours, theirs = context.Pipe()
        share = {number: drop_at for number, drop_at in drops.items() if number % options.processes == part}
        arguments = (theirs, address.port, blob, share, use_cache, options.check_digests)
        children.append(context.Process(target=be_devices, args=arguments, daemon=True))
        children[-1].start()
        pipes.append(ours)
    for each in pipes:
        assert each.recv() == "ready"
    broker_process, server_process = psutil.Process(address.pid), psutil.Process(server_pid)
    before = [_cpu_s(process) for process in (broker_process, server_process)]
    for each in pipes:
        each.send("go")
    memory_peak = broker_process.memory_info().rss
    while not all(each.poll() for each in pipes):
        memory_peak = max(memory_peak, broker_process.memory_info().rss)
        time.sleep(0.05)
    broker_s, server_s = (
        _cpu_s(process) - start
        for process, start in zip((broker_process, server_process), before, strict=True)
    )
    results = [each.recv() for each in pipes]
    for child in children:
        child.join()
    pipe.send("counters")
    return {
        "finished": sum(result["finished"] for result in results),
        "seconds": round(max(result["seconds"] for result in results), 2),
        "server_publishes": pipe.recv(),
        "server_cpu_s": round(server_s, 2),
        "broker_cpu_s": round(broker_s, 2),
        "broker_peak_mb": round(memory_peak / 1e6, 1),
        "broker_out_mb": round(sum(result["received_bytes"] for result in results) / 1e6, 1),
        "devices_cpu_s": round(sum(result["cpu_s"] for result in results), 2),
        "redundant_percent": round(
            100 * sum(result["redundant_chunks"] for result in results) * CHUNK_BYTES / (count * len(blob)), 3
        ),
    }


def be_devices(
    pipe: Connection,
    port: int,
    blob: bytes,
    drops: dict[int, int | None],
    use_cache: bool,  # noqa: FBT001 - one of two designs
    check_digests: bool,  # noqa: FBT001 - likewise
) -> None:
    """One process's share of the devices: connect, wait for the word, fetch, and say what it took."""
    digests = b"".join(
        hashlib.sha256(blob[at : at + CHUNK_BYTES]).digest() for at in range(0, len(blob), CHUNK_BYTES)
    )
    plan = (BlobPlan if check_digests else TrustingPlan)(digest_of(blob), len(blob), digests)
    fleet = Fleet(plan, port, use_cache=use_cache)
    devices = [Device(fleet, number, drop_at) for number, drop_at in drops.items()]
    for at in range(0, len(devices), 50):
        for device in devices[at : at + 50]:
            device.transport.start()
        assert fleet.loop.run_until(partial(all_ready, devices[: at + 50]), 30)
    fleet.loop.run_until(lambda: False, 0.3)
    pipe.send("ready")
    pipe.recv()
    cpu_s, fleet.started_s = _cpu_s(psutil.Process()), time.monotonic()
    for device in devices:
        device.begin()
    next_look = 0.0
    while fleet.finished < len(devices) and time.monotonic() < fleet.started_s + TIMEOUT_S:
        fleet.loop.step(0.05)
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + 0.1
            for device in devices:
                device.on_tick()
    seconds = time.monotonic() - fleet.started_s
    cpu_s = _cpu_s(psutil.Process()) - cpu_s
    for device in devices:
        device.transport.close()
    fleet.loop.close()
    pipe.send(
        {
            "finished": fleet.finished,
            "seconds": seconds,
            "cpu_s": cpu_s,
            "received_bytes": sum(device.tally.received_bytes for device in devices),
            "redundant_chunks": sum(device.tally.redundant_chunks for device in devices),
        }
    )


def all_ready(devices: list[Device]) -> bool:
    """Whether all of them are connected."""
    return all(device.is_ready for device in devices)


def print_table(rows: list[dict[str, Any]], devices: int, length: int) -> None:
    """For people."""
    print(
        f"{length / 1e6:.1f} MB to {devices} devices; median of the rounds, times of one run compare with each other only"
    )
    names = list(rows[0])
    widths = {name: max(len(name), *(len(str(row.get(name, ""))) for row in rows)) for name in names}
    print("  ".join(name.rjust(widths[name]) for name in names))
    for row in rows:
        print("  ".join(str(row.get(name, "")).rjust(widths[name]) for name in names))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    sys.exit(main())
