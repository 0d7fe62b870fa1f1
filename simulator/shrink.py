"""A smaller scenario that fails in the same way: fewer devices, fewer releases, fewer kinds of faults."""

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from simulator.results import Failure, FleetResult
from simulator.scenario import Faults, Scenario

RUNS_MAX: Final = 60
"""Runs that may be spent; each is at most as long as the one that failed."""

_KEPT: Final = frozenset({"end_s"})  # without an end there are no faults


def shrink(
    scenario: Scenario, failure: Failure, run: Callable[[Scenario], FleetResult], *, runs_max: int = RUNS_MAX
) -> Scenario:
    """Make a failing scenario smaller, step by step, as long as the same promise is broken.

    Args:
        scenario: One that fails.
        failure: How.
        run: Runs a scenario.
        runs_max: How many may be tried.
    """
    runs = 0
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in _smaller(scenario):
            if runs == runs_max:
                return scenario
            runs += 1
            found = run(candidate).failure
            if found is not None and found.promise == failure.promise:
                scenario, is_smaller = candidate, True
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios with one thing less, those first that save most."""
    replace = msgspec.structs.replace
    for divisor in (4, 2):
        if scenario.devices >= divisor:
            yield replace(scenario, devices=scenario.devices // divisor)
    if len(scenario.releases) > 1:
        for index in range(len(scenario.releases)):
            yield replace(scenario, releases=scenario.releases[:index] + scenario.releases[index + 1 :])
    nothing = Faults()
    for name in scenario.faults.__struct_fields__:
        plain = getattr(nothing, name)
        if name not in _KEPT and getattr(scenario.faults, name) != plain:
            yield replace(scenario, faults=replace(scenario.faults, **{name: plain}))
    if scenario.devices > 1:
        yield replace(scenario, devices=scenario.devices - 1)
