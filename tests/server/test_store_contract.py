"""What every store promises: the one in a database, with SQLite and with PostgreSQL, and the simulator's, as far as it goes."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from protocol.delta.format import Profile
from protocol.errors import AlreadyPublishedError, RequestError, StorageError, StorageFullError
from protocol.ids import DeviceId, Digest, Family, Version, digest_of
from protocol.release import release_target
from server.accounts import (
    SESSION_MS,
    AccountRecord,
    Accounts,
    SessionRecord,
    SessionRemoval,
    UserRecord,
    UserRemoval,
)
from server.adapters import database
from server.adapters.keys import KeyFolder
from server.adapters.store import SqlStore
from server.cli import main
from server.config import DATABASE_FILE
from server.fleet.history import DeviceEvent
from server.fleet.identities import CertificateRecord, CertificateRemoval, Identities
from server.fleet.registry import DeviceRecord
from server.ports import (
    CacheEntry,
    CacheRemoval,
    ContentKeyRecord,
    ContentKeyRemoval,
    DeltaRefusal,
    IdleDelta,
    IdleDeltaRemoval,
    Records,
    ReleaseRecord,
    Repository,
)
from server.releases.catalog import blob_target
from server.releases.publisher import Publisher
from server.rollouts.records import Decision, Labels, MemberRecord, Order, RolloutRecord
from simulator.store import MemoryStore
from tests.server.databases import POSTGRESQL, POSTGRESQL_MISSING, Cluster, running_postgresql
from tests.server.samples import NOW_MS, paper_release, report, stored

DIGITS = Family("digits")
A, B = DeviceId("a"), DeviceId("b")


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    keys = KeyFolder(tmp_path_factory.mktemp("keys") / "keys")
    keys.create()
    return Publisher(keys.load())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_postgresql() as cluster:
        yield cluster


def empty_database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.create_schema()


@pytest.fixture(params=["sqlite", POSTGRESQL])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    return empty_database(request.param, request, tmp_path)


@pytest.fixture
def store(url: str, publisher: Publisher) -> Iterator[SqlStore]:
    store = SqlStore(url)
    store.create(publisher.create(NOW_MS).repository)
    yield store
    store.close()


@pytest.fixture(params=["memory", "sqlite", POSTGRESQL])
def records(request: pytest.FixtureRequest, tmp_path: Path, publisher: Publisher) -> Iterator[Records]:
    """What a coordinator uses of a store."""
    repository = publisher.create(NOW_MS).repository
    if request.param == "memory":
        yield MemoryStore(repository)
        return
    store = SqlStore(empty_database(request.param, request, tmp_path))
    store.create(repository)
    yield store
    store.close()


def rollout(number: int, before: list[RolloutRecord]) -> RolloutRecord:
    assert [each.id for each in before] == [f"r{each}" for each in range(1, number)]
    return RolloutRecord(id=f"r{number}", family=DIGITS, version=Version("2"), created_ms=NOW_MS)


def order(rollout: str, record: RolloutRecord | None, before: list[Order]) -> Order:
    assert record is None or record.id == rollout
    assert [each.number for each in before] == list(range(1, len(before) + 1))
    return Order(rollout=rollout, number=len(before) + 1, action="pause", by="ann", at_ms=NOW_MS)


def member(rollout: str, device: str) -> MemberRecord:
    return MemberRecord(
        rollout=rollout, device=DeviceId(device), wave="canary", status="asked", sequence=1, asked_ms=NOW_MS
    )


def decision(number: int, rollout: str = "r1") -> Decision:
    return Decision(rollout=rollout, number=number, at_ms=NOW_MS, action="begin", text=f"number {number}")


def idle(path: str) -> IdleDelta:
    return IdleDelta(path=path, since_ms=NOW_MS, blob=stored(path.encode()))


# --- what a coordinator writes, and begins with


def test_what_was_saved_is_there(records: Records) -> None:
    device = DeviceRecord(device=A, report=report("a", 3, "1"), seen_ms=5)
    refusal = DeltaRefusal(base=digest_of(b"a"), result=digest_of(b"b"), length=9)
    fast = replace(refusal, profile=Profile.FAST)
    entry = CacheEntry(name=digest_of(b"c"), length=7)
    created = records.create_rollout(rollout)
    records.save([device, member("r1", "a"), refusal, fast, idle("deltas/a/b"), entry, decision(1)])
    assert records.devices() == [device]
    assert records.rollouts() == [created]
    assert records.members() == records.members("r1") == [member("r1", "a")]
    assert sorted(records.refusals(), key=lambda each: each.path) == [refusal, fast]
    assert records.idle_deltas() == [idle("deltas/a/b")]
    assert records.cached() == [entry]
    assert records.decisions("r1") == [decision(1)]


def test_nothing_was_saved_where_nothing_was(records: Records) -> None:
    records.save([])
    assert not records.devices()
    assert not records.rollouts()
    assert not records.members()
    assert not records.members("r1")
    assert not records.refusals()
    assert not records.idle_deltas()
    assert not records.cached()
    assert not records.orders()
    assert not records.decisions("r1")


def test_the_last_of_several_records_with_one_key_stays(records: Records) -> None:
    name = digest_of(b"c")
    seen = [DeviceRecord(device=A, seen_ms=seen) for seen in (1, 2)]
    records.save([*seen, CacheEntry(name=name, length=7), CacheRemoval(name=name)])
    records.save([DeviceRecord(device=A, seen_ms=3), DeviceRecord(device=B)])
    assert [(device.device, device.seen_ms) for device in records.devices()] == [("a", 3), ("b", 0)]
    assert records.cached() == []
    records.save([CacheRemoval(name=name), CacheEntry(name=name, length=8)])
    assert records.cached() == [CacheEntry(name=name, length=8)]


def test_what_is_gone_may_go_again_and_come_back(records: Records) -> None:
    removal = IdleDeltaRemoval(path="deltas/a/b")
    records.save([removal, idle("deltas/a/b"), idle("deltas/a/c")])
    records.save([removal])
    records.save([removal])
    assert records.idle_deltas() == [idle("deltas/a/c")]
    records.save([idle("deltas/a/b")])
    assert records.idle_deltas() == [idle("deltas/a/b"), idle("deltas/a/c")]


NAMES = ["0", "a", "a-a", "a-b", "a0", "aa", "ab", "b"]
"""In the order of their bytes; dictionaries have another one."""


def test_devices_members_and_deltas_come_in_the_order_of_the_bytes_of_their_names(records: Records) -> None:
    backwards = NAMES[::-1]
    records.save([DeviceRecord(device=DeviceId(name)) for name in backwards])
    records.save([member(name, device) for name in backwards for device in backwards])
    records.save([idle(f"deltas/{name}/x") for name in backwards])
    assert [each.device for each in records.devices()] == NAMES
    assert [(each.rollout, each.device) for each in records.members()] == [
        (name, device) for name in NAMES for device in NAMES
    ]
    assert [each.device for each in records.members("a-b")] == NAMES
    assert [each.path for each in records.idle_deltas()] == sorted(f"deltas/{name}/x" for name in NAMES)


def test_names_may_be_as_long_as_the_specification_allows(records: Records) -> None:
    name = "a" * 64
    refusal = DeltaRefusal(
        base=Digest("a" * 64), result=Digest("b" * 64), profile=Profile.FAST, is_encrypted=True, length=9
    )
    records.save([DeviceRecord(device=DeviceId(name)), member(name, name), refusal, idle(refusal.path)])
    assert records.members(name) == [member(name, name)]
    assert records.refusals() == [refusal]
    assert records.idle_deltas() == [idle(refusal.path)]


def test_a_rollout_is_replaced_by_its_newer_record_and_keeps_its_place(records: Records) -> None:
    first, second = records.create_rollout(rollout), records.create_rollout(rollout)
    moved = replace(first, reason="why")
    records.save([moved])
    assert records.rollouts() == [moved, second]


def test_rollouts_are_numbered_in_the_order_in_which_they_came(records: Records) -> None:
    for _ in range(11):
        records.create_rollout(rollout)
    assert [each.id for each in records.rollouts()] == [f"r{number}" for number in range(1, 12)]


def test_a_rollout_is_created_and_not_merely_saved(records: Records) -> None:
    records.save([rollout(1, [])])
    assert records.rollouts() == []


def test_a_rollout_that_cannot_be_made_leaves_everything_as_it_was(records: Records) -> None:
    def refuse(_number: int, _before: list[RolloutRecord]) -> RolloutRecord:
        raise RequestError("the family is busy")

    with pytest.raises(RequestError, match="busy"):
        records.create_rollout(refuse)
    assert records.rollouts() == []
    assert records.create_rollout(rollout).id == "r1"


def test_orders_are_numbered_for_each_rollout_and_answered_in_their_place(records: Records) -> None:
    records.create_rollout(rollout)
    first = records.order_rollout("r1", partial(order, "r1"))
    second = records.order_rollout("r1", partial(order, "r1"))
    other = records.order_rollout("r0", partial(order, "r0"))  # of which there is no record
    assert (first.number, second.number, other.number) == (1, 2, 1)
    answered = replace(first, answer="done", answered_ms=NOW_MS)
    records.save([answered])
    assert records.orders("r1") == [answered, second]
    assert records.orders() == [other, answered, second]


def test_an_order_sees_its_rollout_and_may_be_refused(records: Records) -> None:
    created = records.create_rollout(rollout)

    def refuse(record: RolloutRecord | None, before: list[Order]) -> Order:
        assert (record, before) == (created, [])
        raise RequestError("not as things stand")

    with pytest.raises(RequestError, match="as things stand"):
        records.order_rollout("r1", refuse)
    assert records.orders() == []


def test_decisions_come_in_the_order_in_which_they_were_taken(records: Records) -> None:
    records.save([decision(10), decision(2), decision(1), decision(1, "r2")])
    assert records.decisions("r1") == [decision(1), decision(2), decision(10)]
    assert records.decisions("r2") == [decision(1, "r2")]


# --- in a database


def test_what_was_saved_is_there_after_a_restart(store: SqlStore, url: str) -> None:
    created = store.create_rollout(rollout)
    store.save([DeviceRecord(device=A), member("r1", "a")])
    repository = store.repository()
    store.close()
    again = SqlStore(url)
    again.check()
    assert again.devices() == [DeviceRecord(device=A)]
    assert again.rollouts() == [created]
    assert again.members() == [member("r1", "a")]
    assert again.repository() == repository
    again.close()


def test_events_of_a_device_are_the_last_ones_oldest_first_until_they_are_old(store: SqlStore) -> None:
    def event(device: DeviceId, at_ms: int) -> DeviceEvent:
        return DeviceEvent(
            device=device, at_ms=at_ms, is_online=True, state="idle", family=DIGITS, version="1"
        )

    times = [NOW_MS + step for step in range(5)]
    store.save([event(A, at_ms) for at_ms in times] + [event(B, NOW_MS)])
    assert [each.at_ms for each in store.device_events(A, 3)] == times[2:]
    store.forget_device_events(times[3])
    assert [each.at_ms for each in store.device_events(A, 9)] == times[3:]
    assert store.device_events(B, 9) == []


def test_content_keys_are_kept_until_they_are_removed(store: SqlStore) -> None:
    key = ContentKeyRecord(blob=digest_of(b"a"), locked=bytes(range(256)))
    assert (store.content_key(key.blob), store.has_content_keys()) == (None, False)
    store.save([key])
    assert (store.content_key(key.blob), store.has_content_keys()) == (key, True)
    store.save([ContentKeyRemoval(blob=key.blob)])
    assert (store.content_key(key.blob), store.has_content_keys()) == (None, False)


def test_labels_are_replaced_and_noticed(store: SqlStore) -> None:
    before = store.changes()
    store.label(Labels(device=B, labels=("lab",)))
    store.label(Labels(device=A, labels=("field",)))
    store.label(Labels(device=A, labels=("field", "solar")))
    assert store.labels() == [
        Labels(device=A, labels=("field", "solar")),
        Labels(device=B, labels=("lab",)),
    ]
    assert store.changes() == before + 3


def test_a_published_release_cannot_change(store: SqlStore) -> None:
    draft = ReleaseRecord(release=paper_release("1"), added_ms=1)
    store.add_release(draft)
    store.add_release(replace(draft, added_ms=2))
    published = replace(draft, published_ms=3)
    store.sign(lambda before: before, published)
    assert store.release(DIGITS, Version("1")) == published
    assert store.release(DIGITS, Version("2")) is None
    with pytest.raises(AlreadyPublishedError):
        store.add_release(draft)
    with pytest.raises(AlreadyPublishedError):
        store.sign(lambda before: before, published)
    assert store.releases() == [published]


def test_releases_come_in_the_order_in_which_they_were_added(store: SqlStore) -> None:
    drafts = [ReleaseRecord(release=paper_release(version), added_ms=1) for version in ("2", "10", "1")]
    for draft in drafts:
        store.add_release(draft)
    assert store.releases() == drafts


def test_a_signature_that_fails_leaves_everything_as_it_was(store: SqlStore) -> None:
    draft = ReleaseRecord(release=paper_release("1"), added_ms=1)
    store.add_release(draft)
    before = store.repository()

    def fail(_: Repository) -> Repository:
        raise RequestError("no")

    with pytest.raises(RequestError):
        store.sign(fail, replace(draft, published_ms=3))
    assert store.repository() == before
    assert store.releases() == [draft]


def test_changes_are_counted_for_what_other_processes_wait_for(store: SqlStore, publisher: Publisher) -> None:
    seen = [store.changes()]
    store.create_rollout(rollout)
    seen.append(store.changes())
    store.sign(lambda before: publisher.publish(before, (), (), NOW_MS).repository)
    seen.append(store.changes())
    store.sign(lambda before: before)
    store.save([DeviceRecord(device=A)])
    assert seen == [0, 1, 2]
    assert store.changes() == 2


def test_certificates_are_changed_by_what_is_there(store: SqlStore) -> None:
    record = CertificateRecord(
        serial="ab" * 20,
        role="device",
        name="a",
        certificate=bytes(range(256)),
        key=digest_of(b"a"),
        issued_ms=NOW_MS,
        expires_ms=NOW_MS + 1,
    )
    after = store.change_identities(lambda _: [record])
    assert after.certificates == store.identities().certificates == {record.serial: record}

    def remove(before: Identities) -> list[CertificateRemoval]:
        return [CertificateRemoval(serial=serial) for serial in before.certificates]

    assert store.change_identities(remove).certificates == {}


def user(name: str) -> UserRecord:
    return UserRecord(name=name, role="viewer", password="$argon2id$", created_ms=NOW_MS)


def session(name: str, number: int) -> SessionRecord:
    digest = digest_of(f"{name} {number}".encode())
    return SessionRecord(
        digest=digest, user=name, kind="page", created_ms=NOW_MS + number, expires_ms=NOW_MS + SESSION_MS
    )


def test_one_sign_in_is_found_with_its_user_and_without_anybody_else(store: SqlStore) -> None:
    for name in ("ann", "bob"):
        store.change_accounts(partial(Accounts.add, user=user(name)))
        store.change_accounts(partial(Accounts.begin, session=session(name, 1), now_ms=NOW_MS))
    mine = session("bob", 1)
    found = store.accounts_of(mine.digest)
    assert (found.users, found.sessions) == ({"bob": user("bob")}, {mine.digest: mine})
    assert found.holder(mine.digest, NOW_MS) == (user("bob"), mine)
    assert found.holder(mine.digest, mine.expires_ms) is None
    assert store.accounts_of(digest_of(b"nobody's")).holder(digest_of(b"nobody's"), NOW_MS) is None
    assert (store.user("ann"), store.user("eve")) == (user("ann"), None)
    store.change_accounts(partial(Accounts.remove, name="bob"))
    assert store.accounts_of(mine.digest).holder(mine.digest, NOW_MS) is None
    assert list(store.accounts().users) == ["ann"]


# --- several at a time


def side_by_side(url: str, work: Callable[[SqlStore, int], None], count: int = 4) -> None:
    """Have several stores of one database do something at the same time."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        mine = SqlStore(url)
        try:
            start.wait(30)
            work(mine, number)
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)
        finally:
            mine.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_signers_in_parallel_lose_nothing(store: SqlStore, url: str, publisher: Publisher) -> None:
    def sign(mine: SqlStore, number: int) -> None:
        target = blob_target(release_target(DIGITS, Version(f"v{number}")), stored(str(number).encode()))
        for _ in range(3):
            mine.sign(lambda before: publisher.publish(before, [target], (), NOW_MS).repository)

    side_by_side(url, sign)
    repository = store.repository()
    assert repository is not None
    assert len(publisher.refresh(repository, NOW_MS).targets) == 4


