"""The agent: events in, ordered effects out. It decides everything about an update and does nothing itself.

    effects = agent.handle(event, now_ms)      # carry them out in order, see `effects.py`
    agent.deadline()                           # send `DeadlineReached` then, unless an event comes first

Pure: no clock (`now_ms` is an argument), no entropy (`rng` is), no file, no socket. The table of states is `states.py`;
`update.py` says what happens on entering each, `fetching.py` gets what it needs, `manual.py` knows what an operator may ask for, `serving.py`
which slot answers. Every state can be re-entered from the durable record, so a power cut at any instant leads to a state that the table knows.
"""

import random
from collections.abc import Callable
from typing import Any

from device import events
from device.assignments import Assignments
from device.config import AgentConfig
from device.desk import Desk
from device.effects import Effect, Persist, Subscribe
from device.journal import Record
from device.manual import Manual
from device.policy import Hold
from device.ports import Trust
from device.serving import Serving
from device.states import State
from device.timekeeping import Timekeeping
from device.update import Update
from protocol import trust as trust_module
from protocol.chunks import Chunk, decode_chunk
from protocol.errors import ChunkError, WhimbrelError
from protocol.messages import KeyAnswer, MetadataBundle, ReceivedDesired, decode_desired, decode_message
from protocol.topics import (
    ChunkAnswerTopic,
    ChunkTopic,
    DesiredTopic,
    KeysTopic,
    MetadataAnswerTopic,
    MetadataTopic,
)


