"""Signing keys in a folder: one PEM file per role, readable by its owner only."""

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from protocol.errors import RequestError, StorageError
from server.adapters.blobs import sync_folder
from server.releases.publisher import ROLES, Role


class KeyFolder:
    """Keys of a repository.

    Args:
        folder: Where the PEM files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Make a key for every role.

        Raises:
            RequestError: There is a key already; none is ever overwritten.
            StorageError: The folder cannot be written.
        """
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for role in ROLES:
                pem = Ed25519PrivateKey.generate().private_bytes(
                    Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
                )
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                with os.fdopen(os.open(self._path(role), flags, 0o600), "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(self._folder)
        except FileExistsError as error:
            raise RequestError(
                f"{error.filename} exists and is never overwritten", hint="choose another folder"
            ) from error
        except OSError as error:
            raise StorageError(f"{self._folder}: {error.strerror}") from error

    def load(self) -> dict[Role, bytes]:
        """The keys that are there; which are needed is decided by whoever signs.

        Raises:
            StorageError: A key is there and cannot be read.
        """
        keys: dict[Role, bytes] = {}
        for role in ROLES:
            path = self._path(role)
            try:
                keys[role] = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}", hint="check its permissions") from error
        return keys

    def _path(self, role: Role) -> Path:
        return self._folder / f"{role}.pem"
