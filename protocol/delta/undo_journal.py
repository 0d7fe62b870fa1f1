"""The journal of an application in place: two records that are written in turn, and a ring of bytes that were overwritten.

A record counts if it is intact and the bytes that it saved are. The ring holds what windows may still look back at, and what
two steps overwrite, so writing for one step never touches what the record before needs.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

from protocol.delta.format import SEGMENT_BYTES_MAX, Header
from protocol.delta.inverse import InverseState
from protocol.errors import DamagedJournalError, PatchError, StorageError
from protocol.tensors.regions import ReadAt

STEP_BYTES: Final = 4 << 20
"""Result between two steps, about: memory for what was decoded and not yet written, against three syncs a step."""

ENTRY_BYTES: Final = 512 << 10
"""Room for one record: the state of a reader and what is known of the inverse."""

_COPY_BYTES = 1 << 20
_MAGIC = b"WBJ1"
# Magic, phase, sequence, identity, start, end, checksum of the saved bytes, stop, lengths of both states.
_ENTRY = struct.Struct("<4sB3xQ16sQQIQII")
_DIGEST_BYTES = 16


class Medium(Protocol):
    """A file with the durability rules of a POSIX file system: what `write_at` wrote is kept, lost or torn until `sync` returned."""

    @property
    def length(self) -> int:
        """Length in bytes."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the bytes `[offset, offset + length)`; fewer only at the end."""
        ...

    def write_at(self, offset: int, data: bytes) -> None:
        """Write; a file that ends before is made longer."""
        ...

    def sync(self) -> None:
        """Make everything that was written durable."""
        ...

    def resize(self, length: int) -> None:
        """Cut the file, or make it longer with zeros whose space is reserved; durable on return."""
        ...


class Phase(IntEnum):
    """How far an application in place is. The numbers are stored."""

    NEW = 0  # nothing was touched
    APPLYING = 1
    APPLIED = 2  # the target is the new file, the inverse is whole
    UNDOING = 3
    UNDONE = 4  # the target is the old file


@dataclass(frozen=True, slots=True)
class Entry:
    """One record: the state before a step, and which bytes of the target were saved for it.

    Attributes:
        phase: What is being done.
        start: Where the step starts in the target; everything before is done and durable.
        end: Where it ends; `start` if nothing was overwritten since.
        saved_crc: Of the bytes between, as they are in the ring.
        stop: Where the work of the phase ends.
        reader: State of the reader at `start`.
        inverse: State of the inverse there.
    """

    phase: Phase
    start: int
    end: int
    saved_crc: int
    stop: int
    reader: bytes
    inverse: InverseState


def journal_bytes(header: Header, step_bytes: int = STEP_BYTES) -> int:
    """Return how long the journal of a delta is made: for the reach of both directions and two steps, but never for more than the file.

    Args:
        header: Of the delta.
        step_bytes: Length of a step, which then follows from the length of the journal.
    """
    longest = max(header.base_length, header.result_length, 1)
    return 2 * ENTRY_BYTES + min(_reach_bytes(header) + 2 * (step_bytes + header.segment_bytes_max), longest)


def journal_bytes_max(reach_bytes: int, longest_bytes: int) -> int:
    """Return the most that `journal_bytes` says of a delta whose header is not at hand.

    Args:
        reach_bytes: How far it reaches, behind or ahead.
        longest_bytes: Length of the longer one of base and result.
    """
    return 2 * ENTRY_BYTES + min(reach_bytes + 2 * (STEP_BYTES + SEGMENT_BYTES_MAX), max(longest_bytes, 1))


def _reach_bytes(header: Header) -> int:
    assert header.reach is not None
    return max(header.reach.behind_bytes, header.reach.ahead_bytes)


def read_exactly(source: ReadAt, offset: int, length: int) -> bytes:
    """Return bytes that must be there.

    Raises:
        StorageError: They are not.
    """
    data = source.read_at(offset, length)
    if len(data) != length:
        raise StorageError(f"a file ends at byte {offset + len(data)}, before its end")
    return data


