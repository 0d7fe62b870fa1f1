"""What is told of, and when: records in, alerts out; how a message is signed and tried again. No network, no clock."""

import base64
import hashlib
import hmac
import json

import msgspec
import pytest

from protocol.errors import RequestError
from protocol.ids import DeviceId, Family, Version
from protocol.messages import Report
from server.alerts.delivery import (
    AGE_MS_MAX,
    RETRY_MS,
    RETRY_MS_MAX,
    Answer,
    attempted,
    headers,
    message,
    parse_secrets,
    secret_text,
)
from server.alerts.records import KINDS, Alert, Delivery, new_alert
from server.alerts.settings import WebhookSettings, check_url, checked_webhooks
from server.alerts.watch import AMEND_MS, GROUP_INTERVAL_MS, GROUP_WAIT_MS, Watch
from server.audit import Act
from server.fleet.registry import DeviceRecord
from server.rollouts.records import Decision, MemberRecord, MemberStatus, RolloutRecord
from tests.server.samples import NOW_MS

SECRET = bytes(range(32))
ROLLOUT = RolloutRecord(id="r1", family=Family("digits"), version=Version("v2"), created_ms=NOW_MS)


def _member(device: int, status: MemberStatus, stage: str = "", code: str = "") -> MemberRecord:
    return MemberRecord(
        rollout="r1", device=DeviceId(f"d{device}"), wave="rest", status=status, stage=stage, code=code, sequence=1, asked_ms=1
    )  # fmt: skip


def _alerts(found: list[Alert | Act]) -> list[Alert]:
    return [each for each in found if isinstance(each, Alert)]


def _decision(action: str, number: int = 1, text: str = "8 of the first 9 devices failed") -> Decision:
    return Decision(
        rollout="r1",
        number=number,
        at_ms=NOW_MS,
        action=action,
        wave="canary",
        text=text,
        numbers={"failed": 8},
    )


def test_a_rollout_that_stops_is_told_at_once_with_the_evidence_in_words() -> None:
    alert, act = sorted(
        Watch().look([ROLLOUT, _decision("stop")], NOW_MS), key=lambda each: isinstance(each, Act)
    )
    assert isinstance(alert, Alert)
    assert (alert.kind, alert.about, alert.due_ms) == ("rollout.stopped", "r1", NOW_MS)
    assert alert.text == "Rollout r1 of digits v2 has stopped: 8 of the first 9 devices failed"
    assert alert.details["failed"] == 8
    assert isinstance(act, Act)
    assert (act.by.kind, act.what, act.on, act.text) == (
        "server",
        "rollout.stop",
        "r1",
        "8 of the first 9 devices failed",
    )


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("begin", "rollout.started"),
        ("widen", "rollout.wave_passed"),
        ("pause", "rollout.paused"),
        ("resume", "rollout.resumed"),
        ("promote", "rollout.promoted"),
        ("abort", "rollout.stopped"),
        ("finish", "rollout.completed"),
        ("extend", ""),
        ("refuse", ""),
    ],
)
def test_every_decision_is_noted_and_those_that_matter_to_others_are_told(action: str, kind: str) -> None:
    found = Watch().look([ROLLOUT, _decision(action)], NOW_MS)
    assert [each.what for each in found if isinstance(each, Act)] == [f"rollout.{action}"]
    assert [each.kind for each in _alerts(found)] == ([kind] if kind else [])


def test_a_thousand_devices_in_the_same_trouble_are_one_alert_with_their_number() -> None:
    watch = Watch()
    ids = set()
    for device in range(1000):
        (alert,) = _alerts(watch.look([_member(device, "silent")], NOW_MS + device))
        ids.add(alert.id)
    assert len(ids) == 1
    assert (alert.kind, alert.count, alert.due_ms) == ("device.stuck", 1000, NOW_MS + GROUP_WAIT_MS)
    assert alert.devices == tuple(f"d{number}" for number in range(10))
    assert alert.text.startswith("1000 devices of rollout r1: each was asked")
    assert watch.look([_member(5, "silent")], NOW_MS + 2000) == []  # known already


