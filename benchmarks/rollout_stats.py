"""How often a rollout is stopped in error, and how many devices a bad release reaches (`make rollout-stats`).

Each rollout is played to its end: devices are asked in the order of their cohorts, a few at a time, and answer after a while; the tests are those that the
server runs (`server/rollouts/evidence.py`), asked after each answer as the server asks them. Failures are told sooner than successes (median 3 against 10
minutes), but for one in five, which is silence, told by the deadline after an hour: whatever counts answers as they come would be misled by both.

Beside it two rules by thresholds, on the same devices with the same limit of devices in flight:

- `share`: stop once 10 % of at least 10 answers are failures, as the abort criteria of AWS IoT Jobs are commonly set (`minNumberOfExecutedThings` 10,
  `thresholdPercentage` 10), looked at after each answer;
- `count`: two canaries, then all; stop at the first failure in a wave (`--max-failures 0`, all that there was before).
"""

import argparse
import heapq
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Final, Protocol

from msgspec import Struct, to_builtins

from server.display import table
from server.rollouts.evidence import ALTERNATIVES, EProcess, Outcome, RateTest, Rules, share
from server.rollouts.waves import Wave, parse_waves

RATES: Final = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FLEET: Final = 1_000
IN_FLIGHT: Final = 5
PLAN: Final = "5,59,10%,50%,100%"
FAILURE_S: Final = 180.0  # median
SUCCESS_S: Final = 600.0
SPREAD: Final = 0.5  # of the logarithm
SILENT_SHARE: Final = 0.2  # of failures
DEADLINE_S: Final = 3_600.0
SHARE_MIN: Final = 10
SHARE_PERCENT: Final = 10
Z_95: Final = 1.959964


class Rule(Protocol):
    """What stops a rollout, and lets it go on."""

    def ask(self) -> None:
        """A device is asked."""
        ...

    def settle(self, position: int, *, is_bad: bool) -> bool:
        """A device has answered; whether the rollout stops."""
        ...

    def reach(self, *, is_decided: bool) -> int:
        """How many devices may have been asked by now; asked for only where that many have been."""
        ...


class Tests:
    """The server's: a mixture e-process stops, and a wave is left when its outcomes are plausible."""

    def __init__(self, fleet: int, plan: Sequence[Wave]) -> None:
        self._test = RateTest(Rules())
        self._fleet = fleet
        self._sizes = [wave.count or 0 for wave in plan]
        self._shares = [wave.percent for wave in plan]
        self._wave = -1
        self._reach = self._size = 0
        self._widen()

    def ask(self) -> None:
        """Count it as good for now."""
        self._test.evidence.ask("tier")

    def settle(self, position: int, *, is_bad: bool) -> bool:
        """Look at the evidence, as the server does after each report."""
        self._test.evidence.settle(position, Outcome.BAD if is_bad else Outcome.GOOD)
        return is_bad and self._test.is_failing

    def reach(self, *, is_decided: bool) -> int:
        """The wave under way, or the next one."""
        reached = self._reach
        if is_decided and not self._test.is_plausible:
            self._reach = min(self._fleet, self._reach + self._size)  # more evidence
        elif is_decided:
            while self._reach == reached and self._wave + 1 < len(self._sizes):
                self._widen()  # more than once where a wave that was extended has used up the next one
        return self._reach

    def _widen(self) -> None:
        self._wave += 1
        share = self._shares[self._wave]
        before = self._reach
        after = before + self._sizes[self._wave] if share is None else round(self._fleet * share / 100)
        self._reach = min(self._fleet, max(before, after))
        self._size = max(1, self._reach - before)


class Share:
    """A threshold on the share of failures among the answers."""

    def __init__(self, fleet: int, _: Sequence[Wave]) -> None:
        self._fleet = fleet
        self._answers = self._failed = 0

    def ask(self) -> None:
        """Nothing is known yet."""

    def settle(self, position: int, *, is_bad: bool) -> bool:  # noqa: ARG002 - rules have one shape
        """Look at the share."""
        self._answers += 1
        self._failed += is_bad
        return self._answers >= SHARE_MIN and self._failed * 100 >= self._answers * SHARE_PERCENT

    def reach(self, *, is_decided: bool) -> int:  # noqa: ARG002 - rules have one shape
        """Everybody."""
        return self._fleet


