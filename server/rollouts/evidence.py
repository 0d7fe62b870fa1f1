"""How much the outcomes so far speak against a release: tests that hold whenever they are looked at. Pure.

A rollout looks at its outcomes after every report, and stops at the first look that is bad enough. A threshold on the
share of failures ("10 % of at least 10") gets as many chances to err as there are looks. Two sequential tests do not:

- **To stop**: a mixture e-process. For each device in the order of asking multiply by `P(outcome | p_j) / P(outcome | p0)`,
  and take the mean over the alternatives `p_j`. Under "at most p0 fail" this is a non-negative supermartingale that begins
  at one, so the chance that it *ever* reaches `1 / alpha` is at most `alpha` (Ville's inequality: J. Ville, Étude critique
  de la notion de collectif, 1939; mixtures: H. Robbins, Statistical methods related to the law of the iterated logarithm,
  1970; as confidence for any stopping rule: Ramdas, Grünwald, Vovk, Shafer, Game-theoretic statistics and safe anytime-valid
  inference, 2023). One process runs over all devices and one over each stratum; their weighted mean is such a process again,
  so looking at each tier costs no error.
- **To go on**: Wald's sequential probability ratio test (A. Wald, Sequential tests of statistical hypotheses, 1945) of p1
  against p0. Its lower boundary says that the failure rate is rather p0 than p1.

**Every device at the same age.** Failures report sooner than successes, or later, and either would bias a count of those that
have answered. So devices count in the order in which they were asked, and one that is not yet due counts as good in the test that
stops, and not at all in the test that goes on, which waits for it. Both err to the safe side: a stop would be one whatever the others come
to say, and early successes outvote nobody.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from protocol.errors import RequestError

ALTERNATIVES: Final = (0.03, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Failure rates that the mixture looks for; each is tested as if it alone were suspected, at a cost of ln 6."""

SLOW_ALTERNATIVES: Final = (0.6, 0.75, 0.9, 0.99)
"""Likewise, for the share of devices that are slower than the median of the control group allows."""

SLOW_SHARE: Final = 0.5
"""Of devices that are above their own median; what the test of latency takes for normal."""

Rate = Annotated[float, Meta(gt=0, lt=1)]


class Rules(Struct, frozen=True, kw_only=True):
    """What a rollout is judged by.

    Attributes:
        acceptable: Share of devices that may fail on a good release (p0).
        unacceptable: Share that a release must not have (p1); what "proved" is proved against.
        false_stop: Chance that a release is ever stopped of whose devices no more than `acceptable` fail (alpha).
        missed: Chance that a release counts as proved of whose devices `unacceptable` fail (beta).
        lost_pause: Devices lost, see `campaign.is_lost`, at which a rollout pauses.
        lost_stop: Likewise, at which it stops.
        slower_ratio: How much slower than the control group a release may be.
    """

    acceptable: Rate = 0.01
    unacceptable: Rate = 0.05
    false_stop: Rate = 0.001
    missed: Rate = 0.01
    lost_pause: Annotated[int, Meta(ge=1)] = 1
    lost_stop: Annotated[int, Meta(ge=1)] = 2
    slower_ratio: Annotated[float, Meta(ge=1)] = 1.25

    @property
    def limit(self) -> float:
        """Evidence at which a rollout stops: so many to one against the release."""
        return 1 / self.false_stop

    def checked(self) -> "Rules":
        """These rules, if they can be kept.

        Raises:
            RequestError: A rate is not between 0 and 1, or they are in the wrong order.
        """
        rates = (self.acceptable, self.unacceptable, self.false_stop, self.missed)
        if not all(0 < rate < 1 for rate in rates):
            raise RequestError(
                "a rate of a rollout is above 0 % and below 100 %", hint="give for example 1% or 0.5%"
            )
        if self.acceptable >= self.unacceptable:
            raise RequestError(
                f"acceptable failures ({self.acceptable:.3%}) are not below unacceptable ones ({self.unacceptable:.3%})",
                hint="leave room between them: nothing can be told apart otherwise",
            )
        return self


