"""One device in virtual time: the real agent and the real executor on a simulated disk, link, clock, engine and power."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from device import effects, events
from device.agent import Agent
from device.config import AgentConfig
from device.executor import CURRENT_LINK, ROOT_FILE, Executor
from device.journal import Journal, Record, SlotRecord
from device.slots import SlotHealth, SlotName, slot_file, slot_folder
from device.states import State
from protocol.errors import WhimbrelError
from protocol.ids import DeviceId, Family, FleetId
from protocol.release import Release
from simulator.client import Client
from simulator.clock import DeviceClock
from simulator.disk import Interned, SimulatedDisk
from simulator.engine import SimulatedEngine
from simulator.loop import US_PER_MS, US_PER_S
from simulator.models import FAMILY, FLEET
from simulator.network import Path
from simulator.power import PowerCutError
from simulator.scenario import DeviceKind
from simulator.streams import Stream, generator

if TYPE_CHECKING:
    from simulator.world import World

RESTART_US: Final = 5 * US_PER_S
"""Until a process that ended with an error is started again, as an init system does."""

DECODED_BYTES_MIN: Final = 8_192
"""A job that writes more than this makes files from a delta; others write records."""

DOWN: Final = "down"
"""What counts as the state of a device without power."""


class DeviceDisk(SimulatedDisk):
    """A disk whose operations may fail, or be the last."""

    def __init__(self, capacity_bytes: int, interned: Interned, device: "SimulatedDevice") -> None:
        super().__init__(capacity_bytes, interned)
        self._device = device

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As `Disk.read`."""
        if self._device.world.disk_faults:
            self._device.world.faults.disk_operation(name)
        return super().read(name, offset, length)

    def _check_writable(self, name: str) -> None:
        super()._check_writable(name)
        if self._device.world.disk_faults:
            self._device.world.faults.disk_operation(name)


