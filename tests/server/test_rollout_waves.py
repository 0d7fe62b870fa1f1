"""Plans of rollouts: how they are spelled, and which devices belong to which wave."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import RequestError
from protocol.ids import DeviceId
from server.rollouts.waves import parse_label, parse_waves, point, rank

DEVICES = [DeviceId(f"d{number}") for number in range(2_000)]


def test_a_plan_says_what_was_written() -> None:
    text = "3@label:lab,59,proof@tier:pi5,10%@tier:pi5+tier:pi4+label:site=berlin,50%,100%"
    waves = parse_waves(text, [60_000])
    assert ",".join(wave.size_text for wave in waves) == text
    assert [wave.name for wave in waves] == ["canary", "wave 2", "wave 3", "wave 4", "wave 5", "rest"]
    assert {wave.soak_ms for wave in waves} == {60_000}
    assert [wave.soak_ms for wave in parse_waves("1,100%", [5, 0])] == [5, 0]


@pytest.mark.parametrize(
    ("text", "soaks", "says"),
    [
        ("", [0], "no size"),
        ("0", [0], "no size"),
        ("-1", [0], "no size"),
        ("5x", [0], "no size"),
        ("٣", [0], "no size"),
        ("0%", [0], "no size"),
        ("101%", [0], "no size"),
        ("nan%", [0], "no size"),
        ("1e999%", [0], "no size"),
        ("5@", [0], "selects nothing"),
        ("5@lab", [0], "selects nothing"),
        ("5@label:", [0], "selects nothing"),
        ("5@label:a b", [0], "selects nothing"),
        ("5@label:" + "a" * 64, [0], "selects nothing"),
        ("5@" + "+".join(["label:a"] * 9), [0], "more than 8"),
        ("50%,10%", [0], "no larger"),
        (",".join(["1"] * 33), [0], "33 waves"),
        ("1,100%", [0, 0, 0], "3 soak times"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(text: str, soaks: list[int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_waves(text, soaks)


@pytest.mark.parametrize("text", ["", "a b", "a,b", "a+b", "ä", "a" * 64])
def test_a_label_that_no_plan_could_spell_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="no label"):
        parse_label(text)


def test_a_share_of_the_fleet_is_about_that_and_in_the_order_of_the_ranks() -> None:
    (wave, _) = parse_waves("10%,100%")
    places = {device: point(rank("r1", device)) for device in DEVICES}
    within = [device for device in DEVICES if wave.holds(places[device])]
    assert 150 < len(within) < 250
    by_rank = sorted(DEVICES, key=lambda device: rank("r1", device))
    assert sorted(DEVICES, key=places.__getitem__) == by_rank
    assert set(by_rank[: len(within)]) == set(within)
    assert all(parse_waves("100%")[0].holds(place) for place in places.values())


def test_the_first_devices_are_others_in_another_rollout() -> None:
    (wave, _) = parse_waves("10%,100%")
    cohorts = [
        {device for device in DEVICES if wave.holds(point(rank(rollout, device)))} for rollout in ("r1", "r2")
    ]
    assert len(cohorts[0] & cohorts[1]) < len(cohorts[0]) / 3


@settings(max_examples=25)
@given(st.sets(st.sampled_from(DEVICES[:100]), min_size=1, max_size=50))
def test_who_comes_and_goes_does_not_move_anybody_else(devices: set[DeviceId]) -> None:
    (wave, _) = parse_waves("30%,100%")
    everybody = {device for device in DEVICES[:100] if wave.holds(point(rank("r1", device)))}
    assert {device for device in devices if wave.holds(point(rank("r1", device)))} == everybody & devices


def test_a_device_matches_one_of_the_tiers_and_all_of_the_labels() -> None:
    (wave,) = parse_waves("5@tier:pi4+tier:pi5+label:lab+label:berlin")
    assert wave.matches("pi4", frozenset({"lab", "berlin", "night"}))
    assert not wave.matches("pi4", frozenset({"lab"}))
    assert not wave.matches("jetson", frozenset({"lab", "berlin"}))
