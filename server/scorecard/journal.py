"""What was measured, line by line, so that a run that was interrupted goes on and one that was complete is read back.

One file for each model and way of running it: a line of JSON names that, then a line for each answer, written at once and never changed. A line
that is not whole, as a kill or a power cut leaves the last one, is passed over and measured again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from protocol.errors import RequestError, StorageError
from protocol.ids import Digest, digest_of
from server.adapters.blobs import storage_errors
from server.adapters.lock import FolderLock

JOURNAL_VERSION: Final = 1

_Value = TypeVar("_Value", bound=Struct)


class _Entry(Struct, frozen=True):
    key: str
    value: msgspec.Raw
    check: str  # of the value, so that no damaged line is believed


_entries: Final = msgspec.json.Decoder(_Entry)


class Journal:
    """An open journal.

    Args:
        path: Its file; made when it is not there.
        identity: What all its answers are about, for people who look into it.

    Raises:
        StorageError: It cannot be read or written.
    """

    def __init__(self, path: Path, identity: dict[str, object]) -> None:
        self._path = path
        self._values: dict[str, bytes] = {}
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            data = path.read_bytes()
            if not data:
                self._write(msgspec.json.encode({"journal": JOURNAL_VERSION, **identity}) + b"\n")
            elif not data.endswith(b"\n"):
                self._write(b"\n")
        for line in data.splitlines()[1:]:
            self._take(line)

    def get(self, key: str, kind: type[_Value]) -> _Value | None:
        """What was written under a key; None if nothing was, or by another version in another form."""
        data = self._values.get(key)
        if data is None:
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError:
            return None

    def put(self, key: str, value: Struct) -> None:
        """Write; survives a kill once it returns.

        Raises:
            StorageError: The file cannot be written.
        """
        data = msgspec.json.encode(value)
        entry = _Entry(key, msgspec.Raw(data), digest_of(data)[:16])
        with storage_errors(self._path):
            self._write(msgspec.json.encode(entry) + b"\n")
        self._values[key] = data

    def close(self) -> None:
        """Make it durable."""
        with storage_errors(self._path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        if os.write(self._descriptor, line) != len(line):
            raise StorageError(f"{self._path}: no room", hint="make room, and run it again: it goes on")

    def _take(self, line: bytes) -> None:
        try:
            entry = _entries.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return
        data = bytes(entry.value)
        if digest_of(data)[:16] == entry.check:
            self._values[entry.key] = data


@contextmanager
def journal(folder: Path, name: Digest, identity: dict[str, object]) -> Iterator[Journal]:
    """Open a journal for as long as nobody else writes to it.

    Raises:
        RequestError: Another process scores the same.
        StorageError: The folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    try:
        lock = FolderLock(folder / f"{name}.lock")
    except RequestError as error:
        raise RequestError(
            "another `whimbrel score` measures this model", hint="wait for it: its answers are used again"
        ) from error
    try:
        opened = Journal(folder / f"{name}.jsonl", identity)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        lock.release()
