"""One real agent with its real executor, over a simulated disk, a cache that forgets nothing, and scripted models.

The world is single-threaded and runs in virtual time: `settle` carries out everything that follows from what was
said so far, and moves the clock to the agent's deadlines until the world is quiet.
"""

import functools
import io
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from device import events
from device.agent import Agent
from device.config import AgentConfig
from device.effects import Effect, Trace
from device.executor import ROOT_FILE, Executor
from device.journal import Director, DirectorKey, Journal, Record, SlotRecord
from device.ports import KeyOpener, Model, ModelSource, TrialOrder, Trust
from device.slots import SlotHealth, SlotName, slot_file
from device.states import State
from protocol import trust as trust_module
from protocol.chunks import build_tree, encode_chunk, index_name
from protocol.constants import CHUNK_BYTES
from protocol.delta.format import Profile
from protocol.delta.needs import in_place_needs
from protocol.delta.writer import make_delta
from protocol.errors import EngineError
from protocol.ids import DeviceId, Digest, Family, FleetId, Version, digest_of
from protocol.messages import (
    Desired,
    LatencySummary,
    MetadataRequest,
    Report,
    TrialEvidence,
    decode_message,
    decode_request,
)
from protocol.release import (
    ArtifactCustom,
    ChunkTree,
    ClassPrompt,
    HealthPlan,
    InPlaceNeeds,
    Prompt,
    Release,
    ReleaseFile,
    Resources,
    delta_target,
    encode_release,
    file_target,
    release_target,
)
from protocol.tensors import BytesSource
from protocol.topics import Topics
from protocol.trust import Floors, Target, verify
from server.ports import Repository
from server.runtime import bundle
from simulator.disk import SimulatedDisk
from simulator.models import publisher_of
from simulator.power import PowerCutError

FLEET = FleetId("test-fleet")
FAMILY = Family("digits")
DEVICE = DeviceId("device-1")
START_MS = 1_700_000_000_000
SEGMENT_BYTES = 256 << 10  # several segments in a small model, so that there are checkpoints
TOPICS = Topics(FLEET)


