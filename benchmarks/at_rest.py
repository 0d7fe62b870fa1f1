"""What an agent costs while nothing happens: memory, processor and traffic, of a real process over a real broker.

    python -m benchmarks.at_rest [--seconds 60] [--broker embedded|mosquitto] [--model FILE.onnx] [--json]

Two agents are measured one after the other: one without a model, and one that serves a small ONNX model. The traffic goes through a
relay that counts payloads, and asks the kernel for the number of segments (TCP_INFO of tcp(7)); each counts 52 bytes beside its payload, the
headers of IPv4 and of TCP with timestamps. `a check` is everything that a new connection exchanges until it is quiet: what a device
that polled would send each time. `an exchange` is the keep-alive of an idle connection, once in 30 seconds.
"""

import argparse
import contextlib
import json
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from device.adapters.control import ask_agent
from device.adapters.mqtt import KEEPALIVE_S
from device.cli import main as whimbrel_device
from device.config import load_config
from protocol.errors import RequestError
from server.operations import add_release, export_release, init_repository, publish_release
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import Address, embedded_broker_process, mosquitto_broker, stop, wait_until

HEADER_BYTES = 52
QUIET_S = 3.0
WAIT_S = 60.0
# struct tcp_info of linux/tcp.h: two 32-bit counters behind eight 64-bit ones.
SEGMENTS = struct.Struct("=II")
SEGMENTS_AT = 136


@dataclass
class Traffic:
    """What went over one connection, both ways."""

    payload_bytes: int = 0
    segments: int = 0

    @property
    def wire_bytes(self) -> int:
        return self.payload_bytes + self.segments * HEADER_BYTES


def segments_of(end: socket.socket) -> int:
    """Segments that a connection has sent and received."""
    return sum(SEGMENTS.unpack_from(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), SEGMENTS_AT))


