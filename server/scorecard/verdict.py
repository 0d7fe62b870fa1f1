"""Whether what was measured is good enough. Pure.

A check that compares shares has three outcomes, since a sample is no certainty: with 95 % confidence good enough, with 95 % confidence not, or
undecided until more questions are asked. Nothing but "passed" in every check, with nothing missing, is a pass.
"""

import math
import tomllib
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.errors import RequestError
from protocol.release import ClassPrompt, HealthPlan
from server.scorecard.card import Check, Drift, SuiteScore, Verdict
from server.scorecard.statistics import CONFIDENCE, Interval, Paired

_Share = Annotated[float, Meta(ge=0, le=1)]
_LIMITS_BYTES_MAX: Final = 1 << 20


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a version must keep to. TOML with these keys.

    Attributes:
        accuracy_drop_max: Share of right answers that a suite may lose against the version before: 0.03 are 3 of 100 questions.
        accuracy_min: Least share of right answers, by name of the suite.
        kl_mean_max: Largest mean divergence of next-token distributions, in nats; None for no limit.
    """

    accuracy_drop_max: _Share = 0.03
    accuracy_min: dict[str, _Share] = {}
    kl_mean_max: Annotated[float, Meta(ge=0)] | None = None


def read_limits(path: Path) -> Limits:
    """Read limits.

    Raises:
        RequestError: The file cannot be read or is malformed; names the field.
    """
    try:
        with path.open("rb") as file:
            return msgspec.convert(tomllib.loads(file.read(_LIMITS_BYTES_MAX).decode()), Limits)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path}: {error}", hint="expected is TOML") from error
    except msgspec.MsgspecError as error:
        raise RequestError(
            f"{path}: {error}", hint="expected are accuracy_drop_max, accuracy_min and kl_mean_max"
        ) from error


def checks_of(
    plan: HealthPlan,
    limits: Limits,
    suites: tuple[SuiteScore, ...],
    drift: Drift | None,
    peak_bytes: int | None,
) -> tuple[Check, ...]:
    """Look at everything that has a limit.

    Args:
        plan: Of the release.
        limits: Of the person who asks.
        suites: What was answered; the first one is that of the plan.
        drift: Against the version before.
        peak_bytes: Largest resident set with the smallest context.
    """
    checks = [
        _prompts(suite, plan if suite.name == "health plan" else None)
        for suite in suites
        if suite.kind in {"golden", "edge"}
    ]
    if peak_bytes is not None:
        limit = plan.memory_peak_bytes_max
        checks.append(
            Check(
                name="memory",
                status="passed" if peak_bytes <= limit else "failed",
                detail=f"peak of {peak_bytes / 1e6:,.0f} MB with the smallest context, the health plan allows {limit / 1e6:,.0f} MB",
            )
        )
    known = {suite.name: suite for suite in suites}
    for name, least in limits.accuracy_min.items():
        suite = known.get(name)
        if suite is None or suite.accuracy is None:
            checks.append(
                Check(name=f"{name}: accuracy", status="undecided", detail="the suite was not asked")
            )
        else:
            checks.append(_at_least(f"{name}: accuracy", suite.accuracy, least))
    if drift is not None:
        checks += [
            no_drop(each.name, each.paired, limits.accuracy_drop_max, "the version before")
            for each in drift.suites
            if each.kind not in {"golden", "edge"}
        ]
    if limits.kl_mean_max is not None:
        checks.append(
            _at_most_kl(
                None if drift is None or drift.texts is None else drift.texts.mean, limits.kl_mean_max
            )
        )
    return tuple(checks)


def verdict_of(checks: tuple[Check, ...], missing_count: int) -> Verdict:
    """All in one word."""
    statuses = {check.status for check in checks}
    if "failed" in statuses:
        return "failed"
    if missing_count:
        return "incomplete"
    return "undecided" if "undecided" in statuses else "passed"


def questions_needed(flips: Paired, drop_max: float) -> int:
    """How many questions would decide, if answers went on flipping as they do; about."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    up, down = (flips.gained + 1) / (flips.count + 2), (flips.lost + 1) / (flips.count + 2)
    distance = up - down + drop_max
    return math.ceil(z * z * (up + down - (up - down) ** 2) / max(distance**2, 1e-9))


def no_drop(name: str, flips: Paired, drop_max: float, other: str) -> Check:
    """Whether a suite kept its share of right answers.

    Args:
        name: Of the suite.
        flips: Answers of two models.
        drop_max: Share that may be lost.
        other: What the first of the models is called.
    """
    status: Literal["passed", "failed", "undecided"] = "undecided"
    if flips.difference.low >= -drop_max:
        status = "passed"
    elif flips.difference.high < -drop_max:
        status = "failed"
    more = ""
    if status == "undecided":
        more = f"; about {questions_needed(flips, drop_max):,} questions decide it"
    detail = (
        f"{_percent(flips.difference, sign='+')} against {other}, allowed are -{100 * drop_max:.1f} %{more}"
    )
    return Check(name=f"{name}: drop", status=status, detail=detail)


def _prompts(suite: SuiteScore, plan: HealthPlan | None) -> Check:
    share = 1.0
    if plan is not None and all(isinstance(prompt, ClassPrompt) for prompt in plan.prompts):
        share = plan.class_accuracy_min
    is_passed = suite.count > 0 and suite.right >= share * suite.asked
    names = [prompt.name for prompt in suite.prompts if not prompt.is_right]
    wrong = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return Check(
        name=suite.name,
        status="passed" if is_passed else "failed",
        detail=f"{suite.right} of {suite.asked} prompts answered as they have to be"
        + (f"; not {wrong}" if wrong else ""),
    )


def _at_least(name: str, share: Interval, least: float) -> Check:
    status: Literal["passed", "failed", "undecided"] = "undecided"
    if share.low >= least:
        status = "passed"
    elif share.high < least:
        status = "failed"
    return Check(name=name, status=status, detail=f"{_percent(share)}, wanted are {100 * least:.1f} %")


def _at_most_kl(mean: Interval | None, most: float) -> Check:
    if mean is None:
        return Check(
            name="KL divergence", status="undecided", detail="nothing was compared; give --against and texts"
        )
    status: Literal["passed", "failed", "undecided"] = "undecided"
    if mean.high <= most:
        status = "passed"
    elif mean.low > most:
        status = "failed"
    detail = f"mean of {mean.value:.4f} nats ({mean.low:.4f} to {mean.high:.4f}), allowed are {most:g}"
    return Check(name="KL divergence", status=status, detail=detail)


def _percent(share: Interval, sign: str = "") -> str:
    return f"{100 * share.value:{sign}.1f} % ({100 * share.low:{sign}.1f} to {100 * share.high:{sign}.1f})"