class UndoJournal:
    """Reads and writes one journal.

    Args:
        medium: Its file, zeros at first.
        header: Of the delta.

    Attributes:
        step_bytes: How long a step may be, apart from its last segment, so that the ring holds what it must.

    Raises:
        StorageError: The journal is too short.
    """

    def __init__(self, medium: Medium, header: Header) -> None:
        self._medium = medium
        self._identity = hashlib.sha256(header.pack()).digest()[:_DIGEST_BYTES]
        self._ring_bytes = medium.length - 2 * ENTRY_BYTES
        self._sequence = 0
        self.step_bytes = STEP_BYTES
        if self._ring_bytes < max(header.base_length, header.result_length):
            room = (self._ring_bytes - _reach_bytes(header)) // 2 - header.segment_bytes_max
            self.step_bytes = min(STEP_BYTES, room)
        if self._ring_bytes < 1 or self.step_bytes < 1:
            raise StorageError("the journal of an application in place is too short")

    def load(self) -> Entry | None:
        """Return the newest record that counts; None if the work never began.

        Raises:
            PatchError: The journal is about another delta.
            DamagedJournalError: There were records, and none is intact.
        """
        blank = 0
        found: list[tuple[int, Entry]] = []
        for slot in range(2):
            data = self._medium.read_at(slot * ENTRY_BYTES, ENTRY_BYTES)
            blank += not any(data[: _ENTRY.size])
            read = self._unpack(data)
            if read is not None:
                found.append(read)
        for sequence, entry in sorted(found, key=lambda read: -read[0]):
            if self._checksum(entry.start, entry.end) == entry.saved_crc:
                self._sequence = sequence
                return entry
        if found or not blank:
            raise DamagedJournalError(
                "the journal of an application in place is damaged", hint="install the file anew"
            )
        return None

    def store(self, entry: Entry) -> None:
        """Make a record durable, and with it everything that was saved before."""
        self._sequence += 1
        inverse = entry.inverse.pack()
        body = (
            _ENTRY.pack(
                _MAGIC,
                entry.phase,
                self._sequence,
                self._identity,
                entry.start,
                entry.end,
                entry.saved_crc,
                entry.stop,
                len(entry.reader),
                len(inverse),
            )
            + entry.reader
            + inverse
        )
        body += hashlib.sha256(body).digest()[:_DIGEST_BYTES]
        assert len(body) <= ENTRY_BYTES
        self._medium.write_at(self._sequence % 2 * ENTRY_BYTES, body)
        self._medium.sync()

    def save(self, target: ReadAt, start: int, end: int) -> int:
        """Copy bytes of the target into the ring; return their checksum. Durable with the next record."""
        crc = 0
        for offset in range(start, end, _COPY_BYTES):
            data = read_exactly(target, offset, min(_COPY_BYTES, end - offset))
            for at, first, length in self._parts(offset, len(data)):
                self._medium.write_at(at, data[first : first + length])
            crc = zlib.crc32(data, crc)
        return crc

    def saved(self, offset: int, length: int) -> bytes:
        """Return bytes of the target as they were before they were overwritten."""
        return b"".join(read_exactly(self._medium, at, count) for at, _, count in self._parts(offset, length))

    def put_back(self, target: Medium, start: int, end: int) -> None:
        """Write saved bytes to where they came from, durably."""
        for offset in range(start, end, _COPY_BYTES):
            target.write_at(offset, self.saved(offset, min(_COPY_BYTES, end - offset)))
        target.sync()

    def _checksum(self, start: int, end: int) -> int:
        crc = 0
        for offset in range(start, end, _COPY_BYTES):
            crc = zlib.crc32(self.saved(offset, min(_COPY_BYTES, end - offset)), crc)
        return crc

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield where in the journal a stretch of the target lies: offset there, offset in the stretch, length."""
        done = 0
        while done < length:
            inside = (offset + done) % self._ring_bytes
            count = min(length - done, self._ring_bytes - inside)
            yield 2 * ENTRY_BYTES + inside, done, count
            done += count

    def _unpack(self, data: bytes) -> tuple[int, Entry] | None:
        if len(data) < _ENTRY.size or data[:4] != _MAGIC:
            return None
        _, phase, sequence, identity, start, end, crc, stop, reader_length, inverse_length = (
            _ENTRY.unpack_from(data)
        )
        length = _ENTRY.size + reader_length + inverse_length
        digest = hashlib.sha256(data[:length]).digest()[:_DIGEST_BYTES]
        if length + _DIGEST_BYTES > len(data) or data[length : length + _DIGEST_BYTES] != digest:
            return None
        if identity != self._identity:
            raise PatchError("the journal belongs to another delta", hint="finish or undo that one first")
        reader = data[_ENTRY.size : _ENTRY.size + reader_length]
        inverse = InverseState.unpack(data[_ENTRY.size + reader_length : length])
        return sequence, Entry(Phase(phase), start, end, crc, stop, reader, inverse)
