"""Who there is: devices drawn from the kinds of a scenario, with the links and clocks that they have."""

from itertools import accumulate
from typing import TYPE_CHECKING

from simulator.clock import DeviceClock
from simulator.device import SimulatedDevice
from simulator.loop import US_PER_S
from simulator.network import Line, Path
from simulator.scenario import DeviceKind, Scenario
from simulator.scenario import Link as LinkKind
from simulator.streams import Stream

if TYPE_CHECKING:
    from simulator.world import World

_HOUR_US = 3_600 * US_PER_S


def make_devices(world: "World") -> list[SimulatedDevice]:
    """All devices of a scenario, without power."""
    sites: dict[str, tuple[Line, int]] = {}
    first = world.scenario.first_device
    return [_make_device(world, number, sites) for number in range(first, first + world.scenario.devices)]


def _make_device(world: "World", number: int, sites: dict[str, tuple[Line, int]]) -> SimulatedDevice:
    scenario = world.scenario
    stream = Stream(scenario.seed, "population", number)
    kind = _kind(scenario.population, stream.random())
    link = path_of(scenario, number, kind, _site(kind, sites))
    clock = DeviceClock(
        world.loop,
        int(stream.uniform(-kind.clock_off_s, kind.clock_off_s) * 1_000),
        round(stream.uniform(-kind.drift_ppm, kind.drift_ppm)),
    )
    return SimulatedDevice(world, number, kind, link, clock)


def kind_of(scenario: Scenario, number: int) -> DeviceKind:
    """What kind of device a number is."""
    return _kind(scenario.population, Stream(scenario.seed, "population", number).random())


def path_of(scenario: Scenario, number: int, kind: DeviceKind, site: Line | None = None) -> Path:
    """The link of a device; `site` is the line that it shares."""
    return Path(kind.link, Stream(scenario.seed, "link", number), site, int(scenario.start_hour * _HOUR_US))


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


def mixed_population() -> tuple[DeviceKind, ...]:
    """Devices as different as a fleet's: wired, wireless, behind a shared line, and on a metered modem that sleeps."""
    return (
        DeviceKind(name="wired", weight=3.0, tier="pi", link=LinkKind(spread=2.0)),
        DeviceKind(
            name="wireless",
            weight=4.0,
            tier="pi",
            link=LinkKind(
                down_bytes_per_s=400_000, up_bytes_per_s=200_000, loss=0.02, jitter_ms=60.0, spread=3.0
            ),
        ),
        DeviceKind(
            name="site",
            weight=2.0,
            tier="jetson",
            inference_ms=3.0,
            link=LinkKind(site_devices=8, site_bytes_per_s=1_000_000),
        ),
        DeviceKind(
            name="modem",
            weight=1.0,
            tier="pi",
            link=LinkKind(
                down_bytes_per_s=60_000,
                up_bytes_per_s=20_000,
                latency_ms=150.0,
                loss=0.05,
                metered=True,
                on_s=300.0,
                off_s=60.0,
                night_rate=1.5,
            ),
        ),
    )
