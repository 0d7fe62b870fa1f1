"""Who there is: devices drawn from the kinds of a scenario, with the links and clocks that they have."""

from itertools import accumulate
from typing import TYPE_CHECKING

from simulator.clock import DeviceClock
from simulator.device import SimulatedDevice
from simulator.loop import US_PER_S
from simulator.network import Line, Path
from simulator.scenario import DeviceKind
from simulator.streams import Stream

if TYPE_CHECKING:
    from simulator.world import World

_HOUR_US = 3_600 * US_PER_S


def make_devices(world: "World") -> list[SimulatedDevice]:
    """All devices of a scenario, without power."""
    sites: dict[str, tuple[Line, int]] = {}
    return [_make_device(world, number, sites) for number in range(world.scenario.devices)]


def _make_device(world: "World", number: int, sites: dict[str, tuple[Line, int]]) -> SimulatedDevice:
    scenario = world.scenario
    stream = Stream(scenario.seed, "population", number)
    kind = _kind(scenario.population, stream.random())
    link = Path(
        kind.link,
        Stream(scenario.seed, "link", number),
        _site(kind, sites),
        int(scenario.start_hour * _HOUR_US),
    )
    clock = DeviceClock(
        world.loop,
        int(stream.uniform(-kind.clock_off_s, kind.clock_off_s) * 1_000),
        round(stream.uniform(-kind.drift_ppm, kind.drift_ppm)),
    )
    return SimulatedDevice(world, number, kind, link, clock)


def _kind(kinds: tuple[DeviceKind, ...], chance: float) -> DeviceKind:
    ends = list(accumulate(kind.weight for kind in kinds))
    at = chance * ends[-1]
    return next((kind for kind, end in zip(kinds, ends, strict=True) if at < end), kinds[-1])


def _site(kind: DeviceKind, sites: dict[str, tuple[Line, int]]) -> Line | None:
    """The line of the site that is being filled; sites of a kind are filled one after the other."""
    if not kind.link.site_devices:
        return None
    line, count = sites.get(kind.name, (Line(kind.link.site_bytes_per_s), 0))
    if count == kind.link.site_devices:
        line, count = Line(kind.link.site_bytes_per_s), 0
    sites[kind.name] = (line, count + 1)
    return line
