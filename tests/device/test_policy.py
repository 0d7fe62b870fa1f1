"""When an update may go on: the rules of a policy at their edges, and an agent under them in virtual time."""

import random
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from device import effects, events
from device.adapters.conditions import MachineConditions
from device.config import ConditionSources
from device.events import Conditions, Wish
from device.policy import Guard, Hold, Metered, Policy, Step, parse_window
from device.states import State
from protocol.constants import CHUNK_BYTES, GROUP_CHUNKS
from protocol.errors import RequestError
from protocol.ids import digest_of
from tests.device.harness import DEVICE, TOPICS, Cache, Device, fine_tuned, model_bytes

MONDAY = datetime(2026, 11, 23)  # noqa: DTZ001 - local time has no zone here
NIGHT = Policy(windows=(parse_window("22:00-06:00"),))
COOL = Policy(temperature_c_max=70.0)
V1, V2, V3 = (model_bytes(seed, 9 * CHUNK_BYTES + 17) for seed in (1, 2, 3))


def at(day: int, hour: int, minute: int = 0) -> Conditions:
    """Local time, days after a Monday."""
    return Conditions(local=MONDAY + timedelta(days=day, hours=hour, minutes=minute))


def code(policy: Policy, conditions: Conditions, step: Step = Step.FETCH, fetch_bytes: int = 0) -> str:
    guard = Guard(policy)
    guard.take(conditions)
    hold = guard.hold(step, fetch_bytes)
    return hold.code if hold is not None else ""


def codes(policy: Policy, *conditions: Conditions, step: Step = Step.INSTALL) -> list[str]:
    """What one guard says after each look."""
    guard, found = Guard(policy), []
    for each in conditions:
        guard.take(each)
        hold = guard.hold(step)
        found.append(hold.code if hold is not None else "")
    return found


# --- windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "open_at", "closed_at"),
    [
        ("10:00-16:00", [(0, 10, 0), (6, 15, 59)], [(0, 9, 59), (0, 16, 0)]),
        ("22:00-06:00", [(0, 22, 0), (0, 0, 0), (1, 5, 59), (6, 23, 59)], [(0, 6, 0), (0, 21, 59)]),
        ("00:00-24:00", [(0, 0, 0), (3, 23, 59)], []),
        ("18:00-24:00", [(0, 23, 59)], [(1, 0, 0)]),
        ("sat,sun 10:00-16:00", [(5, 10, 0), (6, 12, 0)], [(4, 12, 0), (0, 12, 0)]),
        ("fri 22:00-06:00", [(4, 22, 0), (5, 5, 59)], [(4, 5, 0), (5, 22, 0), (6, 5, 0)]),
        ("sun 22:00-06:00", [(6, 23, 0), (0, 1, 0)], [(6, 1, 0), (1, 1, 0)]),
        ("sat-mon 12:00-13:00", [(5, 12, 0), (6, 12, 0), (0, 12, 0)], [(1, 12, 0), (4, 12, 0)]),
    ],
)
def test_a_window_is_open_from_its_first_minute_to_before_its_last(
    text: str, open_at: list[tuple[int, int, int]], closed_at: list[tuple[int, int, int]]
) -> None:
    policy = Policy(windows=(parse_window(text),))
    assert [code(policy, at(*moment)) for moment in open_at] == [""] * len(open_at)
    assert [code(policy, at(*moment)) for moment in closed_at] == ["held.window"] * len(closed_at)


def test_any_of_several_windows_will_do_and_the_reason_names_them() -> None:
    policy = Policy(windows=(parse_window("22:00-06:00"), parse_window("sat,sun 10:00-16:00")))
    assert code(policy, at(5, 12)) == ""
    guard = Guard(policy)
    guard.take(at(2, 12, 5))
    assert guard.hold(Step.TRIAL) == Hold(
        "held.window", "it is wed 12:05, goes on in 22:00-06:00, sat,sun 10:00-16:00"
    )


