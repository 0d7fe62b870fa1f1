"""The scenarios that are shipped: each is read, run with fewer devices, and does what its text says."""

import json
from functools import cache
from pathlib import Path

import msgspec
import pytest

from protocol.errors import RequestError
from simulator.cli import main
from simulator.figures import figures_of
from simulator.fleet import run_fleet
from simulator.results import FleetResult
from simulator.scenario import Scenario
from simulator.scenario_files import ScenarioFile, load_scenario, scenario_names, scenario_text

HOUR_S = 3_600.0

DEVICES = {
    "bad-quantization": 50,
    "broker-outage": 20,
    "cellular-metered": 40,
    "commuter-cars": 40,
    "factory-site-broker": 50,
    "farm-sensors": 12,
    "key-theft": 30,
    "no-clocks": 40,
    "release": 60,
    "staged-rollout": 60,
    "thundering-herd": 150,
    "tiny-disks": 60,
}


@cache
def ran(name: str) -> FleetResult:
    """One run of a scenario; what it asserts is asserted of the same run."""
    result = run_fleet(load_scenario(name, [f"devices={DEVICES[name]}"]).scenario)
    assert result.failure is None, result.failure
    return result


def delta_bytes(result: FleetResult) -> int:
    return max(result.delta_bytes.values())


def test_every_scenario_is_tested() -> None:
    assert set(scenario_names()) == set(DEVICES)


@pytest.mark.parametrize("name", scenario_names())
def test_a_scenario_says_what_it_asks_and_what_to_expect(name: str) -> None:
    file = load_scenario(name)
    assert file.name == name
    assert file.title
    assert file.asks.endswith("?")
    assert file.expects.endswith(".")
    assert msgspec.json.decode(msgspec.json.encode(file.scenario), type=Scenario) == file.scenario


@pytest.mark.parametrize("name", sorted(set(DEVICES) - {"tiny-disks", "bad-quantization"}))
def test_every_device_gets_to_the_last_release(name: str) -> None:
    result = ran(name)
    last = result.scenario.releases[-1].version
    assert result.versions == {last: DEVICES[name]}
    assert len(result.reached_s) == DEVICES[name]


def test_release_costs_each_device_its_delta_once() -> None:
    result = ran("release")
    assert result.down_bytes_per_device[3] < 1.3 * delta_bytes(result)


def test_cars_update_at_home_and_only_there() -> None:
    result = ran("commuter-cars")
    home_s = (18.5 - 1.5 - result.scenario.start_hour) * HOUR_S
    assert all(sample.updated == 0 for sample in result.samples if sample.at_s < home_s)
    by_day = [sample.connections for sample in result.samples if 5 * HOUR_S < sample.at_s < home_s]
    assert max(by_day) <= 1  # the server's own
    assert result.reached_s[0] >= home_s - result.scenario.releases[0].at_s
    assert result.reached_s[-1] < 15 * HOUR_S


def test_a_site_takes_the_time_that_its_line_needs() -> None:
    result = ran("factory-site-broker")
    link = result.scenario.population[0].link
    line_s = DEVICES["factory-site-broker"] * delta_bytes(result) / link.site_bytes_per_s
    assert result.reached_s[-1] >= 0.8 * line_s
    assert result.down_bytes_per_device[3] > 1.5 * delta_bytes(
        result
    )  # asked for again while it waits in a queue


def test_metered_bytes_stay_near_the_delta() -> None:
    result = ran("cellular-metered")
    figures = figures_of(result)
    assert figures.metered_bytes == figures.down_bytes + figures.up_bytes
    assert figures.down_bytes_median < 1.5 * delta_bytes(result)
    assert figures.down_bytes_max < result.scenario.model.bytes / 4


def test_sensors_need_several_windows() -> None:
    result = ran("farm-sensors")
    assert result.completion_s[-1] > 12 * HOUR_S
    assert delta_bytes(result) < result.down_bytes_per_device[1] < 1.3 * delta_bytes(result)
    assert result.rollouts[0].counts == {"committed": DEVICES["farm-sensors"]}


def test_a_bad_quantization_is_stopped_and_the_repaired_one_is_not() -> None:
    result = ran("bad-quantization")
    assert [rollout.state for rollout in result.rollouts] == ["stopped", "stopped", "finished"]
    canaries = result.scenario.releases[0].canary_count
    wrong, slow, _ = (rollout.counts for rollout in result.rollouts)
    assert wrong.get("committed", 0) > 0 < wrong["rolled_back"]
    assert sum(wrong.values()) <= canaries
    assert set(slow) == {"rolled_back"}
    assert figures_of(result).blast_radius <= canaries / DEVICES["bad-quantization"]
    assert result.versions == {"v4": DEVICES["bad-quantization"]}


def test_a_staged_rollout_stops_by_evidence_and_the_good_release_reaches_all() -> None:
    result = ran("staged-rollout")
    assert [rollout.state for rollout in result.rollouts] == ["stopped", "stopped", "finished"]
    everywhere, one_tier, _ = result.rollouts
    assert everywhere.counts["rolled_back"] <= 5
    assert one_tier.counts["rolled_back"] <= 5 + 5
    assert "of tier old failed" in one_tier.reason or "devices failed" in one_tier.reason
    assert one_tier.counts.get("committed", 0) < DEVICES["staged-rollout"] / 2
    assert result.versions == {"v4": DEVICES["staged-rollout"]}


def test_who_can_publish_anything_brings_nothing_but_traffic() -> None:
    result = ran("key-theft")
    assert result.faults["attack.replay"] > 50
    assert result.faults["network.poison"] > 0
    assert [rollout.state for rollout in result.rollouts[:2]] == ["finished", "finished"]


