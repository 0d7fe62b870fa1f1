"""One rollout: its members and what became of them. Pure; knows no device but its members.

What follows from it is decided in `decisions.py`, and done by `steering.py`.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from protocol.ids import DeviceId
from protocol.messages import UpdateReport
from server.rollouts.evidence import Outcome, RateTest
from server.rollouts.latency import LatencyTest
from server.rollouts.records import (
    FAILURES,
    UNDECIDED,
    Decision,
    MemberRecord,
    MemberStatus,
    Numbers,
    RolloutRecord,
)
from server.rollouts.states import RolloutState, RolloutTrigger, next_state
from server.rollouts.waves import Wave

CODE_SILENT: Final = "rollout.silent"
"""No final report within the wave's time."""

CODE_OFF: Final = "rollout.off"
"""Not connected when it was asked, and no sign of life since."""

CODE_UNSERVABLE: Final = "operator.unservable"
"""The device went back to the version before, which cannot be served either."""

TOUCHING: Final = frozenset({"trial", "committing", "rolling_back"})
"""States of a device in which the new version was started: silence from here may be its doing."""

_HELD: Final = "held."


class Sighting(NamedTuple):
    """What else a device says while it tells of its update.

    Attributes:
        stage: State that it is in.
        is_empty: It has no version to run.
    """

    stage: str = ""
    is_empty: bool = False


class Invitation(NamedTuple):
    """A device as it is when it is asked."""

    device: DeviceId
    tier: str = ""
    version: str = ""
    is_online: bool = True


