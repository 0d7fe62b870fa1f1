"""The pages about simulated runs say what the results say, and need nothing from outside."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from simulator.cli import main
from simulator.faults import draw_faults
from simulator.fleet import run_fleet
from simulator.population import mixed_population
from simulator.recording import Recorder
from simulator.report.comparison import compared, render_comparison, settings, write_comparison
from simulator.report.fleet import render_fleet, write_fleet_report
from simulator.report.fleet_words import PROMISES, headline, reaches
from simulator.report.timescale import time_frame, time_scale
from simulator.report.transfers import measure_transfers
from simulator.report.units import duration, share, size
from simulator.results import FleetResult
from simulator.scenario import Model, ReleasePlan, Scenario
from simulator.soak import explain
from tests.simulator.browser import REASON, Browser, is_available
from tests.simulator.test_report import Outline

PAGE_BYTES_MAX = 3_000_000
DEVICES = 60
SCENARIO = Scenario(
    devices=DEVICES,
    population=mixed_population(),
    model=Model(bytes=64 << 10),
    releases=(
        ReleasePlan(canary_count=4),
        ReleasePlan(version="bad", kind="wrong", canary_count=6),
        ReleasePlan(version="v3", canary_count=4),
    ),
)
FAULTY = replace(
    SCENARIO,
    releases=(ReleasePlan(failures_max=DEVICES, wave_timeout_s=300.0),),
    faults=draw_faults(3, 600.0),
    keep_alive_s=120,
)
UNCOUNTED = {"wall_s": 0.0, "cpu_s": 0.0, "peak_memory_bytes": 0, "recording": None}


@pytest.fixture(scope="module")
def recorded() -> FleetResult:
    return run_fleet(SCENARIO, recorder=Recorder(), command="whimbrel-sim replay scenario.json")


@pytest.fixture(scope="module")
def faulty() -> FleetResult:
    return run_fleet(FAULTY, recorder=Recorder())


@pytest.fixture(scope="module")
def failed() -> FleetResult:
    """A fleet that has no time to converge after the faults, as the command line explains it."""
    scenario = replace(FAULTY, devices=12, liveness_s=1.0, faults=replace(FAULTY.faults, disk_full=1.0))
    result = run_fleet(scenario, recorder=Recorder(), command="whimbrel-sim replay late.json")
    assert result.failure is not None
    told = explain(scenario, result.failure, result.command)
    return replace(result, story=told.story, shrunk=told.shrunk)


def rows(page: str, title: str) -> list[list[str]]:
    """The cells of a table, by the accessible name of its region."""
    table = page[page.index(f'aria-label="{title}"') :]
    table = table[: table.index("</table>")]
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(<td.*?)</tr>", table, re.DOTALL)
    ]


def fleet_data(page: str) -> dict[str, Any]:
    text = page.split('id="fleet-data">', 1)[1].split("</script>", 1)[0]
    data: dict[str, Any] = json.loads(text)
    return data


def final_bands(data: dict[str, Any]) -> dict[str, int]:
    """How many dots have which band after all changes, decoded as the page's script does it."""
    numbers: list[int] = []
    value = shift = 0
    for byte in base64.b64decode(data["changes"]):
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    state = [data["first"]] * len(data["numbers"])
    for dot, band in zip(numbers[1::3], numbers[2::3], strict=True):
        state[dot] = band
    names = [band["name"] for band in data["bands"]]
    return {name: state.count(index) for index, name in enumerate(names) if index in state}


@pytest.mark.parametrize("scenario", [SCENARIO, FAULTY], ids=["calm", "faulty"])
def test_a_recorder_changes_nothing_about_the_run(
    scenario: Scenario, recorded: FleetResult, faulty: FleetResult
) -> None:
    plain = run_fleet(scenario)
    other = recorded if scenario is SCENARIO else faulty
    assert other.recording is not None
    assert plain.trace_digest == other.trace_digest
    assert replace(other, **UNCOUNTED, command="") == replace(plain, **UNCOUNTED)


