"""What trust costs on the wire, for `trust.py`: real documents and real agents over a real broker, through a relay that reads packets."""

import contextlib
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from benchmarks.at_rest import Relay, Traffic, difference
from benchmarks.trust_repositories import Built
from device.adapters.clock import SystemClock
from device.adapters.identity import tls_context
from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport
from device.adapters.workers import WorkerPool
from device.config import AgentConfig, DeviceConfig
from device.effects import Effect, Subscribe, Unsubscribe
from device.runtime import DeviceRuntime, install_factory
from device.sync import MetadataSync
from protocol import trust
from protocol.identity import key_pem, make_key
from protocol.ids import DeviceId, Family, FleetId
from protocol.release import ARTIFACTS_ROLE, decode_release, releases_role
from protocol.topics import (
    ChunkAnswerTopic,
    ChunkTopic,
    DesiredTopic,
    LinkTopic,
    MetadataAnswerTopic,
    MetadataTopic,
    ReportTopic,
    RequestTopic,
    Topics,
)
from protocol.trust import Floors
from server import operations
from server.adapters.authority import Authority
from server.adapters.mqtt import MqttTransport as ServerTransport
from server.broker.packets import Malformed, PacketReader, Publish, encode
from server.config import read_config
from server.runtime import Server
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import Address

FLEET: Final = FleetId("bench")
TOPICS: Final = Topics(FLEET)
DEVICE: Final = DeviceId("device-1")
FAMILY: Final = Family("family-0")
QUIET_S: Final = 1.0
WAIT_S: Final = 60.0

KINDS: Final = {
    MetadataTopic: "signed metadata",
    MetadataAnswerTopic: "signed metadata",
    ChunkTopic: "chunks",
    ChunkAnswerTopic: "chunks",
    DesiredTopic: "wishes",
    ReportTopic: "reports",
    LinkTopic: "link",
    RequestTopic: "requests",
}


class Tap(Relay):
    """A relay that knows what it passes on; for connections without TLS.

    Attributes:
        kinds: Bytes of MQTT packets by what they are about, both ways.
        report: The last report that was seen.
    """

    def __init__(self, broker: Address) -> None:
        self.kinds: Counter[str] = Counter()
        self.report = b""
        self._readers: dict[socket.socket, PacketReader] = {}
        super().__init__(broker)

    def note(self, source: socket.socket, data: bytes) -> None:
        """As `Relay.note`."""
        super().note(source, data)
        for packet in self._readers.setdefault(source, PacketReader()).feed(data):
            if isinstance(packet, Malformed):
                continue
            kind = "connection, subscriptions, receipts"
            if isinstance(packet, Publish):
                parsed = TOPICS.parse(packet.topic)
                kind = KINDS.get(type(parsed), kind)
                if isinstance(parsed, ReportTopic):
                    self.report = packet.payload
            self.kinds[kind] += len(encode(packet))

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        kinds, self.kinds = dict(self.kinds), Counter()
        return kinds


@dataclass(frozen=True, slots=True)
class Refresh:
    """What a device exchanges to have the newest metadata.

    Attributes:
        traffic: Both ways, from the subscription to the end of it.
        at_rest: What a device at rest is sent when all documents are signed anew.
    """

    traffic: Traffic
    at_rest: Traffic


class Reader:
    """The part of an agent that gets hold of metadata, over the transport of a device."""

    def __init__(self, loop: MqttLoop, port: int, root: bytes, now_ms: int) -> None:
        self._now_ms = now_ms
        self.is_verified = False
        roles = (releases_role(FAMILY), ARTIFACTS_ROLE)
        rng = random.Random(1)
        self._sync = MetadataSync(TOPICS, DEVICE, rng, root, trust, roles)
        self.transport = MqttTransport(
            loop,
            BrokerAddress("127.0.0.1", port),
            DEVICE,
            rng,
            will=None,
            on_connected=lambda: None,
            on_disconnected=lambda: None,
            on_message=self._heard,
        )
        self.transport.start()

    def begin(self) -> None:
        """Look."""
        self._carry_out(self._sync.begin(self._now_ms))

    def _heard(self, topic: str, payload: bytes) -> None:
        parsed = TOPICS.parse(topic)
        if self.is_verified or not isinstance(parsed, MetadataTopic):
            return
        self._sync.receive(parsed.document, payload)
        documents = self._sync.documents()
        if documents is not None and self._sync.verify(documents, Floors(), self._now_ms):
            self.is_verified = True
            self._carry_out(self._sync.end())

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Subscribe(filters, qos):
                    self.transport.subscribe(filters, qos)
                case Unsubscribe(filters):
                    self.transport.unsubscribe(filters)


def measure_refresh(built: Built, broker: Address, now_ms: int) -> Refresh:
    """Let a device that trusts the newest root look at the newest metadata, and then rest."""
    rng = random.Random(2)
    server = ServerTransport(
        broker.host, broker.port, FLEET, lambda _name, _index: b"", lambda _event: None, rng
    )
    relay, loop = Relay(broker), MqttLoop()
    reader = Reader(loop, relay.port, built.repository.roots[-1], now_ms)
    try:
        server.start()
        if not server.wait_connected(WAIT_S):
            raise SystemExit(f"whimbrel: {server.last_error}")
        server.publish_documents(built.repository)
        _settle(loop, relay)
        before = relay.count()
        reader.begin()
        if not loop.run_until(lambda: reader.is_verified, WAIT_S):
            raise SystemExit("whimbrel: the documents did not verify")
        _settle(loop, relay)
        after = relay.count()
        server.publish_documents(built.repository)
        _settle(loop, relay)
        return Refresh(difference(after, before), difference(relay.count(), after))
    finally:
        server.stop()
        reader.transport.close()
        loop.close()
        relay.close()


