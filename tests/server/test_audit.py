"""The audit trail: every act in a chain, in the transaction of what it tells of; and what is found when somebody alters it."""

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from protocol.errors import RequestError
from protocol.ids import DeviceId, Family, Version
from server import operations
from server.actors import acting, current_actor
from server.adapters import trail
from server.adapters.keys import KeyFolder
from server.adapters.store import SqlStore
from server.alerts.records import Delivery, new_alert
from server.audit import REFUSED_PER_HOUR_MAX, SERVER, Act, Actor, Head, new_act, parse_head
from server.cli import main
from server.config import read_config
from server.home import opened
from server.ports import Repository
from server.releases.publisher import Publisher
from server.rollout_orders import label_device, order_rollout
from server.rollouts.records import MemberRecord, MemberStatus, RolloutRecord
from server.rollouts.states import RolloutState
from tests.models import write_classifier, write_health_plan
from tests.server.samples import NOW_MS

ADA = Actor(kind="page", name="ada", role="approver", address="192.0.2.7")
DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    keys = KeyFolder(tmp_path_factory.mktemp("keys") / "keys")
    keys.create()
    return Publisher(keys.load()).create(NOW_MS).repository


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def store(path: Path, repository: Repository) -> Iterator[SqlStore]:
    store = SqlStore(f"sqlite:///{path}")
    store.create(repository)
    yield store
    store.close()


def _acts(store: SqlStore, count: int, at_ms: int = NOW_MS) -> None:
    store.save([new_act(ADA, at_ms + number, "device.label", f"d{number}") for number in range(count)])