def test_a_window_may_be_for_some_steps_only() -> None:
    policy = Policy(windows=NIGHT.windows, window_steps=frozenset({Step.INSTALL, Step.TRIAL}))
    assert [code(policy, at(0, 12), step) for step in Step] == ["", "held.window", "held.window"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("22:00", "not of the form"),
        ("22:00 - 06:00", "not of the form"),
        ("24:00-06:00", "no clock shows"),
        ("22:60-06:00", "no clock shows"),
        ("22:00-24:01", "no clock shows"),
        ("06:00-06:00", "is empty"),
        ("sam 10:00-16:00", "has a day 'sam'"),
        ("mon- 10:00-16:00", "has a day 'mon-'"),
        (",mon 10:00-16:00", "has a day ''"),
    ],
)
def test_what_is_no_window_is_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_window(text)


def test_a_clock_that_was_never_set_closes_no_window() -> None:
    assert code(NIGHT, Conditions(local=datetime(1970, 1, 1, 12))) == ""  # noqa: DTZ001 - as above
    assert code(NIGHT, Conditions(local=datetime(2023, 12, 31, 12))) == ""  # noqa: DTZ001
    assert code(NIGHT, Conditions(local=datetime(2024, 1, 1, 12))) == "held.window"  # noqa: DTZ001
    assert code(NIGHT, Conditions()) == ""


@pytest.mark.parametrize(
    ("utc_s", "window", "is_open"),
    [
        # Berlin, 29 March 2026: 01:59 CET is followed by 03:00 CEST; a window within the hour left out does not open that night.
        (1_774_745_999, "02:00-03:00", False),
        (1_774_746_000, "02:00-03:00", False),
        (1_774_746_000, "03:00-04:00", True),
        # 25 October 2026: 02:30 comes twice, and both count.
        (1_792_888_200, "02:00-03:00", True),
        (1_792_891_800, "02:00-03:00", True),
        (1_792_893_600, "02:00-03:00", False),
    ],
)
def test_windows_follow_the_wall_clock_through_summer_time(utc_s: int, window: str, is_open: bool) -> None:
    policy = Policy(windows=(parse_window(window),))
    sources = ConditionSources(zone=ZoneInfo("Europe/Berlin"))
    conditions = MachineConditions(policy, sources, now_s=lambda: utc_s).read()
    assert code(policy, conditions) == ("" if is_open else "held.window")


# --- limits ------------------------------------------------------------------------------------------------


def test_a_low_battery_holds_everything_until_it_is_well_above_the_limit_or_charged() -> None:
    policy = Policy(battery_percent_min=30)
    levels = [
        Conditions(is_on_battery=is_on_battery, battery_percent=percent)
        for is_on_battery, percent in [
            (True, 30), (True, 29), (True, 31), (True, 34), (True, 35), (True, 29), (False, 29), (True, 31), (None, 10),
        ]
    ]  # fmt: skip
    held = "held.battery"
    for step in Step:
        assert codes(policy, *levels, step=step) == ["", held, held, held, "", held, "", "", ""]
    full = Policy(battery_percent_min=100)
    empty, almost = (Conditions(is_on_battery=True, battery_percent=percent) for percent in (99, 100))
    assert codes(full, empty, almost) == [held, ""]


def test_heat_load_pressure_and_lack_of_memory_hold_what_takes_them_and_do_not_flap() -> None:
    def looks(name: str, *values: float | None) -> list[Conditions]:
        return [Conditions(**{name: value}) for value in values]  # type: ignore[arg-type]  # one field of several

    hot = looks("temperature_c", 70, 70.1, 69, 65.1, 65, 69, 71, None)
    assert codes(COOL, *hot) == ["", *["held.temperature"] * 3, "", "", "held.temperature", ""]
    busy = looks("load", 2.0, 2.1, 1.6, 1.5, 1.9)
    assert codes(Policy(load_max=2.0), *busy) == ["", "held.load", "held.load", "", ""]
    waiting = looks("pressure_percent", 40, 41, 31, 30)
    assert codes(Policy(pressure_percent_max=40), *waiting) == ["", "held.pressure", "held.pressure", ""]
    short = looks("memory_available_bytes", 100 << 20, (100 << 20) - 1, 109 << 20, 111 << 20)
    assert codes(Policy(memory_bytes_min=100 << 20), *short) == ["", "held.memory", "held.memory", ""]
    assert codes(COOL, *hot, step=Step.TRIAL)[1] == "held.temperature"
    assert set(codes(COOL, *hot, step=Step.FETCH)) == {""}


