"""One update from the wish to its end: what happens on entering each state of the table. Pure.

What comes from the air is for `fetching.py`, the trial and what follows from it for `conclusion.py`. Syncing and admitting decide whether it
can succeed; downloading and installing leave the active slot alone, or what they take from it can be put back; the trial decides; the commit
point is one durable record. `agent.py` says which event leads here.
"""

import dataclasses
from typing import Final

from device import events
from device.admission import (
    Running,
    check_memory,
    check_quarantine,
    check_release_fits,
    model_bytes,
    plan_update,
)
from device.assignments import Assignment, check_wish, is_news
from device.conclusion import Conclusion
from device.desk import Desk
from device.download import Tally
from device.effects import (
    EmptySlot,
    InstallStep,
    MeasureSlot,
    Probe,
    RemoveBlobs,
)
from device.fetching import Fetching, artifacts_of
from device.journal import InstallItem, SlotRecord, UpdateRecord
from device.policy import Step
from device.retrying import retry_wait_ms
from device.serving import Serving
from device.slots import SlotHealth, SlotName
from device.states import RESTING, REVOCABLE, State, Trigger
from device.trial import Verdict
from protocol.director import ForgedDesiredError
from protocol.errors import ExpiredMetadataError, ReleaseError, WhimbrelError
from protocol.messages import ReceivedDesired
from protocol.release import decode_release, release_digest

ATTEMPTS_MAX: Final = 6
"""Times an update is begun before a failure that may pass is reported as final."""

UNPROVEN_BYTES_MAX: Final = 4_096
"""A wish that is kept as it came until it is known who may wish; real ones have 100 bytes."""

WRITES_MAX: Final = 200
"""State changes recorded for one update; more is a loop, whatever its reason."""


