"""Blobs as files named by what they are, written so that a crash leaves either the whole file or none."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from protocol.chunks import build_tree, index_name
from protocol.constants import BLOB_BYTES_MAX, CHUNK_BYTES
from protocol.errors import RequestError, StorageError, StorageFullError, StorageReadOnlyError
from protocol.ids import Digest
from server.ports import StoredBlob

_PARTIAL: Final = ".partial-"
PARTIAL_AGE_MS: Final = 86_400_000
"""Unfinished files older than a day were left by a crash; younger ones may be in the making by another process."""


class FolderBlobs:
    """`BlobStore` in a folder: `<first two digits>/<name>`.

    Args:
        folder: Made when it is not there.

    Raises:
        StorageError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> StoredBlob:
        """Store `data` and the index blobs of its chunk tree; durable on return."""
        return self._put(data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))

    def put_file(self, path: Path) -> StoredBlob:
        """Store the bytes of a file.

        Raises:
            RequestError: The file is not there or cannot be read.
            StorageError: The folder cannot be written.
        """
        try:
            with path.open("rb") as file:
                return self._put(_parts(file))
        except OSError as error:  # of the source: ours are wrapped already
            raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error

    def put_changed(self, name: Digest, change: Callable[[int, bytes], bytes]) -> StoredBlob:
        """Store what a blob becomes when each of its chunks is changed.

        Args:
            name: The blob.
            change: Gets the offset of a chunk and its bytes, and gives as many others.

        Raises:
            StorageError: The blob is not there, or the folder cannot be written.
        """
        path = self.path(name)
        with storage_errors(path):
            file = path.open("rb")
        with file:
            return self._put(change(at * CHUNK_BYTES, part) for at, part in enumerate(_parts(file)))

    def describe(self, digest: Digest) -> StoredBlob:
        """Read a blob from end to end, and make its index blobs where they are missing."""
        path = self.path(digest)
        with storage_errors(path), path.open("rb") as file:
            whole = hashlib.sha256()
            length, digests = 0, []
            for part in _parts(file):
                whole.update(part)
                digests.append(hashlib.sha256(part).digest())
                length += len(part)
        if whole.hexdigest() != digest:
            raise StorageError(f"{path} is damaged", hint="add the release again from its file")
        return self._indexed(digest, length, digests)

    def read_chunk(self, name: Digest, index: int) -> bytes:
        """Payload of one chunk."""
        path = self.path(name)
        with storage_errors(path), path.open("rb") as file:
            payload = os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)
        if not payload:
            raise StorageError(f"{path} has no chunk {index}")
        return payload

    def remove(self, name: Digest) -> None:
        """Remove a blob."""
        path = self.path(name)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def path(self, name: Digest) -> Path:
        """Where a blob lies."""
        return self._folder / name[:2] / name

    @contextmanager
    def partial(self) -> Iterator[BinaryIO]:
        """A file to be written and then stored; removed at the end."""
        with storage_errors(self._folder):
            descriptor, name = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
        try:
            with storage_errors(self._folder), Path(name).open("w+b") as file:
                os.close(descriptor)
                yield file
        finally:
            Path(name).unlink(missing_ok=True)

    def sweep(self, now_ms: int) -> None:
        """Remove what a crash left unfinished."""
        for path in self._folder.glob(f"{_PARTIAL}*"):
            with suppress(OSError):
                if path.stat().st_mtime * 1000 < now_ms - PARTIAL_AGE_MS:
                    path.unlink()

    def _put(self, parts: Iterable[bytes]) -> StoredBlob:
        whole = hashlib.sha256()
        length = 0
        digests: list[bytes] = []

        def measured() -> Iterator[bytes]:
            nonlocal length
            for part in parts:
                whole.update(part)
                digests.append(hashlib.sha256(part).digest())
                length += len(part)
                if length > BLOB_BYTES_MAX:
                    raise RequestError(f"file of more than {BLOB_BYTES_MAX} bytes")
                yield part

        with self._written(measured()) as partial:
            digest = Digest(whole.hexdigest())
            self._place(partial, digest)
        return self._indexed(digest, length, digests)

    def _indexed(self, digest: Digest, length: int, digests: list[bytes]) -> StoredBlob:
        tree, indexes = build_tree(digests)
        for level, index in enumerate(indexes, start=1):
            name = index_name(tree, level)
            if not self.path(name).exists():
                with self._written([index]) as partial:
                    self._place(partial, name)
        return StoredBlob(digest=digest, length=length, tree=tree)

    @contextmanager
    def _written(self, parts: Iterable[bytes]) -> Iterator[Path]:
        """A new file that holds `parts` and is durable; removed unless it is placed."""
        partial: Path | None = None
        try:
            with storage_errors(self._folder):
                descriptor, name = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
                partial = Path(name)
                file = os.fdopen(descriptor, "wb")
            with file:
                for part in parts:  # errors of the source pass as they are
                    with storage_errors(self._folder):
                        file.write(part)
                with storage_errors(self._folder):
                    file.flush()
                    os.fsync(descriptor)
            yield partial
        finally:
            if partial is not None:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    def _place(self, partial: Path, name: Digest) -> None:
        path = self.path(name)
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
            partial.replace(path)
            sync_folder(path.parent)
            sync_folder(self._folder)


class FileSource:
    """`ReadAt` over a file that does not change.

    Args:
        file: Open for reading.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # kept, or it would close
        self._descriptor = file.fileno()
        self._length = os.fstat(self._descriptor).st_size

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self._length

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes `[offset, offset + length)`; fewer only where the file ends."""
        parts = []
        while length > 0:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves the old bytes or the new ones.

    Raises:
        StorageError: The folder cannot be written.
    """
    with storage_errors(path):
        partial = path.with_name(f"{_PARTIAL}{path.name}")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about `path` into our errors."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFullError(f"{path}: {reason}", hint="make room on the disk") from error
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
            raise StorageReadOnlyError(f"{path}: {reason}", hint="check the permissions") from error
        raise StorageError(f"{path}: {reason}") from error


def _parts(file: BinaryIO) -> Iterator[bytes]:
    """A regular file in pieces of a chunk: `read` of a buffered file returns short only at the end."""
    return iter(lambda: file.read(CHUNK_BYTES), b"")
