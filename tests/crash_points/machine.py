"""One device on a disk that notes every moment of it: the real agent and the real executor, before and after a power cut."""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from device import rewriting
from device.blobs import blob_file
from device.effects import Effect, Persist, RemoveBlobs, WriteChunk
from device.events import EffectFailed
from device.executor import CURRENT_LINK
from device.journal import Record
from device.ports import ModelSource
from device.slots import SlotHealth, slot_file, slot_folder
from device.states import RESTING, State
from protocol.constants import CHUNK_BYTES
from protocol.ids import digest_of
from protocol.messages import Desired, TrialEvidence
from protocol.trust import Floors
from simulator.disk import _read as read_extents
from simulator.engine import Fingerprints
from simulator.trust import RememberedTrust
from tests.crash_points.disk import CrashDisk, Image, Moment, Stored
from tests.crash_points.updates import MODEL, MODELS, Update, install_factory
from tests.device.harness import (
    DEVICE,
    FAMILY,
    START_MS,
    TOPICS,
    Cache,
    Device,
    ScriptedEngine,
    ScriptedModel,
)

FIXED_FILES: Final = frozenset(
    {
        "record.0",
        "record.1",
        "root.json",
        "root.json.new",
        "install.state",
        "install.state.new",
        "inplace/manifest",
        "inplace/manifest.new",
    }
)
"""One of each, written anew whenever it is needed: what may be there between updates beside the models."""

LOSSES: Final = 8
"""Lost connections in one update."""


