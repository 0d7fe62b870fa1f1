"""A device that gives way: what it reads of its machine, what its configuration says, and a real agent whose window is closed."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from device.adapters.conditions import MachineConditions
from device.config import ConditionSources, load_config
from device.events import Conditions
from device.policy import Metered, Policy, Step, parse_window
from protocol.errors import RequestError
from server.operations import start_rollout
from tests.device.test_operator import Tell, agent, home, tell  # noqa: F401 - fixtures
from tests.server.brokers import wait_until

WAIT_S = 60.0
EVERYTHING = Policy(
    windows=(parse_window("22:00-06:00"),),
    battery_percent_min=30,
    temperature_c_max=70,
    load_max=2.0,
    pressure_percent_max=50,
    memory_bytes_min=1,
    metered=Metered.NEVER,
)
MAIN = 'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'


def put(root: Path, files: dict[str, str]) -> None:
    """Files as the kernel shows them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def read(root: Path, **sources: object) -> Conditions:
    return MachineConditions(EVERYTHING, ConditionSources(**sources), root).read()  # type: ignore[arg-type]  # a test's


# --- what the machine says ---------------------------------------------------------------------------------


def test_this_machine_can_be_read_and_only_what_is_asked_about_is() -> None:
    conditions = MachineConditions(EVERYTHING, ConditionSources()).read()
    assert conditions.local is not None
    assert conditions.load is not None
    assert conditions.memory_available_bytes is not None
    assert conditions.memory_available_bytes > 1 << 20
    assert MachineConditions(Policy(load_max=1.0), ConditionSources()).read().memory_available_bytes is None


def test_a_machine_that_says_nothing_has_no_conditions(tmp_path: Path) -> None:
    conditions = read(tmp_path)
    assert conditions == Conditions(local=conditions.local, is_metered=False)


BATTERY = {"sys/class/power_supply/BAT0/type": "Battery", "sys/class/power_supply/BAT0/capacity": "40"}


@pytest.mark.parametrize(
    ("supplies", "is_on_battery", "percent"),
    [
        ({"BAT0/status": "Discharging", "AC/type": "Mains", "AC/online": "0"}, True, 40),
        ({"BAT0/status": "Charging", "AC/type": "Mains", "AC/online": "1"}, False, 40),
        ({"BAT0/status": "Discharging", "usb/type": "USB", "usb/online": "1"}, True, 40),  # a weak charger
        ({"BAT0/status": "Full"}, False, 40),
        ({"BAT0/status": "Unknown"}, None, 40),
        ({"BAT0/status": "Discharging", "BAT1/type": "Battery", "BAT1/capacity": "80"}, True, 60),
        ({"BAT0/status": "Discharging", "mouse/type": "Battery", "mouse/scope": "Device", "mouse/capacity": "2"}, True, 40),
        ({"BAT0/status": "Discharging", "bay/type": "Battery", "bay/present": "0", "bay/capacity": "0"}, True, 40),
        ({"BAT0/status": "Discharging", "BAT0/capacity": "120"}, None, None),
        ({"BAT0/type": "Mains", "BAT0/online": "1"}, None, None),
    ],
)  # fmt: skip
def test_power_supplies(
    tmp_path: Path, supplies: dict[str, str], is_on_battery: bool | None, percent: float | None
) -> None:
    put(tmp_path, BATTERY | {f"sys/class/power_supply/{name}": text for name, text in supplies.items()})
    conditions = read(tmp_path)
    assert (conditions.is_on_battery, conditions.battery_percent) == (is_on_battery, percent)


def test_the_hottest_sensor_that_can_be_believed_counts(tmp_path: Path) -> None:
    zones = {"0": "41000", "1": "63500", "2": "-273000", "3": "200000", "4": "", "5": "none"}
    put(tmp_path, {f"sys/class/thermal/thermal_zone{number}/temp": text for number, text in zones.items()})
    put(tmp_path, {"sys/class/thermal/cooling_device0/temp": "99000"})
    (tmp_path / "sys/class/thermal/thermal_zone6/temp").mkdir(parents=True)  # reading it fails
    assert read(tmp_path).temperature_c == 63.5


def test_load_pressure_and_memory(tmp_path: Path) -> None:
    pressure = "some avg10=1.00 avg60={} avg300=0.10 total=1\nfull avg10=0.00 avg60=99.00 avg300=0.00 total=0"
    put(
        tmp_path,
        {
            "proc/loadavg": "1000000 0.5 0.4 1/100 7",
            "proc/pressure/cpu": pressure.format("12.50"),
            "proc/pressure/io": pressure.format("31.25"),
            "proc/pressure/memory": "nonsense",
            "proc/meminfo": "MemTotal:       1000 kB\nMemAvailable:    500 kB",
        },
    )
    conditions = read(tmp_path)
    assert conditions.load is not None
    assert conditions.load > 100
    assert conditions.pressure_percent == 31.25
    assert conditions.memory_available_bytes == 500 * 1024


@pytest.mark.parametrize(
    ("said", "is_metered"),
    [("yes", True), ("1", True), ("True", True), ("no", False), ("0", False), ("perhaps", None), ("", None)],
)
def test_a_file_says_whether_the_link_is_metered(tmp_path: Path, said: str, is_metered: bool | None) -> None:
    (tmp_path / "metered").write_text(f"{said}\n")
    assert read(tmp_path, metered_file=tmp_path / "metered", is_metered=True).is_metered is is_metered


