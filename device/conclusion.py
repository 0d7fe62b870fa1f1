"""The trial of an update, and what follows from it: the commit point, or the way back. Pure.

`trial.py` judges what was measured; `update.py` says when a trial begins.
"""

from collections.abc import Callable

from msgspec.structs import replace

from device import events
from device.desk import Desk
from device.effects import StartTrial
from device.journal import SlotRecord
from device.policy import Step
from device.ports import ModelSource, TrialOrder
from device.serving import Serving
from device.slots import SlotHealth
from device.states import State, Trigger
from device.trial import TRIES_MAX, Verdict, judge
from protocol.messages import TrialEvidence


class Conclusion:
    """From the installed version to the end of its update.

    Args:
        desk: Shared with the other parts.
        serving: Which slot answers.
        finish: Told how the update ended, in a state of rest: `committed` or `rolled_back`.
    """

    def __init__(self, desk: Desk, serving: Serving, finish: Callable[[str], None]) -> None:
        self._desk = desk
        self._ledger = desk.ledger
        self._serving = serving
        self._finish = finish

    def begin_trial(self) -> None:
        """Count the try durably, then start: a model that takes the device down is counted too."""
        if self._desk.hold(Step.TRIAL) is not None:
            if self._ledger.record.state is not State.TRIAL:
                self._desk.persist()
            return
        update, slot = self._ledger.update, self._ledger.slot
        if update.tries >= TRIES_MAX:
            self.conclude(Verdict("trial.crashed", f"{TRIES_MAX} trials did not come to an end"), None)
            return
        self._ledger.note(tries=update.tries + 1)
        self._ledger.set_slot(slot, replace(self._ledger.record.slots[slot], health=SlotHealth.ON_TRIAL))
        self._desk.persist()
        content = self._ledger.record.slots[slot]
        order = TrialOrder(
            ModelSource(self._ledger.release.runtime, ""),
            self._ledger.release.health,
            self._desk.config.memory_bytes_max,
        )
        self._desk.emit(StartTrial(self._desk.ask(), slot, content.main_file, order, content.adapter_file))

    def trial_finished(self, event: events.TrialFinished) -> None:
        """The evidence is there: judge it."""
        if self._desk.answers(event.serial):
            verdict = judge(event.evidence, self._ledger.release.health, self._desk.config.memory_bytes_max)
            self.conclude(verdict, event.evidence)

    def conclude(self, verdict: Verdict, evidence: TrialEvidence | None) -> None:
        """The trial has come to its end, or never will: commit the new version, or go back.

        Args:
            verdict: Whether it passed.
            evidence: That it rests on, if there is any.
        """
        self._desk.drop_question()  # a trial that is still under way has nothing to say any more
        slot = self._ledger.slot
        self._ledger.note(evidence=evidence, code=verdict.code, detail=verdict.detail)
        if verdict.passed:
            self._desk.move(Trigger.TRIAL_PASSED)
            content = replace(self._ledger.record.slots[slot], health=SlotHealth.GOOD)
            if evidence is not None and evidence.memory_peak_bytes:
                content = replace(content, memory_bytes=evidence.memory_peak_bytes)
            self._ledger.set_slot(slot, content)
            self._ledger.change(active=slot)
            self._desk.persist()  # the commit point: from here on the new slot is the active one
            # Read back from the medium before the trial.
            self._ledger.files = dict(self._ledger.record.slots[slot].files)
            self._serving.begin(slot)
            return
        self._desk.move(Trigger.TRIAL_FAILED, verdict.code)
        if not verdict.code.startswith("storage."):  # a disk that fails says nothing about the release
            self._ledger.quarantine()
        self._ledger.set_slot(slot, replace(self._ledger.record.slots[slot], health=SlotHealth.BAD))
        self._desk.persist()
        self._desk.report()
        if self._serving.slot is self._ledger.record.active:
            self.restored()  # the old version never stopped answering

    def swap_failed(self, code: str) -> None:
        """The version that was just committed cannot be served: the one before takes its place again.

        The release is to blame if the runtime says so; a disk that fails or loses what was on it says nothing about it.
        """
        self._desk.move(Trigger.SWAP_FAILED, code)
        if code.startswith("engine."):
            self._ledger.quarantine()
        self._ledger.note(code=code, detail="the new version could not be served")

    def committed(self) -> None:
        """The engine answers with the new version."""
        self._desk.move(Trigger.COMMITTED)
        self._finish("committed")

    def restored(self) -> None:
        """The version before answers: the update is over."""
        slot = self._ledger.slot
        self._ledger.set_slot(slot, SlotRecord(health=SlotHealth.BAD))
        self._desk.move(Trigger.RESTORED)
        self._finish("rolled_back")

    def take_back(self, event: events.EffectFailed) -> None:
        """The commit point did not become durable, or what follows it failed: the version before stays."""
        before = self._ledger.slot.other
        self._ledger.change(active=before)
        self._ledger.note(code=event.code, detail=event.detail)
        self._desk.move(Trigger.SWAP_FAILED, event.code)
        if self._serving.slot is None and not self._ledger.update.is_in_place:
            # At a boot: that slot has not been measured yet, and the answer about the other one must not be taken for its.
            self._ledger.files = {}
            self._serving.take_inventory()
        else:
            self._ledger.files = dict(self._ledger.record.active_slot.files)
            self._serving.go_back(before)
        self._desk.persist()