class World:
    """What is the same for every life of a device in one update: the broker, what was verified, digests by content.

    Args:
        update: What happens.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        self.cache: Cache = update.cache()
        self.trust = RememberedTrust()
        self.fingerprints = Fingerprints()
        self.signed: dict[str, str] = {digest_of(model): version for version, model in MODELS.items()}
        self.evidence: dict[str, TrialEvidence] = {
            digest_of(MODELS[version]): each for version, each in update.evidence.items()
        }
        self.unloadable: set[str] = {digest_of(MODELS[version]) for version in update.unloadable}
        self.never = {*self.unloadable, *self.evidence}  # digests that must not be served

    def renew_root(self) -> None:
        """Sign a successor of the root."""
        cache = self.cache
        cache.repository = cache.publisher.renew(cache.repository, "root", START_MS).repository
        cache.publish_metadata()


class Noted(NamedTuple):
    """A moment at which the power may go."""

    call: str  # the system call that was the last one
    state: State
    moment: Moment
    acknowledged: Record  # the last record that was written, as far as anything relied on it
    now_ms: int
    desired: bytes | None  # what the broker holds for the device
    ends: str  # version that this leads to


@dataclass
class Engine(ScriptedEngine):
    """Models by the content of their files, remembered."""

    fingerprints: Fingerprints = field(default_factory=Fingerprints)

    def _digest(self, source: ModelSource) -> str:
        return self.fingerprints.on(self.disk, source.path)


class Machine(Device):
    """A device that lives until the power goes.

    Args:
        world: Everything around it.
        disk: What it finds.
        noted: The moment at which the power went before; none at the factory.
    """

    disk: CrashDisk  # type: ignore[assignment]  # a better one

    def __init__(self, world: World, disk: CrashDisk, noted: Noted | None = None) -> None:
        self.world = world
        self.moments: list[Noted] = []
        self.acknowledged = Record() if noted is None else noted.acknowledged
        self.desired = None if noted is None else noted.desired
        self.ends = "v1" if noted is None else noted.ends
        super().__init__(
            world.cache,
            b"",
            config={"is_in_place": world.update.is_in_place},
            disk=disk,  # type: ignore[arg-type]  # likewise
            trust=world.trust,
        )
        if noted is not None:
            self.now_ms = noted.now_ms

    def _make_engine(self) -> ScriptedEngine:
        world = self.world
        return Engine(
            self.disk,
            evidence=world.evidence,
            unloadable=world.unloadable,
            fingerprints=world.fingerprints,
        )

    def boot(self) -> None:
        """As the runtime does."""
        self.disk.prepare()
        super().boot()

    def watch(self) -> None:
        """Note every moment from now on."""
        self.disk.on_call = self._note
        self._note("begin")

    def _note(self, call: str) -> None:
        self.moments.append(
            Noted(
                call,
                self.agent.state,
                self.disk.moment(),
                self.acknowledged,
                self.now_ms,
                self.desired,
                self.ends,
            )
        )

    def _carry_out(self, effect: Effect) -> None:
        super()._carry_out(effect)
        if type(effect) is Persist and not (self.queue and isinstance(self.queue[-1], EffectFailed)):
            self.acknowledged = effect.record
            if self.disk.on_call is not None:
                self._note("persisted")

    def ask(self, version: str, ends: str, sequence: int) -> None:
        """The server wishes for a version."""
        self.desired = self.cache.sealed(
            Desired(sequence=sequence, rollout="r1", family=FAMILY, version=version)
        )
        self.ends = ends
        self.deliver(TOPICS.desired(DEVICE), self.desired)

    def connect(self) -> None:
        """The broker is there, and holds what the server wishes for."""
        if self.desired is None:
            self.cache.retained.pop(TOPICS.desired(DEVICE), None)
        else:
            self.cache.retained[TOPICS.desired(DEVICE)] = self.desired
        super().connect()


def first_life(world: World) -> list[Noted]:
    """The update without a power cut; every moment of it."""
    update = world.update
    disk = CrashDisk()
    install_factory(disk, world.cache.root, world.cache.director())
    machine = Machine(world, disk)
    machine.connect()
    machine.settle()
    machine.watch()
    for number, (version, ends) in enumerate(zip(update.asked, update.ends, strict=True), start=1):
        if update.has_new_root and number == len(update.asked):
            world.renew_root()
        machine.ask(version, ends, number)
        if update.interrupts is not None and number < len(update.asked):
            machine.settle(until=lambda: machine.state is update.interrupts and len(machine.jobs) == 1)
            continue
        if update.loses_connection:
            _settle_badly(machine)
        machine.settle()
        wrong = wrongs_at_rest(machine)
        assert not wrong, f"{update.name}, without a power cut: {wrong}, {machine.rows[-4:]}"
    return machine.moments


def _settle_badly(machine: Machine) -> None:
    """Lose the connection now and then while the metadata and the chunks come, and find it again."""
    for number in range(LOSSES):
        if number:
            machine.connect()
        for _ in range(3 + number):
            machine.step()
        machine.disconnect()
        machine.settle()
    machine.connect()


class Start(NamedTuple):
    """What the first start from an image came to, as far as it does not depend on what was acknowledged."""

    wrong: str
    floors: Floors
    desired_sequence: int
    boots: int
    quarantine: tuple[str, ...]
    shape: int  # starts of one shape go on alike


def start(world: World, image: Image, noted: Noted) -> tuple[Start, Machine | None]:
    """Start from what a power cut left, and go on until a model answers."""
    try:
        machine = Machine(world, CrashDisk(image), noted)
        machine.settle(until=lambda: machine.executor.model is not None)
    except Exception as error:  # noqa: BLE001 - whatever it is, the device does not start
        return Start(f"does not start: {error!r}", Floors(), 0, 0, (), 0), None
    record = machine.agent.record
    shape = hash((tuple(machine.disk.everything()), record.state, record.active, record.desired_sequence))
    wrong = _wrong_model(machine, record)
    return (
        Start(wrong, record.floors, record.desired_sequence, record.boots, record.quarantine, shape),
        machine,
    )


def _wrong_model(machine: Machine, record: Record) -> str:
    model, world = machine.executor.model, machine.world
    if model is None:
        return f"no model answers, in state {machine.state.value}"
    assert isinstance(model, ScriptedModel)
    if model.digest not in world.signed:
        return f"{model.digest[:12]} answers, which nobody signed"
    if model.digest in world.never:
        return f"{world.signed[model.digest]} answers, which has not passed"
    if record.active is None or record.active_slot.files.get(MODEL) != model.digest:
        return f"{world.signed[model.digest]} answers, which is not what the record names"
    return ""


def gone_back(start: Start, acknowledged: Record) -> str:
    """What a start found to be less than was written down, and perhaps relied on, before the power went."""
    floors = start.floors.numbers()
    for name, before in acknowledged.floors.numbers().items():
        if floors.get(name, 0) < before:
            return f"floor of {name} went back from {before} to {floors.get(name, 0)}"
    if start.desired_sequence < acknowledged.desired_sequence:
        return f"request {acknowledged.desired_sequence} was forgotten for {start.desired_sequence}"
    if start.boots <= acknowledged.boots:
        return f"boot {acknowledged.boots} was counted again"
    if not set(acknowledged.quarantine) <= set(start.quarantine):
        return "a release that failed its trial is no longer known for it"
    return ""


def finish(machine: Machine, image: Image) -> list[str]:
    """Let the device get to the end of what is asked of it; what is wrong then."""
    before = len(machine.effects)
    try:
        machine.settle()
        machine.connect()
        machine.settle()
    except Exception as error:  # noqa: BLE001 - whatever it is, the update does not come to its end
        return [f"does not get to its end: {error!r}"]
    return [*wrongs_at_rest(machine), *_fetched_again(machine.effects[before:], image)]


def _fetched_again(ordered: list[Effect], image: Image) -> list[str]:
    """The first chunk that the image held and that came again, although nothing had removed its blob for good reason."""
    kept: frozenset[str] | None = None
    for effect in ordered:
        if isinstance(effect, RemoveBlobs):
            kept = effect.keep if kept is None else kept & effect.keep
        elif (
            isinstance(effect, WriteChunk) and (kept is None or effect.blob in kept) and _holds(image, effect)
        ):
            return [f"chunk {effect.index} of {effect.blob[:12]} was fetched again"]
    return []


def _holds(image: Image, effect: WriteChunk) -> bool:
    blob = image.get(blob_file(effect.blob))
    if not isinstance(blob, Stored):
        return False
    offset = effect.index * CHUNK_BYTES
    return read_extents(list(blob.extents), blob.length, offset, len(effect.payload)) == effect.payload


def wrongs_at_rest(machine: Machine) -> list[str]:
    """What is not as it should be when nothing is left to be done."""
    record, world = machine.record, machine.world
    wrong = [_wrong_model(machine, record)]
    model = machine.executor.model
    if isinstance(model, ScriptedModel) and world.signed.get(model.digest) != machine.ends:
        wrong.append(
            f"{world.signed.get(model.digest)} answers in the end, not {machine.ends}: {machine.rows}"
        )
    if machine.state not in RESTING:
        wrong.append(f"rests in state {machine.state.value}")
    wrong += [
        f"{name} is garbage" for name in machine.disk.everything() if name not in _expected(machine, record)
    ]
    if record.active is not None and machine.disk.links.get(CURRENT_LINK) != slot_folder(record.active):
        wrong.append(f"`{CURRENT_LINK}` leads to {machine.disk.links.get(CURRENT_LINK)}")
    return [each for each in wrong if each]


def _expected(machine: Machine, record: Record) -> set[str]:
    names = set(FIXED_FILES)
    for slot, content in record.slots.items():
        if slot is record.active or content.health is SlotHealth.GOOD:
            names |= {slot_file(slot, name) for name in content.files}
    manifest = rewriting._load(machine.disk)
    return names | {name for each in manifest.files for name in (each.journal, each.inverse)}
