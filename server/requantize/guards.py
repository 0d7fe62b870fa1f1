"""Whether a chosen file may take the place of the plain one. Pure.

The plain file is always there to be sent instead, so a chosen one has to show that it is no worse; not to be caught being worse is not
enough. Each guard is a test of non-inferiority: the whole 95 % interval of the paired difference from the plain file has to lie below a
margin that is stated. A guard that is undecided fails, and says what would decide it. All guards have to pass, each at its own level: then the
chance that a file which is worse in any of them passes all is at most 2.5 % (intersection-union test, Berger 1982), and nothing is to be
corrected for their number.

There is no guard on perplexity and none on the error of weights: both can improve while answers get worse. See ADR 42.
"""

from collections.abc import Sequence
from typing import Annotated, Final

from msgspec import Meta, Struct

from protocol.errors import RequestError
from server.requantize.figures import difference
from server.requantize.readings import Readings
from server.scorecard.card import Check
from server.scorecard.items import Reply, Suite
from server.scorecard.statistics import Interval
from server.scorecard.summary import is_right, suite_drift
from server.scorecard.verdict import no_drop

TEXTS_MIN: Final = 2
"""Of different kinds: what suits one text need not suit another."""


class Margins(Struct, frozen=True, kw_only=True):
    """How much worse than the plain file counts as no worse.

    Attributes:
        kl_share: Of the plain file's mean divergence.
        flips: Share of tokens: 0.005 is one token in two hundred.
        accuracy_drop: Share of right answers of a suite.
    """

    kl_share: Annotated[float, Meta(ge=0, le=1)] = 0.02
    flips: Annotated[float, Meta(ge=0, le=1)] = 0.005
    accuracy_drop: Annotated[float, Meta(ge=0, le=1)] = 0.03


def check_texts(
    chosen: Readings, plain: Readings, names: Sequence[str], margins: Margins
) -> tuple[Check, ...]:
    """Compare divergence and flips with the plain file's on each held-out text.

    Raises:
        RequestError: There are fewer than `TEXTS_MIN` texts.
    """
    if len(names) < TEXTS_MIN:
        raise RequestError(
            f"the guards have {len(names)} texts, {TEXTS_MIN} are needed",
            hint="give --held-out twice, with texts of different kinds",
        )
    checks = []
    for name in names:
        mean = sum(plain[name].kl) / len(plain[name].kl)
        found = difference("kl", chosen[name], plain[name])
        checks.append(no_worse(f"{name}: divergence", found, margins.kl_share * mean, "nats", 1))
        flips = difference("flips", chosen[name], plain[name])
        checks.append(no_worse(f"{name}: flips", flips, margins.flips, "points", 100))
    return tuple(checks)


def check_suite(suite: Suite, plain: Sequence[Reply], chosen: Sequence[Reply], margins: Margins) -> Check:
    """Compare the answers to a suite with the plain file's: prompts one by one, questions by their number."""
    if suite.kind in {"golden", "edge"}:
        lost = [
            item.name
            for item, before, now in zip(suite.items, plain, chosen, strict=True)
            if is_right(item, before) and not is_right(item, now)
        ]
        right = sum(is_right(item, reply) for item, reply in zip(suite.items, plain, strict=True))
        more = f"; not {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}" if lost else ""
        detail = f"{right - len(lost)} of the {right} prompts that plain answers as it has to{more}"
        return Check(name=suite.name, status="failed" if lost else "passed", detail=detail)
    drift = suite_drift(suite, plain, chosen)
    assert drift is not None  # suites are not empty
    return no_drop(suite.name, drift.paired, margins.accuracy_drop, "plain")


def is_passed(checks: Sequence[Check]) -> bool:
    """Whether every guard passed; undecided is not passed."""
    return all(check.status == "passed" for check in checks)


def reasons(checks: Sequence[Check]) -> list[str]:
    """Of the guards that did not pass, for people."""
    return [f"{check.name} {check.status}: {check.detail}" for check in checks if check.status != "passed"]


def no_worse(name: str, found: Interval, margin: float, unit: str, factor: float) -> Check:
    """The guard on one figure.

    Args:
        name: Of the guard.
        found: Difference from the plain file; more is worse.
        margin: How much more counts as no worse.
        unit: For people.
        factor: To that unit.
    """
    low, value, high, most = (factor * each for each in (found.low, found.value, found.high, margin))
    detail = f"{value:+.4f} {unit} ({low:+.4f} to {high:+.4f}) against plain, allowed are {most:+.4f}"
    if found.high <= margin:
        return Check(name=name, status="passed", detail=detail)
    if found.low > margin:
        return Check(name=name, status="failed", detail=detail)
    return Check(name=name, status="undecided", detail=f"{detail}; more of the text or more bytes decide it")
