"""The page and the summary say what the record says, and need nothing from outside."""

import io
import re
from html.parser import HTMLParser

import msgspec
import pytest
from rich.console import Console

from device.states import State
from simulator.live.display import BANDS
from simulator.live.population import DEVICES_MAX
from simulator.report.checks import check_run
from simulator.report.diagram import places
from simulator.report.page import PAGE_BYTES_MAX, headline, render_page, verdict
from simulator.report.record import Answer, Check, Run
from simulator.report.summary import print_summary
from simulator.report.svg import BAND_CLASSES, number, ticks
from tests.simulator.sample import sample_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.targets += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data"}
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def summary_text(run: Run, width: int = 100) -> str:
    out = io.StringIO()
    print_summary(run, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("count", [1, 2, 36, DEVICES_MAX])
def test_the_page_is_one_small_file_that_needs_nothing_from_outside(count: int) -> None:
    page = render_page(sample_run(count))
    assert len(page.encode()) < PAGE_BYTES_MAX
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.targets == []
    assert not {"script", "link", "iframe", "img", "object"} & outline.tags
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", page)


def test_the_page_is_made_for_phones_and_for_the_dark() -> None:
    page = render_page(sample_run())
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_every_plot_is_described_for_those_who_cannot_see_it() -> None:
    page = render_page(sample_run())
    assert page.count("<svg") == page.count('role="img" aria-label="') >= 6


def test_the_page_says_what_was_measured() -> None:
    run = sample_run()
    page = render_page(run)
    for check in run.checks:
        assert check.measured in page
    for device in run.devices:
        assert device.device in page
    assert f"{run.totals.air_bytes / 1e6:.1f} MB" in page
    assert run.command in page


def test_text_from_outside_is_escaped() -> None:
    sample = sample_run(6)
    evil = "<script>alert(1)</script>"
    answer = Answer(device="device-01", prompt=evil, expected="", before=evil, after=evil)
    rollouts = [msgspec.structs.replace(each, reason=evil, members=[
        msgspec.structs.replace(member, detail=evil, code=evil, status=evil) for member in each.members
    ]) for each in sample.rollouts]  # fmt: skip
    page = render_page(msgspec.structs.replace(sample, answers=[answer], rollouts=rollouts, model=evil))
    assert evil not in page


def test_a_failed_check_is_plain_to_see_everywhere() -> None:
    run = sample_run(6)
    broken = Check(name="no chunk was fetched twice", wanted="0", measured="3", is_passed=False)
    run = msgspec.structs.replace(run, checks=[broken, *run.checks[1:]])
    assert not run.is_passed
    assert "verdict failed" in render_page(run)
    assert "NO" in summary_text(run)
    assert "wanted: 0" in summary_text(run)


@pytest.mark.parametrize(
    ("devices", "again", "late", "is_passed"),
    [
        (36, 0, 0, True),
        (36, 0, 1, False),
        (36, 1, 0, False),
        (1000, 0, 50, True),
        (1000, 0, 51, False),
        (1000, 1, 0, False),
    ],
)
def test_only_what_comes_late_in_a_large_fleet_may_come_twice(
    devices: int, again: int, late: int, is_passed: bool
) -> None:
    run = sample_run(6)
    totals = msgspec.structs.replace(
        run.totals, devices=devices, chunks_stored=1000, chunks_twice=again, redundant_chunks=late
    )
    checks = check_run(totals, run.devices, run.models, run.rollouts[0], run.rollouts[1], {}, {})
    (check,) = (each for each in checks if each.name == "no chunk was fetched twice")
    assert check.is_passed is is_passed


def test_headline_and_summary_agree_with_the_record() -> None:
    run = sample_run()
    assert (
        headline(run) == "All 36 devices went to v2; the bad v3 was taken back on each of the 4 that tried it"
    )
    text = " ".join(summary_text(run, 200).split())
    assert headline(run) in text
    assert verdict(run).capitalize() in text
    for check in run.checks:
        assert check.measured in text


def test_the_record_survives_json() -> None:
    run = sample_run()
    assert msgspec.json.decode(msgspec.json.encode(run), type=Run) == run


def test_the_diagram_has_room_for_every_state() -> None:
    assert places() == {state.value for state in State}


def test_terminal_and_page_know_the_same_words() -> None:
    assert [name for name, _ in BANDS] == list(BAND_CLASSES)


def test_ticks_are_round_and_within_their_range() -> None:
    assert ticks(0, 36, 5) == [0, 10, 20, 30]
    assert ticks(5.2, 71.1, 8) == [10, 20, 30, 40, 50, 60, 70]
    assert ticks(3, 3, 5) == [3]
    assert number(12.04) == "12"


def test_a_canary_that_was_asked_and_released_again_has_tried_nothing() -> None:
    run = sample_run(36)
    good, bad = run.rollouts
    late, *others = (member.device for member in bad.members)
    devices = [
        msgspec.structs.replace(each, bad_outcome="failed", bad_code="update.withdrawn")
        if each.device == late
        else each
        for each in run.devices
    ]

    def is_passed(tried: list[str]) -> bool:
        offered = {device: {"v3"} for device in (late, *others)}
        checks = check_run(
            run.totals, devices, run.models, good, bad, offered, {device: {"v3"} for device in tried}
        )
        return next(check.is_passed for check in checks if "rolled back on each canary" in check.name)

    assert is_passed(others)
    assert not is_passed([late, *others])
