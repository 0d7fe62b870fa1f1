"""Enrolment, renewal and revocation as they happen: a real mosquitto, a real server, a real agent, real trials."""

import itertools
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from device import cli
from device.adapters.clock import SystemClock
from device.adapters.disk import RealDisk
from device.adapters.identity import IDENTITY_FILE, Identity, install, read_credentials
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import DeviceConfig, enrolled, load_config
from device.runtime import DeviceRuntime
from protocol.errors import RequestError
from protocol.identity import (
    PrivateKey,
    decode_claim,
    encode_claim,
    fingerprint,
    key_pem,
    make_key,
    seal_report,
)
from protocol.ids import DeviceId, FleetId
from protocol.messages import Report, encode_message
from protocol.topics import Topics
from server.adapters.authority import Authority
from server.config import read_config
from server.home import opened
from server.identity import (
    accept_device,
    authority_of,
    claim_device,
    configure_broker,
    ensure_authority,
    issuer,
    pending_devices,
    read_broker,
    refuse_device,
    revoke_name,
    tls_settings,
)
from server.operations import (
    add_release,
    export_release,
    init_repository,
    list_devices,
    publish_release,
    rollout_status,
    start_rollout,
)
from server.runtime import Server
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import SecuredBroker, embedded_broker, secured_mosquitto, wait_until
from tests.server.test_chunk_server import Radio

WAIT_S = 60.0
DAY_MS = 24 * 3600 * 1000
DEVICE = DeviceId("shelf-7")
TOPICS = Topics(FleetId("lab"))

