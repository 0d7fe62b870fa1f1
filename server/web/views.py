"""What the HTTP API says: one model for each answer, from which its OpenAPI description is made."""

from typing import Literal

from pydantic import BaseModel, Field

from protocol.ids import NAME_PATTERN, VERSION_PATTERN
from server.accounts import Role
from server.rollouts.records import REASON_CHARS_MAX


class Problem(BaseModel):
    """Why a request was not done."""

    code: str = Field(description="stable; never renamed")
    message: str
    hint: str = Field("", description="what to do")


class Visitor(BaseModel):
    """Who asks."""

    user: str
    role: Role
    csrf: str = Field(description="to be sent as X-CSRF-Token with every POST and DELETE; empty for tokens")
    fleet: str


class VersionCount(BaseModel):
    """Devices that run a version."""

    family: str
    version: str = Field(description="empty: nothing is installed")
    devices: int


class AirBytes(BaseModel):
    """What updates took, over all rollouts that the server remembers."""

    received_bytes: int = Field(description="chunk payloads that devices took from the air")
    full_bytes: int = Field(description="what whole files would have taken")
    saved_share: float | None = Field(description="1 - received / full; null before the first update")


class RolloutSummary(BaseModel):
    """A rollout, and how many devices have come how far."""

    id: str
    family: str
    version: str
    state: str
    reason: str = Field(description="why it stopped")
    created_ms: int
    begun_ms: int | None
    finished_ms: int | None
    counts: dict[str, int] = Field(description="devices by what became of them")


class Member(BaseModel):
    """One device in one rollout."""

    device: str
    wave: str
    status: str
    code: str
    detail: str
    asked_ms: int
    decided_ms: int | None
    received_bytes: int
    full_bytes: int


class WaveView(BaseModel):
    """One wave of a rollout's plan."""

    name: str
    size: str = Field(description="how many devices, and which")
    soak_ms: int
    counts: dict[str, int] = Field(description="its devices, by what became of them; empty before it begins")


class Evidence(BaseModel):
    """What the outcomes so far say (docs/rollouts.md)."""

    text: str
    odds: float = Field(description="against the release, so many to one")
    limit: float = Field(description="odds at which the rollout stops")
    is_proved: bool = Field(description="by Wald's test, once all are decided")
    stop_line: list[int] = Field(
        description="failures at which it stops, among the first 1, 2, … devices that were asked, if all are of one tier"
    )
    course: list[tuple[int, int]] = Field(
        description="devices that count and failures among them, as it went"
    )


class DecisionView(BaseModel):
    """What was decided, by whom, on what numbers."""

    at_ms: int
    by: str = Field(description="operator who ordered it; empty where the server decided")
    action: str
    wave: str
    text: str
    reason: str = Field(description="that the operator gave")
    numbers: dict[str, float | int | str]


class RolloutDetails(RolloutSummary):
    """A rollout with its waves, its evidence, every decision, and a page of its devices."""

    created_by: str
    wave: int = Field(description="number of the wave under way, from 0")
    waves: list[WaveView]
    in_flight: int
    in_flight_max: int | None
    pace_per_minute: int | None
    failures_max: int | None = Field(
        description="failures in a wave at which it stops at the latest; null: only the tests count"
    )
    standing: str = Field(description="what it waits for")
    evidence: Evidence | None = Field(description="null where failures are only counted")
    decisions: list[DecisionView] = Field(description="oldest first")
    orders: int = Field(description="given so far: to be sent with the next one")
    codes: dict[str, int] = Field(description="devices that did not commit, by the code of the reason")
    members: list[Member]
    members_total: int


class Fleet(BaseModel):
    """The fleet at a glance."""

    fleet: str
    at_ms: int
    is_connected: bool = Field(description="whether the server has a connection to the broker")
    broker: str
    devices: int
    online: int
    states: dict[str, int]
    versions: list[VersionCount]
    tiers: dict[str, int]
    air: AirBytes
    rollouts: list[RolloutSummary] = Field(description="newest first, at most 50")


class Device(BaseModel):
    """A device as it reported itself last."""

    device: str
    is_online: bool = Field(description="what the broker said last; a hint only")
    family: str
    version: str
    state: str
    tier: str
    seen_ms: int
    rollout: str
    target: str = Field(description="version that the last update was to")
    outcome: str
    code: str
    detail: str
    received_bytes: int
    full_bytes: int


class DevicePage(BaseModel):
    """Devices in the order of their names."""

    devices: list[Device]
    total: int = Field(description="of all that match")
    after: str = Field(description="to ask for the next page with; empty at the end")


class DeviceMoment(BaseModel):
    """One entry of a device's story."""

    at_ms: int
    is_online: bool
    state: str
    version: str
    rollout: str
    target: str
    outcome: str
    code: str
    detail: str
    received_bytes: int
    full_bytes: int