class Outcome(IntEnum):
    """What a device says about a release."""

    OPEN = 0  # asked, and not yet due
    GOOD = 1
    BAD = 2
    APART = 3  # says nothing about the release: refused before its first byte, withdrawn, off, held


_FINE: Final = (Outcome.OPEN, Outcome.GOOD)


class Finding(Struct, frozen=True, kw_only=True):
    """The strongest evidence so far, and where it comes from.

    Attributes:
        odds: Weighted mean of the e-processes, at its highest prefix.
        stratum: That says most; empty for all devices together.
        failed: Of that stratum, at that prefix.
        asked: Likewise; those not yet due are among them.
    """

    odds: float
    stratum: str = ""
    failed: int = 0
    asked: int = 0


class _Line:
    """Positions of one stratum among all that were asked."""

    __slots__ = ("apart", "failed", "positions")

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.failed: list[int] = []
        self.apart: list[int] = []

    def counts(self, position: int) -> tuple[int, int]:
        """How many failed, and how many count, up to and with `position`."""
        asked = bisect_right(self.positions, position) - bisect_right(self.apart, position)
        return bisect_right(self.failed, position), asked


class EProcess:
    """A mixture of likelihood ratios against `null`.

    Args:
        null: Rate that is taken for normal.
        alternatives: Rates that are looked for, each above `null`.
    """

    def __init__(self, null: float, alternatives: Sequence[float]) -> None:
        self._steps = [(math.log(p / null), math.log((1 - p) / (1 - null))) for p in alternatives]

    def value(self, failed: int, asked: int) -> float:
        """After `failed` of `asked`."""
        exponents = [failed * up + (asked - failed) * down for up, down in self._steps]
        return math.fsum(math.exp(min(each, _EXPONENT_MAX)) for each in exponents) / len(self._steps)


_EXPONENT_MAX: Final = 600.0
"""Keeps sums finite; evidence of e^600 has stopped every rollout long before."""


def share(number: int) -> float:
    """Weight of the stratum that appeared as the n-th, from 1; all of them add up to one half, the other half is for the total."""
    return 0.5 / (number * (number + 1))


class Evidence:
    """Outcomes in the order of asking, and what they say.

    Args:
        process: That each stratum runs.
    """

    def __init__(self, process: EProcess) -> None:
        self.process = process
        self._outcomes: list[Outcome] = []
        self._strata: list[str] = []
        self._total = _Line()
        self._lines: dict[str, _Line] = {}  # in the order in which they appeared
        self._finding: Finding | None = Finding(odds=0.0)

    def ask(self, stratum: str) -> int:
        """A device of `stratum` was asked; returns its position."""
        position = len(self._outcomes)
        self._outcomes.append(Outcome.OPEN)
        self._strata.append(stratum)
        self._total.positions.append(position)
        self._lines.setdefault(stratum, _Line()).positions.append(position)
        return position

    def settle(self, position: int, outcome: Outcome) -> None:
        """Note what became of the device at `position`; it may change its mind."""
        before = self._outcomes[position]
        if before is outcome:
            return
        self._outcomes[position] = outcome
        if before in _FINE and outcome in _FINE:
            return  # they count the same
        self._finding = None
        for line in (self._total, self._lines[self._strata[position]]):
            for kind, places in ((Outcome.BAD, line.failed), (Outcome.APART, line.apart)):
                if before is kind:
                    places.remove(position)
                if outcome is kind:
                    insort(places, position)

    @property
    def failed(self) -> int:
        """Devices that failed."""
        return len(self._total.failed)

    @property
    def counted(self) -> int:
        """Devices that were asked and are not set apart."""
        return len(self._total.positions) - len(self._total.apart)

    def finding(self) -> Finding:
        """The highest evidence of all prefixes: it falls with every success, so it is looked at where a device failed."""
        if self._finding is None:
            self._finding = max(
                (self._at(position) for position in self._total.failed),
                key=lambda finding: finding.odds,
                default=Finding(odds=0.0),
            )
        return self._finding

    def strata(self) -> dict[str, tuple[int, int]]:
        """How many failed and how many count, by stratum."""
        return {
            name: (len(line.failed), len(line.positions) - len(line.apart))
            for name, line in self._lines.items()
        }

    def course(self) -> list[tuple[int, int]]:
        """How many counted and how many of them had failed, at each failure and at the end; for a chart."""
        last = len(self._outcomes) - 1
        places = [*self._total.failed, *([last] if last >= 0 else [])]
        return [(asked, failed) for failed, asked in map(self._total.counts, places)]

    def _at(self, position: int) -> Finding:
        failed, asked = self._total.counts(position)
        value = 0.5 * self.process.value(failed, asked)
        found, most, odds = ("", failed, asked), value, value
        for number, (name, line) in enumerate(self._lines.items(), start=1):
            failed, asked = line.counts(position)
            if not failed:
                continue  # below one: leaving it out errs to the safe side
            value = share(number) * self.process.value(failed, asked)
            odds += value
            if value > most:
                found, most = (name, failed, asked), value
        return Finding(odds=odds, stratum=found[0], failed=found[1], asked=found[2])


