"""Who did what, and what was told, on the page: for approvers, by keys alone, in light and dark; and on a rollout's page."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from server import operations
from server.adapters.webhooks import new_secret
from server.alerts.settings import WebhookSettings
from server.rollout_orders import order_rollout
from tests.browser.conftest import sign_in
from tests.browser.lab import WAIT_S, BrowserLab
from tests.server.brokers import free_port

WAIT_MS = int(WAIT_S * 1000)


class _Yes(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def receiver() -> Iterator[str]:
    """The address of somebody who takes what is sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Yes)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, receiver: str) -> Iterator[BrowserLab]:
    """One rollout that is complete, one that was aborted; a webhook that takes everything, and one where nobody listens."""
    folder = tmp_path_factory.mktemp("lab")
    secret = folder / "hook.secret"
    secret.write_text(new_secret())
    ops = WebhookSettings(name="ops", url=f"{receiver}/T0KEN", secret=str(secret), per_minute=600)
    address = f"http://127.0.0.1:{free_port()}/T0KEN"
    away = WebhookSettings(name="away", url=address, secret=str(secret), events=("rollout.stopped",))
    lab = BrowserLab(folder, devices=2, webhooks=(ops, away))

    def is_state(state: str) -> bool:
        return operations.list_rollouts(lab.home)[-1].rollout.state == state

    operations.start_rollout(lab.home, "digits", "v2")
    lab.wait(lambda: is_state("finished"))
    operations.start_rollout(lab.home, "digits", "v1")
    order_rollout(lab.home, "r2", "abort", by="ada", reason="the wrong version")
    lab.wait(lambda: is_state("stopped"))
    yield lab
    lab.close()


def test_a_rollout_shows_what_was_told_of_it_and_to_whom(page: Page, lab: BrowserLab, shots: Path) -> None:
    sign_in(page, "viewer")
    expect(page.locator("nav")).not_to_contain_text("Audit")
    page.goto(lab.url + "#/rollouts/r2")
    alerts = page.locator("#alerts")
    expect(alerts).to_contain_text(
        "rollout.stopped: Rollout r2 of digits v1 has stopped: aborted by ada: the wrong version"
    )
    expect(alerts).to_contain_text("sent to ops", timeout=WAIT_MS)
    expect(alerts).to_contain_text("waits for away: ", timeout=WAIT_MS)
    expect(alerts).not_to_contain_text("T0KEN")
    page.goto(lab.url + "#/rollouts/r1")
    expect(alerts).to_contain_text("rollout.completed")
    expect(alerts.locator("li").last).to_contain_text("rollout.started")
    page.screenshot(path=shots / "alerts.png", full_page=True)
    page.goto(lab.url + "#/audit")
    expect(page.locator("#view")).to_contain_text("shown to approvers")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_approver_finds_who_did_what_with_keys_alone(
    page: Page, lab: BrowserLab, receiver: str, shots: Path, scheme: Any
) -> None:
    page.emulate_media(color_scheme=scheme)
    sign_in(page, "approver")
    page.focus("nav a[href='#/audit']")
    page.keyboard.press("Enter")
    rows = page.locator("#view table").first.locator("tbody tr")
    expect(rows.first).to_contain_text("session.begin")
    expect(rows.first).to_contain_text("approver, 127.0.0.1")
    expect(page.locator("#view")).to_contain_text(f"{receiver}/…")
    page.screenshot(path=shots / f"audit-{scheme}.png", full_page=True)
    assert Axe().run(page).response["violations"] == []
    page.focus("#what")
    page.keyboard.type("order.")
    expect(rows).to_have_count(1)
    expect(rows.first).to_contain_text("the wrong version")
    page.focus("#who")
    page.keyboard.type("nobody")
    expect(page.locator("#view")).to_contain_text("Nothing is noted that matches.")
    page.goto(lab.url + "#/rollouts/r2")
    page.wait_for_selector("#alerts li")
    assert Axe().run(page).response["violations"] == []


def test_a_narrow_screen_shows_all_of_it(page: Page, lab: BrowserLab) -> None:
    page.set_viewport_size({"width": 375, "height": 720})
    sign_in(page, "approver")
    for path in ("#/audit", "#/rollouts/r2"):
        page.goto(lab.url + path)
        page.wait_for_selector("#view h2")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, path