class Latency(BaseModel):
    """Of single inferences in the trial."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


class Trial(BaseModel):
    """What the last trial on a device measured."""

    prompts_passed: int
    prompts_total: int
    load_ms: float | None
    latency: Latency | None
    memory_peak_bytes: int | None
    detail: str


class DeviceStory(Device):
    """Everything that is known about a device."""

    files: dict[str, str] = Field(description="SHA-256 of the installed files, as measured by the device")
    runtimes: dict[str, str]
    disk_free_bytes: int
    memory_bytes: int
    desired_version: str = Field(description="what it was last asked to run; empty: nothing")
    tries: int
    resumes: int
    redundant_chunks: int
    invalid_chunks: int
    states_ms: dict[str, int] = Field(description="time that the last update spent in each state")
    trial: Trial | None
    moments: list[DeviceMoment] = Field(description="oldest first, at most 500")


class ReleaseFileView(BaseModel):
    """One file of a release."""

    name: str
    bytes: int
    sha256: str


class Delta(BaseModel):
    """A way to a version that need not fetch whole files."""

    base: str = Field(description="version that it starts from; empty where no release has the file")
    file: str
    profile: str
    bytes: int
    whole_bytes: int


class ReleaseSummary(BaseModel):
    """A release."""

    family: str
    version: str
    runtime: str
    bytes: int
    added_ms: int
    published_ms: int | None
    state: Literal["draft", "published", "withdrawn"]
    devices: int = Field(description="that run it")


class ScorecardView(BaseModel):
    """What was measured of a version (docs/scorecard.md)."""

    verdict: Literal["passed", "failed", "undecided", "incomplete"]
    lines: list[str] = Field(description="as `whimbrel score` prints them")


class CardRow(BaseModel):
    """One figure of two scorecards."""

    name: str
    unit: Literal["bytes", "ms", "per second", "operations", "share", "nats"]
    before: float | None
    now: float | None
    change: tuple[float, float, float] | None = Field(
        description="value and ends of its 95 % interval, where both were measured on the same"
    )
    is_better: bool | None = Field(description="null where the interval does not say")


class CardComparisonView(BaseModel):
    """The scorecard of a version beside that of the one before."""

    version: str = Field(description="the one before")
    is_paired: bool = Field(description="whether both were asked the same questions")
    rows: list[CardRow]


class ReleaseDetails(ReleaseSummary):
    """A release with its files, what leads to it, and where it comes from."""

    digest: str
    files: list[ReleaseFileView]
    memory_bytes: int
    tiers: list[str]
    prompts: int = Field(description="golden prompts that a device must answer in its trial")
    deltas: list[Delta]
    provenance: dict[str, object] | None = Field(description="in-toto statement, where there is one")
    scorecard: ScorecardView | None = Field(description="that the release names; null where it names none")
    comparison: CardComparisonView | None = Field(description="null without a scorecard, or another version")


class SignIn(BaseModel):
    """Name and password."""

    user: str = Field(max_length=64)
    password: str = Field(max_length=256)


class NewRollout(BaseModel):
    """What to roll out, and how (docs/rollouts.md)."""

    family: str = Field(pattern=f"^{NAME_PATTERN}$")
    version: str = Field(pattern=f"^{VERSION_PATTERN}$")
    waves: str = Field(
        "2,100%", max_length=1000, description="as `whimbrel rollout start --waves` takes them"
    )
    soak_s: list[int] = Field([0], max_length=50, description="one for all waves, or one for each")
    in_flight_max: int | None = Field(
        None, ge=1, le=10_000_000, description="null: half a percent of the fleet, at least 5"
    )
    pace_per_minute: int | None = Field(None, ge=1, le=10_000_000)
    wave_timeout_s: int = Field(3600, ge=1, le=31_536_000)
    failures_max: int | None = Field(None, ge=0, le=1_000_000, description="null: only the tests count")
    acceptable: float = Field(0.01, gt=0, lt=1, description="failures that a good release may have")
    unacceptable: float = Field(0.05, gt=0, lt=1, description="failures that a release must not have")
    from_version: str = Field("", max_length=64, description="only devices that run this one")


class NewOrder(BaseModel):
    """What to do with a rollout."""

    action: Literal["pause", "resume", "promote", "abort"]
    reason: str = Field("", max_length=REASON_CHARS_MAX)
    seen: int = Field(
        ge=0, le=1_000_000, description="orders that you know of: any further one is a conflict"
    )


class OrderView(BaseModel):
    """An order that was given; the server carries it out within a quarter of a second."""

    rollout: str
    number: int
    action: str
    by: str
    at_ms: int
