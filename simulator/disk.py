"""A disk in memory with the durability rules of the `Disk` port: what was not synced may be lost or torn at a crash.

The twin of `device.adapters.disk`; both pass one contract suite. Files are lists of references to bytes, and bytes that
many disks hold alike are held once (`Interned`): a fleet takes the memory of its differences.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from device.ports import Disk
from protocol.errors import StorageError, StorageFullError, StorageReadOnlyError

SECTOR_BYTES: Final = 512
"""A torn write ends at a multiple of this: what a medium writes at once."""

INTERNED_BYTES_MIN: Final = 4_096
"""Shorter pieces are records and indexes of one device; looking them up costs more than they take."""

_Item = TypeVar("_Item")
Extent = tuple[int, bytes]
"""Offset and content of a part of a file; between extents there are zeros."""


class Chance(Protocol):
    """What a crash decides by."""

    def choice(self, items: Sequence[_Item], /) -> _Item:
        """One of them."""

    def randrange(self, count: int, /) -> int:
        """A number below `count`."""


class Interned:
    """Bytes that several disks hold, by content."""

    def __init__(self) -> None:
        self._known: dict[bytes, bytes] = {}

    def share(self, data: bytes) -> bytes:
        """The one copy of `data`."""
        if len(data) < INTERNED_BYTES_MIN:
            return data
        return self._known.setdefault(data, data)


class _File:
    """Content as a reader sees it, what of it is durable, and the writes in between."""

    __slots__ = ("durable", "durable_length", "extents", "length", "pending")

    def __init__(self, length: int) -> None:
        self.length = length
        self.extents: list[Extent] = []
        self.durable: list[Extent] | None = None  # None: the same as `extents`
        self.durable_length = length
        self.pending: list[Extent] = []  # oldest first

    def write(self, offset: int, data: bytes) -> None:
        if self.durable is None:
            self.durable, self.durable_length = self.extents.copy(), self.length
        self.pending.append((offset, data))
        self._place(offset, data)

    def settle(self) -> None:
        self.durable = None
        self.pending.clear()

    def crash(self, rng: Chance) -> None:
        if self.durable is None:
            return
        # In the order in which the power of chance was always spent: newest first.
        kept = [
            rng.choice((0, len(data), rng.randrange(len(data) + 1) // SECTOR_BYTES * SECTOR_BYTES))
            for _, data in reversed(self.pending)
        ]
        pending, self.extents, self.length = self.pending, self.durable, self.durable_length
        self.durable, self.pending = None, []
        for (offset, data), count in zip(pending, reversed(kept), strict=True):
            if count:
                self._place(offset, data[:count])

    def cut(self, length: int) -> None:
        if length < self.length:
            self.extents = [
                (offset, data[: length - offset]) for offset, data in self.extents if offset < length
            ]
        self.length = length

    def _place(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        extents = self.extents
        self.length = max(self.length, end)
        if not data:
            return
        if not extents or extents[-1][0] + len(extents[-1][1]) <= offset:
            extents.append((offset, data))
            return
        first = bisect_left(extents, offset, key=lambda extent: extent[0] + len(extent[1]) - 1)
        last = bisect_left(extents, end, key=lambda extent: extent[0])
        replaced: list[Extent] = [(offset, data)]
        if first < last:
            before_offset, before = extents[first]
            after_offset, after = extents[last - 1]
            if before_offset < offset:
                replaced.insert(0, (before_offset, before[: offset - before_offset]))
            if after_offset + len(after) > end:
                replaced.append((end, after[end - after_offset :]))
        extents[first:last] = replaced


def _read(extents: list[Extent], length: int, offset: int, count: int) -> bytes:
    end = min(offset + count, length)
    if end <= offset:
        return b""
    if len(extents) == 1 and extents[0][0] <= offset and end <= extents[0][0] + len(extents[0][1]):
        start, data = extents[0]
        return data[offset - start : end - start]
    parts: list[bytes] = []
    at = offset
    first = bisect_left(extents, offset, key=lambda extent: extent[0] + len(extent[1]) - 1)
    for start, data in extents[first:]:
        if start >= end:
            break
        if start > at:
            parts.append(bytes(start - at))
            at = start
        part = data if at == start and start + len(data) <= end else data[at - start : end - start]
        parts.append(part)
        at += len(part)
    if at < end:
        parts.append(bytes(end - at))
    return parts[0] if len(parts) == 1 else b"".join(parts)


class SimulatedDisk(Disk):
    """Files in memory.

    Args:
        capacity_bytes: Room for all files.
        interned: Shares content with other disks.
    """

    def __init__(self, capacity_bytes: int = 1 << 40, interned: Interned | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.is_read_only = False  # as after an error that made the system remount it
        self.links: dict[str, str] = {}
        self.read_bytes = 0
        self.written_bytes = 0
        self.syncs = 0
        self._interned = interned or Interned()
        self._files: dict[str, _File] = {}
        self._removed: dict[str, _File] = {}  # names that may come back

    def crash(self, rng: Chance) -> None:
        """Cut the power: each write that was not synced is kept, lost, or torn at a sector, each name that was removed may come back."""
        for name, file in self._removed.items():
            if rng.choice((False, True)):
                self._files.setdefault(name, file)
        self._removed.clear()
        for file in {id(file): file for file in self._files.values()}.values():
            file.crash(rng)

    def content(self, name: str) -> tuple[int, tuple[Extent, ...]]:
        """What a file holds, as a value that equals that of every file with the same pieces: a key to remember by."""
        file = self._file(name)
        return file.length, tuple(file.extents)

    def durable_content(self, name: str) -> tuple[int, tuple[Extent, ...]] | None:
        """Likewise, of what a power cut now would certainly leave; `None` where there is no file."""
        file = self._files.get(name)
        if file is None:
            return None
        if file.durable is None:
            return file.length, tuple(file.extents)
        return file.durable_length, tuple(file.durable)

    def holds_durably(self, name: str, offset: int, data: bytes) -> bool:
        """Whether a power cut now would leave `data` at that place of a file."""
        file = self._files.get(name)
        if file is None:
            return False
        extents = file.extents if file.durable is None else file.durable
        return _read(extents, file.length, offset, len(data)) == data

    def length(self, name: str) -> int | None:
        """As `Disk.length`."""
        file = self._files.get(name)
        return None if file is None else file.length

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As `Disk.read`."""
        file = self._file(name)
        data = _read(file.extents, file.length, offset, length)
        self.read_bytes += len(data)
        return data

    def create(self, name: str, length: int) -> None:
        """As `Disk.create`."""
        self._check_writable(name)
        if length > self.free_bytes():
            raise StorageFullError(f"{name}: no room for {length} bytes, {self.free_bytes()} are free")
        self._name(name, _File(length))

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As `Disk.write`."""
        self._check_writable(name)
        self.written_bytes += len(data)
        self._file(name).write(offset, self._interned.share(bytes(data)))

    def resize(self, name: str, length: int) -> None:
        """As `Disk.resize`."""
        self._check_writable(name)
        file = self._file(name)
        more = length - file.length
        if more > self.free_bytes():
            raise StorageFullError(f"{name}: no room for {more} bytes more, {self.free_bytes()} are free")
        file.settle()
        file.cut(length)

    def sync(self, name: str) -> None:
        """As `Disk.sync`."""
        self._check_writable(name)
        self.syncs += 1
        self._file(name).settle()

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
        used = sum({id(file): file.length for file in self._files.values()}.values())
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
