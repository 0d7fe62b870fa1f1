"""Slots A and B: where a version of the model lives. Position and health are two questions with two answers.

The active slot is never written to. A new version is built in the other one, and becomes active at one commit
point, the durable record of `journal.py`; this module only knows names and files. Where the disk has no room for both, files move from
the one to the other and are rewritten there, see `rewriting.py`.
"""

import hashlib
from collections.abc import Iterator
from enum import Enum
from typing import Final

from device.ports import Disk

READ_BYTES: Final = 1 << 20
"""One read when a file is measured; bounds the memory that measuring takes."""


class SlotName(Enum):
    """The two slots. The values are folder names."""

    A = "a"
    B = "b"

    @property
    def other(self) -> "SlotName":
        """The slot that is not this one."""
        return SlotName.B if self is SlotName.A else SlotName.A


class SlotHealth(Enum):
    """What is known about the content of a slot, apart from which slot is active."""

    EMPTY = "empty"
    INSTALLING = "installing"  # half a version
    VERIFIED = "verified"  # every byte is as signed; never ran
    ON_TRIAL = "on_trial"
    GOOD = "good"  # passed its trial, or came from the installer
    BAD = "bad"  # failed its trial


def slot_file(slot: SlotName, name: str) -> str:
    """Name of a release file in a slot."""
    return f"slots/{slot.value}/{name}"


def slot_folder(slot: SlotName) -> str:
    """Folder of a slot."""
    return f"slots/{slot.value}"


def slot_files(disk: Disk, slot: SlotName) -> list[str]:
    """Names of the release files in a slot, sorted."""
    folder = slot_folder(slot) + "/"
    return [name.removeprefix(folder) for name in disk.names(slot_folder(slot))]


def slot_bytes(disk: Disk, slot: SlotName) -> int:
    """Space that the files of a slot take."""
    return sum(disk.length(slot_file(slot, name)) or 0 for name in slot_files(disk, slot))


def measure_slot(disk: Disk, slot: SlotName) -> dict[str, str]:
    """SHA-256 of every file in a slot, in hexadecimal, read from the medium."""
    return {name: measure_file(disk, slot_file(slot, name)) for name in slot_files(disk, slot)}


def measure_file(disk: Disk, name: str) -> str:
    """SHA-256 of a file in hexadecimal, read from the medium where that can be had."""
    disk.forget_cached(name)
    digest = hashlib.sha256()
    for piece in _pieces(disk, name):
        digest.update(piece)
    return digest.hexdigest()


def empty_slot(disk: Disk, slot: SlotName) -> None:
    """Remove the files of a slot."""
    for name in slot_files(disk, slot):
        disk.remove(slot_file(slot, name))


def _pieces(disk: Disk, name: str) -> Iterator[bytes]:
    offset = 0
    while piece := disk.read(name, offset, READ_BYTES):
        yield piece
        offset += len(piece)