def test_a_metered_link_carries_what_the_owner_allows() -> None:
    metered = Conditions(is_metered=True)
    small = Policy(metered=Metered.SMALL, metered_bytes_max=1000)
    assert [code(small, metered, Step.FETCH, size) for size in (0, 1000, 1001)] == ["", "", "held.metered"]
    assert code(Policy(metered=Metered.NEVER), metered) == "held.metered"
    assert code(Policy(metered=Metered.NEVER), metered, Step.INSTALL) == ""
    for conditions in (Conditions(is_metered=False), Conditions()):
        assert code(Policy(metered=Metered.NEVER), conditions, fetch_bytes=1001) == ""
    assert code(Policy(), metered, fetch_bytes=1 << 40) == ""


def test_without_rules_nothing_is_held_and_each_rule_counts() -> None:
    assert Policy().is_open
    for policy in (
        NIGHT,
        COOL,
        Policy(load_max=1),
        Policy(pressure_percent_max=1),
        Policy(memory_bytes_min=1),
        Policy(battery_percent_min=1),
        Policy(metered=Metered.SMALL),
    ):
        assert not policy.is_open


# --- an agent under a policy -------------------------------------------------------------------------------


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    for version, model in (("v1", V1), ("v2", V2), ("v3", V3)):
        cache.publish(version, model)
    return cache


def look(device: Device, conditions: Conditions) -> None:
    device.queue.append(conditions)


def online(cache: Cache, policy: Policy, conditions: Conditions, **config: object) -> Device:
    device = Device(cache, V1, config={"policy": policy, **config})
    look(device, conditions)
    device.connect()
    device.settle()
    return device


def want(device: Device, version: str) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version))


def chunks_written(device: Device) -> list[tuple[str, int]]:
    return [
        (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
    ]


def test_a_request_outside_of_the_window_waits_says_so_and_begins_inside(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 12))
    assert device.agent.held is not None
    want(device, "v2")
    device.settle()
    assert (device.state, device.answer()) == (State.SUSPENDED, digest_of(V1))
    assert chunks_written(device) == []
    report = device.reports[-1].update
    assert report is not None
    assert (report.outcome, report.code) == ("running", "held.window")
    assert "mon 12:00" in report.detail
    look(device, at(0, 21, 59))
    reports = len(device.reports)
    device.settle()
    assert device.state is State.SUSPENDED
    assert len(device.reports) == reports  # nothing has changed
    look(device, at(0, 22))
    device.settle()
    assert device.answer() == digest_of(V2)
    report = device.reports[-1].update
    assert report is not None
    assert (report.outcome, report.code) == ("committed", "")


def test_a_window_that_closes_on_a_download_stops_it_and_nothing_comes_twice(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 23))
    want(device, "v2")
    device.settle(until=lambda: len(chunks_written(device)) == 5)
    device.queue.appendleft(at(1, 6))  # before what the broker has sent already
    device.settle()
    assert device.state is State.SUSPENDED
    assert not [topic for topic in device.subscriptions if "/b/" in topic]
    assert device.agent.deadline() is None
    stored = set(chunks_written(device))
    device.boot()  # what holds is measured again after a restart
    look(device, at(1, 7))
    device.connect()
    device.settle()
    assert device.state is State.SUSPENDED
    assert device.answer() == digest_of(V1)
    look(device, at(1, 22))
    device.settle()
    assert device.answer() == digest_of(V2)
    assert len(stored) >= 5
    assert len(chunks_written(device)) == len(set(chunks_written(device)))


@pytest.mark.parametrize("state", [State.ADMITTING, State.INSTALLING, State.VERIFYING])
def test_a_window_that_closes_in_any_state_holds_what_is_next(cache: Cache, state: State) -> None:
    device = online(cache, NIGHT, at(0, 23))
    want(device, "v2")
    device.settle(until=lambda: device.state is state)
    look(device, at(1, 6))
    device.settle()
    assert device.engine.trials == []
    assert device.agent.held is not None
    writes = device.record.update
    for minute in range(1, 50):  # what does not change is not written down over and over
        look(device, at(1, 6, minute))
    device.settle()
    assert device.record.update == writes
    look(device, at(1, 22))
    device.settle()
    assert device.answer() == digest_of(V2)
    assert len(chunks_written(device)) == len(set(chunks_written(device)))


