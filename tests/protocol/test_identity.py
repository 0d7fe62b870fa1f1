"""Keys, what they sign, requests and claims: nothing passes for what it is not."""

from datetime import UTC, datetime

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from protocol.errors import MessageError, RequestError
from protocol.identity import (
    CLAIM_CHARS_MAX,
    Claim,
    certificate_request,
    decode_claim,
    encode_claim,
    fingerprint,
    is_report_signed,
    is_request_signed,
    key_digest,
    key_number,
    make_key,
    public_der,
    read_request,
    seal_report,
)
from protocol.ids import ClaimId, DeviceId, FleetId
from protocol.messages import Report, decode_report, encode_message

DEVICE = DeviceId("shelf-7")
TOPIC = "wb1.lab/dev/shelf-7/report"
REPORT = encode_message(Report(device=DEVICE, sequence=1, state="idle", family="digits"))


def own_certificate(name: str) -> bytes:
    key = make_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start.replace(year=2027))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


@pytest.fixture
def claim() -> Claim:
    return Claim(
        fleet=FleetId("lab"),
        device=DEVICE,
        claim=ClaimId("0123456789abcdef"),
        expires_ms=1,
        port=8884,
        key=key_number(make_key()),
        certificate=own_certificate("claim"),
        authority=own_certificate("authority"),
    )


def test_a_signed_report_is_what_was_signed_and_says_so() -> None:
    key = make_key()
    received = decode_report(seal_report(key, TOPIC, REPORT))
    assert received.signed == REPORT
    assert received.report.device == DEVICE
    assert is_report_signed(key.public_key(), TOPIC, received.signed, received.signature)


def test_a_report_without_a_signature_is_read_as_it_is() -> None:
    received = decode_report(REPORT)
    assert (received.signed, received.signature) == (REPORT, b"")


def test_a_signature_is_for_one_key_one_topic_and_one_text() -> None:
    key = make_key()
    received = decode_report(seal_report(key, TOPIC, REPORT))
    public = key.public_key()
    assert not is_report_signed(make_key().public_key(), TOPIC, received.signed, received.signature)
    assert not is_report_signed(public, TOPIC.replace("7", "8"), received.signed, received.signature)
    assert not is_report_signed(public, TOPIC.replace("lab", "bar"), received.signed, received.signature)
    assert not is_report_signed(public, TOPIC, received.signed + b" ", received.signature)
    for signature in (b"", b"x", received.signature[:-1], bytes(len(received.signature))):
        assert not is_report_signed(public, TOPIC, received.signed, signature)


def test_what_is_signed_for_one_purpose_is_good_for_no_other() -> None:
    key = make_key()
    request = certificate_request(DEVICE, key, key, TOPIC)
    assert is_request_signed(request, TOPIC, key.public_key())
    assert not is_report_signed(key.public_key(), TOPIC, request.csr, request.signature)
    sealed = decode_report(seal_report(key, TOPIC, REPORT))
    forged = msgspec.structs.replace(request, csr=sealed.signed, signature=sealed.signature)
    assert not is_request_signed(forged, TOPIC, key.public_key())


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b'{"v":1,"report":{}}', b'{"v":2,"report":{"device":"a"}}', b"\xff" * 70_000]
)
def test_what_is_no_report_is_refused(payload: bytes) -> None:
    with pytest.raises(MessageError):
        decode_report(payload)


def test_a_request_names_a_device_and_a_key_and_nothing_else_is_read() -> None:
    key = make_key()
    requested = read_request(certificate_request(DEVICE, key, make_key(), TOPIC).csr)
    assert requested.name == DEVICE
    assert key_digest(requested.key) == key_digest(key.public_key())


def csr(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, *names: tuple[x509.ObjectIdentifier, str]
) -> bytes:
    subject = x509.Name([x509.NameAttribute(kind, name) for kind, name in names])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, algorithm)
        .public_bytes(Encoding.DER)
    )


def test_a_request_for_another_kind_of_key_is_refused() -> None:
    named = (NameOID.COMMON_NAME, "shelf-7")
    for key in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        with pytest.raises(MessageError, match="not on P-256"):
            read_request(csr(key, named))


def test_a_request_with_two_names_is_for_neither() -> None:
    names = [(NameOID.COMMON_NAME, "shelf-7"), (NameOID.COMMON_NAME, "shelf-8")]
    assert read_request(csr(make_key(), *names)).name not in {"shelf-7", "shelf-8"}
    assert read_request(csr(make_key())).name == ""


def test_a_request_that_was_not_signed_with_its_own_key_is_refused() -> None:
    data = bytearray(certificate_request(DEVICE, make_key(), make_key(), TOPIC).csr)
    other = make_key()
    public = x509.load_der_x509_csr(bytes(data)).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    at = data.index(public_der(public))
    data[at : at + len(public_der(public))] = public_der(other.public_key())
    with pytest.raises(MessageError, match="not signed with the key that it is for"):
        read_request(bytes(data))


@pytest.mark.parametrize("data", [b"", b"nonsense", bytes(2048)])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError, match="no PKCS #10"):
        read_request(data)


def test_a_claim_survives_being_written_down(claim: Claim) -> None:
    text = encode_claim(claim)
    assert decode_claim(f"  {text}\n") == claim
    assert len(text) < 1500
    assert text.isascii()


def test_what_is_no_claim_or_half_of_one_is_refused(claim: Claim) -> None:
    text = encode_claim(claim)
    others = [
        encode_claim(msgspec.structs.replace(claim, key=bytes(32))),
        encode_claim(msgspec.structs.replace(claim, certificate=b"x")),
        encode_claim(msgspec.structs.replace(claim, authority=b"")),
    ]
    for wrong in [
        "",
        "x",
        text[:-1],
        text[:100],
        text[1:],
        text + text,
        text + "A" * CLAIM_CHARS_MAX,
        *others,
    ]:
        with pytest.raises(RequestError, match="no claim"):
            decode_claim(wrong)


def test_a_fingerprint_is_short_enough_to_be_compared_and_long_enough_not_to_be_met_by_chance() -> None:
    key = make_key().public_key()
    assert fingerprint(key) == fingerprint(key) != fingerprint(make_key().public_key())
    assert [len(group) for group in fingerprint(key).split("-")] == [4] * 8