class Update:
    """The update under way, or the wait for one.

    Args:
        desk: Shared with the other parts.
        serving: Which slot answers.
        root: The newest trusted root document.
    """

    def __init__(self, desk: Desk, serving: Serving, root: bytes) -> None:
        self._desk = desk
        self._ledger = desk.ledger
        self._serving = serving
        self.fetching = Fetching(
            desk, root, self._is_still_wanted, self._on_release, self._on_downloaded, self._on_keys_refused
        )
        self.conclusion = Conclusion(desk, serving, self.finish)
        self._retry_ms: int | None = None
        self._told: tuple[int, str, str] | None = None  # trouble that was reported although it is not durable
        self._pending: Assignment | None = None  # arrived while the slot could not be given up

    # --- time and connection -------------------------------------------------------------------------------

    def deadline(self) -> int | None:
        """When to call `timeout`."""
        candidates = (self._retry_ms, self._desk.job_deadline_ms, self.fetching.deadline())
        return min((instant for instant in candidates if instant is not None), default=None)

    def timeout(self) -> None:
        """Some deadline has passed."""
        now_ms = self._desk.now_ms
        if self._retry_ms is not None and now_ms >= self._retry_ms and self._desk.state is State.FAILED:
            self._retry()
        if self._desk.job_deadline_ms is not None and now_ms >= self._desk.job_deadline_ms:
            self._desk.drop_question()
            self.failed(
                events.EffectFailed(0, "effect.timeout", "a worker did not answer", is_retryable=True)
            )
        try:
            self.fetching.timeout()
        except WhimbrelError as error:
            self._fail(error.code, str(error), retryable=True)

    def connected(self) -> None:
        """Go on with what needs the network."""
        if self._desk.state is not State.SUSPENDED or not self._desk.may_fetch:
            return
        if self._desk.is_fetched and self._desk.hold(Step.INSTALL) is not None:
            return
        self._desk.is_fetched = False
        self._ledger.tally.resumes += 1
        # How long it was away cannot be told by a clock that is wrong: it may stand still.
        if (
            self._ledger.record.state is State.DOWNLOADING
            and self._desk.is_clock_right
            and self._is_current()
        ):
            self._desk.move(Trigger.DOWNLOAD_RESUMED)
            self.fetching.download(self._ledger.update.items)
        else:
            self._desk.move(Trigger.SYNC_RESUMED)
            self._begin_sync()

    def _is_current(self) -> bool:
        """Whether the metadata that a plan was made from still holds; what was away for longer looks again (SPEC 8, 2)."""
        time_ms = self._desk.time_ms
        return time_ms is not None and time_ms < self._ledger.update.current_until_ms

    def disconnected(self) -> None:
        """Wait; the disk keeps what came."""
        self.fetching.pause()
        self.suspend()

    def suspend(self) -> None:
        """Without a connection, what needs one waits."""
        if self._desk.state in {State.SYNCING, State.DOWNLOADING}:
            self._desk.move(Trigger.SUSPENDED)

    def hold(self) -> None:
        """Nothing new is to begin, for now. What a worker does at this moment comes to its end."""
        if self._desk.hold(Step.FETCH) is None:
            return
        self._retry_ms = None
        self.fetching.hold()
        self.suspend()

    def go_on(self, *, may_begin: bool = True) -> None:
        """Something may begin again.

        Args:
            may_begin: Whether the update that the boot found goes on already; else only what needs the network does.
        """
        if (pending := self._pending) is not None and self._desk.state in RESTING + REVOCABLE:
            self._pending = None
            self.request(pending)
        self.connected()
        if may_begin and not self._desk.is_waiting and self._retry_ms is None:
            self._resume()

    def reconsider(self, *, may_begin: bool) -> None:
        """The conditions of the device hold something else than before.

        Args:
            may_begin: As for `go_on`.
        """
        self.hold()
        self.go_on(may_begin=may_begin)
        if self._desk.state not in RESTING:
            self._desk.report()

    def resume_after_boot(self) -> None:
        """Go on from the durable state, once the old version answers again (or cannot)."""
        self._resume()
        update = self._ledger.record.update
        if self._desk.state in RESTING and (update is None or not update.retry):
            self._tidy()  # a power cut may bring back what was removed

    def _resume(self) -> None:
        """Go on from a state that needs no network."""
        match self._desk.state:
            case State.INSTALLING:
                self._ask_install_step()
            case State.VERIFYING:
                self._ask_measurement()
            case State.TRIAL:
                self.conclusion.begin_trial()
            case State.FAILED if self._ledger.update.retry:
                self._schedule_retry()

    # --- what should run -----------------------------------------------------------------------------------

    def request(self, assignment: Assignment) -> None:
        """A wish arrived; older and repeated ones change nothing, and neither do leaps (`DESIRED_LEAP_MAX`)."""
        if not is_news(self._desk, assignment):
            return
        if self._desk.state not in RESTING + REVOCABLE or self._desk.is_paused:
            self._pending = assignment
            return
        desired, signer = assignment.desired, assignment.signer
        self._ledger.count(signer, desired.sequence)
        family = self._desk.config.family
        if (desired.family, desired.version) == (family, self._ledger.record.active_slot.version):
            self._withdraw()
            return
        self._start(
            UpdateRecord(
                desired=desired, started_ms=self._desk.now_ms, signer=signer, expires_ms=assignment.expires_ms
            )
        )

    def try_unproven(self, received: ReceivedDesired) -> bool:
        """A wish arrived, and it is not known yet who may wish: the metadata of its update says so. Whether it is taken so far."""
        desired, record = received.desired, self._ledger.record
        if record.update is not None and record.update.finished_ms is None:
            return record.update.unproven == received
        is_news = desired.sequence > record.desired_sequence and desired.version != record.active_slot.version
        if self._desk.state not in RESTING or self._desk.is_paused or not is_news:
            return False
        if len(received.signed) > UNPROVEN_BYTES_MAX:
            return False
        self._start(UpdateRecord(desired=desired, started_ms=self._desk.now_ms, unproven=received))
        return True

    def _start(self, update: UpdateRecord) -> None:
        self._drop_work()
        if self._ledger.record.update is not None and self._ledger.update.finished_ms is None:
            self._ledger.note(
                outcome="failed", code="update.replaced", detail="another version was asked for"
            )
            self._ledger.remember(self._desk.now_ms)
        self._ledger.tally = Tally()
        self._ledger.change(update=update)
        self._desk.move(Trigger.REQUESTED)
        self._desk.persist()
        self._desk.report()
        if update.desired.family != self._desk.config.family:
            self._refuse(
                "admission.family",
                f"this device runs {self._desk.config.family}, not {update.desired.family}",
            )
            return
        self._begin_sync()

    def _withdraw(self) -> None:
        """What runs is what should run; an update under way is no longer wanted."""
        if self._desk.state in (*REVOCABLE, State.FAILED):
            self._drop_work()
            self._ledger.note(
                outcome="failed", code="update.withdrawn", detail="another version was asked for"
            )
            self._ledger.note(finished_ms=self._desk.now_ms, retry=False)
            self._ledger.remember(self._desk.now_ms)
            self._desk.move(Trigger.WITHDRAWN)
            self._desk.persist()
            self._tidy()
        else:
            self._desk.persist()
        self._desk.report()

    # --- syncing -------------------------------------------------------------------------------------------

    def _begin_sync(self) -> None:
        if not self._desk.may_fetch:
            self._desk.move(Trigger.SUSPENDED)
            return
        self.fetching.sync()

    def _is_still_wanted(self, time_ms: int) -> bool:
        """Newer metadata was verified: whether the wish still counts by it."""
        try:
            check_wish(self._desk, time_ms)
        except ForgedDesiredError as error:
            self._refuse(error.code, error.message)
            return False
        except ExpiredMetadataError as error:
            self._fail(error.code, error.message, retryable=error.is_retryable)
            return False
        return True

    def _on_release(self, data: bytes) -> None:
        """The signed description is there: judge it, then measure."""
        desired = self._ledger.update.desired
        try:
            release = decode_release(data)
            if (release.family, release.version) != (desired.family, desired.version):
                raise ReleaseError(f"description of {release.family} {release.version} under another name")
            sha256 = release_digest(release)
            check_quarantine(sha256, self._ledger.record.quarantine)
            check_release_fits(release, self._desk.config, self._ledger.runtimes)
        except WhimbrelError as error:
            self._refuse(error.code, str(error))
            return
        self._ledger.note(release=release, release_sha256=sha256)
        self._desk.move(Trigger.METADATA_VERIFIED)
        self._desk.persist()
        self._ask_probe()

    # --- admitting -----------------------------------------------------------------------------------------

    def _ask_probe(self) -> None:
        self._desk.emit(Probe(self._desk.ask(), self._ledger.record.active))

    def probed(self, event: events.Probed) -> None:
        """The device measured itself: plan, or refuse."""
        if not self._desk.answers(event.serial):
            return
        self._ledger.files = event.files
        self._ledger.disk_free_bytes = event.disk_free_bytes
        config, active = self._desk.config, self._ledger.record.active_slot
        running = Running(active.version, active.memory_bytes or event.active_bytes)
        try:
            decoder_bytes = check_memory(self._ledger.release, running, config, self._ledger.memory_bytes)
            items = plan_update(
                self._ledger.release,
                self.fetching.targets,
                event.files,
                dataclasses.replace(config, delta_memory_bytes_max=decoder_bytes),
                available_bytes=event.disk_free_bytes + event.inactive_bytes,
                full_only=self._ledger.update.full_only,
            )
        except WhimbrelError as error:
            self._refuse(error.code, str(error))
            return
        self._admit(items)

    def _admit(self, items: tuple[InstallItem, ...]) -> None:
        slot = self._ledger.record.active.other if self._ledger.record.active is not None else SlotName.A
        self._ledger.note(items=items, slot=slot)
        self._ledger.set_slot(slot, SlotRecord())
        self._desk.move(Trigger.ADMITTED)
        self._desk.persist()
        self._desk.emit(
            EmptySlot(slot),
            RemoveBlobs(frozenset().union(*(each.blobs for each in artifacts_of(items)))),
        )
        self._desk.report()
        if self._desk.may_fetch:
            self.fetching.download(self._ledger.update.items)
        else:
            self._desk.move(Trigger.SUSPENDED)

    # --- downloading ---------------------------------------------------------------------------------------

    def _on_downloaded(self) -> None:
        if not self._is_current():
            self._desk.move(Trigger.SUSPENDED)
            self.connected()  # looks again; what was fetched stays
            return
        if self._ledger.update.is_in_place and self._desk.hold(Step.INSTALL) is not None:
            self._desk.is_fetched = True  # once the rewriting has begun, nothing holds it
            self._desk.move(Trigger.SUSPENDED)
            return
        self._desk.move(Trigger.DOWNLOADED)
        self._ledger.set_slot(self._ledger.slot, SlotRecord(health=SlotHealth.INSTALLING))
        self._desk.persist()
        self._desk.report()
        if self._ledger.update.is_in_place:
            self._serving.let_go()
        self._ask_install_step()

    def _on_keys_refused(self, error: WhimbrelError) -> None:
        """Nothing can be read without its key."""
        self._fail(error.code, str(error), retryable=error.is_retryable)

    # --- installing and verifying --------------------------------------------------------------------------

    def _ask_install_step(self) -> None:
        if self._desk.hold(Step.INSTALL) is not None:
            return
        update = self._ledger.update
        limit = self._desk.config.delta_memory_bytes_max
        self._desk.emit(
            InstallStep(self._desk.ask(), self._ledger.record.active, self._ledger.slot, update.items, limit)
        )

    def install_progressed(self, event: events.InstallProgressed) -> None:
        """A step of the installation is durable."""
        if not self._desk.answers(event.serial):
            return
        if not event.done:
            self._ask_install_step()
            return
        self._desk.move(Trigger.INSTALLED)
        self._desk.persist()
        self._ask_measurement()

    def _ask_measurement(self) -> None:
        if self._desk.hold(Step.INSTALL) is not None:
            return
        self._desk.emit(MeasureSlot(self._desk.ask(), self._ledger.slot))

    def slot_measured(self, event: events.SlotMeasured) -> None:
        """The result was read back."""
        if not self._desk.answers(event.serial):
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
                adapter_file=release.adapter.name if release.adapter else "",
                files=wanted,
                release_sha256=self._ledger.update.release_sha256,
                memory_bytes=model_bytes(release),
            ),
        )
        self._desk.move(Trigger.VERIFIED)
        self._desk.report()
        self.conclusion.begin_trial()

    def _delta_unusable(self, code: str, detail: str) -> None:
        """A delta did not lead to the signed file: begin again with whole files, once."""
        if self._ledger.update.full_only or not any(
            item.action == "delta" for item in self._ledger.update.items
        ):
            self._fail(code, detail, retryable=True)
            return
        self._ledger.note(full_only=True, code=code, detail=detail)
        self._drop_work()
        self._desk.move(Trigger.DELTA_UNUSABLE, code)
        self._desk.persist()
        self._desk.report()
        self._begin_sync()

    # --- ends ----------------------------------------------------------------------------------------------

    def _refuse(self, code: str, detail: str) -> None:
        self._drop_work()
        self._ledger.note(code=code, detail=detail)
        self._desk.move(Trigger.REFUSED, code)
        self.finish("rejected")

    def _fail(self, code: str, detail: str, *, retryable: bool) -> None:
        """Give up cleanly; try again later where that can help."""
        self._drop_work()
        retry = (
            retryable
            and self._ledger.update.attempts < ATTEMPTS_MAX
            and self._ledger.update.writes < WRITES_MAX
        )
        self._ledger.note(code=code, detail=detail, retry=retry)
        self._desk.move(Trigger.FAILED, code)
        if retry:
            self._desk.persist()
            self._desk.report()
            self._schedule_retry()
        else:
            self.finish("failed")

    def _schedule_retry(self) -> None:
        if self._desk.hold(Step.FETCH) is not None:
            return
        self._retry_ms = self._desk.now_ms + retry_wait_ms(self._desk.rng, self._ledger.update.attempts)

    def _retry(self) -> None:
        self._retry_ms = None
        self._ledger.note(retry=False, attempts=self._ledger.update.attempts + 1)
        self._desk.move(Trigger.RETRIED)
        self._desk.persist()
        self._desk.report()
        self._begin_sync()

    def finish(self, outcome: str) -> None:
        """The update is over, in a state of rest: `committed`, `rolled_back`, `rejected` or `failed`."""
        self._ledger.note(outcome=outcome, finished_ms=self._desk.now_ms, retry=False)
        self._ledger.remember(self._desk.now_ms)
        self._desk.persist()
        self._tidy()
        self._desk.report()
        if (pending := self._pending) is not None:
            self._pending = None
            self.request(pending)

    def _tidy(self) -> None:
        """Remove what nothing leads to, once that is written down: until then the slot may be the active one."""
        record = self._ledger.record
        for slot, content in record.slots.items():
            if slot is not record.active and content.health is not SlotHealth.GOOD:
                self._desk.emit(EmptySlot(slot))
        self._desk.emit(RemoveBlobs(frozenset()))

    def _drop_work(self) -> None:
        """Forget answers that are still to come, and the transfer; what is on disk stays."""
        self._desk.is_fetched = False
        self._desk.drop_question()
        self._retry_ms = None
        self.fetching.drop()

    # --- trouble -------------------------------------------------------------------------------------------

    def failed(self, event: events.EffectFailed) -> None:
        """An effect could not be carried out, and those after it were dropped."""
        if event.serial and not self._desk.answers(event.serial):
            return
        state, update = self._desk.state, self._ledger.record.update
        if state is State.TRIAL:
            self.conclusion.conclude(Verdict(event.code, event.detail), None)
        elif state is State.COMMITTING:
            self.conclusion.take_back(event)
        elif event.code.startswith("patch.") and state is State.INSTALLING:
            self._delta_unusable(event.code, event.detail)
        elif state in REVOCABLE:
            self._fail(event.code, event.detail, retryable=event.is_retryable)
        elif (
            update is not None
            and (told := (update.desired.sequence, update.outcome, event.code)) != self._told
        ):
            # The record cannot be written in a state that cannot be left: say so once, and keep serving.
            self._told = told
            self._ledger.note(code=update.code or event.code, detail=update.detail or event.detail)
            self._desk.report()
