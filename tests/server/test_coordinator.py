"""The coordinator's decisions as transcripts, see `transcript.py`, and what must hold whatever happens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol.ids import DeviceId, digest_of
from server.coordinator import CoordinatorLimits
from server.effects import Effect, PublishDesired, RemoveBlobs, Save, SignMetadata
from server.events import ReportReceived
from server.fleet.registry import DeviceRecord
from server.releases.delta_stock import TARGETS_SOFT_MAX
from server.rollouts.states import RolloutState
from tests.server.samples import NOW_MS, model_bytes, report
from tests.server.transcript import Play


def test_a_good_release_goes_to_the_canary_and_then_to_the_rest() -> None:
    play = Play()
    play.check(
        """
        > report a 1
        save device a running 1
        > report b 1
        save device b running 1
        > rollout r1 2
        save rollout r1 preparing
        build 1-2
        > built 1-2 1000
        sign 1-2
        > signed
        publish metadata
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        save cached delta1-2
        cache delta1-2 x1
        desired a 2 for r1 #1
        > report a 1 running r1
        save device a running 1
        save member a canary running
        > report a 2 committed r1
        save device a running 2
        save member a canary committed
        save rollout r1 running rest
        save member b rest asked
        save device b running 1
        desired b 2 for r1 #1
        > report b 2 committed r1
        save device b running 2
        save member b rest committed
        save rollout r1 finished
        uncache release2 x1
        uncache delta1-2 x1
        """
    )


def test_a_bad_release_stops_at_the_canary_and_is_never_sent_to_the_others() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> report c 1\n> rollout r1 2\n> failed 1-2")
    play.check(
        """
        > report a 1 running r1
        save device a running 1
        save member a canary running
        > report a 1 rolled_back r1
        save device a running 1
        save member a canary rolled_back
        save rollout r1 stopped (1 failed in the canary wave, allowed are 0)
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        > report b 1
        save device b running 1
        > report d 1
        save device d running 1
        > wait 100000
        > connect
        publish metadata
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        desired a 2 for r1 #1
        """
    )


def test_devices_that_have_not_begun_when_a_wave_fails_keep_what_they_run() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> report c -\n> report d 1\n> rollout r1 2 canary=4\n> failed 1-2")
    play.check(
        """
        > report a 1 running r1
        save device a running 1
        save member a canary running
        > report b 1 failed r1
        save device b running 1
        save member b canary failed
        save rollout r1 stopped (1 failed in the canary wave, allowed are 0)
        save member d canary withdrawn
        save device d running 1
        desired d 1 for r1 #2
        save member c canary withdrawn
        save device c running nothing
        desired c nothing
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        > report a 2 committed r1
        save device a running 2
        save member a canary committed
        > connect
        publish metadata
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        desired a 2 for r1 #1
        desired b 2 for r1 #1
        desired c nothing
        desired d 1 for r1 #2
        """
    )


def test_silence_stops_a_rollout_and_a_late_answer_is_noted() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> rollout r1 2 timeout=5000\n> failed 1-2")
    play.check(
        """
        > wait 4999
        > wait 1
        save member a canary silent
        save rollout r1 stopped (1 failed in the canary wave, allowed are 0)
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        > report a 2 committed r1
        save device a running 2
        save member a canary committed
        """
    )


def test_failures_up_to_the_limit_are_accepted() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> report c 1\n> rollout r1 2 canary=2 failures=1\n> failed 1-2")
    play.check(
        """
        > report a 1 failed r1
        save device a running 1
        save member a canary failed
        > report b 2 committed r1
        save device b running 2
        save member b canary committed
        save rollout r1 running rest
        save member c rest asked
        save device c running 1
        desired c 2 for r1 #1
        > report c 1 rolled_back r1
        save device c running 1
        save member c rest rolled_back
        save rollout r1 finished
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        """
    )


def test_a_delta_that_saves_nothing_is_noted_and_the_whole_file_goes_out() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2")
    play.check(
        """
        > built 1-2 300000
        save refusal 1-2
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired a 2 for r1 #1
        """
    )


def test_where_the_small_delta_saves_nothing_the_fast_one_is_not_tried() -> None:
    play = Play()
    play.play("> report a 1 link=64000\n> report b 1 link=300000\n> rollout r1 2 canary=2")
    play.check(
        """
        > built 1-2 300000
        save refusal 1-2
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save member b canary asked
        save device b running 1
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired a 2 for r1 #1
        desired b 2 for r1 #1
        > restart
        > report c 1 link=300000
        save device c running 1
        """
    )


def test_the_whole_file_goes_out_when_a_delta_cannot_be_signed() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> built 1-2 1000")
    play.check(
        """
        > unsigned
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired a 2 for r1 #1
        """
    )


def test_the_whole_file_goes_out_where_the_base_is_unknown() -> None:
    play = Play()
    play.play("> report a 1 file=foreign")
    play.check(
        """
        > rollout r1 2
        save rollout r1 preparing
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired a 2 for r1 #1
        """
    )


def test_a_rollout_without_devices_waits_for_the_first() -> None:
    play = Play()
    play.check(
        """
        > rollout r1 2
        save rollout r1 preparing
        > wait 100000000
        > report a -
        save device a running nothing
        save rollout r1 running canary
        save member a canary asked
        save device a running nothing
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired a 2 for r1 #1
        """
    )


def test_a_family_has_one_rollout_at_a_time_and_only_of_published_versions() -> None:
    play = Play()
    play.play("> report a 1")
    play.check(
        """
        > rollout r1 2
        save rollout r1 preparing
        build 1-2
        > rollout r2 3
        save rollout r2 stopped (rollout r1 of the same family was still under way)
        > rollout r3 9
        save rollout r3 stopped (its release is not published)
        """
    )


def test_a_restart_repeats_nothing_that_was_asked_and_everything_that_was_lost() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> rollout r1 2")
    play.check(
        """
        > restart
        build 1-2
        > built 1-2 1000
        sign 1-2
        > restart
        build 1-2
        > built 1-2 1000
        sign 1-2
        > signed
        publish metadata
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        save cached delta1-2
        cache delta1-2 x1
        desired a 2 for r1 #1
        > restart
        > connect
        publish metadata
        cache release2 x1
        cache delta1-2 x1
        desired a 2 for r1 #1
        > report a 2 committed r1
        save device a running 2
        save member a canary committed
        save rollout r1 running rest
        save member b rest asked
        save device b running 1
        desired b 2 for r1 #1
        > restart
        > report b 2 committed r1
        save device b running 2
        save member b rest committed
        save rollout r1 finished
        uncache release2 x1
        uncache delta1-2 x1
        > uncached release2
        save uncached release2
        > restart
        uncache delta1-2 x1
        """
    )


def test_canaries_that_only_refuse_prove_nothing_so_the_next_are_asked() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> report c 1\n> rollout r1 2\n> failed 1-2")
    play.check(
        """
        > report a 1 rejected r1
        save device a running 1
        save member a canary rejected
        save rollout r1 running canary
        save member b canary asked
        save device b running 1
        desired b 2 for r1 #1
        > report b 2 committed r1
        save device b running 2
        save member b canary committed
        save rollout r1 running rest
        save member c rest asked
        save device c running 1
        desired c 2 for r1 #1
        > report c 1 rejected r1
        save device c running 1
        save member c rest rejected
        save rollout r1 finished
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        """
    )


def test_devices_whose_tier_a_release_is_for_go_first() -> None:
    play = Play(tiers=("large",))
    play.play("> report a 1 tier=small\n> report b 1 tier=large\n> rollout r1 3")
    play.check(
        """
        > failed 1-3
        save rollout r1 running canary
        save member b canary asked
        save device b running 1
        save cached release3
        cache release3 x1
        save cached file3
        cache file3 x3
        save cached file3/index
        cache file3/index x1
        desired b 3 for r1 #1
        """
    )


def test_what_passes_the_budget_is_not_retained_and_still_answered() -> None:
    play = Play(limits=CoordinatorLimits(retained_bytes_max=1000))
    play.play("> report a 1\n> rollout r1 2")
    play.check(
        """
        > failed 1-2
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        desired a 2 for r1 #1
        > chunks a file2 0,1,2
        answer a file2 0,1,2
        """
    )


def test_a_commit_counts_only_with_the_measured_files() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> failed 1-2")
    play.check(
        """
        > report a 1 committed r1
        save device a running 1
        > report a 2 committed r1 file=foreign
        save device a running 2
        > report a 2
        save device a running 2
        save member a canary committed
        save rollout r1 finished
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        """
    )


def test_a_device_that_appears_late_joins_the_last_wave_with_a_delta_of_its_own() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> rollout r1 2\n> failed 1-2\n> report a 2 committed r1")
    play.check(
        """
        > report c 3
        save device c running 3
        build 3-2
        > built 3-2 1000
        sign 3-2
        > signed
        publish metadata
        save member c rest asked
        save device c running 3
        save cached delta3-2
        cache delta3-2 x1
        desired c 2 for r1 #1
        > report b 2 committed r1
        save device b running 2
        save member b rest committed
        > report c 2 committed r1
        save device c running 2
        save member c rest committed
        save rollout r1 finished
        uncache release2 x1
        uncache file2 x3
        uncache file2/index x1
        uncache delta3-2 x1
        """
    )


def test_devices_that_run_the_version_already_are_not_asked_and_are_no_canaries() -> None:
    play = Play()
    play.play("> report a 2\n> report b 1\n> report c 1\n> report d 2")
    play.check(
        """
        > rollout r1 2
        save rollout r1 preparing
        build 1-2
        > failed 1-2
        save rollout r1 running canary
        save member a canary committed
        save member d canary committed
        save member b canary asked
        save device b running 1
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired b 2 for r1 #1
        > report c 2 committed r1
        save device c running 2
        """
    )


def test_requests_are_answered_for_what_is_signed_and_nothing_else() -> None:
    play = Play()
    play.play("> report a 1")
    play.check(
        """
        > chunks a file2 0,2,3,63
        answer a file2 0,2
        > chunks a file2 5
        > chunks a unsigned 0
        > metadata a 1
        answer a metadata after root 1
        > chunks stranger file1 0
        answer stranger file1 0
        """
    )


def test_a_link_is_noted_when_it_changes() -> None:
    play = Play()
    play.play("> report a 1")
    play.check(
        """
        > link a online
        save device a running 1
        > link a online
        > link a offline
        save device a running 1
        """
    )


def test_a_device_that_has_seen_higher_numbers_than_the_store_is_asked_with_a_higher_one() -> None:
    play = Play()
    play.play("> rollout r0 1\n> report a 1 failed r0 #41\n> report a 1")
    play.check(
        """
        > rollout r1 2
        save rollout r1 preparing
        build 1-2
        > failed 1-2
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release2
        cache release2 x1
        save cached file2
        cache file2 x3
        save cached file2/index
        cache file2/index x1
        desired a 2 for r1 #1
        """
    )


def test_metadata_is_signed_again_when_it_is_due_and_tried_again_when_that_failed() -> None:
    play = Play()
    play.refresh_ms = NOW_MS + 1000
    play.check(
        """
        > restart
        > wait 999
        > wait 1
        sign again
        > wait 5000
        > unsigned
        > wait 999
        > wait 1
        sign again
        > signed
        publish metadata
        """
    )


def test_a_repeated_an_overtaken_and_a_forged_report_change_nothing() -> None:
    play = Play()
    play.play("> report a 1\n> report a 2")
    for late in (report("a", 2, "1"), report("a", 1, "1"), report("b", 9, "1")):
        assert play.happen(ReportReceived(DeviceId("a"), late)) == []


def test_a_member_that_somebody_else_has_asked_for_something_is_asked_again_above_that() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2 canary=1\n> failed 1-2")
    spoken = replace(report("a", 5, "1"), desired_sequence=500)
    told = [line for line in play.happen(ReportReceived(DeviceId("a"), spoken)) if "desired" in line]
    assert told == ["desired a 2 for r1 #501"]
    again = replace(report("a", 6, "1"), desired_sequence=501)
    assert not [line for line in play.happen(ReportReceived(DeviceId("a"), again)) if "desired" in line]
    play.play("> report a 2 committed r1 #501")
    later = replace(report("a", 99, "2"), desired_sequence=900)  # no rollout wants anything of it any more
    assert not [line for line in play.happen(ReportReceived(DeviceId("a"), later)) if "desired" in line]


def test_devices_beyond_the_limit_are_not_taken_notice_of() -> None:
    play = Play(CoordinatorLimits(devices_max=2))
    play.play("> report a 1\n> report b 1")
    assert play.play("> report c 1\n> link d online") == "> report c 1\n> link d online"
    assert "save device a" in play.play("> report a 2")


STEPS = st.one_of(
    st.tuples(
        st.just("report"), st.sampled_from("abcd"), st.sampled_from("123"), st.sampled_from(["", "r1", "r2"]),
        st.sampled_from(["running", "committed", "rolled_back", "rejected", "failed"]),
    ).map(lambda step: f"> report {step[1]} {step[2]}" + (f" {step[4]} {step[3]} #9" if step[3] else "")),
    st.sampled_from(
        [
            "> wait 4000", "> wait 11000", "> connect", "> restart", "> signed", "> unsigned", "> link a online",
            "> built 1-2 1000", "> failed 1-2", "> built 2-3 900000", "> failed 2-3", "> built 1-3 1000",
            "> built 3-2 1000", "> rollout r1 2 canary=2", "> rollout r2 3 failures=1",
            "> wait 3600000", "> wait 604800000", "> report c 1 link=64000", "> report d 2 link=64000",
        ]
    ),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_whatever_happens_requests_are_numbered_saved_first_and_never_sent_for_a_stopped_rollout(
    steps: list[str],
) -> None:
    play = Play()
    highest: dict[str, int] = {}
    play.play("> report a 1\n> report b 1")
    for step in steps:
        words = step[2:].split()
        if words[0] in {"signed", "unsigned"} and play.signing is None:
            continue
        if words[0] == "report" and len(words) > 4 and words[4] not in play.coordinator.campaigns:
            continue
        campaigns = play.coordinator.campaigns
        stopped = {name for name, campaign in campaigns.items() if campaign.state is RolloutState.STOPPED}
        if words[0] == "rollout" and words[1] in campaigns:
            continue
        saved: dict[str, int] = {}
        play.command(words)
        assert_nothing_goes_that_is_on_offer(play)
        for effect in play.last_effects:
            if isinstance(effect, Save) and isinstance(effect.record, DeviceRecord):
                saved[effect.record.device] = effect.record.desired_sequence
            if isinstance(effect, PublishDesired) and words[0] != "connect":
                if (
                    effect.device not in saved
                ):  # signed anew: it was durable before it left for the first time
                    assert effect.desired is not None, "a request left before it was durable"
                    assert effect.desired.sequence == highest[effect.device], "likewise"
                    continue
                assert saved[effect.device] > highest.get(effect.device, 0), "a number was used twice"
                highest[effect.device] = saved[effect.device]
                assert effect.desired is None or effect.desired.rollout not in stopped


@pytest.mark.parametrize(
    ("before", "withdrawn"),
    [
        ("> report a 1\n> rollout r1 2", []),
        ("> report a 1\n> report b 1\n> rollout r1 2 canary=1\n> failed 1-2", ["a canary"]),
        (
            "> report a 1\n> report b 1\n> rollout r1 2 canary=1\n> failed 1-2\n> report a 2 committed r1",
            ["b rest"],
        ),
    ],
    ids=["preparing", "canary", "rest"],
)
def test_a_rollout_whose_release_leaves_the_metadata_stops_and_asks_nobody_else(
    before: str, withdrawn: list[str]
) -> None:
    """An operator withdrew it, or the document of its family has expired."""
    play = Play()
    play.play(before)
    lines = play.play("> withdrawn 2").splitlines()
    assert lines[1:3] == [
        "publish metadata",
        "save rollout r1 stopped (its release is no longer in the signed metadata)",
    ]
    assert [line for line in lines if "withdrawn" in line][1:] == [
        f"save member {member} withdrawn" for member in withdrawn
    ]
    after = play.play("> report d 1\n> report a 2 committed r1\n> wait 100000\n> restart")
    assert "desired" not in after


HOUR = 3_600_000
WEEK = 7 * 24 * HOUR


def test_a_straggler_takes_the_chain_that_is_there_and_those_who_ran_the_version_before_get_its_delta() -> (
    None
):
    play = Play()
    for pair in ("1-2", "2-3"):
        play.sign(pair, 300)
    play.play("> restart\n> report a 1 link=64000\n> report b 2 link=64000")
    play.check(
        """
        > rollout r1 3 canary=2
        save rollout r1 preparing
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save member b canary asked
        save device b running 2
        save cached release3
        cache release3 x1
        save cached delta2-3
        cache delta2-3 x1
        save cached delta1-2
        cache delta1-2 x1
        desired a 3 for r1 #1
        desired b 3 for r1 #1
        """
    )


def test_an_agent_without_chains_gets_a_delta_of_its_own_although_there_is_a_chain() -> None:
    play = Play()
    for pair in ("1-2", "2-3"):
        play.sign(pair, 300)
    play.play("> restart\n> report a 1")
    play.check(
        """
        > rollout r1 3
        save rollout r1 preparing
        build 1-3
        > failed 1-3
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save cached release3
        cache release3 x1
        save cached file3
        cache file3 x3
        save cached file3/index
        cache file3/index x1
        desired a 3 for r1 #1
        """
    )


def test_a_straggler_waits_for_the_delta_that_its_chain_ends_with() -> None:
    play = Play()
    play.sign("1-2", 300)
    play.play("> restart\n> report a 1 link=64000\n> report b 2 link=64000\n> report c 2 link=64000")
    play.check(
        """
        > rollout r1 3 canary=3
        save rollout r1 preparing
        build 2-3
        > built 2-3 300
        sign 2-3
        > signed
        publish metadata
        save rollout r1 running canary
        save member a canary asked
        save device a running 1
        save member b canary asked
        save device b running 2
        save member c canary asked
        save device c running 2
        save cached release3
        cache release3 x1
        save cached delta2-3
        cache delta2-3 x1
        save cached delta1-2
        cache delta1-2 x1
        desired a 3 for r1 #1
        desired b 3 for r1 #1
        desired c 3 for r1 #1
        """
    )


def test_a_delta_that_nobody_needs_goes_after_its_time_of_grace_first_from_the_metadata_then_from_the_disk() -> (
    None
):
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> built 1-2 1000\n> signed\n> report a 2 committed r1")
    play.play("> uncached release2\n> uncached delta1-2")
    play.check(
        f"""
        > wait {HOUR}
        save idle 1-2
        > wait {HOUR}
        > wait {WEEK - HOUR}
        sign without 1-2
        > signed
        publish metadata
        remove 1-2 x1
        > removed delta1-2
        save no longer idle 1-2
        > wait {WEEK}
        """
    )
    assert play.coordinator.deadline() == play.refresh_ms
    assert not [key for key in play.store if key[0] == "idle"]


def test_a_removal_that_was_cut_off_is_carried_out_after_a_restart() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> built 1-2 1000\n> signed\n> report a 2 committed r1")
    play.play(f"> uncached release2\n> uncached delta1-2\n> wait {HOUR}\n> wait {WEEK}\n> signed")
    play.check(
        """
        > restart
        remove 1-2 x1
        > removed delta1-2
        save no longer idle 1-2
        > restart
        """
    )


def test_a_delta_that_was_idle_stays_when_a_device_comes_back_to_its_base() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> built 1-2 1000\n> signed\n> report a 2 committed r1")
    play.check(
        f"""
        > wait {HOUR}
        save idle 1-2
        > report b 1
        save device b running 1
        > wait {WEEK}
        save no longer idle 1-2
        """
    )
    assert play.play(f"> wait {HOUR}") == f"> wait {HOUR}"


def test_what_a_silent_device_was_asked_to_fetch_stays_until_it_has_answered() -> None:
    play = Play()
    play.play("> report a 1\n> report b 1\n> rollout r1 2 canary=2\n> built 1-2 1000\n> signed")
    play.play("> report a 2 committed r1\n> wait 20000")
    assert play.coordinator.campaigns["r1"].state is RolloutState.STOPPED  # b said nothing
    assert play.play(f"> wait {HOUR}\n> wait {WEEK}") == f"> wait {HOUR}\n> wait {WEEK}"
    play.check(
        f"""
        > report b 1 failed r1
        save device b running 1
        save member b canary failed
        > wait {HOUR}
        save idle 1-2
        """
    )


def test_a_retired_delta_is_built_again_when_it_is_needed_again() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> built 1-2 1000\n> signed\n> report a 2 committed r1")
    play.play(f"> wait {HOUR}\n> wait {WEEK}\n> signed")
    play.check(
        """
        > report b 1
        save device b running 1
        > rollout r2 2
        save rollout r2 preparing
        build 1-2
        > removed delta1-2
        save no longer idle 1-2
        > built 1-2 1000
        sign 1-2
        """
    )


def test_a_blob_is_not_removed_while_its_delta_is_built_again() -> None:
    play = Play()
    play.play("> report a 1\n> rollout r1 2\n> built 1-2 1000\n> signed\n> report a 2 committed r1")
    play.play(f"> wait {HOUR}\n> wait {WEEK}\n> signed\n> report b 1\n> rollout r2 2")
    play.check(
        """
        > signed
        publish metadata
        > built 1-2 1000
        save no longer idle 1-2
        sign 1-2
        """
    )


def test_idle_deltas_go_at_once_when_the_metadata_grows_too_large() -> None:
    play = Play()
    play.sign("1-2", 300)
    for number in range(TARGETS_SOFT_MAX):
        play.sign_foreign(number)
    play.play("> restart\n> report a 2\n> rollout r1 3")
    (effect,) = [effect for effect in _effects(play, "> built 2-3 1000") if isinstance(effect, SignMetadata)]
    before = len(play.coordinator.catalog.targets)
    assert before + 1 - len(effect.retired) == TARGETS_SOFT_MAX
    assert len(set(effect.retired)) == len(effect.retired)
    play.play("> signed")
    assert len(play.coordinator.catalog.targets) == TARGETS_SOFT_MAX
    removals = [each for each in play.last_effects if isinstance(each, RemoveBlobs)]
    assert {removal.path for removal in removals} == set(effect.retired)


def assert_nothing_goes_that_is_on_offer(play: Play) -> None:
    """No delta to a release leaves that a device was asked for and has said nothing final about."""
    retired = {
        path for effect in play.last_effects if isinstance(effect, SignMetadata) for path in effect.retired
    }
    for device in play.coordinator.registry:
        if device.desired is None or device.version == device.desired.version or not retired:
            continue
        update = device.report.update if device.report else None
        answer = update.outcome if update and update.sequence == device.desired.sequence else "running"
        if answer == "running":
            offered = digest_of(model_bytes(device.desired.version))
            assert not [path for path in retired if path.split("/")[2] == offered]


def _effects(play: Play, line: str) -> tuple[Effect, ...]:
    play.play(line)
    return play.last_effects
