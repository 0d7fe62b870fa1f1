"""What people see of hardware tiers, and of versions side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from server.operations import show_release
from server.scorecard.card import Check
from tests.browser.conftest import sign_in
from tests.browser.lab import FAMILY, WAIT_S, BrowserLab
from tests.server.tradeoffs.cards import bind_card, make_card

WAIT_MS = int(WAIT_S * 1000)
PAGES = ("#/tiers", "#/releases/digits/v5")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserLab]:
    """v4 is the reference, v5 answers about as well, v6 worse; devices are of tier pi, and small has no room for two versions."""
    lab = BrowserLab(tmp_path_factory.mktemp("tiers"), devices=2)
    lab.add("v5", 5, 0)
    lab.add("v6", 6, 1)
    v4, v5, v6 = (show_release(lab.home, FAMILY, version).record.release for version in ("v4", "v5", "v6"))
    bind_card(lab.home, make_card(v4))
    bind_card(lab.home, make_card(v5, v4, flips=(16, 20), kl=(0.004, 0.003, 0.006)))
    failed = (Check(name="classes: drop", status="failed", detail=""),)
    bind_card(lab.home, make_card(v6, v4, flips=(0, 150), kl=(2, 1, 3), verdict="failed", checks=failed))
    (lab.home / "tiers").mkdir()
    for name, memory_mb in (("pi", 1000), ("small", 100)):
        text = f'memory_mb = {memory_mb}\ndisk_mb = 8000\nruntime = "onnx"\nmemory_gb_per_s = 4.0\ntoken_ms_max = 80.0\n'
        (lab.home / "tiers" / f"{name}.toml").write_text(text)
    yield lab
    lab.close()


def test_each_tier_says_what_fits_and_why_others_are_refused(page: Page, shots: Path) -> None:
    sign_in(page, "viewer")
    page.click("nav a[href='#/tiers']")
    page.wait_for_selector("h1:has-text('Hardware tiers')")
    pi, small = (
        page.locator("section.card", has=page.locator(f"h2:has-text('{name}')")) for name in ("pi", "small")
    )
    expect(pi.locator(".figures dd").first).to_have_text("2", timeout=WAIT_MS)
    expect(pi.locator(".figures dt").first).to_have_text("v1 on 2")
    expect(pi.locator("tr", has_text="digits v5").locator(".chip")).to_have_text("fits")
    refused = small.locator("tr", has_text="digits v5")
    expect(refused.locator(".chip")).to_have_text("refused")
    expect(refused).to_contain_text("% over the 100 MB of the tier")
    expect(refused).to_contain_text("Would fit: stopping the old version first")
    page.screenshot(path=shots / "tiers.png", full_page=True)
    refused.locator("a").click()
    page.wait_for_selector("h1:has-text('digits v5')")


def test_a_release_stands_beside_the_one_before_and_beside_its_family(
    page: Page, lab: BrowserLab, shots: Path
) -> None:
    sign_in(page, "viewer")
    page.goto(lab.url + "#/releases/digits/v5")
    scorecard = page.locator("section.card", has=page.locator("h2:has-text('Scorecard')"))
    expect(scorecard).to_contain_text("Beside v4")
    row = scorecard.locator("tr", has_text="classes, right of 300")
    expect(row).to_contain_text("90.0 %")
    expect(row).to_contain_text("-1.3 points (-5.3 to 2.7)")
    family = page.locator("section.card", has=page.locator("h2:has-text('Trade-offs')"))
    expect(family).to_contain_text(
        "Which of v4 and v5 gives more right answers is not decided", timeout=WAIT_MS
    )
    pi = family.locator(".scroll", has=page.locator("caption:has-text('pi: 2 devices')"))
    expect(pi.locator("tr", has_text="v6").locator(".chip")).to_have_text("failed")
    expect(pi.locator("tr", has_text="v1").locator(".chip").first).to_have_text("no scorecard")
    expect(pi.locator("tbody tr").nth(4).locator(".chip")).to_contain_text("best")
    page.screenshot(path=shots / "tradeoffs.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_these_pages_are_accessible_and_fit_a_narrow_screen(
    page: Page, lab: BrowserLab, shots: Path, scheme: Any
) -> None:
    page.emulate_media(color_scheme=scheme)
    sign_in(page, "approver")
    for path in PAGES:
        page.set_viewport_size({"width": 1200, "height": 900})
        page.goto(lab.url + path)
        page.wait_for_selector("#view section.card table td .chip", timeout=WAIT_MS)
        told = [
            f"{each['id']}: {each['nodes'][0]['html'][:120]}"
            for each in Axe().run(page).response["violations"]
        ]
        assert told == [], path
        page.screenshot(path=shots / f"{scheme}{path.replace('/', '-').replace('#', '')}.png", full_page=True)
        page.set_viewport_size({"width": 375, "height": 720})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, path
