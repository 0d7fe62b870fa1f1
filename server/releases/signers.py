"""Keys as bytes, and where they sign: PEM files here, or a token or a key service by its URI. The only importer of `securesystemslib`'s signers."""

from collections.abc import Callable
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.exceptions import Error as SigningError
from securesystemslib.signer import (  # type: ignore[attr-defined]  # public, but without __all__
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    Signer,
    SSlibKey,
)

from protocol.errors import MissingKeyError
from server.releases.metadata import NAME_FIELD

KEY_BYTES_MAX: Final = 65_536
"""A key file; real ones are below 4 KiB."""

PASSPHRASE_CHARS_MIN: Final = 12
"""Trying one takes little time, as such files are made (PKCS #8 with PBKDF2): a short one would not hold a thief up."""


class LockedKeyError(MissingKeyError):
    """A private key is encrypted, and the passphrase is missing or wrong."""

    code = "request.locked_key"


def make_key(passphrase: str | None) -> tuple[bytes, bytes]:
    """A new Ed25519 key.

    Args:
        passphrase: Encrypts the private key; None leaves it readable to whoever gets the file.

    Returns:
        Private key (PKCS #8) and public key (SubjectPublicKeyInfo), both PEM.
    """
    key = Ed25519PrivateKey.generate()
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        encryption = BestAvailableEncryption(passphrase.encode())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signer_of(name: str, pem: bytes, passphrase: str | None = None) -> Signer:
    """A signer with the private key in a PEM file.

    Args:
        name: What people call the key.
        pem: Its bytes.
        passphrase: For an encrypted key.

    Raises:
        LockedKeyError: It is encrypted, and the passphrase is missing or wrong.
        MissingKeyError: It is no private key that can sign metadata.
    """
    is_encrypted = b"ENCRYPTED" in pem
    if is_encrypted and passphrase is None:
        raise LockedKeyError(f"key {name} is encrypted", hint="give its passphrase")
    try:
        key = load_pem_private_key(
            pem, passphrase.encode() if is_encrypted and passphrase is not None else None
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if is_encrypted:
            raise LockedKeyError(f"key {name}: the passphrase does not fit", hint="try again") from error
        raise MissingKeyError(
            f"key {name} cannot be read: {error}", hint="restore it from a backup"
        ) from error
    if not isinstance(key, Ed25519PrivateKey | EllipticCurvePrivateKey | RSAPrivateKey):
        raise MissingKeyError(
            f"key {name} is no Ed25519, ECDSA or RSA key", hint="make one with `whimbrel keys make`"
        )
    try:
        return CryptoSigner(key, _named(SSlibKey.from_crypto(key.public_key()), name))
    except (ValueError, SigningError) as error:
        raise MissingKeyError(f"key {name} cannot sign: {error}", hint="use an Ed25519 key") from error


def public_key_of(name: str, pem: bytes) -> Key:
    """The public key in a PEM file.

    Raises:
        MissingKeyError: It is no public key that metadata could be checked with.
    """
    try:
        return _named(SSlibKey.from_crypto(load_pem_public_key(pem)), name)
    except (ValueError, TypeError, UnsupportedAlgorithm, SigningError) as error:
        raise MissingKeyError(
            f"{name} holds no public key: {error}",
            hint="`whimbrel keys make` writes one beside the private key",
        ) from error


def remote_signer(uri: str, key: Key, ask: Callable[[str], str]) -> Signer:
    """A signer that is reached by its URI: a token (`hsm:`), a cloud key service, or a file.

    Args:
        uri: As `securesystemslib` has them.
        key: Its public key.
        ask: For a PIN or the like; gets its name.

    Raises:
        MissingKeyError: There is no such signer, its library is not installed, or it does not answer.
    """
    scheme = uri.partition(":")[0]
    if scheme not in SIGNER_FOR_URI_SCHEME:
        known = ", ".join(sorted(SIGNER_FOR_URI_SCHEME))
        raise MissingKeyError(f"there are no signers {scheme[:40]!r}", hint=f"known are {known}, and files")
    try:
        return Signer.from_priv_key_uri(uri, key, ask)
    except Exception as error:  # signers of other vendors raise what they like
        raise MissingKeyError(
            f"signer {scheme}: {str(error)[:300] or type(error).__name__}",
            hint="is its device connected, its library installed, its public key the right one?",
        ) from error


def _named(key: SSlibKey, name: str) -> SSlibKey:
    key.unrecognized_fields[NAME_FIELD] = name
    return key
