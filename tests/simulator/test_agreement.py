"""The virtual world is checked against the real one, and the check can fail."""

import io
import json
import tomllib
from itertools import islice, pairwise
from pathlib import Path

import pytest
from msgspec.structs import replace

from protocol.errors import RequestError
from server import operations
from server.broker.packets import Connect, Pingreq, Pingresp, Puback, Publish, Subscribe
from simulator.agree_cli import live_scenario_names, load_live_scenario, tell_agreement
from simulator.agreement import compared, largest_gap, state_seconds, verdict_of
from simulator.cli import main
from simulator.fleet import run_fleet
from simulator.live.agree import agreement_of, model_of
from simulator.live.brokers import Embedded, Mosquitto, OwnBroker
from simulator.live.possible import check_possible
from simulator.live.scenario_run import LiveRun, plan_of, run_scenario
from simulator.loop import US_PER_S
from simulator.models import contents_of, release_of
from simulator.network import Path as LinkPath
from simulator.population import kind_of, path_of
from simulator.recording import Recorder
from simulator.results import FleetResult
from simulator.scenario import DeviceKind, Link, Model, ReleasePlan, Scenario
from simulator.schedule import boot_instants_us, duty_cycle
from simulator.streams import Stream
from tests.server.brokers import MOSQUITTO_MISSING, MOSQUITTO_PATH, Address, Wire, is_listening

KIND = DeviceKind(
    clock_off_s=0.0,
    drift_ppm=0.0,
    inference_ms=20.0,
    processor_percent=100,
    link=Link(down_bytes_per_s=220_000, up_bytes_per_s=220_000, spread=2.0, latency_ms=20.0, jitter_ms=0.0),
)
SMALL = Scenario(
    devices=12,
    seed=5,
    keep_alive_s=30,
    boot_spread_s=1.0,
    population=(KIND,),
    releases=(ReleasePlan(at_s=3.0, canary_count=1, failures_max=2, wave_timeout_s=60.0),),
)


def of_kind(scenario: Scenario, **changes: object) -> Scenario:
    (kind,) = scenario.population
    return replace(scenario, population=(replace(kind, link=replace(kind.link, **changes)),))


def as_live(result: FleetResult) -> LiveRun:
    """A live run that went exactly as one in virtual time."""
    return LiveRun(
        reached_s=result.reached_s,
        counts=result.rollouts[0].counts,
        state=result.rollouts[0].state,
        steps=[[(0, "downloading"), (1_000, "idle")]] * result.scenario.devices,
        down_bytes=result.down_bytes,
        wall_s=1.0,
        cpu_s=1.0,
        load=0.0,
        processors=1,
    )


# The measure


def test_instants_are_compared_at_every_twentieth_of_the_fleet() -> None:
    live = [float(10 * number) for number in range(1, 21)]
    virtual = [*live[:9], 120.0, *live[10:]]
    rows, worst = compared(20, virtual, live)
    assert [row.percent for row in rows] == list(range(5, 100, 5))
    assert (worst.percent, worst.virtual_s, worst.live_s) == (50, 120.0, 100.0)
    assert worst.difference == pytest.approx(0.2)


def test_a_share_that_only_one_side_reaches_is_the_worst_difference() -> None:
    live = [float(number) for number in range(1, 11)]
    _, worst = compared(10, live[:8], live)
    assert (worst.percent, worst.virtual_s, worst.live_s, worst.difference) == (85, None, 9.0, None)
    _, both = compared(10, live[:8], live[:8])
    assert both.difference == 0.0