def test_a_hot_device_fetches_and_installs_when_it_has_cooled_down(cache: Cache) -> None:
    device = online(cache, COOL, Conditions(temperature_c=80))
    want(device, "v2")
    device.settle()
    assert device.state is State.INSTALLING
    assert device.agent.held == Hold("held.temperature", "at 80 C, goes on at 65")
    report = device.reports[-1].update
    assert report is not None
    assert report.code == "held.temperature"
    look(device, Conditions(temperature_c=66))
    device.settle()
    assert device.engine.trials == []
    look(device, Conditions(temperature_c=64))
    device.settle(until=lambda: device.state is State.VERIFYING)
    look(device, Conditions(temperature_c=90))
    device.settle()
    assert device.engine.trials == []
    look(device, Conditions(temperature_c=60))
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_trial_under_way_is_not_broken_off(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 23))
    want(device, "v2")
    device.settle(until=lambda: device.state is State.TRIAL)
    look(device, at(1, 6))
    device.settle()
    assert (device.state, device.answer()) == (State.IDLE, digest_of(V2))


def test_a_trial_that_waits_is_durable_and_begins_once_after_a_restart(cache: Cache) -> None:
    policy = Policy(windows=NIGHT.windows, window_steps=frozenset({Step.TRIAL}))
    device = online(cache, policy, at(0, 12))
    want(device, "v2")
    device.settle()
    assert (device.state, device.record.state) == (State.TRIAL, State.TRIAL)
    device.boot()
    look(device, at(0, 13))
    device.connect()
    device.settle()
    assert device.engine.trials == []
    look(device, at(0, 22))
    device.settle()
    assert device.engine.trials == [digest_of(V2)]
    assert device.answer() == digest_of(V2)


def test_conditions_that_change_at_a_boot_do_not_overtake_the_version_that_serves(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 23))
    want(device, "v2")
    device.settle(until=lambda: device.state is State.INSTALLING)
    device.boot()
    for hour in (12, 23):
        look(device, at(0, hour))
    device.settle(until=lambda: bool(device.engine.loads))
    assert device.state is State.INSTALLING
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_window_that_opens_while_the_version_that_serves_is_measured_is_not_missed(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 12))
    want(device, "v2")
    device.settle()
    device.boot()
    look(device, at(0, 21, 59))
    device.connect()
    look(device, at(0, 22))
    device.settle()
    assert device.answer() == digest_of(V2)


def test_only_a_small_update_goes_over_a_metered_link(cache: Cache) -> None:
    near = fine_tuned(V1, 7)
    cache.publish("v4", near)
    delta = cache.publish_delta(V1, near)
    policy = Policy(metered=Metered.SMALL, metered_bytes_max=len(V2) // 2)
    device = online(cache, policy, Conditions(is_metered=True))
    want(device, "v4")
    device.settle()
    assert device.answer() == digest_of(near)
    assert delta in {blob for blob, _ in chunks_written(device)}
    want(device, "v2")
    device.settle()
    assert (device.state, device.answer()) == (State.SUSPENDED, digest_of(near))
    assert device.record.state is State.DOWNLOADING  # planned, so that its size is known
    assert digest_of(V2) not in {blob for blob, _ in chunks_written(device)}
    held = device.agent.held
    assert held is not None
    assert held.text == "the link is metered, the update takes 0.6 MB, allowed are 0.3"
    device.disconnect()
    device.settle()
    device.connect()
    device.settle()
    assert device.state is State.SUSPENDED
    look(device, Conditions(is_metered=False))
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_newer_request_takes_the_place_of_one_that_is_held(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 12))
    want(device, "v2")
    device.settle()
    want(device, "v3")
    device.settle()
    look(device, at(0, 22))
    device.settle()
    assert device.answer() == digest_of(V3)
    assert device.engine.trials == [digest_of(V3)]


