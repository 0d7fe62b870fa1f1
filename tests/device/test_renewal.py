"""When a certificate is renewed, and what is taken for an answer."""

import random
import ssl
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from device.adapters.clock import SystemClock
from device.adapters.disk import RealDisk
from device.adapters.identity import (
    CA_FILE,
    IDENTITY_FILE,
    NEW_KEY_FILE,
    Identity,
    NotEnrolledError,
    install,
    pending_key,
    read_credentials,
)
from device.config import enrolled
from device.renewal import RETRY_MS, SPREAD, Life, Renewal
from protocol.errors import MessageError, RequestError
from protocol.identity import key_digest, key_pem, make_key, read_request
from protocol.ids import DeviceId, FleetId
from protocol.messages import CertificateAnswer, CertificateRequest, decode_message, encode_message
from server.adapters.authority import Authority

DAY_MS = 24 * 3600 * 1000
LIFE = Life(0, 90 * DAY_MS)
DEVICE = DeviceId("shelf-7")
TOPIC = "wb1.lab/dev/shelf-7/renewal"


@pytest.mark.parametrize("seed", range(20))
def test_a_device_asks_after_two_thirds_of_the_life_and_not_all_at_once(seed: int) -> None:
    renewal = Renewal(random.Random(seed))
    first = next(day for day in range(91) if renewal.is_due(LIFE, day * DAY_MS))
    assert 60 <= first <= 60 + 90 // SPREAD + 1