def test_the_gap_is_the_largest_share_of_devices_that_only_one_side_has_at_an_instant() -> None:
    assert largest_gap(4, [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 3.5, 3.5]) == (0.25, 2.0)
    assert largest_gap(4, [1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0)
    assert largest_gap(4, [1.0, 1.0, 1.0], []) == (0.75, 1.0)


def test_time_in_states_is_a_mean_over_devices() -> None:
    steps = [[(0, "downloading"), (3_000, "trial"), (4_000, "idle")], [(0, "downloading"), (1_000, "idle")]]
    seconds = state_seconds(steps)
    assert (seconds["downloading"], seconds["trial"], seconds["syncing"]) == (2.0, 0.5, 0.0)


# What is drawn is drawn once


def test_links_come_and_go_at_instants_that_belong_to_the_device() -> None:
    link = Link(on_s=60.0, off_s=20.0)
    few, many = Scenario(devices=3), Scenario(devices=300)
    changes = list(islice(duty_cycle(few, 2, link), 4_000))
    assert changes == list(islice(duty_cycle(many, 2, link), 4_000))
    assert [is_up for _, is_up in changes[:4]] == [True, False, True, False]
    assert all(before < after for (before, _), (after, _) in pairwise(changes))
    lengths = [(after - before) / US_PER_S for (before, _), (after, _) in pairwise(changes)]
    assert sum(lengths[::2]) / 2_000 == pytest.approx(60.0, rel=0.1)
    assert sum(lengths[1::2]) / 2_000 == pytest.approx(20.0, rel=0.1)
    assert list(duty_cycle(few, 2, Link())) == []


def test_a_fleet_boots_and_loses_its_links_at_the_instants_of_the_schedule() -> None:
    link = Link(on_s=20.0, off_s=10.0, jitter_ms=0.0)
    scenario = replace(
        SMALL,
        devices=3,
        population=(replace(KIND, link=link),),
        releases=(ReleasePlan(at_s=90.0, canary_count=3),),
    )
    recorder = Recorder()
    result = run_fleet(scenario, recorder=recorder)
    assert result.failure is None
    assert result.recording is not None
    tracks = result.recording.tracks
    boots_ms = [at_us // 1_000 for at_us in boot_instants_us(scenario)]
    assert [tracks.at_ms[tracks.device.index(number)] for number in range(3)] == boots_ms


def test_a_live_device_has_the_link_and_the_settings_of_the_virtual_one() -> None:
    scenario = load_live_scenario("slow-links", [])
    for number in (0, 7, 99):
        kind = kind_of(scenario, number)
        path, plan = path_of(scenario, number, kind), plan_of(scenario, number)
        assert plan.link.bandwidth_bytes_s == int(18_000 * path.rate_factor)
        settings = dict(plan.settings)
        assert settings["link_kb_per_s"] == path.planned_bytes_per_s() // 1_000
        assert settings["memory_mb_max"] == 1024


# What waits for a connection that is gone


def test_a_lost_connection_leaves_nothing_on_the_link() -> None:
    path = LinkPath(Link(down_bytes_per_s=10_000, latency_ms=10.0, jitter_ms=0.0), Stream(1, "link"), None, 0)
    assert path.down(0, 1_000_000) > 100 * US_PER_S
    path.cut(2 * US_PER_S)
    assert path.down_bytes == pytest.approx(20_000, rel=0.01)
    assert path.down(3 * US_PER_S, 100) < 3.1 * US_PER_S


def test_links_that_break_do_not_carry_what_nobody_waits_for() -> None:
    """The file came almost twice when what a broken connection had queued still occupied the link."""
    link = Link(down_bytes_per_s=20_000, up_bytes_per_s=20_000, on_s=60.0, off_s=20.0, jitter_ms=0.0)
    plan = ReleasePlan(changed_share=1.0, canary_count=20)
    scenario = Scenario(
        devices=20,
        population=(DeviceKind(link=link),),
        model=Model(bytes=1 << 20),
        releases=(plan,),
        keep_alive_s=30,
    )
    result = run_fleet(scenario)
    assert result.failure is None
    assert result.delta_bytes == {}  # nothing is as before, so devices fetch the file
    assert result.down_bytes / 20 < 1.2 * scenario.model.bytes


# Brokers that die


@pytest.mark.parametrize(
    "kind",
    [
        Embedded,
        pytest.param(
            Mosquitto,
            marks=[
                pytest.mark.mosquitto,
                pytest.mark.skipif(MOSQUITTO_PATH is None, reason=MOSQUITTO_MISSING),
            ],
        ),
    ],
)
def test_a_broker_that_was_killed_comes_back_empty_on_its_port(kind: type[OwnBroker], tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path) if kind is Mosquitto else Embedded()
    broker.start()
    address = Address("own", "127.0.0.1", broker.port, 0)
    try:
        with Wire(address) as before:
            before.connect(Connect("one"))
            before.send(Publish("kept", b"x", 1, retain=True, packet_id=1))
            before.expect(Puback)
            assert retained(before) == [b"x"]
            broker.kill()
            assert before.is_closed_by_broker()
            assert not is_listening(broker.port)
        broker.restart()
        assert broker.port == address.port
        with Wire(address) as after:
            after.connect(Connect("two"))
            assert retained(after) == []
    finally:
        broker.stop()


def retained(wire: Wire) -> list[bytes]:
    wire.send(Subscribe(1, (("#", 0),)), Pingreq())
    wire.expect(Pingresp)
    return [packet.payload for packet in wire.packets if isinstance(packet, Publish)]


# What cannot be done live


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("population.0.link.loss=0.01", "population.0.link.loss is 0.01"),
        ("population.0.link.jitter_ms=5", "population.0.link.jitter_ms is 5"),
        ("population.0.link.online_hours=[8, 17]", "population.0.link.online_hours"),
        ("population.0.link.site_devices=4", "population.0.link.site_devices"),
        ("population.0.link.night_rate=2", "population.0.link.night_rate"),
        ("population.0.link.trace=[[10, 1000]]", "population.0.link.trace"),
        ("population.0.link.metered=true", "population.0.link.metered is true"),
        ("population.0.link.down_bytes_per_s=2000", "population.0.link is slower"),
        ("population.0.clock_off_s=2", "population.0.clock_off_s"),
        ("population.0.disk_bytes=1000000", "population.0.disk_bytes"),
        ("faults.storage=0.1", "faults.storage"),
        ("faults.poison=0.1", "faults.poison"),
        ("faults.power_s=100", "faults.power_s"),
        ("keep_alive_s=60", "keep_alive_s is 60"),
        ("releases.0.kind=wrong", "releases.0.kind is 'wrong'"),
        ("broker.queue_messages_max=5", "broker.queue_messages_max"),
        ("server.retained_bytes_max=5", "server.retained_bytes_max"),
        ("model.health=plan.json", "model.files and model.health"),
        ("devices=100000", "choose 1 to"),
    ],
)
def test_what_live_mode_cannot_do_is_refused_by_name(
    change: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", change, "--set", "faults.end_s=900"]
    assert main(["agree", "--scenario", "slow-links", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_scenario_of_virtual_time_is_refused_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["agree", "--scenario", "farm-sensors"]) == 1
    assert "broker-outage, on-and-off, slow-links" in capsys.readouterr().err


@pytest.mark.parametrize("name", live_scenario_names())
def test_the_scenarios_that_are_shipped_can_be_done_live(name: str) -> None:
    scenario = load_live_scenario(name, [])
    check_possible(scenario)
    assert scenario.devices == 100
    text = (Path(__file__).parents[2] / "simulator" / "live" / "scenarios" / f"{name}.toml").read_text()
    assert {"title", "asks", "expects"} <= tomllib.loads(text).keys()


# Both worlds


def test_a_bad_release_with_a_real_plan_fails_its_trial_in_virtual_time(models: Path, tmp_path: Path) -> None:
    """The plan of the digits lets a quarter of the answers be wrong."""
    scenario = replace(
        SMALL,
        model=model_of(models, tmp_path),
        releases=(replace(SMALL.releases[0], kind="wrong", canary_count=12, failures_max=0),),
    )
    result = run_fleet(scenario)
    assert result.failure is None
    assert result.rollouts[0].counts == {"rolled_back": 12}


def test_a_health_plan_that_is_none_is_told(tmp_path: Path) -> None:
    model = Model(files=("a", "b"), health=str(tmp_path / "none.json"))
    with pytest.raises(RequestError, match=r"none\.json"):
        release_of("v1", b"x", model)


@pytest.mark.alone
@pytest.mark.slow
def test_a_fleet_agrees_with_itself_and_a_wrong_world_does_not(models: Path, tmp_path: Path) -> None:
    scenario = replace(SMALL, model=model_of(models, tmp_path))
    check_possible(scenario)
    live = run_scenario(scenario, "embedded", tmp_path, lambda _text: None, 120.0)
    assert (live.state, live.counts) == ("finished", {"committed": 12})

    # Both sides publish the same description of the same bytes.
    contents = contents_of(scenario)
    for record in operations.list_releases(tmp_path / "server"):
        version = record.release.version
        assert record.release == release_of(version, contents[version], scenario.model)

    right = agreement_of(scenario, "embedded", "", run_fleet(scenario, recorder=Recorder()), live)
    (rate,) = {kind.link.down_bytes_per_s for kind in scenario.population}
    halved = of_kind(scenario, down_bytes_per_s=rate // 2)
    wrong = agreement_of(scenario, "embedded", "", run_fleet(halved, recorder=Recorder()), live)
    assert right.difference is not None
    assert wrong.difference is not None
    assert wrong.difference > 0.4
    assert abs(right.difference) < wrong.difference / 2
    assert right.live.down_bytes == pytest.approx(right.virtual.down_bytes, rel=0.1)
    output, errors = io.StringIO(), io.StringIO()
    report = tmp_path / "report.html"
    assert tell_agreement(wrong, output, errors, report=report) == 1
    assert "The runs disagree" in output.getvalue()
    page = report.read_text()
    assert verdict_of(wrong) in page
    assert page.count("<polyline") == 2


def test_equal_curves_give_exit_code_0_and_json_for_programs(models: Path, tmp_path: Path) -> None:
    scenario = replace(SMALL, devices=3, model=model_of(models, tmp_path))
    result = run_fleet(scenario, recorder=Recorder())
    found = agreement_of(scenario, "mosquitto", "whimbrel-sim agree", result, as_live(result))
    output, errors = io.StringIO(), io.StringIO()
    assert tell_agreement(found, output, errors, as_json=True) == 0
    document = json.loads(output.getvalue())
    assert (document["is_within"], document["difference"], document["gap"]) == (True, 0.0, 0.0)


@pytest.mark.alone
@pytest.mark.slow
def test_a_scenario_that_says_the_wrong_thing_of_the_machine_gives_exit_code_1(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials take a second here, and not eight."""
    file = tmp_path / "mistaken.toml"
    text = (Path(__file__).parents[2] / "simulator" / "live" / "scenarios" / "slow-links.toml").read_text()
    file.write_text(text.replace("inference_ms = 20.0", "inference_ms = 150.0"))
    options = ["--devices", "2", "--broker", "embedded", "--models", str(models)]
    for field in ("down_bytes_per_s", "up_bytes_per_s"):
        options += ["--set", f"population.0.link.{field}=2000000"]
    options += ["--set", "boot_spread_s=0.5", "--set", "releases.0.at_s=2"]
    assert main(["agree", "--scenario", str(file), *options]) == 1
    output = capsys.readouterr().out
    assert "The runs disagree: they differ by" in output
    assert "2 committed" in output