class Agent:
    """One device's side of every update.

    Args:
        config: Identity and limits.
        rng: Source of jitter; the only source of chance.
        trust: Verifies signed metadata.
    """

    def __init__(self, config: AgentConfig, rng: random.Random, trust: Trust = trust_module) -> None:
        self.config = config
        self._desk = Desk(config, rng, trust)
        self._serving = Serving(self._desk, self._on_settled, self._on_swap_failed)
        self._update: Update | None = None  # there is one from `Booted` on
        self._manual: Manual | None = None  # likewise
        self._assignments: Assignments | None = None  # likewise
        self._has_resumed = False  # the update that the boot found goes on
        self._handlers: dict[type, Callable[[Update, Any], None]] = {
            events.Connected: self._on_connected,
            events.Disconnected: self._on_disconnected,
            events.MessageReceived: self._on_message,
            events.KeysOpened: lambda update, event: update.fetching.keys_opened(event),
            events.BlobOpened: lambda update, event: update.fetching.blob_opened(event),
            events.BlobRead: lambda update, event: update.fetching.blob_read(event),
            events.Probed: self._on_probed,
            events.InstallProgressed: Update.install_progressed,
            events.SlotMeasured: self._on_measured,
            events.TrialFinished: lambda update, event: update.conclusion.trial_finished(event),
            events.ServingStarted: lambda _, event: self._serving.started(event),
            events.EffectFailed: self._on_effect_failed,
            events.OperatorAsked: lambda _, event: self._operator.asked(event),
            events.Conditions: self._on_conditions,
            events.DeadlineReached: self._on_deadline,
        }

    @property
    def state(self) -> State:
        """Where the update is."""
        return self._desk.state

    @property
    def _operator(self) -> Manual:
        assert self._manual is not None, "the first event is Booted"
        return self._manual

    @property
    def _wishes(self) -> Assignments:
        assert self._assignments is not None, "the first event is Booted"
        return self._assignments

    @property
    def record(self) -> Record:
        """What the agent holds to be true; durable once the `Persist` that carries it is."""
        return self._desk.ledger.record

    @property
    def serving(self) -> str:
        """The version that answers; empty while none does."""
        slot = self._serving.slot
        return self.record.slots[slot].version if slot is not None else ""

    @property
    def held(self) -> Hold | None:
        """Why the update under way does not go on, or why the next one would not begin."""
        return self._desk.held

    def handle(self, event: events.Event, now_ms: int) -> tuple[Effect, ...]:
        """Take note of a fact and say what has to be done, in order.

        Args:
            event: What happened. The first one must be `Booted`, and no other.
            now_ms: The instant, milliseconds since 1970; never before that of the call before.
        """
        self._desk.now_ms = now_ms
        if isinstance(event, events.Booted):
            self._boot(event)
        else:
            assert self._update is not None, "the first event is Booted"
            self._handlers[type(event)](self._update, event)
            self._serving.resume()
        return self._desk.take()

    def deadline(self) -> int | None:
        """The instant at which the agent wants to be woken, or `None`."""
        if self._update is None:
            return None
        candidates = (self._update.deadline(), self._serving.deadline_ms, self._wishes.deadline())
        return min((instant for instant in candidates if instant is not None), default=None)

    def _boot(self, event: events.Booted) -> None:
        assert self._update is None, "an agent boots once"
        desk = self._desk
        desk.ledger.boot(event.record, event.runtimes, event.memory_bytes)
        desk.time = Timekeeping(is_clock_set=event.is_clock_set)
        desk.begin(desk.ledger.record.state)
        self._update = Update(desk, self._serving, event.root)
        self._manual = Manual(desk, self._update, self._serving)
        self._assignments = Assignments(
            desk, self._update.fetching, self._update.request, self._update.try_unproven
        )
        if desk.is_rewriting:
            self._serving.wait()
            desk.emit(Persist(desk.ledger.record))
            self._on_settled()
            return
        self._serving.take_inventory()  # first: a disk that cannot be written must not keep the old version from answering
        desk.emit(Persist(desk.ledger.record))
        self._update.suspend()

    def _on_settled(self) -> None:
        """The engine answers, or cannot: finish what waited for it."""
        assert self._update is not None
        if self.state is State.COMMITTING:
            self._update.conclusion.committed()
        elif self.state is State.ROLLING_BACK and self._desk.ledger.update.is_recall:
            self._operator.settled()
        elif self.state is State.ROLLING_BACK:
            self._update.conclusion.restored()
        if not self._has_resumed:
            self._has_resumed = True
            self._update.resume_after_boot()

    def _on_swap_failed(self, code: str) -> None:
        assert self._update is not None
        self._update.conclusion.swap_failed(code)

    def _on_deadline(self, update: Update, _event: events.DeadlineReached) -> None:
        self._serving.timeout()
        update.timeout()
        self._wishes.look()

    def _on_conditions(self, update: Update, event: events.Conditions) -> None:
        before = self._desk.holds()
        self._desk.guard.take(event)
        if self._desk.holds() != before:
            update.reconsider(may_begin=self._has_resumed)
            self._wishes.look()

    def _on_connected(self, update: Update, _event: events.Connected) -> None:
        desk, device = self._desk, self.config.device
        desk.is_connected = True
        topics = desk.topics
        inbox = (topics.desired(device), topics.chunk_answer(device), topics.metadata_answer(device))
        desk.emit(Subscribe(inbox, 1))
        desk.report()
        update.connected()
        self._wishes.look()

    def _on_disconnected(self, update: Update, _event: events.Disconnected) -> None:
        self._desk.is_connected = False
        update.disconnected()

    def _on_probed(self, update: Update, event: events.Probed) -> None:
        if not self._serving.probed(event):
            update.probed(event)

    def _on_measured(self, update: Update, event: events.SlotMeasured) -> None:
        if not self._operator.measured(event):
            update.slot_measured(event)

    def _on_effect_failed(self, update: Update, event: events.EffectFailed) -> None:
        if not self._serving.failed(event) and not self._operator.failed(event):
            update.failed(event)

    def _on_message(self, update: Update, event: events.MessageReceived) -> None:
        """Nothing that the broker delivers is believed, and nothing malformed stops the agent."""
        try:
            message = self._decoded(event)
        except ChunkError:
            self._desk.ledger.tally.invalid_chunks += 1
            return
        except WhimbrelError:
            return  # an empty `desired` is a wish taken back; anything else malformed is nobody's wish
        match message:
            case Chunk():
                update.fetching.chunk_received(message)
            case ReceivedDesired():
                self._wishes.heard(message)
            case MetadataBundle():
                update.fetching.bundle_received(message)
            case KeyAnswer():
                update.fetching.keys_received(message)
            case (document, data):
                update.fetching.document_received(document, data)

    def _decoded(
        self, event: events.MessageReceived
    ) -> Chunk | ReceivedDesired | MetadataBundle | KeyAnswer | tuple[str, bytes] | None:
        """What a message says; `None` where it is not for us."""
        match self._desk.topics.parse(event.topic):
            case ChunkTopic() | ChunkAnswerTopic():
                return decode_chunk(event.payload)
            case DesiredTopic(device) if device == self.config.device:
                return decode_desired(event.payload)
            case MetadataTopic(document):
                return document, event.payload
            case MetadataAnswerTopic(device) if device == self.config.device:
                return decode_message(MetadataBundle, event.payload)
            case KeysTopic(device) if device == self.config.device:
                return decode_message(KeyAnswer, event.payload)
        return None