def chunks_of(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


@functools.lru_cache(maxsize=16)
def encoded_delta(base: bytes, result: bytes, profile: Profile, *, in_place: bool) -> tuple[bytes, int]:
    """A delta and the memory that its decoder needs; many tests publish the same one."""
    sink = io.BytesIO()
    stats = make_delta(
        BytesSource(base),
        BytesSource(result),
        sink,
        profile=profile,
        segment_bytes=SEGMENT_BYTES,
        in_place=in_place,
    )
    return sink.getvalue(), stats.header.decoder_memory_bytes


def health(**changes: object) -> HealthPlan:
    fields: dict[str, object] = {
        "prompts": [ClassPrompt(name=f"p{label}", input=[0.0], label=label) for label in range(4)],
        "latency_p99_ms_max": 100.0,
        "memory_peak_bytes_max": 1 << 30,
    }
    return HealthPlan(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


class Cache:
    """What a broker's retained cache and a server would give: topics to payloads; with a seed, always the same."""

    def __init__(self, seed: int | None = None) -> None:
        self.retained: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.publisher = publisher_of(random.SystemRandom().getrandbits(64) if seed is None else seed)
        self.repository: Repository = self.publisher.create(START_MS).repository
        self.root = self.repository.roots[0]
        self.sequence = 0
        self.desired: Desired | None = None  # the last wish
        self.server_ms = START_MS  # what the server's clock shows

    def add_blob(self, data: bytes) -> tuple[Digest, ChunkTree]:
        parts = chunks_of(data)
        tree, indexes = build_tree(bytes.fromhex(digest_of(part)) for part in parts)
        name = digest_of(data)
        for blob, content in [(name, data)] + [
            (index_name(tree, level), index) for level, index in enumerate(indexes, start=1)
        ]:
            for number, part in enumerate(chunks_of(content)):
                self.retained[TOPICS.chunk(blob, number)] = encode_chunk(blob, number, part)
        return name, tree

    def publish(self, version: str, model: bytes, *, changes: dict[str, object] | None = None) -> Release:
        fields: dict[str, object] = {
            "family": FAMILY,
            "version": version,
            "runtime": "onnx",
            "runtime_version_min": "1.0",
            "files": [ReleaseFile(name="model.onnx", length=len(model), sha256=digest_of(model))],
            "resources": Resources(memory_bytes=1000),
            "health": health(),
        }
        release = Release(**{**fields, **(changes or {})})  # type: ignore[arg-type]  # a test's keyword arguments
        description = encode_release(release)
        self.files[digest_of(model)] = model
        targets: list[Target] = []
        for path, data in [
            (release_target(FAMILY, Version(version)), description),
            (file_target(digest_of(model)), model),
        ]:
            name, tree = self.add_blob(data)
            targets.append(Target(path, len(data), name, ArtifactCustom(chunks=tree)))
        self.repository = self.publisher.publish(self.repository, targets, (), START_MS).repository
        self.publish_metadata()
        return release

    def publish_delta(
        self,
        base: bytes,
        result: bytes,
        *,
        profile: Profile = Profile.SMALL,
        patch: bytes | None = None,
        in_place: bool = False,
        needs: InPlaceNeeds | None = None,
    ) -> Digest:
        """Sign the delta between two files, or `patch` in its place, with what it needs in place, or `needs` in their place."""
        memory_bytes = 0
        if patch is None:
            patch, memory_bytes = encoded_delta(base, result, profile, in_place=in_place)
            needs = needs or in_place_needs(BytesSource(base), BytesSource(result), BytesSource(patch))
        name, tree = self.add_blob(patch)
        path = delta_target(digest_of(base), digest_of(result), profile)
        custom = ArtifactCustom(chunks=tree, memory_bytes=memory_bytes, in_place=needs)
        target = Target(path, len(patch), name, custom)
        self.repository = self.publisher.publish(self.repository, [target], (), START_MS).repository
        self.publish_metadata()
        return name

    def retire(self, path: str) -> None:
        """Drop a signed target."""
        self.repository = self.publisher.publish(self.repository, (), [path], START_MS).repository
        self.publish_metadata()

    def publish_metadata(self) -> None:
        documents = self.repository.documents
        self.retained[TOPICS.metadata("timestamp")] = documents.timestamp
        self.retained[TOPICS.metadata("snapshot")] = documents.snapshot
        self.retained[TOPICS.metadata("targets")] = documents.targets
        for role, data in documents.delegated:
            self.retained[TOPICS.metadata(role)] = data
        for number, root in enumerate(self.repository.roots, start=1):
            self.retained[TOPICS.root(number)] = root

    def desire(self, version: str, *, sequence: int | None = None, family: str = FAMILY) -> bytes:
        self.sequence = self.sequence + 1 if sequence is None else sequence
        self.desired = Desired(sequence=self.sequence, rollout="r1", family=family, version=version)
        return self.desire_again()

    def desire_again(self) -> bytes:
        """Sign the last wish anew."""
        assert self.desired is not None
        payload = self.retained[TOPICS.desired(DEVICE)] = self.sealed(self.desired)
        return payload

    def sealed(self, desired: Desired) -> bytes:
        """As the director of what is published signs it."""
        director = self.publisher.director(self.repository)
        return director.seal(TOPICS.desired(DEVICE), desired, self.server_ms)

    def director(self) -> Director:
        """Who may wish, for the record of a device that has looked before."""
        keys = verify(self.root, self.repository.documents, Floors(), START_MS).director
        return Director(is_named=keys is not None, keys=tuple(DirectorKey(key=key) for key in keys or ()))

    def answer(self, payload: bytes) -> bytes | None:
        """What a server answers to a request for metadata."""
        request = decode_request(payload)
        if not isinstance(request, MetadataRequest):
            return None
        topic = TOPICS.metadata_answer(DEVICE)
        time = self.publisher.director(self.repository).attest(topic, request.nonce, self.server_ms)
        return bundle(self.repository, request.root_version, request.roles, time)


class ScriptedModel(Model):
    """Answers with the digest of its file."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.is_closed = False

    def answer(self, prompt: Prompt) -> str:
        assert not self.is_closed, "a closed model was asked"
        return f"{self.digest}:{prompt.name}"

    def close(self) -> None:
        self.is_closed = True


@dataclass
class ScriptedEngine:
    """Models by digest of their file: what a trial measures, and which cannot be loaded."""

    disk: SimulatedDisk
    evidence: dict[str, TrialEvidence] = field(default_factory=dict)
    unloadable: set[str] = field(default_factory=set)
    trials: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def versions(self) -> dict[str, str]:
        return {"onnx": "1.30.0"}

    def load(self, source: ModelSource) -> Model:
        digest = self._digest(source)
        if digest in self.unloadable:
            raise EngineError("the runtime refuses the file")
        self.loads.append(digest)
        return ScriptedModel(digest)

    def trial(self, order: TrialOrder) -> TrialEvidence:
        digest = self._digest(order.model)
        self.trials.append(digest)
        return self.evidence.get(digest, good_evidence())

    def _digest(self, source: ModelSource) -> str:
        return digest_of(self.disk.read(source.path, 0, self.disk.length(source.path) or 0))


def good_evidence(**changes: object) -> TrialEvidence:
    fields: dict[str, object] = {
        "prompts_passed": 4,
        "prompts_total": 4,
        "load_ms": 5.0,
        "latency": LatencySummary(p50_ms=1.0, p95_ms=2.0, p99_ms=3.0),
        "memory_peak_bytes": 1 << 20,
    }
    return TrialEvidence(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


class CuttingDisk(SimulatedDisk):
    """A disk during one of whose changes the power goes."""

    operations_left: int | None = None  # changes that are still carried out

    def _check_writable(self, name: str) -> None:
        super()._check_writable(name)
        if self.operations_left is not None:
            if self.operations_left == 0:
                raise PowerCutError
            self.operations_left -= 1


class Device:
    """A device that can lose its connection and its power at any effect."""

    def __init__(
        self,
        cache: Cache,
        model: bytes,
        *,
        seed: int = 1,
        config: dict[str, object] | None = None,
        disk: CuttingDisk | None = None,
        trust: Trust = trust_module,
        open_key: KeyOpener | None = None,
        has_looked: bool = True,
    ) -> None:
        fields: dict[str, object] = {"device": DEVICE, "fleet": FLEET, "family": FAMILY, "tier": "pi"}
        self.config = AgentConfig(**{**fields, **(config or {})})  # type: ignore[arg-type]  # a test's keyword arguments
        self.cache = cache
        self.disk = disk or self._make_disk()
        self.trust = trust
        self.open_key = open_key
        self.engine = self._make_engine()
        self.rng = random.Random(seed)
        self.now_ms = START_MS
        self.reports: list[Report] = []
        self.progress = 0  # how often the transport was told that something came for good
        self.rows: list[str] = []
        self.effects: list[Effect] = []
        self.fetched: list[tuple[str, int]] = []
        self.answer_requests: Callable[[str, bytes], None] | None = None
        self.cut_at: int | None = None
        self.is_clock_set = True
        self.has_looked = has_looked  # at the metadata, before this began
        if disk is None:
            self._install_factory(model)
        self.boot()

    def _make_disk(self) -> CuttingDisk:
        return CuttingDisk()

    def _make_engine(self) -> ScriptedEngine:
        return ScriptedEngine(self.disk)

    def _install_factory(self, model: bytes) -> None:
        name = slot_file(SlotName.A, "model.onnx")
        self.disk.create(name, len(model))
        self.disk.write(name, 0, model)
        self.disk.sync(name)
        self.disk.create(ROOT_FILE, len(self.cache.root))
        self.disk.write(ROOT_FILE, 0, self.cache.root)
        self.disk.sync(ROOT_FILE)
        slot = SlotRecord(
            health=SlotHealth.GOOD,
            version="v1",
            main_file="model.onnx",
            files={"model.onnx": digest_of(model)},
        )
        slots = {SlotName.A: slot, SlotName.B: SlotRecord()}
        director = self.cache.director() if self.has_looked else None
        Journal(self.disk).save(Record(active=SlotName.A, slots=slots, director=director))

    def boot(self) -> None:
        self.queue: deque[events.Event] = deque()
        self.jobs: deque[Callable[[], None]] = deque()
        self.subscriptions: set[str] = set()
        self.is_connected = False
        self.agent = Agent(self.config, self.rng, self.trust)
        self.executor = Executor(
            disk=self.disk,
            transport=self,
            engine=self.engine,
            workers=self,
            post=self.queue.append,
            open_key=self.open_key,
        )
        self.queue.append(self.executor.boot_event(1 << 30, is_clock_set=self.is_clock_set))

    def connect(self) -> None:
        self.is_connected = True
        self.queue.append(events.Connected())

    def disconnect(self) -> None:
        """Lose the connection, and whatever was on its way."""
        self.is_connected = False
        self.subscriptions.clear()
        kept = [event for event in self.queue if not isinstance(event, events.MessageReceived)]
        self.queue.clear()
        self.queue.extend([*kept, events.Disconnected()])

    def step(self) -> bool:
        """Handle one event, or else one job; whether there was any."""
        if not self.queue and self.jobs:
            self.jobs.popleft()()
            return True
        if not self.queue:
            return False
        for effect in self.agent.handle(self.queue.popleft(), self.now_ms):
            self._carry_out(effect)
            if self.queue and isinstance(self.queue[-1], events.EffectFailed) and not self.queue[-1].serial:
                break  # as the executor drops the rest of a tuple
        return True

    def _carry_out(self, effect: Effect) -> None:
        if self.cut_at is not None and len(self.effects) >= self.cut_at:
            raise PowerCutError
        self.effects.append(effect)
        if isinstance(effect, Trace):
            self.rows.append(
                f"{effect.row.source.value} {effect.row.trigger.value} {effect.row.target.value}"
            )
        self.executor.run((effect,))

    def settle(self, until: Callable[[], bool] = lambda: False, *, deadlines: int = 200) -> None:
        """Carry everything out; when nothing is left to do, let the next deadline come."""
        for _ in range(deadlines):
            while self.step():
                if until():
                    return
            deadline = self.agent.deadline()
            if deadline is None:
                return
            self.now_ms = max(self.now_ms, deadline)
            self.queue.append(events.DeadlineReached())
        raise AssertionError(f"the agent never came to rest: {self.rows[-10:]}")

    def settle_until_cut(self, operations: int) -> bool:
        """Settle with power for so many changes of the disk; whether it went. Then what was not synced is kept, lost or torn."""
        self.disk.operations_left = operations
        try:
            self.settle()
        except PowerCutError:
            self.disk.crash(random.Random(operations))
            return True
        finally:
            self.disk.operations_left = None
        return False

    # --- the ports that the world plays ---------------------------------------------------------------------

    def submit(self, work: Callable[[], None]) -> None:
        self.jobs.append(work)

    def subscribe(self, filters: tuple[str, ...], qos: int) -> None:  # noqa: ARG002 - the port's signature
        assert len(filters) <= 8
        if not self.is_connected:
            return
        self.subscriptions.update(filters)
        for topic, payload in sorted(self.cache.retained.items()):
            if any(matches(pattern, topic) for pattern in filters):
                self.deliver(topic, payload)

    def unsubscribe(self, filters: tuple[str, ...]) -> None:
        self.subscriptions.difference_update(filters)

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:  # noqa: ARG002 - likewise
        if not self.is_connected:
            return
        if topic == TOPICS.report(DEVICE):
            self.reports.append(decode_message(Report, payload))
        elif self.answer_requests is not None:
            self.answer_requests(topic, payload)

    def progressed(self) -> None:
        self.progress += 1

    def has_server(self) -> None:
        """From now on a server answers requests for metadata."""

        def answer(_topic: str, payload: bytes) -> None:
            data = self.cache.answer(payload)
            if data is not None:
                self.deliver(TOPICS.metadata_answer(DEVICE), data)

        self.answer_requests = answer

    def deliver(self, topic: str, payload: bytes) -> None:
        self.queue.append(events.MessageReceived(topic, payload))

    # --- what tests ask -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.agent.state

    @property
    def record(self) -> Record:
        record = Journal(self.disk).load()
        assert record is not None
        return record

    def answer(self) -> str:
        model = self.executor.model
        assert isinstance(model, ScriptedModel), "nothing answers"
        assert not model.is_closed
        return model.digest


def matches(pattern: str, topic: str) -> bool:
    if pattern.endswith("/+"):
        return topic.rpartition("/")[0] == pattern.removesuffix("/+")
    return pattern == topic


def fine_tuned(model: bytes, seed: int) -> bytes:
    """The model with one stretch replaced, always the same: small deltas, whatever the codecs are good at."""
    at = len(model) // 2
    return model[:at] + random.Random(seed).randbytes(1000) + model[at + 1000 :]


def model_bytes(seed: int, length: int = 20 * CHUNK_BYTES + 17) -> bytes:
    return random.Random(seed).randbytes(length)
