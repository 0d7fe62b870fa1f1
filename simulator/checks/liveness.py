"""Convergence: after the faults, every device that can runs what it should, and the server knows it."""

from typing import TYPE_CHECKING

from device.states import State
from protocol.release import Release, release_digest

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice
    from simulator.world import World


class Liveness:
    """What became of the devices of a world with respect to one release.

    Args:
        world: The world.
        release: What everybody should run.
    """

    def __init__(self, world: "World", release: Release) -> None:
        self._world = world
        self._release = release
        self._digest = release_digest(release)
        self._are_disks_as_made = not world.scenario.faults.disk_full  # else they were full for a time only

    def missing(self) -> list["SimulatedDevice"]:
        """Devices that are neither there nor excused."""
        return [
            device
            for device in self._world.devices
            if not self.is_there(device) and not self.is_excused(device)
        ]

    def excused(self) -> int:
        """How many devices cannot run it."""
        return sum(not self.is_there(device) and self.is_excused(device) for device in self._world.devices)

    def is_there(self, device: "SimulatedDevice") -> bool:
        """Whether a device answers with the release, and the server knows."""
        known = self._world.server.coordinator.registry.get(device.config.device)
        return device.version == known.version == self._release.version and device.is_resting

    def is_excused(self, device: "SimulatedDevice") -> bool:
        """Whether it refused the release for good, after a trial that failed or since it does not fit."""
        agent = device.agent
        if agent is None:
            return False
        if self._digest in agent.record.quarantine:
            return True
        update = agent.record.update
        return (
            agent.state is State.REJECTED
            and update is not None
            and update.desired.version == self._release.version
            and update.code.startswith("admission.")
            and (update.code != "admission.disk" or self._are_disks_as_made)
        )
