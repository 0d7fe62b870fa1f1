"""Which slot answers: measured before it is served, and given up for the one before if it turns out damaged. Pure."""

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from device import events
from device.desk import Desk
from device.effects import PointCurrent, Probe, Serve
from device.slots import SlotHealth, SlotName
from device.states import State

INVENTORIES_MAX: Final = 5
"""Attempts to measure the active slot before it counts as damaged: a disk that fails once must not silence a device."""


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
        self._desk = desk
        self._on_settled = on_settled
        self._on_swap_failed = on_swap_failed
        self._inventory = 0  # serial of the probe whose answer decides what is served
        self._inventories = 0  # that failed in a row
        self._serve = 0  # serial of the last `Serve`

    def take_inventory(self) -> None:
        """Measure the active slot, and serve it if it is what was signed; answers that are still to come are void."""
        self._inventory = self._desk.serial()
        self._serve = 0
        self._desk.emit(Probe(self._inventory, self._desk.ledger.record.active))

    def begin(self, slot: SlotName) -> None:
        """Let the engine answer with a slot whose files were measured; the `current` link follows once it does."""
        record = self._desk.ledger.record.slots[slot]
        self._serve = self._desk.serial()
        self._desk.emit(Serve(self._serve, slot, record.runtime, record.main_file))

    def probed(self, event: events.Probed) -> bool:
        """Whether this was the inventory."""
        if event.serial != self._inventory:
            return False
        self._inventories = 0
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
            slot = self.slot = self._desk.ledger.record.active
            self._on_settled()
            if slot is not None:
                # Last: a disk that cannot be written keeps the link from being moved, and nothing else.
                self._desk.emit(PointCurrent(slot))

    def failed(self, event: events.EffectFailed) -> bool:
        """Whether it was about serving that something failed."""
        if event.serial and event.serial == self._serve:
            self._abandon("engine.failed")
            return True
        if not event.serial or event.serial != self._inventory:
            return False
        self._inventories += 1
        if event.is_retryable and self._inventories < INVENTORIES_MAX:
            self.take_inventory()
            return True
        return self.probed(events.Probed(event.serial, {}, 0, 0))

    def _abandon(self, code: str) -> None:
        """The active slot cannot be served: fall back to the other one, if that one ever proved itself."""
        desk, ledger = self._desk, self._desk.ledger
        active = ledger.record.active
        assert active is not None
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
