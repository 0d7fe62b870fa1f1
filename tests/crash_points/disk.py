"""The simulated disk, taken apart into the system calls of the real one, and everything that a power cut between two of them may leave.

`CrashDisk` makes of each operation the calls that `device.adapters.disk.RealDisk` makes (a contract test compares them), in a file system
that promises as little as POSIX does:

- what was written to a file and not synced is kept or lost sector by sector, whatever the order of the writes;
- a change to a folder (a new name, a rename, a removal, a symbolic link) that came after the folder's last sync is kept or lost, each by
  itself: every subset, applied in order. An order of its own would lead to no other names, since what a name leads to in the end is
  what one of the changes made of it;
- a rename within a folder is one change. From one folder to another it is two, and the old name never goes before the new one is there:
  both may be there after a cut. No journalling file system is as bad as this.

Not modelled: sectors that are damaged although nobody wrote to them, and drives that lie about a sync.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Final, NamedTuple

from protocol.errors import StorageFullError
from simulator.disk import SECTOR_BYTES, Chance, Extent, Interned, SimulatedDisk, _File

TEMPORARY_SUFFIX: Final = ".tmp~"
"""As the real disk has it: files of this name are gone after a start."""

EXHAUSTIVE_MAX: Final = 1_024
"""A moment that can leave this many images or fewer is tried with all of them."""

CORNERS_MAX: Final = 64
"""Of any other moment, so many images have each write lost or kept as a whole; the others are drawn."""


class Frozen(NamedTuple):
    """A file at a moment: what is durable of it, and what was written since."""

    number: int
    length: int
    extents: tuple[Extent, ...]
    pending: tuple[
        tuple[int, bytes | None], ...
    ]  # offset and content; without content, the file was cut there


Entry = Frozen | str | None
"""What a name leads to: a file, the target of a symbolic link, or nothing."""


class Change(NamedTuple):
    """Names that one system call changed in a folder."""

    names: tuple[tuple[str, Entry], ...]
    needs: int  # place of the change without which this one cannot be, -1 for none


class Moment(NamedTuple):
    """A file system between two system calls."""

    names: dict[str, Entry]  # as the last syncs of the folders left them
    changes: tuple[Change, ...]  # since then


class Stored(NamedTuple):
    """A file as a power cut left it."""

    number: int  # two names with one number are names of one file
    length: int
    extents: tuple[Extent, ...]


Image = dict[str, Stored | str]
"""What a power cut left: names to files and to targets of symbolic links."""


class _Inode(_File):
    """A file that knows what it looked like at the last moment that was noted."""

    __slots__ = ("frozen",)

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.frozen: Frozen | None = None

    def write(self, offset: int, data: bytes) -> None:
        super().write(offset, data)
        self.frozen = None

    def settle(self) -> None:
        super().settle()
        self.frozen = None

    def truncate(self, length: int) -> None:
        self.write(0, b"")
        self.pending[-1] = (length, None)  # type: ignore[assignment]  # only `freeze` looks at what is pending here
        self.cut(length)

    def freeze(self) -> Frozen:
        if self.frozen is None:
            is_synced = self.durable is None
            extents, length = (
                (self.extents, self.length) if self.durable is None else (self.durable, self.durable_length)
            )
            self.frozen = Frozen(id(self), length, tuple(extents), () if is_synced else tuple(self.pending))
        return self.frozen


class _Pending:
    """A change to the names of a folder that no sync has made durable."""

    __slots__ = ("folder", "names", "needs")

    def __init__(
        self,
        folder: str,
        names: tuple[tuple[str, "_Inode | str | None"], ...],
        needs: "_Pending | None" = None,
    ) -> None:
        self.folder = folder
        self.names = names
        self.needs = needs


class CrashDisk(SimulatedDisk):
    """Files in memory, by the system calls of the real disk.

    Args:
        image: What is there.
        capacity_bytes: Room for all files.
    """

    def __init__(self, image: Image | None = None, capacity_bytes: int = 1 << 40) -> None:
        super().__init__(capacity_bytes, _UNSHARED)
        self.on_call: Callable[[str], None] | None = None  # told after each call that changed something
        self._durable: dict[str, _Inode | str] = {}
        self._changes: list[_Pending] = []
        if image:
            self._load(image)

    def _load(self, image: Image) -> None:
        inodes: dict[int, _Inode] = {}
        for name, entry in image.items():
            if isinstance(entry, str):
                self.links[name] = self._durable[name] = entry
                continue
            inode = inodes.get(entry.number)
            if inode is None:
                inode = inodes[entry.number] = _Inode(entry.length)
                inode.extents = list(entry.extents)
            self._files[name] = self._durable[name] = inode

    def moment(self) -> Moment:
        """Everything that decides what a power cut now may leave."""
        return Moment(
            {name: _entry(each) for name, each in self._durable.items()},
            tuple(
                Change(
                    tuple((name, _entry(each)) for name, each in change.names),
                    -1
                    if change.needs is None or change.needs not in self._changes
                    else self._changes.index(change.needs),
                )
                for change in self._changes
            ),
        )

    def crash(self, rng: Chance) -> None:
        """As `SimulatedDisk.crash`, by a choice among everything that may be left."""
        choices = Choices(self.moment(), rng.randrange(1 << 32))
        image = choices.image(rng.randrange(choices.count))
        self._files.clear()
        self.links.clear()
        self._durable.clear()
        self._changes.clear()
        self._load(image)
        self.prepare()

    def prepare(self) -> None:
        """As `RealDisk.prepare`."""
        for name in [name for name in (*self._files, *self.links) if name.endswith(TEMPORARY_SUFFIX)]:
            self._unlink(name)

    # --- the operations of the port, call by call --------------------------------------------------------------

    def create(self, name: str, length: int) -> None:
        """As `Disk.create`."""
        self._check_writable(name)
        temporary = name + TEMPORARY_SUFFIX
        self._unlink(temporary)
        inode = _Inode(0)
        self._changed("create", temporary, (temporary, inode))
        try:
            if length > self.free_bytes():
                raise StorageFullError(f"{name}: no room for {length} bytes, {self.free_bytes()} are free")
            if length:
                self._allocate(temporary, inode, length)
            self._sync_file(temporary, inode)
            self._rename(temporary, name)
            self._sync_folder(name)
        finally:
            self._unlink(temporary)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As `Disk.write`."""
        super().write(name, offset, data)
        self._tell("write", name)

    def resize(self, name: str, length: int) -> None:
        """As `Disk.resize`."""
        self._check_writable(name)
        inode = self._inode(name)
        more = length - inode.length
        if more > self.free_bytes():
            raise StorageFullError(f"{name}: no room for {more} bytes more, {self.free_bytes()} are free")
        if more > 0:
            self._allocate(name, inode, length)
        inode.truncate(length)
        self._tell("truncate", name)
        self._sync_file(name, inode)

    def sync(self, name: str) -> None:
        """As `Disk.sync`."""
        super().sync(name)
        self._tell("sync", name)

    def replace(self, source: str, target: str) -> None:
        """As `Disk.replace`."""
        self._check_writable(target)
        self._inode(source)
        self._rename(source, target)
        self._sync_folder(target)
        self._sync_folder(source)

    def link(self, source: str, target: str) -> None:
        """As `Disk.link`."""
        self._check_writable(target)
        inode = self._inode(source)
        temporary = target + TEMPORARY_SUFFIX
        self._unlink(temporary)
        self._changed("link", temporary, (temporary, inode))
        self._rename(temporary, target)
        self._sync_folder(target)
        self._unlink(temporary)  # is there still if both were names of one file

    def remove(self, name: str) -> None:
        """As `Disk.remove`."""
        self._check_writable(name)
        self._unlink(name)

    def names(self, folder: str) -> list[str]:
        """As `Disk.names`."""
        return [name for name in super().names(folder) if not name.endswith(TEMPORARY_SUFFIX)]

    def everything(self) -> list[str]:
        """Names of all files."""
        return sorted(self._files)

    def point(self, name: str, target: str) -> None:
        """As `Disk.point`."""
        self._check_writable(name)
        temporary = name + TEMPORARY_SUFFIX
        self._unlink(temporary)
        self._changed("symlink", temporary, (temporary, target))
        self._rename(temporary, name)
        self._sync_folder(name)

    # --- the calls --------------------------------------------------------------------------------------------

    def _allocate(self, name: str, inode: _Inode, length: int) -> None:
        inode.write(length, b"")
        self._tell("allocate", name)

    def _sync_file(self, name: str, inode: _Inode) -> None:
        inode.settle()
        self._tell("sync", name)

    def _unlink(self, name: str) -> None:
        if name in self._files or name in self.links:
            self._changed("unlink", name, (name, None))

    def _rename(self, source: str, target: str) -> None:
        entry: _Inode | str | None = self.links.get(source) or self._inode(source)
        if isinstance(entry, _Inode) and self._files.get(target) is entry:
            self._tell("rename", target)  # as POSIX has it: both are names of one file, and stay
            return
        if _folder(source) == _folder(target):
            self._changed("rename", target, (source, None), (target, entry))
            return
        added = self._change((target, entry))
        self._change((source, None), needs=added)
        self._tell("rename", target)

    def _sync_folder(self, name: str) -> None:
        """Make everything durable that happened to the names beside this one."""
        folder = _folder(name)
        self._changes = [each for each in self._changes if not self._is_settled(each, folder)]
        self._tell("sync folder", folder or ".")

    def _is_settled(self, change: _Pending, folder: str) -> bool:
        if change.folder != folder:
            return False
        self._settle_names(change)
        return True

    def _settle_names(self, change: _Pending) -> None:
        if change.needs is not None and change.needs in self._changes:
            self._settle_names(change.needs)
        for name, entry in change.names:
            _set(self._durable, name, entry)

    def _changed(self, call: str, at: str, *names: tuple[str, "_Inode | str | None"]) -> None:
        self._change(*names)
        self._tell(call, at)

    def _change(self, *names: tuple[str, "_Inode | str | None"], needs: _Pending | None = None) -> _Pending:
        for name, entry in names:
            self._files.pop(name, None)
            self.links.pop(name, None)
            if isinstance(entry, str):
                self.links[name] = entry
            elif entry is not None:
                self._files[name] = entry
        change = _Pending(_folder(names[0][0]), names, needs)
        self._changes.append(change)
        return change

    def _tell(self, call: str, name: str) -> None:
        if self.on_call is not None:
            self.on_call(f"{call} {name}")

    def _inode(self, name: str) -> _Inode:
        file = self._file(name)
        assert isinstance(file, _Inode)
        return file


