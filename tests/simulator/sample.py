"""A record of a run that never was: plausible, and the same every time."""

import random

from simulator.live.population import make_population
from simulator.report.checks import check_run, sum_up
from simulator.report.record import (
    DeviceResult,
    Fault,
    Member,
    ModelVersion,
    Phase,
    Rollout,
    Run,
    Traffic,
    Transition,
)

CANARIES = 4
_DELTA, _FILE = 1_790_000, 3_268_552
_WAY = (
    ("idle", "syncing", 0.2),
    ("syncing", "admitting", 0.1),
    ("admitting", "downloading", 0.1),
    ("downloading", "installing", 0.0),
    ("installing", "verifying", 0.1),
    ("verifying", "trial", 0.1),
    ("trial", "committing", 1.4),
    ("committing", "idle", 0.1),
)
_BACK = (*_WAY[:6], ("trial", "rolling_back", 1.3), ("rolling_back", "rolled_back", 0.05))


def sample_run(count: int = 36, seed: int = 1) -> Run:
    rng = random.Random(seed)
    plans = make_population(count, seed)
    canaries = min(CANARIES, count)
    transitions: list[Transition] = []
    faults: list[Fault] = []
    results: list[DeviceResult] = []
    ends: list[int] = []
    for number, plan in enumerate(plans):
        begin = 2_000 + (8_000 if number >= canaries else 0) + rng.randint(0, 400)
        now = begin
        length = _FILE if plan.factory == "v0" else _DELTA
        for source, target, seconds in _WAY:
            transitions.append(_moved(now, plan.device, source, target, "v2"))
            now += int(seconds * 1000) + rng.randint(5, 60)
            if target == "downloading":
                half = int(length / plan.link.bandwidth_bytes_s * 500)
                now += half
                if plan.cut:
                    faults.append(_fault(now, plan.device, "cut"))
                    transitions.append(_moved(now, plan.device, target, "suspended", "v2"))
                    now += plan.cut.offline_ms
                    transitions.append(_moved(now, plan.device, "suspended", target, "v2"))
                if plan.kill:
                    faults.append(_fault(now, plan.device, "kill"))
                    transitions.append(_moved(now, plan.device, target, "down", ""))
                    now += plan.kill.down_ms
                    transitions.append(_moved(now, plan.device, "down", target, ""))
                now += half
        ends.append(now)
        is_bad = number < canaries
        results.append(
            DeviceResult(
                device=plan.device,
                tier=plan.tier,
                link=plan.link.name,
                bandwidth_bytes_s=plan.link.bandwidth_bytes_s,
                latency_ms=plan.link.latency_ms,
                is_sleeper=plan.link.asleep_ms > 0,
                is_process=plan.kill is not None,
                factory_version=plan.factory,
                final_version="v2",
                is_canary=is_bad,
                is_delta=plan.factory == "v1",
                update_ms=now - begin,
                transfer_bytes=length,
                full_bytes=_FILE,
                air_bytes=length + 30_000,
                chunks_stored=length // 65_500,
                chunks_twice=0,
                redundant_chunks=0,
                resumes=int(plan.cut is not None),
                cuts=int(plan.cut is not None),
                kills=int(plan.kill is not None),
                asked=90,
                answered=90,
                failed=0,
                bad_outcome="rolled_back" if is_bad else "",
                bad_code="trial.class_accuracy" if is_bad else "",
            )
        )
    bad_begin = max(ends) + 1_500
    members: list[Member] = []
    for plan in plans[:canaries]:
        now = bad_begin + rng.randint(0, 200)
        asked = now
        for source, target, seconds in _BACK:
            transitions.append(_moved(now, plan.device, source, target, "v3"))
            now += int(seconds * 1000) + rng.randint(5, 60)
        members.append(
            Member(
                device=plan.device,
                wave="canary",
                status="rolled_back",
                code="trial.class_accuracy",
                detail="2 of 24 right",
                asked_ms=asked,
                decided_ms=now,
                prompts_passed=2,
                prompts_total=24,
            )
        )
    finished = min(member.decided_ms or 0 for member in members)
    rollouts = [
        Rollout(
            rollout="r1", version="v2", state="finished", reason="", canary_count=canaries, created_ms=1_000,
            finished_ms=max(ends),
            members=[
                Member(device=plan.device, wave="canary" if number < canaries else "rest", status="committed", code="",
                       detail="", asked_ms=2_000, decided_ms=ends[number])
                for number, plan in enumerate(plans)
            ],
        ),
        Rollout(
            rollout="r2", version="v3", state="stopped", reason="1 of 4 canaries failed", canary_count=canaries,
            created_ms=bad_begin - 300, finished_ms=finished, members=members,
        ),
    ]  # fmt: skip
    models = [
        ModelVersion(version="v1", length=_FILE, score=0.942, story="trained on the first 240 images"),
        ModelVersion(version="v2", length=_FILE, score=0.974, story="trained further on all 1273 images"),
        ModelVersion(version="v3", length=_FILE, score=0.108, story="v2's weights, calibrated wrongly"),
    ]
    traffic = [
        Traffic(
            version="v2",
            devices=count,
            delta_bytes=_DELTA,
            file_bytes=_FILE,
            air_bytes=sum(each.air_bytes for each in results),
            full_bytes=count * _FILE,
        ),
        Traffic(
            version="v3",
            devices=canaries,
            delta_bytes=8_500,
            file_bytes=_FILE,
            air_bytes=canaries * 40_000,
            full_bytes=canaries * _FILE,
        ),
    ]
    totals = sum_up(results, traffic, "v2")
    offered = {
        plan.device: {"v2", "v3"} if number < canaries else {"v2"} for number, plan in enumerate(plans)
    }
    end = max(each.at_ms for each in transitions) + 500
    return Run(
        model="int8 ONNX classifier",
        score_name="held-out digits recognised",
        family="digits",
        devices_asked=count,
        seed=seed,
        broker="embedded",
        command=f"whimbrel-sim run --devices {count} --seed {seed}",
        started="2026-11-23T12:00:00+00:00",
        duration_ms=end,
        phases=[
            Phase(name="Start the fleet", begin_ms=0, end_ms=1_000),
            Phase(name="Good release v2", begin_ms=1_000, end_ms=bad_begin - 300),
            Phase(name="Bad release v3", begin_ms=bad_begin - 300, end_ms=end),
        ],
        models=models,
        totals=totals,
        checks=check_run(totals, results, models, rollouts[0], rollouts[1], offered, offered),
        rollouts=rollouts,
        traffic=traffic,
        devices=results,
        faults=sorted(faults, key=lambda each: each.at_ms),
        transitions=sorted(transitions, key=lambda each: each.at_ms),
    )  # fmt: skip


def _moved(at_ms: int, device: str, source: str, target: str, version: str) -> Transition:
    return Transition(at_ms=at_ms, device=device, source=source, target=target, version=version)


def _fault(at_ms: int, device: str, kind: str) -> Fault:
    assert kind in {"cut", "kill"}
    return Fault(
        at_ms=at_ms,
        device=device,
        kind="cut" if kind == "cut" else "kill",
        state="downloading",
        is_mid_update=True,
    )
