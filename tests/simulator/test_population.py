"""The fleet is a pure function of count and seed, and always has someone to cut off and to kill."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import RequestError
from protocol.ids import parse_device_id
from simulator.live.population import DEVICES_MAX, make_population

counts = st.integers(1, 60)
seeds = st.integers(0, 1 << 64)


@given(counts, seeds)
@settings(max_examples=60, deadline=None)
def test_the_same_seed_gives_the_same_fleet(count: int, seed: int) -> None:
    assert make_population(count, seed) == make_population(count, seed)


@given(counts, seeds)
@settings(max_examples=60, deadline=None)
def test_every_fleet_has_devices_that_are_cut_off_and_devices_that_are_killed(count: int, seed: int) -> None:
    plans = make_population(count, seed)
    assert len({plan.device for plan in plans}) == count
    assert all(parse_device_id(plan.device) for plan in plans)
    assert sum(plan.cut is not None for plan in plans) >= max(1, count // 3)
    assert sum(plan.kill is not None for plan in plans) >= max(1, count // 6)
    if count > 1:
        assert not any(plan.cut and plan.kill for plan in plans)


@given(st.integers(30, 60), seeds)
@settings(max_examples=40, deadline=None)
def test_a_fleet_of_thirty_has_enough_of_everything(count: int, seed: int) -> None:
    plans = make_population(count, seed)
    assert sum(plan.kill is not None for plan in plans) >= 6
    assert any(plan.factory == "v0" for plan in plans)
    assert all(plan.kill is None and plan.cut is None for plan in plans if plan.factory == "v0")
    assert {plan.kill.state for plan in plans if plan.kill} == {
        "downloading", "installing", "verifying", "trial",
    }  # fmt: skip


def test_two_seeds_give_two_fleets() -> None:
    assert make_population(36, 1) != make_population(36, 2)


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (-1, 1), (DEVICES_MAX + 1, 1), (36, -1)])
def test_an_impossible_fleet_is_refused(count: int, seed: int) -> None:
    with pytest.raises(RequestError) as caught:
        make_population(count, seed)
    assert "\n" not in str(caught.value)
