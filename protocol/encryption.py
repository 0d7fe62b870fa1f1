"""Artifacts that only enrolled devices can read: the cipher of their bytes, and the wrapping of its keys (SPEC section 5.5). Pure, but for the making of keys.

Imported only by whoever has an identity, or keys to give: it loads `cryptography`. What is used is standard: AES-256 in counter mode, and
HPKE (RFC 9180) with DHKEM(P-256), HKDF-SHA256 and AES-256-GCM, to the key of a device's certificate.
"""

import hashlib
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from protocol.constants import CONTENT_KEY_BYTES
from protocol.errors import ContentKeyError
from protocol.identity import PrivateKey, PublicKey
from protocol.ids import DeviceId, Digest, FleetId

_BLOCK_BYTES: Final = 16
_NAME: Final = b"whimbrel content key 1\n"
_WRAPPED: Final = "whimbrel wrapped content key 1"
_SUITE: Final = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def make_content_key() -> bytes:
    """A new key, for one artifact and never for a second one: the counter starts at 0 for each."""
    return AESGCM.generate_key(8 * CONTENT_KEY_BYTES)


def content_key_name(key: bytes) -> Digest:
    """What signed metadata calls a key; nobody finds the key from it, nor a second key with that name."""
    return Digest(hashlib.sha256(_NAME + key).hexdigest())


class ContentCipher:
    """Encrypts the bytes of one artifact, and decrypts them: it is the same operation.

    Any stretch can be done by itself, so chunks need no order. That a byte was changed is not noticed here: signed digests
    cover what is encrypted, and the signed digest of the file what comes out.

    Args:
        key: `CONTENT_KEY_BYTES` bytes.
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) == CONTENT_KEY_BYTES
        self._algorithm = algorithms.AES(key)

    def __call__(self, offset: int, data: bytes) -> bytes:
        """The other form of the bytes that begin at `offset`."""
        block, skipped = divmod(offset, _BLOCK_BYTES)
        stream = Cipher(self._algorithm, modes.CTR(block.to_bytes(_BLOCK_BYTES))).encryptor()
        if skipped:
            stream.update(bytes(skipped))  # a chunk may begin within a block
        return stream.update(data)


def wrap_key(key: bytes, recipient: PublicKey, fleet: FleetId, device: DeviceId, blob: Digest) -> bytes:
    """A content key that only the holder of one private key can open, as one device of one fleet, for one artifact.

    Args:
        key: What is wrapped.
        recipient: Of the device's certificate.
        fleet: The fleet.
        device: The device.
        blob: Digest of the artifact as it travels.
    """
    return _SUITE.encrypt(key, recipient, info=_bound_to(fleet, device, blob))


def unwrap_key(
    wrapped: bytes, recipient: PrivateKey, fleet: FleetId, device: DeviceId, blob: Digest
) -> bytes:
    """Open what `wrap_key` made; who made it is not known, so the name of the key has to be compared.

    Raises:
        ContentKeyError: It was made for another key, device, fleet or artifact, or was changed.
    """
    try:
        key = _SUITE.decrypt(wrapped, recipient, info=_bound_to(fleet, device, blob))
    except (InvalidTag, ValueError) as error:
        raise ContentKeyError("a content key cannot be opened with the key of this device") from error
    if len(key) != CONTENT_KEY_BYTES:
        raise ContentKeyError(f"a content key of {len(key)} bytes, {CONTENT_KEY_BYTES} expected")
    return key


def _bound_to(fleet: FleetId, device: DeviceId, blob: Digest) -> bytes:
    """The `info` of HPKE. None of the names can hold a line feed (SPEC section 2)."""
    return f"{_WRAPPED}\n{fleet}\n{device}\n{blob}".encode()
