"""The journal of an application in place, record by record: what counts, what does not, and what is put back."""

import hashlib
from dataclasses import replace

import pytest

from protocol.delta.format import Header, Profile, Reach
from protocol.delta.inverse import InverseState
from protocol.delta.moves import Move
from protocol.delta.undo_journal import (
    ENTRY_BYTES,
    STEP_BYTES,
    Entry,
    Phase,
    UndoJournal,
    journal_bytes,
    journal_bytes_max,
    read_exactly,
)
from protocol.errors import DamagedJournalError, PatchError, StorageError
from protocol.tensors import BytesSource

LENGTH = 3_000_000
HEADER = Header(Profile.FAST, LENGTH, b"b" * 32, LENGTH - 5, b"r" * 32, 1 << 30, 1000, Reach(700, 300))
RING = 2 * (5000 + 1000) + 700
_HEAD_BYTES = 68  # of a record, without the states of reader and inverse
TARGET = bytes(range(251)) * (LENGTH // 251 + 1)


class Memory:
    """A medium that remembers when it was synced.

    Args:
        data: What it holds.
    """

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.syncs = 0

    @property
    def length(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write_at(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data

    def sync(self) -> None:
        self.syncs += 1

    def resize(self, length: int) -> None:
        raise AssertionError(f"nobody makes it {length} bytes long")


def medium(ring_bytes: int = RING) -> Memory:
    return Memory(bytes(2 * ENTRY_BYTES + ring_bytes))


def entry(journal: UndoJournal, start: int = 100, end: int = 100, reader: bytes = b"reader") -> Entry:
    """A record of a step for which the bytes between were saved."""
    crc = journal.save(BytesSource(TARGET), start, end)
    inverse = InverseState(7, start, (Move(1, 2, 3),))
    return Entry(Phase.APPLYING, start, end, crc, LENGTH, reader, inverse)


def test_a_journal_that_was_never_written_is_none() -> None:
    assert UndoJournal(medium(), HEADER).load() is None


def test_the_newest_record_is_read_as_it_was_stored() -> None:
    file = medium()
    journal = UndoJournal(file, HEADER)
    for number in range(1, 6):
        stored = entry(journal, number * 900, number * 1000, b"reader %d" % number)
        journal.store(stored)
        assert file.syncs == number
        again = UndoJournal(file, HEADER)
        assert again.load() == stored
    later = replace(stored, phase=Phase.UNDONE)
    again.store(later)
    assert UndoJournal(file, HEADER).load() == later


def stored_twice() -> tuple[Memory, Entry, Entry]:
    """The second record stands in the first slot, since the first one took the second."""
    file = medium()
    journal = UndoJournal(file, HEADER)
    first, second = entry(journal, 0, 2000), entry(journal, 2000, 4000)
    journal.store(first)
    journal.store(second)
    return file, first, second


def test_a_record_that_was_torn_leaves_the_one_before() -> None:
    size = _HEAD_BYTES + len(b"reader") + 20 + 24
    for at in (0, 4, 20, _HEAD_BYTES - 1, _HEAD_BYTES, size - 1, size, size + 15):
        file, first, second = stored_twice()
        assert UndoJournal(file, HEADER).load() == second
        file.data[at] ^= 1
        assert UndoJournal(file, HEADER).load() == first, at


def test_a_record_whose_saved_bytes_are_gone_does_not_count() -> None:
    for at, expected in [(2000, 0), (3999, 0), (1999, 1), (4000, 1)]:
        file, first, second = stored_twice()
        file.data[2 * ENTRY_BYTES + at] ^= 1
        assert UndoJournal(file, HEADER).load() == (first, second)[expected]


def test_work_goes_on_in_the_slot_that_is_not_needed() -> None:
    file, first, _ = stored_twice()
    file.data[0] ^= 1
    journal = UndoJournal(file, HEADER)
    assert journal.load() == first
    third = entry(journal, 2000, 2500)
    journal.store(third)
    assert UndoJournal(file, HEADER).load() == third
    file.data[0] ^= 1
    assert UndoJournal(file, HEADER).load() == first


def test_a_journal_without_an_intact_record_is_damaged_and_no_beginning() -> None:
    file, _, _ = stored_twice()
    for slot in range(2):
        file.data[slot * ENTRY_BYTES + 30] ^= 1
    with pytest.raises(DamagedJournalError, match="is damaged"):
        UndoJournal(file, HEADER).load()
    file, _, _ = stored_twice()
    for at in (500, 2500):
        file.data[2 * ENTRY_BYTES + at] ^= 1
    with pytest.raises(DamagedJournalError, match="is damaged"):
        UndoJournal(file, HEADER).load()


def test_a_first_record_that_was_torn_is_a_beginning() -> None:
    file = medium()
    journal = UndoJournal(file, HEADER)
    journal.store(entry(journal))
    file.data[ENTRY_BYTES + 30] ^= 1
    assert UndoJournal(file, HEADER).load() is None


def test_the_only_record_without_its_saved_bytes_is_damage_and_no_beginning() -> None:
    file = medium()
    journal = UndoJournal(file, HEADER)
    journal.store(entry(journal, 0, 2000))
    file.data[2 * ENTRY_BYTES] ^= 1
    with pytest.raises(DamagedJournalError, match="is damaged"):
        UndoJournal(file, HEADER).load()


def test_a_record_whose_head_never_arrived_is_none() -> None:
    file = medium()
    for slot in range(2):
        file.data[slot * ENTRY_BYTES + 100] = 1
    assert UndoJournal(file, HEADER).load() is None


def test_bytes_of_a_model_are_never_taken_for_a_record() -> None:
    """Whoever made the old file may have put a record into it, for just this delta."""
    file = medium(LENGTH)
    forger = UndoJournal(file, HEADER)
    for _ in range(8):
        forger.store(replace(entry(forger), phase=Phase.APPLIED))
    forged = bytes(file.data[:ENTRY_BYTES])
    file = medium(LENGTH)
    journal = UndoJournal(file, HEADER)
    journal.save(BytesSource(forged), 0, len(forged))
    journal.store(entry(journal))
    found = UndoJournal(file, HEADER).load()
    assert found is not None
    assert found.phase is Phase.APPLYING


def test_a_record_of_another_version_does_not_count() -> None:
    file, first, second = stored_twice()
    length = _HEAD_BYTES + len(second.reader) + 20 + 24
    file.data[:4] = b"WBJ2"
    file.data[length : length + 16] = hashlib.sha256(file.data[:length]).digest()[:16]
    assert UndoJournal(file, HEADER).load() == first


def test_a_journal_of_another_delta_is_refused() -> None:
    file, _, _ = stored_twice()
    with pytest.raises(PatchError, match="belongs to another delta"):
        UndoJournal(file, replace(HEADER, result_sha256=b"o" * 32)).load()


def test_a_record_may_fill_its_slot() -> None:
    file = medium()
    journal = UndoJournal(file, HEADER)
    empty = replace(entry(journal), reader=b"")
    journal.store(empty)
    used = _HEAD_BYTES + 20 + 24 + 16
    longest = replace(empty, reader=b"r" * (ENTRY_BYTES - used))
    journal.store(longest)
    assert UndoJournal(file, HEADER).load() == longest


def test_saved_bytes_go_round_the_ring_and_back_to_their_place() -> None:
    file = medium()
    journal = UndoJournal(file, HEADER)
    for start, end in [(0, 10), (RING - 5, RING + 5), (5 * RING - 1, 6 * RING - 1), (2_000_000, 2_000_000)]:
        journal.save(BytesSource(TARGET), start, end)
        assert journal.saved(start, end - start) == TARGET[start:end]
        overwritten = Memory(b"\xee" * LENGTH)
        journal.put_back(overwritten, start, end)
        assert overwritten.data == b"\xee" * start + TARGET[start:end] + b"\xee" * (LENGTH - end)
        assert overwritten.syncs == 1
    assert file.data[: 2 * ENTRY_BYTES] == bytes(2 * ENTRY_BYTES)


def test_stretches_of_more_than_a_mebibyte_are_saved_and_put_back_whole() -> None:
    journal = UndoJournal(medium(LENGTH), HEADER)
    stored = entry(journal, 5, LENGTH - 5)
    journal.store(stored)
    assert journal.load() == stored
    target = Memory(bytes(LENGTH))
    journal.put_back(target, 5, LENGTH - 5)
    assert (
        hashlib.sha256(target.data).digest()
        == hashlib.sha256(bytes(5) + TARGET[5 : LENGTH - 5] + bytes(5)).digest()
    )


def test_a_file_that_ends_early_is_no_target() -> None:
    assert read_exactly(BytesSource(b"abc"), 1, 2) == b"bc"
    with pytest.raises(StorageError, match="ends at byte 3, before its end"):
        read_exactly(BytesSource(b"abc"), 1, 3)


@pytest.mark.parametrize(
    ("ring_bytes", "step_bytes"),
    [
        (LENGTH, STEP_BYTES),
        (LENGTH - 1, (LENGTH - 1 - 700) // 2 - 1000),
        (RING, 5000),
        (RING + 1, 5000),
        (RING - 1, 4999),
        (700 + 2 * 1001, 1),
        (700 + 2 * (STEP_BYTES + 1000) - 100_000_000, None),
        (700 + 2 * 1001 - 1, None),
        (0, None),
    ],
)
def test_a_step_is_as_long_as_the_ring_lets_it_be(ring_bytes: int, step_bytes: int | None) -> None:
    if step_bytes is None:
        with pytest.raises(StorageError, match="too short"):
            UndoJournal(medium(max(ring_bytes, 0)), HEADER)
    else:
        assert UndoJournal(medium(ring_bytes), HEADER).step_bytes == step_bytes


def test_the_journal_of_two_empty_files_has_a_byte_of_a_ring() -> None:
    header = replace(HEADER, base_length=0, result_length=0)
    assert UndoJournal(medium(1), header).step_bytes == STEP_BYTES
    with pytest.raises(StorageError, match="too short"):
        UndoJournal(medium(0), header)


def test_a_journal_is_long_enough_for_its_delta_and_no_longer_than_the_file_needs() -> None:
    entries = 2 * ENTRY_BYTES
    assert journal_bytes(HEADER, 5000) == entries + 700 + 2 * (5000 + 1000)
    assert journal_bytes(replace(HEADER, reach=Reach(3, 900)), 5000) == entries + 900 + 2 * (5000 + 1000)
    assert journal_bytes(HEADER) == entries + LENGTH
    assert journal_bytes(replace(HEADER, base_length=0, result_length=0)) == entries + 1
    assert journal_bytes_max(700, 1 << 40) == entries + 700 + 2 * (STEP_BYTES + (4 << 20))
    assert journal_bytes_max(700, 5) == entries + 5
    assert journal_bytes_max(700, 0) == entries + 1
