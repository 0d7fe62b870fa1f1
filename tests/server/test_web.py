"""The HTTP API and what keeps others out of it: a real server with its broker, a real listening socket."""

import json
import re
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import event

from protocol.errors import RequestError
from protocol.ids import DeviceId, Family, Version
from protocol.messages import Report, UpdateReport
from server.accounts import SESSION_MS, Accounts, Role, SessionRecord, UserRecord, may
from server.adapters.secrets import hash_password, is_password, new_token, token_digest
from server.cli import main
from server.config import HistorySettings, ServerConfig, WebSettings, config_text, read_config
from server.coordinator import Coordinator, CoordinatorLimits
from server.effects import Save
from server.events import LinkReceived, ReportReceived
from server.fleet.history import DeviceEvent
from server.fleet.registry import Registry
from server.home import opened
from server.operations import add_release, init_repository, publish_release
from server.runtime import Server
from server.web.access import COOKIE, Doors
from server.web.app import BODY_BYTES_MAX
from server.web.feed import Feed
from server.web.problems import SignInError, TooManyError
from server.web.serving import WebServer
from tests.models import write_classifier, write_health_plan

PASSWORD = "a whimbrel flies far"
DEVICE = DeviceId("device-1")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Site:
    """A server with its page, and somebody who asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "server"
        init_repository(self.folder, "lab", port=0)
        model = write_classifier(folder / "v1.onnx", seed=1)
        health = write_health_plan(folder / "health.json")
        for version in ("v1", "v2"):
            add_release(self.folder, "digits", version, [model], runtime="onnx", health=health)
        publish_release(self.folder, "digits", "v1")
        kept = hash_password(PASSWORD)
        with opened(self.folder) as home:
            for role in ("viewer", "operator", "approver"):
                user = UserRecord(name=role, role=role, password=kept, created_ms=1)
                home.store.change_accounts(partial(Accounts.add, user=user))
        self.server = Server(read_config(self.folder), seed=1)
        self.server.start()
        self.web = WebServer(self.server, WebSettings(port=0))
        self.web.start()
        self.cookie = self.csrf = ""

    def close(self) -> None:
        self.web.stop()
        self.server.stop()

    def ask(self, path: str, body: Any = None, method: str = "", **headers: str) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            sent.setdefault("Cookie", f"{COOKIE}={self.cookie}")
        if data is not None:
            sent["Content-Type"] = "application/json"
        request = urllib.request.Request(
            self.web.url + path, data, sent, method=method or ("GET" if data is None else "POST")
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                return self._read(error)

    def change(self, path: str, body: Any = None, method: str = "POST") -> Answer:
        return self.ask(path, {} if body is None else body, method, X_CSRF_Token=self.csrf)

    def sign_in(self, user: str, password: str = PASSWORD) -> Answer:
        self.cookie = ""
        answer = self.ask("/api/v1/session", {"user": user, "password": password})
        if answer.status == 200:
            found = re.search(rf"{COOKIE}=([^;]+)", answer.headers["set-cookie"])
            assert found
            self.cookie, self.csrf = found[1], answer.json["csrf"]
        return answer

    @staticmethod
    def _read(response: HTTPResponse | urllib.error.HTTPError) -> Answer:
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status or 0, headers, response.read().decode())


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()


@pytest.fixture
def site(shared_site: Site) -> Site:
    shared_site.cookie = shared_site.csrf = ""
    return shared_site


# Who may ask


def test_nothing_but_the_page_itself_is_shown_to_those_who_are_not_signed_in(site: Site) -> None:
    paths = site.ask("/api/openapi.json").json["paths"]
    assert len(paths) > 10
    for path, methods in paths.items():
        for method in methods:
            if path == "/api/v1/session" and method in {"get", "post"}:
                continue
            real = path.format(device="device-1", rollout="r1", family="digits", version="v1", action="pause")
            answer = site.ask(real, {} if method == "post" else None, method.upper())
            assert (answer.status, answer.json["code"]) == (401, "web.sign_in"), (method, path)
    assert site.ask("/").status == 200
    assert site.ask("/api/v1/session").status == 204


def test_a_wrong_password_and_an_unknown_name_are_told_alike(site: Site) -> None:
    wrong, unknown = site.sign_in("viewer", "not the password"), site.sign_in("nobody")
    assert (wrong.status, wrong.json) == (unknown.status, unknown.json)
    assert wrong.status == 401


def test_who_guesses_passwords_has_to_wait(site: Site) -> None:
    answers = [site.sign_in("guessed", f"guess {number}") for number in range(5)]
    assert [answer.status for answer in answers] == [401] * 5
    while answers[-1].status != 429:  # the waits double: soon they are longer than a guess takes
        answers.append(site.sign_in("guessed", "another guess"))
        assert len(answers) < 14
    assert int(answers[-1].headers["retry-after"]) >= 1


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at_ms = 1_000_000

    def now_ms(self) -> int:
        return self.at_ms


def test_the_wait_doubles_and_ends_with_the_right_password() -> None:
    clock = Hand()
    doors = Doors(clock)
    user = UserRecord(name="a", role="viewer", password=hash_password(PASSWORD), created_ms=0)
    waits = []
    for _ in range(9):
        with pytest.raises(SignInError):
            doors.check(user, "a", "wrong")
        try:
            doors.check(user, "a", "wrong")
        except TooManyError as error:
            waits.append(error.retry_after_s)
            clock.at_ms += error.retry_after_s * 1000
        except SignInError:
            continue
    assert waits == [2, 3, 5, 9, 17, 33, 61] or waits == sorted(waits)
    assert doors.check(user, "a", PASSWORD) is user
    with pytest.raises(SignInError):
        doors.check(user, "a", "wrong")  # and counts from the beginning
    assert doors.check(user, "a", PASSWORD) is user


def test_the_cookie_cannot_be_read_by_scripts_nor_sent_by_other_pages(site: Site) -> None:
    cookie = site.sign_in("viewer").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_the_server_keeps_no_secret_that_could_be_used(site: Site) -> None:
    site.sign_in("viewer")
    data = b"".join(path.read_bytes() for path in site.folder.glob("whimbrel.sqlite*"))
    assert site.cookie.encode() not in data
    assert PASSWORD.encode() not in data
    assert token_digest(site.cookie).encode() in data


def test_who_signs_out_is_out(site: Site) -> None:
    site.sign_in("viewer")
    assert site.ask("/api/v1/fleet").status == 200
    assert site.ask("/api/v1/session", method="DELETE", X_CSRF_Token=site.csrf).status == 204
    assert site.ask("/api/v1/fleet").status == 401


def test_a_request_looks_up_one_sign_in_and_its_user_however_many_there_are(site: Site) -> None:
    site.sign_in("viewer")
    store = site.web._store
    assert store is not None
    asked: list[tuple[str, Any]] = []

    def note(*given: Any) -> None:
        asked.append(given[2:4])

    event.listen(store._engine, "before_cursor_execute", note)
    assert site.ask("/api/v1/session").status == 200
    event.remove(store._engine, "before_cursor_execute", note)
    with closing(sqlite3.connect(site.folder / "whimbrel.sqlite")) as database:
        plans = [
            row[-1]
            for query, values in asked
            if query != "BEGIN"
            for row in database.execute(f"EXPLAIN QUERY PLAN {query}", values)
        ]
    assert [plan.split(" USING INDEX ")[0] for plan in plans] == ["SEARCH sessions", "SEARCH users"]


def test_another_page_cannot_act_with_the_cookie_of_a_browser(site: Site) -> None:
    site.sign_in("approver")
    order = {"family": "digits", "version": "v1"}
    for header in ({}, {"X_CSRF_Token": "guessed"}, {"X_CSRF_Token": ""}):
        answer = site.ask("/api/v1/rollouts", order, **header)
        assert (answer.status, answer.json["code"]) == (403, "web.denied")
    assert site.ask("/api/v1/rollouts").json == []


@pytest.mark.parametrize(
    ("user", "path", "status"),
    [
        ("viewer", "/api/v1/rollouts", 403),
        ("viewer", "/api/v1/releases/digits/v2/publish", 403),
        ("operator", "/api/v1/releases/digits/v2/publish", 403),
        ("operator", "/api/v1/releases/digits/v1/withdraw", 403),
        ("viewer", "/api/v1/rollouts/r1/orders", 403),
        ("operator", "/api/v1/rollouts", 404),
        ("approver", "/api/v1/rollouts", 404),
    ],
)
def test_each_role_may_do_what_is_its_own(site: Site, user: str, path: str, status: int) -> None:
    site.sign_in(user)
    order: dict[str, object] = {}
    if path.endswith("rollouts"):
        order = {"family": "unknown", "version": "v1"}
    if path.endswith("orders"):
        order = {"action": "pause", "seen": 0}
    assert site.change(path, order).status == status


def test_a_token_of_a_program_needs_no_header_and_is_no_cookie(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["users", "token", "viewer", "--days", "1", "--dir", str(site.folder), "--json"]) == 0
    token = json.loads(capsys.readouterr().out)["token"]
    assert site.ask("/api/v1/fleet", Authorization=f"Bearer {token}").json["fleet"] == "lab"
    assert site.ask("/metrics", Authorization=f"Bearer {token}").status == 200
    assert site.ask("/api/v1/fleet", Cookie=f"{COOKIE}={token}").status == 401
    site.sign_in("viewer")
    assert site.ask("/api/v1/fleet", Authorization=f"Bearer {site.cookie}", Cookie="").status == 401


def test_every_answer_forbids_what_the_page_does_not_need(site: Site) -> None:
    for path in ("/", "/static/app.js", "/api/v1/fleet", "/nowhere"):
        headers = site.ask(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_asks_nobody_else() -> None:
    static = Path(__file__).parents[2] / "server" / "web" / "static"
    for path in static.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path.name
        assert "innerHTML" not in text, path.name


# What is answered


def test_the_fleet_is_empty_and_says_so(site: Site) -> None:
    site.sign_in("viewer")
    fleet = site.ask("/api/v1/fleet").json
    assert (fleet["devices"], fleet["rollouts"], fleet["air"]["saved_share"]) == (0, [], None)


def test_releases_are_told_with_files_and_state(site: Site) -> None:
    site.sign_in("viewer")
    listed = {each["version"]: each for each in site.ask("/api/v1/releases").json}
    assert listed["v1"]["state"] == "published"
    assert listed["v2"]["state"] == "draft"
    details = site.ask("/api/v1/releases/digits/v1").json
    assert details["files"][0]["bytes"] == details["bytes"] > 0
    assert details["prompts"] > 0


@pytest.mark.parametrize(
    "path",
    ["/api/v1/devices/unknown", "/api/v1/rollouts/r99", "/api/v1/releases/digits/v9", "/api/v1/nothing"],
)
def test_what_is_not_there_is_told_with_a_code(site: Site, path: str) -> None:
    site.sign_in("viewer")
    answer = site.ask(path)
    assert answer.status == 404
    assert answer.json["code"]
    assert answer.json["message"]


def test_a_field_that_is_wrong_is_named(site: Site) -> None:
    site.sign_in("operator")
    answer = site.change("/api/v1/rollouts", {"family": "digits", "version": "v1", "in_flight_max": 0})
    assert answer.status == 422
    assert answer.json["message"].startswith("body.in_flight_max")
    waves = site.change("/api/v1/rollouts", {"family": "digits", "version": "v1", "waves": "50%,10%"})
    assert (waves.status, "10%" in waves.json["message"]) == (409, True)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Content-Length", str(BODY_BYTES_MAX + 1)),
        ("Content-Length", "1" + "0" * 15),
        ("Transfer-Encoding", "chunked"),
    ],
    ids=["long", "endless", "unknown"],
)
def test_a_body_that_is_too_long_is_refused_before_it_is_read(site: Site, header: str, value: str) -> None:
    connection = HTTPConnection(site.web.url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/api/v1/session")
    connection.putheader(header, value)
    connection.endheaders()  # and nothing follows
    with connection.getresponse() as answer:
        assert (answer.status, json.loads(answer.read())["code"]) == (413, "web.too_long")
    connection.close()


def test_a_body_of_the_greatest_length_is_read(site: Site) -> None:
    rest = BODY_BYTES_MAX - len(json.dumps({"user": "viewer", "password": ""}))
    answer = site.ask("/api/v1/session", {"user": "viewer", "password": "x" * rest})
    assert (answer.status, answer.json["code"]) == (422, "web.field")


def test_a_path_says_all_its_methods(site: Site) -> None:
    answer = site.ask("/api/v1/session", method="PUT")
    assert (answer.status, answer.headers["allow"]) == (405, "DELETE, GET, POST")


def test_metrics_are_in_the_format_of_prometheus(site: Site) -> None:
    site.sign_in("viewer")
    answer = site.ask("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "whimbrel_devices 0.0" in answer.text
    assert "# HELP whimbrel_devices_online" in answer.text


# Devices, without a broker


def report(sequence: int, state: str = "idle", version: str = "v1", **update: Any) -> Report:
    about = UpdateReport(rollout="r1", sequence=1, version="v2", **update) if update else None
    return Report(
        device=DEVICE, sequence=sequence, state=state, family="digits", version=version, update=about
    )


def told(coordinator: Coordinator, *events: Any) -> list[DeviceEvent]:
    effects = [effect for at, event in enumerate(events) for effect in coordinator.handle(event, 1000 + at)]
    return [
        each.record for each in effects if isinstance(each, Save) and isinstance(each.record, DeviceEvent)
    ]


def test_a_devices_story_is_what_changed() -> None:
    coordinator = Coordinator(CoordinatorLimits(keeps_history=True))
    story = told(
        coordinator,
        LinkReceived(DEVICE, is_online=True),
        ReportReceived(DEVICE, report(1)),
        ReportReceived(DEVICE, report(2, "downloading", outcome="running", received_bytes=10)),
        ReportReceived(DEVICE, report(3, "downloading", outcome="running", received_bytes=20)),
        ReportReceived(DEVICE, report(4, "idle", outcome="rolled_back", code="trial.answers")),
        ReportReceived(DEVICE, report(4, "trial", outcome="running")),
        LinkReceived(DEVICE, is_online=False),
    )
    assert [(each.state, each.outcome, each.is_online) for each in story] == [
        ("", "", True),
        ("idle", "", True),
        ("downloading", "running", True),
        ("idle", "rolled_back", True),
        ("idle", "rolled_back", False),
    ]
    assert [each.at_ms for each in story] == [1000, 1001, 1002, 1004, 1006]


def test_a_simulated_server_keeps_no_story() -> None:
    assert told(Coordinator(), ReportReceived(DEVICE, report(1))) == []


def test_stories_are_read_back_in_order_and_forgotten_by_age(tmp_path: Path) -> None:
    init_repository(tmp_path / "server", "lab")
    with opened(tmp_path / "server") as home:
        event = DeviceEvent(device=DEVICE, at_ms=0, is_online=True, state="idle", family="digits", version="")
        home.store.save([replace(event, at_ms=at) for at in range(10)])
        home.store.save([replace(event, device=DeviceId("other"), at_ms=5)])
        assert [each.at_ms for each in home.store.device_events(DEVICE, 4)] == [6, 7, 8, 9]
        home.store.forget_device_events(8)
        assert [each.at_ms for each in home.store.device_events(DEVICE, 100)] == [8, 9]
        assert home.store.device_events(DeviceId("other"), 100) == []


def test_a_registry_tells_what_changed_since() -> None:
    registry = Registry()
    for name in ("a", "b", "c"):
        registry.put(replace(registry.get(DeviceId(name)), seen_ms=1))
    seen = registry.revision
    assert registry.changed_since(seen) == []
    registry.put(replace(registry.get(DeviceId("a")), seen_ms=2))
    assert [each.device for each in registry.changed_since(seen)] == ["a"]
    assert [each.device for each in registry.changed_since(0)] == ["a", "c", "b"]


def test_pages_that_listen_get_everything_first(site: Site) -> None:
    site.sign_in("viewer")
    request = urllib.request.Request(
        site.web.url + "/api/v1/events", headers={"Cookie": f"{COOKIE}={site.cookie}"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        lines = [response.readline().decode().strip() for _ in range(8)]
    assert lines[0] == "retry: 2000"
    assert lines[2:4] == ["event: all", "data: []"]
    assert lines[5] == "event: fleet"
    assert json.loads(lines[6].removeprefix("data: "))["fleet"] == "lab"


def test_nobody_is_listened_to_beyond_the_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.sign_in("viewer")
    monkeypatch.setattr(Feed, "is_full", True)
    answer = site.ask("/api/v1/events")
    assert (answer.status, answer.json["code"]) == (429, "web.too_many")


# Accounts


def account(name: str, role: Role = "viewer") -> UserRecord:
    return UserRecord(name=name, role=role, password="", created_ms=0)


def session(digest: str, user: str, created_ms: int = 0) -> SessionRecord:
    return SessionRecord(
        digest=digest, user=user, kind="page", created_ms=created_ms, expires_ms=created_ms + SESSION_MS
    )


def test_roles_include_the_ones_below() -> None:
    roles: list[Role] = ["viewer", "operator", "approver"]
    assert [[may(held, needed) for needed in roles] for held in roles] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_a_session_ends_with_its_time_and_with_its_user() -> None:
    accounts = Accounts([account("a")], [session("1", "a"), session("2", "gone")])
    assert accounts.holder("1", SESSION_MS - 1) is not None
    assert accounts.holder("1", SESSION_MS) is None
    assert accounts.holder("2", 0) is None
    assert [type(each).__name__ for each in accounts.remove("a")] == ["UserRemoval", "SessionRemoval"]


def test_a_new_password_ends_what_was_signed_in_with_the_old_one() -> None:
    accounts = Accounts([account("a")], [session("1", "a"), session("2", "b")])
    assert [getattr(each, "digest", "") for each in accounts.change("a", password="new")] == ["", "1"]
    assert len(accounts.change("a", role="operator")) == 1


def test_the_oldest_of_too_many_sessions_ends() -> None:
    held = [session(str(number), "a", number) for number in range(50)]
    ended = Accounts([account("a")], held).begin(session("new", "a", 60), 60)
    assert [getattr(each, "digest", "") for each in ended] == ["0", "new"]


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "-a", "a" * 65, "a b"])
def test_names_that_are_not_allowed_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="not allowed"):
        Accounts([], []).add(account(name))


def test_a_password_that_was_kept_is_the_only_one() -> None:
    kept = hash_password("one")
    assert is_password("one", kept)
    assert not is_password("two", kept)
    assert not is_password("one", "not a hash")
    assert new_token() != new_token()


def test_users_are_made_and_ended_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "server")
    init_repository(tmp_path / "server", "lab")
    password = tmp_path / "password"
    password.write_text("too short\n")
    add = ["users", "add", "ada", "--role", "operator", "--password-file", str(password), "--dir", folder]
    assert main(add) == 1
    assert "12 to 256" in capsys.readouterr().err
    password.write_text("long enough for everybody\n")
    assert main(add) == 0
    assert main(add) == 1
    assert "there is a user ada" in capsys.readouterr().err
    assert main(["users", "role", "ada", "approver", "--dir", folder]) == 0
    assert main(["users", "token", "nobody", "--dir", folder]) == 1
    assert main(["users", "password", "ada", "--password-file", str(password), "--dir", folder]) == 0
    capsys.readouterr()
    assert main(["users", "list", "--dir", folder, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["role"]) == ("ada", "approver")
    assert main(["users", "remove", "ada", "--dir", folder]) == 0
    assert main(["users", "remove", "ada", "--dir", folder]) == 1


# Settings


def test_passwords_do_not_cross_a_network_in_the_clear(tmp_path: Path) -> None:
    init_repository(tmp_path / "server", "lab")
    file = tmp_path / "server" / "whimbrel.toml"
    text = file.read_text()
    for table, is_allowed in (
        ('host = "0.0.0.0"', False),
        ('host = "0.0.0.0"\nurl = "http://fleet.example"', False),
        ('host = "0.0.0.0"\nurl = "https://fleet.example"', True),
        ('host = "0.0.0.0"\ncertificate = "a.pem"\nkey = "a.key"', True),
        ('certificate = "a.pem"', False),
        ('url = "https://fleet.example/path"', False),
        ('host = "::1"', True),
        ("port = 70000", False),
    ):
        file.write_text(f"{text}\n[web]\n{table}\n")
        if is_allowed:
            assert read_config(tmp_path / "server").web is not None
        else:
            with pytest.raises(RequestError, match="web"):
                read_config(tmp_path / "server")


def test_settings_are_written_as_they_are_read(tmp_path: Path) -> None:
    init_repository(tmp_path / "server", "lab")
    config: ServerConfig = replace(
        read_config(tmp_path / "server"),
        web=WebSettings(port=81, url="https://fleet.example"),
        history=HistorySettings(device_days=7),
    )
    (tmp_path / "server" / "whimbrel.toml").write_text(config_text(config))
    assert read_config(tmp_path / "server") == config


def test_an_address_that_is_taken_is_named(site: Site) -> None:
    port = int(site.web.url.rpartition(":")[2])
    with pytest.raises(RequestError, match=f"127.0.0.1:{port}"):
        WebServer(site.server, WebSettings(port=port)).start()
    assert site.ask("/").status == 200
    assert threading.active_count() < 50


def test_a_rollout_is_started_and_seen(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        site.sign_in("operator")
        made = site.change("/api/v1/rollouts", {"family": "digits", "version": "v1"})
        assert (made.status, made.json["id"]) == (201, "r1")
        again = site.change("/api/v1/rollouts", {"family": "digits", "version": "v1"})
        assert (again.status, "under way" in again.json["message"]) == (409, True)
        draft = site.change("/api/v1/rollouts", {"family": "digits", "version": "v2"})
        assert draft.status == 409
        details = site.ask("/api/v1/rollouts/r1").json
        assert (details["created_by"], details["orders"], len(details["waves"])) == ("operator", 0, 2)
        assert details["evidence"]["stop_line"][:5] == [2, 2, 3, 3, 3]
        promote = site.change("/api/v1/rollouts/r1/orders", {"action": "promote", "seen": 0})
        assert promote.status == 403
        aborted = site.change(
            "/api/v1/rollouts/r1/orders", {"action": "abort", "reason": "a mistake", "seen": 0}
        )
        assert (aborted.status, aborted.json["by"]) == (201, "operator")
        second = site.change("/api/v1/rollouts/r1/orders", {"action": "abort", "seen": 0})
        assert (second.status, second.json["code"]) == (409, "request.conflict")
        assert "a mistake" in second.json["message"]
        site.sign_in("approver")
        assert site.change("/api/v1/releases/digits/v2/publish").json["state"] == "published"
        assert site.ask("/api/v1/releases/digits/v2").json["state"] == "published"
        assert site.change("/api/v1/releases/digits/v2/publish").status == 409
        assert site.change("/api/v1/releases/digits/v2/withdraw").json["state"] == "withdrawn"
        assert {each["version"]: each["state"] for each in site.ask("/api/v1/releases").json}[
            "v2"
        ] == "withdrawn"
        with opened(site.folder) as home:
            record = home.store.release(Family("digits"), Version("v2"))
        assert record is not None
        assert record.published_ms is not None
    finally:
        site.close()
