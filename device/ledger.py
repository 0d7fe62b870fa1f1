"""What a device knows about itself: the durable record, what it has measured, and what the update has cost. Pure."""

from typing import Any, Final

from msgspec.structs import replace

from device.config import AgentConfig
from device.download import Tally
from device.effects import Persist
from device.journal import (
    HISTORY_MAX,
    QUARANTINE_MAX,
    Director,
    DirectorKey,
    PastUpdate,
    Record,
    SlotRecord,
    UpdateRecord,
)
from device.policy import Hold
from device.reporting import build_report, counters_of, tally_of
from device.slots import SlotName
from device.states import State
from protocol.messages import Report
from protocol.release import Release

DETAIL_CHARS_MAX: Final = 200
"""What the history keeps of a reason; the last update's record has all of it."""


class Ledger:
    """The record and its changes.

    Args:
        config: Who this is.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.record = Record()
        self.tally = Tally()
        self.runtimes: dict[str, str] = {}
        self.memory_bytes = 0
        self.files: dict[str, str] | None = None  # of the active slot, as last measured; None before that
        self.disk_free_bytes = 0
        self.alarm = ""  # stable code of why a wish was not taken
        self._config = config
        self._reports = 0

    def boot(self, record: Record | None, runtimes: dict[str, str], memory_bytes: int) -> None:
        """Take over what the disk knows."""
        record = record or Record()
        self.record = replace(record, boots=record.boots + 1)
        self.runtimes = runtimes
        self.memory_bytes = memory_bytes
        if record.update is not None:
            self.tally = tally_of(record.update.counters)

    @property
    def update(self) -> UpdateRecord:
        """The update under way; there must be one."""
        assert self.record.update is not None
        return self.record.update

    @property
    def release(self) -> Release:
        """What the update leads to; its description must have been read."""
        assert self.update.release is not None
        return self.update.release

    @property
    def slot(self) -> SlotName:
        """Where the update is built; admission must have chosen it."""
        assert self.update.slot is not None
        return self.update.slot

    def change(self, **changes: Any) -> None:
        """Change fields of the record."""
        self.record = replace(self.record, **changes)

    def note(self, **changes: Any) -> None:
        """Change fields of the update, if there is one."""
        if self.record.update is not None:
            self.change(update=replace(self.record.update, **changes))

    def count(self, signer: bytes, sequence: int) -> None:
        """Take nothing any more that is as old as a wish of this number, while what its signer signs counts."""
        director = self.record.director
        if director is not None:
            keys = tuple(
                replace(each, sequence=sequence) if each.key == signer else each for each in director.keys
            )
            director = replace(director, keys=keys)
        self.change(director=director, desired_sequence=sequence)

    def appoint(self, keys: tuple[bytes, ...] | None) -> bool:
        """Take over who may wish from metadata that was verified; whether anything is new.

        The numbers of keys that are gone go with them: with a stolen one somebody may have signed the highest that there is.

        Args:
            keys: Of the director; None where the metadata names none, and wishes are not signed.
        """
        before = self.record.director
        known = {} if before is None else {each.key: each.sequence for each in before.keys}
        after = Director(
            is_named=keys is not None,
            keys=tuple(DirectorKey(key=key, sequence=known.get(key, 0)) for key in keys or ()),
        )
        if after == before:
            return False
        sequence = self.record.desired_sequence
        if after.is_named:
            sequence = max((each.sequence for each in after.keys), default=0)
        self.change(director=after, desired_sequence=sequence)
        return True

    def may_wish(self, signer: bytes) -> bool:
        """Whether what a key signed counts; the empty one stands for wishes without a signature."""
        director = self.record.director
        if director is None or not director.is_named:
            return not signer
        return any(each.key == signer for each in director.keys)

    def set_slot(self, slot: SlotName, content: SlotRecord) -> None:
        """Change what is known of a slot."""
        self.change(slots={**self.record.slots, slot: content})

    def quarantine(self) -> None:
        """Never try this release again."""
        others = tuple(known for known in self.record.quarantine if known != self.update.release_sha256)
        self.change(quarantine=(*others, self.update.release_sha256)[-QUARANTINE_MAX:])

    def remember(self, now_ms: int) -> None:
        """Add the update, which is over, to the history; durable together with its end."""
        update = self.update
        past = PastUpdate(
            version=update.desired.version,
            rollout=update.desired.rollout,
            outcome=update.outcome,
            code=update.code,
            detail=update.detail[:DETAIL_CHARS_MAX],
            started_ms=update.started_ms,
            finished_ms=now_ms,
            received_bytes=self.tally.received_bytes,
            tries=update.tries,
            active=self.record.active_slot.version,
        )
        self.change(history=(*self.record.history, past)[-HISTORY_MAX:])

    def spend(self, state: State, spent_ms: int) -> None:
        """Account for the time that the update was in a state."""
        if self.record.update is not None:
            before_ms = self.update.states_ms.get(state.value, 0)
            self.note(states_ms={**self.update.states_ms, state.value: before_ms + max(0, spent_ms)})

    def persist(self, state: State) -> Persist:
        """The record as it has to be on disk before the state is acted upon.

        A suspended update is recorded as what it was. Admission is repeated from the sync, because the signed
        artifacts that it chooses from are not kept.
        """
        if state is State.SUSPENDED:
            state = self.record.state
        elif state is State.ADMITTING:
            state = State.SYNCING
        if self.record.update is not None:
            self.note(writes=self.update.writes + 1, counters=counters_of(self.tally))
        self.change(state=state)
        return Persist(self.record)

    def report(self, state: State, held: Hold | None = None) -> Report:
        """What to tell the server now.

        Args:
            state: Where the update is.
            held: Why it does not go on.
        """
        self.note(counters=counters_of(self.tally))
        self._reports += 1
        return build_report(
            self._config,
            self.record,
            state,
            self._reports,
            files=self.files or {},
            runtimes=self.runtimes,
            disk_free_bytes=self.disk_free_bytes,
            memory_bytes=self.memory_bytes,
            held=held,
            alarm=self.alarm,
        )