def test_a_recording_agrees_with_what_was_counted(recorded: FleetResult) -> None:
    recording = recorded.recording
    assert recording is not None
    spread = {each.version: each for each in recording.versions}
    assert spread["v2"].committed[-1][1] == spread["v3"].committed[-1][1] == DEVICES
    assert spread["bad"].committed == []
    bad = next(each for each in recorded.rollouts if each.version == "bad")
    assert spread["bad"].tried[-1][1] == bad.counts["rolled_back"]
    assert recording.times[0].updates == recorded.updates
    assert sum(each.updates for each in recording.times[1:]) == recorded.updates
    assert all(sum(moment.counts) == DEVICES for moment in recording.moments)
    last = dict(zip(recording.labels, recording.moments[-1].counts, strict=True))
    assert last["idle v3"] == recorded.versions["v3"]
    assert [wave.asked for wave in recording.waves if wave.version == "v2"] == [4, DEVICES - 4]


def test_a_recording_is_bounded(recorded: FleetResult) -> None:
    small = run_fleet(SCENARIO, recorder=Recorder(dots_max=20, changes_max=100)).recording
    whole = recorded.recording
    assert small is not None
    assert whole is not None
    assert len(small.tracks.label) <= 100
    assert small.tracks.stride >= 3
    assert len(small.tracks.kinds) == -(-DEVICES // small.tracks.stride)
    assert small.versions == whole.versions
    kept = [
        (at_ms, device * whole.tracks.stride, label)
        for at_ms, device, label in zip(
            whole.tracks.at_ms, whole.tracks.device, whole.tracks.label, strict=True
        )
        if device * whole.tracks.stride % small.tracks.stride == 0
    ]
    assert kept == [
        (at_ms, device * small.tracks.stride, label)
        for at_ms, device, label in zip(
            small.tracks.at_ms, small.tracks.device, small.tracks.label, strict=True
        )
    ]


def test_a_recording_survives_json(recorded: FleetResult) -> None:
    assert msgspec.json.decode(msgspec.json.encode(recorded), type=FleetResult) == recorded


def test_pages_are_whole_and_need_nothing_from_outside(
    recorded: FleetResult, faulty: FleetResult, failed: FleetResult
) -> None:
    bare = replace(recorded, recording=None)
    pages = [render_fleet(each.scenario, each) for each in (recorded, faulty, failed, bare)]
    pages += [render_comparison(recorded, faulty), render_comparison(bare, failed)]
    for page in pages:
        assert len(page.encode()) < PAGE_BYTES_MAX
        outline = Outline()
        outline.feed(page)
        assert outline.open == []
        assert outline.targets == []
        assert not {"link", "iframe", "img", "object"} & outline.tags
        assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|XMLHttpRequest", page)
        assert page.count("<svg") == page.count('role="img" aria-label="') > 2
        assert "prefers-color-scheme: dark" in page


def test_the_page_says_what_the_result_says(recorded: FleetResult) -> None:
    page = render_fleet(recorded.scenario, recorded)
    assert headline(recorded) in page
    assert recorded.command in page
    assert recorded.trace_digest in page
    assert size(recorded.down_bytes) in page
    for row, rollout in zip(rows(page, "Rollouts"), recorded.rollouts, strict=True):
        assert row[:4] == [rollout.rollout, rollout.version, rollout.kind, rollout.state]
        told = {words.split(" ", 1)[1]: int(words.split(" ", 1)[0]) for words in row[5].split(", ")}
        assert told == {status.replace("_", " "): count for status, count in rollout.counts.items()}
    for row, each in zip(rows(page, "Versions"), reaches(recorded), strict=True):
        assert [int(cell) for cell in row[2:6]] == [
            each.asked,
            each.tried,
            each.kept,
            recorded.versions.get(each.version, 0),
        ]
    for row, (name, kind) in zip(rows(page, "Kinds of devices"), recorded.kinds.items(), strict=True):
        assert row[:3] == [name, str(kind.devices), size(kind.down_bytes / kind.devices)]
    assert msgspec.json.decode(_scenario_text(page), type=Scenario) == recorded.scenario


def _scenario_text(page: str) -> str:
    text = page.split("The scenario, for", 1)[1].split('<pre tabindex="0">', 1)[1].split("</pre>", 1)[0]
    return text.replace("&#34;", '"')


def test_the_animation_ends_as_the_fleet_does(recorded: FleetResult) -> None:
    data = fleet_data(render_fleet(recorded.scenario, recorded))
    assert sorted(data["numbers"]) == list(range(DEVICES))
    assert final_bands(data) == {f"runs {version}": count for version, count in recorded.versions.items()}
    assert {group["name"]: group["count"] for group in data["groups"]} == {
        name: kind.devices for name, kind in recorded.kinds.items()
    }
    assert data["knots"] == sorted(data["knots"])


def test_devices_have_their_numbers_in_a_part_of_a_fleet() -> None:
    scenario = replace(SCENARIO, devices=10, first_device=500, releases=SCENARIO.releases[:1])
    result = run_fleet(scenario, recorder=Recorder())
    data = fleet_data(render_fleet(scenario, result))
    assert sorted(data["numbers"]) == list(range(500, 510))
    assert final_bands(data) == {"runs v2": 10}


def test_deltas_are_told_beside_measured_peers(recorded: FleetResult) -> None:
    transfers = measure_transfers(recorded)
    assert {(each.base, each.version) for each in transfers} >= {("v1", "v2"), ("v2", "v3")}
    told = {
        f"{each.base}-{each.version} {name}": length
        for each in transfers
        for name, length in each.deltas.items()
    }
    assert told == recorded.delta_bytes
    for each in transfers:
        assert each.peers["whole file"] == SCENARIO.model.bytes
        assert 0 < each.peers["bsdiff4"] < each.peers["whole file"]
    page = render_fleet(recorded.scenario, recorded)
    for row, each in zip(rows(page, "Bytes of all steps"), transfers, strict=True):
        assert row[3] == size(each.peers["bsdiff4"])
    gone = replace(recorded, scenario=replace(SCENARIO, model=Model(files=("gone",) * 4)))
    assert measure_transfers(gone) == []
    assert "bsdiff4" not in render_fleet(gone.scenario, gone)


def test_a_failure_is_told_with_what_is_needed_to_see_it_again(failed: FleetResult) -> None:
    assert failed.failure is not None
    assert failed.shrunk is not None
    page = render_fleet(failed.scenario, failed)
    assert PROMISES[failed.failure.promise] in page
    assert "verdict failed" in page
    assert failed.failure.detail in page.replace("&#39;", "'")
    assert failed.command in page
    assert msgspec.json.encode(failed.shrunk).decode().replace('"', "&#34;") in page
    assert failed.story[-1].strip() in page.replace("&#39;", "'").replace("&gt;", ">")


def test_a_result_without_a_recording_is_not_told_more_than_it_knows(recorded: FleetResult) -> None:
    page = render_fleet(recorded.scenario, replace(recorded, recording=None))
    assert "fleet-data" not in page
    assert "at rest" in page
    assert "runs v" not in page


def test_text_from_outside_is_escaped(recorded: FleetResult) -> None:
    evil = "</script><script>alert(1)</script>"
    population = (replace(SCENARIO.population[0], name=evil),)
    scenario = replace(SCENARIO, name=evil, population=population)
    recording = recorded.recording
    assert recording is not None
    tracks = replace(recording.tracks, kinds=[evil] * DEVICES)
    result = replace(
        recorded,
        scenario=scenario,
        command=evil,
        faults={evil: 3},
        kinds={evil: recorded.kinds["modem"]},
        rollouts=[replace(each, reason=evil) for each in recorded.rollouts],
        recording=replace(recording, tracks=tracks),
    )
    assert evil not in render_fleet(scenario, result)
    assert evil not in render_comparison(result, recorded)


def test_a_comparison_says_what_differs(recorded: FleetResult, faulty: FleetResult) -> None:
    page = render_comparison(recorded, faulty)
    table = {row[0]: row[1:] for row in rows(page, "Figures of both runs")}
    assert table["to the median device"][:2] == [
        size(recorded.down_bytes_per_device[1]),
        size(faulty.down_bytes_per_device[1]),
    ]
    bad = next(each for each in recorded.rollouts if each.version == "bad")
    assert table["devices that tried a bad version"][:2] == [str(bad.counts["rolled_back"]), "0"]
    assert table["faults injected"][:2] == ["0", f"{sum(faulty.faults.values()):,}"]
    assert ("keep_alive_s", "1200", "120") in settings(recorded, faulty)
    assert {row[0] for row in rows(page, "Fields of the scenarios that differ")} == {
        path for path, _, _ in settings(recorded, faulty)
    }
    assert settings(recorded, recorded) == []
    assert {row.change for row in compared(recorded, recorded)} == {"same"}


def test_long_times_of_few_changes_are_cut_short() -> None:
    scale = time_scale(
        100.0, 1_110.0, [100.0 + step for step in range(6)] + [1_100.0 + step for step in range(10)]
    )
    assert len(scale.breaks) == 1
    early, late = scale.breaks[0]
    assert 105 < early < late < 1_100
    assert scale.position(late) - scale.position(early) == pytest.approx(0.04)
    for at_s in (100.0, 103.0, 600.0, 1_107.5):
        assert scale.instant(scale.position(at_s)) == pytest.approx(at_s)
    marks = [at_s for at_s, _ in time_frame(0, 0, 1_000, 100, scale, 1).x_ticks()]
    assert marks == sorted(marks)
    assert not any(early < at_s < late for at_s in marks)
    even = time_scale(0.0, 100.0, list(range(100)))
    assert even.breaks == ()


def test_quantities_are_told_in_their_natural_unit() -> None:
    told = [duration(1.234), duration(99), duration(600), duration(7_200), duration(200_000)]
    assert [words.replace("\N{NO-BREAK SPACE}", " ") for words in told] == [
        "1.23 s",
        "99.0 s",
        "10.0 min",
        "2.0 h",
        "2.3 days",
    ]
    assert size(999).endswith("bytes")
    assert size(1_234_567).replace("\N{NO-BREAK SPACE}", " ") == "1.2 MB"
    assert share(1, 100_000).startswith("under")
    assert share(99_999, 100_000).startswith("over")
    assert share(0, 5).startswith("0")


def test_the_commands_write_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, pair, results = tmp_path / "fleet.html", tmp_path / "pair.html", []
    for seed in ("1", "2"):
        assert main(["fleet", "--devices", "8", "--seed", seed, "--json", "--report", str(page)]) == 0
        results.append(tmp_path / f"{seed}.json")
        results[-1].write_text(capsys.readouterr().out, "utf-8")
    assert "seed 2" in page.read_text("utf-8")
    assert "fleet-data" in page.read_text("utf-8")
    main(["compare", str(results[0]), str(results[1]), "--report", str(pair)])
    assert f"Report: {pair}" in capsys.readouterr().out.replace("\n", "")
    assert "How the version spread" in pair.read_text("utf-8")


def test_a_page_that_cannot_be_written_is_told_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "page.html"
    for command in (["fleet", "--devices", "1000000"], ["compare", "release", "release"]):
        assert main([*command, "--report", str(missing)]) == 1
        assert "--report" in capsys.readouterr().err


@pytest.mark.skipif(not is_available(), reason=REASON)
@pytest.mark.slow
def test_pages_work_in_a_browser(recorded: FleetResult, failed: FleetResult, tmp_path: Path) -> None:
    page, broken, pair = (tmp_path / name for name in ("fleet.html", "failed.html", "pair.html"))
    write_fleet_report(page, recorded.scenario, recorded)
    write_fleet_report(broken, failed.scenario, failed)
    write_comparison(pair, recorded, failed)
    with Browser.running() as browser:
        for path in (page, broken, pair):
            for width in (1280, 400):
                browser.open(path, width=width, dark=width == 400)
                assert browser.messages() == []
                assert browser.run("return document.documentElement.scrollWidth") <= width
        _play(browser, page)
        assert browser.messages() == []


def _play(browser: Browser, page: Path) -> None:
    tallies = (
        "return Object.fromEntries([...document.querySelectorAll('[data-band]')]"
        ".map((each) => [each.parentElement.textContent.trim().split(' ').slice(0, -1).join(' '),"
        " Number(each.textContent)]))"
    )
    key = (
        "document.getElementById('fleet-canvas').dispatchEvent("
        "new KeyboardEvent('keydown', {key: arguments[0], cancelable: true}))"
    )
    browser.open(page)
    first = browser.run(tallies)
    assert sum(first.values()) == DEVICES
    browser.run(key, "End")
    assert browser.run(tallies)["runs v3"] == DEVICES
    browser.run(key, "Home")
    assert browser.run(tallies) == first
    assert (
        browser.run("const b = document.getElementById('fleet-play'); b.click(); return b.textContent")
        == "Pause"
    )
    moved = (
        "return new Promise((resolve) => { const s = document.getElementById('fleet-slider');"
        " const look = () => Number(s.value) > 5 ? resolve(true) : requestAnimationFrame(look); look(); })"
    )
    assert browser.run(moved)
    browser.run(key, " ")
    assert browser.run("return document.getElementById('fleet-play').textContent") == "Play"