def test_the_configuration_says_so_where_no_file_does(tmp_path: Path) -> None:
    assert read(tmp_path, is_metered=True).is_metered
    assert read(tmp_path, metered_file=tmp_path / "gone", is_metered=True).is_metered is None


# --- configuration -----------------------------------------------------------------------------------------


def test_a_policy_is_read_from_its_table_and_drop_ins_change_it(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(
        f'{MAIN}[policy]\nwindow = ["22:00-06:00"]\nwindow_steps = ["trial"]\ntime_zone = "Europe/Berlin"\n'
        'battery_percent_min = 30\nmetered = "small"\nmetered_mb_max = 2.5\nmetered_file = "m"\n'
        "temperature_c_max = 70\nload_max = 1.5\npressure_percent_max = 40\nmemory_available_mb_min = 200\n"
    )
    config = load_config(tmp_path / "device.toml")
    assert config.agent.policy == Policy(
        windows=(parse_window("22:00-06:00"),),
        window_steps=frozenset({Step.TRIAL}),
        battery_percent_min=30,
        temperature_c_max=70.0,
        load_max=1.5,
        pressure_percent_max=40.0,
        memory_bytes_min=200 << 20,
        metered=Metered.SMALL,
        metered_bytes_max=2_500_000,
    )
    assert str(config.sources.zone) == "Europe/Berlin"
    assert config.sources.metered_file == tmp_path / "m"
    (tmp_path / "device.d").mkdir()
    (tmp_path / "device.d" / "10.toml").write_text('[policy]\nwindow = []\nmetered = "always"\n')
    policy = load_config(tmp_path / "device.toml").agent.policy
    assert (policy.windows, policy.metered, policy.load_max) == ((), Metered.ALWAYS, 1.5)


def test_without_a_table_nothing_is_held_and_nothing_limited(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(MAIN)
    config = load_config(tmp_path / "device.toml").agent
    assert config.policy.is_open
    assert (config.bandwidth_bytes_per_s_max, config.memory_total_bytes_max) == (0, None)
    (tmp_path / "device.toml").write_text(f"{MAIN}bandwidth_kb_per_s_max = 20\nmemory_total_mb_max = 300\n")
    config = load_config(tmp_path / "device.toml").agent
    assert (config.bandwidth_bytes_per_s_max, config.memory_total_bytes_max) == (20_000, 300 << 20)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('window = ["22-06"]', "window '22-06' is not of the form"),
        ('window = "22:00-06:00"', "Expected `array`, got `str`"),
        ('window_steps = ["commit"]', "Invalid enum value 'commit'"),
        ('time_zone = "Mars/Olympus"', "time_zone 'Mars/Olympus' is not known here"),
        ('time_zone = "../etc/passwd"', "is not known here"),
        ("battery_percent_min = 101", "battery_percent_min"),
        ("load_max = 0", "load_max"),
        ('metered = "never"', "nothing says when the link is metered"),
        ('metered = "sometimes"', "Invalid enum value 'sometimes'"),
        ("nice = true", "unknown field `nice`"),
    ],
)
def test_a_mistake_in_a_policy_names_the_file_and_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "device.toml").write_text(MAIN)
    (tmp_path / "device.d").mkdir()
    bad = tmp_path / "device.d" / "20-policy.toml"
    bad.write_text(f"[policy]\n{text}\n")
    with pytest.raises(RequestError) as caught:
        load_config(tmp_path / "device.toml")
    assert str(caught.value).startswith(f"{bad}: ")
    assert said in str(caught.value)


# --- a real agent ------------------------------------------------------------------------------------------


def test_a_real_agent_waits_outside_of_its_window_and_goes_on_inside(home: Path, tell: Tell) -> None:  # noqa: F811
    def shown() -> dict[str, object]:
        found: dict[str, object] = json.loads(tell("status", "--json"))
        return found

    hour = datetime.now(UTC).hour
    (home / "device.d").mkdir()
    drop_in = home / "device.d" / "50-window.toml"
    closed = f"{(hour + 6) % 24:02}:00-{(hour + 7) % 24:02}:00"
    drop_in.write_text(f'[policy]\nwindow = ["{closed}"]\ntime_zone = "UTC"\n')
    with agent(home):
        assert "updates   wait, held.window: it is " in tell("status")
        start_rollout(home / "server", "digits", "v2", canary_count=1)
        assert wait_until(lambda: shown()["state"] == "syncing" or shown()["update"] is not None, WAIT_S)
        assert wait_until(lambda: "suspended" in tell("status"), WAIT_S)
        found = shown()["agent"]
        assert isinstance(found, dict)
        assert found["held"]["code"] == "held.window"
        assert "updates wait" in tell("doctor")
    drop_in.write_text("[policy]\nwindow = ['00:00-24:00']\n")
    with agent(home):
        assert wait_until(lambda: json.loads(tell("history", "--json")) != [], WAIT_S), tell("status")
        assert "updates   allowed" in tell("status")
    assert [(past["version"], past["outcome"]) for past in json.loads(tell("history", "--json"))] == [
        ("v2", "committed")
    ]