def test_after_an_alert_the_next_one_of_its_kind_waits_longer_and_says_how_many_there_were() -> None:
    watch = Watch()
    (first,) = _alerts(watch.look([_member(1, "silent", "trial")], NOW_MS))
    assert (first.kind, first.text.startswith("d1 of rollout r1 did not come back")) == (
        "device.unrecoverable",
        True,
    )
    late_ms = first.due_ms - AMEND_MS  # it may be on its way
    (second,) = _alerts(watch.look([_member(2, "silent", "trial")], late_ms))
    assert second.id != first.id
    assert second.due_ms == first.due_ms + GROUP_INTERVAL_MS
    (second,) = _alerts(watch.look([_member(3, "silent", "trial")], late_ms + 1))
    assert (second.count, second.devices) == (2, ("d2", "d3"))
    assert "2 devices of rollout r1 (3 so far)" in second.text


def test_a_restart_neither_repeats_what_was_told_nor_forgets_what_waits() -> None:
    members = [_member(number, "silent") for number in range(3)]
    (before,) = _alerts(Watch().look(members, NOW_MS))
    watch = Watch(members=members, alerts=[before])
    assert watch.look(members, NOW_MS + 10) == []
    (after,) = _alerts(watch.look([_member(7, "silent")], NOW_MS + 20))
    assert (after.id, after.count, after.details) == (before.id, 4, {"devices_total": 4})


def test_troubles_are_told_apart_and_good_news_is_no_trouble() -> None:
    found = Watch().look(
        [
            _member(1, "silent"),
            _member(2, "silent", "committing"),
            _member(3, "failed", code="operator.unservable"),
            _member(4, "rolled_back"),
            _member(5, "committed"),
            _member(6, "rejected"),
        ],
        NOW_MS,
    )
    assert {each.kind: each.devices for each in _alerts(found)} == {
        "device.stuck": ("d1",),
        "device.unrecoverable": ("d2", "d3"),
    }


def test_a_device_that_says_somebody_else_speaks_is_told_once_until_it_is_over() -> None:
    def seen(alarm: str) -> DeviceRecord:
        report = Report(
            device="d1", sequence=1, state="idle", family="digits", version="v1", alarm=alarm or msgspec.UNSET
        )
        return DeviceRecord(device=DeviceId("d1"), report=report)

    watch = Watch()
    (alert,) = _alerts(watch.look([seen("trust.director")], NOW_MS))
    assert (alert.kind, alert.about) == ("device.alarm", "fleet")
    assert watch.look([seen("trust.director")], NOW_MS + 1) == []
    assert watch.look([seen("")], NOW_MS + 2) == []
    assert len(_alerts(watch.look([seen("trust.director")], NOW_MS + 3))) == 1


# Messages


def test_a_message_is_signed_as_standard_webhooks_says() -> None:
    alert = new_alert("rollout.stopped", "r1", NOW_MS, "stopped", key="5")
    body = message(alert, "lab", "https://fleet.example")
    sent = headers(alert, body, [SECRET, b"x" * 24], NOW_MS + 1500)
    assert sent["webhook-timestamp"] == str((NOW_MS + 1500) // 1000)
    content = f"{alert.id}.{sent['webhook-timestamp']}.".encode() + body
    first, second = sent["webhook-signature"].split(" ")
    assert first == "v1," + base64.b64encode(hmac.new(SECRET, content, hashlib.sha256).digest()).decode()
    assert second != first
    told = json.loads(body)
    assert set(told) == {"type", "timestamp", "data"}
    assert told["type"] == "rollout.stopped"
    assert told["timestamp"].endswith("Z")
    assert told["data"]["url"] == "https://fleet.example/#/rollouts/r1"


def test_the_signature_is_that_of_the_example_of_standard_webhooks() -> None:
    """The values of its own libraries' tests."""
    (secret,) = parse_secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "example")
    alert = msgspec.structs.replace(new_alert("webhook.test", "x", 0, ""), id="msg_p5jXN8AQM9LWM0D4loKWxJek")
    sent = headers(alert, b'{"test": 2432232314}', [secret], 1614265330_000)
    assert sent["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        "whsec_",
        "whsec_****",
        f"whsec_{base64.b64encode(b'short').decode()}",
        "\n".join([secret_text(SECRET)] * 3),
    ],
)
def test_a_secret_that_is_none_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_secrets(text, "hook.secret")
    assert "hook.secret" in caught.value.message
    assert "****" not in str(caught.value)


def _delivery(**changes: object) -> Delivery:
    return msgspec.structs.replace(
        Delivery(webhook="ops", alert="msg_1", since_ms=NOW_MS, next_ms=NOW_MS), **changes
    )


