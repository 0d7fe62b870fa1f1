"""Links that are there at set hours of the day: a car that stands at home at night, a machine whose hall has shifts."""

from typing import TYPE_CHECKING, Final

from simulator.loop import US_PER_S
from simulator.streams import Stream

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice
    from simulator.world import World

HOUR_US: Final = 3_600 * US_PER_S
DAY_HOURS: Final = 24


class DailyHours:
    """Switches the link of one device on and off, day after day.

    Args:
        world: Has the time, and the hour at which the run begins.
        device: Whose kind of link has `online_hours`.
    """

    def __init__(self, world: "World", device: "SimulatedDevice") -> None:
        self._world = world
        self._device = device
        self._stream = Stream(world.scenario.seed, "hours", device.number)

    def begin(self) -> None:
        """Take the state of the first instant, and follow the hours from there."""
        self._device.transport.link_changed(is_up=False)
        self._day(-1)  # a night that is under way began the day before

    def _day(self, day: int) -> None:
        """Schedule the hours of the first day from `day` on whose link has not gone yet."""
        loop = self._world.loop
        while True:
            begin_us, end_us = self._hours(day)
            if end_us > max(begin_us, loop.now_us):
                break
            day += 1
        loop.at(max(begin_us, loop.now_us), self._change, True)
        loop.at(end_us, self._change, False)
        loop.at(end_us, self._day, day + 1)

    def _hours(self, day: int) -> tuple[int, int]:
        link, midnight_h = self._device.kind.link, day * DAY_HOURS - self._world.scenario.start_hour
        assert link.online_hours is not None
        begin_h, end_h = link.online_hours
        if end_h <= begin_h:
            end_h += DAY_HOURS
        spread_h = link.online_spread_h
        begin_h += self._stream.uniform(-spread_h, spread_h)
        end_h += self._stream.uniform(-spread_h, spread_h)
        return int((midnight_h + begin_h) * HOUR_US), int((midnight_h + end_h) * HOUR_US)

    def _change(self, is_up: bool) -> None:  # noqa: FBT001 - an argument of a scheduled action
        device = self._device
        self._world.trace.note(self._world.loop.now_us, device.number, "link up" if is_up else "link down")
        device.transport.link_changed(is_up=is_up)
