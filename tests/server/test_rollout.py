from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import DeviceId, Family, Version
from protocol.messages import Outcome, UpdateReport
from server.rollouts.campaign import Campaign, Invitation
from server.rollouts.records import FAILURES, RolloutRecord
from server.rollouts.states import (
    ACTIVE,
    FINAL,
    TRANSITIONS,
    RolloutState,
    RolloutTrigger,
    diagram,
    next_state,
)
from server.rollouts.waves import rank
from tests.server.samples import NOW_MS

README = Path(__file__).parents[2] / "server" / "README.md"
A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")


def _campaign(
    *asked: DeviceId, state: RolloutState = RolloutState.RUNNING, failures_max: int = 0
) -> Campaign:
    record = RolloutRecord(
        id="r1",
        family=Family("digits"),
        version=Version("2"),
        state=state,
        wave_timeout_ms=1000,
        failures_max=failures_max,
        created_ms=NOW_MS,
    )
    campaign = Campaign(record)
    for number, device in enumerate(asked):
        campaign.ask(Invitation(device), 1, NOW_MS + number)
    return campaign


def _says(outcome: Outcome, **changes: object) -> UpdateReport:
    update = UpdateReport(rollout="r1", sequence=1, version="2", outcome=outcome)
    return msgspec.structs.replace(update, **changes)


def test_every_state_is_reached_and_final_ones_are_never_left() -> None:
    reached = {RolloutState.CREATED} | {row.target for row in TRANSITIONS}
    assert reached == set(RolloutState)
    assert not {row.source for row in TRANSITIONS} & FINAL
    assert {row.source for row in TRANSITIONS} | FINAL == set(RolloutState)
    assert FINAL | ACTIVE | {RolloutState.CREATED} == set(RolloutState)


def test_a_transition_is_listed_once() -> None:
    assert len({(row.source, row.trigger) for row in TRANSITIONS}) == len(TRANSITIONS)


def test_an_unlisted_transition_names_state_and_trigger() -> None:
    listed = {(row.source, row.trigger) for row in TRANSITIONS}
    for state in RolloutState:
        for trigger in RolloutTrigger:
            if (state, trigger) not in listed:
                with pytest.raises(RuntimeError, match=f"{state.value}.*{trigger.value}"):
                    next_state(state, trigger)


def test_the_diagram_in_the_readme_is_the_one_of_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in README.read_text("utf-8")


def test_a_report_that_is_repeated_changes_nothing() -> None:
    campaign = _campaign(A)
    assert campaign.observe(A, _says("committed"), NOW_MS + 5) is not None
    assert campaign.observe(A, _says("committed"), NOW_MS + 6) is None
    assert campaign.counts() == {"committed": 1}


@pytest.mark.parametrize(
    "update",
    [
        _says("failed", rollout="r0"),
        _says("failed", version="1"),
        _says("failed", sequence=0),
    ],
)
def test_a_report_about_something_else_changes_nothing(update: UpdateReport) -> None:
    campaign = _campaign(A)
    assert campaign.observe(A, update, NOW_MS) is None
    assert campaign.observe(B, _says("committed"), NOW_MS) is None
    assert campaign.counts() == {"asked": 1}


def test_a_refusal_decides_a_device_and_is_no_failure() -> None:
    campaign = _campaign(A)
    campaign.observe(A, _says("rejected", code="admission.refused"), NOW_MS)
    assert campaign.is_decided
    assert campaign.failures() == 0
    assert not campaign.has_proof
    assert campaign.members[A].code == "admission.refused"


@pytest.mark.parametrize("outcome", sorted(FAILURES - {"silent"}))
def test_a_rollback_and_a_failure_count(outcome: Outcome) -> None:
    campaign = _campaign(A, B)
    campaign.observe(A, _says(outcome), NOW_MS)
    assert campaign.failures() == 1
    assert campaign.undecided == [B]


def test_a_device_that_says_nothing_in_time_counts_as_failed() -> None:
    campaign = _campaign(A, B)
    campaign.observe(B, _says("running"), NOW_MS + 3)
    assert campaign.deadline() == NOW_MS + 1000
    assert [member.device for member in campaign.expire(NOW_MS + 1000)] == [A]
    assert campaign.deadline() == NOW_MS + 1001
    (late,) = campaign.expire(NOW_MS + 1001)
    assert (late.status, late.detail) == ("silent", "began and never finished")
    assert campaign.failures() == 2
    assert campaign.deadline() is None


def test_what_a_device_says_after_its_time_replaces_silence() -> None:
    campaign = _campaign(A)
    campaign.expire(NOW_MS + 1000)
    assert campaign.observe(A, _says("running"), NOW_MS + 2000) is not None
    assert campaign.members[A].status == "silent"
    campaign.observe(A, _says("committed"), NOW_MS + 3000)
    assert campaign.failures() == 0
    assert campaign.has_proof


def test_only_devices_that_have_not_begun_are_released() -> None:
    campaign = _campaign(A, B, C)
    campaign.observe(A, _says("running"), NOW_MS)
    campaign.observe(B, _says("rolled_back"), NOW_MS)
    assert [member.device for member in campaign.withdraw(NOW_MS)] == [C]
    assert campaign.undecided == [A]


def test_failures_are_counted_for_each_wave() -> None:
    campaign = _campaign(A, B, failures_max=1)
    campaign.observe(A, _says("failed"), NOW_MS)
    campaign.observe(B, _says("committed"), NOW_MS)
    campaign.move(RolloutTrigger.WIDEN, NOW_MS)
    campaign.ask(Invitation(C), 1, NOW_MS)
    assert campaign.failures() == 0
    campaign.observe(C, _says("rolled_back"), NOW_MS)
    assert campaign.failures() == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["running", "committed", "failed", None]))))
def test_a_campaign_is_the_same_after_a_restart(steps: list[tuple[str, Outcome | None]]) -> None:
    campaign = _campaign(A, B, C)
    now_ms = NOW_MS
    for device, step in steps:
        now_ms += 200
        if step is None:  # time passes
            campaign.expire(now_ms)
        else:
            campaign.observe(DeviceId(device), _says(step), now_ms)
        again = Campaign(campaign.record, list(campaign.members.values())[::-1])
        assert again.members == campaign.members
        assert again.undecided == campaign.undecided
        assert again.counts() == campaign.counts()
        assert (again.failures(), again.deadline()) == (campaign.failures(), campaign.deadline())


def test_canaries_are_others_in_another_rollout_and_the_same_in_the_same() -> None:
    devices = [DeviceId(f"d{number}") for number in range(100)]

    def first(rollout: str) -> list[DeviceId]:
        return sorted(devices, key=lambda device: rank(rollout, device))[:5]

    assert first("r1") == first("r1") != first("r2")
