"""Which slot answers: measured before it is served, and given up for the one before if it turns out damaged. Pure."""

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from device import events
from device.desk import JOB_TIMEOUT_MS, Desk
from device.effects import LetGo, PointCurrent, Probe, Serve
from device.slots import SlotHealth, SlotName
from device.states import State

INVENTORIES_MAX: Final = 5
"""Attempts to measure the active slot before it counts as damaged: a disk that fails once must not silence a device."""

RETRY_MS: Final = 60_000
"""Until another try to serve, after the disk failed to put back or to read what should be served."""


class Serving:
    """The slot that the engine answers with.

    Args:
        desk: Shared with the other parts.
        on_settled: The engine answers, or nothing better can be had.
        on_swap_failed: A version that was just committed cannot be served; the record names the one before again.
    """

    def __init__(
        self, desk: Desk, on_settled: Callable[[], None], on_swap_failed: Callable[[str], None]
    ) -> None:
        self.slot: SlotName | None = None  # what the engine answers with
        self.deadline_ms: int | None = None
        self._desk = desk
        self._on_settled = on_settled
        self._on_swap_failed = on_swap_failed
        self._inventory = 0  # serial of the probe whose answer will decide what is served
        self._inventories = 0  # that failed in a row
        self._serve = 0  # serial of the last `Serve`
        self._is_waiting = False  # until the files are no longer rewritten

    def take_inventory(self, serial: int = 0) -> None:
        """Measure the active slot, and serve it if it is what was signed; answers that are still to come are void.

        Args:
            serial: Of an inventory that this stands in for.
        """
        self._inventory = serial or self._desk.serial()
        self._serve = 0
        self._desk.emit(Probe(self._inventory, self._desk.ledger.record.active))

    def wait(self) -> None:
        """The files are being rewritten: nothing can answer until that is over, one way or the other."""
        self.slot = None
        self.deadline_ms = None
        self._is_waiting = True
        self._desk.ledger.files = self._desk.ledger.files or {}
        self._inventory = self._serve = 0  # answers that are under way speak of files that will be gone

    def let_go(self) -> None:
        """The files are about to be rewritten."""
        self.wait()
        self._desk.emit(LetGo())

    def resume(self) -> None:
        """Serve the version before again once nothing rewrites its files any more: they are put back and measured.

        What ends the rewriting is durable by then; where that failed, this waits for the next try.
        """
        if self._is_waiting and not self._desk.is_rewriting:
            self._is_waiting = False
            self.take_inventory()

    def timeout(self) -> None:
        """Some deadline has passed; if it was this one, try again, and first write down what should be served.

        An inventory that may still be under way is ordered again under its own number, so that the first answer counts.
        A load that never comes to its end has failed.
        """
        if self.deadline_ms is None or self._desk.now_ms < self.deadline_ms:
            return
        self.deadline_ms = None
        if self._serve:
            self._abandon("effect.timeout")
            return
        self._desk.persist()
        self.take_inventory(self._inventory)

    def go_back(self, slot: SlotName) -> None:
        """The record names the version before again: let it answer; where it was rewritten, it has to be put back first."""
        if self._desk.ledger.update.is_in_place:
            self.let_go()
        else:
            self.begin(slot)

    def begin(self, slot: SlotName) -> None:
        """Let the engine answer with a slot whose files were measured; the `current` link follows once it does."""
        record = self._desk.ledger.record.slots[slot]
        self._is_waiting = False
        self._serve = self._desk.serial()
        self.deadline_ms = self._desk.now_ms + JOB_TIMEOUT_MS
        self._desk.emit(
            Serve(self._serve, slot, record.runtime, record.main_file, record.version, record.adapter_file)
        )

    def probed(self, event: events.Probed) -> bool:
        """Whether this was the inventory."""
        if event.serial != self._inventory:
            return False
        self._inventory = self._inventories = 0
        self.deadline_ms = None
        ledger = self._desk.ledger
        ledger.files = event.files
        ledger.disk_free_bytes = event.disk_free_bytes
        if ledger.record.active is None:
            self._on_settled()
        elif event.files == ledger.record.active_slot.files:
            self.begin(ledger.record.active)
        else:
            self._abandon("slot.damaged")
        self._desk.report()
        return True

    def started(self, event: events.ServingStarted) -> None:
        """The engine answers."""
        if event.serial == self._serve:
            self._serve = 0
            slot = self.slot = self._desk.ledger.record.active
            self.deadline_ms = None
            self._on_settled()
            if slot is not None:
                # Last: a disk that cannot be written keeps the link from being moved, and nothing else.
                self._desk.emit(PointCurrent(slot))

    def failed(self, event: events.EffectFailed) -> bool:
        """Whether it was about serving that something failed."""
        if event.serial and event.serial == self._serve:
            self._abandon(event.code)
            return True
        if not event.serial or event.serial != self._inventory:
            if (
                not event.serial and self._inventory
            ):  # perhaps it was dropped with what could not be carried out
                self.deadline_ms = self._desk.now_ms + RETRY_MS
            return False
        self._inventories += 1
        if event.is_retryable and self._inventories < INVENTORIES_MAX:
            self.take_inventory()
            return True
        self.probed(events.Probed(event.serial, {}, 0, 0))
        if event.is_retryable:
            self.deadline_ms = self._desk.now_ms + RETRY_MS
        return True

    def _abandon(self, code: str) -> None:
        """The active slot cannot be served: fall back to the other one, if that one ever proved itself."""
        desk, ledger = self._desk, self._desk.ledger
        active = ledger.record.active
        assert active is not None
        self._serve = 0
        self.deadline_ms = None
        if ledger.record.slots[active.other].health is not SlotHealth.GOOD:
            self._on_settled()  # nothing better to offer; an update may still bring one
            return
        ledger.set_slot(active, replace(ledger.record.slots[active], health=SlotHealth.BAD))
        ledger.change(active=active.other)
        if desk.state is State.COMMITTING:
            self._on_swap_failed(code)
        desk.persist()
        ledger.files = {}
        self.take_inventory()