class RateTest:
    """Whether too many devices fail, and whether it is proved that few enough do.

    Args:
        rules: What the release is judged by.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        known = {p for p in ALTERNATIVES if p > rules.acceptable} | {rules.unacceptable}
        self.evidence = Evidence(EProcess(rules.acceptable, sorted(known)))
        p0, p1 = rules.acceptable, rules.unacceptable
        self._up = math.log(p1 / p0)
        self._down = math.log((1 - p1) / (1 - p0))
        self._passed = math.log(rules.missed / (1 - rules.false_stop))

    @property
    def is_failing(self) -> bool:
        """Whether the rollout has to stop."""
        return self.evidence.finding().odds >= self.rules.limit

    def stop_line(self, asked_max: int) -> list[int]:
        """Failures at which a rollout of devices of one tier stops, among the first 1, 2, … `asked_max` devices."""
        process, line, failed = self.evidence.process, [], 1
        for asked in range(1, asked_max + 1):
            while (0.5 + share(1)) * process.value(failed, asked) < self.rules.limit:
                failed += 1
            line.append(failed)
        return line

    @property
    def ratio(self) -> float:
        """Wald's logarithm of the likelihood ratio over everybody who counts; the undecided count as good."""
        failed = self.evidence.failed
        return failed * self._up + (self.evidence.counted - failed) * self._down

    @property
    def is_plausible(self) -> bool:
        """Whether the outcomes are as likely at `acceptable` as at `unacceptable`; only meant once all are decided."""
        return self.ratio <= 0

    @property
    def is_proved(self) -> bool:
        """Whether Wald's test accepts; only meant once all are decided."""
        return self.ratio <= self._passed

    def proof_needs(self) -> int:
        """Devices that have to be asked and succeed, beyond all that were asked, until the release is proved."""
        return max(0, math.ceil((self.ratio - self._passed) / -self._down))


def median_bound(values: Sequence[float], error: float) -> float | None:
    """Upper confidence bound of a median from order statistics; assumes nothing of the distribution.

    The r-th smallest of n values is below the median with the chance that a fair coin shows at least r heads of n (H. A. David,
    H. N. Nagaraja, Order Statistics, section 7.1).

    Args:
        values: A sample.
        error: Chance that the median is above what is returned.

    Returns:
        The smallest such value of the sample; None where the sample is too small for any.
    """
    ordered = sorted(values)
    count = len(ordered)
    tail = 0.0  # chance of at least r heads, summed from the top
    found = None
    for rank in range(count, 0, -1):
        tail += math.exp(
            math.lgamma(count + 1)
            - math.lgamma(rank + 1)
            - math.lgamma(count - rank + 1)
            - count * math.log(2)
        )
        if tail > error:
            break
        found = ordered[rank - 1]
    return found
