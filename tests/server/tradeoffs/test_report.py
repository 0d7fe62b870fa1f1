"""`whimbrel tradeoffs` over a real server: scorecards that were kept, tier files, a fleet, deltas; and what people and programs get to see."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.delta_graph import wire_bytes
from protocol.errors import RequestError
from protocol.ids import DeviceId, digest_of
from protocol.messages import Capacity
from protocol.release import DeltaName
from server import operations
from server.cli import main
from server.display import bytes_text
from server.fleet.registry import DeviceRecord
from server.home import opened
from server.releases.builders import build_delta
from server.scorecard.card import Check, encode_card
from server.tradeoffs.page import render
from server.tradeoffs.prices import Prices
from server.tradeoffs.records import Option, TradeoffReport
from server.tradeoffs.text import mark, text_lines
from server.tradeoffs.weighing import Question, weigh
from tests.models import write_classifier, write_health_plan
from tests.server.samples import report as device_report
from tests.server.tradeoffs.cards import bind_card, make_card

VERSIONS = ("v1", "slim", "wrong", "new")
FLEET = (("pi", "v1", 3), ("pi", "", 1), ("tiny", "v1", 2), ("lost", "v1", 1))
CELL = Capacity(link_bytes_per_s=8_192, processor_percent=64, delta_memory_bytes=1 << 27, links_max=4)
PRICES = Prices(currency="EUR", tiers={"pi": 0.4})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 is published and what the fleet runs; slim is half as large and answers about as well, wrong answers wrongly, new has no scorecard."""
    folder = tmp_path_factory.mktemp("tradeoffs")
    home = folder / "server"
    operations.init_repository(home, "lab", port=0)
    health = write_health_plan(folder / "health.json")
    releases = {}
    for version, hidden in (("v1", 4000), ("slim", 2000), ("wrong", 1000), ("new", 500)):
        path = write_classifier(folder / f"{version}.onnx", 1, hidden=hidden)
        added = operations.add_release(home, "digits", version, [path], runtime="onnx", health=health)
        releases[version] = added.release
    v1_release = releases["v1"]
    bind_card(home, make_card(v1_release))
    bind_card(home, make_card(releases["slim"], v1_release, flips=(16, 20), kl=(0.004, 0.003, 0.006)))
    bad = (Check(name="classes: drop", status="failed", detail=""),)
    bind_card(
        home,
        make_card(releases["wrong"], v1_release, flips=(1, 200), kl=(2, 1, 3), verdict="failed", checks=bad),
    )
    operations.publish_release(home, "digits", "v1")
    (home / "tiers").mkdir()
    write_tier(home, "pi", 1000, "memory_gb_per_s = 4.0", "token_ms_max = 80.0")
    write_tier(home, "tiny", 100)
    with opened(home) as there:
        now_ms, v1 = there.clock.now_ms(), digest_of((folder / "v1.onnx").read_bytes())
        for tier, version, count in FLEET:
            for number in range(count):
                name = f"{tier}-{version}-{number}"
                files: dict[str, str] = {"v1.onnx": v1} if version else {}
                said = device_report(name, 1, version, files=files, tier=tier, capacity=CELL)
                there.store.save([DeviceRecord(device=DeviceId(name), report=said, seen_ms=now_ms)])
    return home


def write_tier(home: Path, name: str, memory_mb: int, *lines: str) -> None:
    text = "\n".join([f"memory_mb = {memory_mb}", "disk_mb = 8000", 'runtime = "onnx"', *lines, ""])
    (home / "tiers" / f"{name}.toml").write_text(text)


def ask(home: Path, *versions: str, **changes: Any) -> TradeoffReport:
    return weigh(home, Question(family="digits", versions=versions or VERSIONS, **changes))


def options(report: TradeoffReport, tier: str) -> dict[str, Option]:
    return {
        option.version: option for table in report.tiers if table.name == tier for option in table.options
    }


def model(home: Path, version: str) -> bytes:
    return (home.parent / f"{version}.onnx").read_bytes()


