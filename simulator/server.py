"""The server in virtual time: the real coordinator, catalog, publisher and deltas between a store and a broker.

The counterpart of `server.runtime.Server`: events in batches, every record of a batch durable before anything of it
leaves, the same effects. A crash keeps the store and the blobs.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from protocol.chunks import encode_chunk
from protocol.errors import StorageError, WhimbrelError
from protocol.ids import DeviceId, Digest, Family, FleetId, Version
from protocol.messages import Desired, Link, Report, decode_message, decode_request
from protocol.release import DeltaName, Release, encode_release, file_target, release_target
from protocol.topics import LinkTopic, ReportTopic, RequestTopic, Topics
from protocol.trust import Target
from server.adapters.mqtt import ANSWERS_MAX, BACKOFF_MS, BACKOFF_MS_MAX
from server.broker.packets import Connack, Connect, Packet, Puback, Publish, Suback, Subscribe
from server.coordinator import Coordinator, CoordinatorLimits
from server.effects import (
    AnswerChunks,
    AnswerMetadata,
    BuildDelta,
    CacheBlob,
    Effect,
    PublishDesired,
    PublishMetadata,
    RemoveBlobs,
    Save,
    SignMetadata,
    UncacheBlob,
)
from server.events import (
    BlobsRemoved,
    BlobUncached,
    BrokerConnected,
    DeadlineReached,
    DeltaBuilt,
    Event,
    LinkReceived,
    MetadataChanged,
    ReportReceived,
    RequestReceived,
    RolloutOrdered,
    RolloutRequested,
    SigningFailed,
)
from server.operations import RolloutPlan
from server.ports import (
    Record,
    Repository,
)
from server.releases.catalog import Catalog, blob_target
from server.rollouts.records import Order, OrderAction, RolloutRecord
from server.runtime import BATCH_EVENTS_MAX, SIGNING_RETRY_MS, bundle
from simulator.clock import RightClock
from simulator.loop import US_PER_MS, US_PER_S
from simulator.models import FLEET, MemoryBlobs, SimulatedDelta, delta_between, publisher_of
from simulator.network import Line
from simulator.store import MemoryStore
from simulator.streams import Stream

if TYPE_CHECKING:
    from simulator.world import World

_SERVER_ID: Final = "whimbrel-server"


class SimulatedServer:
    """One server process that can be killed.

    Args:
        world: Everything around it.
    """

    def __init__(self, world: "World") -> None:
        self.is_up = False
        self.clock = RightClock(world.loop)
        self.blobs = MemoryBlobs()
        self.publisher = publisher_of(world.scenario.seed)
        self.store = MemoryStore(self.publisher.create(self.clock.now_ms()).repository)
        self.history: list[Repository] = [self.store.repository]  # everything ever signed, for attackers
        self.wishes: dict[DeviceId, list[bytes]] = {}  # where there is an attacker, everything ever wished
        self.counters: dict[str, int] = {}
        self.events_handled = 0
        self.busy_us = 0
        self._world = world
        self._topics = Topics(FleetId(FLEET))
        self._generation = 0  # of the process
        self._coordinator = Coordinator()
        self._director = self.publisher.director(self.store.repository)
        self._events: deque[Event] = deque()
        self._is_busy = False
        self._armed_ms: int | None = None
        self._connection_id = 0
        self._is_connected = False
        self._attempts = 0
        self._chance = Stream(world.scenario.seed, "server", "reconnect")
        self._line = Line(world.scenario.server.bytes_per_s)
        self._answers: set[tuple[DeviceId, Digest, int]] = set()

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator that runs now, or ran last."""
        return self._coordinator

    # Life

    def start(self) -> None:
        """Begin with what the store has."""
        self._generation += 1
        self.is_up = True
        limits = CoordinatorLimits(
            retained_bytes_max=self._world.scenario.server.retained_bytes_max,
            devices_max=max(200_000, 2 * self._world.scenario.devices),
        )
        self._coordinator = Coordinator(limits)
        self._events.clear()
        self._is_busy = False
        self._armed_ms = None
        self._attempts = 0
        self._answers.clear()
        self._sign(SignMetadata())  # what expires soon
        self._post(self.store.started(self._catalog()))
        self._connect(self._generation)

    def crash(self) -> None:
        """Lose everything but the store and the blobs."""
        self._generation += 1
        self.is_up = False
        self._is_connected = False
        if self._connection_id:
            self._world.broker.lost(self._connection_id)
            self._connection_id = 0

    # The operator

    def publish(self, version: str, data: bytes, release: Release) -> None:
        """Sign a release: from now on it can be rolled out."""
        description = self.blobs.put(encode_release(release))
        whole = self.blobs.put(data)
        path = release_target(Family(release.family), Version(version))
        targets = [
            blob_target(path, description),
            blob_target(file_target(whole.digest), whole),
        ]
        self._publish(targets, ())
        self.store.releases.append(release)
        if self.is_up:
            self._post(MetadataChanged(self._catalog()))

    def roll_out(
        self,
        family: str,
        version: str,
        *,
        canary_count: int,
        wave_timeout_ms: int,
        failures_max: int | None,
        plan: RolloutPlan,
    ) -> str:
        """Ask for a rollout; the server takes it up."""

        def make(number: int, _before: list[RolloutRecord]) -> RolloutRecord:
            return plan.record(
                number,
                Family(family),
                Version(version),
                canary_count=canary_count,
                wave_timeout_ms=wave_timeout_ms,
                failures_max=failures_max,
                created_ms=self.clock.now_ms(),
            )

        record = self.store.create_rollout(make)
        if self.is_up:
            self._post(RolloutRequested(record))
        return record.id

    def order(self, rollout: str, action: OrderAction) -> None:
        """Order something of a rollout; the server acts."""

        def make(_record: RolloutRecord | None, before: list[Order]) -> Order:
            number, now_ms = len(before) + 1, self.clock.now_ms()
            return Order(rollout=rollout, number=number, action=action, by="operator", at_ms=now_ms)

        order = self.store.order_rollout(rollout, make)
        if self.is_up:
            self._post(RolloutOrdered(order))

    def rollout(self, rollout: str) -> RolloutRecord:
        """Where a rollout stands, by the store."""
        return self.store.rollout(rollout)

    # The loop

    def _post(self, event: Event) -> None:
        self._events.append(event)
        if not self._is_busy:
            self._is_busy = True
            self._world.loop.after(0, self._work, self._generation)

    def _work(self, generation: int) -> None:
        if generation != self._generation:
            return
        events = [self._events.popleft() for _ in range(min(len(self._events), BATCH_EVENTS_MAX))]
        transactions = self.store.transactions
        self._handle(events)
        if generation != self._generation:  # it crashed meanwhile
            return
        costs = self._world.scenario.server
        spent_us = int(len(events) * costs.event_us)
        spent_us += int((self.store.transactions - transactions) * costs.transaction_ms * US_PER_MS)
        self.busy_us += spent_us
        self._world.loop.after(spent_us, self._rest, generation)

    def _rest(self, generation: int) -> None:
        if generation != self._generation:
            return
        if self._events:
            self._work(generation)
            return
        self._is_busy = False
        self._arm()

    def _arm(self) -> None:
        deadline_ms = self._coordinator.deadline()
        if deadline_ms is None or (self._armed_ms is not None and self._armed_ms <= deadline_ms):
            return
        self._armed_ms = deadline_ms
        delay_ms = max(0, deadline_ms - self.clock.now_ms()) + 1
        self._world.loop.after(delay_ms * US_PER_MS, self._deadline_reached, self._generation, deadline_ms)

    def _deadline_reached(self, generation: int, deadline_ms: int) -> None:
        if generation == self._generation and deadline_ms == self._armed_ms:
            self._armed_ms = None
            self._post(DeadlineReached())

    def _handle(self, events: list[Event]) -> None:
        now_ms = self.clock.now_ms()
        generation = self._generation
        while events:
            effects: list[Effect] = []
            for event in events:
                self.events_handled += 1
                effects += self._coordinator.handle(event, now_ms)
            records: list[Record] = [effect.record for effect in effects if isinstance(effect, Save)]
            if records:
                self.store.save(records)
                self._world.saved(records)
            events = []
            for effect in effects:
                if self._world.faults.server_effect():
                    self._world.crash_server()
                if generation != self._generation:
                    return
                follower = self._carry_out(effect)
                if follower is not None:
                    events.append(follower)

    def _carry_out(self, effect: Effect) -> Event | None:
        match effect:
            case PublishDesired(device, desired):
                self._world.checks.asking(device, desired)
                self._retain(self._topics.desired(device), self._sealed(device, desired))
            case PublishMetadata():
                self._publish_documents()
            case CacheBlob(name, chunk_count):
                for index in range(chunk_count):
                    self._retain(self._topics.chunk(name, index), self._chunk(name, index))
                self._add("chunks_cached", chunk_count)
            case UncacheBlob(name, chunk_count):
                for index in range(chunk_count):
                    self._retain(self._topics.chunk(name, index), b"")
                if self._is_connected:
                    return BlobUncached(name)
            case AnswerChunks(device, name, chunks):
                self._answer_chunks(device, name, chunks)
            case AnswerMetadata(device, root_version, roles, nonce):
                topic, now_ms = self._topics.metadata_answer(device), self.clock.now_ms()
                time = self._director.attest(topic, nonce, now_ms)
                payload = bundle(self.store.repository, root_version, roles, time)
                self._add("metadata_answered")
                self._answer(self._topics.metadata_answer(device), payload)
            case BuildDelta():
                self._build(effect)
            case RemoveBlobs(path, names):
                for name in names:
                    self.blobs.remove(name)
                return BlobsRemoved(path)
            case SignMetadata():
                return self._sign(effect)
        return None

    # Signatures and deltas

    def _sign(self, effect: SignMetadata) -> Event:
        now_ms = self.clock.now_ms()
        try:
            if effect.added or effect.retired:
                self._publish(effect.added, effect.retired)
            else:
                self._signed(self.publisher.refresh(self.store.repository, now_ms).repository)
        except WhimbrelError:
            return SigningFailed(effect.deltas, now_ms + SIGNING_RETRY_MS)
        self._add("deltas_signed", len(effect.deltas))
        return MetadataChanged(self._catalog())

    def _publish(self, added: Iterable[Target], retired: Iterable[str]) -> None:
        published = self.publisher.publish(self.store.repository, added, retired, self.clock.now_ms())
        self._signed(published.repository)

    def _signed(self, repository: Repository) -> None:
        if repository != self.store.repository:
            self.store.repository = repository
            self.history.append(repository)

    def _catalog(self) -> Catalog:
        published = self.publisher.checked(self.store.repository, self.clock.now_ms())
        self._director = self.publisher.director(self.store.repository)
        return Catalog.of(published.targets, self.store.releases, published.refresh_ms, self._director.keyid)

    def _sealed(self, device: DeviceId, desired: Desired | None) -> bytes:
        """As the real server signs; that the signature is right is known without looking."""
        if desired is None:
            return b""
        topic = self._topics.desired(device)
        payload = self._director.seal(topic, desired, self.clock.now_ms())
        self._world.trust.remember(topic, payload, self._director.public)
        if self._world.scenario.faults.replay_s:
            self.wishes.setdefault(device, []).append(payload)
        return payload

    def _build(self, order: BuildDelta) -> None:
        name = order.name
        result = self.blobs.read(name.result)
        built = delta_between(self.blobs.read(name.base), result, name.profile)
        delay_us = len(result) * US_PER_S // self._world.scenario.server.build_bytes_per_s
        self._world.loop.after(delay_us, self._built, self._generation, name, built)

    def _built(self, generation: int, name: DeltaName, built: SimulatedDelta) -> None:
        if generation == self._generation:
            self._add("deltas_built")
            self._post(DeltaBuilt(name, self.blobs.put(built.content), built.memory_bytes, built.in_place))

    # The broker

    def _connect(self, generation: int) -> None:
        if generation != self._generation or self._is_connected:
            return
        broker = self._world.broker
        self._connection_id = broker.accept(self)
        if not self._connection_id:
            self._reconnect_later()
            return
        broker.received(self._connection_id, Connect(_SERVER_ID))

    def closed(self, connection_id: int) -> None:
        """As `Endpoint.closed`."""
        if connection_id != self._connection_id:
            return
        self._connection_id = 0
        self._is_connected = False
        self._answers.clear()
        self._reconnect_later()

    def _reconnect_later(self) -> None:
        """As the real transport waits."""
        longest_ms = min(BACKOFF_MS_MAX, BACKOFF_MS << min(self._attempts, 10))
        self._attempts += 1
        delay_us = int(self._chance.uniform(0, longest_ms) * US_PER_MS)
        self._world.loop.after(delay_us, self._connect, self._generation)

    def transmit(self, connection_id: int, packet: Packet, byte_count: int) -> None:
        """As `Endpoint.transmit`: server and broker are neighbours, and take no time for each other."""
        broker = self._world.broker
        broker.sent(connection_id, byte_count)
        match packet:
            case Publish():
                if packet.qos:
                    broker.received(connection_id, Puback(packet.packet_id))
                self._received(packet)
            case Connack():
                filters = tuple((pattern, 1) for pattern in self._topics.server_filters())
                broker.received(connection_id, Subscribe(1, filters))
            case Suback():
                self._is_connected = True
                self._attempts = 0
                self._post(BrokerConnected())

    def _received(self, packet: Publish) -> None:
        self._add("messages_received")
        if not packet.payload:
            return
        try:
            match self._topics.parse(packet.topic):
                case ReportTopic(device):
                    self._post(ReportReceived(device, decode_message(Report, packet.payload)))
                case LinkTopic(device):
                    self._post(LinkReceived(device, decode_message(Link, packet.payload).online))
                case RequestTopic(device):
                    self._post(RequestReceived(device, decode_request(packet.payload)))
        except WhimbrelError:
            self._add("messages_invalid")

    def _publish_documents(self) -> None:
        repository = self.store.repository
        for version, root in enumerate(repository.roots, start=1):
            self._retain(self._topics.root(version), root)
        documents = repository.documents
        for role, data in documents.delegated:
            self._retain(self._topics.metadata(role), data)
        self._retain(self._topics.metadata("targets"), documents.targets)
        self._retain(self._topics.metadata("snapshot"), documents.snapshot)
        self._retain(self._topics.metadata("timestamp"), documents.timestamp)

    def _chunk(self, name: Digest, index: int) -> bytes:
        return encode_chunk(name, index, self.blobs.read_chunk(name, index))

    def _retain(self, topic: str, payload: bytes) -> None:
        """The ordered lane: QoS 1, retained; dropped while there is no connection."""
        if self._is_connected:
            self._add("bytes_published", len(payload))
            packet = Publish(topic, payload, 1, retain=True, packet_id=1)
            self._world.broker.received(self._connection_id, packet)

    def _answer_chunks(self, device: DeviceId, name: Digest, chunks: Iterable[int]) -> None:
        if not self._is_connected:
            return
        for index in chunks:
            answer = (device, name, index)
            if answer in self._answers:
                continue
            if len(self._answers) >= ANSWERS_MAX:
                self._add("answers_dropped")
                continue
            try:
                payload = self._chunk(name, index)
            except StorageError:
                self._add("answers_missing")
                continue
            self._answers.add(answer)
            self._add("chunks_answered")

            def done(answer: tuple[DeviceId, Digest, int] = answer) -> None:
                self._answers.discard(answer)

            self._answer(self._topics.chunk_answer(device), payload, done)

    def _answer(self, topic: str, payload: bytes, done: Callable[[], None] = lambda: None) -> None:
        """The answer lane: QoS 0, at the rate of the server's line."""
        sent_us = self._line.carry(self._world.loop.now_us, len(payload))
        self._add("bytes_answered", len(payload))
        self._world.loop.at(sent_us, self._answered, self._connection_id, Publish(topic, payload), done)

    def _answered(self, connection_id: int, packet: Publish, done: Callable[[], None]) -> None:
        if connection_id and connection_id == self._connection_id:
            done()
            self._world.broker.received(connection_id, packet)

    def _add(self, counter: str, amount: int = 1) -> None:
        self.counters[counter] = self.counters.get(counter, 0) + amount
