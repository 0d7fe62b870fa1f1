"""What goes wrong: every fault is decided by a stream of its own, counted by kind, and ends at a set time."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from protocol.errors import StorageError
from protocol.topics import ChunkAnswerTopic, ChunkTopic
from server.broker.packets import Publish
from simulator.loop import US_PER_S
from simulator.power import PowerCutError
from simulator.scenario import Faults, Scenario
from simulator.streams import Stream

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice
    from simulator.world import World

POISON_AT: Final = 100
"""Which byte of a poisoned chunk message is another one: behind its header, so that it looks like one."""

DELAY_S: Final = 1.0


def draw_faults(seed: int, end_s: float = 1_800.0) -> Faults:
    """A mixture of faults for a seed: each kind absent, rare or at its worst, in the ranges of TigerBeetle's simulator."""
    stream = Stream(seed, "faults")

    def rate(worst: float) -> float:
        return 0.0 if stream.chance(0.25) else worst * stream.random() ** 2

    def mean_s(often_s: float) -> float:
        return 0.0 if stream.chance(0.25) else often_s * (1.0 + 9.0 * stream.random())

    return Faults(
        end_s=end_s,
        drop=rate(0.3),
        cut=rate(0.02),
        duplicate=rate(0.5),
        delay=rate(0.1),
        poison=rate(0.3),
        storage=rate(0.1) * 0.2,
        crash_effect=rate(0.02),
        crash_disk=rate(0.02),
        power_s=mean_s(600.0),
        down_s=20.0,
        partition_s=mean_s(120.0),
        clock_s=mean_s(600.0),
        clock_unset=rate(0.2),
        broker_s=mean_s(300.0),
        forget_s=mean_s(180.0),
        server_s=mean_s(300.0),
        replay_s=mean_s(10.0),
        disk_full=rate(0.2),
    )