def test_only_what_fits_and_has_a_complete_scorecard_is_ever_best(home: Path) -> None:
    report = ask(home, axes=("drift", "memory", "bytes"))
    standings = {each.version: each.standing for each in report.candidates}
    assert standings == {"v1": "scored", "slim": "scored", "wrong": "failed", "new": "unscored"}
    pi, tiny = options(report, "pi"), options(report, "tiny")
    assert pi["v1"].is_best
    assert [mark(pi[version]) for version in ("wrong", "new")] == ["out", "out"]
    assert report.candidates[3].remedy == "whimbrel score digits new --against v1"
    # Beside v1, which may answer until then, 65 MB are too much.
    assert mark(tiny["slim"]) == "refused"
    assert re.search(r"MB of memory, \d+ % over the 100 MB of the tier", tiny["slim"].broken[0].detail)
    assert not any(option.is_best for option in tiny.values() if option.fits is False)


def test_what_is_smaller_and_not_shown_to_be_worse_is_named_with_what_is_undecided(home: Path) -> None:
    report = ask(home, "v1", "slim", axes=("accuracy", "memory"))
    (comparison,) = report.comparisons
    (suite,) = comparison.suites
    assert (suite.name, suite.flips.count) == ("classes", 300)
    assert (suite.flips.gained, suite.flips.lost, comparison.accuracy) == (20, 16, "undecided")
    (rival,) = options(report, "pi")["v1"].perhaps_beaten_by
    assert (rival.version, rival.better, rival.undecided) == ("slim", ["memory"], ["accuracy"])
    assert (
        "Which of v1 and slim gives more right answers is not decided: +1.3 points" in report.paragraph_text
    )
    sure = ask(
        home,
        "v1",
        "slim",
        axes=("accuracy", "memory"),
        margins=msgspec.structs.replace(report.margins, accuracy=1.0),
    )
    assert [rival.version for rival in options(sure, "pi")["v1"].beaten_by] == ["slim"]
    assert options(sure, "pi")["slim"].is_best


def test_bytes_are_those_of_the_fleets_own_ways(home: Path) -> None:
    report = ask(home, "v1", "slim", prices=PRICES)
    found = options(report, "pi")
    assert [(way.version, way.devices, way.kind) for way in found["v1"].air.ways] == [
        ("v1", 3, "there"),
        ("", 1, "whole"),
    ]
    assert found["v1"].air.total_bytes == wire_bytes(len(model(home, "v1")))
    slim = found["slim"].air
    assert slim.total_bytes == 4 * wire_bytes(len(model(home, "slim")))
    assert (slim.devices, slim.mean_bytes, slim.undelivered) == (4, slim.total_bytes / 4, 3)
    assert found["slim"].cost == pytest.approx(0.4 * slim.total_bytes / 1e6)
    assert all(option.cost is None for option in options(report, "tiny").values())
    assert report.strays == 1
    ((missing),) = report.missing
    assert (missing.base, missing.version, missing.devices) == ("v1", "slim", 6)


def test_deltas_that_are_missing_are_built_when_asked_for_and_measured_exactly(
    home: Path, tmp_path: Path
) -> None:
    near = write_classifier(tmp_path / "near.onnx", 1, hidden=4000)
    data = bytearray(near.read_bytes())
    data[-4000:-3000] = bytes(1000)
    near.write_bytes(data)
    health = home.parent / "health.json"
    operations.add_release(home, "digits", "near", [near], runtime="onnx", health=health)
    before = options(ask(home, "near"), "pi")["near"].air
    assert {way.kind for way in before.ways} == {"whole"}
    report = ask(home, "near", is_building=True)
    with opened(home) as there:
        name = DeltaName(digest_of(model(home, "v1")), digest_of(bytes(data)))
        built = build_delta(there.blobs, name, {"v1.onnx": name.base}, {"near.onnx": name.result})
    ways = {way.version: way for way in options(report, "pi")["near"].air.ways}
    assert (ways["v1"].kind, ways["v1"].wire_bytes) == ("estimated", wire_bytes(built.blob.length))
    assert ways[""].kind == "whole"
    assert report.missing == []
    assert any("not signed" in note for note in report.notes)
    assert ask(home, "near").tiers == report.tiers  # what was built is remembered


def test_whoever_looks_needs_no_keys(home: Path) -> None:
    keys = home / "keys"
    keys.rename(home / "elsewhere")
    try:
        assert len(ask(home, "v1", "slim").candidates) == 2
    finally:
        (home / "elsewhere").rename(keys)


