"""The keys of encrypted artifacts at rest: in the database, encrypted under a key that lies in the server's folder beside those that sign.

So a database, or a backup of one, gives no content key away. Whoever has the folder has the models anyway: they lie there as they were added.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.errors import MissingKeyError, RequestError
from protocol.ids import Digest
from server.adapters.keys import read_key, write_private

VAULT_KEY_FILE: Final = "content.key"
"""In the folder of keys; 64 hexadecimal digits."""

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_PURPOSE: Final = "whimbrel content key at rest 1"


class Vault:
    """Locks content keys up.

    Args:
        folder: Of keys.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / VAULT_KEY_FILE
        self._cipher: AESGCM | None = None

    def prepare(self, *, may_create: bool) -> None:
        """Make sure that keys can be locked up.

        Args:
            may_create: Make the vault's own key where there is none; not while there are keys that were locked with another.

        Raises:
            StorageError: The folder cannot be written.
            MissingKeyError: The vault's key is gone or damaged.
        """
        if may_create and not self._path.exists():
            with suppress(RequestError):  # another process was faster
                write_private(self._path, os.urandom(_KEY_BYTES).hex().encode() + b"\n")
        self._opened()

    def lock(self, blob: Digest, key: bytes) -> bytes:
        """A content key as it is stored.

        Raises:
            MissingKeyError: The vault's key is gone or damaged.
        """
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._opened().encrypt(nonce, key, _bound_to(blob))

    def unlock(self, blob: Digest, locked: bytes) -> bytes:
        """A content key that was stored for an artifact.

        Raises:
            MissingKeyError: It was locked with another key, or that is gone.
        """
        try:
            return self._opened().decrypt(locked[:_NONCE_BYTES], locked[_NONCE_BYTES:], _bound_to(blob))
        except (InvalidTag, ValueError) as error:
            raise MissingKeyError(
                f"{self._path} does not open the content key of {blob[:12]}",
                hint="put the file back that was there when the release was published",
            ) from error

    def _opened(self) -> AESGCM:
        if self._cipher is None:
            try:
                key = bytes.fromhex(read_key(self._path).decode("ascii"))
            except (RequestError, ValueError) as error:
                raise MissingKeyError(
                    f"{self._path} is missing or damaged: keys of encrypted releases cannot be read",
                    hint="put it back from a copy; where there is none, `openssl rand -hex 32` makes another for further releases",
                ) from error
            if len(key) != _KEY_BYTES:
                raise MissingKeyError(f"{self._path} holds no key", hint="put it back from a copy")
            self._cipher = AESGCM(key)
        return self._cipher


def _bound_to(blob: Digest) -> bytes:
    return f"{_PURPOSE}\n{blob}".encode()