def test_what_fails_is_tried_again_later_and_later_for_three_days() -> None:
    delivery = _delivery()
    waits, now_ms = [], NOW_MS
    while delivery.state == "waiting":
        delivery = attempted(delivery, Answer(503, "answered 503"), now_ms, 1.0)
        waits.append(delivery.next_ms - now_ms)
        now_ms = delivery.next_ms
    assert waits[:4] == [RETRY_MS, 3 * RETRY_MS, 9 * RETRY_MS, 27 * RETRY_MS]
    assert max(waits) == RETRY_MS_MAX
    assert now_ms > NOW_MS + AGE_MS_MAX - RETRY_MS_MAX
    assert delivery.state == "dropped"
    assert delivery.error == f"given up after {delivery.attempts} attempts: answered 503"
    assert delivery.attempts < 90


def test_waits_are_spread_and_a_receiver_may_ask_for_more() -> None:
    waits = {
        attempted(_delivery(), Answer(500), NOW_MS, chance).next_ms - NOW_MS for chance in (0.0, 0.5, 1.0)
    }
    assert waits == {RETRY_MS // 2, RETRY_MS * 3 // 4, RETRY_MS}
    assert attempted(_delivery(), Answer(429, retry_after_ms=60_000), NOW_MS, 0.5).next_ms == NOW_MS + 60_000
    assert (
        attempted(_delivery(), Answer(429, retry_after_ms=10**9), NOW_MS, 0.5).next_ms
        == NOW_MS + RETRY_MS_MAX
    )


def test_what_arrived_is_done_and_a_receiver_that_is_gone_is_believed() -> None:
    done = attempted(_delivery(error="answered 500", attempts=2), Answer(204), NOW_MS + 5, 0.5)
    assert (done.state, done.error, done.attempts, done.status) == ("delivered", "", 3, 204)
    gone = attempted(_delivery(), Answer(410, "answered 410"), NOW_MS, 0.5)
    assert (gone.state, gone.error) == ("dropped", "answered 410: the receiver wants no more")
    said = attempted(_delivery(), Answer(500, "answered 500: \x1b[31m\n" + "x" * 999), NOW_MS, 0.5)
    assert said.error.isprintable()
    assert len(said.error) <= 300


# Settings


@pytest.mark.parametrize(
    "url", ["https://hooks.example/x?y=1", "http://127.0.0.1:9000", "http://[::1]:80/a", "http://localhost/x"]
)
def test_addresses_that_alerts_may_go_to(url: str) -> None:
    assert check_url(url).hostname


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hooks.example/x", "in the clear"),
        ("http://10.0.0.1/", "in the clear"),
        ("http://127.0.0.1.nip.example/", "in the clear"),
        ("https://user:word@hooks.example/", "password"),
        ("https://hooks.example/#x", "fragment"),
        ("ftp://hooks.example/", "no address"),
        ("file:///etc/passwd", "no address"),
        ("https:///x", "no address"),
        ("https://hooks.example:99999/", "url"),
        ("https://[::1/", "url"),
        ("https://hooks.example/a b", "ASCII"),
        ("https://hooks.example/" + "x" * 2000, "longer"),
        ("", "no address"),
    ],
)
def test_addresses_that_are_refused_and_why(url: str, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        check_url(url)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "Bad Name"}, "name = 'Bad Name'"),
        ({"events": ("rollout.stoped",)}, "there is no 'rollout.stoped'"),
        ({"events": ("rollouts.*",)}, "there is no"),
        ({"events": ()}, "none"),
        ({"secret": ""}, "secret is empty"),
        ({"url": "http://hooks.example"}, "ops: url would send alerts in the clear"),
    ],
)
def test_settings_that_are_refused_name_the_webhook_and_the_field(
    changes: dict[str, object], why: str
) -> None:
    good = WebhookSettings(name="ops", url="https://hooks.example/x", secret="ops.secret")
    assert checked_webhooks([good], "whimbrel.toml") == (good,)
    with pytest.raises(RequestError, match=why):
        checked_webhooks([msgspec.structs.replace(good, **changes)], "whimbrel.toml")
    with pytest.raises(RequestError, match="two"):
        checked_webhooks([good, good], "whimbrel.toml")


def test_a_webhook_gets_what_it_asks_for_and_never_shows_the_path_of_its_address() -> None:
    hook = WebhookSettings(
        name="ops", url="https://hooks.example/T0KEN", secret="s", events=("rollout.*", "device.stuck")
    )
    wanted = {kind for kind in KINDS if hook.wants(new_alert(kind, "x", 0, ""))}
    assert wanted == {kind for kind in KINDS if kind.startswith("rollout.")} | {"device.stuck"}
    assert hook.shown_url == "https://hooks.example/…"
