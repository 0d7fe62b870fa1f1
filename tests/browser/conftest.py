"""A browser, and a page of it that complains."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.browser.lab import PASSWORD, BrowserLab

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "install Chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserLab]:
    lab = BrowserLab(tmp_path_factory.mktemp("lab"), devices=6)
    yield lab
    lab.close()


@pytest.fixture
def page(browser: Browser, lab: BrowserLab) -> Iterator[Page]:
    """Not signed in; whatever the console or a script complains about fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if _is_complaint(message) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(lab.url)
    yield page
    context.close()
    assert complaints == []


def _is_complaint(message: ConsoleMessage) -> bool:
    """The browser itself notes every request that was refused; what cannot be done as things stand (409) is told to the user by the page."""
    return message.type == "error" and "409 (Conflict)" not in message.text


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where pictures go, for somebody to look at."""
    folder = Path(__file__).parents[2] / ".cache" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sign_in(page: Page, user: str) -> None:
    """By the keyboard alone: the name has the focus."""
    page.wait_for_selector("#user:focus")
    page.keyboard.type(user)
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Fleet')")