class Campaign:
    """A rollout at work.

    Args:
        record: From the store.
        members: From the store.
    """

    def __init__(self, record: RolloutRecord, members: Iterable[MemberRecord] = ()) -> None:
        self.record = record
        self.members: dict[DeviceId, MemberRecord] = {}
        self.rates = None if record.rules is None else RateTest(record.rules)
        self.latency = None if record.rules is None else LatencyTest(record.rules, record.controls)
        self.wake_ms: int | None = (
            None  # when something is due but a member's time: the end of a soak, the next of a pace
        )
        self.last_asked_ms: int | None = None
        self.last_decided_ms = 0
        self._undecided: dict[DeviceId, None] = {}  # in the order in which they were asked
        self._due: list[tuple[int, int, DeviceId]] = []  # heap; what is out of date is passed over
        self._positions: dict[DeviceId, int] = {}  # in the evidence
        self._counts: dict[str, Counter[MemberStatus]] = {}
        self._lost: dict[DeviceId, None] = {}
        self._asked: Counter[str] = Counter()  # by wave
        self._has_proof = 0
        for member in sorted(members, key=lambda member: (member.asked_ms, member.number)):
            self._put(member)
        if (
            not record.waves and record.wave == 0 and self._counts.get("rest")
        ):  # from before waves were counted
            self.record = msgspec.structs.replace(record, wave=1)

    @property
    def state(self) -> RolloutState:
        """Where the rollout stands."""
        return self.record.state

    @property
    def wave(self) -> Wave:
        """The wave that is under way, or was last."""
        return self.record.current

    @property
    def is_last_wave(self) -> bool:
        """Whether no other follows."""
        return self.record.wave >= len(self.record.plan) - 1

    # What happens

    def move(self, trigger: RolloutTrigger, now_ms: int, reason: str = "") -> RolloutRecord:
        """Follow the table of states; returns the record to be saved."""
        state = next_state(self.state, trigger)
        wave = self.record.wave
        extended = self.record.extended
        if trigger in {RolloutTrigger.WIDEN, RolloutTrigger.PROMOTE}:
            wave, extended = wave + 1, 0
        is_final = state in {RolloutState.FINISHED, RolloutState.STOPPED}
        self.wake_ms = None
        self.record = msgspec.structs.replace(
            self.record,
            state=state,
            reason=reason,
            wave=wave,
            extended=extended,
            begun_ms=now_ms if trigger is RolloutTrigger.BEGIN else self.record.begun_ms,
            finished_ms=now_ms if is_final else self.record.finished_ms,
        )
        return self.record

    def amend(self, **changes: object) -> RolloutRecord:
        """Change fields of the record; returns it to be saved."""
        self.record = msgspec.structs.replace(self.record, **changes)
        if "controls" in changes and self.latency is not None:
            self.latency.compare_with(self.record.controls)
        return self.record

    def decide(
        self,
        action: str,
        now_ms: int,
        text: str,
        numbers: Numbers | None = None,
        *,
        by: str = "",
        reason: str = "",
    ) -> Decision:
        """Number a decision; the record that counts it is to be saved with it."""
        self.amend(decisions=self.record.decisions + 1)
        return Decision(
            rollout=self.record.id,
            number=self.record.decisions,
            at_ms=now_ms,
            by=by,
            action=action,
            wave=self.wave.name,
            numbers=numbers or {},
            text=text,
            reason=reason,
        )

    def ask(self, invited: Invitation, sequence: int, now_ms: int) -> MemberRecord:
        """Make a device a member of the wave under way."""
        self.last_asked_ms = now_ms
        return self._put(self._member(invited, sequence, now_ms))

    def count_committed(self, invited: Invitation, now_ms: int) -> MemberRecord:
        """Note that a device runs the version; it becomes a member without being asked where it is none."""
        member = self.members.get(invited.device) or self._member(invited, 0, now_ms)
        return self._put(
            msgspec.structs.replace(
                member, status="committed", decided_ms=now_ms, code="", detail="", held_since_ms=None
            )
        )

    def observe(
        self, device: DeviceId, update: UpdateReport, now_ms: int, seen: Sighting | None = None
    ) -> MemberRecord | None:
        """Take in what a member says about this rollout; returns the record to be saved when it changed.

        Reports about an earlier request are old news. A device may speak after its time has run out: what it says
        then replaces `silent`.
        """
        member = self.members.get(device)
        seen = seen or Sighting()
        if (
            member is None
            or update.rollout != self.record.id
            or update.version != self.record.version
            or update.sequence < member.sequence
            or (member.update == update and member.stage == seen.stage)
        ):
            return None
        is_late_start = update.outcome == "running" and member.status not in UNDECIDED
        status = member.status if is_late_start else update.outcome
        is_decided = status not in UNDECIDED
        held_since_ms, held_ms = self._held(member, update, now_ms)
        return self._put(
            msgspec.structs.replace(
                member,
                status=status,
                update=update,
                stage=seen.stage,
                is_empty=seen.is_empty,
                held_since_ms=held_since_ms,
                held_ms=held_ms,
                decided_ms=(member.decided_ms or now_ms) if is_decided else None,
                code=member.code if is_late_start else update.code,
                detail=member.detail if is_late_start else update.detail,
            )
        )

    def _held(self, member: MemberRecord, update: UpdateReport, now_ms: int) -> tuple[int | None, int]:
        """Since when a member is held, and for how long it was before: that time does not count."""
        if update.outcome == "running" and update.code.startswith(_HELD):
            return (now_ms if member.held_since_ms is None else member.held_since_ms), member.held_ms
        if member.held_since_ms is None:
            return None, member.held_ms
        return None, member.held_ms + now_ms - member.held_since_ms

    def expire(self, now_ms: int, off: frozenset[DeviceId] = frozenset()) -> list[MemberRecord]:
        """Decide about members whose time has run out; returns the records to be saved.

        Args:
            now_ms: Server clock.
            off: Members that gave no sign of life since they were asked, and are not connected.
        """
        expired = []
        while self._due and self._due[0][0] <= now_ms:
            due_ms, _, device = heapq.heappop(self._due)
            member = self.members[device]
            if member.status in UNDECIDED and self._due_ms(member) == due_ms:
                expired.append(self._put(self._overdue(member, now_ms, is_off=device in off)))
        return expired

    def overdue(self, now_ms: int) -> list[MemberRecord]:
        """Members that `expire` is about to decide about."""
        return [
            self.members[device] for device in self._undecided if self._due_ms(self.members[device]) <= now_ms
        ]

    def _overdue(self, member: MemberRecord, now_ms: int, *, is_off: bool) -> MemberRecord:
        status: MemberStatus = "silent"
        code = CODE_SILENT
        detail = "never began" if member.status == "asked" else "began and never finished"
        if self.record.rules is not None:
            if member.held_since_ms is not None:
                status, code, detail = "deferred", member.code, f"still held: {member.detail}"[:500]
            elif is_off and member.status == "asked" and not member.was_online:
                status, code, detail = "deferred", CODE_OFF, "off when it was asked, and ever since"
            elif member.stage in TOUCHING:
                detail = f"not heard of since its state {member.stage}"
        return msgspec.structs.replace(
            member, status=status, decided_ms=now_ms, code=code, detail=detail, held_since_ms=None
        )

    def withdraw(self, now_ms: int) -> list[MemberRecord]:
        """Take the request back from members that have not begun; returns the records to be saved."""
        return [
            self._put(msgspec.structs.replace(self.members[device], status="withdrawn", decided_ms=now_ms))
            for device in list(self._undecided)
            if self.members[device].status == "asked"
        ]

    # How it stands

    def deadline(self) -> int | None:
        """When the next member is overdue, or something else is to be looked at."""
        if self.state not in {RolloutState.RUNNING, RolloutState.PAUSED}:
            return None
        while self._due:
            due_ms, _, device = self._due[0]
            member = self.members[device]
            if member.status in UNDECIDED and self._due_ms(member) == due_ms:
                break
            heapq.heappop(self._due)
        deadlines = [self.wake_ms] if self.wake_ms is not None else []
        return min(deadlines + [due_ms for due_ms, _, _ in self._due[:1]], default=None)

    @property
    def undecided(self) -> list[DeviceId]:
        """Members that were asked and have not answered for good."""
        return list(self._undecided)

    @property
    def in_flight(self) -> int:
        """How many those are."""
        return len(self._undecided)

    @property
    def is_decided(self) -> bool:
        """Whether every member that was asked has a final outcome."""
        return not self._undecided

    @property
    def has_proof(self) -> bool:
        """Whether a device that was asked has committed: a wave that only refused proves nothing."""
        return self._has_proof > 0

    @property
    def lost(self) -> list[DeviceId]:
        """Members that are lost, in the order in which that was noticed."""
        return list(self._lost)

    @property
    def asked_count(self) -> int:
        """Members of the wave under way that were asked and not released again."""
        return self._asked.get(self.wave.name, 0)

    def asked_in_wave(self) -> list[MemberRecord]:
        """Those members."""
        name = self.wave.name
        return [member for member in self.members.values() if member.wave == name and _was_asked(member)]

    def failures(self) -> int:
        """Failures in the wave under way."""
        counts = self._counts.get(self.wave.name, Counter())
        return sum(counts[status] for status in FAILURES)

    def counts(self) -> dict[MemberStatus, int]:
        """Members of all waves by status."""
        total = sum(self._counts.values(), Counter[MemberStatus]())
        return {status: count for status, count in total.items() if count}

    # Bookkeeping

    def _member(self, invited: Invitation, sequence: int, now_ms: int) -> MemberRecord:
        return MemberRecord(
            rollout=self.record.id,
            device=invited.device,
            wave=self.wave.name,
            status="asked",
            sequence=sequence,
            asked_ms=now_ms,
            number=len(self.members) + 1,
            tier=invited.tier,
            version_before=invited.version,
            was_online=invited.is_online,
        )

    def _due_ms(self, member: MemberRecord) -> int:
        """When the time of a member is over; while it is held its time stands still, for a while."""
        due_ms = member.asked_ms + self.record.wave_timeout_ms
        if self.record.rules is None:
            return due_ms
        if member.held_since_ms is not None:
            return member.held_since_ms + max(0, self.record.hold_max_ms - member.held_ms)
        return due_ms + member.held_ms

    def _put(self, member: MemberRecord) -> MemberRecord:
        before = self.members.get(member.device)
        if before is not None:
            self._counts[before.wave][before.status] -= 1
            self._has_proof -= _is_proof(before)
            self._asked[before.wave] -= _was_asked(before)
        self.members[member.device] = member
        self._counts.setdefault(member.wave, Counter())[member.status] += 1
        self._has_proof += _is_proof(member)
        self._asked[member.wave] += _was_asked(member)
        if member.status in UNDECIDED:
            due_ms = self._due_ms(member)
            if before is None or before.status not in UNDECIDED or self._due_ms(before) != due_ms:
                heapq.heappush(self._due, (due_ms, member.number, member.device))
            self._undecided[member.device] = None
        else:
            self._undecided.pop(member.device, None)
        if member.sequence:
            self.last_asked_ms = max(self.last_asked_ms or 0, member.asked_ms)
        self.last_decided_ms = max(self.last_decided_ms, member.decided_ms or 0)
        if self.rates is not None and self.latency is not None and member.sequence:
            self._weigh(member, self.rates, self.latency)
        return member

    def _weigh(self, member: MemberRecord, rates: RateTest, latency: LatencyTest) -> None:
        if member.device not in self._positions:
            self._positions[member.device] = rates.evidence.ask(member.tier)
            latency.ask(member.tier)
        position = self._positions[member.device]
        rates.evidence.settle(position, _outcome(member.status))
        latency.settle(position, member.status, member.update)
        self._lost.pop(member.device, None)
        if is_lost(member):
            self._lost[member.device] = None


def is_lost(member: MemberRecord) -> bool:
    """Whether a device cannot be relied on to have come back by itself.

    It has no version to run although it had one; or it had started the new version (trial, commit or the way back) and was
    not heard of until its time was over; or the version before cannot be served any more. A device that turns up again is no longer lost.
    """
    if member.status not in FAILURES:
        return False
    return (
        (member.status == "silent" and member.stage in TOUCHING)
        or (member.is_empty and bool(member.version_before))
        or member.code == CODE_UNSERVABLE
    )


def _was_asked(member: MemberRecord) -> bool:
    return member.sequence > 0 and member.status != "withdrawn"


def _is_proof(member: MemberRecord) -> bool:
    return member.status == "committed" and member.sequence > 0


def _outcome(status: MemberStatus) -> Outcome:
    if status in UNDECIDED:
        return Outcome.OPEN
    if status == "committed":
        return Outcome.GOOD
    return Outcome.BAD if status in FAILURES else Outcome.APART
