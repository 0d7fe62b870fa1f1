"""A disk in memory with the durability rules of the `Disk` port: what was not synced may be lost or torn at a crash.

The twin of `device.adapters.disk`; both pass one contract suite.
"""

import random
from typing import Final

from device.ports import Disk
from protocol.errors import StorageError, StorageFullError, StorageReadOnlyError

SECTOR_BYTES: Final = 512
"""A torn write ends at a multiple of this: what a medium writes at once."""


class _File:
    """Content as a reader sees it, and the parts that a crash may take back."""

    __slots__ = ("content", "pending")

    def __init__(self, length: int) -> None:
        self.content = bytearray(length)
        self.pending: list[tuple[int, bytes]] = []  # offset and what was there before, oldest first


class SimulatedDisk(Disk):
    """Files in memory.

    Args:
        capacity_bytes: Room for all files.
    """

    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self.capacity_bytes = capacity_bytes
        self.is_read_only = False  # as after an error that made the system remount it
        self.links: dict[str, str] = {}
        self._files: dict[str, _File] = {}
        self._removed: dict[str, _File] = {}  # names that may come back

    def crash(self, rng: random.Random) -> None:
        """Cut the power: each write that was not synced is kept, lost, or torn at a sector, each name that was removed may come back."""
        for name, file in self._removed.items():
            if rng.random() < 0.5:
                self._files.setdefault(name, file)
        self._removed.clear()
        for file in {id(file): file for file in self._files.values()}.values():
            for offset, before in reversed(file.pending):
                kept = rng.choice(
                    (0, len(before), rng.randrange(len(before) + 1) // SECTOR_BYTES * SECTOR_BYTES)
                )
                file.content[offset + kept : offset + len(before)] = before[kept:]
            file.pending.clear()

    def length(self, name: str) -> int | None:
        """As `Disk.length`."""
        file = self._files.get(name)
        return None if file is None else len(file.content)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As `Disk.read`."""
        return bytes(self._file(name).content[offset : offset + length])

    def create(self, name: str, length: int) -> None:
        """As `Disk.create`."""
        self._check_writable(name)
        if length > self.free_bytes():
            raise StorageFullError(f"{name}: no room for {length} bytes, {self.free_bytes()} are free")
        self._name(name, _File(length))

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As `Disk.write`."""
        self._check_writable(name)
        file = self._file(name)
        before = bytes(file.content[offset : offset + len(data)]).ljust(len(data), b"\0")
        file.pending.append((offset, before))
        file.content[offset : offset + len(data)] = data

    def resize(self, name: str, length: int) -> None:
        """As `Disk.resize`."""
        self._check_writable(name)
        file = self._file(name)
        more = length - len(file.content)
        if more > self.free_bytes():
            raise StorageFullError(f"{name}: no room for {more} bytes more, {self.free_bytes()} are free")
        file.pending.clear()
        del file.content[length:]
        file.content.extend(bytes(max(0, more)))

    def sync(self, name: str) -> None:
        """As `Disk.sync`."""
        self._check_writable(name)
        self._file(name).pending.clear()

    def replace(self, source: str, target: str) -> None:
        """As `Disk.replace`."""
        self._check_writable(target)
        file = self._file(source)
        if self._files.get(target) is file:
            return  # as POSIX has it: both are names of one file, and stay
        self._name(target, file)
        del self._files[source]
        self._sync_folder(source)

    def link(self, source: str, target: str) -> None:
        """As `Disk.link`."""
        self._check_writable(target)
        self._name(target, self._file(source))

    def remove(self, name: str) -> None:
        """As `Disk.remove`."""
        self._check_writable(name)
        file = self._files.pop(name, None)
        if file is not None:
            self._removed[name] = file

    def names(self, folder: str) -> list[str]:
        """As `Disk.names`."""
        return sorted(name for name in self._files if name.startswith(folder + "/"))

    def forget_cached(self, name: str) -> None:
        """As `Disk.forget_cached`; there is no cache."""

    def free_bytes(self) -> int:
        """As `Disk.free_bytes`."""
        used = sum(len(file.content) for file in {id(file): file for file in self._files.values()}.values())
        return self.capacity_bytes - used

    def path(self, name: str) -> str:
        """As `Disk.path`; the name itself, for engines that know this disk."""
        return name

    def point(self, name: str, target: str) -> None:
        """As `Disk.point`."""
        self._check_writable(name)
        self.links[name] = target

    def _name(self, name: str, file: _File) -> None:
        """Give a file a name, durably."""
        self._files[name] = file
        self._sync_folder(name)

    def _sync_folder(self, name: str) -> None:
        """Make everything durable that happened to the names beside this one."""
        folder = name.rpartition("/")[0]
        for removed in [each for each in self._removed if each.rpartition("/")[0] == folder]:
            del self._removed[removed]

    def _check_writable(self, name: str) -> None:
        if self.is_read_only:
            raise StorageReadOnlyError(f"{name}: the disk is read-only")

    def _file(self, name: str) -> _File:
        file = self._files.get(name)
        if file is None:
            raise StorageError(f"{name}: there is no such file")
        return file