class _Unshared(Interned):
    """Content of one disk after the other: looking it up would cost more than it saves."""

    def share(self, data: bytes) -> bytes:
        return data


_UNSHARED: Final = _Unshared()


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _entry(each: "_Inode | str | None") -> Entry:
    return each.freeze() if isinstance(each, _Inode) else each


def _set(names: dict[str, "_Inode | str"], name: str, entry: "_Inode | str | None") -> None:
    names.pop(name, None)
    if entry is not None:
        names[name] = entry


# --- what a power cut may leave ---------------------------------------------------------------------------------


class _Write(NamedTuple):
    """A write that a power cut may lose: which of its sectors were kept is a number of so many bits."""

    file: int
    place: int  # among the pending writes of the file
    sectors: int


class Choices:
    """Everything that a power cut at a moment may leave, each image with a number.

    Args:
        moment: The moment.
        seed: Decides the images that are drawn where there are too many to be counted.

    Attributes:
        count: How many numbers there are.
        is_exhaustive: Whether they are everything that may be left.
    """

    def __init__(self, moment: Moment, seed: object) -> None:
        self._moment = moment
        self._seed = seed
        self._writes = _writes(moment)
        self._bits = [1] * len(moment.changes) + [write.sectors for write in self._writes]
        total = prod(1 << bits for bits in self._bits) if sum(self._bits) < 64 else 1 << 64
        self.is_exhaustive = total <= EXHAUSTIVE_MAX
        self.count = total if self.is_exhaustive else 1 << 32
        self._corners = min(CORNERS_MAX, 1 << len(self._bits))

    def image(self, number: int) -> Image:
        """The image of a number below `count`."""
        return self._applied(self._masks(number))

    def _masks(self, number: int) -> list[int]:
        """What is kept: a bit for each change of names, one for each sector of each write."""
        if self.is_exhaustive:
            masks = []
            for bits in self._bits:
                masks.append(number & ((1 << bits) - 1))
                number >>= bits
            return masks
        if number < self._corners:
            if len(self._bits) <= CORNERS_MAX.bit_length() - 1:
                return [((1 << bits) - 1) * (number >> place & 1) for place, bits in enumerate(self._bits)]
            # Too many for every corner: nothing but the first, and everything but the first.
            half = number % (CORNERS_MAX // 2)
            kept = number < CORNERS_MAX // 2
            return [((1 << bits) - 1) * ((place < half) is kept) for place, bits in enumerate(self._bits)]
        rng = random.Random(f"{self._seed}/{number}")
        return [_drawn(bits, rng) for bits in self._bits]

    def _applied(self, masks: list[int]) -> Image:
        names = dict(self._moment.names)
        changes = self._moment.changes
        kept: list[bool] = []
        for change, mask in zip(changes, masks, strict=False):
            kept.append(bool(mask) and (change.needs < 0 or kept[change.needs]))
            if kept[-1]:
                names.update(change.names)
        sectors: dict[int, list[int]] = {}
        for write, mask in zip(self._writes, masks[len(changes) :], strict=True):
            sectors.setdefault(write.file, []).append(mask)
        stored: dict[int, Stored] = {}
        image: Image = {}
        for name in sorted(names):
            entry = names[name]
            if isinstance(entry, str):
                image[name] = entry
            elif entry is not None:
                if entry.number not in stored:
                    stored[entry.number] = _stored(entry, sectors.get(entry.number))
                image[name] = stored[entry.number]
        return image


def identity(image: Image) -> int:
    """A number that is the same for images of the same content, within one process and those that were forked from it."""
    places: dict[int, int] = {}
    parts: list[object] = []
    for name, entry in image.items():
        if isinstance(entry, str):
            parts.append((name, entry))
        elif name.endswith(TEMPORARY_SUFFIX):
            parts.append(name)  # removed at the start, whatever it holds
        else:
            place = places.setdefault(entry.number, len(places))
            parts.append((name, place, entry.length, entry.extents))
    return hash(tuple(parts))


def _writes(moment: Moment) -> list[_Write]:
    """What is pending of every file that a start may find; what a temporary file holds matters to nobody."""
    files: dict[int, Frozen] = {}
    entries = [*moment.names.items(), *(each for change in moment.changes for each in change.names)]
    for name, entry in entries:
        if isinstance(entry, Frozen) and not name.endswith(TEMPORARY_SUFFIX):
            files.setdefault(entry.number, entry)
    return [
        _Write(file.number, place, _sectors(offset, data))
        for file in files.values()
        for place, (offset, data) in enumerate(file.pending)
    ]


def _sectors(offset: int, data: bytes | None) -> int:
    """Sectors that a write touches; a change of the length is kept or lost as a whole."""
    return _sector_count(offset, len(data)) if data else 1


def _sector_count(offset: int, length: int) -> int:
    return (offset + length - 1) // SECTOR_BYTES - offset // SECTOR_BYTES + 1


def _drawn(bits: int, rng: random.Random) -> int:
    """Which sectors are kept: all, none, the first, the last, all but one, or any."""
    everything = (1 << bits) - 1
    way = rng.randrange(6)
    if way == 0 or bits == 1:
        return everything * rng.randrange(2)
    if way == 1:
        return everything
    if way == 2:
        return (1 << rng.randrange(bits)) - 1
    if way == 3:
        return everything ^ ((1 << rng.randrange(bits)) - 1)
    if way == 4:
        return everything ^ (1 << rng.randrange(bits))
    return rng.getrandbits(bits)


def _stored(file: Frozen, masks: list[int] | None) -> Stored:
    if masks is None:
        return Stored(file.number, file.length, file.extents)
    result = _File(file.length)
    result.extents = list(file.extents)
    for (offset, data), mask in zip(file.pending, masks, strict=True):
        if data is None:
            if mask:
                result.cut(offset)
        elif not data:
            if mask:
                result.length = max(result.length, offset)
        else:
            for start, end in _runs(mask, offset, len(data)):
                result._place(offset + start, data if end - start == len(data) else data[start:end])
    return Stored(file.number, result.length, tuple(result.extents))


def _runs(mask: int, offset: int, length: int) -> list[tuple[int, int]]:
    """Stretches of a write that are kept, from its beginning: neighbouring sectors together."""
    if not mask:
        return []
    first = offset // SECTOR_BYTES * SECTOR_BYTES - offset
    count = _sector_count(offset, length)
    bits = f"{mask:0{count}b}"[::-1]
    edges = [0, *(place for place, (one, other) in enumerate(pairwise(bits), 1) if one != other), count]
    return [
        (max(0, first + start * SECTOR_BYTES), min(length, first + end * SECTOR_BYTES))
        for start, end in pairwise(edges)
        if bits[start] == "1"
    ]
