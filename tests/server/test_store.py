import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from protocol.chunks import child_plan, root_plan
from protocol.constants import CHUNK_BYTES
from protocol.delta.format import Profile
from protocol.errors import AlreadyPublishedError, RequestError, StorageError
from protocol.ids import DeviceId, Digest, Family, Version, digest_of
from protocol.release import release_target
from server.adapters.blobs import PARTIAL_AGE_MS, FileSource, FolderBlobs, write_file
from server.adapters.keys import KeyFolder
from server.adapters.lock import FolderLock, is_locked
from server.adapters.store import SqlStore
from server.fleet.registry import DeviceRecord
from server.ports import (
    CacheEntry,
    CacheRemoval,
    DeltaRefusal,
    IdleDelta,
    IdleDeltaRemoval,
    ReleaseRecord,
    Repository,
)
from server.releases.catalog import blob_target
from server.releases.publisher import ROLES, Publisher
from server.rollouts.records import MemberRecord, RolloutRecord
from tests.server.samples import NOW_MS, paper_release, report, stored


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    keys = KeyFolder(tmp_path_factory.mktemp("keys") / "keys")
    keys.create()
    return Publisher(keys.load())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.sqlite'}"


@pytest.fixture
def store(url: str, publisher: Publisher) -> Iterator[SqlStore]:
    store = SqlStore(url)
    store.create(publisher.create(NOW_MS).repository)
    yield store
    store.close()


def _rollout(number: int, before: list[RolloutRecord]) -> RolloutRecord:
    assert len(before) == number - 1
    return RolloutRecord(id=f"r{number}", family=Family("digits"), version=Version("2"), created_ms=NOW_MS)


def test_what_was_saved_is_there_after_a_restart(store: SqlStore, url: str) -> None:
    device = DeviceRecord(device=DeviceId("a"), report=report("a", 3, "1"), seen_ms=5)
    rollout = store.create_rollout(_rollout)
    member = MemberRecord(
        rollout="r1", device=DeviceId("a"), wave="canary", status="asked", sequence=1, asked_ms=NOW_MS
    )
    refusal = DeltaRefusal(base=digest_of(b"a"), result=digest_of(b"b"), length=9)
    fast = msgspec.structs.replace(refusal, profile=Profile.FAST)
    idle = IdleDelta(path=refusal.path, since_ms=NOW_MS, blob=stored(b"delta"))
    entry = CacheEntry(name=digest_of(b"c"), length=7)
    store.save([device, member, refusal, fast, idle, entry])
    repository = store.repository()
    store.close()
    again = SqlStore(url)
    again.check()
    assert again.devices() == [device]
    assert again.rollouts() == [rollout]
    assert again.members() == again.members("r1") == [member]
    assert again.members("r2") == []
    assert sorted(again.refusals(), key=lambda each: each.path) == [refusal, fast]
    assert again.idle_deltas() == [idle]
    assert again.cached() == [entry]
    assert again.repository() == repository
    again.close()


def test_a_database_of_an_older_program_gets_the_tables_that_came_later(store: SqlStore, url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DROP TABLE idle_deltas")
        connection.execute("DROP TABLE refused_targets")
        connection.commit()
    again = SqlStore(url)
    again.check()
    assert again.refusals() == []
    idle = IdleDelta(path="deltas/a/b", since_ms=NOW_MS, blob=stored(b"delta"))
    again.save([idle])
    assert store.idle_deltas() == [idle]
    again.save([IdleDeltaRemoval(path="deltas/a/b")])
    assert store.idle_deltas() == []
    again.close()


def test_the_last_of_several_records_with_one_key_stays(store: SqlStore) -> None:
    records = [DeviceRecord(device=DeviceId("a"), seen_ms=seen) for seen in (1, 2)]
    store.save([*records, CacheEntry(name=digest_of(b"c"), length=7), CacheRemoval(name=digest_of(b"c"))])
    store.save([DeviceRecord(device=DeviceId("a"), seen_ms=3), DeviceRecord(device=DeviceId("b"))])
    assert [(device.device, device.seen_ms) for device in store.devices()] == [("a", 3), ("b", 0)]
    assert store.cached() == []


def test_a_rollout_is_replaced_by_its_newer_record_and_keeps_its_place(store: SqlStore) -> None:
    first, second = store.create_rollout(_rollout), store.create_rollout(_rollout)
    moved = msgspec.structs.replace(first, reason="why")
    store.save([moved])
    assert store.rollouts() == [moved, second]


def test_a_published_release_cannot_change(store: SqlStore) -> None:
    draft = ReleaseRecord(release=paper_release("1"), added_ms=1)
    store.add_release(draft)
    store.add_release(msgspec.structs.replace(draft, added_ms=2))
    published = msgspec.structs.replace(draft, published_ms=3)
    store.sign(lambda before: before, published)
    assert store.release(Family("digits"), Version("1")) == published
    with pytest.raises(AlreadyPublishedError):
        store.add_release(draft)
    with pytest.raises(AlreadyPublishedError):
        store.sign(lambda before: before, published)
    assert store.releases() == [published]


def test_a_signature_that_fails_leaves_everything_as_it_was(store: SqlStore) -> None:
    draft = ReleaseRecord(release=paper_release("1"), added_ms=1)
    store.add_release(draft)
    before = store.repository()

    def fail(_: Repository) -> Repository:
        raise RequestError("no")

    with pytest.raises(RequestError):
        store.sign(fail, msgspec.structs.replace(draft, published_ms=3))
    assert store.repository() == before
    assert store.releases() == [draft]


def test_signers_in_parallel_lose_nothing(store: SqlStore, url: str, publisher: Publisher) -> None:
    def sign(name: str) -> None:
        mine = SqlStore(url)
        target = blob_target(release_target(Family("digits"), Version(name)), stored(name.encode()))
        for _ in range(3):
            mine.sign(lambda before: publisher.publish(before, [target], (), NOW_MS).repository)
        mine.close()

    threads = [threading.Thread(target=sign, args=(f"v{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repository = store.repository()
    assert repository is not None
    assert len(publisher.refresh(repository, NOW_MS).targets) == 4


def test_changes_are_counted_for_what_other_processes_wait_for(store: SqlStore, publisher: Publisher) -> None:
    seen = [store.changes()]
    store.create_rollout(_rollout)
    seen.append(store.changes())
    store.sign(lambda before: publisher.publish(before, (), (), NOW_MS).repository)
    seen.append(store.changes())
    store.sign(lambda before: before)
    store.save([DeviceRecord(device=DeviceId("a"))])
    assert seen == [0, 1, 2]
    assert store.changes() == 2


def test_a_database_is_laid_out_once(store: SqlStore, publisher: Publisher) -> None:
    with pytest.raises((RequestError, StorageError)):
        store.create(publisher.create(NOW_MS).repository)


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    path.write_bytes(b"this is no database" * 100)
    store = SqlStore(f"sqlite:///{path}")
    with pytest.raises(RequestError, match="init"):
        store.check()
    store.close()
    with pytest.raises(RequestError):
        SqlStore("nonsense")
    with pytest.raises(RequestError):
        SqlStore("nodriver://x/y")


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