def test_latency_says_where_it_comes_from(home: Path) -> None:
    report = ask(home, "v1", "slim")
    modelled, scored = options(report, "pi")["v1"].latency, options(report, "tiny")["v1"].latency
    assert modelled is not None
    assert scored is not None
    assert modelled.value == pytest.approx(1000 * len(model(home, "v1")) / 4e9)
    assert modelled.basis == "modelled: all weights at 4 GB/s"
    assert scored.basis.startswith("p50 on the scorecard's machine: ")
    sha256 = digest_of(model(home, "v1"))
    write_tier(
        home, "pi", 1000, "memory_gb_per_s = 4.0", f'[[measured]]\nsha256 = "{sha256}"\ntokens_per_s = 50.0'
    )
    try:
        measured = options(ask(home, "v1", "slim", axes=("latency",)), "pi")
    finally:
        write_tier(home, "pi", 1000, "memory_gb_per_s = 4.0", "token_ms_max = 80.0")
    assert measured["v1"].latency is not None
    assert (measured["v1"].latency.value, measured["v1"].latency.basis) == (20.0, "measured on pi")
    assert all(
        option.is_best for option in measured.values()
    )  # 20 ms that were measured against less that was modelled


def test_energy_is_traffic_and_operations_at_the_prices_that_the_note_gives(home: Path) -> None:
    report = ask(home, "v1")
    (each,) = report.candidates
    assert each.energy_mj is not None
    assert each.energy_mj == pytest.approx(
        (162.5 * (each.moved_bytes or 0) + 2.3 * (each.operations or 0)) / 1e9
    )
    assert any(
        "162.5 pJ" in note and "2.3 pJ" in note and "comparisons only" in note for note in report.notes
    )


def leaves(value: Any) -> Iterator[Any]:
    """Everything that is not a list or an object."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def test_every_number_of_the_paragraph_is_in_the_data(home: Path) -> None:
    report = ask(home, prices=PRICES)
    data = msgspec.json.decode(msgspec.json.encode(report))
    parts = data.pop("paragraph")
    texts = [str(each) for each in leaves(data) if isinstance(each, str)]
    numbers = [each for each in leaves(data) if isinstance(each, int | float) and not isinstance(each, bool)]
    shown = {
        text
        for number in numbers
        for text in (
            f"{number:,}",
            f"{100 * number:.1f}",
            f"{100 * number:+.1f}",
            f"{100 * number:g}",
            f"{number:.3f}",
            f"{number:.1f}",
            f"{number:,.2f}",
            f"{number / (1 << 20):.1f}",
            bytes_text(abs(round(number))).split(" ")[0],
        )
    }
    text = "".join(part["text"] for part in parts)
    for each in sorted(texts, key=len, reverse=True):  # names, and details of tiers, word by word
        text = text.replace(each, " ") if any(letter.isdigit() for letter in each) else text
    found = re.findall(r"[+-]?\d[\d,]*\.?\d*", text)
    assert len(found) > 20
    assert [each for each in found if each.rstrip(",.") not in shown] == []


def test_every_part_of_the_paragraph_that_is_no_plain_word_names_its_place_in_the_data(home: Path) -> None:
    report = ask(home, prices=PRICES)
    data = msgspec.to_builtins(report)
    for part in report.paragraph:
        if not part.source:
            assert not re.search(r"\d", part.text)
            continue
        value = data
        for step in part.source.split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]
        assert value == part.text or isinstance(value, int | float)
    text = report.paragraph_text
    assert "wrong is no choice: scorecard failed in " in text
    assert "new is no choice: no scorecard." in text
    assert "EUR" in text
    assert "  " not in text


def test_without_tier_files_there_is_one_table_from_the_scorecards_alone(tmp_path: Path) -> None:
    operations.init_repository(tmp_path / "server", "lab", port=0)
    health = write_health_plan(tmp_path / "health.json")
    for version, hidden in (("a", 50), ("b", 40)):
        path = write_classifier(tmp_path / f"{version}.onnx", 1, hidden=hidden)
        operations.add_release(tmp_path / "server", "digits", version, [path], runtime="onnx", health=health)
    report = ask(tmp_path / "server", "a", "b")
    assert [(table.name, table.devices) for table in report.tiers] == [("all devices", 0)]
    (a, b) = report.tiers[0].options
    assert (a.fits, a.is_best, b.is_best) == (None, False, False)
    assert a.air.mean_bytes == wire_bytes(len((tmp_path / "a.onnx").read_bytes()))
    assert "there is no version to choose" in report.paragraph_text
    assert "no reference" in report.notes[0]


class _Tables(HTMLParser):
    """Counts tags, and whether each that has to be is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in {"meta", "line", "circle"}:
            self.opened.append(tag)
        assert not any(name in {"src", "href"} for name, _ in attrs), "nothing from outside"

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line", "circle"}:
            assert self.opened.pop() == tag