class FaultInjector:
    """Injects the faults of a scenario.

    Args:
        world: Where.
        scenario: With the rates.
    """

    def __init__(self, world: "World", scenario: Scenario) -> None:
        self.counts: Counter[str] = Counter()
        self.is_active = scenario.faults.end_s > 0
        self._world = world
        self._faults = scenario.faults
        self._network = Stream(scenario.seed, "fault", "network")
        self._disk = Stream(scenario.seed, "fault", "disk")
        self._effect = Stream(scenario.seed, "fault", "effect")
        self._schedule = Stream(scenario.seed, "fault", "schedule")
        self._server = Stream(scenario.seed, "fault", "server")
        self._has_crashed_at_progress = False

    # Beginning and end

    def begin(self) -> None:
        """Schedule what comes at its own times."""
        if not self.is_active:
            return
        faults, world = self._faults, self._world
        for mean_s, action in (
            (faults.partition_s, self._partition),
            (faults.broker_s, self._crash_broker),
            (faults.forget_s, self._forget),
            (faults.server_s, self._crash_server),
            (faults.replay_s, self._replay),
            (faults.power_s and faults.power_s / world.scenario.devices, self._cut_power),
            (faults.clock_s and faults.clock_s / world.scenario.devices, self._step_clock),
        ):
            if mean_s:
                self._again(mean_s, action)
        for at_s in faults.broker_at:
            world.loop.at(int(at_s * US_PER_S), self._crash_broker)
        for device in world.devices:
            if self._schedule.chance(faults.clock_unset):
                self.counts["clock.unset"] += 1
                device.clock.offset_ms = -world.clock_start_ms
            if self._schedule.chance(faults.disk_full):
                self.counts["disk.full"] += 1
                device.disk.capacity_bytes = world.factory_disk_bytes
        world.loop.at(int(faults.end_s * US_PER_S), self.end)

    def end(self) -> None:
        """No more faults; everything that they broke is repaired."""
        if not self.is_active:
            return
        self.is_active = False
        world = self._world
        world.trace.note(world.loop.now_us, -1, "faults end")
        world.heal()

    def progressed(self, share: float) -> None:
        """This share of the fleet runs the first good release."""
        wanted = self._faults.broker_progress
        if self.is_active and wanted and share >= wanted and not self._has_crashed_at_progress:
            self._has_crashed_at_progress = True
            self._crash_broker()

    # Occasions

    def to_device(
        self, device: "SimulatedDevice", packet: Publish, byte_count: int, arrival_us: int, generation: int
    ) -> None:
        """A message is on its way to a device."""
        faults, stream, client, loop = self._faults, self._network, device.transport, self._world.loop
        if stream.chance(faults.cut):
            self.counts["network.cut"] += 1
            client.break_off()
            return
        if packet.qos == 0 and stream.chance(faults.drop):
            self.counts["network.drop"] += 1
            loop.at(arrival_us, client.swallow, generation, byte_count)
            return
        if stream.chance(faults.delay):
            self.counts["network.delay"] += 1
            arrival_us = device.path.hold(int(stream.exponential(DELAY_S) * US_PER_S))
        if stream.chance(faults.poison) and self._is_chunk(packet):
            self.counts["network.poison"] += 1
            packet = _poisoned(packet)
        loop.at(arrival_us, client.arrive, generation, packet, byte_count)
        if stream.chance(faults.duplicate):
            self.counts["network.duplicate"] += 1
            loop.at(arrival_us, client.arrive, generation, packet, 0)

    def from_device(self, device: "SimulatedDevice") -> bool:
        """A message is on its way from a device; whether it is lost, and its connection with it."""
        if not self._network.chance(self._faults.cut):
            return False
        self.counts["network.cut"] += 1
        device.transport.break_off()
        return True

    def effect(self) -> None:
        """An effect is about to be carried out."""
        if self._effect.chance(self._faults.crash_effect):
            self.counts["power.at_effect"] += 1
            raise PowerCutError

    def disk_operation(self, name: str) -> None:
        """A disk is about to read or write."""
        if self._disk.chance(self._faults.crash_disk):
            self.counts["power.at_disk"] += 1
            raise PowerCutError
        if self._disk.chance(self._faults.storage):
            self.counts["disk.error"] += 1
            raise StorageError(f"{name}: input/output error (injected)")

    def server_effect(self) -> bool:
        """An effect of the server is about to be carried out; whether the server dies."""
        if not self.is_active or not self._server.chance(self._faults.crash_effect / 10):
            return False
        self.counts["server.at_effect"] += 1
        return True

    def down_us(self) -> int:
        """For how long a device that lost its power stays without."""
        return int(self._schedule.exponential(self._faults.down_s or 1.0) * US_PER_S) + US_PER_S

    # Scheduled

    def _again(self, mean_s: float, action: Callable[[], None]) -> None:
        delay_us = int(self._schedule.exponential(mean_s) * US_PER_S)
        self._world.loop.after(delay_us, self._strike, mean_s, action)

    def _strike(self, mean_s: float, action: Callable[[], None]) -> None:
        if self.is_active:
            action()
            self._again(mean_s, action)

    def _cut_power(self) -> None:
        device = self._schedule.choice(self._world.devices)
        if device.is_powered:
            self.counts["power.cut"] += 1
            device.cut_power()

    def _step_clock(self) -> None:
        device = self._schedule.choice(self._world.devices)
        self.counts["clock.step"] += 1
        step_s = self._schedule.exponential(self._faults.clock_step_s) * self._schedule.choice((-1, 1))
        device.clock.offset_ms += int(step_s * 1_000)
        self._world.trace.note(self._world.loop.now_us, device.number, f"clock steps by {step_s:.0f} s")

    def _partition(self) -> None:
        """Swizzled: links go one after the other, and come back in another order."""
        faults, stream, loop = self._faults, self._schedule, self._world.loop
        self.counts["network.partition"] += 1
        for device in self._world.devices:
            if stream.chance(faults.partition_share):
                length_us = int(faults.partition_length_s * US_PER_S)
                begin_us = loop.now_us + int(stream.random() * length_us / 4)
                end_us = begin_us + int(stream.exponential(faults.partition_length_s) * US_PER_S)
                self.counts["network.link_down"] += 1
                loop.at(begin_us, self._world.link_fails, device, end_us)

    def _crash_broker(self) -> None:
        if self._world.broker.is_up:
            self.counts["broker.crash"] += 1
            self._world.crash_broker(int(self._faults.broker_down_s * US_PER_S))

    def _forget(self) -> None:
        self.counts["broker.forget"] += 1
        self._world.trace.note(self._world.loop.now_us, -1, "the broker forgets its retained messages")
        self._world.broker.forget_retained()

    def _crash_server(self) -> None:
        if self._world.server.is_up:
            self.counts["server.crash"] += 1
            self._world.crash_server()

    def server_down_us(self) -> int:
        """For how long the server stays away."""
        return int(self._faults.server_down_s * US_PER_S)

    def _replay(self) -> None:
        """Somebody with access to the broker publishes what was signed or asked for before."""
        self.counts["attack.replay"] += 1
        self._world.attacker.strike(self._schedule)

    def _is_chunk(self, packet: Publish) -> bool:
        if len(packet.payload) <= POISON_AT:
            return False
        return isinstance(self._world.topics.parse(packet.topic), ChunkTopic | ChunkAnswerTopic)


def _poisoned(packet: Publish) -> Publish:
    payload = bytearray(packet.payload)
    payload[POISON_AT] ^= 0x55
    return msgspec.structs.replace(packet, payload=bytes(payload))
