"""Whether a release is slower than what the fleet had before, against a control group. Pure.

The control group of a tier are the devices of the family that measured another version in their last trial; it is noted when a
rollout begins, so it does not change under the test. (Devices measure latency in trials only: there is no stream of measurements to compare at the
same hour. Both sides were measured by the same trial on the same tier.) From it follows a bound that the median device is below, with confidence and
without any assumption about the distribution; a release is slow where more than half of the devices are above that bound times the ratio that is
allowed. That is a test of a share against one half, by the e-process of `evidence.py`: valid at every look. It is conservative, and says nothing
with fewer than a dozen controls or so; a trial's own limit, signed with the release, holds on every device whatever this test says.

Half of the error goes to the bounds of the control groups, half to the tests; each again in halves to the median and the tail, and by
`evidence.share` to the tiers.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from protocol.messages import LatencySummary, UpdateReport
from server.rollouts.evidence import (
    SLOW_ALTERNATIVES,
    SLOW_SHARE,
    EProcess,
    Evidence,
    Outcome,
    Rules,
    median_bound,
    share,
)
from server.rollouts.records import UNDECIDED, Control, MemberStatus

METRICS: Final = ("p50_ms", "p99_ms")


class Slowness(NamedTuple):
    """A finding of the test.

    Attributes:
        metric: `p50_ms` or `p99_ms`.
        tier: Where; empty for all tiers together.
        slower: Devices above what is allowed.
        measured: Devices that have measured it.
        odds: Evidence, to one.
        limit: That it is above.
    """

    metric: str
    tier: str
    slower: int
    measured: int
    odds: float
    limit: float


class LatencyTest:
    """Compares members with controls, in the order of asking.

    Args:
        rules: What the release is judged by.
        controls: Of the rollout.
    """

    def __init__(self, rules: Rules, controls: Sequence[Control] = ()) -> None:
        self._rules = rules
        self._bounds: dict[str, Control] = {}
        self._tiers: list[str] = []
        self._tests = {metric: Evidence(EProcess(SLOW_SHARE, SLOW_ALTERNATIVES)) for metric in METRICS}
        self.compare_with(controls)

    def compare_with(self, controls: Sequence[Control]) -> None:
        """Take the control groups; before any member has measured anything."""
        self._bounds = {control.tier: control for control in controls}

    def ask(self, tier: str) -> None:
        """A device was asked."""
        self._tiers.append(tier)
        for test in self._tests.values():
            test.ask(tier)

    def settle(self, position: int, status: MemberStatus, update: UpdateReport | None) -> None:
        """Note what a device measured; one that measured nothing says nothing here."""
        latency = None if update is None or update.evidence is None else update.evidence.latency
        for metric, test in self._tests.items():
            test.settle(position, self._outcome(position, metric, status, latency))

    def _outcome(
        self, position: int, metric: str, status: MemberStatus, latency: LatencySummary | None
    ) -> Outcome:
        control = self._bounds.get(self._tiers[position])
        if control is None:
            return Outcome.APART
        if status in UNDECIDED:
            return Outcome.OPEN
        if latency is None:
            return Outcome.APART
        allowed = float(getattr(control, metric)) * self._rules.slower_ratio
        return Outcome.BAD if float(getattr(latency, metric)) > allowed else Outcome.GOOD

    def finding(self) -> Slowness | None:
        """The strongest evidence that is above its limit; None while there is none."""
        limit = (
            4 * self._rules.limit
        )  # a quarter of the error: the bounds have half of it, and there are two metrics
        found: Slowness | None = None
        for metric, test in self._tests.items():
            finding = test.finding()
            if finding.odds >= limit and (found is None or finding.odds > found.odds):
                found = Slowness(metric, finding.stratum, finding.failed, finding.asked, finding.odds, limit)
        return found


def control_bounds(
    rules: Rules, tiers: dict[str, list[LatencySummary]]
) -> dict[str, tuple[int, float, float]]:
    """Control groups: how many devices, and the bounds of their medians of `METRICS`; tiers with too few devices are left out.

    Args:
        rules: What the release is judged by.
        tiers: What the devices of each tier measured.
    """
    bounds = {}
    for number, (tier, measured) in enumerate(sorted(tiers.items()), start=1):
        error = rules.false_stop / 4 * 2 * share(number)
        found = [median_bound([getattr(each, metric) for each in measured], error) for metric in METRICS]
        if found[0] is not None and found[1] is not None:
            bounds[tier] = (len(measured), found[0], found[1])
    return bounds
