"""The device's state folder on a POSIX file system: the `Disk` port for real.

Every new name comes about by the same recipe: a temporary file in the same folder, filled or reserved, synced,
renamed, the folder synced. An inode that an engine may have mapped is never written to: `install.py` makes new ones, and an
engine lets go of a model before `rewriting.py` changes its file. Each operation opens the file
for itself, since the loop and the worker of a device use the disk at the same time.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Final

from protocol.errors import StorageError, StorageFullError, StorageReadOnlyError

_TEMPORARY_SUFFIX: Final = ".tmp~"
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RealDisk:
    """Files below one folder.

    Args:
        folder: The state folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._is_closed = False

    def prepare(self) -> None:
        """Make the folder, and remove temporary files of an earlier life; for the one process that writes here.

        Raises:
            StorageError: The folder cannot be made or read.
        """
        with _storage_errors(str(self.folder)):
            _make_folder(self.folder)
            for path in self.folder.rglob("*" + _TEMPORARY_SUFFIX):
                path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running on this folder; a killed process lets go by itself.

        Raises:
            StorageError: Another process runs on it.
        """
        with _storage_errors(str(self.folder)):
            _make_folder(self.folder)
            descriptor = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(
                    f"{self.folder}: another agent runs on this folder", hint="stop it first"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Refuse everything from now on, so that work which goes on elsewhere ends and nothing is written any more."""
        self._is_closed = True

    def length(self, name: str) -> int | None:
        """As `Disk.length`."""
        with _storage_errors(name), suppress(FileNotFoundError, NotADirectoryError):
            return self._path(name).stat(follow_symlinks=False).st_size
        return None

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As `Disk.read`."""
        with _storage_errors(name), self._opened(name, os.O_RDONLY) as descriptor:
            data = os.pread(descriptor, length, offset)
            while len(data) < length and (
                more := os.pread(descriptor, length - len(data), offset + len(data))
            ):
                data += more
            return data

    def create(self, name: str, length: int) -> None:
        """As `Disk.create`."""
        with _storage_errors(name), self._temporary(name) as temporary:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o600)
            try:
                if length:
                    os.posix_fallocate(descriptor, 0, length)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._rename(temporary, name)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As `Disk.write`."""
        with _storage_errors(name), self._opened(name, os.O_RDWR) as descriptor:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view = view[written:]
                offset += written

    def resize(self, name: str, length: int) -> None:
        """As `Disk.resize`."""
        with _storage_errors(name), self._opened(name, os.O_RDWR) as descriptor:
            before = os.fstat(descriptor).st_size
            if length > before:
                try:
                    os.posix_fallocate(descriptor, before, length - before)
                except OSError:
                    os.ftruncate(descriptor, before)
                    raise
            os.ftruncate(descriptor, length)
            os.fsync(descriptor)

    def sync(self, name: str) -> None:
        """As `Disk.sync`."""
        with _storage_errors(name), self._opened(name, os.O_RDWR) as descriptor:
            os.fdatasync(descriptor)

    def replace(self, source: str, target: str) -> None:
        """As `Disk.replace`."""
        with _storage_errors(target):
            _make_folder(self._path(target).parent)
            path = self._path(source)
            self._rename(path, target)
            _sync_folder(path.parent)

    def link(self, source: str, target: str) -> None:
        """As `Disk.link`."""
        with _storage_errors(target), self._temporary(target) as temporary:
            os.link(self._path(source), temporary, follow_symlinks=False)
            self._rename(temporary, target)

    def remove(self, name: str) -> None:
        """As `Disk.remove`."""
        with _storage_errors(name):
            self._path(name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """As `Disk.names`."""
        with _storage_errors(folder):
            return sorted(
                str(path.relative_to(self.folder))
                for path in self._path(folder).rglob("*")
                if path.is_file() and not path.is_symlink() and not path.name.endswith(_TEMPORARY_SUFFIX)
            )

    def forget_cached(self, name: str) -> None:
        """As `Disk.forget_cached`."""
        with _storage_errors(name), self._opened(name, os.O_RDONLY) as descriptor:
            os.fdatasync(descriptor)  # only clean pages are dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def free_bytes(self) -> int:
        """As `Disk.free_bytes`."""
        with _storage_errors(str(self.folder)):
            usage = os.statvfs(self.folder)
            return usage.f_bavail * usage.f_frsize

    def path(self, name: str) -> str:
        """As `Disk.path`."""
        return str(self._path(name))

    def point(self, name: str, target: str) -> None:
        """As `Disk.point`."""
        with _storage_errors(name), self._temporary(name) as temporary:
            temporary.symlink_to(target)
            self._rename(temporary, name)

    def _path(self, name: str) -> Path:
        """Where a name leads; names are built by our own modules, so a bad one is a bug.

        A symbolic link on the way, which nobody but an intruder puts there, is not followed.
        """
        if self._is_closed:
            raise StorageError(f"{name}: the agent on this folder has ended")
        pure = PurePosixPath(name)
        assert name
        assert not pure.is_absolute()
        assert ".." not in pure.parts
        path = self.folder / pure
        for folder in path.parents[: len(pure.parts) - 1]:
            if folder.is_symlink():
                raise StorageError(f"{name}: {folder} is a symbolic link", hint="remove it")
        return path

    @contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        descriptor = os.open(self._path(name), flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """A temporary name beside `name`; nothing is left behind when what follows fails."""
        path = self._path(name)
        temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
        _make_folder(path.parent)
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _rename(self, source: Path, target: str) -> None:
        path = self._path(target)
        source.replace(path)
        _sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder durably: what is synced inside it is lost if its own name is."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(name: str) -> Iterator[None]:
    """Turn the system's errors into coded ones that name the file."""
    try:
        yield
    except OSError as error:
        reason = f"{name}: {error.strerror or error}"
        if error.errno in _FULL:
            raise StorageFullError(reason, hint="make room") from error
        if error.errno == errno.EROFS:
            raise StorageReadOnlyError(reason, hint="the state folder must be writable") from error
        raise StorageError(reason) from error
