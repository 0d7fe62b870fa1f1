"""What a person at the device asks for: no updates for now, updates again, the version before. Pure.

A pause is durable and lets nothing new begin; a rollback is one more way through the table of `states.py`. Neither goes round a
promise: version floors stay as they are, what is quarantined stays so, and the version that is given up joins it.
"""

from typing import Final

from msgspec.structs import replace

from device import events
from device.desk import Desk
from device.download import Tally
from device.effects import AnswerOperator, MeasureSlot
from device.events import Wish
from device.journal import SlotRecord, UpdateRecord
from device.serving import Serving
from device.slots import SlotHealth, SlotName
from device.states import RESTING, State, Trigger
from device.update import Update
from protocol.messages import Desired

CODE: Final = "operator.rollback"
"""Why the version that was given up is no longer there; travels in reports."""


class Manual:
    """The wishes of the operator.

    Args:
        desk: Shared with the other parts.
        update: The update under way, or the wait for one.
        serving: Which slot answers.
    """

    def __init__(self, desk: Desk, update: Update, serving: Serving) -> None:
        self._desk = desk
        self._ledger = desk.ledger
        self._update = update
        self._serving = serving
        self._asked = 0  # serial of the last wish
        self._question = 0  # serial of the measurement that a rollback waits for

    def asked(self, event: events.OperatorAsked) -> None:
        """Somebody at the device asked for something."""
        self._asked = event.serial
        match event.wish:
            case Wish.PAUSE:
                self._pause()
            case Wish.RESUME:
                self._resume()
            case Wish.ROLLBACK:
                self._consider_rollback()

    def _answer(self, text: str, code: str = "") -> None:
        self._desk.emit(AnswerOperator(self._asked, code, text))

    # --- pause ---------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self._ledger.record.paused_ms is None:
            self._ledger.change(paused_ms=self._desk.now_ms)
            self._desk.persist()
            self._update.hold()
        self._answer(f"updates are paused{self._remainder()}")

    def _remainder(self) -> str:
        """What a pause does not stop, or what waits for its end."""
        state = self._desk.state
        if self._desk.is_rewriting:
            return f"; the model is being rewritten in place, and that is completed first ({state.value})"
        if state in RESTING:
            return ""
        version = self._ledger.update.desired.version
        if self._desk.is_waiting or state in {State.COMMITTING, State.ROLLING_BACK}:
            return f"; what is under way for {version} comes to its end first ({state.value})"
        return f"; the update to {version} waits"

    def _resume(self) -> None:
        if self._ledger.record.paused_ms is None:
            self._answer("updates were not paused")
            return
        self._ledger.change(paused_ms=None)
        self._desk.persist()
        held = self._desk.held
        self._answer(f"updates are no longer paused, and held: {held.text}" if held else "updates go on")
        self._update.go_on()

    # --- rollback ------------------------------------------------------------------------------------------

    def _consider_rollback(self) -> None:
        """Refuse what cannot be, then measure: nothing is given up for a version that is not whole."""
        self._question = 0
        refusal = self._refusal()
        if refusal is not None:
            self._answer(*refusal)
            return
        assert self._ledger.record.active is not None
        self._question = self._desk.serial()
        self._desk.emit(MeasureSlot(self._question, self._ledger.record.active.other))

    def _refusal(self) -> tuple[str, str] | None:
        """Why there is no way back at this moment: a line and its code; `None` where there is one."""
        record, state = self._ledger.record, self._desk.state
        if state not in RESTING or (record.update is not None and record.update.retry):
            version = self._ledger.update.desired.version
            text = f"an update to {version} is under way ({state.value}): wait for its end, or withdraw it on the server"
            return text, "operator.busy"
        if self._serving.slot is not record.active:
            return "the device is still starting, nothing answers yet: ask again", "operator.busy"
        before = record.slots[record.active.other] if record.active is not None else SlotRecord()
        if before.health is not SlotHealth.GOOD:
            return (
                f"there is no version before {record.active_slot.version or 'this'}",
                "operator.nothing_before",
            )
        if before.release_sha256 and before.release_sha256 in record.quarantine:
            return f"{before.version} failed on this device and is not run again", "operator.quarantined"
        if before.runtime not in self._ledger.runtimes:
            text = f"{before.version} needs the runtime {before.runtime}, which is not installed"
            return text, "operator.runtime"
        return None

    def measured(self, event: events.SlotMeasured) -> bool:
        """Whether this was the measurement of the version before."""
        if not event.serial or event.serial != self._question:
            return False
        self._question = 0
        refusal = self._refusal()  # something may have begun meanwhile
        record = self._ledger.record
        if refusal is None and record.active is not None:
            before = record.slots[record.active.other]
            if event.files == before.files:
                self._go_back(record.active)
                return True
            refusal = f"the files of {before.version} are damaged; nothing was changed", "operator.damaged"
            if self._desk.config.is_in_place and not event.files:
                text = f"the files of {before.version} were rewritten in place: roll that version out on the server"
                refusal = text, "operator.in_place"
        if refusal is not None:
            self._answer(*refusal)
        return True

    def _go_back(self, leaving: SlotName) -> None:
        """The version before takes its place again; the other one stays whole and good until that one answers."""
        record, last = self._ledger.record, self._ledger.record.update
        given_up, before = record.slots[leaving], record.slots[leaving.other]
        is_installer = last is not None and last.outcome == "committed" and last.slot is leaving
        desired = Desired(
            sequence=record.desired_sequence,
            rollout=last.desired.rollout if last is not None and is_installer else "",
            family=self._desk.config.family,
            version=given_up.version,
        )
        self._ledger.tally = Tally()
        update = UpdateRecord(
            desired=desired,
            started_ms=self._desk.now_ms,
            slot=leaving,
            is_recall=True,
            release_sha256=given_up.release_sha256,
            code=CODE,
            detail=f"the operator went back to {before.version}",
        )
        self._ledger.change(update=update, active=leaving.other)
        self._desk.move(Trigger.RECALLED, CODE)
        self._desk.persist()  # from here on the version before is the active one
        self._answer(f"going back from {given_up.version} to {before.version}")
        self._ledger.files = dict(before.files)
        self._serving.begin(leaving.other)

    def settled(self) -> None:
        """The engine answers: with the version before, or again with the one that was to be given up."""
        leaving = self._ledger.slot
        if self._ledger.record.active is leaving:
            self._desk.move(Trigger.FAILED, "operator.unservable")
            self._ledger.note(code="operator.unservable", detail="the version before could not be served")
            self._update.finish("failed")
            return
        if self._ledger.update.release_sha256:
            self._ledger.quarantine()
        self._ledger.set_slot(leaving, SlotRecord(health=SlotHealth.BAD))
        self._desk.move(Trigger.RESTORED, CODE)
        self._update.finish("rolled_back")

    def failed(self, event: events.EffectFailed) -> bool:
        """Whether it was a rollback that failed. What was promised to an operator and is not durable is taken back."""
        if event.serial:
            if event.serial != self._question:
                return False
            self._question = 0
            self._answer(f"the version before cannot be read: {event.detail}", event.code)
            return True
        if self._asked:
            self._answer(
                f"not done durably: {event.detail}", event.code
            )  # heard only by who has no answer yet
        update = self._ledger.record.update
        if self._desk.state is not State.ROLLING_BACK or update is None or not update.is_recall:
            return False
        leaving = self._ledger.slot
        self._ledger.change(active=leaving)
        self._ledger.set_slot(leaving, replace(self._ledger.record.slots[leaving], health=SlotHealth.GOOD))
        self._ledger.note(code=event.code, detail=event.detail)
        self._desk.move(Trigger.FAILED, event.code)
        self._update.finish("failed")
        self._serving.take_inventory()
        return True