def test_devices_that_were_enrolled_together_spread_over_days() -> None:
    firsts = set()
    for seed in range(200):
        renewal = Renewal(random.Random(seed))
        firsts.add(next(hour for hour in range(91 * 24) if renewal.is_due(LIFE, hour * DAY_MS // 24)))
    assert len(firsts) > 50


def test_a_device_that_hears_nothing_asks_again_after_hours_and_not_after_minutes() -> None:
    renewal = Renewal(random.Random(1))
    asked = [minute for minute in range(3 * 24 * 60) if renewal.is_due(LIFE, 80 * DAY_MS + minute * 60_000)]
    waits = [later - earlier for earlier, later in pairwise(asked)]
    assert waits
    assert all(RETRY_MS // 2 <= wait * 60_000 <= RETRY_MS + 60_000 for wait in waits)


def test_a_clock_that_was_far_ahead_does_not_keep_a_device_from_asking_once_it_is_right() -> None:
    renewal = Renewal(random.Random(1))
    assert renewal.is_due(LIFE, 4000 * DAY_MS)
    assert renewal.is_due(LIFE, 80 * DAY_MS)


def test_a_clock_in_1970_asks_for_nothing() -> None:
    assert not Renewal(random.Random(1)).is_due(Life(20_000 * DAY_MS, 20_090 * DAY_MS), 0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path / "ca")
    authority.create(FleetId("lab"), SystemClock().now_ms())
    return authority


@pytest.fixture
def identity(tmp_path: Path, authority: Authority) -> Identity:
    """An enrolled device."""
    disk = RealDisk(tmp_path / "state")
    disk.prepare()
    (tmp_path / "state/identity").mkdir()
    (tmp_path / "state/identity/ca.pem").write_bytes(authority.pem())
    key = make_key()
    issued = authority.issue_device(DEVICE, key.public_key(), SystemClock().now_ms(), 90)
    install(disk, key, x509.load_der_x509_certificate(issued.certificate))
    return Identity(DEVICE, enrolled(disk.folder), disk, SystemClock())


def asked_key(identity: Identity) -> bytes:
    """The key that the device asks about, as the server sees it."""
    request = decode_message(CertificateRequest, identity.request(TOPIC))
    return key_digest(read_request(request.csr).key).encode()


def test_the_key_of_a_request_stays_the_same_until_there_is_an_answer(
    identity: Identity, tmp_path: Path
) -> None:
    key = asked_key(identity)
    assert asked_key(identity) == key
    assert (tmp_path / "state" / NEW_KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_an_answer_exchanges_key_and_certificate_in_one_file(
    identity: Identity, authority: Authority, tmp_path: Path
) -> None:
    before = identity.credentials()
    asked_key(identity)
    new = pending_key(RealDisk(tmp_path / "state"))
    assert new is not None
    issued = authority.issue_device(DEVICE, new.public_key(), SystemClock().now_ms(), 90)
    answer = CertificateAnswer(key=issued.key, certificate=issued.certificate)
    assert "renewed" in identity.take(encode_message(answer))
    after = read_credentials(enrolled(tmp_path / "state"))
    assert after.certificate == identity.credentials().certificate != before.certificate
    assert not (tmp_path / "state" / NEW_KEY_FILE).exists()
    assert identity.take(encode_message(answer)) == ""  # nothing is asked any more
    assert (tmp_path / "state" / IDENTITY_FILE).stat().st_mode & 0o777 == 0o600


def test_what_is_no_answer_to_the_question_changes_nothing(
    identity: Identity, authority: Authority, tmp_path: Path
) -> None:
    before = (tmp_path / "state" / IDENTITY_FILE).read_bytes()
    asked_key(identity)
    new = pending_key(RealDisk(tmp_path / "state"))
    assert new is not None
    foreign = Authority(tmp_path / "foreign")
    foreign.create(FleetId("lab"), SystemClock().now_ms())
    now_ms, public = SystemClock().now_ms(), new.public_key()
    for data, reason in (
        (foreign.issue_device(DEVICE, public, now_ms, 90).certificate, "not of the authority"),
        (authority.issue_device(DeviceId("shelf-8"), public, now_ms, 90).certificate, "for 'shelf-8'"),
        (authority.issue_device(DEVICE, make_key().public_key(), now_ms, 90).certificate, "for another key"),
        (b"nonsense", "cannot be judged"),
    ):
        with pytest.raises(MessageError, match=reason):
            identity.take(encode_message(CertificateAnswer(key=key_digest(public), certificate=data)))
    with pytest.raises(MessageError):
        identity.take(b"nonsense")
    refusal = CertificateAnswer(key=key_digest(public), code="enroll.early", detail="too early")
    assert identity.take(encode_message(refusal)) == "no new certificate yet: too early"
    other = CertificateAnswer(key=key_digest(make_key().public_key()), code="enroll.used")
    assert identity.take(encode_message(other)) == ""
    assert (tmp_path / "state" / IDENTITY_FILE).read_bytes() == before


def test_a_device_without_a_certificate_says_so_at_each_attempt_and_takes_it_once_it_is_there(
    identity: Identity, tmp_path: Path
) -> None:
    path = tmp_path / "state" / IDENTITY_FILE
    pem = path.read_bytes()
    path.unlink()
    with pytest.raises(NotEnrolledError, match="whimbrel-device enroll"):
        identity.tls()
    path.write_bytes(pem.replace(b"CERTIFICATE", b"SOMETHING"))
    with pytest.raises(RequestError, match="damaged"):
        identity.tls()
    path.write_bytes(pem)
    assert isinstance(identity.tls(), ssl.SSLContext)


def test_the_certificate_of_another_key_is_found_out(identity: Identity, tmp_path: Path) -> None:
    del identity
    path = tmp_path / "state" / IDENTITY_FILE
    pem = path.read_bytes()
    certificate = pem[pem.index(b"-----BEGIN CERT") :]
    path.write_bytes(key_pem(make_key()) + certificate)
    with pytest.raises(RequestError, match="is not the key of"):
        read_credentials(enrolled(tmp_path / "state"))


def test_files_that_cannot_be_used_are_named(identity: Identity, tmp_path: Path) -> None:
    path, ca = tmp_path / "state" / IDENTITY_FILE, tmp_path / "state" / CA_FILE
    pem = path.read_bytes()
    for key in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        other = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(other + pem[pem.index(b"-----BEGIN CERT") :])
        with pytest.raises(RequestError, match="not a key on P-256"):
            identity.tls()
    path.write_bytes(pem)
    ca.unlink()
    with pytest.raises(RequestError, match=r"ca\.pem.*doctor"):
        identity.tls()
    path.unlink()
    path.mkdir()
    with pytest.raises(RequestError, match=r"identity\.pem: Is a directory"):
        identity.tls()