# paho leaves the socket of a handshake that failed to the collector, which closes it, and warns.
pytestmark = [
    pytest.mark.mosquitto,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Capture = pytest.CaptureFixture[str]


class Lab:
    """A fleet with two versions of a model, whose server speaks to mosquitto with a certificate."""

    def __init__(self, folder: Path, broker: SecuredBroker) -> None:
        self.folder, self.broker = folder, broker
        self.home = folder / "server"
        health = write_health_plan(folder / "health.json")
        for version, seed in (("v1", 1), ("v2", 2)):
            model = write_classifier(folder / f"{version}.onnx", seed, hidden=8_000)
            add_release(self.home, "digits", version, [model], runtime="onnx", health=health)
            publish_release(self.home, "digits", version)
        export_release(self.home, "digits", "v1", folder / "factory")
        config = read_config(self.home)
        address = f"127.0.0.1:{broker.port}"
        self.config = msgspec.structs.replace(config, broker=address, tls=tls_settings())

    def device(self, name: str = DEVICE, tls: str = "[tls]\n") -> Path:
        """The configuration of a provisioned device."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "device.toml").write_text(
            f'device = "{name}"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'
            f'broker = "127.0.0.1:{self.broker.port}"\n{tls}'
        )
        path = folder / "device.toml"
        assert cli.main(["provision", "--config", str(path), "--from", str(self.folder / "factory")]) == 0
        return path

    def claim(self, name: str = DEVICE) -> Path:
        path = self.folder / f"{name}.claim"
        path.write_text(claim_device(self.home, name).text)
        return path

    def enroll(self, config: Path, claim: Path) -> None:
        """All of it, with an operator who accepts at once."""
        with enrolling(config, claim) as ended:
            assert wait_until(lambda: pending_devices(self.home), WAIT_S)
            accept_device(self.home, pending_devices(self.home)[0].device)
            assert ended.wait(WAIT_S)


@contextmanager
def enrolling(config: Path, claim: Path, *words: str) -> Iterator[threading.Event]:
    """`whimbrel-device enroll` in a thread; the event is set once it ended with 0."""
    ended = threading.Event()

    def run() -> None:
        if cli.main(["enroll", "--config", str(config), "--claim", str(claim), "--wait", "60", *words]) == 0:
            ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    yield ended
    thread.join(WAIT_S)
    assert not thread.is_alive()


@contextmanager
def running(path: Path) -> Iterator[tuple[MqttLoop, DeviceRuntime]]:
    """The agent, on a loop that the test turns."""
    loop, pool = MqttLoop(), WorkerPool(threads=1)
    config = load_config(path)
    runtime = DeviceRuntime(config, loop, pool, clock=SystemClock(), rng=random.Random(1))
    runtime.start()
    try:
        yield loop, runtime
    finally:
        runtime.stop()
        loop.close()
        pool.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    init_repository(tmp_path / "server", "lab")
    with secured_mosquitto(tmp_path / "server", tmp_path / "broker") as broker:
        yield Lab(tmp_path, broker)


@pytest.fixture
def server(lab: Lab) -> Iterator[Server]:
    with Server(lab.config, seed=1) as server:
        server.wait_connected(WAIT_S)
        yield server


def age_certificate(lab: Lab, config: DeviceConfig, days: int) -> x509.Certificate:
    """Give a device a certificate that was issued a while ago."""
    key = make_key()
    then_ms = SystemClock().now_ms() - days * DAY_MS
    record = issuer(authority_of(lab.home), then_ms, 90)(config.agent.device, key.public_key())
    with opened(lab.home) as home:
        home.store.change_identities(
            lambda known: [
                record,
                *(msgspec.structs.replace(each, revoked_ms=then_ms) for each in known.of_device(DEVICE)),
            ]
        )
    certificate = x509.load_der_x509_certificate(record.certificate)
    install(RealDisk(config.folder), key, certificate)
    return certificate


def test_a_device_is_enrolled_and_gets_an_update_over_a_broker_that_lets_in_nobody_else(
    lab: Lab, server: Server
) -> None:
    path, claim = lab.device(), lab.claim()
    with enrolling(path, claim) as ended:
        assert wait_until(lambda: pending_devices(lab.home), WAIT_S)
        (waiting,) = pending_devices(lab.home)
        assert waiting.device == DEVICE
        assert not ended.is_set()
        accept_device(lab.home, DEVICE, waiting.fingerprint)
        assert ended.wait(WAIT_S)
    state = path.parent / "state"
    identity = state / IDENTITY_FILE
    assert identity.stat().st_mode & 0o777 == 0o600
    assert {file.name for file in identity.parent.iterdir()} == {"identity.pem", "ca.pem"}
    credentials = read_credentials(enrolled(state))
    assert fingerprint(credentials.key.public_key()) == waiting.fingerprint
    with running(path) as (loop, runtime):
        assert loop.run_until(lambda: runtime.transport.is_connected, WAIT_S), runtime.transport.error
        start_rollout(lab.home, "digits", "v2", canary_count=1)
        done = loop.run_until(lambda: rollout_status(lab.home, "r1").rollout.state == "finished", WAIT_S)
        assert done, (rollout_status(lab.home, "r1"), runtime.agent.record)
    (record,) = list_devices(lab.home)
    assert record.version == "v2"
    assert server.counters()["reports_forged"] == 0


def test_the_key_that_the_device_prints_is_the_one_that_the_operator_sees(
    lab: Lab, server: Server, capsys: Capture
) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    capsys.readouterr()
    with enrolling(path, claim) as ended:
        assert wait_until(lambda: pending_devices(lab.home), WAIT_S)
        (waiting,) = pending_devices(lab.home)
        accept_device(lab.home, DEVICE)
        assert ended.wait(WAIT_S)
    out = capsys.readouterr().out
    assert f"key of shelf-7: {waiting.fingerprint}\n" in out
    assert "has a certificate until" in out


def test_enrolling_may_be_cut_off_and_begun_again_with_the_same_key(
    lab: Lab, server: Server, capsys: Capture
) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    words = ["enroll", "--config", str(path), "--claim", str(claim), "--wait", "2"]
    assert cli.main(words) == 1
    assert "nobody has accepted it yet" in capsys.readouterr().err
    (first,) = pending_devices(lab.home)
    accept_device(lab.home, DEVICE)
    assert cli.main(words) == 0  # the answer is retained
    assert first.fingerprint in capsys.readouterr().out


def test_an_answer_to_a_claim_survives_a_broker_that_forgets(
    lab: Lab, capsys: Capture, tmp_path: Path
) -> None:
    path, claim = lab.device(), lab.claim()
    words = ["enroll", "--config", str(path), "--claim", str(claim), "--wait", "2"]
    with Server(lab.config, seed=1) as server:
        server.wait_connected(WAIT_S)  # or the only request could come before anybody listens
        assert cli.main(words) == 1
    accept_device(
        lab.home, DEVICE
    )  # while nobody serves, and then another broker takes the place of the first
    with secured_mosquitto(lab.home, tmp_path / "another") as broker:
        address = f"127.0.0.1:{broker.port}"
        text = claim.read_text()
        claim.write_text(encode_claim(msgspec.structs.replace(decode_claim(text), port=broker.claims_port)))
        with Server(msgspec.structs.replace(lab.config, broker=address), seed=1) as server:
            server.wait_connected(WAIT_S)
            assert cli.main([*words[:-1], "60"]) == 0
    assert "has a certificate until" in capsys.readouterr().out


def test_a_claim_that_was_used_is_refused_for_another_key(lab: Lab, server: Server, capsys: Capture) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    other = lab.folder / "thief"
    other.mkdir()
    (other / "device.toml").write_text(path.read_text())
    capsys.readouterr()
    assert cli.main(["enroll", "--config", str(other / "device.toml"), "--claim", str(claim)]) == 1
    error = capsys.readouterr().err
    assert "this claim was used with another key" in error
    assert "enroll.used" in error
    assert {path.name for path in (other / "state/identity").iterdir()} == {"new.key"}


def test_a_claim_of_a_device_that_has_a_certificate_is_not_given_and_not_asked_for(
    lab: Lab, server: Server, capsys: Capture
) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    capsys.readouterr()
    with pytest.raises(RequestError, match=r"shelf-7 has a certificate.*revoke it first"):
        claim_device(lab.home, DEVICE)
    assert cli.main(["enroll", "--config", str(path), "--claim", str(claim)]) == 1
    assert "which the agent renews" in capsys.readouterr().err


def test_a_claim_of_another_server_is_refused_by_the_broker(
    lab: Lab, server: Server, tmp_path: Path, capsys: Capture
) -> None:
    del server
    path = lab.device()
    init_repository(tmp_path / "elsewhere", "lab")
    foreign = decode_claim(claim_device(tmp_path / "elsewhere", DEVICE).text)
    mixed = msgspec.structs.replace(foreign, port=lab.broker.claims_port)
    claim = tmp_path / "foreign.claim"
    claim.write_text(encode_claim(mixed))
    assert cli.main(["enroll", "--config", str(path), "--claim", str(claim), "--wait", "2"]) == 1
    assert "certificate" in capsys.readouterr().err  # the broker's is of no authority that the claim names
    ours = decode_claim(lab.claim().read_text())
    claim.write_text(encode_claim(msgspec.structs.replace(mixed, authority=ours.authority)))
    assert cli.main(["enroll", "--config", str(path), "--claim", str(claim), "--wait", "2"]) == 1
    assert "may not accept this certificate" in capsys.readouterr().err
    assert not pending_devices(lab.home)


def test_the_claim_of_another_device_is_refused_though_it_was_relabelled(
    lab: Lab, server: Server, capsys: Capture
) -> None:
    """It opens the port, since its key and certificate are good; the server looks closer."""
    path, other = lab.device(), lab.claim("shelf-8")
    claim = decode_claim(other.read_text())
    other.write_text(encode_claim(msgspec.structs.replace(claim, device=DEVICE)))
    assert cli.main(["enroll", "--config", str(path), "--claim", str(other)]) == 1
    error = capsys.readouterr().err
    assert "the claim is for shelf-8, and not for 'shelf-7'" in error
    assert "enroll.wrong_name" in error
    assert not pending_devices(lab.home)
    assert server.failure is None


def test_a_claim_that_was_withdrawn_is_refused_with_a_reason(
    lab: Lab, server: Server, capsys: Capture
) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    revoke_name(lab.home, DEVICE)
    assert cli.main(["enroll", "--config", str(path), "--claim", str(claim)]) == 1
    assert "the claim was withdrawn" in capsys.readouterr().err


def test_an_expired_claim_is_refused_with_a_reason(lab: Lab, server: Server, capsys: Capture) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    with opened(lab.home) as home:
        home.store.change_identities(
            lambda known: [
                msgspec.structs.replace(record, expires_ms=record.created_ms)
                for record in known.claims.values()
            ]
        )
    assert cli.main(["enroll", "--config", str(path), "--claim", str(claim)]) == 1
    error = capsys.readouterr().err
    assert "the claim has expired" in error
    assert "enroll.expired" in error


def test_a_device_that_the_operator_refuses_is_told(lab: Lab, server: Server, capsys: Capture) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    with enrolling(path, claim) as ended:
        assert wait_until(lambda: pending_devices(lab.home), WAIT_S)
        refuse_device(lab.home, DEVICE)
    assert not ended.is_set()
    assert "the claim was refused" in capsys.readouterr().err


def test_a_claim_for_another_device_is_refused_before_a_byte_is_sent(lab: Lab, capsys: Capture) -> None:
    path, claim = lab.device(), lab.claim("shelf-8")
    assert cli.main(["enroll", "--config", str(path), "--claim", str(claim)]) == 1
    assert "the claim is for shelf-8 of lab, and this is shelf-7 of lab" in capsys.readouterr().err
    text = claim.read_text()
    assert cli.main(["enroll", "--config", str(path), "--claim", text]) == 1
    assert "the claim is for shelf-8 of lab" in capsys.readouterr().err
    (path.parent / "half.claim").write_text(text[:200])
    for half in (str(path.parent / "half.claim"), text[:200]):
        assert cli.main(["enroll", "--config", str(path), "--claim", half]) == 1
        assert "no claim, or not all of it" in capsys.readouterr().err
    assert cli.main(["enroll", "--config", str(path), "--claim", "nowhere.claim"]) == 1
    assert "nowhere.claim: No such file" in capsys.readouterr().err


def test_a_certificate_is_renewed_during_an_update_without_losing_the_connection(
    lab: Lab, server: Server
) -> None:
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    config = load_config(path)
    old = age_certificate(lab, config, days=64)
    start_rollout(lab.home, "digits", "v2", canary_count=1)
    losses: list[str] = []
    with running(path) as (loop, runtime):
        runtime.transport._on_disconnected = lambda: losses.append("lost")
        assert loop.run_until(lambda: rollout_status(lab.home, "r1").rollout.state == "finished", WAIT_S)
        assert runtime.agent.record.active_slot.version == "v2"
        assert loop.run_until(lambda: certificate(config).serial_number != old.serial_number, WAIT_S)
        assert losses == []
        new = certificate(config)
        assert new.not_valid_after_utc > old.not_valid_after_utc
        assert new.public_key() != old.public_key()
        bar(lab, old)
        sequence = last_sequence(lab)
        runtime.transport.drop()  # the next connection shows the new one
        assert loop.run_until(lambda: last_sequence(lab) > sequence, WAIT_S), runtime.transport.error
        assert losses == ["lost"]
    assert server.counters()["reports_forged"] == 0


def test_a_server_without_the_key_of_the_authority_renews_nothing_and_the_device_asks_again_later(
    lab: Lab, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    config = load_config(path)
    old = age_certificate(lab, config, days=64)
    key = lab.home / "ca/devices.key"
    hidden = key.rename(lab.folder / "hidden.key")
    caplog.set_level("INFO")
    with running(path) as (loop, runtime):
        assert loop.run_until(lambda: "cannot issue certificates now" in caplog.text, WAIT_S)
        assert runtime.transport.is_connected
        assert certificate(config) == old
    assert "devices.key" in caplog.text
    hidden.rename(key)
    with running(path) as (loop, _):
        assert loop.run_until(lambda: certificate(config) != old, WAIT_S)
    assert server.failure is None


def certificate(config: DeviceConfig) -> x509.Certificate:
    return read_credentials(enrolled(config.folder)).certificate


def last_sequence(lab: Lab) -> int:
    return max((device.report.sequence for device in list_devices(lab.home) if device.report), default=0)


def bar(lab: Lab, old: x509.Certificate) -> None:
    """Let the broker know one certificate for revoked, and no other of its device."""
    with opened(lab.home) as home:
        record = home.store.identities().certificates[f"{old.serial_number:x}"]
        revoked = msgspec.structs.replace(record, revoked_ms=SystemClock().now_ms())
        home.store.change_identities(lambda _: [revoked])
    broker = read_broker(lab.home)
    assert broker is not None
    configure_broker(lab.home, broker)
    lab.broker.reload()


def test_a_device_that_was_revoked_is_shut_out_goes_on_answering_and_can_be_enrolled_anew(
    lab: Lab, server: Server
) -> None:
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    with running(path) as (loop, runtime):
        assert loop.run_until(lambda: runtime.transport.is_connected, WAIT_S)
        assert loop.run_until(lambda: bool(list_devices(lab.home)), WAIT_S)
        revoke_name(lab.home, DEVICE)
        lab.broker.reload()
        runtime.transport.drop()
        assert loop.run_until(lambda: "may not accept this certificate" in runtime.transport.error, WAIT_S)
        assert runtime.agent.serving == "v1"
        # The server is there for the new claim; the agent finds the new certificate by itself.
        again = lab.claim()
        with enrolling(path, again, "--again") as ended:
            assert wait_until(lambda: pending_devices(lab.home), WAIT_S)
            assert accept_device(lab.home, DEVICE).files
            lab.broker.reload()
            assert ended.wait(WAIT_S)
        assert loop.run_until(lambda: runtime.transport.is_connected, WAIT_S), runtime.transport.error
    assert server.failure is None


def test_a_report_that_the_device_did_not_sign_is_ignored_though_the_broker_carries_it(
    tmp_path: Path,
) -> None:
    """Row 46: a broker that checks nobody, and somebody who speaks for a device."""
    home, key = tmp_path / "server", make_key()
    init_repository(home, "lab")
    with opened(home) as there:
        authority, now_ms = ensure_authority(there), SystemClock().now_ms()
        record = issuer(authority, now_ms, 90)(DEVICE, key.public_key())
        there.store.change_identities(lambda _: [record])
    topic = TOPICS.report(DEVICE)
    forgeries = [
        report(1),
        seal_report(make_key(), topic, report(2)),
        seal_report(key, TOPICS.report(DeviceId("other")), report(3)),
        seal_report(key, topic, report(4)).replace(b"v4", b"v5"),
    ]
    with embedded_broker() as broker:
        config = msgspec.structs.replace(read_config(home), broker=f"127.0.0.1:{broker.port}")
        with Server(config, seed=1) as server, closing(Radio(broker.port, DEVICE)) as radio:
            server.wait_connected(WAIT_S)
            for forgery in forgeries:
                radio.say(topic, forgery)
            assert wait_until(lambda: server.counters()["reports_forged"] == len(forgeries))
            radio.say(topic, seal_report(key, topic, report(6)))
            assert wait_until(lambda: [device.version for device in list_devices(home)] == ["v6"])
            # A device that never had a certificate is believed by a server that asks nobody for one.
            plain = DeviceId("plain")
            radio.say(TOPICS.report(plain), report(7, plain))
            assert wait_until(lambda: {device.device for device in list_devices(home)} == {DEVICE, plain})
            revoke_name(home, DEVICE)
            sequences = itertools.count(8)

            def is_refused() -> bool:
                radio.say(topic, seal_report(key, topic, report(next(sequences))))
                return server.counters()["reports_forged"] > len(forgeries)

            assert wait_until(is_refused)  # once the server has noticed


def report(sequence: int, device: str = DEVICE) -> bytes:
    return encode_message(
        Report(device=device, sequence=sequence, state="idle", family="digits", version=f"v{sequence}")
    )


@pytest.mark.parametrize("years", [-56, 10])
def test_a_wrong_clock_keeps_a_device_from_judging_the_dates_of_the_broker_and_from_nothing_else(
    lab: Lab, server: Server, years: int
) -> None:
    """OpenSSL goes by the machine's clock, which a test cannot turn: so the broker's certificate is the one that has expired."""
    del server
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    config = load_config(path)
    assert config.tls is not None
    broker, now_ms = make_key(), SystemClock().now_ms()
    expired = authority_of(lab.home).issue_broker(["127.0.0.1"], broker.public_key(), now_ms - 400 * DAY_MS)
    foreign = Authority(lab.folder / "foreign")
    foreign.create(FleetId("lab"), now_ms)
    stranger = foreign.issue_broker(["127.0.0.1"], broker.public_key(), now_ms)

    class WrongClock(SystemClock):
        def now_ms(self) -> int:
            return super().now_ms() + years * 365 * DAY_MS

    wrong = Identity(DEVICE, config.tls, RealDisk(config.folder), WrongClock())
    right = Identity(DEVICE, config.tls, RealDisk(config.folder), SystemClock())
    assert shakes_hands(wrong.tls(), broker, expired.certificate, lab.folder)
    assert not shakes_hands(right.tls(), broker, expired.certificate, lab.folder)
    assert not shakes_hands(wrong.tls(), broker, stranger.certificate, lab.folder)


def test_45_a_device_that_poses_as_the_broker_is_not_talked_to(lab: Lab, server: Server) -> None:
    del server
    path, claim = lab.device(), lab.claim()
    lab.enroll(path, claim)
    config, now_ms, thief = load_config(path), SystemClock().now_ms(), make_key()
    assert config.tls is not None
    identity = Identity(DEVICE, config.tls, RealDisk(config.folder), SystemClock())
    authority = authority_of(lab.home)
    good = authority.issue_broker(["127.0.0.1"], thief.public_key(), now_ms)
    assert shakes_hands(identity.tls(), thief, good.certificate, lab.folder)
    elsewhere = authority.issue_broker(["192.0.2.1"], thief.public_key(), now_ms)
    assert not shakes_hands(identity.tls(), thief, elsewhere.certificate, lab.folder)
    context = identity.tls()
    context.check_hostname = False  # its name is not even what keeps it out
    client = authority.issue_device(DeviceId("thief"), thief.public_key(), now_ms, 90)
    assert not shakes_hands(context, thief, client.certificate, lab.folder)


def shakes_hands(device: ssl.SSLContext, key: PrivateKey, certificate_der: bytes, folder: Path) -> bool:
    """Whether a device talks to a broker with this key and certificate."""
    path = folder / "poser.pem"
    pem = x509.load_der_x509_certificate(certificate_der).public_bytes(Encoding.PEM)
    path.write_bytes(key_pem(key) + pem)
    broker = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    broker.load_cert_chain(path)
    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(broker.wrap_socket, there, server_side=True)
        try:
            with device.wrap_socket(here, server_hostname="127.0.0.1"):
                accepting.result(WAIT_S).close()
        except ssl.SSLCertVerificationError:
            with pytest.raises(ssl.SSLError):
                accepting.result(WAIT_S)
            return False
    return True
