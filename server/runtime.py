"""The driver of the coordinator: one thread that takes events, has them decided, and carries the effects out.

Everything else - sockets, builds - happens in threads of the adapters, which only post events.
"""

import logging
import queue
import random
import secrets
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from typing import Any, Final, Self, TypeVar

import msgspec

from protocol.errors import MissingKeyError, RequestError, StorageError, TransportError, WhimbrelError
from protocol.ids import DeviceId, Digest
from protocol.messages import BUNDLE_BYTES_MAX, Desired, MetadataBundle, TimeStatement, encode_message
from protocol.topics import Topics
from protocol.trust import Target
from server.adapters.blobs import FolderBlobs, storage_errors
from server.adapters.clock import SystemClock
from server.adapters.keys import KeyFolder
from server.adapters.lock import FolderLock
from server.adapters.mqtt import MqttTransport
from server.adapters.store import SqlStore
from server.adapters.tls import client_context
from server.alerts.records import WebhookStanding
from server.bookkeeping import Bookkeeper
from server.broker.tcp import EmbeddedBroker
from server.config import ServerConfig
from server.content_keys import ContentKeys
from server.coordinator import Coordinator, CoordinatorLimits
from server.effects import (
    AnswerChunks,
    AnswerKeys,
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
from server.enrolment import Enrolment
from server.events import (
    BlobsRemoved,
    BrokerConnected,
    DeadlineReached,
    Event,
    IdentityEvent,
    LabelsChanged,
    MetadataChanged,
    RolloutOrdered,
    RolloutRequested,
    SigningFailed,
    Started,
)
from server.home import BLOBS_FOLDER, KEYS_FOLDER, LOCK_FILE, write_metadata
from server.ports import Clock, ContentKeyRemoval, Record, Repository
from server.releases.builders import BuildPool
from server.releases.catalog import Catalog
from server.releases.publisher import Publisher
from server.rollouts.records import Labels
from server.rollouts.states import RolloutState

_LOG: Final = logging.getLogger(__name__)
_T = TypeVar("_T")

POLL_S: Final = 0.25
"""How often the store is asked for what other processes changed."""

EVENTS_MAX: Final = 10_000
"""Events that wait; beyond it the threads that post wait, and with them the broker."""

BATCH_EVENTS_MAX: Final = 256
"""Events whose records share one transaction: a durable write costs milliseconds, a decision microseconds."""

BUNDLE_ROOTS_MAX: Final = 16
"""Roots in one metadata answer; a device keeps what it could verify, and asks again for the next."""

SIGNING_RETRY_MS: Final = 600_000


class Server:
    """A server on one folder; runs once, from `start` to `stop`.

    Args:
        config: Its settings.
        clock: Wall clock.
        seed: For waits and the client id; None takes one from the system.
    """

    def __init__(self, config: ServerConfig, *, clock: Clock | None = None, seed: int | None = None) -> None:
        self.config = config
        self._clock = clock or SystemClock()
        self._rng = random.Random(secrets.randbits(64) if seed is None else seed)  # noqa: S311 - waits, no secrets
        self._events: queue.Queue[Event | IdentityEvent] = queue.Queue(EVENTS_MAX)
        self._is_stopping = threading.Event()
        self._has_stopped = threading.Event()
        self._lock = threading.Lock()  # around the coordinator
        self._topics = Topics(config.fleet)
        self._coordinator = Coordinator(
            CoordinatorLimits(
                retained_bytes_max=config.retained_bytes_max,
                delta_grace_ms=config.delta_grace_ms,
                keeps_history=True,
            )
        )
        self._folder_lock: FolderLock | None = None
        self._store: SqlStore | None = None
        self._broker: EmbeddedBroker | None = None
        self._transport: MqttTransport | None = None
        self._thread: threading.Thread | None = None
        self._changes = -1
        self._has_unread_keys = False
        self._books: Bookkeeper | None = None
        self._known_labels: list[Labels] = []
        self._records_saved = 0
        self._transactions = 0
        self._deltas_signed = 0
        self._deltas_retired = 0
        self._failure: BaseException | None = None

    # Life

    def start(self) -> None:
        """Open the folder, start or find the broker, and serve in the background.

        A broker that is not there is no error: the server keeps trying, see `broker_error`.

        Raises:
            RequestError: No repository here, another server runs on it, or a setting is wrong.
            PortInUseError: The embedded broker cannot listen.
            ExpiredMetadataError: Metadata has expired and the key to sign it again is missing.
        """
        folder = self.config.folder
        address = self.config.address
        with storage_errors(folder):
            if not folder.is_dir():
                raise RequestError(f"{folder} holds no repository", hint=f"run `whimbrel init {folder}`")
        self._folder_lock = FolderLock(folder / LOCK_FILE)
        try:
            self._store = SqlStore(self.config.database_url)
            self._store.check()
            self._blobs = FolderBlobs(folder / BLOBS_FOLDER)
            self._blobs.sweep(self._clock.now_ms())
            self._content_keys = ContentKeys(folder / KEYS_FOLDER, self._store, self._blobs)
            self._publisher = Publisher(KeyFolder(folder / KEYS_FOLDER).load())
            self._enrolment = Enrolment(self._store, self.config, self._clock)
            chance = random.Random(self._rng.random())  # noqa: S311 - waits, no secrets
            self._books = Bookkeeper(self._store, self.config, self._clock, chance)
            started = self._load()
            if address == "embedded":
                self._broker = EmbeddedBroker(port=self.config.port)
                address = ("127.0.0.1", self._broker.start_in_thread())
            self._books.start(started)
        except BaseException:
            self._release()
            raise
        self._address = address
        self._builds = BuildPool(
            folder / BLOBS_FOLDER,
            self.config.delta_workers,
            self.config.delta_timeout_s,
            self._post,
            self._content_keys.encrypt_delta,
        )
        self._transport = MqttTransport(
            *address,
            self.config.fleet,
            self._blobs.read_chunk,
            self._post,
            random.Random(self._rng.random()),  # noqa: S311 - waits, no secrets
            tls=None if self.config.tls is None else partial(client_context, folder, self.config.tls),
            open_report=self._enrolment.open_report,
            certify=self._post,
        )
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="whimbrel-server", daemon=True
        )
        self._thread.start()
        self._transport.start()

    def stop(self) -> None:
        """Finish what is being sent, end builds, and close everything; harmless when it does not run."""
        if self._thread is None or self._transport is None:
            return
        self._is_stopping.set()
        self._thread.join()
        self._transport.stop()
        self._builds.stop()
        self._thread = None
        self._opened_books.note_end(self._failure)
        self._release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # From any thread

    @property
    def broker_address(self) -> tuple[str, int]:
        """Host and port of the broker in use."""
        return self._address

    @property
    def broker_port(self) -> int:
        """Port of the broker in use."""
        return self._address[1]

    @property
    def broker(self) -> EmbeddedBroker | None:
        """The embedded broker, for its statistics; None with another one."""
        return self._broker

    @property
    def broker_error(self) -> str:
        """Why there is no connection to the broker; empty while there is one."""
        return self._transport.last_error if self._transport else ""

    @property
    def failure(self) -> BaseException | None:
        """What ended the server from inside: a disk that is full, or a bug of ours."""
        return self._failure

    def wait_connected(self, timeout_s: float) -> None:
        """Wait for the broker.

        Raises:
            TransportError: It was not there in time.
        """
        if self._transport is None or not self._transport.wait_connected(timeout_s):
            host, port = self._address
            raise TransportError(
                self.broker_error or f"broker {host}:{port} does not answer", hint="is it running?"
            )

    def wait_stopped(self, timeout_s: float) -> bool:
        """Wait until the server ended by itself, see `failure`; false when the time ran out."""
        return self._has_stopped.wait(timeout_s)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the broker."""
        return bool(self._transport and self._transport.is_connected)

    def look(self, read: Callable[[Coordinator], _T]) -> _T:
        """What `read` makes of the coordinator, between two batches of events; it must neither change nor keep it."""
        with self._lock:
            return read(self._coordinator)

    def status(self) -> dict[str, Any]:
        """A consistent picture for people and programs: rollouts, devices, the cache, counters."""
        with self._lock:
            coordinator = self._coordinator
            states: dict[str, int] = {}
            versions: dict[str, int] = {}
            online = 0
            for device in coordinator.registry:
                if device.report is not None:
                    states[device.report.state] = states.get(device.report.state, 0) + 1
                    name = f"{device.family} {device.version}".strip()
                    versions[name] = versions.get(name, 0) + 1
                online += device.is_online
            rollouts = [
                {**msgspec.to_builtins(campaign.record), "counts": campaign.counts()}
                for campaign in coordinator.campaigns.values()
            ]
            picture = {
                "is_connected": self.is_connected,
                "devices": len(coordinator.registry),
                "devices_online": online,
                "states": states,
                "versions": versions,
                "rollouts": rollouts,
                "cached_blobs": len(coordinator.cached),
                "cached_bytes": sum(coordinator.cached.values()),
            }
        return picture | {"counters": self.counters()}

    def counters(self) -> dict[str, int]:
        """Figures since the start."""
        counters = asdict(self._transport.counters) if self._transport else {}
        return counters | {
            "records_saved": self._records_saved,
            "transactions": self._transactions,
            "deltas_signed": self._deltas_signed,
            "deltas_retired": self._deltas_retired,
        }

    def webhooks(self) -> list[tuple[WebhookStanding, dict[str, int]]]:
        """How it goes with each webhook, and what became of its attempts since the start."""
        return self._opened_books.webhooks()

    # The loop

    def _post(self, event: Event | IdentityEvent) -> None:
        while not self._is_stopping.is_set():
            try:
                self._events.put(event, timeout=POLL_S)
            except queue.Full:
                continue
            return

    def _run(self, started: Started) -> None:
        try:
            self._handle([started])
            while not self._is_stopping.is_set():
                events = self._take()
                if events:
                    self._handle([event for event in events if not isinstance(event, IdentityEvent)])
                    self._see_to_identities(events)
                self._poll_store()
                if self._opened_books.is_chore_due():
                    self._opened_books.drop_old()
                    self._opened_books.remind(self._publisher, self._repository)
        except BaseException as error:  # noqa: BLE001 - shown by whoever waits for the server
            self._failure = error
            self._is_stopping.set()
            level = logging.ERROR if isinstance(error, WhimbrelError) else logging.CRITICAL
            _LOG.log(level, "the server ends: %s", error, exc_info=level is logging.CRITICAL)
        finally:
            self._has_stopped.set()

    def _take(self) -> list[Event | IdentityEvent]:
        """Events that wait, or one that comes before the next deadline or poll."""
        now_ms = self._clock.now_ms()
        deadline_ms = self._coordinator.deadline()
        wait_s = POLL_S if deadline_ms is None else min(POLL_S, (deadline_ms - now_ms) / 1000)
        events: list[Event | IdentityEvent] = []
        try:
            if wait_s <= 0:
                events.append(DeadlineReached())
            else:
                events.append(self._events.get(timeout=wait_s))
            while len(events) < BATCH_EVENTS_MAX:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        return events

    def _see_to_identities(self, events: list[Event | IdentityEvent]) -> None:
        """Answer those who ask for certificates; after a connect, what came of claims is retained again."""
        assert self._transport is not None
        for event in events:
            if isinstance(event, IdentityEvent):
                self._enrolment.handle(event, self._transport)
            elif isinstance(event, BrokerConnected):
                self._enrolment.publish(self._transport)

    def _handle(self, events: list[Event]) -> None:
        """Decide a batch and carry it out; all records are durable before anything leaves."""
        now_ms = self._clock.now_ms()
        while events:
            effects: list[Effect] = []
            with self._lock:
                for event in events:
                    effects += self._coordinator.handle(event, now_ms)
            records: list[Record] = [effect.record for effect in effects if isinstance(effect, Save)]
            if records:
                traces = self._opened_books.traces(records, now_ms)
                self._opened.save([*records, *traces])
                self._opened_books.saved(traces)
                self._records_saved += len(records)
                self._transactions += 1
            events = [follower for effect in effects if (follower := self._carry_out(effect)) is not None]

    def _carry_out(self, effect: Effect) -> Event | None:
        """One effect; what it leads to at once comes back as an event."""
        transport = self._transport
        assert transport is not None
        match effect:
            case PublishDesired(device, desired):
                self._wish(device, desired)
            case PublishMetadata():
                transport.publish_documents(self._repository)
            case CacheBlob(name, chunk_count):
                transport.cache_blob(name, chunk_count)
            case UncacheBlob(name, chunk_count):
                transport.uncache_blob(name, chunk_count)
            case AnswerChunks(device, name, chunks):
                transport.answer_chunks(device, name, chunks)
            case AnswerMetadata(device, root_version, roles, nonce):
                time = self._attested(device, nonce)
                transport.answer_metadata(device, bundle(self._repository, root_version, roles, time))
            case AnswerKeys(device, blobs):
                recipients = self._enrolment.public_keys(device)
                answer = self._content_keys.answer(self.config.fleet, device, blobs, recipients)
                transport.answer_keys(device, answer)
            case BuildDelta(name, base_files, result_files):
                self._builds.build(name, base_files, result_files)
            case RemoveBlobs(path, names):
                return self._remove(path, names)
            case SignMetadata():
                return self._sign(effect)
        return None

    def _wish(self, device: DeviceId, desired: Desired | None) -> None:
        """Retain what a device should run; a wish that cannot be signed is not sent, since no device would take it."""
        assert self._transport is not None
        payload = b""
        try:
            if desired is not None:
                topic = self._topics.desired(device)
                payload = self._director.seal(topic, desired, self._clock.now_ms())
        except MissingKeyError as error:
            _LOG.error("%s is not asked: %s", device, error)
            return
        self._transport.publish_desired(device, payload)

    def _attested(self, device: DeviceId, nonce: bytes) -> TimeStatement | None:
        """What time it is, for a device that asked."""
        try:
            return self._director.attest(self._topics.metadata_answer(device), nonce, self._clock.now_ms())
        except MissingKeyError as error:
            _LOG.error("%s is not told the time: %s", device, error)
            return None

    # Store and signatures

    @property
    def _opened(self) -> SqlStore:
        assert self._store is not None
        return self._store

    @property
    def _opened_books(self) -> Bookkeeper:
        assert self._books is not None
        return self._books

    def _load(self) -> Started:
        store = self._opened
        self._changes = store.changes()
        try:
            catalog = self._catalog(self._signed((), ()))
        except MissingKeyError as error:
            repository = store.repository()
            assert repository is not None
            catalog = self._catalog(repository)  # refuses what has expired
            self._opened_books.cannot_sign(error)
        return Started(
            catalog=catalog,
            devices=store.devices(),
            rollouts=store.rollouts(),
            members=store.members(),
            refusals=store.refusals(),
            idle=store.idle_deltas(),
            cached=store.cached(),
            labels=self._labels(),
            orders=[order for order in store.orders() if not order.answer],
        )

    def _labels(self) -> list[Labels]:
        self._known_labels = self._opened.labels()
        return self._known_labels

    def _sign(self, effect: SignMetadata) -> Event:
        try:
            repository = self._signed(effect.added, effect.retired)
        except (RequestError, StorageError) as error:
            self._opened_books.cannot_sign(error)
            return SigningFailed(effect.deltas, self._clock.now_ms() + SIGNING_RETRY_MS)
        if not (effect.added or effect.retired):
            self._opened_books.remind(self._publisher, self._repository)
        self._deltas_signed += len(effect.deltas)
        self._deltas_retired += len(effect.retired)
        return MetadataChanged(self._catalog(repository))

    def _reload_keys(self) -> None:
        """What another process signed may have changed who signs. A file that goes at this very moment is no reason to stay with the old ones."""
        try:
            self._publisher = Publisher(KeyFolder(self.config.folder / KEYS_FOLDER).load())
            self._has_unread_keys = False
        except WhimbrelError as error:
            if not self._has_unread_keys:
                _LOG.warning("keys are not read yet: %s", error)
            self._has_unread_keys = True

    def _remove(self, path: str, names: tuple[Digest, ...]) -> Event | None:
        """Remove blobs that nothing signed needs; what cannot be removed now is removed after the next start."""
        drafts = {file.sha256 for record in self._opened.releases() for file in record.release.files}
        try:
            for name in names:
                if name not in drafts:
                    self._blobs.remove(name)
            act = self._opened_books.removed(path, len(names))
            self._opened.save([*(ContentKeyRemoval(blob=name) for name in names), act])
        except StorageError as error:
            _LOG.warning("a retired delta is still on the disk: %s", error)
            return None
        return BlobsRemoved(path)

    def _signed(self, added: tuple[Target, ...], retired: tuple[str, ...]) -> Repository:
        """Sign what changed, or what expires soon, over whatever another process signed last."""
        now_ms = self._clock.now_ms()

        def update(before: Repository) -> Repository:
            if added or retired:
                return self._publisher.publish(before, added, retired, now_ms).repository
            return self._publisher.refresh(before, now_ms).repository

        repository = self._opened.sign(update, traces=self._opened_books.signing(added, retired))
        write_metadata(self.config.folder, repository)
        return repository

    def _catalog(self, repository: Repository) -> Catalog:
        self._repository = repository
        self._director = self._publisher.director(repository)
        published = self._publisher.checked(repository, self._clock.now_ms())
        releases = [record.release for record in self._opened.releases() if record.published_ms is not None]
        return Catalog.of(published.targets, releases, published.refresh_ms, self._director.keyid)

    def _poll_store(self) -> None:
        """Notice what commands of other processes, or of other threads, put into the store."""
        changes = self._opened.changes()
        if changes == self._changes and not self._has_unread_keys:
            return
        self._changes = changes
        assert self._transport is not None
        self._enrolment.refresh(self._transport)
        events: list[Event] = []
        repository = self._opened.repository()
        if repository is not None and (repository != self._repository or self._has_unread_keys):
            self._reload_keys()
            events.append(MetadataChanged(self._catalog(repository)))
        known = self._coordinator.campaigns
        events += [
            RolloutRequested(record)
            for record in self._opened.rollouts()
            if record.id not in known and record.state is RolloutState.CREATED
        ]
        labels = self._known_labels
        if self._labels() != labels:
            events.append(LabelsChanged(self._known_labels))
        events += [RolloutOrdered(order) for order in self._opened.orders() if not order.answer]
        self._handle(events)

    def _release(self) -> None:
        if self._broker is not None:
            self._broker.close()
        if self._books is not None:
            self._books.stop()
        if self._store is not None:
            self._store.close()
        if self._folder_lock is not None:
            self._folder_lock.release()
        self._folder_lock = None


def bundle(
    repository: Repository,
    root_version: int,
    roles: Collection[str] = (),
    time: TimeStatement | None = None,
) -> bytes:
    """The answer to a device whose newest trusted root is `root_version`; as many roots as fit, and at least one."""
    documents = repository.documents
    delegated = {role: data for role, data in documents.delegated if role in roles}
    roots = list(repository.roots[root_version : root_version + BUNDLE_ROOTS_MAX])
    while True:
        payload = encode_message(
            MetadataBundle(
                roots=roots,
                timestamp=documents.timestamp,
                snapshot=documents.snapshot,
                targets=documents.targets,
                delegated=delegated,
                time=time,
            )
        )
        if len(payload) <= BUNDLE_BYTES_MAX or len(roots) <= 1:
            return payload
        roots = roots[: len(roots) // 2]
