"""Who a device is: its key, what keys sign, and claims for a first certificate (SPEC section 10). Pure, but for the making of keys.

Imported only by whoever has an identity: it loads `cryptography`.
"""

import base64
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    derive_private_key,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)
from cryptography.x509.oid import NameOID
from msgspec import Meta, Struct

from protocol.errors import MessageError, RequestError
from protocol.ids import ClaimId, DeviceId, Digest, FleetId, digest_of
from protocol.messages import CertificateRequest, sealed_report

PrivateKey = EllipticCurvePrivateKey
PublicKey = EllipticCurvePublicKey

CLAIM_CHARS_MAX: Final = 8192
"""A claim has about 1,300."""

CLAIM_HEAD: Final = "whimbrel-claim-1."
"""The text of a claim begins so."""

_FINGERPRINT_BYTES: Final = 16
"""Two keys with one fingerprint take 2^64 steps to make, another key with a given one 2^128."""

_REPORT: Final = b"whimbrel report 1"
_CERTIFICATE_REQUEST: Final = b"whimbrel certificate request 1"


@dataclass(frozen=True, slots=True)
class Requested:
    """For whom a certificate is asked, and for which key."""

    name: str
    key: PublicKey


class Claim(Struct, frozen=True, kw_only=True):
    """What an operator gives to one device, so that it may ask for its first certificate, once.

    Attributes:
        fleet: The fleet.
        device: The device; the certificate will have no other name.
        claim: Number of the claim.
        expires_ms: Instant after which the server refuses it.
        port: Of the broker, for claims.
        key: Private key of the claim; the only secret in it.
        certificate: X.509 DER, opens the port for claims and no other.
        authority: X.509 DER of who issues certificates to devices and to the broker.
    """

    fleet: FleetId
    device: DeviceId
    claim: ClaimId
    expires_ms: int
    port: Annotated[int, Meta(ge=1, le=65_535)]
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    certificate: bytes
    authority: bytes

    @property
    def private_key(self) -> PrivateKey:
        """The key of the claim."""
        return derive_private_key(int.from_bytes(self.key), SECP256R1())


def encode_claim(claim: Claim) -> str:
    """A claim as one line of text."""
    return CLAIM_HEAD + base64.urlsafe_b64encode(msgspec.msgpack.encode(claim)).decode()


def decode_claim(text: str) -> Claim:
    """Read a claim.

    Raises:
        RequestError: The text is none, or not all of it.
    """
    head, _, body = text.strip().partition(CLAIM_HEAD)
    try:
        claim = msgspec.msgpack.decode(
            base64.b64decode(
                body if not head and len(body) <= CLAIM_CHARS_MAX else "", altchars=b"-_", validate=True
            ),
            type=Claim,
        )
        x509.load_der_x509_certificate(claim.certificate)
        x509.load_der_x509_certificate(claim.authority)
        _ = claim.private_key
    except (ValueError, msgspec.MsgspecError) as error:
        raise RequestError(
            "this is no claim, or not all of it", hint="give what `whimbrel devices claim` printed"
        ) from error
    return claim


def make_key() -> PrivateKey:
    """A new key: ECDSA on P-256, see ADR 25."""
    return generate_private_key(SECP256R1())


def key_number(key: PrivateKey) -> bytes:
    """A private key in 32 bytes."""
    return key.private_numbers().private_value.to_bytes(32)


def key_pem(key: PrivateKey) -> bytes:
    """A private key as PKCS #8 in PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_der(key: PublicKey) -> bytes:
    """A public key as SubjectPublicKeyInfo."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_digest(key: PublicKey) -> Digest:
    """Names a key in messages."""
    return digest_of(public_der(key))


def fingerprint(key: PublicKey) -> str:
    """What two people compare: the first 128 bits of SHA-256 over the public key, in groups of four digits."""
    digits = key_digest(key)[: 2 * _FINGERPRINT_BYTES]
    return "-".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def certificate_request(
    device: DeviceId, key: PrivateKey, signer: PrivateKey, topic: str
) -> CertificateRequest:
    """Ask for a certificate.

    Args:
        device: Whose.
        key: That the certificate will be for.
        signer: Key of the claim, or of the present certificate.
        topic: On which the request is published.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    csr = request.public_bytes(Encoding.DER)
    return CertificateRequest(csr=csr, signature=_sign(signer, _CERTIFICATE_REQUEST, topic, csr))


def is_request_signed(request: CertificateRequest, topic: str, signer: PublicKey) -> bool:
    """Whether a request was signed with this key, for this topic."""
    return _is_signed(signer, request.signature, _CERTIFICATE_REQUEST, topic, request.csr)


def read_request(csr: bytes) -> Requested:
    """What is asked for; nothing else of a request is believed.

    Raises:
        MessageError: It is malformed, for a key that is not on P-256, or was not signed with that key.
    """
    try:
        request = x509.load_der_x509_csr(csr)
        names = [str(attribute.value) for attribute in request.subject]
        key = request.public_key()
        is_signed = request.is_signature_valid
    except ValueError as error:
        raise MessageError(f"the request is no PKCS #10: {error}") from error
    if not isinstance(key, PublicKey) or not isinstance(key.curve, SECP256R1):
        raise MessageError("the request is for a key that is not on P-256")
    if not is_signed:
        raise MessageError("the request is not signed with the key that it is for")
    return Requested("+".join(names), key)


def load_public(data: bytes) -> PublicKey:
    """A public key that we stored."""
    key = load_der_public_key(data)
    assert isinstance(key, PublicKey)
    return key


def seal_report(key: PrivateKey, topic: str, report: bytes) -> bytes:
    """An encoded report with its signature; for no other topic, so for no other device and no other fleet."""
    return sealed_report(report, _sign(key, _REPORT, topic, report))


def is_report_signed(signer: PublicKey, topic: str, signed: bytes, signature: bytes) -> bool:
    """Whether a report was signed with this key, for this topic."""
    return _is_signed(signer, signature, _REPORT, topic, signed)


def _statement(purpose: bytes, topic: str, content: bytes) -> bytes:
    """What is signed: no statement of one purpose is one of another, whatever it contains."""
    return b"\n".join((purpose, topic.encode(), digest_of(content).encode()))


def _sign(key: PrivateKey, purpose: bytes, topic: str, content: bytes) -> bytes:
    return key.sign(_statement(purpose, topic, content), ECDSA(hashes.SHA256()))


def _is_signed(key: PublicKey, signature: bytes, purpose: bytes, topic: str, content: bytes) -> bool:
    try:
        key.verify(signature, _statement(purpose, topic, content), ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
