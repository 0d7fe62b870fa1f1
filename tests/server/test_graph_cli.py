"""`whimbrel delta graph` over a real repository with real deltas, and what it says without one."""

import json
from pathlib import Path

import pytest

from protocol.delta.format import Profile
from protocol.delta_graph import LINKS_MAX
from protocol.ids import DeviceId, Family, Version, digest_of
from protocol.messages import Capacity
from protocol.release import DeltaName, delta_target
from server import operations
from server.cli import main
from server.fleet.registry import DeviceRecord
from server.graph_cli import graph_report
from server.home import opened
from server.ports import IdleDelta
from server.releases.builders import build_delta
from server.releases.catalog import blob_target
from server.rollouts.records import RolloutRecord
from tests.server.samples import publish_models, report

CELL = Capacity(link_bytes_per_s=8_192, processor_percent=64, delta_memory_bytes=1 << 27, links_max=LINKS_MAX)


def sign(home: Path, *names: DeltaName) -> None:
    """Build deltas and sign them, as a server does."""
    with opened(home) as there:
        targets = []
        for name in names:
            built = build_delta(there.blobs, name, {}, {})
            targets.append(blob_target(delta_target(*name), built.blob, built.memory_bytes))
        publisher, now_ms = there.publisher(), there.clock.now_ms()
        there.store.sign(lambda before: publisher.publish(before, targets, (), now_ms).repository)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Four published versions, the deltas between the first three, and devices on each."""
    models = publish_models(tmp_path, {"1": 1, "2": 2, "3": 3, "4": 4}, side=300)
    home = tmp_path / "server"
    files = {version: digest_of(path.read_bytes()) for version, path in models.items()}
    sign(
        home,
        DeltaName(files["1"], files["2"]),
        DeltaName(files["2"], files["3"], Profile.FAST),
        DeltaName(files["3"], files["4"]),
    )
    with opened(home) as there:
        now_ms = there.clock.now_ms()
        there.store.create_rollout(
            lambda number, _: RolloutRecord(
                id=f"r{number}", family=Family("digits"), version=Version("3"), created_ms=now_ms
            )
        )
        devices = [("a", "1", CELL), ("b", "1", CELL), ("c", "2", CELL), ("d", "3", None), ("e", "", None)]
        for device, version, capacity in devices:
            installed: dict[str, str] = {models[version].name: files[version]} if version else {}
            said = report(device, 1, version, files=installed, capacity=capacity)
            there.store.save([DeviceRecord(device=DeviceId(device), report=said, seen_ms=now_ms)])
        absent = report("gone", 1, "4", files={models["4"].name: files["4"]})
        there.store.save([DeviceRecord(device=DeviceId("gone"), report=absent, seen_ms=1)])
        unneeded = delta_target(files["3"], files["4"])
        blob = there.blobs.put(b"x")
        there.store.save([IdleDelta(path=unneeded, since_ms=now_ms, blob=blob)])
    return home


def test_every_version_in_the_field_has_its_way(home: Path) -> None:
    found = graph_report(home)
    ways = {(way.version, way.devices): way for way in found.ways}
    assert set(ways) == {("1", 2), ("2", 1), ("3", 1), ("", 1)}
    assert ways["1", 2].versions == ["2", "3"]
    assert ways["2", 1].versions == ["3"]
    assert ways["3", 1].targets == []
    assert [target.split("/")[0] for target in ways["", 1].targets] == ["files"]
    assert ways["1", 2].wire_bytes < ways["1", 2].whole_bytes / 10
    assert ways["1", 2].seconds > ways["2", 1].seconds > ways["3", 1].seconds == 0
    assert all(way.to == "3" for way in found.ways)
    assert found.ways[0].devices == 2


def test_every_delta_is_shown_with_whether_somebody_needs_it(home: Path) -> None:
    deltas = {(edge.base, edge.result, edge.kind): edge for edge in graph_report(home).edges if edge.base}
    assert set(deltas) == {("1", "2", "small"), ("2", "3", "fast"), ("3", "4", "small")}
    assert deltas["1", "2", "small"].is_needed
    assert deltas["2", "3", "fast"].is_needed
    assert not deltas["3", "4", "small"].is_needed
    assert deltas["3", "4", "small"].idle_since_ms is not None
    assert deltas["1", "2", "small"].idle_since_ms is None
    assert all(edge.memory_bytes > 1 << 20 for edge in deltas.values())


def test_programs_get_json_and_people_a_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["delta", "graph", "--dir", str(home), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [way["versions"] for way in printed["ways"] if way["version"] == "1"] == [["2", "3"]]
    assert main(["delta", "graph", "--dir", str(home)]) == 0
    text = capsys.readouterr().out
    assert "1 > 2 > 3 (fast)" in text
    assert "whole 3" in text
    assert "is there" in text
    assert "8.2 kB/s" in text
    edges, _, ways = text.partition("\n\n")
    assert edges.splitlines()[0].split() == [
        "FAMILY",
        "FILE",
        "FROM",
        "TO",
        "KIND",
        "FETCH",
        "MEMORY",
        "NEEDED",
    ]
    assert len(edges.splitlines()) == 1 + 4 + 3
    assert len(ways.splitlines()) == 1 + 4


def test_a_family_can_be_chosen_and_one_that_is_not_there_is_one_line(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graph_report(home, "digits") == graph_report(home)
    for name in ("other", "Not A Name"):
        assert main(["delta", "graph", "--dir", str(home), "--family", name]) == 1
        err = capsys.readouterr().err
        assert err.startswith("whimbrel: ")
        assert err.count("\n") == 1


def test_without_a_rollout_the_fleet_is_shown_on_its_way_to_what_was_published_last(tmp_path: Path) -> None:
    models = publish_models(tmp_path, {"1": 1, "2": 2})
    with opened(tmp_path / "server") as there:
        said = report("a", 1, "1", files={"m": digest_of(models["1"].read_bytes())})
        now_ms = there.clock.now_ms()
        there.store.save([DeviceRecord(device=DeviceId("a"), report=said, seen_ms=now_ms)])
    (way,) = graph_report(tmp_path / "server").ways
    assert (way.version, way.to, way.versions) == ("1", "2", ["2"])


def test_an_empty_repository_and_none_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["delta", "graph", "--dir", str(tmp_path / "server")]) == 1
    assert "whimbrel init" in capsys.readouterr().err
    operations.init_repository(tmp_path / "server")
    assert main(["delta", "graph", "--dir", str(tmp_path / "server")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Nothing is published yet",
        "",
        "No device has reported yet, or none has anywhere to go",
    ]
