"""Chunks on disk: only what agrees with the signed digests counts as there."""

import hashlib

import pytest

from device.blobs import blob_file, open_blob, read_blob, remove_blobs, write_chunk
from protocol.chunks import BlobPlan
from protocol.constants import CHUNK_BYTES
from protocol.errors import StorageError
from protocol.ids import digest_of
from simulator.disk import SimulatedDisk

PARTS = [bytes([number]) * CHUNK_BYTES for number in (1, 2, 3)] + [b"end"]
BLOB = digest_of(b"".join(PARTS))
PLAN = BlobPlan(BLOB, 3 * CHUNK_BYTES + 3, b"".join(hashlib.sha256(part).digest() for part in PARTS))


@pytest.fixture
def disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    assert open_blob(disk, PLAN).present == 0
    return disk


def test_a_new_blob_has_its_whole_length_reserved(disk: SimulatedDisk) -> None:
    assert disk.length(blob_file(BLOB)) == PLAN.length


def test_what_is_there_is_found_again_chunk_by_chunk(disk: SimulatedDisk) -> None:
    for index in (0, 3):
        write_chunk(disk, BLOB, index, PARTS[index])
    present = open_blob(disk, PLAN)
    assert [index in present for index in range(4)] == [True, False, False, True]
    for index in (1, 2):
        write_chunk(disk, BLOB, index, PARTS[index])
    assert open_blob(disk, PLAN).is_complete
    assert read_blob(disk, BLOB, PLAN.length) == b"".join(PARTS)


def test_a_chunk_that_the_disk_has_changed_is_fetched_again(disk: SimulatedDisk) -> None:
    for index, part in enumerate(PARTS):
        write_chunk(disk, BLOB, index, part)
    disk.write(blob_file(BLOB), CHUNK_BYTES + 17, b"\xff")
    present = open_blob(disk, PLAN)
    assert [index for index in range(4) if index not in present] == [1]


def test_a_file_of_another_length_is_begun_anew(disk: SimulatedDisk) -> None:
    write_chunk(disk, BLOB, 0, PARTS[0])
    disk.resize(blob_file(BLOB), PLAN.length + 1)
    assert open_blob(disk, PLAN).present == 0
    assert disk.length(blob_file(BLOB)) == PLAN.length


def test_a_blob_that_the_disk_has_cut_is_not_read_as_if_it_were_whole(disk: SimulatedDisk) -> None:
    disk.resize(blob_file(BLOB), 100)
    assert len(read_blob(disk, BLOB, 100)) == 100
    with pytest.raises(StorageError, match="100 bytes on disk, 101 expected"):
        read_blob(disk, BLOB, 101)


def test_all_blobs_but_those_that_are_wanted_are_removed(disk: SimulatedDisk) -> None:
    other = BlobPlan(digest_of(b"other"), 5, hashlib.sha256(b"other").digest())
    open_blob(disk, other)
    disk.create("slots/a/model", 1)
    remove_blobs(disk, frozenset({BLOB}))
    assert disk.names("blobs") == [blob_file(BLOB)]
    assert disk.length("slots/a/model") == 1