def test_rollouts_and_orders_in_parallel_get_numbers_of_their_own(store: SqlStore, url: str) -> None:
    def ask(mine: SqlStore, _number: int) -> None:
        for _ in range(3):
            mine.create_rollout(rollout)
            mine.order_rollout("r1", partial(order, "r1"))

    side_by_side(url, ask)
    assert len(store.rollouts()) == len(store.orders()) == 12


def test_records_with_one_key_may_be_written_in_parallel(store: SqlStore, url: str) -> None:
    def write(mine: SqlStore, number: int) -> None:
        for _ in range(3):
            mine.save([DeviceRecord(device=DeviceId(name), seen_ms=number) for name in ("a", "b", "c")])
            mine.label(Labels(device=A, labels=(f"l{number}",)))
            mine.add_release(ReleaseRecord(release=paper_release("1"), added_ms=number))

    side_by_side(url, write)
    assert len({each.seen_ms for each in store.devices()}) == 1
    assert (len(store.devices()), len(store.labels()), len(store.releases())) == (3, 1, 1)
    assert store.changes() == 12


def test_what_is_read_together_is_of_one_moment(store: SqlStore, url: str) -> None:
    """There is always either the user or the sign-in."""
    mine = session("ann", 1)
    states: list[list[AccountRecord]] = [
        [user("ann"), SessionRemoval(digest=mine.digest)],
        [UserRemoval(name="ann"), mine],
    ]
    store.change_accounts(lambda _: states[0])
    torn: list[Accounts] = []

    def work(mine: SqlStore, number: int) -> None:
        for step in range(20):
            if number == 0:
                mine.change_accounts(lambda _: states[step % 2])  # noqa: B023 - called at once
            else:
                found = mine.accounts()
                torn.extend([found] if len(found.users) + len(found.sessions) != 1 else [])

    side_by_side(url, work, 3)
    assert torn == []