def _settle(loop: MqttLoop, relay: Relay) -> None:
    """Let the loop turn until nothing has come for a while."""
    counted, since = relay.count(), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        loop.step(0.05)
        if relay.count() != counted:
            counted, since = relay.count(), time.monotonic()


@dataclass(frozen=True, slots=True)
class Update:
    """MQTT bytes of a real agent by what they are about.

    Attributes:
        check: A connection until it is quiet.
        signed_anew: While it rests, and the server signs everything again.
        update: From the wish to the commit.
        report: The last report, as it was sent.
    """

    check: dict[str, int]
    signed_anew: dict[str, int]
    update: dict[str, int]
    report: bytes


def measure_update(folder: Path, broker: Address) -> Update:
    """Bring one real agent from one version of a small model to the next."""
    home = folder / "server"
    operations.init_repository(home, FLEET, broker=f"{broker.host}:{broker.port}")
    health = write_health_plan(folder / "health.json")
    for number in (1, 2):
        model = write_classifier(folder / f"v{number}.onnx", number, hidden=8_000)
        operations.add_release(home, FAMILY, f"v{number}", [model], runtime="onnx", health=health)
    operations.publish_release(home, FAMILY, "v1")
    operations.export_release(home, FAMILY, "v1", folder / "factory")
    relay, loop, pool = Tap(broker), MqttLoop(), WorkerPool(threads=1)
    config = DeviceConfig(
        agent=AgentConfig(device=DEVICE, fleet=FLEET, family=FAMILY, tier="pi"),
        folder=folder / "device",
        broker_host="127.0.0.1",
        broker_port=relay.port,
    )
    release = decode_release((folder / "factory/release.json").read_bytes())
    files = {file.name: folder / "factory" / file.name for file in release.files}
    install_factory(config, release, files, (folder / "factory/root.json").read_bytes())
    with contextlib.ExitStack() as stack:
        stack.callback(relay.close)
        stack.callback(pool.close)
        stack.callback(loop.close)
        server = stack.enter_context(Server(read_config(home), seed=1))
        server.wait_connected(WAIT_S)
        device = DeviceRuntime(config, loop, pool, clock=SystemClock(), rng=random.Random(3))
        device.start()
        stack.callback(device.stop)
        _await(loop, lambda: device.transport.is_connected and bool(device.agent.serving))
        _settle(loop, relay)
        check = relay.take()
        operations.publish_release(home, FAMILY, "v2")
        _settle(loop, relay)
        signed_anew = relay.take()
        rollout = operations.start_rollout(home, FAMILY, "v2", canary_count=1).id
        _await(loop, lambda: operations.rollout_status(home, rollout).rollout.state.value == "finished")
        _settle(loop, relay)
        return Update(check, signed_anew, relay.take(), relay.report)


def _await(loop: MqttLoop, is_done: Callable[[], bool]) -> None:
    if not loop.run_until(is_done, WAIT_S):
        raise SystemExit("whimbrel: the agent did not get there")


@dataclass(frozen=True, slots=True)
class Handshake:
    """A TLS connection in which both sides show a certificate, until it can be used; bytes above TCP.

    Attributes:
        version: Of TLS.
        sent: By the device.
        received: By the device, tickets for a later connection among them.
    """

    version: str
    sent: int
    received: int


def measure_handshakes(folder: Path, now_ms: int) -> tuple[list[Handshake], dict[str, int]]:
    """Let a device and a broker greet each other with certificates of the server's authority.

    Returns:
        One for each version of TLS, and the lengths of the certificates in DER.
    """
    authority = Authority(folder / "ca", lambda: None)
    authority.create(FLEET, now_ms)
    keys = {"broker": make_key(), "device": make_key()}
    issued = {
        "broker": authority.issue_broker(("localhost",), keys["broker"].public_key(), now_ms),
        "device": authority.issue_device(DEVICE, keys["device"].public_key(), now_ms, 90),
    }
    for name, each in issued.items():
        pem = x509.load_der_x509_certificate(each.certificate).public_bytes(Encoding.PEM)
        (folder / f"{name}.pem").write_bytes(key_pem(keys[name]) + pem)
    (folder / "ca.pem").write_bytes(authority.pem())
    lengths = {name: len(each.certificate) for name, each in issued.items()} | {
        "authority": len(authority.der())
    }
    return [_greet(folder, version) for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2)], lengths


def _greet(folder: Path, version: ssl.TLSVersion) -> Handshake:
    device = tls_context(folder / "ca.pem", folder / "device.pem", folder / "device.pem")
    device.maximum_version = version
    broker = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    broker.verify_mode = ssl.CERT_REQUIRED
    broker.load_verify_locations(folder / "ca.pem")
    broker.load_cert_chain(folder / "broker.pem")
    to_device, from_device, to_broker, from_broker = (ssl.MemoryBIO() for _ in range(4))
    waiting = [
        device.wrap_bio(to_device, from_device, server_hostname="localhost"),
        broker.wrap_bio(to_broker, from_broker, server_side=True),
    ]
    sent = received = 0
    while waiting or from_broker.pending:
        for side in list(waiting):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                waiting.remove(side)
        upward, downward = from_device.read(), from_broker.read()
        sent, received = sent + len(upward), received + len(downward)
        to_broker.write(upward)
        to_device.write(downward)
    return Handshake(version.name.replace("TLSv", "TLS ").replace("_", "."), sent, received)
