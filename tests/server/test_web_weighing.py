"""Tiers, scorecards beside each other and trade-offs, through the HTTP API of a real server."""

from collections.abc import Iterator

import pytest

from protocol.ids import DeviceId
from server import operations
from server.config import WebSettings, read_config
from server.fleet.registry import DeviceRecord
from server.home import opened
from server.runtime import Server
from server.web.serving import WebServer
from tests.models import write_classifier
from tests.server.samples import report
from tests.server.test_web import Site
from tests.server.tradeoffs.cards import bind_card, make_card

TIER = 'memory_mb = {}\ndisk_mb = 8000\nruntime = "onnx"\n'
FLEET = (("a", "large"), ("b", "large"), ("c", "small"), ("d", "odd"), ("e", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """v1 is published, v2 a draft with a scorecard, v3 a smaller draft that was compared with v2 and is worse. Five devices run v1."""
    site = Site(tmp_path_factory.mktemp("weighing"))
    site.close()
    folder = site.folder
    path = write_classifier(folder.parent / "v3.onnx", seed=3, hidden=32)
    operations.add_release(
        folder, "digits", "v3", [path], runtime="onnx", health=folder.parent / "health.json"
    )
    v2, v3 = (operations.show_release(folder, "digits", name).record.release for name in ("v2", "v3"))
    bind_card(folder, make_card(v2))
    bind_card(folder, make_card(v3, v2, flips=(2, 40), kl=(0.5, 0.4, 0.6)))
    write_tiers(site, large=1000, small=100)
    with opened(folder) as home:
        now_ms = home.clock.now_ms()
        home.store.save(
            [
                DeviceRecord(device=DeviceId(name), report=report(name, 1, "v1", tier=tier), seen_ms=now_ms)
                for name, tier in FLEET
            ]
        )
    site.server = Server(read_config(folder), seed=1)
    site.server.start()
    site.web = WebServer(site.server, WebSettings(port=0))
    site.web.start()
    site.sign_in("viewer")
    yield site
    site.close()


def write_tiers(site: Site, **memory_mb: int) -> None:
    (site.folder / "tiers").mkdir(exist_ok=True)
    for name, size in memory_mb.items():
        (site.folder / "tiers" / f"{name}.toml").write_text(TIER.format(size))


def test_tiers_are_told_with_their_devices_and_with_why_a_release_is_refused(site: Site) -> None:
    told = site.ask("/api/v1/tiers").json
    large, small = told["tiers"]
    assert (large["name"], large["memory_mb"], large["devices"]) == ("large", 1000, 2)
    assert large["running"] == [{"family": "digits", "version": "v1", "devices": 2}]
    assert [(each["version"], each["state"], each["fits"]) for each in large["releases"]] == [
        ("v3", "draft", True),
        ("v2", "draft", True),
        ("v1", "published", True),
    ]
    v3, _, v1 = small["releases"]
    assert (v3["fits"], v1["fits"]) == (False, True)  # v1 stands beside no other published version
    assert "% over the 100 MB of the tier" in v3["broken"][0]
    assert v3["would_fit"][0].startswith("stopping the old version first")
    assert told["strays"] == {"": 1, "odd": 1}


def test_a_release_is_shown_beside_the_one_that_it_was_compared_with(site: Site) -> None:
    found = site.ask("/api/v1/releases/digits/v3").json["comparison"]
    assert (found["version"], found["is_paired"]) == ("v2", True)
    rows = {row["name"]: row for row in found["rows"]}
    right = rows["classes, right of 300"]
    assert (right["unit"], right["before"], right["now"]) == ("share", 0.9, pytest.approx(232 / 300))
    value, low, high = right["change"]
    assert value == pytest.approx(-38 / 300)
    assert low < value < high < 0
    assert right["is_better"] is False
    assert rows["size of all files"]["before"] > rows["size of all files"]["now"]
    assert rows["KL divergence, mean of 100"]["now"] == 0.5
    apart = site.ask("/api/v1/releases/digits/v2").json["comparison"]
    assert (apart["version"], apart["is_paired"]) == ("v1", False)
    assert {row["before"] for row in apart["rows"]} == {None}  # v1 has no scorecard
    assert site.ask("/api/v1/releases/digits/v1").json["comparison"] is None


def test_the_versions_of_a_family_are_weighed_and_the_same_ones_if_they_are_named(site: Site) -> None:
    told = site.ask("/api/v1/tradeoffs/digits")
    assert told.status == 200
    assert [each["version"] for each in told.json["candidates"]] == ["v1", "v2", "v3"]
    assert told.json["reference"] == "v2"
    assert "no scorecard" in told.json["paragraph"]
    assert [(tier["name"], tier["devices"]) for tier in told.json["tiers"]] == [("large", 2), ("small", 1)]
    named = site.ask("/api/v1/tradeoffs/digits?version=v3&version=v2&axis=bytes&reference=v2").json
    assert [each["version"] for each in named["candidates"]] == ["v3", "v2"]
    v3, v2 = named["tiers"][0]["options"]
    assert (v3["is_best"], v2["is_best"]) == (True, False)  # by bytes alone, whatever it answers
    assert v2["beaten_by"] == [{"version": "v3", "better": ["bytes"], "undecided": []}]
    (comparison,) = named["comparisons"]
    assert (comparison["accuracy"], comparison["drift"]) == ("worse", "worse")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("tradeoffs/nobody", 404),
        ("tradeoffs/digits?version=v9", 404),
        ("tradeoffs/digits?version=%20", 422),
        ("tradeoffs/digits?axis=beauty", 422),
        ("tradeoffs/digits?" + "&".join(["version=v1"] * 17), 422),
        ("tradeoffs/digits?reference=v9", 404),
    ],
)
def test_what_cannot_be_weighed_is_refused_with_a_reason(site: Site, path: str, status: int) -> None:
    told = site.ask(f"/api/v1/{path}")
    assert (told.status, bool(told.json["message"])) == (status, True)


def test_a_malformed_tier_is_told_with_its_line(site: Site) -> None:
    (site.folder / "tiers" / "odd.toml").write_text('memory_mb = "much"\n')
    try:
        for path in ("tiers", "tradeoffs/digits"):
            told = site.ask(f"/api/v1/{path}")
            assert told.status == 409
            assert "odd.toml line 1" in told.json["message"]
    finally:
        (site.folder / "tiers" / "odd.toml").unlink()
