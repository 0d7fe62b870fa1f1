"""What operators order: the calls, the command, and two of them at once."""

import json
import shutil
import threading
from pathlib import Path

import msgspec
import pytest

from protocol.errors import RequestError, TopicError
from server import operations
from server.adapters.store import SqlStore
from server.cli import main
from server.home import opened
from server.operations import RolloutPlan, start_rollout
from server.rollout_orders import (
    LABELS_MAX,
    Given,
    OrderConflictError,
    explain_rollout,
    label_device,
    list_labels,
    order_rollout,
)
from server.rollouts.evidence import Rules
from server.rollouts.records import Decision, Order
from server.rollouts.states import RolloutState, RolloutTrigger
from server.rollouts.waves import parse_waves
from tests.server.samples import NOW_MS, publish_models


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a published version, and a rollout of it that nobody has taken up."""
    folder = tmp_path_factory.mktemp("template")
    publish_models(folder, {"1": 1}, side=4)
    plan = RolloutPlan(waves=parse_waves("2,100%"), rules=Rules(), by="alice")
    start_rollout(folder / "server", "digits", "1", failures_max=None, plan=plan)
    return folder / "server"


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """One of these for each test."""
    return Path(shutil.copytree(template, tmp_path / "server"))


def _set_running(home: Path, state: RolloutState = RolloutState.RUNNING) -> None:
    """As a server would have it after a while."""
    with opened(home) as found:
        (record,) = found.store.rollouts()
        found.store.save([msgspec.structs.replace(record, state=state)])


def _answer(home: Path, answer: str = "done") -> None:
    """As a server answers all that was ordered."""
    with opened(home) as found:
        orders = [
            msgspec.structs.replace(order, answer=answer, answered_ms=NOW_MS)
            for order in found.store.orders()
        ]
        found.store.save(orders)


def test_the_second_of_two_operators_who_act_at_once_is_told_what_the_first_one_did(home: Path) -> None:
    _set_running(home)
    barrier = threading.Barrier(2)
    given: list[Given] = []
    told: list[str] = []

    def act(name: str) -> None:
        barrier.wait()
        try:
            given.append(order_rollout(home, "r1", "pause", by=name, reason=f"{name} is worried", seen=0))
        except OrderConflictError as error:
            told.append(str(error))

    threads = [threading.Thread(target=act, args=(name,)) for name in ("alice", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == len(told) == 1
    winner = given[0].order.by
    assert f"{winner} paused it" in told[0]
    assert f"{winner} is worried" in told[0]
    assert [order.by for order in explain_rollout(home, "r1").orders] == [winner]


def test_an_order_that_the_server_has_not_answered_stands_in_the_way_of_the_next(home: Path) -> None:
    _set_running(home)
    order_rollout(home, "r1", "pause", by="alice")
    with pytest.raises(OrderConflictError, match=r"alice paused it .* s ago"):
        order_rollout(home, "r1", "abort", by="bob")
    assert order_rollout(home, "r1", "abort", by="bob", seen=1).order.number == 2  # who knows of it may


def test_an_order_after_an_answered_one_names_it(home: Path) -> None:
    _set_running(home)
    order_rollout(home, "r1", "pause", by="alice", reason="looks odd")
    _answer(home)
    _set_running(home, RolloutState.PAUSED)
    with pytest.raises(OrderConflictError, match=r"r1 is paused: alice paused it .* s ago: looks odd"):
        order_rollout(home, "r1", "pause", by="bob")
    given = order_rollout(home, "r1", "abort", by="bob")
    assert given.before is not None
    assert (given.before.by, given.before.action) == ("alice", "pause")


def test_what_a_rollout_cannot_do_is_refused_before_it_is_stored(home: Path) -> None:
    with pytest.raises(RequestError, match="r1 is created"):
        order_rollout(home, "r1", "pause", by="alice")
    with pytest.raises(RequestError, match="no rollout 'r9'"):
        order_rollout(home, "r9", "pause", by="alice")
    with pytest.raises(RequestError, match="no name of an operator"):
        order_rollout(home, "r1", "abort", by="")
    with pytest.raises(RequestError, match="501 characters"):
        order_rollout(home, "r1", "abort", by="alice", reason="x" * 501)
    _set_running(home, RolloutState.FINISHED)
    with pytest.raises(RequestError, match="r1 is finished"):
        order_rollout(home, "r1", "abort", by="alice")
    assert explain_rollout(home, "r1").orders == []


def test_every_order_has_a_trigger_in_the_table() -> None:
    assert {"pause", "resume", "promote", "abort"} <= {trigger.value for trigger in RolloutTrigger}


def test_orders_decisions_and_labels_are_there_after_a_restart(home: Path) -> None:
    with opened(home) as found:
        decisions = [
            Decision(
                rollout="r1", number=number, at_ms=NOW_MS, action="widen", text="t", numbers={"odds": 1.5}
            )
            for number in (2, 1, 10)
        ]
        found.store.save(decisions)
        order = found.store.order_rollout(
            "r1",
            lambda _, before: Order(rollout="r1", number=len(before) + 1, action="abort", by="a", at_ms=1),
        )
    label_device(home, "pi-1", ["lab", "berlin"], [])
    with opened(home) as found:
        assert isinstance(found.store, SqlStore)
        assert [each.number for each in found.store.decisions("r1")] == [1, 2, 10]
        assert found.store.decisions("r2") == []
        assert found.store.orders() == found.store.orders("r1") == [order]
    assert list_labels(home) == {"pi-1": ("berlin", "lab")}


def test_labels_are_given_and_taken_away_within_limits(home: Path) -> None:
    label_device(home, "pi-1", ["lab", "lab"], [])
    assert label_device(home, "pi-1", ["site=a"], ["lab", "unknown"]).labels == ("site=a",)
    with pytest.raises(RequestError, match="no label"):
        label_device(home, "pi-1", ["a,b"], [])
    with pytest.raises(RequestError, match=f"allowed are {LABELS_MAX}"):
        label_device(home, "pi-1", [f"l{number}" for number in range(LABELS_MAX + 1)], [])
    with pytest.raises(TopicError):
        label_device(home, "no/device", ["lab"], [])


def test_rules_that_judge_nothing_are_refused(home: Path) -> None:
    with pytest.raises(RequestError, match="would never stop"):
        start_rollout(home, "digits", "1", failures_max=None)
    plan = RolloutPlan(rules=Rules(acceptable=0.5, unacceptable=0.1))
    with pytest.raises(RequestError, match="not below"):
        start_rollout(home, "digits", "1", failures_max=None, plan=plan)


def test_the_command_starts_explains_and_steers_a_rollout(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dir", str(home)]

    def run(*words: str) -> str:
        assert main([*words, *where]) == 0
        return capsys.readouterr().out

    assert "Ordered: abort r1 (order 1)" in run("rollout", "abort", "r1", "--by", "bob", "--reason", "typo")
    _answer(home)
    _set_running(home, RolloutState.STOPPED)
    options = ["--waves", "3@label:lab,10%,100%", "--soak", "1h,1d,0", "--pace", "60", "--from", "0.9"]
    started = json.loads(run("rollout", "start", "digits", "1", *options, "--json", "--by", "alice"))
    assert [wave["soak_ms"] for wave in started["waves"]] == [3_600_000, 86_400_000, 0]
    assert (started["in_flight_max"], started["pace_per_minute"], started["failures_max"]) == (5, 60, None)
    assert (started["rules"]["acceptable"], started["from_version"]) == (0.01, "0.9")
    why = run("rollout", "why", "r2")
    assert "waits for a server to take it up" in why
    assert "start by alice: 3@label:lab, 10%, 100%" in why
    assert json.loads(run("rollout", "why", "r1", "--json"))["orders"][0]["reason"] == "typo"
    assert json.loads(run("rollout", "status", "r2", "--json"))["orders"] == 0
    assert "created" in run("rollout", "list")
    assert run("devices", "label", "pi-1", "lab") == "pi-1: lab\n"
    assert run("devices", "label", "pi-1", "--remove", "lab") == "pi-1: no label\n"


def test_what_the_command_cannot_do_it_says(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], int, str]] = [
        (["start", "digits", "1", "--waves", "many"], 1, "no size"),
        (["start", "digits", "1", "--soak", "soon"], 1, "no time"),
        (["start", "digits", "1", "--wave-timeout", "400d"], 2, "longer than a year"),
        (["start", "digits", "1", "--acceptable", "0"], 2, "not above 0%"),
        (["start", "digits", "1", "--acceptable", "x"], 2, "no share"),
        (["start", "digits", "1", "--acceptable", "9%"], 1, "not below"),
        (["start", "digits", "1", "--in-flight", "0"], 2, "not between 1"),
        (["start", "digits", "1", "--canary", "1", "--waves", "1"], 2, "not allowed with"),
        (["promote", "r9"], 1, "no rollout"),
        (["abort", "r1", "--seen", "3"], 0, ""),
    ]
    for words, code, says in cases:
        assert main(["rollout", *words, "--dir", str(home)]) == code, words
        error = capsys.readouterr().err
        assert says in error
        assert "Traceback" not in error


def test_a_database_from_before_waves_goes_on(home: Path) -> None:
    """The states `canary` and `rest` became one, and the waves got numbers."""
    with opened(home) as found:
        assert isinstance(found.store, SqlStore)
        body = b'{"v":1,"id":"r1","family":"digits","version":"1","canary_count":2,"wave_timeout_ms":5,"failures_max":0,"state":"rest","reason":"","created_ms":1,"begun_ms":2,"finished_ms":null}'
        with found.store._writing() as connection:
            connection.exec_driver_sql("UPDATE rollouts SET body = ? WHERE id = 'r1'", (body,))
    (status,) = operations.list_rollouts(home)
    assert (status.rollout.state, status.rollout.failures_max) == (RolloutState.RUNNING, 0)
    assert status.rollout.rules is None
