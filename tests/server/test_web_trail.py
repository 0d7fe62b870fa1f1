"""What the page and the API leave in the audit trail, and who may see it: a real server, a real listening socket."""

from collections.abc import Iterator

import pytest

from server.alerts.records import new_alert
from server.audit import Act
from server.home import opened
from server.operations import start_rollout
from server.rollouts.records import Decision
from tests.server.samples import NOW_MS
from tests.server.test_web import Site


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()


@pytest.fixture
def site(shared_site: Site) -> Site:
    shared_site.cookie = shared_site.csrf = ""
    return shared_site


def _noted(site: Site, what: str) -> list[Act]:
    with opened(site.folder) as home:
        return list(home.store.audit(what=what, count_max=99))


def test_sign_ins_are_noted_with_the_address_and_no_name_that_may_be_a_password(site: Site) -> None:
    site.sign_in("viewer")
    site.ask("/api/v1/session", None, "DELETE", X_CSRF_Token=site.csrf)
    site.sign_in("viewer", "wrong horse battery")
    site.sign_in("my password in the wrong field", "wrong horse battery")
    noted = list(reversed(_noted(site, "session.")))
    assert [(each.what, each.on, each.outcome) for each in noted] == [
        ("session.begin", "viewer", "done"),
        ("session.end", "viewer", "done"),
        ("session.refuse", "viewer", "web.sign_in"),
        ("session.refuse", "no such user", "web.sign_in"),
    ]
    assert {each.by.address for each in noted} == {"127.0.0.1"}
    assert (noted[0].by.kind, noted[0].by.name, noted[0].by.role) == ("page", "viewer", "viewer")
    assert (noted[3].by.name, noted[3].by.role) == ("", "")
    with opened(site.folder) as home:
        everything = str(home.store.audit(count_max=999))
    assert "wrong" not in everything.replace("the password is wrong", "")


def test_who_acts_on_the_page_is_noted_and_so_is_who_may_not(site: Site) -> None:
    site.sign_in("approver")
    assert site.change("/api/v1/releases/digits/v2/publish").status == 200
    assert site.change("/api/v1/releases/digits/v2/publish").status == 409
    assert site.change("/api/v1/rollouts", {"family": "digits", "version": "v2"}).status == 201
    site.sign_in("viewer")
    assert site.change("/api/v1/releases/digits/v2/withdraw").status == 403
    site.sign_in("operator")
    assert (
        site.change("/api/v1/rollouts/r1/orders", {"action": "abort", "reason": "odd", "seen": 0}).status
        == 201
    )
    refused, published = _noted(site, "release.publish")[:2]
    assert (published.by.name, published.by.kind, published.on, published.outcome) == (
        "approver",
        "page",
        "digits v2",
        "done",
    )
    assert refused.outcome == "request.already_published"
    assert [each.by.name for each in _noted(site, "rollout.start")] == ["approver"]
    (order,) = _noted(site, "order.")
    assert (order.by.name, order.by.role, order.text) == ("operator", "operator", "odd")
    (denied,) = _noted(site, "api.refuse")
    assert (denied.by.name, denied.on) == ("viewer", "POST /api/v1/releases/digits/v2/withdraw")


def test_only_approvers_see_the_trail_page_by_page(site: Site) -> None:
    for user in ("viewer", "operator"):
        site.sign_in(user)
        assert site.ask("/api/v1/audit").status == 403
    site.sign_in("approver")
    first = site.ask("/api/v1/audit?limit=2").json
    assert [each["what"] for each in first["records"]] == ["session.begin", "api.refuse"]
    second = site.ask(f"/api/v1/audit?limit=500&before={first['before']}").json
    assert second["records"][0]["number"] == first["before"] - 1
    assert (second["records"][-1]["number"], second["before"]) == (1, None)
    only = site.ask("/api/v1/audit?who=server&what=server").json["records"]
    assert [(each["kind"], each["what"]) for each in only] == [("server", "server.start")]


def test_alerts_are_for_everybody_and_webhooks_for_operators(site: Site) -> None:
    with opened(site.folder) as home:
        told = new_alert("device.stuck", "r77", NOW_MS, "d1 was asked", due_ms=NOW_MS + 10**9)
        home.store.save([told])
    site.sign_in("viewer")
    (alert,) = site.ask("/api/v1/alerts?about=r77").json
    assert (alert["kind"], alert["text"], alert["deliveries"]) == ("device.stuck", "d1 was asked", [])
    assert site.ask("/api/v1/webhooks").status == 403
    site.sign_in("operator")
    assert site.ask("/api/v1/webhooks").json == []


def test_a_decision_of_the_server_is_noted_with_its_record_in_one_transaction(site: Site) -> None:
    record = start_rollout(site.folder, "digits", "v1")
    decision = Decision(rollout=record.id, number=1, at_ms=NOW_MS, action="stop", text="8 of 9 failed")
    books = site.server._books
    assert books is not None
    with opened(site.folder) as home:
        home.store.save([record, decision, *books.traces([record, decision], NOW_MS)])
        (act,) = home.store.audit(what="rollout.stop", count_max=9)
        assert (act.by.kind, act.on, act.text) == ("server", record.id, "8 of 9 failed")
        assert [each.alert.kind for each in home.store.sent(record.id)] == ["rollout.stopped"]
        assert home.store.verify_audit().faults == []
