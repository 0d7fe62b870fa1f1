"""What people do with the page: sign in, start a rollout, watch it, see a bad version come back; with keys alone, in the dark, in their hundreds."""

import itertools
import json
import re
import threading
import time
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as mqtt
import pytest
from axe_playwright_python.sync_playwright import Axe
from paho.mqtt.enums import CallbackAPIVersion
from playwright.sync_api import Page, expect

from protocol.messages import Link, Report, UpdateReport, encode_message
from server.rollout_orders import order_rollout
from tests.browser.conftest import sign_in
from tests.browser.lab import FAMILY, WAIT_S, BrowserLab

WAIT_MS = int(WAIT_S * 1000)
PAGES = (
    "#/",
    "#/rollouts",
    "#/rollouts/r1",
    "#/devices",
    "#/devices/device-000",
    "#/releases",
    "#/releases/digits/v2",
)


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(60):
        if page.evaluate("selector => document.activeElement?.matches(selector) ?? false", selector):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"no key leads to {selector}")


def test_a_rollout_is_started_with_keys_alone_and_watched_to_its_end(
    page: Page, lab: BrowserLab, shots: Path
) -> None:
    sign_in(page, "operator")
    tab_to(page, "nav a[href='#/rollouts']")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Rollouts')")
    tab_to(page, "#release")
    page.keyboard.type("digits v2")
    tab_to(page, "form.card button.main")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("r1: digits v2")
    expect(page.locator("h1 .chip")).to_have_text("finished", timeout=WAIT_MS)
    expect(page.locator("table tbody tr")).to_have_count(len(lab.devices))
    page.screenshot(path=shots / "rollout.png", full_page=True)
    page.goto(lab.url + "#/")
    expect(page.locator(".legend")).to_contain_text(f"{len(lab.devices)} updated", timeout=WAIT_MS)
    expect(page.locator(".bars")).to_contain_text("digits v2")
    page.screenshot(path=shots / "fleet.png", full_page=True)


def test_a_bad_version_is_seen_to_come_back(page: Page, lab: BrowserLab, shots: Path) -> None:
    sign_in(page, "operator")
    page.goto(lab.url + "#/rollouts")
    page.select_option("#release", "digits/v3")
    page.click("form.card button.main")
    expect(page.locator("h1")).to_contain_text("digits v3")
    expect(page.locator("h1 .chip")).to_have_text("stopped", timeout=WAIT_MS)
    expect(page.locator("#view")).to_contain_text("trial.answers", timeout=WAIT_MS)
    expect(page.locator(".chart")).to_have_attribute(
        "aria-label", re.compile("2 of 2 failed"), timeout=WAIT_MS
    )
    expect(page.locator("#decisions .story")).to_contain_text("stop")
    page.screenshot(path=shots / "stopped.png", full_page=True)
    page.locator("table a", has_text="device-").first.click()
    expect(page.locator("h1")).to_contain_text("device-")  # the page of the rollout has stories, too
    expect(page.locator(".story")).to_contain_text("rolled back v3")
    expect(page.locator(".figures").first).to_contain_text("v2")
    page.screenshot(path=shots / "device.png", full_page=True)


def test_a_rollout_is_paused_resumed_and_aborted(page: Page, lab: BrowserLab, shots: Path) -> None:
    sign_in(page, "operator")
    page.goto(lab.url + "#/rollouts")
    page.select_option("#release", "digits/v1")
    page.fill("#waves", "1,100%")
    page.fill("#soak", "600")
    page.click("form.card button.main")
    expect(page.locator("h1")).to_contain_text("digits v1")
    expect(page.locator(".waves")).to_contain_text("1 committed", timeout=WAIT_MS)
    page.fill("#why", "the lab reports odd answers")
    order(page, "Pause")
    expect(page.locator("h1 .chip")).to_have_text("paused", timeout=WAIT_MS)
    expect(page.locator("#decisions .story")).to_contain_text("the lab reports odd answers")
    expect(page.locator("#view button", has_text="Promote")).to_have_count(0)  # an approver's
    page.screenshot(path=shots / "paused.png", full_page=True)
    order(page, "Resume")
    expect(page.locator("h1 .chip")).to_have_text("running", timeout=WAIT_MS)
    order(page, "Abort")
    expect(page.locator("h1 .chip")).to_have_text("stopped", timeout=WAIT_MS)
    expect(page.locator("#view button")).to_have_count(0)
    expect(page.locator("#decisions .story")).to_contain_text("by operator")


def order(page: Page, action: str) -> None:
    page.click(f"#view button:has-text('{action}')")
    page.click("#ask-yes")


def test_of_two_operators_the_second_is_told(page: Page, lab: BrowserLab) -> None:
    sign_in(page, "operator")
    page.goto(lab.url + "#/rollouts")
    page.select_option("#release", "digits/v1")
    page.fill("#waves", "1,100%")
    page.fill("#soak", "600")
    page.click("form.card button.main")
    expect(page.locator("h1 .chip")).to_have_text("running", timeout=WAIT_MS)
    name = page.url.rpartition("/")[2]
    with page.expect_response(re.compile(f"/rollouts/{name}\\?")):
        pass
    page.click("#view button:has-text('Pause')")
    order_rollout(lab.home, name, "abort", by="somebody else", reason="first")
    page.click("#ask-yes")
    expect(page.locator("#said")).to_contain_text("somebody else aborted it")


