"""Edges of claims and keys: what is just read, what just not."""

from datetime import UTC, datetime

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from protocol.errors import RequestError
from protocol.identity import (
    CLAIM_CHARS_MAX,
    CLAIM_HEAD,
    Claim,
    decode_claim,
    encode_claim,
    key_number,
    key_pem,
    load_public,
    make_key,
    public_der,
)
from protocol.ids import ClaimId, DeviceId, FleetId
from tests.protocol.test_identity import own_certificate


def claim(**changes: object) -> Claim:
    valid = Claim(
        fleet=FleetId("lab"),
        device=DeviceId("shelf-7"),
        claim=ClaimId("0123456789abcdef"),
        expires_ms=1,
        port=8884,
        key=key_number(make_key()),
        certificate=own_certificate("claim"),
        authority=own_certificate("authority"),
    )
    return msgspec.structs.replace(valid, **changes)


def test_a_claim_stands_alone_in_its_text() -> None:
    text = encode_claim(claim())
    for wrong in (f"claim: {text}", f"{CLAIM_HEAD}{text}", text.replace(CLAIM_HEAD, ""), f"{text} x"):
        with pytest.raises(RequestError, match="no claim"):
            decode_claim(wrong)


def authority(padding_bytes: int) -> bytes:
    """A certificate that is as much longer as its extension is; signatures of this kind of key all have one length."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.1"), bytes(padding_bytes))
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start.replace(year=2027))
    return builder.add_extension(extension, critical=False).sign(key, None).public_bytes(Encoding.DER)


def test_a_claim_of_exactly_the_largest_size_is_read_and_no_longer_one() -> None:
    certificate = own_certificate("claim")
    used = len(encode_claim(claim(certificate=certificate, authority=authority(3000)))) - len(CLAIM_HEAD)
    padding = 3000 + (CLAIM_CHARS_MAX - used) // 4 * 3
    longest = encode_claim(claim(certificate=certificate, authority=authority(padding)))
    assert len(longest) == len(CLAIM_HEAD) + CLAIM_CHARS_MAX
    assert encode_claim(decode_claim(longest)) == longest
    longer = encode_claim(claim(certificate=certificate, authority=authority(padding + 3)))
    assert len(longer) > len(longest)
    with pytest.raises(RequestError, match="no claim"):
        decode_claim(longer)


def test_a_key_is_stored_so_that_it_is_the_same_key_again() -> None:
    key = make_key()
    read = load_pem_private_key(key_pem(key), None)
    assert public_der(read.public_key()) == public_der(key.public_key())  # type: ignore[arg-type]
    assert public_der(load_public(public_der(key.public_key()))) == public_der(key.public_key())
