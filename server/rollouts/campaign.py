"""One rollout: its members, what became of them, and what follows from that. Pure; knows no device but its members."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.ids import DeviceId, Family, Version
from protocol.messages import UpdateReport
from server.rollouts.states import RolloutState, RolloutTrigger, next_state

Wave = Literal["canary", "rest"]
MemberStatus = Literal[
    "asked", "running", "committed", "rejected", "rolled_back", "failed", "silent", "withdrawn"
]

FAILURES: Final[frozenset[MemberStatus]] = frozenset({"rolled_back", "failed", "silent"})
"""Outcomes that count against the release. `rejected` does not: the device refused before it tried."""

UNDECIDED: Final[frozenset[MemberStatus]] = frozenset({"asked", "running"})

CODE_SILENT: Final = "rollout.silent"
"""No final report within the wave's time."""


class RolloutRecord(Struct, frozen=True, kw_only=True):
    """What was asked for and where it stands."""

    v: int = 1
    id: str
    family: Family
    version: Version
    canary_count: Annotated[int, Meta(ge=1)] = 2
    wave_timeout_ms: Annotated[int, Meta(ge=1)] = (
        3_600_000  # from the request to a device to its final report
    )
    failures_max: Annotated[int, Meta(ge=0)] = 0  # in each wave
    state: RolloutState = RolloutState.CREATED
    reason: str = ""  # why it stopped
    created_ms: int
    begun_ms: int | None = None  # first device asked
    finished_ms: int | None = None


class MemberRecord(Struct, frozen=True, kw_only=True):
    """One device in one rollout."""

    v: int = 1
    rollout: str
    device: DeviceId
    wave: Wave
    status: MemberStatus
    sequence: int  # of the `Desired` that asked; 0 when nothing had to be asked
    asked_ms: int
    decided_ms: int | None = None
    code: str = ""
    detail: str = ""
    update: UpdateReport | None = None  # the last that the device sent about this rollout