class Relay:
    """Passes bytes on between agents and a broker, and counts."""

    def __init__(self, broker: Address) -> None:
        self._broker = (broker.host, broker.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._payload_bytes = self._closed_segments = 0
        self._ends: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def count(self) -> Traffic:
        """Everything so far."""
        return Traffic(self._payload_bytes, self._closed_segments + sum(map(segments_of, tuple(self._ends))))

    def note(self, source: socket.socket, data: bytes) -> None:
        """Take down what came; in the relay's thread."""
        del source
        self._payload_bytes += len(data)

    def close(self) -> None:
        self._is_closing = True
        self._thread.join()
        for key in tuple(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # sockets only
        self._selector.close()

    def _run(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(0.1):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj.fileno() < 0:  # type: ignore[union-attr]  # sockets only
                    continue  # closed with its other end
                else:
                    self._pass_on(key.fileobj, key.data)  # type: ignore[arg-type]  # sockets only

    def _accept(self) -> None:
        agent, _ = self._listener.accept()
        broker = socket.create_connection(self._broker)
        self._ends.append(agent)
        self._selector.register(agent, selectors.EVENT_READ, broker)
        self._selector.register(broker, selectors.EVENT_READ, agent)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if data := source.recv(1 << 16):
                self.note(source, data)
                target.sendall(data)
                return
        for end in (source, target):
            if end in self._ends:
                self._ends.remove(end)
                self._closed_segments += segments_of(end)
            if end.fileno() >= 0:  # not closed together with the other one a moment ago
                self._selector.unregister(end)
                end.close()


@dataclass
class Measured:
    """An agent at rest."""

    what: str
    seconds: float
    rss_mb: float
    rss_peak_mb: float
    cpu_percent: float
    idle: Traffic
    check: Traffic


def difference(after: Traffic, before: Traffic) -> Traffic:
    return Traffic(after.payload_bytes - before.payload_bytes, after.segments - before.segments)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(folder: Path, what: str, seconds: float, relay: Relay, *, has_model: bool) -> Measured:
    """Start an agent, let it come to rest, and watch it."""
    config = load_config(folder / "device.toml")
    before = relay.count()

    def is_up() -> bool:
        with contextlib.suppress(RequestError):
            status = ask_agent(config.control, "status").status
            return status is not None and status.is_connected and bool(status.serving) is has_model
        return False

    command = [sys.executable, "-m", "device.cli", "run", "--config", str(folder / "device.toml")]
    agent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if not wait_until(is_up, WAIT_S):
            raise SystemExit("whimbrel: the agent did not come up")
        time.sleep(QUIET_S)
        process = psutil.Process(agent.pid)
        settled, cpu_s, began = relay.count(), cpu_seconds(process), time.monotonic()
        rss = [process.memory_info().rss]
        while time.monotonic() - began < seconds:
            time.sleep(1.0)
            rss.append(process.memory_info().rss)
        spent_s = time.monotonic() - began
        return Measured(
            what,
            spent_s,
            rss[-1] / 1e6,
            max(rss) / 1e6,
            100 * (cpu_seconds(process) - cpu_s) / spent_s,
            difference(relay.count(), settled),
            difference(settled, before),
        )
    finally:
        stop(agent)


def set_up(folder: Path, port: int, model: Path | None) -> None:
    """A device that is provisioned, and one that has the start of trust only."""
    server = folder / "server"
    root = init_repository(server, "lab", port=0)
    health = write_health_plan(folder / "health.json")
    model = model or write_classifier(folder / "model.onnx", 1)
    add_release(server, "digits", "v1", [model], runtime="onnx", health=health)
    publish_release(server, "digits", "v1")
    export_release(server, "digits", "v1", folder / "factory")
    for name in ("without", "with"):
        (folder / name).mkdir()
        (folder / name / "device.toml").write_text(
            f'device = "{name}"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\nbroker = "127.0.0.1:{port}"\n'
        )
    (folder / "without" / "state").mkdir()
    (folder / "without" / "state" / "root.json").write_bytes(root.read_bytes())
    with contextlib.redirect_stdout(sys.stderr):
        code = whimbrel_device(
            ["provision", "--config", str(folder / "with" / "device.toml"), "--from", str(folder / "factory")]
        )
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def broker_of(name: str, folder: Path) -> Iterator[Address]:
    with embedded_broker_process() if name == "embedded" else mosquitto_broker(folder / "broker") as address:
        yield address


def show(found: list[Measured], broker: str) -> None:
    print(f"an agent at rest, {found[0].seconds:.0f} s each, broker: {broker}")
    for each in found:
        exchanges = max(1, round(each.seconds / KEEPALIVE_S))
        print(f"{each.what}:")
        print(f"  memory     {each.rss_mb:.1f} MB resident, at most {each.rss_peak_mb:.1f} MB")
        print(f"  processor  {each.cpu_percent:.2f} % of one core")
        print(
            f"  idle       {each.idle.wire_bytes} bytes on the wire ({each.idle.payload_bytes} of MQTT, {each.idle.segments} segments): "
            f"{each.idle.wire_bytes // exchanges} an exchange"
        )
        print(
            f"  connecting {each.check.wire_bytes} bytes on the wire ({each.check.payload_bytes} of MQTT, {each.check.segments} segments): a check"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.at_rest", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--broker", choices=("embedded", "mosquitto"), default="embedded")
    parser.add_argument("--model", type=Path, help="an ONNX model that takes 16 numbers; default: a tiny one")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, broker_of(arguments.broker, Path(scratch)) as broker:
        relay = Relay(broker)
        try:
            set_up(Path(scratch), relay.port, arguments.model)
            found = [
                measure(Path(scratch) / "without", "no model", arguments.seconds, relay, has_model=False),
                measure(
                    Path(scratch) / "with", "serving an ONNX model", arguments.seconds, relay, has_model=True
                ),
            ]
        finally:
            relay.close()
    if arguments.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        show(found, arguments.broker)


if __name__ == "__main__":
    main()