def test_the_page_is_whole_has_every_tier_and_needs_nothing_from_outside(home: Path) -> None:
    report = ask(home, prices=PRICES)
    page = render(report)
    parser = _Tables()
    parser.feed(page)
    assert parser.opened == []
    assert parser.counts["svg"] == 2
    assert parser.counts["table"] == 2 + 3
    for table in report.tiers:
        assert f"<h2>{table.name}</h2>" in page
    assert 'title="candidates.0.suites.0.right"' in page


def test_the_command_prints_lines_json_and_a_page(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tradeoffs", "digits", *VERSIONS, "--dir", str(home), "--tier", "pi"]
    assert main([*words, "--html", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert "pi: 1000 MB of memory, 8000 MB of disk, 80 ms a token; 4 devices; v1 on 3, nothing on 1" in text
    assert "--deltas builds these" in text
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    (tmp_path / "prices.toml").write_text('currency = "EUR"\nper_mb = 0.1\n')
    words += ["--prices", str(tmp_path / "prices.toml"), "--axis", "bytes", "--margin", "drift=0.5", "--json"]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["axes"] == ["bytes"]
    assert value["margins"]["drift"] == 0.5
    assert value["paragraph_text"] == "".join(part["text"] for part in value["paragraph"])
    assert msgspec.convert(value, TradeoffReport).tiers[0].options[0].cost is not None
    assert list(text_lines(msgspec.convert(value, TradeoffReport)))


def test_a_scorecard_that_no_release_names_can_be_given(home: Path) -> None:
    details = operations.show_release(home, "digits", "slim")
    assert details.scorecard is not None
    other = msgspec.structs.replace(details.scorecard, verdict="failed")
    report = ask(home, "slim", cards=(other,))
    assert (report.candidates[0].standing, report.candidates[0].scorecard_sha256) == (
        "failed",
        digest_of(encode_card(other)),
    )
    with pytest.raises(RequestError, match="about other files than those of the versions"):
        ask(home, "v1", cards=(other,))


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["digits", "v9"], 1, "v9"),
        (["digits", "v1", "--tier", "huge"], 1, "there is no tier huge (known are pi, tiny)"),
        (["digits", "v1", "--axis", "beauty"], 2, "invalid choice: 'beauty'"),
        (["digits", "v1", "--margin", "accuracy=3"], 2, "'accuracy=3' is not AXIS=X"),
        (["digits", "v1", "--margin", "memory=1"], 2, "one of accuracy, drift, latency"),
        (
            ["digits", "v1", "--prices", "{bad}"],
            1,
            "bad.toml: Expected `float | null`, got `str` - at `$.per_mb`",
        ),
        (["digits", "v1", "--prices", "{none}"], 1, "none.toml: No such file"),
        (["digits", "v1", "--scorecard", "{bad}"], 1, "bad.toml is no scorecard"),
        (["digits", "v1", "--html", "{none}/x/y.html"], 1, "cannot be written"),
        (["digits"], 2, "VERSION"),
        (["digits", *(f"v{number}" for number in range(17))], 1, "17 versions, possible are 1 to 16"),
    ],
)
def test_bad_input_is_refused_with_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, told: str
) -> None:
    (tmp_path / "bad.toml").write_text('currency = "EUR"\nper_mb = "much"\n')
    places = {"bad": tmp_path / "bad.toml", "none": tmp_path / "none.toml"}
    command = [word.format(**places) for word in words]
    assert main(["tradeoffs", *command, "--dir", str(home)]) == code
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
