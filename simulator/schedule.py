"""When devices are switched on, and when links with a duty cycle come and go: the same instants in virtual time and live. Pure."""

from collections.abc import Iterator

from simulator.loop import US_PER_S
from simulator.scenario import Link, Scenario
from simulator.streams import Stream


def boot_instants_us(scenario: Scenario) -> list[int]:
    """When each device of a scenario is switched on, in the order of their numbers."""
    boots = Stream(scenario.seed, "boots", scenario.first_device)
    spread_us = scenario.boot_spread_s * US_PER_S
    return [int(boots.random() * spread_us) for _ in range(scenario.devices)]


def duty_cycle(scenario: Scenario, number: int, link: Link) -> Iterator[tuple[int, bool]]:
    """When the link of a device comes and goes, and whether it is there from then on; without end.

    A link is there at first; stretches are of exponential length, the first one begins at random within the time in which
    devices are switched on. Nothing comes of a link without a duty cycle.
    """
    if not (link.on_s and link.off_s):
        return
    chance = Stream(scenario.seed, "duty", number)
    instant_us = int(chance.random() * scenario.boot_spread_s * US_PER_S)
    is_on = True
    while True:
        yield instant_us, is_on
        instant_us += int(chance.exponential(link.on_s if is_on else link.off_s) * US_PER_S)
        is_on = not is_on
