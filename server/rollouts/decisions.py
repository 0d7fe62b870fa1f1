"""What follows from the outcomes of a rollout, on which numbers, in words. Pure: the same campaign gives the same verdict.

`danger` is asked after every change and may stop or pause a rollout; `end_of_wave` is asked when every member is decided and
nobody is left to be asked in the wave; `standing` says what a rollout waits for. `steering.py` carries out what they say.
"""

from enum import Enum
from typing import NamedTuple

from server.rollouts.campaign import Campaign
from server.rollouts.evidence import RateTest
from server.rollouts.records import Numbers
from server.rollouts.states import RolloutState


class Step(Enum):
    """What a verdict asks for."""

    STOP = "stop"
    PAUSE = "pause"
    WIDEN = "widen"
    EXTEND = "extend"
    FINISH = "finish"
    WAIT = "wait"


class Verdict(NamedTuple):
    """A decision that is to be carried out.

    Attributes:
        step: What to do.
        text: Why, in words.
        numbers: On what.
        wait_ms: Until when, where there is nothing to do but wait.
    """

    step: Step
    text: str
    numbers: Numbers
    wait_ms: int | None = None


class Waiting(NamedTuple):
    """Devices of the family that are no members yet.

    Attributes:
        matching: That the wave under way may take.
        all: Whichever wave they are for.
        members_match: Whether the wave ever matched anybody.
    """

    matching: int
    all: int
    members_match: bool = True


def danger(campaign: Campaign) -> Verdict | None:
    """Whether a rollout has to stop, or to pause, whatever its wave is at."""
    return _count_rule(campaign) or _lost(campaign) or _rates(campaign) or _slowness(campaign)


def _count_rule(campaign: Campaign) -> Verdict | None:
    allowed, failures = campaign.record.failures_max, campaign.failures()
    if allowed is None or failures <= allowed:
        return None
    text = f"{failures} failed in the {campaign.wave.name} wave, allowed are {allowed}"
    return Verdict(Step.STOP, text, {"failed": failures, "failures_max": allowed})


def _lost(campaign: Campaign) -> Verdict | None:
    rules, lost = campaign.record.rules, campaign.lost
    if rules is None or not lost:
        return None
    named = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
    numbers: Numbers = {"lost": len(lost), "lost_pause": rules.lost_pause, "lost_stop": rules.lost_stop}
    if len(lost) >= rules.lost_stop:
        text = f"{len(lost)} devices did not come back after they had started the new version ({named}), at {rules.lost_stop} a rollout stops"
        return Verdict(Step.STOP, text, numbers)
    if (
        campaign.state is RolloutState.RUNNING
        and len(lost) >= rules.lost_pause
        and len(lost) > campaign.record.lost_accepted
    ):
        text = f"{named} did not come back after starting the new version: look at it, then resume or abort; another one stops the rollout"
        return Verdict(Step.PAUSE, text, numbers)
    return None


def _rates(campaign: Campaign) -> Verdict | None:
    if campaign.rates is None or not campaign.rates.is_failing:
        return None
    return Verdict(Step.STOP, rate_text(campaign.rates), rate_numbers(campaign.rates))


def _slowness(campaign: Campaign) -> Verdict | None:
    rules, record = campaign.record.rules, campaign.record
    if (
        rules is None
        or campaign.latency is None
        or record.is_slow_accepted
        or record.state is not RolloutState.RUNNING
    ):
        return None
    slow = campaign.latency.finding()
    if slow is None:
        return None
    where = f" of tier {slow.tier}" if slow.tier else ""
    text = (
        f"{slow.slower} of {slow.measured} devices{where} are more than {(rules.slower_ratio - 1) * 100:.0f} % slower"
        f" ({slow.metric.removesuffix('_ms')}) than the control group: resume to accept that, or abort"
    )
    numbers: Numbers = {
        "metric": slow.metric,
        "tier": slow.tier,
        "slower": slow.slower,
        "measured": slow.measured,
        "odds": slow.odds,
        "limit": slow.limit,
    }
    return Verdict(Step.PAUSE, text, numbers)


def end_of_wave(campaign: Campaign, waiting: Waiting, now_ms: int) -> Verdict:
    """What comes after a wave of which every device is decided."""
    numbers = _wave_numbers(campaign)
    soaked_ms = campaign.last_decided_ms + campaign.wave.soak_ms if campaign.asked_count else 0
    is_soaking = now_ms < soaked_ms
    if not waiting.all:
        if is_soaking:
            return _soak(campaign, soaked_ms, numbers)
        return Verdict(Step.FINISH, f"every device is decided: {_counts_text(campaign)}", numbers)
    if campaign.record.rules is None:
        return _plain_end(campaign, waiting, soaked_ms, now_ms)
    if not waiting.members_match and not waiting.matching:
        text = f"no device of the fleet matches the {campaign.wave.name} wave ({campaign.wave.size_text}): promote to leave it out, or abort"
        return Verdict(Step.PAUSE, text, numbers)
    if campaign.is_last_wave:
        if is_soaking:
            return _soak(campaign, soaked_ms, numbers)
        text = f"the plan ends here: {_counts_text(campaign)}; {waiting.all} devices were not asked"
        return Verdict(Step.FINISH, text, numbers)
    lacking = _lacking(campaign)
    if lacking and waiting.matching:
        return Verdict(Step.EXTEND, f"{lacking}: more devices are asked", numbers)
    if lacking:
        text = (
            f"{lacking}, and the {campaign.wave.name} wave has nobody left to ask: promote, resume, or abort"
        )
        return Verdict(Step.PAUSE, text, numbers)
    if is_soaking:
        return _soak(campaign, soaked_ms, numbers)
    return Verdict(Step.WIDEN, _passed_text(campaign), numbers)