def test_a_retry_waits_for_the_window_and_keeps_what_came(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 23))
    kept = dict(cache.retained)
    cache.retained = {topic: data for topic, data in kept.items() if "/b/" not in topic}
    want(device, "v2")
    device.settle(until=lambda: device.state is State.FAILED, deadlines=400)
    look(device, at(1, 6))
    while device.step():
        pass
    assert device.agent.deadline() is None
    device.boot()
    look(device, at(1, 7))
    device.connect()
    device.settle()
    assert device.state is State.FAILED
    cache.retained.update({topic: data for topic, data in kept.items() if "/b/" in topic})
    look(device, at(1, 22))
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_pause_goes_before_the_policy_and_its_end_says_what_still_holds(cache: Cache) -> None:
    device = online(cache, NIGHT, at(0, 12))
    want(device, "v2")
    device.settle()
    device.queue.append(events.OperatorAsked(1, Wish.PAUSE))
    device.settle()
    assert device.agent.held is not None
    assert device.agent.held.code == "held.operator"
    look(device, at(0, 22))
    device.settle()
    assert device.answer() == digest_of(V1)
    look(device, at(1, 12))
    device.queue.append(events.OperatorAsked(2, Wish.RESUME))
    device.settle()
    answer = next(effect for effect in reversed(device.effects) if isinstance(effect, effects.AnswerOperator))
    assert answer.text.startswith("updates are no longer paused, and held: it is tue 12:00")
    assert device.answer() == digest_of(V1)
    look(device, at(1, 22))
    device.settle()
    assert device.answer() == digest_of(V2)


def test_rewriting_in_place_begins_only_where_nothing_holds_it_and_is_then_completed(cache: Cache) -> None:
    near = fine_tuned(V1, 7)
    cache.publish("v4", near)
    cache.publish_delta(V1, near, in_place=True)
    device = online(cache, COOL, Conditions(temperature_c=80), is_in_place=True)
    want(device, "v4")
    device.settle()
    assert (device.state, device.answer()) == (State.SUSPENDED, digest_of(V1))  # fetched, and untouched
    assert device.agent.held == Hold("held.temperature", "at 80 C, goes on at 65")
    opened = sum(isinstance(effect, effects.OpenBlob) for effect in device.effects)
    look(device, Conditions(temperature_c=81))
    device.settle()
    assert sum(isinstance(effect, effects.OpenBlob) for effect in device.effects) == opened
    look(device, Conditions(temperature_c=60))
    device.settle(until=lambda: device.state is State.INSTALLING)
    look(device, Conditions(temperature_c=80))
    device.settle()
    assert device.answer() == digest_of(near)  # nothing would have answered meanwhile


def test_a_limit_on_bandwidth_takes_its_time_and_nothing_comes_twice(cache: Cache) -> None:
    device = Device(cache, V1, config={"bandwidth_bytes_per_s_max": 20_000})
    asked: list[str] = []
    device.answer_requests = lambda topic, _payload: asked.append(topic)
    device.connect()
    device.settle()
    began_ms = device.now_ms
    want(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    first_group = GROUP_CHUNKS * CHUNK_BYTES
    assert device.now_ms - began_ms >= first_group * 1000 // 20_000  # the second group waited for the first
    assert asked == []
    assert device.reports[-1].update is not None
    assert device.reports[-1].update.redundant_chunks == 0
    assert device.config.capacity.link_bytes_per_s == 20_000  # what the server plans by


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_changes_whenever_the_update_is_done_once_nothing_holds_it(
    seed: int, *, is_in_place: bool
) -> None:
    rng = random.Random(seed)
    near = fine_tuned(V1, 7)
    cache = Cache(seed)
    cache.publish("v1", V1)
    cache.publish("v2", near)
    if is_in_place or seed % 2:
        cache.publish_delta(V1, near, in_place=is_in_place)
    policy = Policy(
        windows=NIGHT.windows, temperature_c_max=70, metered=Metered.SMALL, metered_bytes_max=100_000
    )
    device = Device(cache, V1, config={"policy": policy, "is_in_place": is_in_place})
    look(device, at(0, 12))
    device.connect()
    want(device, "v2")
    for _ in range(600):
        if not device.step():
            device.queue.append(events.DeadlineReached())
            device.now_ms = max(device.now_ms + 1, device.agent.deadline() or 0)
        if rng.random() < 0.2:
            moment = at(rng.randrange(7), rng.randrange(24)).local
            look(
                device,
                Conditions(
                    local=moment,
                    temperature_c=rng.uniform(50, 90),
                    is_metered=rng.choice([True, False, None]),
                ),
            )
        if rng.random() < 0.02:
            device.disconnect()
            device.connect()
        if rng.random() < 0.005:
            device.boot()
            device.connect()
    look(device, Conditions())
    device.settle()
    assert device.answer() == digest_of(near)
    assert device.engine.trials.count(digest_of(near)) <= 3
    assert len(chunks_written(device)) == len(set(chunks_written(device)))