class SimulatedDevice:
    """A device.

    Args:
        world: Everything around it.
        number: Which it is.
        kind: What it is.
        path: Its link.
        clock: Its clock.
    """

    __slots__ = (
        "_answers",
        "_armed_us",
        "_factory",
        "_has_failed",
        "_is_handling",
        "_is_working",
        "_jobs",
        "_queue",
        "agent",
        "clock",
        "config",
        "disk",
        "engine",
        "executor",
        "generation",
        "is_powered",
        "kind",
        "link_topic",
        "number",
        "path",
        "ran",
        "rng",
        "seen",
        "state",
        "stream",
        "transport",
        "world",
    )

    def __init__(self, world: "World", number: int, kind: DeviceKind, path: Path, clock: DeviceClock) -> None:
        seed, name = world.scenario.seed, DeviceId(f"d{number:06}")
        self.world = world
        self.number = number
        self.kind = kind
        self.path = path
        self.clock = clock
        self.stream = Stream(seed, "device", number)
        self.rng = generator(seed, "agent", number)
        self.config = AgentConfig(
            device=name,
            fleet=FleetId(FLEET),
            family=Family(FAMILY),
            tier=kind.tier,
            memory_bytes_max=kind.memory_bytes,
            disk_reserve_bytes=0,
            link_bytes_per_s=path.planned_bytes_per_s(),
            processor_percent=kind.processor_percent,
        )
        self.link_topic = world.topics.link(name)
        self.disk = DeviceDisk(kind.disk_bytes, world.interned, self)
        self.engine = SimulatedEngine(self)
        self.transport = Client(self)
        self.agent: Agent | None = None
        self.executor: Executor | None = None
        self.is_powered = False
        self.state = DOWN
        self.seen = world.checks.nothing_seen
        self._queue: deque[events.Event] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._answers: list[events.Event] | None = None  # of the job that runs at this moment
        self._is_handling = False
        self._is_working = False
        self._has_failed = False
        self.generation = 0  # of the power: what was begun before a cut is void
        self._armed_us: int | None = None

    def install_factory(self, release: Release, content: bytes, root: bytes) -> None:
        """What an installer does: a first version, and the start of trust; as `device.runtime.install_factory`."""
        disk, file = self.disk, release.files[0]
        name = slot_file(SlotName.A, file.name)
        for path, data in ((name, content), (ROOT_FILE, root)):
            disk.create(path, len(data))
            disk.write(path, 0, data)
            disk.sync(path)
        disk.point(CURRENT_LINK, slot_folder(SlotName.A))
        slot = SlotRecord(
            health=SlotHealth.GOOD,
            version=release.version,
            runtime=release.runtime,
            main_file=file.name,
            files={file.name: file.sha256},
        )
        record = Record(active=SlotName.A, slots={SlotName.A: slot, SlotName.B: SlotRecord()})
        Journal(disk).save(record)
        self.seen = self.world.checks.installed(record)

    # Power

    def switch_on(self) -> None:
        """The power is there: boot."""
        if not self.is_powered:
            self.is_powered = True
            self._boot(self.generation)

    def cut_power(self) -> None:
        """The power goes: memory is lost, and what was not synced of the disk perhaps."""
        if not self.is_powered:
            return
        self._end()
        self.is_powered = False
        self.disk.crash(self.stream)
        self.world.trace.note(self.world.loop.now_us, self.number, "power cut")
        self._enter(DOWN)
        self.world.checks.crashed(self)
        self.world.power_was_cut(self)

    def restart(self) -> None:
        """The process ends and is started again; the power stays."""
        if self.is_powered:
            self._end()
            self._boot(self.generation)

    def _end(self) -> None:
        """The process is gone."""
        self.generation += 1
        self.transport.vanish()
        self.agent = self.executor = None
        self._queue.clear()
        self._jobs.clear()
        self._answers = None
        self._is_working = False
        self._armed_us = None

    def _boot(self, generation: int) -> None:
        if generation != self.generation:
            return
        world = self.world
        self.clock.restart()
        self.agent = Agent(self.config, self.rng, world.trust)
        self.executor = Executor(
            disk=self.disk, transport=self.transport, engine=self.engine, workers=self, post=self._post
        )
        try:
            booted = self.executor.boot_event(self.kind.memory_bytes)
        except PowerCutError:
            self.cut_power()
            return
        except WhimbrelError as error:
            world.trace.note(world.loop.now_us, self.number, f"does not start: {error.code}")
            self._end()
            world.loop.after(RESTART_US, self._boot, self.generation)
            return
        world.trace.note(world.loop.now_us, self.number, "boot")
        world.checks.booted(self, booted)
        self._enter(self.agent.state.value)
        self.handle(booted)
        if self.generation == generation:
            self.transport.start()

    # Events

    def message(self, topic: str, payload: bytes) -> None:
        """The broker delivered something."""
        self.handle(events.MessageReceived(topic, payload))

    def connected(self) -> None:
        """The broker accepted us."""
        self.handle(events.Connected())

    def disconnected(self) -> None:
        """The connection is gone."""
        self.handle(events.Disconnected())

    def handle(self, event: events.Event) -> None:
        """Let the agent take note of an event, and carry out what it orders."""
        self._queue.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._queue:
                self._decide(self._queue.popleft())
        except PowerCutError:
            self.cut_power()
        finally:
            self._is_handling = False
        self._arm()

    def _decide(self, event: events.Event) -> None:
        agent, executor, world = self.agent, self.executor, self.world
        if agent is None or executor is None:
            return
        trace, now_us = world.trace, world.loop.now_us
        trace.note(now_us, self.number, type(event).__name__)
        for effect in agent.handle(event, self.clock.now_ms()):
            if world.effect_faults:
                world.faults.effect()
            world.checks.ordered(self, effect)
            self._has_failed = False
            executor.run((effect,))
            if self._has_failed:  # those after it are dropped, as in a single run of all
                break
            world.checks.carried_out(self, effect)
            if type(effect) is effects.Trace:
                source, trigger, target = effect.row
                trace.note(
                    now_us, self.number, f"{source.value} {trigger.value} {target.value} {effect.code}"
                )
                world.moved(self, effect)
            elif trace.follows(self.number):
                trace.tell(now_us, self.number, f"  {_described(effect)}")
        if agent.state.value != self.state:  # not by its traces: one behind an effect that failed is dropped
            self._enter(agent.state.value)
        world.checks.decided(self)

    def _post(self, event: events.Event) -> None:
        if self._answers is not None:
            self._answers.append(event)
            return
        self._has_failed = isinstance(event, events.EffectFailed)
        self._queue.append(event)

    def _enter(self, state: str) -> None:
        self.world.entered(self.state, state)
        self.state = state

    # Time

    def _arm(self) -> None:
        """Wake the agent at its deadline; a timer that comes too early finds out and is set again."""
        if self.agent is None:
            return
        deadline_ms = self.agent.deadline()
        if deadline_ms is None:
            return
        loop = self.world.loop
        instant_us = loop.now_us + self.clock.until_us(deadline_ms)
        if self._armed_us is None or instant_us < self._armed_us:
            self._armed_us = instant_us
            loop.at(instant_us, self._wake, self.generation, instant_us)

    def _wake(self, generation: int, instant_us: int) -> None:
        if generation != self.generation or instant_us != self._armed_us or self.agent is None:
            return
        self._armed_us = None
        deadline_ms = self.agent.deadline()
        if deadline_ms is not None and deadline_ms <= self.clock.now_ms():
            self.handle(events.DeadlineReached())
        else:
            self._arm()

    # Workers

    def submit(self, work: Callable[[], None]) -> None:
        """As `Workers.submit`."""
        self._jobs.append(work)
        if not self._is_working:
            self._is_working = True
            self.world.loop.after(0, self._work, self.generation)

    def _work(self, generation: int) -> None:
        """Do a job now, and let its answer come when a device would have done it."""
        if generation != self.generation:
            return
        disk, engine = self.disk, self.engine
        read, written, syncs, spent_us = disk.read_bytes, disk.written_bytes, disk.syncs, engine.spent_us
        answers: list[events.Event] = []
        self._answers = answers
        try:
            self._jobs.popleft()()
        except PowerCutError:
            self.cut_power()
            return
        finally:
            self._answers = None
        kind = self.kind
        read, written = disk.read_bytes - read, disk.written_bytes - written
        cost_us = engine.spent_us - spent_us
        cost_us += read * US_PER_S // kind.read_bytes_per_s + written * US_PER_S // kind.write_bytes_per_s
        cost_us += int((disk.syncs - syncs) * kind.sync_ms * US_PER_MS)
        if written > DECODED_BYTES_MIN:
            cost_us += written * US_PER_S // kind.decode_bytes_per_s
        self.world.loop.after(cost_us, self._worked, generation, answers)

    def _worked(self, generation: int, answers: list[events.Event]) -> None:
        if generation != self.generation:
            return
        if self._jobs:
            self.world.loop.after(0, self._work, generation)
        else:
            self._is_working = False
        for answer in answers:
            self.handle(answer)

    # What the record says

    @property
    def is_resting(self) -> bool:
        """Whether no update is under way."""
        return self.agent is not None and self.agent.state in _RESTING

    @property
    def version(self) -> str:
        """The version that the engine answers with; empty while there is none."""
        model = None if self.executor is None else self.executor.model
        if model is None:
            return ""
        behaviour = self.world.behaviours.get(getattr(model, "digest", ""))
        return behaviour.version if behaviour is not None else ""


_RESTING: Final = frozenset({State.IDLE, State.REJECTED, State.ROLLED_BACK, State.FAILED})


def _described(effect: effects.Effect) -> str:
    """An effect as a story tells it."""
    match effect:
        case effects.Persist(record):
            update = record.update
            return f"Persist state={record.state.value} tries={update.tries if update else 0}"
        case effects.Publish(topic, payload):
            return f"Publish {topic.partition('/')[2]} {len(payload)} bytes"
        case effects.WriteChunk(blob, index):
            return f"WriteChunk {blob[:12]} {index}"
        case effects.Subscribe(filters) | effects.Unsubscribe(filters):
            return f"{type(effect).__name__} {len(filters)} filters"
    return type(effect).__name__
