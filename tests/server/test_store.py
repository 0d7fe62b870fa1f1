"""Blobs, keys and locks in the folder of a server. The store is for `test_store_contract.py`."""

import os
import stat
from pathlib import Path

import pytest

from protocol.chunks import child_plan, root_plan
from protocol.constants import CHUNK_BYTES
from protocol.errors import RequestError, StorageError
from protocol.ids import Digest, digest_of
from server.adapters.blobs import PARTIAL_AGE_MS, FileSource, FolderBlobs, write_file
from server.adapters.keys import KeyFolder
from server.adapters.lock import FolderLock, is_locked
from server.releases.publisher import ROLES
from tests.server.samples import stored

# Blobs


@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 5])
def test_every_chunk_of_a_stored_blob_passes_its_signed_index(tmp_path: Path, length: int) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    data = bytes(range(256)) * (length // 256 + 1)
    (tmp_path / "file").write_bytes(data[:length])
    blob = blobs.put_file(tmp_path / "file")
    assert blob == blobs.put(data[:length]) == blobs.describe(blob.digest) == stored(data[:length])
    plan = root_plan(blob.digest, blob.length, blob.tree)
    for level in range(blob.tree.levels, -1, -1):
        payloads = [blobs.read_chunk(plan.name, index) for index in range(plan.count)]
        assert all(plan.accepts(index, payload) for index, payload in enumerate(payloads))
        if level:
            plan = child_plan(blob.digest, blob.length, blob.tree, level, b"".join(payloads))
    assert b"".join(payloads) == data[:length]


def test_a_chunk_or_blob_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    blob = blobs.put(b"x")
    with pytest.raises(StorageError):
        blobs.read_chunk(blob.digest, 1)
    with pytest.raises(StorageError):
        blobs.read_chunk(digest_of(b"y"), 0)
    with pytest.raises(StorageError):
        blobs.describe(digest_of(b"y"))


def test_a_blob_whose_bytes_changed_on_disk_is_not_published(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    blob = blobs.put(b"x" * 100)
    blobs.path(blob.digest).write_bytes(b"x" * 99 + b"y")
    with pytest.raises(StorageError, match="damaged"):
        blobs.describe(blob.digest)


def test_a_removed_blob_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    gone, stays = blobs.put(b"gone"), blobs.put(b"stays")
    blobs.remove(gone.digest)
    blobs.remove(gone.digest)
    assert not blobs.path(gone.digest).exists()
    assert blobs.read_chunk(stays.digest, 0) == b"stays"


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    with pytest.raises(RequestError):
        blobs.put_file(tmp_path / "missing")
    with pytest.raises(RequestError):
        blobs.put_file(tmp_path)
    assert list((tmp_path / "blobs").rglob("*")) == []


def test_what_a_crash_left_is_swept_and_what_is_in_the_making_stays(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    old, young = tmp_path / ".partial-old", tmp_path / ".partial-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    blobs.sweep(int(young.stat().st_mtime * 1000) + PARTIAL_AGE_MS // 2)
    assert not old.exists()
    assert young.exists()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        write_file(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_source_reads_any_range(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as file:
        source = FileSource(file)
        assert source.length == 10
        assert (source.read_at(2, 3), source.read_at(8, 5), source.read_at(20, 1)) == (b"234", b"89", b"")


# Keys and locks


def test_keys_are_for_their_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    keys = KeyFolder(tmp_path / "keys")
    keys.create()
    before = {path.stem: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    assert set(before) == set(keys.load()) == set(ROLES)
    assert len(set(before.values())) == len(ROLES)
    for path in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(RequestError, match="never overwritten"):
        keys.create()
    assert {path.stem: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == before


def test_a_key_that_is_away_is_left_out(tmp_path: Path) -> None:
    keys = KeyFolder(tmp_path / "keys")
    keys.create()
    (tmp_path / "keys" / "root.pem").unlink()
    assert set(keys.load()) == set(ROLES) - {"root"}


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    path = tmp_path / "serve.lock"
    assert not is_locked(path)
    lock = FolderLock(path)
    assert is_locked(path)
    with pytest.raises(RequestError, match="another server"):
        FolderLock(path)
    lock.release()
    assert not is_locked(path)


def test_digests_are_what_blobs_are_named_by(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    assert blobs.path(Digest("ab" * 32)) == tmp_path / "ab" / ("ab" * 32)
