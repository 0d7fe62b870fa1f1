"""The promises of the house, checked while a fleet runs. Each check looks at the disk, not at what the agent believes.

1. A device never runs bytes whose digest is not in signed metadata, and never takes older metadata or requests.
2. At every instant there is a model that can be started; a version that has not proved itself is not the active one.
3. What was fetched is never fetched again because of a restart.
4. An update that cannot succeed is refused before its first byte.
5. A rollout stops by itself: nobody is asked after it has, and no more are in flight than it allows.
6. Inference goes on whatever happens to the update.
7. Everything reported was measured.
8. A fleet never comes back at one instant.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from device import effects, events
from device.blobs import blob_file
from device.journal import Record
from device.slots import SlotName, slot_file
from device.states import State
from protocol.constants import CHUNK_BYTES
from protocol.ids import DeviceId
from protocol.messages import Desired, Report, decode_message
from protocol.trust import Floors
from server.rollouts.states import FINAL
from simulator.loop import US_PER_MS, US_PER_S

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice
    from simulator.world import World

SERVING_S_MAX: Final = 60

HERD_WINDOW_US: Final = 5 * US_PER_MS
HERD_SHARE_MAX: Final = 0.25
HERD_DEVICES_MIN: Final = 24
"""Full jitter spreads a fleet over half a second at first: a hundredth of it in a window; this much is no chance."""


class PromiseBrokenError(AssertionError):
    """A promise was broken.

    Args:
        promise: Its number.
        device: Number of the device, -1 for none.
        detail: What was seen.
    """

    def __init__(self, promise: int, device: int, detail: str) -> None:
        super().__init__(f"promise {promise}: {detail}")
        self.promise = promise
        self.device = device
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Seen:
    """The most that the durable record of a device ever said, and what its active slot held."""

    floors: Floors
    desired_sequence: int
    boots: int
    active: SlotName | None
    files: tuple[tuple[str, str], ...]
    before: tuple[tuple[str, str], ...]  # of the version before: going back to it is allowed


class SafetyChecks:
    """Watches one world.

    Args:
        world: What is watched.
    """

    def __init__(self, world: "World") -> None:
        self.done = 0
        self.nothing_seen = Seen(Floors(), 0, 0, None, (), ())
        self._world = world
        self._serving: set[int] = set()  # devices whose engine has answered since their boot
        self._fetched_data: set[int] = set()  # devices that stored a chunk of an artifact in this update
        self._herd_us = 0
        self._herd = 0

    # Devices

    def installed(self, record: Record) -> Seen:
        """What a device leaves the factory with."""
        return Seen(record.floors, record.desired_sequence, record.boots, record.active, _files(record), ())

    def booted(self, device: "SimulatedDevice", event: events.Booted) -> None:
        """The record that a boot found is not older than what was durable before."""
        self._serving.discard(device.number)
        if event.record is None:
            raise PromiseBrokenError(2, device.number, "the durable record is gone")
        self._not_older(device, event.record)
        self._startable(device, event.record)
        self._world.loop.after(SERVING_S_MAX * US_PER_S, self._answers, device, device.generation)

    def _answers(self, device: "SimulatedDevice", generation: int) -> None:
        """A slot that would start was found at the boot: by now it answers."""
        self.done += 1
        if device.generation == generation and (device.executor is None or device.executor.model is None):
            raise PromiseBrokenError(6, device.number, f"no model answers {SERVING_S_MAX} s after the boot")

    def crashed(self, device: "SimulatedDevice") -> None:
        """The power is gone; what counts is found at the next boot."""
        self._serving.discard(device.number)

    def ordered(self, device: "SimulatedDevice", effect: effects.Effect) -> None:
        """An effect is about to be carried out."""
        kind = type(effect)
        if kind is effects.WriteChunk:
            self.done += 1
            assert isinstance(effect, effects.WriteChunk)
            name, offset = blob_file(effect.blob), effect.index * CHUNK_BYTES
            if device.disk.holds_durably(name, offset, effect.payload):
                raise PromiseBrokenError(
                    3, device.number, f"chunk {effect.index} of {effect.blob[:12]} was fetched again"
                )
            if effect.blob not in self._world.descriptions:
                self._fetched_data.add(device.number)
        elif kind is effects.Publish:
            assert isinstance(effect, effects.Publish)
            if effect.topic.endswith("/report"):
                self._reported(device, decode_message(Report, effect.payload))

    def carried_out(self, device: "SimulatedDevice", effect: effects.Effect) -> None:
        """An effect was carried out."""
        if type(effect) is effects.Persist:
            self._persisted(device, effect.record)
        elif type(effect) is effects.Trace:
            if effect.row.source is State.ROLLING_BACK or effect.row.target is State.SYNCING:
                self._fetched_data.discard(device.number)
            elif effect.row.target is State.REJECTED and device.number in self._fetched_data:
                raise PromiseBrokenError(4, device.number, f"{effect.code} came after the first byte")

    def decided(self, device: "SimulatedDevice") -> None:
        """The agent has taken note of an event: whoever has answered once goes on answering."""
        self.done += 1
        executor = device.executor
        if executor is None:
            return
        if executor.model is not None:
            self._serving.add(device.number)
        elif device.number in self._serving:
            raise PromiseBrokenError(6, device.number, "the model was let go and none took its place")

    def loading(self, device: "SimulatedDevice", digest: str) -> None:
        """An engine is about to run a file."""
        self.done += 1
        if digest not in self._world.signed:
            raise PromiseBrokenError(1, device.number, f"it runs {digest[:12]}, which nobody signed")
        self.decided(device)  # also while a model is loaded, another one answers

    def reconnecting(self, device: "SimulatedDevice") -> None:
        """A device tries to connect again."""
        now_us = self._world.loop.now_us
        if now_us - self._herd_us > HERD_WINDOW_US:
            self._herd_us, self._herd = now_us, 0
        self._herd += 1
        count = self._world.scenario.devices
        if count >= HERD_DEVICES_MIN and self._herd > max(HERD_DEVICES_MIN // 2, HERD_SHARE_MAX * count):
            raise PromiseBrokenError(
                8, device.number, f"{self._herd} of {count} devices connect within {HERD_WINDOW_US} µs"
            )

    # The server

    def asking(self, device: DeviceId, desired: Desired | None) -> None:
        """The server publishes what a device should run."""
        self.done += 1
        campaign = self._world.server.coordinator.campaigns.get(desired.rollout) if desired else None
        if campaign is None or desired is None:
            return
        limit = campaign.record.in_flight_max
        if limit is not None and campaign.in_flight > limit:
            text = f"{campaign.in_flight} devices of {campaign.record.id} in flight, allowed are {limit}"
            raise PromiseBrokenError(5, _number(device), text)
        if campaign.state not in FINAL:
            return
        member = campaign.members.get(device)
        if (
            campaign.record.finished_ms is not None
            and member is not None
            and member.asked_ms > campaign.record.finished_ms
            and desired.version == campaign.record.version
        ):
            raise PromiseBrokenError(5, _number(device), f"asked after rollout {campaign.record.id} ended")

    # Parts

    def _persisted(self, device: "SimulatedDevice", record: Record) -> None:
        self.done += 1
        self._not_older(device, record)
        seen, files = device.seen, _files(record)
        before = seen.before
        if (record.active, files) != (seen.active, seen.files):
            digests = {sha256 for _, sha256 in files}
            if files != seen.before and not digests & device.engine.passed:
                raise PromiseBrokenError(2, device.number, "it committed to a version before its trial")
            before = seen.files
            self._startable(device, record)
        device.seen = Seen(record.floors, record.desired_sequence, record.boots, record.active, files, before)

    def _not_older(self, device: "SimulatedDevice", record: Record) -> None:
        seen = device.seen
        floors = record.floors.numbers()
        for name, before in seen.floors.numbers().items():
            now = floors.get(name, 0)
            if now < before:
                raise PromiseBrokenError(
                    1, device.number, f"floor of {name} went back from {before} to {now}"
                )
        if record.desired_sequence < seen.desired_sequence:
            raise PromiseBrokenError(
                1,
                device.number,
                f"it took request {record.desired_sequence}, older than {seen.desired_sequence}",
            )
        if record.boots < seen.boots:
            raise PromiseBrokenError(2, device.number, "its record is older than what was durable")

    def _startable(self, device: "SimulatedDevice", record: Record) -> None:
        """The files of the active slot are durable, and are what was signed."""
        self.done += 1
        if record.active is None:
            raise PromiseBrokenError(2, device.number, "no slot is active")
        if self._slot_is_whole(device, record, record.active):
            return
        raise PromiseBrokenError(2, device.number, f"slot {record.active.value} would not start after a cut")

    def _slot_is_whole(self, device: "SimulatedDevice", record: Record, slot: SlotName) -> bool:
        for name, sha256 in record.slots[slot].files.items():
            content = device.disk.durable_content(slot_file(slot, name))
            if content is None or self._world.fingerprints.of(content) != sha256:
                return False
        return True

    def _reported(self, device: "SimulatedDevice", report: Report) -> None:
        self.done += 1
        if not report.files or any(self._holds(device, slot, report.files) for slot in SlotName):
            return
        raise PromiseBrokenError(7, device.number, "it reports files that it does not have")

    def _holds(self, device: "SimulatedDevice", slot: SlotName, files: dict[str, str]) -> bool:
        for name, sha256 in files.items():
            path = slot_file(slot, name)
            if device.disk.length(path) is None or self._world.fingerprints.on(device.disk, path) != sha256:
                return False
        return True


def _files(record: Record) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record.active_slot.files.items()))


def _number(device: DeviceId) -> int:
    return int(device.removeprefix("d"))