class Count:
    """No failure is accepted; two devices go first."""

    def __init__(self, fleet: int, _: Sequence[Wave]) -> None:
        self._fleet = fleet
        self._is_canary = True

    def ask(self) -> None:
        """Nothing is known yet."""

    def settle(self, position: int, *, is_bad: bool) -> bool:  # noqa: ARG002 - rules have one shape
        """Stop at the first one."""
        return is_bad

    def reach(self, *, is_decided: bool) -> int:
        """The canaries until they are decided, then everybody."""
        self._is_canary = self._is_canary and not is_decided
        return min(2, self._fleet) if self._is_canary else self._fleet


RULES: Final[dict[str, Callable[[int, Sequence[Wave]], Rule]]] = {
    "tests": Tests,
    "share": Share,
    "count": Count,
}


class Played(Struct, frozen=True):
    """One rollout."""

    is_stopped: bool
    asked: int
    failed: int  # known when it ended


def play(rule: Rule, rate: float, fleet: int, in_flight: int, rng: random.Random) -> Played:
    """One rollout of a release of which each device fails with the probability `rate`, by itself."""
    answers: list[tuple[float, int, bool]] = []
    now_s, asked, failed, reach = 0.0, 0, 0, rule.reach(is_decided=False)
    while True:
        if asked >= reach and asked < fleet:
            reach = rule.reach(is_decided=not answers)
        while asked < reach and len(answers) < in_flight:
            is_bad = rng.random() < rate
            if is_bad and rng.random() < SILENT_SHARE:
                takes_s = DEADLINE_S
            else:
                median_s = FAILURE_S if is_bad else SUCCESS_S
                takes_s = min(DEADLINE_S, median_s * math.exp(SPREAD * rng.gauss(0, 1)))
            rule.ask()
            heapq.heappush(answers, (now_s + takes_s, asked, is_bad))
            asked += 1
        if not answers:
            return Played(False, asked, failed)
        now_s, position, is_bad = heapq.heappop(answers)
        failed += is_bad
        if rule.settle(position, is_bad=is_bad):
            return Played(True, asked, failed)


class Row(Struct, frozen=True, kw_only=True):
    """All rollouts of one failure rate under one rule.

    Attributes:
        rate: At which devices fail.
        rule: That judged.
        rollouts: That were played.
        stopped: Of these.
        low: Bound of the share of stops that holds with 95 % confidence (Wilson).
        high: Likewise, from above.
        asked_median: Devices that a rollout had asked by its end.
        asked_p95: Likewise.
        failed_median: Failures known when it stopped; None where none did.
        failed_max: Likewise.
    """

    rate: float
    rule: str
    rollouts: int
    stopped: int
    low: float
    high: float
    asked_median: float
    asked_p95: float
    failed_median: float | None
    failed_max: int | None


def measure(
    rate: float, rule: str, rollouts: int, seed: int, fleet: int = FLEET, in_flight: int = IN_FLIGHT
) -> Row:
    """Play many rollouts; the same numbers for the same seed."""
    plan = parse_waves(PLAN)
    rng = random.Random(f"{seed}/{rate}")
    played = [play(RULES[rule](fleet, plan), rate, fleet, in_flight, rng) for _ in range(rollouts)]
    stopped = [each for each in played if each.is_stopped]
    asked = sorted(each.asked for each in played)
    low, high = wilson(len(stopped), rollouts)
    failed = [each.failed for each in stopped]
    return Row(
        rate=rate,
        rule=rule,
        rollouts=rollouts,
        stopped=len(stopped),
        low=low,
        high=high,
        asked_median=statistics.median(asked),
        asked_p95=asked[math.ceil(0.95 * rollouts) - 1],
        failed_median=statistics.median(failed) if failed else None,
        failed_max=max(failed, default=None),
    )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share, with 95 % confidence (E. B. Wilson, JASA 22, 1927)."""
    share, z2 = hits / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


class Promise(Struct, frozen=True, kw_only=True):
    """Something that the table has to show."""

    text: str
    is_kept: bool


def promises(rows: Sequence[Row], in_flight: int = IN_FLIGHT) -> list[Promise]:
    """What the server's tests promise, and whether these rows show it."""
    by_rate = {row.rate: row for row in rows if row.rule == "tests"}
    kept = []
    if good := by_rate.get(0.01):
        share = good.stopped / good.rollouts
        kept.append(
            Promise(text=f"at 1 % stopped in error: {share:.3%}, at most 0.1 %", is_kept=share <= 0.001)
        )
    if bad := by_rate.get(0.2):
        text = f"at 20 % a median of {bad.asked_median:g} devices, at most 20"
        kept.append(Promise(text=text, is_kept=bad.asked_median <= 20))
    if broken := by_rate.get(1.0):
        text = f"at 100 % stopped with {broken.failed_max} failures at most, {broken.asked_p95:g} devices asked, at most 5 and what is in flight"
        is_kept = (
            broken.stopped == broken.rollouts
            and (broken.failed_max or 0) <= 5
            and broken.asked_p95 <= 5 + in_flight
        )
        kept.append(Promise(text=text, is_kept=is_kept))
    return kept


