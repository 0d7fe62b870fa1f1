"""The agent: events in, ordered effects out. It decides everything about an update and does nothing itself.

    effects = agent.handle(event, now_ms)      # carry them out in order, see `effects.py`
    agent.deadline()                           # send `DeadlineReached` then, unless an event comes first

Pure: no clock (`now_ms` is an argument), no entropy (`rng` is), no file, no socket. The table of states is `states.py`; this
module says what happens on entering each. Every state can be re-entered from the durable record, so a power cut
at any instant leads to one of the `_resume_…` methods and never to a state that the table does not know.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any, Final

from msgspec.structs import replace

from device import events
from device.admission import check_disk, check_quarantine, check_release_fits, plan_items
from device.config import AgentConfig
from device.download import Tally
from device.effects import (
    Effect,
    EmptySlot,
    InstallStep,
    MeasureSlot,
    Persist,
    PointCurrent,
    Probe,
    Publish,
    RemoveBlobs,
    SaveRoot,
    Serve,
    StartTrial,
    Subscribe,
    Trace,
)
from device.journal import InstallItem, Record, SlotRecord, UpdateRecord
from device.ledger import Ledger
from device.ports import ModelSource, TrialOrder
from device.slots import SlotHealth, SlotName
from device.states import RESTING, REVOCABLE, State, Trigger, fire
from device.sync import MetadataSync
from device.transfer import Artifact, Requester, Transfer
from device.trial import TRIES_MAX, Verdict, judge
from protocol.chunks import Chunk, decode_chunk
from protocol.errors import ReleaseError, WhimbrelError
from protocol.ids import Digest, Family, Version
from protocol.messages import Desired, MetadataBundle, TrialEvidence, decode_message, encode_message
from protocol.release import decode_release, release_digest, release_target
from protocol.topics import (
    ChunkAnswerTopic,
    ChunkTopic,
    DesiredTopic,
    MetadataAnswerTopic,
    MetadataTopic,
    Topics,
)
from protocol.trust import Target

ATTEMPTS_MAX: Final = 6
"""Times an update is begun before a failure that may pass is reported as final."""

RETRY_BASE_MS: Final = 5_000
RETRY_CAP_MS: Final = 600_000
"""Full jitter: a retry waits for a random time up to `RETRY_BASE_MS` doubled per attempt, at most this."""

JOB_TIMEOUT_MS: Final = 3_600_000
"""A worker that has not answered for an hour never will: hashing the largest file takes minutes."""

WRITES_MAX: Final = 200
"""State changes recorded for one update; more is a loop, whatever its reason."""


class Agent:
    """One device's side of every update.

    Args:
        config: Identity and limits.
        rng: Source of jitter; the only source of chance.
    """

    def __init__(self, config: AgentConfig, rng: random.Random) -> None:
        self.config = config
        self.state = State.IDLE
        self._ledger = Ledger(config)
        self._rng = rng
        self._topics = Topics(config.fleet)
        self._out: list[Effect] = []
        self._now_ms = 0
        self._entered_ms = 0
        self._connected = False
        self._sync: MetadataSync | None = None
        self._targets: dict[str, Target] = {}
        self._transfer: Transfer | None = None
        self._requester = Requester(self._topics, config.device, rng, config.groups_outstanding)
        self._serial = 0
        self._job = 0  # serial that the update waits for
        self._job_deadline_ms: int | None = None
        self._inventory = 0  # serial of the probe at boot
        self._serve = 0  # serial of the last `Serve`
        self._serving: SlotName | None = None
        self._has_resumed = False  # the update that the boot found goes on
        self._retry_ms: int | None = None
        self._pending: Desired | None = None  # arrived while the slot could not be given up
        self._handlers: dict[type, Callable[[Any], None]] = {
            events.Booted: self._on_booted,
            events.Connected: self._on_connected,
            events.Disconnected: self._on_disconnected,
            events.MessageReceived: self._on_message,
            events.BlobOpened: self._on_blob_opened,
            events.BlobRead: self._on_blob_read,
            events.Probed: self._on_probed,
            events.InstallProgressed: self._on_install_progressed,
            events.SlotMeasured: self._on_slot_measured,
            events.TrialFinished: self._on_trial_finished,
            events.ServingStarted: self._on_serving_started,
            events.EffectFailed: self._on_effect_failed,
            events.DeadlineReached: self._on_deadline,
        }

    @property
    def record(self) -> Record:
        """What the agent holds to be true; durable once the `Persist` that carries it is."""
        return self._ledger.record

    # --- the two verbs ------------------------------------------------------------------------------------

    def handle(self, event: events.Event, now_ms: int) -> tuple[Effect, ...]:
        """Take note of a fact and say what has to be done, in order.

        Args:
            event: What happened. The first one must be `Booted`.
            now_ms: The instant, milliseconds since 1970; never before that of the call before.
        """
        self._now_ms = now_ms
        self._handlers[type(event)](event)
        effects, self._out = tuple(self._out), []
        return effects

    def deadline(self) -> int | None:
        """The instant at which the agent wants to be woken, or `None`."""
        candidates = [self._retry_ms, self._job_deadline_ms]
        if self._sync is not None and self.state is State.SYNCING:
            candidates.append(self._sync.deadline_ms)
        if self._transfer is not None:
            candidates.append(self._transfer.deadline_ms)
        return min((instant for instant in candidates if instant is not None), default=None)

    # --- start ---------------------------------------------------------------------------------------------

    def _on_booted(self, event: events.Booted) -> None:
        self._ledger.boot(event.record, event.runtimes, event.memory_bytes)
        self.state = self._ledger.record.state
        self._entered_ms = self._now_ms
        self._sync = MetadataSync(self._topics, self.config.device, self._rng, event.root)
        self._emit(Persist(self._ledger.record))
        self._inventory = self._next_serial()
        self._emit(Probe(self._inventory, self._ledger.record.active))
        if self.state in {State.SYNCING, State.DOWNLOADING}:
            self._move(Trigger.SUSPENDED)

    def _resume_after_boot(self) -> None:
        """Go on from the durable state, once the old version answers again (or cannot)."""
        self._has_resumed = True
        match self.state:
            case State.INSTALLING:
                self._ask_install_step()
            case State.VERIFYING:
                self._ask_measurement()
            case State.TRIAL:
                self._begin_trial()
            case State.FAILED if self._ledger.update.retry:
                self._schedule_retry()

    def _on_inventory(self, event: events.Probed) -> None:
        """The active slot was measured at boot: serve it if it is what was signed, else what was there before."""
        self._ledger.files = event.files
        self._ledger.disk_free_bytes = event.disk_free_bytes
        if self._ledger.record.active is None:
            self._serving_settled()
        elif event.files == self._ledger.record.active_slot.files:
            self._ask_serve(self._ledger.record.active)
        else:
            self._abandon_active("slot.damaged")
        self._report()

    def _abandon_active(self, code: str) -> None:
        """The active slot cannot be served. Fall back to the other one if that one ever proved itself."""
        active = self._ledger.record.active
        assert active is not None
        if self._ledger.record.slots[active.other].health is not SlotHealth.GOOD:
            self._serving_settled()  # nothing better to offer; an update may still bring one
            return
        self._ledger.set_slot(active, replace(self._ledger.record.slots[active], health=SlotHealth.BAD))
        self._ledger.change(active=active.other)
        if self.state is State.COMMITTING:
            self._move(Trigger.SWAP_FAILED, code)
            self._ledger.quarantine()
            self._ledger.note(code=code, detail="the new version could not be served")
        self._persist()
        self._emit(PointCurrent(active.other))
        self._ledger.files = {}
        self._inventory = self._next_serial()
        self._emit(Probe(self._inventory, active.other))

    # --- connection ----------------------------------------------------------------------------------------

    def _on_connected(self, _event: events.Connected) -> None:
        self._connected = True
        topics, device = self._topics, self.config.device
        inbox = (topics.desired(device), topics.chunk_answer(device), topics.metadata_answer(device))
        self._emit(Subscribe(inbox, 1))
        self._report()
        if self.state is State.SUSPENDED:
            self._ledger.tally.resumes += 1
            if self._ledger.record.state is State.DOWNLOADING:
                self._move(Trigger.DOWNLOAD_RESUMED)
                self._begin_download()
            else:
                self._move(Trigger.SYNC_RESUMED)
                self._begin_sync()

    def _on_disconnected(self, _event: events.Disconnected) -> None:
        self._connected = False
        if self._sync is not None:
            self._sync.pause()
        if self._transfer is not None:
            self._transfer.pause()
        if self.state in {State.SYNCING, State.DOWNLOADING}:
            self._move(Trigger.SUSPENDED)

    def _on_message(self, event: events.MessageReceived) -> None:
        """Nothing that the broker delivers is believed, and nothing malformed stops the agent."""
        try:
            message = self._decoded(event)
        except WhimbrelError:
            self._ledger.tally.invalid_chunks += 1
            return
        if isinstance(message, Chunk):
            self._on_chunk(message)
        elif isinstance(message, Desired):
            self._on_desired(message)
        elif message is not None and self._sync is not None:
            if isinstance(message, MetadataBundle):
                self._sync.receive_bundle(message)
            else:
                self._extend(self._sync.receive(*message))
            self._try_metadata()

    def _decoded(
        self, event: events.MessageReceived
    ) -> Chunk | Desired | MetadataBundle | tuple[str, bytes] | None:
        """What a message says; `None` where it is not for us."""
        match self._topics.parse(event.topic):
            case ChunkTopic() | ChunkAnswerTopic():
                return decode_chunk(event.payload)
            case DesiredTopic(device) if device == self.config.device:
                return decode_message(Desired, event.payload)
            case MetadataTopic(document):
                return document, event.payload
            case MetadataAnswerTopic(device) if device == self.config.device:
                return decode_message(MetadataBundle, event.payload)
        return None

    # --- what should run -----------------------------------------------------------------------------------

    def _on_desired(self, desired: Desired) -> None:
        if desired.sequence <= self._ledger.record.desired_sequence:
            return  # repeated, or replayed
        if self.state not in RESTING + REVOCABLE:
            self._pending = desired
            return
        self._ledger.change(desired_sequence=desired.sequence)
        if (
            desired.family == self.config.family
            and desired.version == self._ledger.record.active_slot.version
        ):
            self._withdraw()
            return
        self._drop_work()
        self._ledger.tally = Tally()
        update = UpdateRecord(desired=desired, started_ms=self._now_ms)
        self._ledger.change(update=update)
        self._move(Trigger.REQUESTED)
        self._persist()
        self._report()
        if desired.family != self.config.family:
            self._refuse("admission.family", f"this device runs {self.config.family}, not {desired.family}")
            return
        self._begin_sync()

    def _withdraw(self) -> None:
        """What runs is what should run; an update under way is no longer wanted."""
        if self.state in (*REVOCABLE, State.FAILED):
            self._drop_work()
            self._ledger.note(
                outcome="failed", code="update.withdrawn", detail="another version was asked for", retry=False
            )
            self._ledger.note(finished_ms=self._now_ms)
            self._move(Trigger.WITHDRAWN)
            self._persist()
            self._emit(RemoveBlobs(frozenset()))
        else:
            self._persist()
        self._report()

    # --- syncing -------------------------------------------------------------------------------------------

    def _begin_sync(self) -> None:
        if not self._connected:
            self._move(Trigger.SUSPENDED)
            return
        assert self._sync is not None
        self._job = 0
        self._job_deadline_ms = None
        self._transfer = None
        self._extend(self._sync.begin(self._now_ms))

    def _try_metadata(self) -> None:
        """Believe a set of documents once it verifies and names the release; wait for more until then."""
        assert self._sync is not None
        if self.state is not State.SYNCING or self._transfer is not None:
            return
        documents = self._sync.documents()
        if documents is None:
            return
        verified = self._sync.verify(documents, self._ledger.record.floors, self._now_ms)
        if verified is None:
            return
        desired = self._ledger.update.desired
        target = verified.targets.get(release_target(Family(desired.family), Version(desired.version)))
        if target is None:
            self._sync.last_error = ReleaseError(
                f"{desired.family} {desired.version} is not in the signed metadata"
            )
            return
        # The floors are durable before anything is done with what the metadata says.
        is_newer_root = verified.floors.root > self._ledger.record.floors.root
        self._ledger.change(floors=verified.floors)
        self._persist()
        if is_newer_root:
            self._emit(SaveRoot(verified.root))
        self._extend(self._sync.end())
        self._targets = verified.targets
        description = Artifact(target.digest, target.length, target.custom.chunks)
        self._begin_transfer([description], read_last=True)

    def _begin_transfer(self, artifacts: list[Artifact], *, read_last: bool) -> None:
        self._transfer = Transfer(
            artifacts, self._requester, self._ledger.tally, self._ask, read_last=read_last
        )
        self._progress(self._transfer.resume(self._now_ms))

    def _progress(self, effects: Iterable[Effect]) -> None:
        """Something of the transfer moved; go on once all of it is there."""
        self._extend(effects)
        transfer = self._transfer
        if transfer is None or not transfer.is_finished or self.state is State.SUSPENDED:
            return
        self._transfer = None
        if transfer.content is not None:
            self._on_release(transfer.content)
        else:
            self._on_downloaded()

    def _on_release(self, data: bytes) -> None:
        """The signed description is there: judge it, then measure."""
        desired = self._ledger.update.desired
        try:
            release = decode_release(data)
            if (release.family, release.version) != (desired.family, desired.version):
                raise ReleaseError(f"description of {release.family} {release.version} under another name")
            sha256 = release_digest(release)
            check_quarantine(sha256, self._ledger.record.quarantine)
            check_release_fits(release, self.config, self._ledger.runtimes)
        except WhimbrelError as error:
            self._refuse(error.code, str(error))
            return
        self._ledger.note(release=release, release_sha256=sha256)
        self._move(Trigger.METADATA_VERIFIED)
        self._persist()
        self._ask_probe()

    # --- admitting -----------------------------------------------------------------------------------------

    def _ask_probe(self) -> None:
        self._emit(Probe(self._ask(), self._ledger.record.active))

    def _on_probed(self, event: events.Probed) -> None:
        if event.serial == self._inventory:
            self._on_inventory(event)
            return
        if not self._answers(event.serial):
            return
        self._ledger.files = event.files
        self._ledger.disk_free_bytes = event.disk_free_bytes
        try:
            items = plan_items(
                self._ledger.release,
                self._targets,
                event.files,
                self.config,
                full_only=self._ledger.update.full_only,
            )
            check_disk(items, event.disk_free_bytes, event.inactive_bytes, self.config)
        except WhimbrelError as error:
            self._refuse(error.code, str(error))
            return
        self._admit(items)

    def _admit(self, items: tuple[InstallItem, ...]) -> None:
        slot = self._ledger.record.active.other if self._ledger.record.active is not None else SlotName.A
        self._ledger.note(items=items, slot=slot)
        self._ledger.set_slot(slot, SlotRecord())
        self._move(Trigger.ADMITTED)
        self._persist()
        self._emit(
            EmptySlot(slot),
            RemoveBlobs(frozenset().union(*(artifact.blobs for artifact in _artifacts_of(items)))),
        )
        self._report()
        if self._connected:
            self._begin_download()
        else:
            self._move(Trigger.SUSPENDED)

    # --- downloading ---------------------------------------------------------------------------------------

    def _begin_download(self) -> None:
        """Fetch what the plan needs; what is on disk of it is found when each blob is opened."""
        if self._transfer is not None:
            self._progress(self._transfer.resume(self._now_ms))
        else:
            self._begin_transfer(_artifacts_of(self._ledger.update.items), read_last=False)

    def _on_blob_opened(self, event: events.BlobOpened) -> None:
        if self._answers(event.serial) and self._transfer is not None:
            self._progress(self._transfer.opened(event.present, self._now_ms, connected=self._connected))

    def _on_blob_read(self, event: events.BlobRead) -> None:
        if self._answers(event.serial) and self._transfer is not None:
            self._progress(self._transfer.read(event.data))

    def _on_chunk(self, chunk: Chunk) -> None:
        if self._transfer is not None:
            self._progress(self._transfer.receive(chunk, self._now_ms))

    def _on_downloaded(self) -> None:
        self._move(Trigger.DOWNLOADED)
        self._ledger.set_slot(self._ledger.slot, SlotRecord(health=SlotHealth.INSTALLING))
        self._persist()
        self._report()
        self._ask_install_step()

    # --- installing and verifying --------------------------------------------------------------------------

    def _ask_install_step(self) -> None:
        update = self._ledger.update
        limit = self.config.delta_memory_bytes_max
        self._emit(
            InstallStep(self._ask(), self._ledger.record.active, self._ledger.slot, update.items, limit)
        )

    def _on_install_progressed(self, event: events.InstallProgressed) -> None:
        if not self._answers(event.serial):
            return
        if not event.done:
            self._ask_install_step()
            return
        self._move(Trigger.INSTALLED)
        self._persist()
        self._ask_measurement()

    def _ask_measurement(self) -> None:
        self._emit(MeasureSlot(self._ask(), self._ledger.slot))

    def _on_slot_measured(self, event: events.SlotMeasured) -> None:
        if not self._answers(event.serial):
            return
        wanted = {file.name: file.sha256 for file in self._ledger.release.files}
        if event.files != wanted:
            self._delta_unusable("verify.mismatch", "the installed files are not the signed ones")
            return
        release = self._ledger.release
        self._ledger.set_slot(
            self._ledger.slot,
            SlotRecord(
                health=SlotHealth.VERIFIED,
                version=release.version,
                runtime=release.runtime,
                main_file=release.files[0].name,
                files=wanted,
            ),
        )
        self._move(Trigger.VERIFIED)
        self._report()
        self._begin_trial()

    def _delta_unusable(self, code: str, detail: str) -> None:
        """A delta did not lead to the signed file: begin again with whole files, once."""
        if self._ledger.update.full_only or not any(
            item.action == "delta" for item in self._ledger.update.items
        ):
            self._fail(code, detail, retryable=True)
            return
        self._ledger.note(full_only=True, code=code, detail=detail)
        self._drop_work()
        self._move(Trigger.DELTA_UNUSABLE, code)
        self._persist()
        self._report()
        self._begin_sync()

    # --- trial, commit, rollback ---------------------------------------------------------------------------

    def _begin_trial(self) -> None:
        """Count the try durably, then start: a model that takes the device down is counted too."""
        update, slot = self._ledger.update, self._ledger.slot
        if update.tries >= TRIES_MAX:
            self._conclude(Verdict("trial.crashed", f"{TRIES_MAX} trials did not come to an end"), None)
            return
        self._ledger.note(tries=update.tries + 1)
        self._ledger.set_slot(slot, replace(self._ledger.record.slots[slot], health=SlotHealth.ON_TRIAL))
        self._persist()
        file = self._ledger.record.slots[slot].main_file
        order = TrialOrder(
            ModelSource(self._ledger.release.runtime, ""),
            self._ledger.release.health,
            self.config.memory_bytes_max,
        )
        self._emit(StartTrial(self._ask(), slot, file, order))

    def _on_trial_finished(self, event: events.TrialFinished) -> None:
        if self._answers(event.serial):
            verdict = judge(event.evidence, self._ledger.release.health, self.config.memory_bytes_max)
            self._conclude(verdict, event.evidence)

    def _conclude(self, verdict: Verdict, evidence: TrialEvidence | None) -> None:
        slot = self._ledger.slot
        self._ledger.note(evidence=evidence, code=verdict.code, detail=verdict.detail)
        if verdict.passed:
            self._move(Trigger.TRIAL_PASSED)
            self._ledger.set_slot(slot, replace(self._ledger.record.slots[slot], health=SlotHealth.GOOD))
            self._ledger.change(active=slot)
            self._persist()  # the commit point: from here on the new slot is the active one
            self._ledger.files = dict(
                self._ledger.record.slots[slot].files
            )  # read back from the medium before the trial
            self._emit(PointCurrent(slot))
            self._ask_serve(slot)
            return
        self._move(Trigger.TRIAL_FAILED, verdict.code)
        self._ledger.quarantine()
        self._ledger.set_slot(slot, replace(self._ledger.record.slots[slot], health=SlotHealth.BAD))
        self._persist()
        self._report()
        if self._serving is self._ledger.record.active:
            self._restored()  # the old version never stopped answering

    def _ask_serve(self, slot: SlotName) -> None:
        record = self._ledger.record.slots[slot]
        self._serve = self._next_serial()
        self._emit(Serve(self._serve, slot, record.runtime, record.main_file))

    def _on_serving_started(self, event: events.ServingStarted) -> None:
        if event.serial == self._serve:
            self._serving = self._ledger.record.active
            self._serving_settled()

    def _serving_settled(self) -> None:
        """The engine answers, or cannot: finish what waited for it."""
        if self.state is State.COMMITTING:
            self._move(Trigger.COMMITTED)
            self._finish("committed")
        elif self.state is State.ROLLING_BACK:
            self._restored()
        if not self._has_resumed:
            self._resume_after_boot()

    def _restored(self) -> None:
        self._emit(EmptySlot(self._ledger.slot))
        self._ledger.set_slot(self._ledger.slot, SlotRecord(health=SlotHealth.BAD))
        self._move(Trigger.RESTORED)
        self._finish("rolled_back")

    # --- ends ----------------------------------------------------------------------------------------------

    def _refuse(self, code: str, detail: str) -> None:
        self._drop_work()
        self._ledger.note(code=code, detail=detail)
        self._move(Trigger.REFUSED, code)
        self._finish("rejected")

    def _fail(self, code: str, detail: str, *, retryable: bool) -> None:
        """Give up cleanly; try again later where that can help."""
        self._drop_work()
        retry = (
            retryable
            and self._ledger.update.attempts < ATTEMPTS_MAX
            and self._ledger.update.writes < WRITES_MAX
        )
        self._ledger.note(code=code, detail=detail, retry=retry)
        self._move(Trigger.FAILED, code)
        if retry:
            self._persist()
            self._report()
            self._schedule_retry()
        else:
            self._finish("failed")

    def _schedule_retry(self) -> None:
        longest_ms = min(RETRY_BASE_MS << self._ledger.update.attempts, RETRY_CAP_MS)
        self._retry_ms = self._now_ms + self._rng.randint(RETRY_BASE_MS // 5, longest_ms)

    def _retry(self) -> None:
        self._retry_ms = None
        self._ledger.note(retry=False, attempts=self._ledger.update.attempts + 1)
        self._move(Trigger.RETRIED)
        self._persist()
        self._report()
        self._begin_sync()

    def _finish(self, outcome: str) -> None:
        self._ledger.note(outcome=outcome, finished_ms=self._now_ms, retry=False)
        self._persist()
        self._emit(RemoveBlobs(frozenset()))
        self._report()
        if (pending := self._pending) is not None:
            self._pending = None
            self._on_desired(pending)

    def _drop_work(self) -> None:
        """Forget answers that are still to come, and the transfer; what is on disk stays."""
        self._job = 0
        self._job_deadline_ms = None
        self._retry_ms = None
        if self._transfer is not None:
            self._extend(self._transfer.stop())
            self._transfer = None
        if self._sync is not None:
            self._extend(self._sync.end())

    # --- trouble and time ----------------------------------------------------------------------------------

    def _on_effect_failed(self, event: events.EffectFailed) -> None:
        if event.serial and event.serial == self._serve:
            self._abandon_active("engine.failed")
        elif event.serial and event.serial == self._inventory:
            self._on_inventory(events.Probed(event.serial, {}, 0, 0))
        elif event.serial == 0 or self._answers(event.serial):
            self._on_update_failed(event)

    def _on_update_failed(self, event: events.EffectFailed) -> None:
        if self.state is State.TRIAL:
            self._conclude(Verdict(event.code, event.detail), None)
        elif event.code.startswith("patch.") and self.state is State.INSTALLING:
            self._delta_unusable(event.code, event.detail)
        elif self.state in REVOCABLE:
            self._fail(event.code, event.detail, retryable=event.is_retryable)
        elif self._ledger.record.update is not None and self._ledger.record.update.code != event.code:
            # The record could not be written in a state that cannot be left: say so once, and keep serving.
            self._ledger.note(code=event.code, detail=event.detail)
            self._report()

    def _on_deadline(self, _event: events.DeadlineReached) -> None:
        if self._retry_ms is not None and self._now_ms >= self._retry_ms and self.state is State.FAILED:
            self._retry()
        if self._job_deadline_ms is not None and self._now_ms >= self._job_deadline_ms:
            self._job_deadline_ms = None
            self._on_update_failed(
                events.EffectFailed(
                    self._job, "effect.timeout", "a worker did not answer for an hour", is_retryable=True
                )
            )
        for waiting in (self._sync if self.state is State.SYNCING else None, self._transfer):
            if waiting is None or waiting.deadline_ms is None or self._now_ms < waiting.deadline_ms:
                continue
            try:
                self._extend(waiting.timeout(self._now_ms))
            except WhimbrelError as error:
                self._fail(error.code, str(error), retryable=True)
                return

    # --- small things --------------------------------------------------------------------------------------

    def _emit(self, *effects: Effect) -> None:
        self._out.extend(effects)

    def _extend(self, effects: Iterable[Effect]) -> None:
        self._out.extend(effects)

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _ask(self) -> int:
        """Serial for an effect that the update waits for; answers to earlier ones no longer count."""
        self._job = self._next_serial()
        self._job_deadline_ms = self._now_ms + JOB_TIMEOUT_MS
        return self._job

    def _answers(self, serial: int) -> bool:
        if serial != self._job:
            return False
        self._job = 0
        self._job_deadline_ms = None
        return True

    def _move(self, trigger: Trigger, code: str = "") -> None:
        row = fire(self, trigger)
        self._ledger.spend(row.source, self._now_ms - self._entered_ms)
        self._entered_ms = self._now_ms
        self._emit(Trace(row, self._ledger.update.desired.version, code))

    def _persist(self) -> None:
        """Write the state down before acting on it."""
        self._emit(self._ledger.persist(self.state))

    def _report(self) -> None:
        if self._connected:
            payload = encode_message(self._ledger.report(self.state))
            self._emit(Publish(self._topics.report(self.config.device), payload, 1, retain=True))


def _artifacts_of(items: tuple[InstallItem, ...]) -> list[Artifact]:
    """What has to be fetched for a plan."""
    return [
        Artifact(Digest(item.blob), item.blob_length, item.tree) for item in items if item.tree is not None
    ]
