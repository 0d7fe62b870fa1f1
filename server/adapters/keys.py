"""Signing keys in a folder: PEM files readable by their owner only, or URIs of keys that live elsewhere.

`NAME.pem` holds a private key, encrypted or not; `NAME.uri` and `NAME.pub` name a token or a key service, and its public key.
"""

import getpass
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from securesystemslib.signer import Signer  # type: ignore[attr-defined]  # public, but without __all__

from protocol.errors import RequestError, StorageError
from server.adapters.blobs import sync_folder
from server.releases.publisher import ROLES
from server.releases.signers import (
    KEY_BYTES_MAX,
    PASSPHRASE_CHARS_MIN,
    LockedKeyError,
    make_key,
    public_key_of,
    remote_signer,
    signer_of,
)

PASSPHRASE_VARIABLE: Final = "WHIMBREL_PASSPHRASE_FILE"  # noqa: S105 - a name of a file, no secret
"""Names a file whose first line is the passphrase of encrypted keys, where nobody can be asked."""

Ask = Callable[[str], str]
"""Gets what is asked for, for people to read; gives the answer."""


class KeyFolder:
    """Keys of a repository.

    Args:
        folder: Where the files lie.
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
                write_private(self._folder / f"{role}.pem", make_key(None)[0])
            sync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"{self._folder}: {error.strerror}") from error

    def load(self) -> dict[str, bytes | Signer]:
        """The keys that can sign here without anybody being asked; which are needed is decided by whoever signs.

        An encrypted key whose passphrase is not in the file that `PASSPHRASE_VARIABLE` names is left out.

        Raises:
            StorageError: A key is there and cannot be read.
            MissingKeyError: A key is none, the passphrase does not fit, or its device does not answer.
        """
        keys: dict[str, bytes | Signer] = {}
        secret = passphrase_from(None)
        for path in sorted(self._folder.glob("*.pem")):
            try:
                keys[path.stem] = signer_of(path.stem, read_key(path), secret)
            except LockedKeyError:
                if secret is not None:
                    raise
        for path in sorted(self._folder.glob("*.uri")):
            public = public_key_of(path.stem, read_key(path.with_suffix(".pub")))
            uri = read_key(path).decode(errors="replace").strip()
            keys[path.stem] = remote_signer(uri, public, asker(None))
        return keys


def read_key(path: Path) -> bytes:
    """A small file.

    Raises:
        RequestError: It is not there.
        StorageError: It cannot be read, or is too long for a key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(KEY_BYTES_MAX + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RequestError(f"{path}: {error.strerror}", hint="`whimbrel keys make` makes keys") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="check its permissions") from error
    if len(data) > KEY_BYTES_MAX:
        raise StorageError(f"{path} has more than {KEY_BYTES_MAX} bytes, which no key has")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read.

    Raises:
        RequestError: It exists; no key is ever overwritten.
        StorageError: It cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise RequestError(f"{path} exists and is never overwritten", hint="choose another name") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error


def passphrase_from(path: Path | None) -> str | None:
    """First line of a file that holds a passphrase; None takes the one that the environment names, or nothing.

    Raises:
        RequestError: The file is not there or empty.
    """
    if path is None:
        named = os.environ.get(PASSPHRASE_VARIABLE, "")
        if not named:
            return None
        path = Path(named)
    text = read_key(path).decode(errors="replace").split("\n", 1)[0].rstrip("\r")
    if not text:
        raise RequestError(f"{path}: its first line is empty", hint="it should be the passphrase")
    return text


def asker(path: Path | None) -> Ask:
    """Where secrets come from: a file, the file that the environment names, or whoever sits at the terminal.

    Args:
        path: Of the file.
    """

    def ask(what: str) -> str:
        found = passphrase_from(path)
        if found is not None:
            return found
        if not sys.stdin.isatty():
            raise LockedKeyError(
                f"{what} is needed, and nobody can be asked",
                hint=f"use --passphrase-file, or {PASSPHRASE_VARIABLE}",
            )
        return getpass.getpass(f"{what}: ")

    return ask


def new_passphrase(path: Path | None) -> str:
    """A passphrase for a new key, asked for twice at a terminal.

    Raises:
        RequestError: It is too short, or the two differ.
    """
    ask = asker(path)
    secret = ask("Passphrase for the new key")
    if len(secret) < PASSPHRASE_CHARS_MIN:
        raise RequestError(f"a passphrase has at least {PASSPHRASE_CHARS_MIN} characters")
    if passphrase_from(path) is None and ask("Once more") != secret:
        raise RequestError("the two passphrases differ", hint="try again")
    return secret
