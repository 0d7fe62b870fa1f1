"""The frontier of a requantized version in the trade-off report: what its points would weigh over the air of each tier."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from protocol.delta_graph import wire_bytes
from protocol.errors import ReleaseError
from protocol.ids import DeviceId, digest_of
from server import operations
from server.cli import main
from server.documents import read_card
from server.fleet.registry import DeviceRecord
from server.home import opened
from server.scorecard.frontier import Frontier, Share, check_frontier
from server.scorecard.frontier_display import notes
from server.tradeoffs.page import render
from server.tradeoffs.prices import Prices
from server.tradeoffs.records import FrontierTable, Margins, TradeoffReport
from server.tradeoffs.text import text_lines
from server.tradeoffs.weighing import Question, weigh
from tests.models import write_classifier, write_health_plan
from tests.server.frontiers import make_frontier, written
from tests.server.samples import report as device_report
from tests.server.tradeoffs.cards import bind_card, make_card

FLEET = (("pi", "v1", 3), ("pi", "", 1), ("tiny", "v1", 2), ("tiny", "v2", 1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 is what most of the fleet runs, v2 was chosen against it: 3 devices of tier pi and 2 of tier tiny have its file."""
    folder = tmp_path_factory.mktemp("frontiers")
    home = folder / "server"
    operations.init_repository(home, "lab", port=0)
    health = write_health_plan(folder / "health.json")
    releases = {}
    for version, seed in (("v1", 1), ("v2", 2)):
        path = write_classifier(folder / f"{version}.onnx", seed, hidden=1000)
        releases[version] = operations.add_release(
            home, "digits", version, [path], runtime="onnx", health=health
        ).release
    digests = {version: release.files[0].sha256 for version, release in releases.items()}
    card = make_card(releases["v2"], releases["v1"], kl=(0.004, 0.003, 0.006), frontier=frontier_of(folder))
    bind_card(home, make_card(releases["v1"]))
    bind_card(home, card)
    operations.publish_release(home, "digits", "v1")
    (home / "tiers").mkdir()
    for name in ("pi", "tiny"):
        (home / "tiers" / f"{name}.toml").write_text('memory_mb = 1000\ndisk_mb = 8000\nruntime = "onnx"\n')
    with opened(home) as there:
        for tier, version, count in FLEET:
            for number in range(count):
                name = f"{tier}-{version}-{number}"
                files = {f"{version}.onnx": digests[version]} if version else {}
                said = device_report(name, 1, version, files=files, tier=tier)
                there.store.save(
                    [DeviceRecord(device=DeviceId(name), report=said, seen_ms=there.clock.now_ms())]
                )
    return home


def frontier_of(folder: Path) -> Frontier:
    """One whose installed file is that of v1."""
    made = written(make_frontier(folder), (folder / "v2.onnx").read_bytes())
    return replace(made, installed=digest_of((folder / "v1.onnx").read_bytes()))


def ask(home: Path, **changes: Any) -> TradeoffReport:
    return weigh(home, Question(family="digits", versions=("v1", "v2"), **changes))


def tables(report: TradeoffReport) -> dict[str, FrontierTable]:
    found = {}
    for tier in report.tiers:
        (found[tier.name],) = tier.frontiers
    return found


def test_points_weigh_what_devices_with_the_installed_file_would_fetch(home: Path) -> None:
    found = tables(ask(home, prices=Prices(currency="EUR", tiers={"pi": 0.4})))
    assert {tier: (each.version, each.installed, each.devices) for tier, each in found.items()} == {
        "pi": ("v2", ["v1"], 3),
        "tiny": ("v2", ["v1"], 2),
    }
    sizes = {each.name: each.mean_bytes for each in found["pi"].options}
    assert sizes["nothing sent"] == 0
    assert sizes["0.5%"] == wire_bytes(5_000)
    point = next(each for each in found["pi"].options if each.is_chosen)
    assert (point.name, point.total_bytes) == ("0.5%", 3 * wire_bytes(5_000))
    assert point.cost == pytest.approx(3 * wire_bytes(5_000) / 1e6 * 0.4)
    assert all(each.cost is None for each in found["tiny"].options)


def test_points_are_beaten_by_the_margins_of_the_report(home: Path) -> None:
    strict = {each.name: each for each in tables(ask(home))["pi"].options}
    assert strict["plain"].beaten_by == ["0.5%", "1%"]
    assert strict["1%"].is_best
    loose = {each.name: each for each in tables(ask(home, margins=Margins(drift=1.0)))["pi"].options}
    assert loose["1%"].is_best  # fewer flips
    assert loose["nothing sent"].is_best


def test_people_and_programs_see_the_frontier_of_each_tier(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ask(home)
    text = "\n".join(text_lines(report))
    assert (
        "What could be sent instead of v2, for 3 devices with v1; measured on notes.txt, 4,088 tokens" in text
    )
    assert "plain, embedding frozen is beaten by 0.5%" in text
    assert "no difference are 0.01 nats" in text
    page = render(report)
    assert page.count("What could be sent instead of v2") >= 2
    assert "0.5% (chosen)" in page
    assert "Divergence from the float model over bytes to each device of tiny" in page
    assert main(["tradeoffs", "digits", "v1", "v2", "--json", "--dir", str(home)]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["tiers"][0]["frontiers"]
    assert [each["name"] for each in shown["options"] if each["is_chosen"]] == ["0.5%"]


def test_of_several_installed_files_each_device_is_counted_with_what_goes_to_it(home: Path) -> None:
    """On tier tiny two devices have v1 and one has v2: to these go 5,000 and 7,000 bytes of the chosen point, on pi three have v1."""
    whole = frontier_of(home.parent)
    other = digest_of((home.parent / "v2.onnx").read_bytes())
    points = tuple(
        replace(each, each_bytes=(each.delta_bytes, each.delta_bytes + 2_000 if each.delta_bytes else 0))
        for each in whole.points
    )
    fleet = (Share(installed=whole.installed, share=0.8), Share(installed=other, share=0.2))
    mixed = replace(whole, points=points, fleet=fleet)
    check_frontier(mixed, "mixed")
    with opened(home) as there:
        release = operations.show_release(home, "digits", "v2").record.release
        card = read_card(there, release)
    assert card is not None
    report = ask(home, cards=(msgspec.structs.replace(card, frontier=mixed),))
    found = tables(report)
    (tiny,) = [each for each in found["tiny"].options if each.is_chosen]
    total = 2 * wire_bytes(5_000) + wire_bytes(7_000)
    assert (found["tiny"].devices, tiny.total_bytes, tiny.mean_bytes) == (3, total, total / 3)
    assert found["tiny"].installed == ["v1", "v2"]
    assert found["pi"].devices == 3
    assert "for 3 devices with v1 or v2" in "\n".join(text_lines(report))
    assert notes(mixed)[0].startswith("Bytes are the mean over a fleet of which 80 % have ")
    with pytest.raises(ReleaseError, match="nothing sent: 0 deltas from the 2 files of the fleet"):
        check_frontier(replace(whole, fleet=fleet), "mixed")