def test_who_may_only_look_is_offered_nothing_else(page: Page, lab: BrowserLab) -> None:
    sign_in(page, "viewer")
    page.goto(lab.url + "#/rollouts")
    page.wait_for_selector("h1:has-text('Rollouts')")
    expect(page.locator("form.card")).to_have_count(0)
    page.goto(lab.url + "#/releases/digits/v4")
    page.wait_for_selector("h1:has-text('digits v4')")
    expect(page.locator("#view button")).to_have_count(0)


def test_a_draft_is_published_after_a_question(page: Page, lab: BrowserLab, shots: Path) -> None:
    sign_in(page, "approver")
    page.goto(lab.url + "#/releases/digits/v4")
    page.click("button:has-text('Publish')")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    expect(page.locator("h1 .chip")).to_have_text("draft")
    page.click("#view button:has-text('Publish')")
    page.click("#ask-yes")
    expect(page.locator("h1 .chip")).to_have_text("published", timeout=WAIT_MS)
    page.screenshot(path=shots / "release.png", full_page=True)


def test_a_server_that_is_gone_is_said(page: Page, lab: BrowserLab) -> None:
    sign_in(page, "viewer")
    expect(page.locator("#link")).to_have_text("live")
    page.click("#sign-out")
    page.wait_for_selector("#user")
    expect(page.locator("#bar")).to_be_hidden()
    page.goto(lab.url + "#/devices")
    page.wait_for_selector("#user")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible(page: Page, lab: BrowserLab, shots: Path, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    found = {"sign in": Axe().run(page).response["violations"]}
    sign_in(page, "approver")
    for path in PAGES:
        page.goto(lab.url + path)
        page.wait_for_selector("#view h1")
        page.wait_for_timeout(300)
        found[path] = Axe().run(page).response["violations"]
        page.screenshot(path=shots / f"{scheme}{path.replace('/', '-').replace('#', '')}.png", full_page=True)
    told = [
        f"{path}: {each['id']}: {each['help']}: {each['nodes'][0]['html'][:120]}"
        for path, violations in found.items()
        for each in violations
    ]
    assert told == []


def test_a_narrow_screen_shows_everything(page: Page, lab: BrowserLab, shots: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 720})
    sign_in(page, "approver")
    for path in PAGES:
        page.goto(lab.url + path)
        page.wait_for_selector("#view h1")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 375, path
    page.goto(lab.url + "#/")
    page.wait_for_timeout(300)
    page.screenshot(path=shots / "narrow.png", full_page=True)


def test_a_thousand_devices_that_change_keep_the_page_smooth(
    page: Page, lab: BrowserLab, shots: Path
) -> None:
    """Reports of a thousand devices through the broker, each twice a second, while somebody looks."""
    sign_in(page, "viewer")
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable")
    with Storm(lab, devices=1000) as storm:
        expect(page.locator(".figures dd").first).to_have_text(str(1000 + len(lab.devices)), timeout=WAIT_MS)
        page.evaluate(
            """() => { window.gaps = []; let before = performance.now();
            const tick = (now) => { window.gaps.push(now - before); before = now; requestAnimationFrame(tick); };
            requestAnimationFrame(tick); }"""
        )
        first, begun, sent = metrics(client), time.monotonic(), storm.sent
        page.wait_for_timeout(10_000)
        last, seconds = metrics(client), time.monotonic() - begun
        gaps = sorted(page.evaluate("window.gaps"))
        reports = (storm.sent - sent) / seconds
        page.screenshot(path=shots / "thousand.png", full_page=True)
    busy = (last["TaskDuration"] - first["TaskDuration"]) / seconds
    figures = {
        "reports_per_s": round(reports),
        "frames_per_s": round(len(gaps) / seconds, 1),
        "busy_share": round(busy, 3),
        "frame_p50_ms": round(gaps[len(gaps) // 2], 1),
        "frame_p99_ms": round(gaps[len(gaps) * 99 // 100], 1),
    }
    (shots / "thousand.json").write_text(json.dumps(figures))
    assert busy < 0.5, "the page leaves its thread no time for people"
    assert gaps[len(gaps) * 99 // 100] < 250, "the page stutters"


def metrics(client: Any) -> dict[str, float]:
    return {each["name"]: each["value"] for each in client.send("Performance.getMetrics")["metrics"]}


class Storm:
    """Devices that exist in their reports only, which a real client sends through the broker."""

    def __init__(self, lab: BrowserLab, devices: int) -> None:
        self._names = [f"storm-{number:04d}" for number in range(devices)]
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="storm")
        self._client.connect(*lab.server.broker_address)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent = 0

    def __enter__(self) -> Self:
        self._client.loop_start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()

    def _run(self) -> None:
        states = ["downloading", "installing", "trial", "idle"]
        for name in self._names:
            self._client.publish(f"wb1.lab/dev/{name}/link", encode_message(Link(online=True)), 0)
        for sequence in itertools.count(1):
            begun = time.monotonic()
            for number, name in enumerate(self._names):
                state = states[(sequence + number) % len(states)]
                update = UpdateReport(
                    rollout="r9",
                    sequence=1,
                    version="v9",
                    outcome="committed" if state == "idle" else "running",
                    received_bytes=sequence * 1000,
                    full_bytes_total=10**7,
                )
                report = Report(
                    device=name, sequence=sequence, state=state, family=FAMILY, version="v1", update=update
                )
                self._client.publish(f"wb1.lab/dev/{name}/report", encode_message(report), 0)
                self.sent += 1
            if self._stop.wait(max(0.0, 0.5 - (time.monotonic() - begun))):
                return