def test_an_outage_costs_time_and_no_bytes() -> None:
    result = ran("broker-outage")
    assert result.faults == {"broker.crash": 1}
    assert result.completion_s[-1] > result.scenario.faults.broker_down_s
    assert result.completion_s[0] < result.scenario.faults.broker_down_s
    assert result.down_bytes_per_device[3] < 1.2 * result.scenario.model.bytes


def test_a_herd_comes_back_and_updates() -> None:
    result = ran("thundering-herd")
    assert result.faults == {"broker.crash": 3}
    assert max(sample.connections for sample in result.samples[-10:]) >= DEVICES["thundering-herd"]


def test_devices_without_a_clock_update() -> None:
    result = ran("no-clocks")
    assert result.faults["clock.unset"] > DEVICES["no-clocks"] / 2
    assert result.faults["clock.step"] > 0


def test_tiny_disks_refuse_before_the_first_byte_and_nobody_waits() -> None:
    result = ran("tiny-disks")
    assert set(result.outcomes) == {"committed", "rejected admission.disk"}
    tight = result.kinds["tight"]
    assert result.outcomes["rejected admission.disk"] == tight.devices == result.excused
    assert tight.down_bytes / tight.devices < delta_bytes(result) / 4
    assert result.versions == {"v1": tight.devices, "v2": result.kinds["roomy"].devices}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("devices = 10\n\n[faults]\ndrop = 2.0\n", ("line 4", "faults.drop", "<= 1.0")),
        (
            "[[population]]\n[[population]]\nweihgt = 1\n",
            ("line 3", "population[1].weihgt", "did you mean weight?"),
        ),
        ('[[releases]]\nkind = "awful"\n', ("line 2", "releases[0].kind", "awful")),
        ("devices = \n", ("line 1",)),
        ("[faults]\ndrop = 0.1\n", ("faults.drop does nothing", "faults.end_s")),
        ('devices = "ten"\n', ("line 1", "devices", "Expected `int`")),
        ("start_hour = nan\n", ("nan", "TOML")),
        ("population = []\n", ("line 1", "population", "length >= 1")),
    ],
)
def test_a_mistake_in_a_file_names_file_line_and_field(
    text: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        load_scenario(str(path))
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("faults", "FIELD=VALUE"),
        ("devices=none", "Expected `int`"),
        ("population.1.weight=2", "choose 0 to 0"),
        ("devices.0=2", "nothing below a value"),
        ("devices=0", ">= 1"),
        ("faults.drop=inf", "Expected `float`, got `str`"),
        ("fautls.drop=0.1", "did you mean faults?"),
    ],
)
def test_a_mistake_in_a_change_is_told(change: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_scenario("release", [change])
    assert change in str(caught.value)
    assert words in str(caught.value)


def test_changes_are_typed_and_reach_every_entry() -> None:
    file = load_scenario(
        "bad-quantization",
        ["population.*.link.loss=0.25", "releases.1.kind=hangs", "model.bytes=65536", "faults.end_s=60"],
    )
    assert [kind.link.loss for kind in file.population] == [0.25, 0.25]
    assert [plan.kind for plan in file.releases] == ["wrong", "hangs", "good"]
    assert (file.model.bytes, file.faults.end_s) == (65_536, 60.0)
    plain = load_scenario("release", ["population.0.name=car", "releases.*.failures_max=2"])
    assert (plain.population[0].name, plain.releases[0].failures_max) == ("car", 2)


def test_an_unknown_scenario_and_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for name, words in (
        ("factory-site-brokr", "did you mean factory-site-broker?"),
        (str(tmp_path / "none.toml"), "No such file"),
        (str(tmp_path), "Is a directory"),
    ):
        with pytest.raises(RequestError, match=words.replace("?", r"\?")):
            load_scenario(name)
    (tmp_path / "large.toml").write_bytes(b"#" * (2 << 20))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "list.json").write_text("[1]")
    for name, words in (("large.toml", "longer than"), ("binary.toml", "UTF-8"), ("list.json", "no table")):
        with pytest.raises(RequestError, match=words):
            load_scenario(str(tmp_path / name))


def test_the_commands_print_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["scenarios"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in scenario_names())
    assert main(["scenarios", "no-clocks"]) == 0
    printed = capsys.readouterr().out
    assert printed == scenario_text("no-clocks")
    copy = tmp_path / "no-clocks.toml"
    copy.write_text(printed)
    assert load_scenario(str(copy)) == load_scenario("no-clocks")
    assert main(["scenarios", "--json"]) == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == scenario_names()
    assert main(["scenarios", "no-clocks", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=ScenarioFile) == load_scenario("no-clocks")
    assert main(["scenarios", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["Faults"]["properties"]["drop"]["maximum"] == 1
    assert main(["scenarios", "nothing"]) == 1
    assert "there is no scenario 'nothing'" in capsys.readouterr().err


def test_fleet_takes_a_scenario_and_changes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scenario", "tiny-disks", "--devices", "20", "--seed", "3", "--set", "model.prompts=2"]
    assert main(["fleet", *options, "--json"]) == 0
    result = msgspec.json.decode(capsys.readouterr().out, type=FleetResult)
    assert (result.scenario.devices, result.scenario.seed, result.scenario.model.prompts) == (20, 3, 2)
    assert result.scenario.name == "tiny-disks"
    assert main(["fleet", "--scenario", "release", "--faults", "mixed"]) == 1
    assert "use --set" in capsys.readouterr().err