def _alter(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_what_was_noted_is_listed_newest_first_by_who_what_and_when(store: SqlStore) -> None:
    store.save([new_act(ADA, NOW_MS, "release.publish", "digits v1", tiers="pi")])
    store.save([new_act(SERVER, NOW_MS + 1, "rollout.stop", "r1", "8 of 100 failed")])
    store.save([new_act(ADA, NOW_MS + 2, "rollout.start", "r2")])
    everything = store.audit(count_max=10)
    assert [each.number for each in everything] == [3, 2, 1]
    assert everything[2].by == ADA
    assert everything[2].details == {"tiers": "pi"}
    assert [each.on for each in store.audit(who="server", count_max=10)] == ["r1"]
    assert [each.on for each in store.audit(what="rollout.", count_max=10)] == ["r2", "r1"]
    assert [each.on for each in store.audit(what="release%", count_max=10)] == []
    assert store.audit(who="ada\x00", count_max=10) == []
    assert [each.on for each in store.audit(since_ms=NOW_MS + 2, count_max=10)] == ["r2"]
    assert [each.on for each in store.audit(before=3, count_max=1)] == ["r1"]
    assert store.verify_audit().faults == []


@pytest.mark.parametrize(
    ("statements", "fault"),
    [
        (["UPDATE audit SET body = replace(body, 'd2', 'd9') WHERE number = 3"], "record 3 was altered"),
        (["UPDATE audit SET body = replace(body, 'd4', 'd9') WHERE number = 5"], "the newest record"),
        (["UPDATE audit SET body = 'x' WHERE number = 3"], "record 3 cannot be read"),
        (["DELETE FROM audit WHERE number = 3"], "records 3 to 3 are missing"),
        (["DELETE FROM audit WHERE number = 5"], "the newest record should be number 5"),
        (["DELETE FROM audit WHERE number <= 2"], "records before 3 are missing"),
        (["DELETE FROM audit"], "the newest record should be number 5"),
        (
            ["DELETE FROM audit WHERE number = 2", "UPDATE audit SET number = 2 WHERE number = 5"],
            "says that it is number 5",
        ),
        (["UPDATE audit_head SET number = 4"], "the newest record should be number 4"),
    ],
)
def test_a_record_that_was_altered_or_removed_is_found(
    store: SqlStore, path: Path, statements: list[str], fault: str
) -> None:
    _acts(store, 5)
    assert store.verify_audit().faults == []
    _alter(path, *statements)
    faults = store.verify_audit().faults
    assert any(fault in each for each in faults), faults


def test_a_whole_new_chain_is_found_by_a_digest_that_was_noted_elsewhere(store: SqlStore, path: Path) -> None:
    _acts(store, 3)
    noted = store.verify_audit().head
    _acts(store, 2)
    assert store.verify_audit(noted).faults == []
    _alter(path, "DELETE FROM audit", "UPDATE audit_head SET number = 0, digest = ''")
    _acts(store, 5, at_ms=NOW_MS + 50)
    assert store.verify_audit().faults == []
    assert "record 3 is not the one that you noted" in store.verify_audit(noted).faults[0]
    assert parse_head(str(noted)) == noted
    with pytest.raises(RequestError, match="NUMBER:DIGEST"):
        parse_head("3:abc")


def test_old_records_go_and_the_chain_says_so_itself(store: SqlStore, path: Path) -> None:
    _acts(store, 5)
    _acts(store, 2, at_ms=NOW_MS + DAY_MS)
    noted = Head(5, store.audit(before=7, count_max=1)[0].before)
    assert store.prune_audit(NOW_MS + DAY_MS, NOW_MS + DAY_MS) == 5
    assert store.prune_audit(NOW_MS + DAY_MS, NOW_MS + DAY_MS) == 0
    verified = store.verify_audit()
    assert (verified.records, verified.first, verified.faults) == (3, 6, [])
    pruned = store.audit(count_max=1)[0]
    assert (pruned.what, pruned.details["through"], pruned.details["records"]) == ("audit.prune", 5, 5)
    assert store.verify_audit(noted).faults == []  # the last that went is named by the first that stayed
    _acts(store, 1, at_ms=NOW_MS + 3 * DAY_MS)
    assert (
        store.prune_audit(NOW_MS + 2 * DAY_MS, NOW_MS + 3 * DAY_MS) == 3
    )  # the note of the first time among them
    assert store.verify_audit().faults == []
    _alter(path, "DELETE FROM audit WHERE number = (SELECT min(number) FROM audit)")
    assert "are missing, and no record tells" in store.verify_audit().faults[0]


def test_nobody_who_acts_can_pretend_that_records_were_pruned(store: SqlStore, path: Path) -> None:
    _acts(store, 3)
    digest = store.audit(count_max=1)[0].before
    store.save([new_act(ADA, NOW_MS, "audit.prune", "audit", through=2, digest=digest)])
    _alter(path, "DELETE FROM audit WHERE number <= 2")
    assert "are missing" in store.verify_audit().faults[0]


def test_acts_of_many_at_once_are_one_chain(store: SqlStore, path: Path) -> None:
    def act(name: str) -> None:
        mine = SqlStore(f"sqlite:///{path}")
        for number in range(10):
            mine.save([new_act(Actor(kind="token", name=name), NOW_MS + number, "api", name)])
        mine.close()

    threads = [threading.Thread(target=act, args=[f"u{number}"]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verified = store.verify_audit()
    assert (verified.records, verified.faults) == (40, [])
    assert len(store.audit(who="u3", count_max=99)) == 10


def test_refused_acts_do_not_fill_the_disk_and_the_last_one_says_so(store: SqlStore) -> None:
    for number in range(3):
        refused = [
            new_act(ADA, NOW_MS + number, "session.refuse", "ada", outcome="web.sign_in") for _ in range(40)
        ]
        store.save([*refused, new_act(ADA, NOW_MS + number, "user.role", "bob")])
    noted = store.audit(what="session.refuse", count_max=999)
    assert len(noted) == REFUSED_PER_HOUR_MAX
    assert "further ones within this hour are not noted" in noted[0].text
    assert noted[1].text == ""
    assert len(store.audit(what="user.role", count_max=999)) == 3
    later = new_act(ADA, NOW_MS + 3_700_000, "session.refuse", "ada", outcome="web.sign_in")
    store.save([later])
    assert store.audit(count_max=1)[0].number == REFUSED_PER_HOUR_MAX + 4
    assert store.verify_audit().faults == []


def test_texts_are_short_and_printable_whatever_they_were() -> None:
    act = new_act(
        Actor(kind="page", name="a\x1b[2Jb" * 99), NOW_MS, "x", "y\n" * 999, "z\x00" * 999, more="m" * 999
    )
    assert len(act.by.name) == 128
    assert max(len(act.on), len(str(act.details["more"]))) == 200
    assert len(act.text) == 600
    assert (act.by.name + act.on + act.text).isprintable()


def test_a_change_that_fails_notes_nothing_of_itself(store: SqlStore) -> None:
    act = new_act(ADA, NOW_MS, "rollout.start", "r1")

    def make(_number: int, _before: list[RolloutRecord]) -> RolloutRecord:
        raise RequestError("no")

    with pytest.raises(RequestError):
        store.create_rollout(make, lambda _: act)
    assert store.audit(count_max=9) == []


def test_a_database_from_before_begins_its_chain_and_loses_nothing(
    path: Path, repository: Repository
) -> None:
    old = SqlStore(f"sqlite:///{path}")
    old.create(repository)
    rollout = old.create_rollout(
        lambda number, _: RolloutRecord(
            id=f"r{number}", family=Family("digits"), version=Version("2"), created_ms=1
        )
    )
    old.close()
    _alter(path, *(f"DROP TABLE {name}" for name in ("audit", "audit_head", "alerts", "deliveries")))
    store = SqlStore(f"sqlite:///{path}")
    store.check()
    assert store.rollouts() == [rollout]
    _acts(store, 2)
    assert store.verify_audit().records == 2
    store.save([new_alert("rollout.started", "r1", NOW_MS, "begun")])
    assert len(store.alerts(0)) == 1
    store.close()


def test_the_devices_of_old_rollouts_go_and_their_numbers_stay(store: SqlStore) -> None:
    def make(number: int, _: list[RolloutRecord]) -> RolloutRecord:
        return RolloutRecord(id=f"r{number}", family=Family("digits"), version=Version("2"), created_ms=1)

    statuses: tuple[MemberStatus, ...] = ("committed", "committed", "silent")
    states = [RolloutState.STOPPED, RolloutState.FINISHED, RolloutState.FINISHED, RolloutState.RUNNING]
    for state in states:
        record = store.create_rollout(make)
        ended = None if state is RolloutState.RUNNING else NOW_MS
        members = [
            MemberRecord(
                rollout=record.id,
                device=DeviceId(f"d{n}"),
                wave="rest",
                status=status,
                sequence=1,
                asked_ms=1,
            )
            for n, status in enumerate(statuses)
        ]
        store.save([msgspec.structs.replace(record, state=state, finished_ms=ended), *members])
    assert store.forget_members(NOW_MS) == []
    # r3 is the last of its family that finished: the deltas that lead to its version are kept for it.
    assert store.forget_members(NOW_MS + 1) == ["r1", "r2"]
    assert {member.rollout for member in store.members()} == {"r3", "r4"}
    assert store.rollouts()[0].counts == {"committed": 2, "silent": 1}
    assert store.forget_members(NOW_MS + 1) == []


def test_alerts_go_when_they_are_old_unless_somebody_waits_for_them(store: SqlStore) -> None:
    told, waits, undecided = (new_alert("rollout.paused", f"r{n}", NOW_MS, "paused") for n in range(3))
    store.save([told, waits])
    store.distribute(NOW_MS, lambda alert: [] if alert.id == told.id else ["ops"])
    store.save([undecided])
    assert store.forget_alerts(NOW_MS + 1) == 1
    assert [alert.about for alert in store.alerts(0)] == ["r1", "r2"]
    found = store.next_delivery("ops")
    assert found is not None
    store.put_delivery(msgspec.structs.replace(found[0], state="delivered"))
    assert store.forget_alerts(NOW_MS + 1) == 1
    assert store.sent("r1") == []


def test_what_was_given_up_while_an_attempt_was_on_its_way_stays_given_up_unless_it_arrived(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trail, "WAITING_MAX", 1)
    store.save([new_alert("rollout.paused", "r1", NOW_MS, "paused")])
    store.distribute(NOW_MS, lambda _: ["ops"])
    found = store.next_delivery("ops")
    assert found is not None
    trying = msgspec.structs.replace(found[0], attempts=1, error="refused", next_ms=NOW_MS + 1)
    store.save([new_alert("rollout.paused", "r2", NOW_MS + 1, "paused")])
    assert [each.alert for each in store.distribute(NOW_MS + 1, lambda _: ["ops"])] == [trying.alert]

    def counts() -> tuple[int, int, int]:
        (standing,) = store.standings(["ops"])
        return standing.waiting, standing.dropped, standing.delivered

    assert counts() == (1, 1, 0)
    store.put_delivery(trying)
    assert counts() == (1, 1, 0)
    store.put_delivery(msgspec.structs.replace(trying, state="delivered", error=""))
    assert counts() == (1, 0, 1)


# What people do


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    operations.init_repository(folder, "lab", port=0)
    return folder


@pytest.fixture
def release(tmp_path: Path, home: Path) -> Callable[[str], None]:
    model = write_classifier(tmp_path / "model.onnx", seed=1)
    health = write_health_plan(tmp_path / "health.json")

    def add(version: str) -> None:
        operations.add_release(home, "digits", version, [model], runtime="onnx", health=health)

    return add


def _noted(home: Path) -> list[Act]:
    with opened(home) as there:
        assert there.store.verify_audit().faults == []
        return list(reversed(there.store.audit(count_max=999)))


def test_every_act_has_a_name_and_refusals_say_why(
    home: Path,
    release: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGNAME", "mallory")  # anybody can set that
    me = current_actor().name
    release("v1")
    with acting(ADA):
        operations.publish_release(home, "digits", "v1")
        with pytest.raises(RequestError):
            operations.publish_release(home, "digits", "v1")
        rollout = operations.start_rollout(home, "digits", "v1")
    order_rollout(home, rollout.id, "abort", by="bob", reason="the lab reports odd answers")
    label_device(home, "pi-1", ["lab"], [])
    operations.withdraw_release(home, "digits", "v1")
    noted = _noted(home)
    assert [(each.by.kind, each.by.name, each.what, each.on, each.outcome) for each in noted] == [
        ("command", me, "repository.init", "lab", "done"),
        ("command", me, "release.add", "digits v1", "done"),
        ("page", "ada", "release.publish", "digits v1", "done"),
        ("page", "ada", "release.publish", "digits v1", "request.already_published"),
        ("page", "ada", "rollout.start", "r1", "done"),
        ("command", me, "order.abort", "r1", "done"),
        ("command", me, "device.label", "pi-1", "done"),
        ("command", me, "release.withdraw", "digits v1", "done"),
    ]
    assert noted[5].text == "the lab reports odd answers"
    assert noted[5].details == {"operator": "bob", "number": 1}
    assert main(["audit", "list", "--dir", str(home), "--who", "ada", "--json"]) == 0
    assert [each["what"] for each in json.loads(capsys.readouterr().out)] == [
        "rollout.start", "release.publish", "release.publish",
    ]  # fmt: skip
    assert main(["audit", "list", "--dir", str(home), "--what", "order", "--since", "1h"]) == 0
    assert re.search(
        rf"{me}.*, by command +order\.abort +r1 +the lab reports odd answers", capsys.readouterr().out
    )


def test_of_two_operators_at_once_the_second_is_noted_as_refused(
    home: Path, release: Callable[[str], None]
) -> None:
    release("v1")
    operations.publish_release(home, "digits", "v1")
    operations.start_rollout(home, "digits", "v1")
    barrier = threading.Barrier(2)

    def abort(name: str) -> None:
        barrier.wait()
        with acting(Actor(kind="page", name=name, role="operator")):
            try:
                order_rollout(home, "r1", "abort", by=name, seen=0)
            except RequestError:
                return

    threads = [threading.Thread(target=abort, args=[name]) for name in ("ada", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    orders = [each for each in _noted(home) if each.what == "order.abort"]
    assert sorted(each.outcome for each in orders) == ["done", "request.conflict"]
    assert {each.by.name for each in orders} == {"ada", "bob"}


def test_people_and_their_keys_are_noted_and_no_secret_is(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        assert main([*arguments, "--dir", str(home)]) == code
        return capsys.readouterr().out

    (tmp_path / "password").write_text("correct horse battery\n")
    run("users", "add", "ada", "--role", "operator", "--password-file", str(tmp_path / "password"))
    run("users", "add", "ada", "--password-file", str(tmp_path / "password"), code=1)
    run("users", "role", "ada", "approver")
    token = run("users", "token", "ada").splitlines()[0]
    run("users", "password", "ada", "--password-file", str(tmp_path / "password"))
    run("users", "remove", "ada")
    claim = run("devices", "claim", "pi-1").strip()
    assert main(["keys", "make", "ana", "--no-passphrase", "-o", str(tmp_path)]) == 0
    run("keys", "assign", "root", str(home / "keys" / "root.pem").replace(".pem", ".pub"), code=1)
    run("keys", "assign", "releases.digits", str(tmp_path / "ana.pub"))
    noted = _noted(home)
    assert [(each.what, each.on, each.outcome) for each in noted[1:]] == [
        ("user.add", "ada", "done"),
        ("user.add", "ada", "request.invalid"),
        ("user.role", "ada", "done"),
        ("user.token", "ada", "done"),
        ("user.password", "ada", "done"),
        ("user.remove", "ada", "done"),
        ("device.claim", "pi-1", "done"),
        ("keys.assign", "releases.digits", "waiting"),
    ]
    assert noted[3].details == {"role": "approver", "before": "operator"}
    everything = msgspec.json.encode(noted).decode()
    for secret in ("correct horse", "argon2", token, claim):
        assert secret not in everything
    with opened(home) as there:
        (told,) = there.store.alerts(0)
    assert told.kind == "keys.waiting"
    assert "lacks 1 signature(s) of ana" in told.text


def test_an_altered_trail_ends_the_command_with_1(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", "--dir", str(home)]) == 0
    noted = capsys.readouterr().out.splitlines()[1].removeprefix("Newest: ")
    assert main(["audit", "verify", "--dir", str(home), "--expect", noted]) == 0
    label_device(home, "pi-1", ["lab"], [])
    database = Path(read_config(home).database_url.removeprefix("sqlite:///"))
    _alter(database, "UPDATE audit SET body = replace(body, 'lab', 'bal') WHERE number = 2")
    capsys.readouterr()
    assert main(["audit", "verify", "--dir", str(home)]) == 1
    assert capsys.readouterr().out.startswith("The audit trail is NOT whole:")
    assert main(["audit", "verify", "--dir", str(home), "--expect", "nonsense"]) == 1
    assert main(["audit", "list", "--dir", str(home), "--since", "yesterday"]) == 2


def test_what_waits_for_a_webhook_that_is_gone_is_given_up(store: SqlStore) -> None:
    store.save([new_alert("rollout.paused", "r1", NOW_MS, "paused")])
    store.distribute(NOW_MS, lambda _: ["old", "ops"])
    assert store.drop_deliveries(["ops"]) == 1
    (sent,) = store.sent("r1")
    assert [(each.webhook, each.state) for each in sent.deliveries] == [
        ("old", "dropped"),
        ("ops", "waiting"),
    ]
    assert sent.deliveries[0] == Delivery(
        webhook="old", alert=sent.alert.id, state="dropped", since_ms=NOW_MS, next_ms=NOW_MS,
        error="the webhook is not configured any more",
    )  # fmt: skip
