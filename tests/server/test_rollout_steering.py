"""Rollouts that are judged by tests, as transcripts: waves, limits, operators, lost, held and switched-off devices."""

from itertools import pairwise

import msgspec
import pytest

from protocol.ids import DeviceId
from server.effects import PublishDesired
from server.rollouts.campaign import Campaign
from server.rollouts.records import Decision, MemberRecord, Order
from server.rollouts.states import RolloutState
from tests.server.transcript import Play


def _play(devices: int, start: str, **options: bool) -> Play:
    """A fleet of devices d0, d1, … on version 1, and a rollout of version 2 that has just begun."""
    play = Play(tells_decisions=options.get("tells", False))
    play.play("\n".join(f"> report d{number} 1 tier=pi" for number in range(devices)))
    play.play("\n".join(f"> link d{number} online" for number in range(devices)))
    play.play(f"> rollout r1 2 tests=1 {start}\n> failed 1-2")
    return play


def _asked(play: Play) -> list[str]:
    """Devices that the last step asked."""
    return [
        str(effect.device)
        for effect in play.last_effects
        if isinstance(effect, PublishDesired) and effect.desired and effect.desired.version == "2"
    ]


def _campaign(play: Play) -> Campaign:
    return play.coordinator.campaigns["r1"]


def _undecided(play: Play) -> list[str]:
    return [str(device) for device in _campaign(play).undecided]


def _says(play: Play, device: str, outcome: str, *words: str, version: str = "") -> list[str]:
    """A device reports; gives the devices that are asked thereupon."""
    version = version or ("2" if outcome == "committed" else "1")
    play.command(["report", device, version, outcome, "r1", "tier=pi", *words])
    return _asked(play)


def _decisions(play: Play) -> list[Decision]:
    return [record for record in play.store.values() if isinstance(record, Decision)]


def test_every_wave_is_decided_before_the_next_one_begins_and_each_step_is_explained() -> None:
    play = _play(10, "waves=2,50%,100%")
    waves = [_undecided(play)]
    while _campaign(play).state is RolloutState.RUNNING:
        wave = _campaign(play).record.wave
        for device in _undecided(play):
            _says(play, device, "committed")
        if _campaign(play).record.wave != wave:
            waves.append(_undecided(play))
    assert [len(wave) for wave in waves] == [2, len(waves[1]), 8 - len(waves[1])]
    assert _campaign(play).state is RolloutState.FINISHED
    assert [decision.action for decision in _decisions(play)] == ["begin", "widen", "widen", "finish"]
    assert [decision.number for decision in _decisions(play)] == [1, 2, 3, 4]
    widen = _decisions(play)[1]
    assert widen.text == (
        "the canary wave has passed: 2 committed; 0 of 2 failed, as likely at 1.0% as at 5.0% or likelier, and not"
        " proved yet by Wald's test; next is the wave 2 wave (50%)"
    )
    assert (widen.numbers["failed"], widen.numbers["counted"], widen.numbers["limit"]) == (0, 2, 1_000)


def test_a_release_that_fails_stops_on_its_first_devices() -> None:
    play = _play(20, "waves=5,100%")
    devices = _undecided(play)
    failed = 0
    for device in devices:
        failed += 1
        _says(play, device, "rolled_back")
        if _campaign(play).state is RolloutState.STOPPED:
            break
    assert failed == 2  # the first two that were asked
    assert len(_campaign(play).members) == 5
    assert _decisions(play)[-1].action == "stop"
    assert "2 of the first 2 devices" in _campaign(play).record.reason
    assert _campaign(play).counts() == {"rolled_back": 2, "withdrawn": 3}


def test_one_failure_of_a_small_wave_proves_too_little_so_more_devices_are_asked() -> None:
    play = _play(60, "waves=2,100%")
    first, second = _undecided(play)
    _says(play, first, "rolled_back")
    asked = _says(play, second, "committed")
    assert len(asked) == 2
    assert _campaign(play).record.wave == 0
    assert _decisions(play)[-1].action == "extend"
    assert "1 of 2 failed, which is likelier where 5.0% fail" in _decisions(play)[-1].text
    while _campaign(play).record.wave == 0:
        for device in _undecided(play):
            _says(play, device, "committed")
    assert len([each for each in _campaign(play).members.values() if each.wave == "canary"]) == 42