def chances_of_stopping(rate: float, devices: int) -> list[float]:
    """Exactly, for devices of one tier that answer in the order of asking: the chance that a release is stopped by its n-th device.

    Adds up every course that the answers can take.

    Args:
        rate: At which devices fail.
        devices: How far to look.

    Returns:
        One chance for each n from 0.
    """
    rules = Rules()
    process, weight = EProcess(rules.acceptable, ALTERNATIVES), 0.5 + share(1)
    going, stopped, chances = {0: 1.0}, 0.0, [0.0]  # by failures so far
    for asked in range(1, devices + 1):
        after: dict[int, float] = {}
        for failed, chance in going.items():
            after[failed] = after.get(failed, 0.0) + chance * (1 - rate)
            if weight * process.value(failed + 1, asked) >= rules.limit:
                stopped += chance * rate
            else:
                after[failed + 1] = after.get(failed + 1, 0.0) + chance * rate
        going = after
        chances.append(stopped)
    return chances


def lines_of(rows: Sequence[Row]) -> list[str]:
    """The rows as a table."""
    titles = [
        "RATE",
        "RULE",
        "STOPPED",
        "95 % INTERVAL",
        "ASKED: MEDIAN",
        "P95",
        "FAILURES AT STOP: MEDIAN",
        "MOST",
    ]
    texts = [
        [
            f"{row.rate:.1%}",
            row.rule,
            f"{row.stopped / row.rollouts:.2%}",
            f"{row.low:.2%} to {row.high:.2%}",
            f"{row.asked_median:g}",
            f"{row.asked_p95:g}",
            "-" if row.failed_median is None else f"{row.failed_median:g}",
            "-" if row.failed_max is None else str(row.failed_max),
        ]
        for row in rows
    ]
    return table(titles, texts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table; exit code 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(prog="rollout_stats", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rollouts", type=int, default=10_000, help="for each rate and rule (default: %(default)s)"
    )
    parser.add_argument("--fleet", type=int, default=FLEET, help="devices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rule", choices=sorted(RULES), action="append", help="only this one; repeatable")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="only what can be computed: chances for answers in the order of asking",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    arguments = parser.parse_args(argv)
    if min(arguments.rollouts, arguments.fleet, arguments.workers) < 1:
        parser.error("--rollouts, --fleet and --workers are at least 1")
    if arguments.exact:
        good, bad = chances_of_stopping(0.01, arguments.fleet), chances_of_stopping(0.2, arguments.fleet)
        half = next((asked for asked, chance in enumerate(bad) if chance >= 0.5), None)
        found = {"devices": arguments.fleet, "stopped_at_1_percent": good[-1], "median_at_20_percent": half}
        text = f"{arguments.fleet:,} devices: at 1 % stopped in error {good[-1]:.4%}; at 20 % half are stopped by device {half}"
        print(json.dumps(found) if arguments.json else text)
        return 0
    began_s = time.monotonic()
    jobs = [(rate, rule) for rate in RATES for rule in arguments.rule or RULES]  # the longest first
    with ProcessPoolExecutor(arguments.workers) as pool:
        futures = [
            pool.submit(measure, rate, rule, arguments.rollouts, arguments.seed, arguments.fleet)
            for rate, rule in jobs
        ]
        rows = [future.result() for future in futures]
    kept = promises(rows)
    if arguments.json:
        print(json.dumps({"rows": to_builtins(rows), "promises": to_builtins(kept)}))
    else:
        print(
            f"{arguments.rollouts:,} rollouts each, {arguments.fleet:,} devices, {IN_FLIGHT} in flight, waves {PLAN}"
        )
        print("\n".join(lines_of(rows)))
        print("\n".join(f"{'yes' if each.is_kept else 'NO '}  {each.text}" for each in kept))
        print(f"took {time.monotonic() - began_s:.0f} s")
    return 0 if all(each.is_kept for each in kept) else 1


if __name__ == "__main__":
    sys.exit(main())