def _plain_end(campaign: Campaign, waiting: Waiting, soaked_ms: int, now_ms: int) -> Verdict:
    """By the count of failures alone: a wave passes with one commit."""
    numbers = _wave_numbers(campaign)
    if not campaign.has_proof and waiting.matching:
        return Verdict(
            Step.EXTEND, "nobody has committed, which proves nothing: more devices are asked", numbers
        )
    if now_ms < soaked_ms:
        return _soak(campaign, soaked_ms, numbers)
    if campaign.is_last_wave:
        text = f"the plan ends here: {_counts_text(campaign)}; {waiting.all} devices were not asked"
        return Verdict(Step.FINISH, text, numbers)
    return Verdict(Step.WIDEN, _passed_text(campaign), numbers)


def _lacking(campaign: Campaign) -> str:
    """What keeps a wave from passing; nothing if it passes."""
    rates = campaign.rates
    assert rates is not None, "waves of a plain rollout pass by count"
    if not campaign.has_proof:
        return "nobody has committed, which proves nothing"
    if not rates.is_plausible:
        return (
            f"{rates.evidence.failed} of {rates.evidence.counted} failed, which is likelier where {rates.rules.unacceptable:.1%}"
            f" fail than where {rates.rules.acceptable:.1%} do, and too little to stop"
        )
    if campaign.wave.is_proof and not rates.is_proved:
        return f"not proved yet, that takes {rates.proof_needs()} more devices without a failure"
    return ""


def _soak(campaign: Campaign, until_ms: int, numbers: Numbers) -> Verdict:
    return Verdict(Step.WAIT, f"the {campaign.wave.name} wave soaks", numbers, until_ms)


def _passed_text(campaign: Campaign) -> str:
    text = f"the {campaign.wave.name} wave has passed: {_counts_text(campaign)}"
    rates = campaign.rates
    if rates is None:
        return text
    proof = "proved" if rates.is_proved else "not proved yet"
    return (
        f"{text}; {rates.evidence.failed} of {rates.evidence.counted} failed, as likely at {rates.rules.acceptable:.1%} as"
        f" at {rates.rules.unacceptable:.1%} or likelier, and {proof} by Wald's test"
    )


def rate_text(rates: RateTest) -> str:
    """The evidence against a release, in words."""
    finding = rates.evidence.finding()
    if not finding.failed:
        return f"none of {rates.evidence.counted} failed"
    where = f" of tier {finding.stratum}" if finding.stratum else ""
    return (
        f"{finding.failed} of the first {finding.asked} devices{where} failed; with {rates.rules.acceptable:.1%} as normal the odds"
        f" against the release are {finding.odds:,.0f} to 1, the limit is {rates.rules.limit:,.0f}"
    )


def rate_numbers(rates: RateTest) -> Numbers:
    """The evidence against a release."""
    finding = rates.evidence.finding()
    return {
        "failed": rates.evidence.failed,
        "counted": rates.evidence.counted,
        "odds": finding.odds,
        "limit": rates.rules.limit,
        "tier": finding.stratum,
        "tier_failed": finding.failed,
        "tier_asked": finding.asked,
        "wald": rates.ratio,
    }


def _wave_numbers(campaign: Campaign) -> Numbers:
    numbers: Numbers = dict(sorted(campaign.counts().items()))
    return numbers if campaign.rates is None else numbers | rate_numbers(campaign.rates)


def _counts_text(campaign: Campaign) -> str:
    counts = sorted(campaign.counts().items())
    return ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts) or "nobody asked"


def standing(campaign: Campaign, now_ms: int) -> str:
    """What a rollout waits for, in words."""
    record = campaign.record
    if record.state is RolloutState.CREATED:
        return "waits for a server to take it up"
    if record.state is RolloutState.PREPARING:
        return "waits until every delta is built and signed, and a device is there"
    if record.state is RolloutState.PAUSED:
        return f"paused, {campaign.in_flight} devices go on by themselves: resume, promote or abort"
    if record.state in {RolloutState.FINISHED, RolloutState.STOPPED}:
        return f"{record.state}: {_counts_text(campaign)}"
    parts = [f"the {campaign.wave.name} wave ({campaign.wave.size_text})"]
    if campaign.undecided:
        limit = "" if record.in_flight_max is None else f" of at most {record.in_flight_max}"
        parts.append(f"{campaign.in_flight}{limit} in flight")
        held = sum(campaign.members[device].held_since_ms is not None for device in campaign.undecided)
        if held:
            parts.append(f"{held} of them held by their policy")
        due_ms = campaign.deadline()
        if due_ms is not None:
            parts.append(f"the next one is due in {max(0, due_ms - now_ms) / 1000:.0f} s")
    elif campaign.wave.soak_ms and campaign.asked_count:
        left_ms = campaign.last_decided_ms + campaign.wave.soak_ms - now_ms
        parts.append(f"soaks for {max(0, left_ms) / 1000:.0f} s more")
    return ", ".join(parts)