def test_no_more_devices_than_allowed_are_in_flight() -> None:
    play = _play(12, "waves=1,100% flight=3")
    asked = _says(play, _undecided(play)[0], "committed")
    assert len(asked) == 3
    while _undecided(play):
        assert len(_undecided(play)) <= 3
        _says(play, _undecided(play)[0], "committed")
    assert _campaign(play).counts() == {"committed": 12}


def test_devices_that_are_not_connected_are_asked_last() -> None:
    play = _play(8, "waves=1,100% flight=2")
    canary = _undecided(play)[0]
    away = [f"d{number}" for number in range(8) if f"d{number}" != canary][:4]
    play.play("\n".join(f"> link {device} offline" for device in away))
    order = _says(play, canary, "committed")
    while _undecided(play):
        order += _says(play, _undecided(play)[0], "committed")
    assert set(order[-4:]) == set(away)


def test_a_pace_lets_so_many_be_asked_in_a_minute() -> None:
    play = _play(9, "waves=1,100% pace=6 timeout=1000000")
    _says(play, _undecided(play)[0], "committed")
    moments = []
    for _ in range(8):
        play.command(["wait", "5000"])
        if asked := _asked(play):
            moments.append((play.now_ms, len(asked)))
    assert [count for _, count in moments] == [1] * len(moments)
    assert {after - before for (before, _), (after, _) in pairwise(moments)} == {10_000}


def test_the_next_wave_waits_for_the_soak_and_a_rollback_in_it_counts() -> None:
    play = _play(6, "waves=2,100% soak=60000")
    for device in _undecided(play):
        assert _says(play, device, "committed") == []
    play.command(["wait", "59999"])
    assert _asked(play) == []
    play.command(["wait", "1"])
    assert len(_asked(play)) == 4

    play = _play(6, "waves=2,100% soak=60000")
    devices = _undecided(play)
    for device in devices:
        _says(play, device, "committed")
    for device in devices:  # their operators took it back
        _says(play, device, "rolled_back", "code=operator.rollback")
    assert _campaign(play).state is RolloutState.STOPPED


def test_a_soak_goes_on_after_a_restart() -> None:
    play = _play(6, "waves=2,100% soak=60000")
    for device in _undecided(play):
        _says(play, device, "committed")
    play.command(["wait", "30000"])
    play.play("> restart\n> failed 1-2")  # which is tried once more
    assert _asked(play) == []
    play.command(["wait", "30000"])
    assert len(_asked(play)) == 4


def test_a_proof_wave_asks_until_the_release_is_proved() -> None:
    play = _play(130, "waves=proof,100% flight=20")
    while _campaign(play).record.wave == 0:
        _says(play, _undecided(play)[0], "committed")
    assert sum(each.wave == "canary" for each in _campaign(play).members.values()) == 112
    assert "proved by Wald's test" in _decisions(play)[-1].text


def test_a_wave_takes_the_devices_of_its_label_and_one_that_nobody_has_pauses() -> None:
    play = Play()
    play.play("\n".join(f"> report d{number} 1" for number in range(6)))
    play.play("> label d3 lab\n> label d4 lab berlin")
    play.play("> rollout r1 2 tests=1 waves=100%@label:lab,100%\n> failed 1-2")
    assert set(_undecided(play)) == {"d3", "d4"}

    play = Play()
    play.play("\n".join(f"> report d{number} 1" for number in range(6)))
    play.play("> rollout r1 2 tests=1 waves=5@label:lba,100%\n> failed 1-2")
    assert _campaign(play).state is RolloutState.PAUSED
    assert "no device of the fleet matches" in _campaign(play).record.reason
    play.command(["order", "r1", "promote", "alice"])
    assert len(_asked(play)) == 6


def test_a_label_that_is_given_while_a_wave_is_under_way_counts() -> None:
    play = Play()
    play.play("\n".join(f"> report d{number} 1" for number in range(6)))
    play.play("> label d3 lab\n> rollout r1 2 tests=1 waves=100%@label:lab,100%\n> failed 1-2")
    play.command(["label", "d5", "lab"])
    assert _asked(play) == ["d5"]


