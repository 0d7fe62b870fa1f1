"""Attacks on a real mosquitto with the configuration that `whimbrel broker config` writes: each is refused, and a bystander goes on.

The numbers are those of docs/security/transport.md.
"""

import gc
import itertools
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from paho.mqtt.enums import CallbackAPIVersion

from protocol.constants import CHUNK_MESSAGE_BYTES_MAX
from protocol.identity import certificate_request, decode_claim, key_pem, make_key
from protocol.ids import DeviceId, Digest, FleetId, digest_of
from protocol.messages import BUNDLE_BYTES_MAX
from protocol.topics import Topics
from server.adapters.authority import Authority
from server.adapters.clock import SystemClock
from server.broker_files import PACKET_BYTES_MAX, SERVER_CONNECTIONS_MAX
from server.fleet.identities import use_claim
from server.home import opened
from server.identity import accept_device, authority_of, claim_device, revoke_name
from server.operations import init_repository
from tests.server.brokers import WAIT_S, SecuredBroker, secured_mosquitto, wait_until

# paho leaves the socket of a handshake that failed to the collector, which closes it, and warns.
pytestmark = [
    pytest.mark.mosquitto,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FLEET = FleetId("lab")
TOPICS = Topics(FLEET)
VICTIM, ATTACKER, BYSTANDER = DeviceId("victim"), DeviceId("attacker"), DeviceId("bystander")
DAYS = 90
BLOB = Digest(digest_of(b"blob"))
_serial = itertools.count(1)


class Lab:
    """A server's folder, a broker that it configured, and who has certificates."""

    def __init__(self, folder: Path, broker: SecuredBroker) -> None:
        self.folder = folder
        self.home = folder / "server"
        self.broker = broker
        self.authority = authority_of(folder / "server")

    def enroll(self, name: str) -> Path:
        """A key and a certificate in one file, by a claim that an operator accepts."""
        claim, key = decode_claim(claim_device(self.home, name).text), make_key()
        topic = TOPICS.claim_request(claim.claim)
        request = certificate_request(DeviceId(name), key, claim.private_key, topic)
        now_ms = SystemClock().now_ms()
        with opened(self.home) as home:
            home.store.change_identities(lambda known: use_claim(known, claim.claim, request, topic, now_ms))
        return self.write(key_pem(key), accept_device(self.home, name).record.certificate)

    def forge(self, name: str, authority: Authority, *, days_ago: int = 0) -> Path:
        """A key and a certificate that the server does not know of."""
        key, now_ms = make_key(), SystemClock().now_ms() - days_ago * 24 * 3600 * 1000
        issued = authority.issue_device(DeviceId(name), key.public_key(), now_ms, DAYS)
        return self.write(key_pem(key), issued.certificate)

    def write(self, key: bytes, certificate: bytes) -> Path:
        path = self.folder / f"{next(_serial)}.pem"
        pem = x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
        path.write_bytes(key + pem)
        return path

    def server(self) -> "Peer":
        tls = self.home / "tls"
        path = self.folder / f"{next(_serial)}.pem"
        path.write_bytes((tls / "server.key").read_bytes() + (tls / "server.pem").read_bytes())
        return Peer(self, path, client_id="server.lab")


class Peer:
    """A client of the broker, with a certificate or without."""

    def __init__(
        self,
        lab: Lab,
        certificate: Path | None,
        *,
        client_id: str = "",
        port: int = 0,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.is_accepted = threading.Event()
        self.is_gone = threading.Event()
        self._confirmed: set[int] = set()
        self._lock = threading.Lock()
        self.paho = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"peer-{next(_serial)}",
            reconnect_on_failure=False,
        )
        context = ssl.create_default_context(cafile=lab.broker.folder / "ca.pem")
        if certificate is not None:
            context.load_cert_chain(certificate)
        self.paho.tls_set_context(context)
        if will is not None:
            self.paho.will_set(will[0], will[1], 1, retain=True)
        self.paho.on_connect = lambda _c, _u, _f, code, _p: self._answered(is_refused=code.is_failure)
        self.paho.on_disconnect = lambda *_: self.is_gone.set()
        self.paho.on_message = lambda _c, _u, message: self.heard.append(
            (message.topic, bytes(message.payload))
        )
        self.paho.on_subscribe = lambda _c, _u, mid, _r, _p: self._confirmed.add(mid)
        try:
            self.paho.connect(lab.broker.host, port or lab.broker.port)
        except (OSError, ssl.SSLError):
            self.is_gone.set()
            return
        self.paho.loop_start()
        wait_until(lambda: self.is_accepted.is_set() or self.is_gone.is_set())

    def _answered(self, *, is_refused: bool) -> None:
        if not is_refused:
            self.is_accepted.set()

    @property
    def is_refused(self) -> bool:
        """Whether the broker hung up, or never let us in."""
        return not self.is_accepted.is_set()

    def listen(self, *filters: str) -> "Peer":
        _, mid = self.paho.subscribe([(name, 1) for name in filters])
        assert mid is not None
        assert wait_until(lambda: mid in self._confirmed), "SUBSCRIBE was not answered"
        return self

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1 and wait until the broker has taken note, whatever it made of it."""
        self.paho.publish(topic, payload, 1, retain).wait_for_publish(WAIT_S)

    def has(self, topic: str, payload: bytes) -> bool:
        return wait_until(lambda: (topic, payload) in self.heard)

    def cut(self) -> None:
        """Vanish without a word."""
        sock = self.paho.socket()
        assert isinstance(sock, ssl.SSLSocket)
        sock.shutdown(2)
        assert self.is_gone.wait(WAIT_S)
        self.paho.loop_stop()

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    init_repository(folder / "server", FLEET)
    with secured_mosquitto(folder / "server", folder / "broker") as broker:
        yield Lab(folder, broker)


@pytest.fixture(scope="module")
def certificates(lab: Lab) -> dict[str, Path]:
    return {name: lab.enroll(name) for name in (VICTIM, ATTACKER, BYSTANDER)}


@pytest.fixture
def server(lab: Lab, certificates: dict[str, Path]) -> Iterator[Peer]:
    """The server, listening to everything that devices may say; at the end a device that had no part in it still gets through."""
    bystander = Peer(lab, certificates[BYSTANDER])
    server = lab.server().listen(
        "wb1.lab/dev/+/report",
        "wb1.lab/dev/+/link",
        "wb1.lab/dev/+/renewal",
        "wb1.lab/req/#",
        "wb1.lab/enroll/#",
    )
    yield server
    assert not bystander.is_gone.is_set(), "a device that had no part in it lost its connection"
    bystander.say(TOPICS.report(BYSTANDER), b"I am fine")
    assert server.has(TOPICS.report(BYSTANDER), b"I am fine")
    server.close()
    bystander.close()


@pytest.fixture
def attacker(lab: Lab, certificates: dict[str, Path]) -> Iterator[Peer]:
    """A device with a good certificate, and with bad intentions."""
    peer = Peer(lab, certificates[ATTACKER])
    assert not peer.is_refused
    yield peer
    peer.close()


def assert_unheard(server: Peer, attacker: Peer, name: DeviceId = ATTACKER) -> None:
    """What the attacker says on its own topic arrives, and nothing of what it said before on others: the broker keeps the order."""
    attacker.say(TOPICS.report(name), b"own")
    assert server.has(TOPICS.report(name), b"own")
    assert {topic for topic, _ in server.heard} <= {
        TOPICS.report(name),
        TOPICS.link(name),
        TOPICS.report(BYSTANDER),
    }


def test_44_without_a_certificate_nobody_is_let_in(lab: Lab, server: Peer) -> None:
    assert server.heard == []
    for port in (lab.broker.port, lab.broker.claims_port):
        assert Peer(lab, None, port=port).is_refused


def test_44_a_foreign_certificate_of_the_same_name_is_refused(lab: Lab, server: Peer, tmp_path: Path) -> None:
    assert server.heard == []
    foreign = Authority(tmp_path / "ca")
    foreign.create(FLEET, SystemClock().now_ms())
    assert Peer(lab, lab.forge(VICTIM, foreign)).is_refused


def test_44_an_expired_certificate_is_refused(lab: Lab, server: Peer) -> None:
    assert server.heard == []
    assert Peer(lab, lab.forge(VICTIM, lab.authority, days_ago=DAYS + 1)).is_refused


def test_44_a_revoked_certificate_is_refused_and_its_open_connection_falls_silent(
    lab: Lab, server: Peer
) -> None:
    stolen = lab.enroll("stolen")
    thief = Peer(lab, stolen).listen(TOPICS.metadata("timestamp"))
    revoke_name(lab.home, "stolen")
    lab.broker.reload()
    assert Peer(lab, stolen).is_refused
    thief.say(TOPICS.report(DeviceId("stolen")), b"still here")
    server.say(TOPICS.metadata("timestamp"), b"news", retain=True)
    server.listen(TOPICS.metadata("timestamp"))
    assert server.has(TOPICS.metadata("timestamp"), b"news")
    assert (TOPICS.report(DeviceId("stolen")), b"still here") not in server.heard
    assert thief.heard == []
    thief.close()


def test_44_a_device_that_was_revoked_by_mistake_gets_in_with_a_new_certificate(
    lab: Lab, server: Peer
) -> None:
    lab.enroll("mistaken")
    revoke_name(lab.home, "mistaken")
    again = lab.enroll("mistaken")
    lab.broker.reload()
    device = Peer(lab, again)
    device.say(TOPICS.report(DeviceId("mistaken")), b"back")
    assert server.has(TOPICS.report(DeviceId("mistaken")), b"back")
    device.close()


def test_39_writing_on_topics_of_another_device_goes_nowhere(server: Peer, attacker: Peer) -> None:
    for topic in (
        TOPICS.report(VICTIM),
        TOPICS.link(VICTIM),
        TOPICS.renewal(VICTIM),
        TOPICS.request(VICTIM),
        TOPICS.desired(VICTIM),
        TOPICS.desired(ATTACKER),
        TOPICS.certificate(ATTACKER),
        TOPICS.keys(ATTACKER),
        TOPICS.keys(VICTIM),
    ):
        attacker.say(topic, b"forged", retain=True)
    assert_unheard(server, attacker)


def test_39_reading_topics_of_another_device_gives_nothing(server: Peer, attacker: Peer) -> None:
    attacker.listen("#", "wb1.lab/dev/+/desired", "wb1.lab/dev/victim/#", "wb1.lab/+/#", "$SYS/#")
    for topic in (
        TOPICS.desired(VICTIM),
        TOPICS.metadata_answer(VICTIM),
        TOPICS.chunk_answer(VICTIM),
        TOPICS.keys(VICTIM),
    ):
        server.say(topic, b"secret", retain=True)
    server.say(TOPICS.report(VICTIM), b"secret")
    server.say(TOPICS.desired(ATTACKER), b"yours")
    assert attacker.has(TOPICS.desired(ATTACKER), b"yours")
    assert {topic for topic, _ in attacker.heard if "/md/" not in topic} == {TOPICS.desired(ATTACKER)}


def test_34_a_device_cannot_publish_metadata_or_chunks_or_delete_them(
    server: Peer, attacker: Peer, lab: Lab, certificates: dict[str, Path]
) -> None:
    for topic in (TOPICS.metadata("targets"), TOPICS.root(1), TOPICS.chunk(BLOB, 0)):
        server.say(topic, b"true", retain=True)
        attacker.say(topic, b"false", retain=True)
        attacker.say(topic, b"", retain=True)
    reader = Peer(lab, certificates[VICTIM]).listen("wb1.lab/md/#", TOPICS.chunk_group(BLOB, 0))
    assert reader.has(TOPICS.chunk(BLOB, 0), b"true")
    assert {payload for topic, payload in reader.heard if "timestamp" not in topic} == {b"true"}
    reader.close()


def test_34_what_a_device_retained_goes_unread_once_it_is_revoked(lab: Lab, server: Peer) -> None:
    name = DeviceId("sleeper")
    device = Peer(lab, lab.enroll(name))
    device.say(TOPICS.report(name), b"planted", retain=True)
    assert server.has(TOPICS.report(name), b"planted")
    revoke_name(lab.home, name)
    lab.broker.reload()
    server.heard.clear()
    server.listen(TOPICS.report(name))
    server.say(TOPICS.desired(name), b"marker", retain=True)
    server.listen(TOPICS.desired(name))
    assert server.has(TOPICS.desired(name), b"marker")
    assert (TOPICS.report(name), b"planted") not in server.heard
    device.close()


def test_36_the_client_id_of_another_device_takes_nothing_over(
    lab: Lab, server: Peer, certificates: dict[str, Path]
) -> None:
    victim = Peer(lab, certificates[VICTIM], client_id=VICTIM).listen(TOPICS.desired(VICTIM))
    thief = Peer(lab, certificates[ATTACKER], client_id=VICTIM).listen(TOPICS.desired(VICTIM))
    for client_id in ("server.lab", "claim.0123456789abcdef"):
        Peer(lab, certificates[ATTACKER], client_id=client_id).close()
    server.say(TOPICS.desired(VICTIM), b"for the victim")
    assert victim.has(TOPICS.desired(VICTIM), b"for the victim")
    assert not victim.is_gone.is_set()
    assert not server.is_gone.is_set()
    assert thief.heard == []
    victim.close()
    thief.close()


def test_40_a_forged_will_is_not_published_and_a_true_one_is(
    lab: Lab, server: Peer, certificates: dict[str, Path]
) -> None:
    forger = Peer(lab, certificates[ATTACKER], will=(TOPICS.link(VICTIM), b"dead"))
    forger.cut()
    honest = Peer(lab, certificates[VICTIM], will=(TOPICS.link(VICTIM), b"gone"))
    honest.cut()
    assert server.has(TOPICS.link(VICTIM), b"gone")
    assert (TOPICS.link(VICTIM), b"dead") not in server.heard


@pytest.mark.parametrize("name", ["#", "+", "+/+", "victim/#"])
def test_38_a_certificate_with_a_wildcard_in_its_name_opens_nothing(
    lab: Lab, server: Peer, name: str
) -> None:
    """No such certificate is issued; this is what would happen if one were."""
    peer = Peer(lab, lab.forge(name, lab.authority))
    if not peer.is_refused:
        peer.listen("wb1.lab/dev/+/desired", "wb1.lab/md/#", "#")
        peer.say(TOPICS.report(VICTIM), b"forged")
        server.say(TOPICS.desired(VICTIM), b"secret")
        server.listen(TOPICS.desired(VICTIM))
        server.say(TOPICS.desired(VICTIM), b"marker")
        assert server.has(TOPICS.desired(VICTIM), b"marker")
        assert (TOPICS.report(VICTIM), b"forged") not in server.heard
        assert not [topic for topic, _ in peer.heard if "/dev/victim" in topic]
    peer.close()


def test_41_a_giant_packet_ends_its_connection_and_nothing_else(
    lab: Lab, server: Peer, certificates: dict[str, Path]
) -> None:
    giant = Peer(lab, certificates[ATTACKER])
    giant.paho.publish(TOPICS.report(ATTACKER), bytes(PACKET_BYTES_MAX + 1), 1)
    assert giant.is_gone.wait(WAIT_S)
    assert not any(len(payload) > PACKET_BYTES_MAX for _, payload in server.heard)


def test_41_the_longest_messages_of_the_protocol_pass(
    lab: Lab, server: Peer, certificates: dict[str, Path]
) -> None:
    victim = Peer(lab, certificates[VICTIM]).listen(
        TOPICS.metadata_answer(VICTIM), TOPICS.chunk_group(BLOB, 1)
    )
    server.say(TOPICS.metadata_answer(VICTIM), bytes(BUNDLE_BYTES_MAX))
    server.say(TOPICS.chunk(BLOB, 8), bytes(CHUNK_MESSAGE_BYTES_MAX), retain=True)
    assert victim.has(TOPICS.chunk(BLOB, 8), bytes(CHUNK_MESSAGE_BYTES_MAX))
    assert victim.has(TOPICS.metadata_answer(VICTIM), bytes(BUNDLE_BYTES_MAX))
    victim.close()


def test_41_a_device_cannot_fill_the_broker_with_topics_that_it_makes_up(
    server: Peer, attacker: Peer
) -> None:
    for number in range(50):
        attacker.say(f"wb1.lab/req/{number + 16}/{ATTACKER}", bytes(1000), retain=True)
        attacker.say(f"wb1.lab/dev/{ATTACKER}/{number}", bytes(1000), retain=True)
    attacker.say(TOPICS.request(ATTACKER), b"chunks, please")
    assert server.has(TOPICS.request(ATTACKER), b"chunks, please")
    server.heard.clear()
    server.listen("wb1.lab/req/#", f"wb1.lab/dev/{ATTACKER}/#")  # everything that is retained there
    server.say(TOPICS.desired(ATTACKER), b"marker")
    assert server.has(TOPICS.desired(ATTACKER), b"marker")
    assert not [topic for topic, payload in server.heard if len(payload) == 1000]


def test_41_connections_beyond_the_limit_are_refused_and_those_that_are_there_stay(tmp_path: Path) -> None:
    init_repository(tmp_path / "server", FLEET)
    with secured_mosquitto(tmp_path / "server", tmp_path / "broker", devices_max=1) as broker:
        small = Lab(tmp_path, broker)
        first = Peer(small, small.enroll("first"))
        others = [
            Peer(small, small.enroll(f"other-{number}")) for number in range(SERVER_CONNECTIONS_MAX + 1)
        ]
        assert any(peer.is_refused for peer in others)
        assert not first.is_gone.is_set()
        for peer in (first, *others):
            peer.close()
    gc.collect()


def test_45_a_claim_opens_the_port_for_claims_and_nothing_else(
    lab: Lab, server: Peer, certificates: dict[str, Path]
) -> None:
    claim = decode_claim(claim_device(lab.home, "newcomer").text)
    path = lab.write(key_pem(claim.private_key), claim.certificate)
    assert Peer(lab, path).is_refused
    peer = Peer(lab, path, port=lab.broker.claims_port).listen(
        "#", "wb1.lab/md/#", "wb1.lab/b/#", "wb1.lab/enroll/#"
    )
    other = decode_claim(claim_device(lab.home, "other").text).claim
    for topic in (
        TOPICS.claim_request(other),
        TOPICS.claim_answer(claim.claim),
        TOPICS.report(VICTIM),
        TOPICS.metadata("targets"),
    ):
        peer.say(topic, b"forged", retain=True)
    server.say(TOPICS.claim_answer(other), b"not yours")
    server.say(TOPICS.metadata("targets"), b"news")
    server.say(TOPICS.claim_answer(claim.claim), b"yours")
    assert peer.has(TOPICS.claim_answer(claim.claim), b"yours")
    peer.say(TOPICS.claim_request(claim.claim), b"please")
    assert server.has(TOPICS.claim_request(claim.claim), b"please")
    assert {payload for _, payload in peer.heard} == {b"yours"}
    assert b"forged" not in {payload for _, payload in server.heard}
    assert Peer(lab, certificates[VICTIM], port=lab.broker.claims_port).is_refused
    peer.close()


def test_45_the_key_of_a_device_cannot_pose_as_the_broker(lab: Lab, certificates: dict[str, Path]) -> None:
    """Its certificate says that it is for clients."""
    certificate = x509.load_pem_x509_certificate(certificates[ATTACKER].read_bytes())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    broker = x509.load_pem_x509_certificate((lab.broker.folder / "broker.pem").read_bytes())
    usage = broker.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    path = lab.write((lab.broker.folder / "broker.key").read_bytes(), broker.public_bytes(Encoding.DER))
    assert Peer(lab, path).is_refused


def test_33_a_device_that_does_not_read_costs_the_others_nothing(
    lab: Lab, server: Peer, certificates: dict[str, Path]
) -> None:
    deaf = Peer(lab, certificates[ATTACKER]).listen(TOPICS.desired(ATTACKER))
    deaf.paho.loop_stop()
    victim = Peer(lab, certificates[VICTIM]).listen(TOPICS.desired(VICTIM))
    for _ in range(300):
        server.paho.publish(TOPICS.desired(ATTACKER), bytes(CHUNK_MESSAGE_BYTES_MAX), 1)
    server.say(TOPICS.desired(VICTIM), b"still served")
    assert victim.has(TOPICS.desired(VICTIM), b"still served")
    victim.close()
    deaf.paho.disconnect()
