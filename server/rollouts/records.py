"""What is kept of a rollout: what was asked for, its devices, its decisions, and what operators ordered. Pure data.

Every record has a version; a field that is added has a default that says what records from before it meant.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.ids import DeviceId, Family, Version
from protocol.messages import UpdateReport
from server.rollouts.evidence import Rules
from server.rollouts.states import RolloutState
from server.rollouts.waves import Wave, plain_waves

MemberStatus = Literal[
    "asked", "running", "committed", "rejected", "rolled_back", "failed", "silent", "deferred", "withdrawn"
]

FAILURES: Final[frozenset[MemberStatus]] = frozenset({"rolled_back", "failed", "silent"})
"""Outcomes that count against the release. `rejected` does not: the device refused before it tried."""

UNDECIDED: Final[frozenset[MemberStatus]] = frozenset({"asked", "running"})

REASON_CHARS_MAX: Final = 500
"""Of what an operator says; a screenful."""

Numbers = dict[str, float | int | str]


class Control(Struct, frozen=True, kw_only=True):
    """How fast devices of one tier were with the version that they had before a rollout, by their own trials.

    Attributes:
        tier: Of the devices.
        devices: That had measured it.
        p50_ms: Bound that the median device is below, of its median latency.
        p99_ms: Likewise, of its 99th percentile.
    """

    tier: str
    devices: int
    p50_ms: float
    p99_ms: float


class RolloutRecord(Struct, frozen=True, kw_only=True):
    """What was asked for and where it stands."""

    v: int = 1
    id: str
    family: Family
    version: Version
    canary_count: Annotated[int, Meta(ge=1)] = 2  # of the first of two waves, where `waves` is empty
    waves: tuple[Wave, ...] = ()
    wave_timeout_ms: Annotated[int, Meta(ge=1)] = (
        3_600_000  # from the request to a device to its final report, times of being held left out
    )
    hold_max_ms: Annotated[int, Meta(ge=1)] = 86_400_000  # that a device may be held and still be waited for
    failures_max: Annotated[int, Meta(ge=0)] | None = 0  # in each wave; None: only `rules` count
    rules: Rules | None = None  # None: only `failures_max` counts
    in_flight_max: Annotated[int, Meta(ge=1)] | None = None  # devices that are asked and undecided
    pace_per_minute: Annotated[int, Meta(ge=1)] | None = None  # devices that are asked
    from_version: str = ""  # only devices that run this one take part
    created_by: str = ""
    release_sha256: str = (
        ""  # of the signed description, noted when the rollout is taken up: the same for every wave
    )
    state: RolloutState = RolloutState.CREATED
    wave: Annotated[int, Meta(ge=0)] = 0  # number of the wave under way, from 0
    extended: Annotated[int, Meta(ge=0)] = (
        0  # devices added to that wave, since its outcomes proved too little
    )
    lost_accepted: Annotated[int, Meta(ge=0)] = 0  # lost devices that an operator went on after
    is_slow_accepted: bool = False
    controls: tuple[Control, ...] = ()
    decisions: Annotated[int, Meta(ge=0)] = 0  # number of the last one
    reason: str = ""  # why it stopped, or is paused
    created_ms: int
    begun_ms: int | None = None  # first device asked
    finished_ms: int | None = None
    counts: dict[MemberStatus, int] = {}  # what became of its devices, once their records were dropped

    @property
    def plan(self) -> tuple[Wave, ...]:
        """The waves, in order; never empty."""
        return self.waves or plain_waves(self.canary_count)

    @property
    def current(self) -> Wave:
        """The wave under way, or the last one that was."""
        return self.plan[min(self.wave, len(self.plan) - 1)]


class MemberRecord(Struct, frozen=True, kw_only=True):
    """One device in one rollout."""

    v: int = 1
    rollout: str
    device: DeviceId
    wave: str
    status: MemberStatus
    sequence: int  # of the `Desired` that asked; 0 when nothing had to be asked
    asked_ms: int
    number: int = 0  # in the order of asking, from 1
    tier: str = ""
    version_before: str = ""  # that it ran when it was asked
    was_online: bool = True  # by the broker's hint, when it was asked
    stage: str = ""  # state of the device in its last report about this rollout
    held_since_ms: int | None = None  # it reports that its policy holds the update
    held_ms: int = 0  # that it was held before
    is_empty: bool = False  # it reported that it has no version to run
    decided_ms: int | None = None
    code: str = ""
    detail: str = ""
    update: UpdateReport | None = None  # the last that the device sent about this rollout


class Decision(Struct, frozen=True, kw_only=True):
    """What was decided about a rollout, on what numbers, in words; never changed.

    Attributes:
        rollout: That it is about.
        number: From 1, in order.
        at_ms: Server clock.
        by: Operator who ordered it; empty where the server decided.
        action: begin, widen, extend, pause, resume, promote, finish, stop, abort, or refuse for an order that came too late.
        wave: That was under way.
        numbers: That it was taken on.
        text: The explanation.
        reason: That the operator gave.
    """

    v: int = 1
    rollout: str
    number: int
    at_ms: int
    by: str = ""
    action: str
    wave: str = ""
    numbers: Numbers = msgspec.field(default_factory=dict)
    text: str
    reason: str = ""


OrderAction = Literal["pause", "resume", "promote", "abort"]


class Order(Struct, frozen=True, kw_only=True):
    """What an operator wants done with a rollout.

    Attributes:
        rollout: That it is about.
        number: From 1, in the order in which operators came.
        action: What.
        by: Who.
        at_ms: When.
        reason: Why.
        answer: Of the server: empty until it has acted, then `done` or why it was refused.
        answered_ms: When.
    """

    v: int = 1
    rollout: str
    number: int
    action: OrderAction
    by: str
    at_ms: int
    reason: str = ""
    answer: str = ""
    answered_ms: int | None = None


class Labels(Struct, frozen=True, kw_only=True):
    """Words by which an operator tells devices apart, for waves."""

    v: int = 1
    device: DeviceId
    labels: tuple[str, ...] = ()