def test_an_operator_pauses_resumes_promotes_and_aborts_and_each_is_noted_with_name_and_reason() -> None:
    play = _play(9, "waves=2,4,100%")
    play.command(["order", "r1", "pause", "alice", "looks", "odd"])
    assert _campaign(play).record.reason == "paused by alice: looks odd"
    for device in _undecided(play):
        assert _says(play, device, "committed") == []
    play.command(["order", "r1", "resume", "bob"])
    assert len(_asked(play)) == 4
    play.command(["order", "r1", "promote", "bob", "in a hurry"])
    assert len(_asked(play)) == 3
    lines = play.command(["order", "r1", "abort", "alice", "wrong prompt"])
    assert "save rollout r1 stopped (aborted by alice: wrong prompt)" in lines
    assert sum(line.startswith("save member") and line.endswith("withdrawn") for line in lines) == 7
    decisions = [(each.action, each.by, each.reason) for each in _decisions(play) if each.by]
    assert decisions == [
        ("pause", "alice", "looks odd"),
        ("resume", "bob", ""),
        ("promote", "bob", "in a hurry"),
        ("abort", "alice", "wrong prompt"),
    ]
    assert all(order.answer == "done" for order in play.store.values() if isinstance(order, Order))


def test_an_order_that_comes_too_late_is_answered_and_noted() -> None:
    play = _play(2, "waves=2")
    play.command(["order", "r1", "promote", "bob"])
    for device in _undecided(play):
        _says(play, device, "committed")
    play.command(["order", "r1", "pause", "alice"])
    answers = [order.answer for order in play.store.values() if isinstance(order, Order)]
    assert answers == ["its last wave is under way", "the rollout is over"]
    assert [each.text for each in _decisions(play) if each.action == "refuse"] == [
        "promote by bob: its last wave is under way",
        "pause by alice: the rollout is over",
    ]


def test_orders_that_were_given_while_no_server_ran_are_carried_out_at_its_start() -> None:
    play = _play(5, "waves=2,100%")
    play.store["order", "r1", "1"] = Order(
        rollout="r1", number=1, action="abort", by="alice", at_ms=play.now_ms
    )
    play.command(["restart"])
    assert _campaign(play).state is RolloutState.STOPPED


def test_what_fails_while_a_rollout_is_paused_still_stops_it() -> None:
    play = _play(9, "waves=4,100%")
    play.command(["order", "r1", "pause", "alice"])
    for device in _undecided(play)[:2]:
        _says(play, device, "failed")
    assert _campaign(play).state is RolloutState.STOPPED


def _lose(play: Play, device: str) -> None:
    """A device starts the new version and is not heard of again."""
    _says(play, device, "running", "state=trial")
    play.command(["link", device, "offline"])
    play.command(["wait", "10000"])


def test_one_lost_device_pauses_and_a_second_one_stops() -> None:
    play = _play(60, "waves=60")
    devices = _undecided(play)
    for device in devices[:50]:
        _says(play, device, "committed")
    for device in devices[51:]:
        _says(play, device, "rejected")
    _lose(play, devices[50])
    assert _campaign(play).state is RolloutState.PAUSED
    assert devices[50] in _campaign(play).record.reason
    assert _campaign(play).members[DeviceId(devices[50])].detail == "not heard of since its state trial"
    play.command(["order", "r1", "resume", "alice", "battery"])
    assert _campaign(play).state is RolloutState.FINISHED

    play = _play(100, "waves=50,100%")
    devices = _undecided(play)
    for device in devices[:48]:
        _says(play, device, "committed")
    _says(play, devices[48], "failed", version="-")  # it has nothing to run
    assert _campaign(play).state is RolloutState.PAUSED
    play.command(["order", "r1", "resume", "alice"])
    assert _campaign(play).state is RolloutState.RUNNING
    _lose(play, devices[49])
    assert _campaign(play).state is RolloutState.STOPPED
    assert "2 devices did not come back" in _campaign(play).record.reason


def test_a_lost_device_that_turns_up_is_no_longer_lost() -> None:
    play = _play(60, "waves=41,100%")
    devices = _undecided(play)
    for device in devices[:40]:
        _says(play, device, "committed")
    _lose(play, devices[40])
    assert _campaign(play).lost == [devices[40]]
    _says(play, devices[40], "committed")
    assert _campaign(play).lost == []
    play.command(["order", "r1", "resume", "alice"])
    assert _campaign(play).record.wave == 1