def test_a_writer_does_not_wait_for_another_one_for_ever(
    store: SqlStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_WAIT_S", 1)
    impatient = SqlStore(url)

    def meanwhile(before: Repository) -> Repository:
        with pytest.raises(StorageError, match="lock"):
            impatient.save([DeviceRecord(device=A)])
        assert impatient.devices() == []  # who reads waits for nobody
        return before

    store.sign(meanwhile)
    impatient.save([DeviceRecord(device=A)])
    assert len(store.devices()) == 1
    impatient.close()


def test_a_folder_keeps_its_records_where_it_was_told_to(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "server"
    assert main(["init", str(folder), "--database", url]) == 0
    assert main(["devices", "--dir", str(folder)]) == 0
    assert "No device has reported yet" in capsys.readouterr().out
    assert not (folder / DATABASE_FILE).exists()
    store = SqlStore(url)
    assert store.repository() is not None
    store.close()


# --- databases that are not as they should be


def test_a_database_is_laid_out_once(store: SqlStore, publisher: Publisher) -> None:
    before = store.repository()
    with pytest.raises(RequestError, match="holds a repository already"):
        store.create(publisher.create(NOW_MS).repository)
    assert store.repository() == before


def test_an_empty_database_is_refused_until_it_is_laid_out(url: str) -> None:
    store = SqlStore(url)
    with pytest.raises(RequestError, match="init"):
        store.check()
    store.close()


def test_a_database_of_an_older_program_gets_the_tables_that_came_later(store: SqlStore, url: str) -> None:
    with store._writing() as connection:
        connection.exec_driver_sql("DROP TABLE idle_deltas")
        connection.exec_driver_sql("DROP TABLE refused_targets")
    again = SqlStore(url)
    again.check()
    assert again.refusals() == []
    again.save([idle("deltas/a/b")])
    assert store.idle_deltas() == [idle("deltas/a/b")]
    again.close()


def test_a_database_of_another_layout_is_refused(store: SqlStore) -> None:
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE constants SET value = 2 WHERE name = 'schema'")
    with pytest.raises(RequestError, match="layout 2, understood is 1"):
        store.check()


def test_a_record_that_cannot_be_read_is_named(store: SqlStore) -> None:
    store.save([DeviceRecord(device=A)])
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE devices SET body = '{}'")
    with pytest.raises(StorageError, match="a DeviceRecord cannot be read"):
        store.devices()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    path.write_bytes(b"this is no database" * 100)
    store = SqlStore(f"sqlite:///{path}")
    with pytest.raises(RequestError, match="init"):
        store.check()
    store.close()


@pytest.mark.parametrize("url", ["nonsense", "nodriver://x/y", "mysql://host/db", "sqlite+nothing:///x"])
def test_a_url_of_no_database_that_is_understood_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="database"):
        SqlStore(url)


def test_a_full_disk_says_so(tmp_path: Path, publisher: Publisher) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'store.sqlite'}")
    store.create(publisher.create(NOW_MS).repository)
    with store._writing() as connection:  # the only connection so far, which is used again
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # SQLite takes what there is at least
    with pytest.raises(StorageFullError):
        store.save([member(f"r{number}", "a") for number in range(1_000)])
    assert store.members() == []
    store.close()


@pytest.mark.postgresql
@pytest.mark.skipif(bool(POSTGRESQL_MISSING), reason=POSTGRESQL_MISSING or "it is there")
def test_a_connection_that_was_cut_while_nobody_used_it_is_made_anew(
    cluster: Cluster, publisher: Publisher
) -> None:
    store = SqlStore(cluster.create_schema())
    store.create(publisher.create(NOW_MS).repository)
    others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
    cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    store.save([DeviceRecord(device=A)])
    assert len(store.devices()) == 1
    store.close()


def test_a_server_of_databases_that_is_away_is_an_error_without_its_password() -> None:
    pytest.importorskip("psycopg", reason=POSTGRESQL_MISSING)
    store = SqlStore("postgresql://me:secret@127.0.0.1:1/db?password=secret")
    with pytest.raises(StorageError, match=r"database postgresql\+psycopg://127\.0\.0\.1:1/db: ") as error:
        store.devices()
    assert "secret" not in str(error.value)