class Campaign:
    """A rollout at work.

    Args:
        record: From the store.
        members: From the store.
    """

    def __init__(self, record: RolloutRecord, members: Iterable[MemberRecord] = ()) -> None:
        self.record = record
        self.members: dict[DeviceId, MemberRecord] = {}
        self._undecided: dict[DeviceId, None] = {}  # in the order in which they were asked
        self._counts: dict[Wave, Counter[MemberStatus]] = {"canary": Counter(), "rest": Counter()}
        for member in sorted(members, key=lambda member: member.asked_ms):
            self._put(member)

    @property
    def state(self) -> RolloutState:
        """Where the rollout stands."""
        return self.record.state

    @property
    def wave(self) -> Wave:
        """The wave that is under way, or was last."""
        return "rest" if self._counts["rest"] or self.state is RolloutState.REST else "canary"

    def move(self, trigger: RolloutTrigger, now_ms: int, reason: str = "") -> RolloutRecord:
        """Follow the table of states; returns the record to be saved."""
        state = next_state(self.state, trigger)
        begun_ms = now_ms if trigger is RolloutTrigger.BEGIN else self.record.begun_ms
        finished_ms = (
            now_ms if state in {RolloutState.FINISHED, RolloutState.STOPPED} else self.record.finished_ms
        )
        self.record = msgspec.structs.replace(
            self.record, state=state, reason=reason, begun_ms=begun_ms, finished_ms=finished_ms
        )
        return self.record

    def ask(self, device: DeviceId, sequence: int, now_ms: int) -> MemberRecord:
        """Make `device` a member of the wave under way."""
        return self._put(self._member(device, "asked", sequence, now_ms))

    def count_committed(self, device: DeviceId, now_ms: int) -> MemberRecord:
        """Note that `device` runs the version; it becomes a member without being asked where it is none."""
        member = self.members.get(device) or self._member(device, "asked", 0, now_ms)
        return self._put(
            msgspec.structs.replace(member, status="committed", decided_ms=now_ms, code="", detail="")
        )

    def observe(self, device: DeviceId, update: UpdateReport, now_ms: int) -> MemberRecord | None:
        """Take in what a member says about this rollout; returns the record to be saved when it changed.

        Reports about an earlier request are old news. A device may speak after its time has run out: what it says
        then replaces `silent`.
        """
        member = self.members.get(device)
        if (
            member is None
            or update.rollout != self.record.id
            or update.version != self.record.version
            or update.sequence < member.sequence
            or member.update == update
        ):
            return None
        is_late_start = update.outcome == "running" and member.status not in UNDECIDED
        status = member.status if is_late_start else update.outcome
        is_decided = status not in UNDECIDED
        decided_ms = (member.decided_ms or now_ms) if is_decided else None
        return self._put(
            msgspec.structs.replace(
                member,
                status=status,
                update=update,
                decided_ms=decided_ms,
                code=member.code if is_late_start else update.code,
                detail=member.detail if is_late_start else update.detail,
            )
        )

    def expire(self, now_ms: int) -> list[MemberRecord]:
        """Declare members silent whose time has run out; returns the records to be saved."""
        expired = []
        for device in list(self._undecided):
            member = self.members[device]
            if member.asked_ms + self.record.wave_timeout_ms > now_ms:
                break  # the others were asked later
            detail = "never began" if member.status == "asked" else "began and never finished"
            expired.append(
                self._put(
                    msgspec.structs.replace(
                        member, status="silent", decided_ms=now_ms, code=CODE_SILENT, detail=detail
                    )
                )
            )
        return expired

    def withdraw(self, now_ms: int) -> list[MemberRecord]:
        """Take the request back from members that have not begun; returns the records to be saved."""
        return [
            self._put(msgspec.structs.replace(self.members[device], status="withdrawn", decided_ms=now_ms))
            for device in list(self._undecided)
            if self.members[device].status == "asked"
        ]

    def deadline(self) -> int | None:
        """When the next member becomes silent."""
        if self.state not in {RolloutState.CANARY, RolloutState.REST}:
            return None
        first = next(iter(self._undecided), None)
        return None if first is None else self.members[first].asked_ms + self.record.wave_timeout_ms

    @property
    def undecided(self) -> list[DeviceId]:
        """Members that were asked and have not answered for good."""
        return list(self._undecided)

    @property
    def is_wave_decided(self) -> bool:
        """Whether every member that was asked has a final outcome."""
        return not self._undecided

    @property
    def has_proof(self) -> bool:
        """Whether a device that was asked as a canary has committed: a wave that only refused proves nothing."""
        return any(
            member.wave == "canary" and member.status == "committed" and member.sequence > 0
            for member in self.members.values()
        )

    def failures(self) -> int:
        """Failures in the wave under way."""
        counts = self._counts[self.wave]
        return sum(counts[status] for status in FAILURES)

    def counts(self) -> dict[MemberStatus, int]:
        """Members of all waves by status."""
        total = self._counts["canary"] + self._counts["rest"]
        return {status: count for status, count in total.items() if count}

    def _member(self, device: DeviceId, status: MemberStatus, sequence: int, now_ms: int) -> MemberRecord:
        return MemberRecord(
            rollout=self.record.id,
            device=device,
            wave=self.wave,
            status=status,
            sequence=sequence,
            asked_ms=now_ms,
        )

    def _put(self, member: MemberRecord) -> MemberRecord:
        before = self.members.get(member.device)
        if before is not None:
            self._counts[before.wave][before.status] -= 1
        self.members[member.device] = member
        self._counts[member.wave][member.status] += 1
        if member.status in UNDECIDED:
            self._undecided[member.device] = None
        else:
            self._undecided.pop(member.device, None)
        return member


def canary_rank(rollout: str, device: DeviceId) -> bytes:
    """Sort key of a device in the choice of canaries: stable, and another one in every rollout."""
    return hashlib.sha256(f"{rollout}/{device}".encode()).digest()