def test_the_time_of_a_device_stands_still_while_its_policy_holds_it() -> None:
    play = _play(3, "waves=1,100% timeout=10000 hold=100000")
    (device,) = _undecided(play)
    play.command(["wait", "4000"])
    _says(play, device, "running", "code=held.window")
    play.command(["wait", "50000"])
    assert _undecided(play) == [device]
    _says(play, device, "running")
    play.command(["wait", "5999"])
    assert _undecided(play) == [device]
    play.command(["wait", "1"])
    member = _campaign(play).members[DeviceId(device)]
    assert (member.status, member.held_ms) == ("silent", 50_000)


def test_a_device_that_is_held_too_long_is_passed_over_and_is_no_failure() -> None:
    play = _play(3, "waves=1,100% timeout=10000 hold=100000")
    (device,) = _undecided(play)
    _says(play, device, "running", "code=held.operator")
    play.command(["wait", "100000"])
    member = _campaign(play).members[DeviceId(device)]
    assert (member.status, member.code) == ("deferred", "held.operator")
    assert _campaign(play).failures() == 0
    assert len(_asked(play)) == 1  # a wave in which nobody committed proves nothing
    _says(play, device, "committed")
    assert _campaign(play).members[DeviceId(device)].status == "committed"


def test_a_device_that_was_off_all_the_time_is_no_failure_and_one_that_went_silent_is() -> None:
    play = Play()
    play.play("> report d0 1\n> report d1 1\n> link d1 online")
    play.command(["wait", "1"])
    play.play("> rollout r1 2 tests=1 waves=100%\n> failed 1-2")
    play.command(["link", "d1", "offline"])
    play.command(["wait", "10000"])
    statuses = {str(device): member.status for device, member in _campaign(play).members.items()}
    assert statuses == {"d0": "deferred", "d1": "silent"}


def test_a_slow_release_pauses_and_is_accepted_by_resuming() -> None:
    play = Play()
    for number in range(60):
        play.command(["report", f"d{number}", "1", "tier=pi"])
    play.play("> rollout r0 1 tests=1 waves=100%")
    for number in range(60):  # their own trials of version 1
        play.command(["report", f"d{number}", "1", "committed", "r0", "#1", "tier=pi", "latency=10"])
    play.play("> rollout r1 2 tests=1 waves=30,100%\n> failed 1-2")
    assert _campaign(play).record.controls[0].devices == 60
    for device in _undecided(play):
        if _campaign(play).state is RolloutState.RUNNING:
            _says(play, device, "committed", "#2", "latency=13")
    assert _campaign(play).state is RolloutState.PAUSED
    assert "more than 25 % slower" in _campaign(play).record.reason
    play.command(["order", "r1", "resume", "alice"])
    assert _campaign(play).state is RolloutState.RUNNING


def test_other_bytes_under_the_same_name_stop_a_rollout() -> None:
    play = _play(6, "waves=2,100%")
    play.command(["resigned", "2"])
    assert _campaign(play).state is RolloutState.STOPPED
    assert _campaign(play).record.reason == "its release is no longer in the signed metadata"


def test_a_rollout_leads_back_to_an_older_version_and_only_those_that_have_the_newer_one() -> None:
    play = Play()
    play.play("> report a 2\n> report b 2\n> report c 1\n> report d 3")
    play.play("> rollout r1 1 tests=1 waves=100% from=2\n> failed 2-1")
    assert set(_undecided(play)) == {"a", "b"}
    for device in ("a", "b"):
        play.command(["report", device, "1", "committed", "r1"])
    assert _campaign(play).state is RolloutState.FINISHED


@pytest.mark.parametrize("until", [1, 6, 13])
def test_a_server_that_restarts_in_between_decides_the_same(until: int) -> None:
    def run(restart_after: int | None) -> tuple[list[Decision], list[MemberRecord]]:
        play = _play(14, "waves=3,50%,100% flight=4 soak=1000")
        for step in range(60):
            if step == restart_after:
                play.play("> restart\n> failed 1-2")  # which is tried once more
            if _undecided(play):
                device = _undecided(play)[0]
                outcome = "rolled_back" if device in {"d1", "d7"} else "committed"
                _says(play, device, outcome)
            play.command(["wait", "500"])
        members = [record for record in play.store.values() if isinstance(record, MemberRecord)]
        return _decisions(play), members

    plain = run(None)
    assert plain[0]
    assert msgspec.json.encode(run(until)) == msgspec.json.encode(plain)
