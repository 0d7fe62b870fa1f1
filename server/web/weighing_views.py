"""What the HTTP API says about tiers and trade-offs: models for its OpenAPI description, with the fields of the documents that they show."""

from typing import Literal

from pydantic import BaseModel, Field

from server.scorecard.statistics import Outcome
from server.tiers.fit import Budget
from server.tradeoffs.records import Axis, Standing, WayKind
from server.web.views import VersionCount


class TierReleaseView(BaseModel):
    """A release on a tier (docs/tiers.md)."""

    family: str
    version: str
    state: Literal["draft", "published"]
    fits: bool
    is_for: bool = Field(description="whether it may go there: its signed tiers name this one, or none")
    model_bytes: int
    swap_bytes: int = Field(
        description="memory during the swap, the version that answers until then included"
    )
    disk_bytes: int
    token_ms: float | None
    source: Literal["measured", "stated", "modelled"] = Field(description="of the memory")
    broken: list[str] = Field(description="what does not suffice, with its numbers")
    would_fit: list[str]


class TierView(BaseModel):
    """A kind of devices."""

    name: str
    runtime: str
    memory_mb: int = Field(description="2**20 bytes, for everything together")
    disk_mb: int
    memory_gb_per_s: float | None
    token_ms_max: float | None
    context_tokens: int
    stop_first: bool
    measured: int = Field(description="models of which figures are known")
    devices: int
    running: list[VersionCount]
    releases: list[TierReleaseView] = Field(description="of its runtime, newest first, at most 50")


class Tiers(BaseModel):
    """Kinds of devices, and devices that are of none of them."""

    tiers: list[TierView]
    strays: dict[str, int] = Field(
        description="devices by a tier that has no file; empty name: they say none"
    )


class IntervalView(BaseModel):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


class FigureView(BaseModel):
    """A number and where it comes from; an end is null where it is not bounded."""

    value: float
    low: float | None
    high: float | None
    basis: str


class FlipsView(BaseModel):
    """Two versions on the same questions."""

    count: int
    gained: int
    lost: int
    difference: IntervalView
    p_value: float


class SuiteView(BaseModel):
    """Right answers of one suite; `change` is against the reference."""

    name: str
    kind: str
    count: int
    right: int
    accuracy: IntervalView
    change: FlipsView | None


class DriftView(BaseModel):
    """Mean KL divergence from the reference, nats."""

    mean: IntervalView
    same_choice: float
    positions: int


class CandidateView(BaseModel):
    """A version, as far as it is the same on every tier."""

    version: str
    is_reference: bool
    standing: Standing
    reason: str
    remedy: str
    size_bytes: int
    suites: list[SuiteView]
    drift: DriftView | None
    inference: str
    operations: int | None
    moved_bytes: int | None
    energy_mj: float | None = Field(description="a proxy, for comparisons only")


class SuiteFlipsView(BaseModel):
    """Answers to one suite."""

    name: str
    flips: FlipsView


class ComparisonView(BaseModel):
    """Two versions."""

    version: str
    other: str
    suites: list[SuiteFlipsView]
    accuracy: Outcome
    drift: Outcome
    questions_needed: int | None


class RivalView(BaseModel):
    """Another version that is no worse, except perhaps where nothing is decided."""

    version: str
    better: list[Axis]
    undecided: list[Axis]


class WayView(BaseModel):
    """How devices that run one version come to another."""

    version: str
    devices: int
    kind: WayKind
    wire_bytes: int


class AirView(BaseModel):
    """What travels to the devices of a tier."""

    devices: int
    total_bytes: int
    mean_bytes: float
    ways: list[WayView]
    undelivered: int = Field(
        description="devices that fetch whole files because nobody has built a delta yet"
    )


class ShortfallView(BaseModel):
    """What a tier has too little of."""

    budget: Budget
    needed: float = Field(description="bytes, or ms a token")
    available: float
    detail: str


class OptionView(BaseModel):
    """A version on one tier."""

    version: str
    is_eligible: bool
    is_best: bool = Field(description="nothing beats it for certain")
    beaten_by: list[RivalView]
    perhaps_beaten_by: list[RivalView]
    fits: bool | None
    broken: list[ShortfallView]
    would_fit: list[str]
    latency: FigureView | None
    memory: FigureView | None
    swap_bytes: int | None
    energy: FigureView | None
    air: AirView


class TierTableView(BaseModel):
    """The versions on one tier."""

    name: str
    devices: int
    axes: list[Axis]
    options: list[OptionView]


class Tradeoffs(BaseModel):
    """Versions of a family side by side, tier by tier (docs/tradeoffs.md)."""

    family: str
    reference: str
    axes: list[Axis]
    confidence: float
    candidates: list[CandidateView]
    comparisons: list[ComparisonView]
    tiers: list[TierTableView]
    notes: list[str]
    paragraph: str
