"""Alerts on their way: a real HTTP receiver on loopback that fails, hangs, redirects and dribbles; a server that is killed meanwhile."""

import base64
import hashlib
import hmac
import json
import random
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import msgspec
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from protocol.ids import DeviceId
from protocol.messages import Report, UpdateReport, encode_message
from server import operations
from server.adapters import trail, webhooks
from server.adapters.clock import SystemClock
from server.adapters.store import SqlStore
from server.adapters.webhooks import ANSWER_BYTES_MAX, new_secret, post
from server.alerts import delivery as delivering
from server.alerts import sending
from server.alerts.delivery import Answer, parse_secrets
from server.alerts.records import Alert, Sent, new_alert
from server.alerts.sending import Sender
from server.alerts.settings import WebhookSettings
from server.alerts.watch import Watch
from server.cli import main
from server.config import config_text, read_config
from server.home import opened
from server.operations import RolloutPlan
from server.rollout_orders import order_rollout
from server.rollouts.evidence import Rules
from server.rollouts.records import MemberRecord
from server.rollouts.waves import parse_waves
from server.runtime import Server
from server.web.metrics import FleetCollector
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import free_port, wait_until

SECRET = new_secret()


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def told(self) -> dict[str, object]:
        return dict(json.loads(self.body))

    def is_signed(self, secret: str = SECRET) -> bool:
        """As a receiver checks it, by the text of Standard Webhooks."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        content = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
        is_new = abs(time.time() - int(self.headers["webhook-timestamp"])) < 300
        return f"v1,{expected}" in self.headers["webhook-signature"].split(" ") and is_new


@dataclass
class Receiver:
    """Answers as it is told: by status; 0 hangs, -1 dribbles."""

    answers: list[int] = field(default_factory=list)
    last: int = 204
    received: list[Received] = field(default_factory=list)
    address: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)

    def take(self, received: Received) -> int:
        self.received.append(received)
        return self.answers.pop(0) if self.answers else self.last


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status = self.receiver.take(Received(self.path, headers, body))
        if status == 0:
            self.receiver.is_over.wait(60)
            return
        if status == -1:
            self._dribble()
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("location", f"{self.receiver.address}/elsewhere")
        if status == 429:
            self.send_header("retry-after", "7")
        text = b"no! " * 100_000 if status >= 400 else b""
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        try:
            self.wfile.write(text)
        except OSError:
            return

    def _dribble(self) -> None:
        """A header that never ends, a letter at a time: no single wait is long."""
        try:
            self.wfile.write(b"HTTP/1.0 500 Slow\r\nX-More: ")
            while not self.receiver.is_over.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    handler = type("Handler", (_Handler,), {"receiver": receiver})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    receiver.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield receiver
    receiver.is_over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ops.secret").write_text(SECRET + "\n")
    return tmp_path


def _hook(receiver: Receiver | str, name: str = "ops", **fields: object) -> WebhookSettings:
    address = receiver if isinstance(receiver, str) else receiver.address
    hook = WebhookSettings(name=name, url=f"{address}/hook?x=1", secret="ops.secret", per_minute=600)
    return msgspec.structs.replace(hook, **fields)


def _post(folder: Path, hook: WebhookSettings) -> Answer:
    return post(folder, hook, {"webhook-id": "msg_1"}, b"{}")


# One attempt


def test_what_is_sent_is_a_post_and_any_answer_of_200_to_299_is_yes(receiver: Receiver, folder: Path) -> None:
    receiver.answers = [200, 204, 299]
    assert [_post(folder, _hook(receiver)).is_good for _ in range(3)] == [True] * 3
    assert receiver.received[0].path == "/hook?x=1"
    assert receiver.received[0].body == b"{}"


def test_a_redirect_is_not_followed(receiver: Receiver, folder: Path) -> None:
    for status in (301, 302, 307, 308):
        receiver.answers = [status]
        answer = _post(folder, _hook(receiver))
        assert (answer.is_good, answer.status) == (False, status)
        assert "a redirect: it is not followed" in answer.error
    assert {each.path for each in receiver.received} == {"/hook?x=1"}


def test_of_a_long_refusal_only_the_beginning_is_read(receiver: Receiver, folder: Path) -> None:
    receiver.answers = [429]
    answer = _post(folder, _hook(receiver))
    assert answer.retry_after_ms == 7000
    assert len(answer.error) <= ANSWER_BYTES_MAX + 20
    assert answer.error.startswith("answered 429: no! no!")


@pytest.mark.parametrize("status", [0, -1])
def test_a_receiver_that_hangs_or_dribbles_is_cut_off(
    receiver: Receiver, folder: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(webhooks, "TOTAL_S", 0.3)
    receiver.answers = [status]
    begun = time.monotonic()
    answer = _post(folder, _hook(receiver))
    assert time.monotonic() - begun < 5
    assert (answer.status, answer.error) == (0, webhooks._TOO_SLOW)


def test_nobody_there_and_a_wrong_certificate_are_said(
    receiver: Receiver, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "refused" in _post(folder, _hook(f"http://127.0.0.1:{free_port()}")).error
    monkeypatch.setenv("HTTPS_PROXY", receiver.address)  # no proxy of the environment is asked
    monkeypatch.setenv("HTTP_PROXY", receiver.address)
    assert "refused" in _post(folder, _hook(f"https://127.0.0.1:{free_port()}")).error
    assert _post(folder, _hook("https://127.0.0.1:1", ca="none.pem")).error.startswith("[[webhook]] ca: ")
    key, certificate = tmp_path / "k.pem", tmp_path / "c.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = type("Handler", (_Handler,), {"receiver": receiver})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_address[1]}"
    try:
        assert "certificate verify failed" in _post(folder, _hook(url)).error
        assert receiver.received == []
        assert _post(folder, _hook(url, ca="c.pem")).is_good
    finally:
        server.shutdown()
        server.server_close()


# The outbox


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "server"
    operations.init_repository(home, "lab", port=0)
    (home / "ops.secret").write_text(SECRET + "\n")
    return home


def _configure(home: Path, *hooks: WebhookSettings) -> None:
    (home / "whimbrel.toml").write_text(
        config_text(msgspec.structs.replace(read_config(home), webhooks=hooks))
    )


class _Sending:
    """A sender over a database, without the rest of the server."""

    def __init__(self, home: Path, *hooks: WebhookSettings) -> None:
        _configure(home, *hooks)
        config = read_config(home)
        self.store = SqlStore(config.database_url)
        self.store.check()
        rng = random.Random(1)
        self.sender = Sender(config.database_url, home, "lab", config.webhooks, SystemClock(), rng)

    def __enter__(self) -> Self:
        self.sender.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sender.stop()
        self.store.close()

    def tell(self, number: int = 1, **changes: object) -> Alert:
        now_ms = SystemClock().now_ms()
        alert = new_alert("rollout.paused", f"r{number}", now_ms, f"Rollout r{number} is paused")
        alert = msgspec.structs.replace(alert, **changes)
        self.store.save([alert])
        self.sender.wake()
        return alert

    def sent(self) -> dict[str, Sent]:
        return {sent.alert.about: sent for sent in self.store.sent()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivering, "RETRY_MS", 20)
    monkeypatch.setattr(sending, "POLL_S", 0.02)


def test_what_fails_arrives_later_under_the_same_id_and_signed_anew(receiver: Receiver, home: Path) -> None:
    receiver.answers = [500, 302, 404]
    with _Sending(home, _hook(receiver)) as sending_now:
        alert = sending_now.tell()
        assert wait_until(lambda: len(receiver.received) == 4)
        assert wait_until(lambda: sending_now.sent()["r1"].deliveries[0].state == "delivered")
        (done,) = sending_now.sent()["r1"].deliveries
        assert sending_now.sender.counters == {("ops", "failed"): 3, ("ops", "delivered"): 1}
    assert (done.attempts, done.status, done.error) == (4, 204, "")
    assert {each.id for each in receiver.received} == {alert.id}
    assert all(each.is_signed() for each in receiver.received)
    assert not receiver.received[0].is_signed(new_secret())
    data = receiver.received[0].told["data"]
    assert data == {"fleet": "lab", "about": "r1", "text": "Rollout r1 is paused", "details": {}}


def test_one_slow_receiver_holds_up_nobody_else(receiver: Receiver, home: Path) -> None:
    slow = Receiver(last=0)
    handler = type("Handler", (_Handler,), {"receiver": slow})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    slow.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with _Sending(home, _hook(slow, "slow"), _hook(receiver)) as sending_now:
            for number in range(5):
                sending_now.tell(number)
            assert wait_until(lambda: len(receiver.received) == 5)
            assert len(slow.received) == 1
            assert wait_until(lambda: sending_now.store.standings(["ops"])[0].delivered == 5)
            assert sending_now.store.standings(["slow"])[0].waiting == 5
            begun = time.monotonic()
        assert time.monotonic() - begun < 5  # nor the end of the server
    finally:
        slow.is_over.set()
        server.shutdown()
        server.server_close()


def test_only_what_is_asked_for_is_sent_and_never_faster_than_allowed(receiver: Receiver, home: Path) -> None:
    hook = _hook(receiver, events=("rollout.stopped",), per_minute=300)
    with _Sending(home, hook) as sending_now:
        for number in range(6):
            sending_now.tell(number, kind="rollout.stopped" if number % 2 else "rollout.paused")
        begun = time.monotonic()
        assert wait_until(lambda: len(receiver.received) == 3)
        assert time.monotonic() - begun > 0.3
        sent = sending_now.sent()
    assert sorted(str(each.told["data"]["about"]) for each in receiver.received) == ["r1", "r3", "r5"]  # type: ignore[index]  # an object
    assert [len(sent[f"r{number}"].deliveries) for number in range(6)] == [0, 1, 0, 1, 0, 1]


def test_of_too_many_that_wait_the_oldest_are_given_up_and_that_is_said(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trail, "WAITING_MAX", 3)
    monkeypatch.setattr(delivering, "RETRY_MS", 3_600_000)
    with _Sending(home, _hook(f"http://127.0.0.1:{free_port()}")) as sending_now:
        now_ms = SystemClock().now_ms()
        for number in range(5):
            sending_now.tell(number, due_ms=now_ms - 10 + number)
        assert wait_until(lambda: sending_now.store.standings(["ops"])[0].dropped == 2)
        sent = sending_now.sent()
    assert [sent[f"r{number}"].deliveries[0].state for number in range(2)] == ["dropped", "dropped"]
    assert sent["r0"].deliveries[0].error.startswith("more than 3 wait: ")
    assert sum("is given up" in each.message for each in caplog.records) == 2
    assert main(["webhooks", "list", "--dir", str(home), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["waiting"], told["dropped"], told["delivered"]) == (3, 2, 0)
    assert "refused" in told["failed"]["error"] or "more than 3 wait" in told["failed"]["error"]


def _silent(number: int) -> MemberRecord:
    return MemberRecord(
        rollout="r1", device=DeviceId(f"d{number}"), wave="rest", status="silent", sequence=1, asked_ms=1
    )


def test_a_thousand_devices_in_trouble_are_one_message(receiver: Receiver, home: Path) -> None:
    with _Sending(home, _hook(receiver)) as sending_now:
        watch, now_ms = Watch(), SystemClock().now_ms()
        for start in range(0, 1000, 100):
            members = [_silent(number) for number in range(start, start + 100)]
            sending_now.store.save([*members, *watch.look(members, now_ms - 29_500)])
        assert wait_until(lambda: receiver.received)
        assert not wait_until(lambda: len(receiver.received) > 1, 0.3)
    data = receiver.received[0].told["data"]
    assert isinstance(data, dict)
    assert (data["count"], len(data["devices"])) == (1000, 10)


def test_a_secret_is_read_each_time_and_two_are_used_during_a_change(receiver: Receiver, home: Path) -> None:
    new = new_secret()
    with _Sending(home, _hook(receiver)) as sending_now:
        (home / "ops.secret").unlink()
        sending_now.tell()
        assert wait_until(lambda: "secret: " in str(sending_now.store.standings(["ops"])[0].failed))
        (home / "ops.secret").write_text(f"{new}\n{SECRET}\n")
        assert wait_until(lambda: receiver.received)
    assert receiver.received[0].is_signed(new)
    assert receiver.received[0].is_signed(SECRET)


def test_the_command_tests_a_receiver_at_once(
    receiver: Receiver, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _configure(home, _hook(receiver))
    receiver.answers = [200, 500]
    assert main(["webhooks", "test", "ops", "--dir", str(home)]) == 0
    assert "answered 200" in capsys.readouterr().out
    assert receiver.received[0].told["type"] == "webhook.test"
    assert receiver.received[0].is_signed()
    assert main(["webhooks", "test", "ops", "--dir", str(home)]) == 1
    said = capsys.readouterr().err
    assert "answered 500" in said
    assert "hook" not in said.partition("/…")[0].removeprefix("whimbrel: ")  # nor the path of the address
    assert main(["webhooks", "test", "other", "--dir", str(home)]) == 1
    assert "known are: ops" in capsys.readouterr().err
    secret = home / "new.secret"
    assert main(["webhooks", "secret", str(secret)]) == 0
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(parse_secrets(secret.read_text(), "new")[0]) == 32
    assert secret.read_text().strip() not in capsys.readouterr().out
    assert main(["webhooks", "secret", str(secret)]) == 1  # never overwritten


# A whole server


@pytest.fixture
def released(tmp_path: Path, home: Path) -> Path:
    model = write_classifier(tmp_path / "model.onnx", seed=1)
    health = write_health_plan(tmp_path / "health.json")
    for version in ("v1", "v2"):
        operations.add_release(home, "digits", version, [model], runtime="onnx", health=health)
        operations.publish_release(home, "digits", version)
    return home


def _serve(home: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--dir", str(home), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["fleet"] == "lab"
    return process


def test_a_server_that_is_killed_between_event_and_delivery_tells_after_its_restart(
    receiver: Receiver, released: Path
) -> None:
    _configure(released, _hook(receiver, events=("rollout.stopped",)))
    receiver.answers = [0]  # it takes the first attempt, and never answers
    process = _serve(released)
    try:
        operations.start_rollout(released, "digits", "v2")
        order_rollout(released, "r1", "abort", by="ada", reason="wrong version")
        assert wait_until(lambda: receiver.received, 30)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    with opened(released) as there:
        (sent,) = [each for each in there.store.sent("r1") if each.alert.kind == "rollout.stopped"]
        assert [each.state for each in sent.deliveries] == ["waiting"]
        assert there.store.verify_audit().faults == []
    process = _serve(released)
    try:
        assert wait_until(lambda: len(receiver.received) == 2, 30)
        with opened(released) as there:
            assert wait_until(lambda: there.store.sent("r1")[0].deliveries[0].state == "delivered")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # a pipe
    first, second = receiver.received
    assert first.id == second.id == sent.alert.id
    assert second.is_signed()
    assert "aborted by ada: wrong version" in str(second.told["data"])


class _Fleet:
    """Devices that exist in their reports, which a real client sends through the broker."""

    def __init__(self, server: Server, names: list[str]) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="fleet")
        self.client.connect(*server.broker_address)
        self.client.loop_start()
        self.sequences = dict.fromkeys(names, 0)
        for name in names:
            self.say(name, None)

    def say(self, name: str, update: UpdateReport | None) -> None:
        self.sequences[name] += 1
        report = Report(
            device=name,
            sequence=self.sequences[name],
            state="idle",
            family="digits",
            version="v1",
            update=update,
        )
        self.client.publish(f"wb1.lab/dev/{name}/report", encode_message(report), 1).wait_for_publish(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def test_a_live_rollout_that_stops_sends_exactly_one_alert_with_the_evidence(
    receiver: Receiver, released: Path
) -> None:
    _configure(released, _hook(receiver, events=("rollout.stopped", "device.*")))
    server = Server(read_config(released), seed=1)
    with server:
        server.wait_connected(15)
        names = [f"d{number}" for number in range(6)]
        fleet = _Fleet(server, names)
        assert wait_until(lambda: len(server.look(lambda core: list(core.registry))) == 6)
        plan = RolloutPlan(waves=parse_waves("4,100%", [0]), rules=Rules(), in_flight_max=4, by="ada")
        operations.start_rollout(released, "digits", "v2", failures_max=None, plan=plan)
        with opened(released) as there:
            store = there.store
            assert wait_until(lambda: len(store.members("r1")) == 4, 30)
            for member in store.members("r1"):
                update = UpdateReport(
                    rollout="r1",
                    sequence=member.sequence,
                    version="v2",
                    outcome="rolled_back",
                    code="trial.answers",
                )
                fleet.say(member.device, update)
            assert wait_until(lambda: receiver.received, 30)
            assert not wait_until(lambda: len(receiver.received) > 1, 0.5)
            assert wait_until(lambda: store.sent("r1")[0].deliveries[0].state == "delivered")
            acts = [(each.by.kind, each.what) for each in store.audit(what="rollout.", count_max=9)]
        ((standing, counters),) = server.webhooks()
        figures = {
            (sample.name, *sample.labels.values()): sample.value
            for metric in FleetCollector(server).collect()
            for sample in metric.samples
            if sample.name.startswith("whimbrel_webhook")
        }
        fleet.close()
    assert figures == {
        ("whimbrel_webhook_waiting", "ops"): 0,
        ("whimbrel_webhook_attempts_total", "ops", "delivered"): 1,
        ("whimbrel_webhook_attempts_total", "ops", "failed"): 0,
        ("whimbrel_webhook_attempts_total", "ops", "dropped"): 0,
    }
    assert (standing.delivered, counters) == (1, {"delivered": 1, "failed": 0, "dropped": 0})
    assert acts == [("server", "rollout.stop"), ("server", "rollout.begin"), ("command", "rollout.start")]
    told = receiver.received[0].told
    assert told["type"] == "rollout.stopped"
    data = told["data"]
    assert isinstance(data, dict)
    assert "of the first" in data["text"]
    assert "the odds against the release are" in data["text"]
    assert data["details"]["failed"] >= 2


def test_a_server_notes_its_beginning_and_its_end(released: Path) -> None:
    with Server(read_config(released), seed=1):
        pass
    with opened(released) as there:
        noted: list[str] = [each.what for each in there.store.audit(who="server", count_max=9)]
    assert noted == ["server.stop", "server.start"]
