"""The trade-off report: a document with what is known of several versions, tier by tier. Pure data."""

from typing import Final, Literal, get_args

from msgspec import Struct

from protocol.release import RuntimeName
from server.scorecard.card import Verdict
from server.scorecard.items import SuiteKind
from server.scorecard.statistics import Interval, Outcome, Paired
from server.tiers.fit import Budget

REPORT_VERSION: Final = 1

Axis = Literal["accuracy", "drift", "latency", "memory", "bytes", "energy", "cost"]
AXES: Final[tuple[Axis, ...]] = get_args(Axis)
DEFAULT_AXES: Final[tuple[Axis, ...]] = ("accuracy", "drift", "latency", "memory", "bytes")
"""Energy follows from memory traffic as modelled latency does, and cost from bytes: they would count twice."""

Standing = Literal["scored", "failed", "incomplete", "apart", "unscored"]
"""What the scorecard of a version allows: only one that is `scored` can be among the best.

`failed`: a check failed. `incomplete`: something could not be measured. `apart`: it was compared with another version than the reference.
`unscored`: there is none.
"""

WayKind = Literal["there", "whole", "delta", "estimated"]
"""Nothing travels, whole files do, or deltas; `estimated` for deltas that were built to see how large they are and are not signed."""


class Figure(Struct, frozen=True, kw_only=True):
    """A number, and where it comes from.

    Attributes:
        value: The number.
        low: End of its 95 % interval; the value itself where it is exact, None where there are too few measurements to bound it.
        high: Likewise.
        basis: What it is of. Only figures of the same basis are compared.
    """

    value: float
    low: float | None
    high: float | None
    basis: str

    @staticmethod
    def exact(value: float, basis: str) -> "Figure":
        """One without uncertainty."""
        return Figure(value=value, low=value, high=value, basis=basis)


class Margins(Struct, frozen=True, kw_only=True):
    """How much is no difference, where figures are uncertain.

    Attributes:
        accuracy: Share of right answers: 0.03 are 3 of 100 questions.
        drift: Mean KL divergence, nats.
        latency: Share of the other one's latency.
    """

    accuracy: float = 0.03
    drift: float = 0.01
    latency: float = 0.05


class Suite(Struct, frozen=True, kw_only=True):
    """Right answers of one suite.

    Attributes:
        name: Of the suite.
        kind: Likewise.
        count: Questions that were answered.
        right: Those that were answered rightly.
        accuracy: Share of right answers.
        change: Against the reference, on the same questions; None for the reference itself, and where that was not asked.
        question_set: Two versions were asked the same questions in the same way if theirs are equal.
    """

    name: str
    kind: SuiteKind
    count: int
    right: int
    accuracy: Interval
    change: Paired | None
    question_set: str


class Drift(Struct, frozen=True, kw_only=True):
    """How far next-token distributions are from those of the reference, nats; 0 for the reference itself."""

    mean: Interval
    same_choice: float
    positions: int


class Candidate(Struct, frozen=True, kw_only=True):
    """A version, as far as it is the same on every tier.

    Attributes:
        version: Its name.
        is_reference: Whether the others are compared with it.
        standing: What its scorecard allows.
        reason: Why it cannot be among the best; empty if it can.
        remedy: The command that changes that; empty if none does.
        verdict: Of its scorecard; None without one.
        scorecard_sha256: Likewise.
        size_bytes: Of all files.
        suites: Questions, prompts that have to be answered included.
        drift: From the reference; None where it is not known.
        inference: What operations and bytes are of, for example "one token after 512".
        operations: Of one inference; None without a scorecard.
        moved_bytes: Likewise, between memory and processor.
        energy_mj: Likewise, by the proxy.
    """

    version: str
    is_reference: bool
    standing: Standing
    reason: str
    remedy: str
    verdict: Verdict | None
    scorecard_sha256: str
    size_bytes: int
    suites: list[Suite] = []
    drift: Drift | None = None
    inference: str = ""
    operations: int | None = None
    moved_bytes: int | None = None
    energy_mj: float | None = None


class Way(Struct, frozen=True, kw_only=True):
    """How devices that run one version come to another.

    Attributes:
        version: That they run; empty for none.
        devices: How many.
        kind: What travels.
        wire_bytes: To each of them, chunk indexes included.
    """

    version: str
    devices: int
    kind: WayKind
    wire_bytes: int


class Air(Struct, frozen=True, kw_only=True):
    """What travels to the devices of a tier.

    Attributes:
        devices: How many there are.
        total_bytes: To all of them.
        mean_bytes: To each; where there are none, to one that has nothing yet.
        ways: By what they run.
        undelivered: Devices for which whole files are counted because no delta is there that could be built.
    """

    devices: int
    total_bytes: int
    mean_bytes: float
    ways: list[Way]
    undelivered: int


class Rival(Struct, frozen=True, kw_only=True):
    """Another version that is no worse.

    Attributes:
        version: Which.
        better: Axes on which it is better.
        undecided: Axes on which the data do not say whether it is worse; none if it beats this one for certain.
    """

    version: str
    better: list[Axis]
    undecided: list[Axis] = []


class Shortfall(Struct, frozen=True, kw_only=True):
    """What a tier has too little of.

    Attributes:
        budget: Of what.
        needed: In bytes, or in ms a token.
        available: Likewise.
        detail: One line with the parts.
    """

    budget: Budget
    needed: float
    available: float
    detail: str


class Option(Struct, frozen=True, kw_only=True):
    """A version on one tier.

    Attributes:
        version: Its name.
        is_eligible: Whether it can be among the best: it fits, and its scorecard is complete and has not failed.
        is_best: Whether nothing beats it for certain; False where it is not eligible.
        beaten_by: What beats it for certain.
        perhaps_beaten_by: What would beat it, if it is no worse where the data do not say.
        fits: Whether it fits the tier; None where no tier file says what there is.
        broken: What does not suffice.
        would_fit: What would, in words.
        latency: Milliseconds for one inference.
        memory: Bytes of the model with its context and its runtime.
        swap_bytes: Memory while one version follows another, the one that goes on answering included; None where no tier file says what
            there is, like `disk_bytes`.
        disk_bytes: Room during the update.
        energy: Millijoules for one inference, by the proxy.
        air: What travels.
        cost: Of that, in the currency of the prices; None without a price, or without devices.
    """

    version: str
    is_eligible: bool
    is_best: bool
    beaten_by: list[Rival]
    perhaps_beaten_by: list[Rival]
    fits: bool | None
    broken: list[Shortfall]
    would_fit: list[str]
    latency: Figure | None
    memory: Figure | None
    swap_bytes: int | None
    disk_bytes: int | None
    energy: Figure | None
    air: Air
    cost: float | None


class FrontierOption(Struct, frozen=True, kw_only=True):
    """A file that could be sent in the place of a version.

    Attributes:
        name: Of the point of the frontier.
        is_chosen: Whether it is the version itself.
        mean_bytes: To each device that has a file which it was chosen against, chunk indexes included; whole files where the delta does not
            pay. Where there are no such devices, as over the fleet for which it was chosen.
        total_bytes: To all of these.
        cost: Of that, in the currency of the prices; None without a price, or without devices.
        kl: Mean divergence from the float model, nats.
        flips: Share of tokens at which the two would choose differently.
        is_best: Whether nothing on the frontier beats it for certain.
        beaten_by: Names of what beats it for certain.
        perhaps_beaten_by: Names of what would beat it, if it is no worse where the text does not say.
    """

    name: str
    is_chosen: bool
    mean_bytes: float
    total_bytes: int
    cost: float | None
    kl: Interval
    flips: Interval
    is_best: bool
    beaten_by: list[str]
    perhaps_beaten_by: list[str]


class FrontierTable(Struct, frozen=True, kw_only=True):
    """The frontier that a version's file was chosen from, on one tier.

    Attributes:
        version: Of the version.
        installed: Versions whose files it was chosen against; the beginning of the digest where no release has the file.
        devices: Of the tier, that have one of them. Nothing is said here of others.
        text: Name of the text on which it was measured.
        tokens: That were predicted of it.
        options: The points.
    """

    version: str
    installed: list[str]
    devices: int
    text: str
    tokens: int
    options: list[FrontierOption]


class TierTable(Struct, frozen=True, kw_only=True):
    """The versions on one tier.

    Attributes:
        name: Of the tier; "all devices" where the server has no tier files.
        memory_mb: What it has, 2**20 bytes; None where no file says so, like those that follow.
        disk_mb: Likewise.
        token_ms_max: Its objective.
        devices: That report it and are not away for good.
        running: Devices by the version that they run.
        price_per_mb: Of 10**6 bytes over the air; None where there is no price.
        axes: Those on which versions are compared here; an axis of which nothing is known is left out.
        options: In the order in which the versions were named.
        frontiers: Of those versions whose scorecard says from which frontier their file was chosen.
    """

    name: str
    memory_mb: int | None
    disk_mb: int | None
    token_ms_max: float | None
    devices: int
    running: dict[str, int]
    price_per_mb: float | None
    axes: list[Axis]
    options: list[Option]
    frontiers: list[FrontierTable] = []


class Missing(Struct, frozen=True, kw_only=True):
    """Deltas that are not there and that devices could use, to one version.

    Attributes:
        base: Version that they run.
        version: To which it would lead.
        devices: How many could use it.
        seconds: That building it takes, about.
    """

    base: str
    version: str
    devices: int
    seconds: float


class SuiteFlips(Struct, frozen=True, kw_only=True):
    """Answers of two versions to one suite: `gained` are those that only the one has right, at most so many."""

    name: str
    flips: Paired


class Comparison(Struct, frozen=True, kw_only=True):
    """Two versions that were compared with the reference, on the questions that both were asked.

    Attributes:
        version: The one.
        other: The other.
        suites: Answers by suite; prompts that have to be answered are left out.
        accuracy: How the one stands to the other; `same` only if neither is worse.
        drift: Likewise.
        questions_needed: About how many questions of the suite that needs most decide it; None where it is decided.
    """

    version: str
    other: str
    suites: list[SuiteFlips]
    accuracy: Outcome
    drift: Outcome
    questions_needed: int | None


class Part(Struct, frozen=True, kw_only=True):
    """A piece of the paragraph: words, or something from the data with the place in this document that it was taken from."""

    text: str
    source: str = ""


class TradeoffReport(Struct, frozen=True, kw_only=True):
    """Everything.

    Attributes:
        family: Of the versions.
        runtime: That they all run under.
        reference: Version that the others were compared with; empty if there is none.
        axes: That were asked for.
        margins: See there.
        confidence: Of every interval.
        currency: Of prices and costs; empty without prices.
        candidates: The versions.
        comparisons: Of any two that are scored, or failed.
        tiers: The versions, tier by tier.
        strays: Devices of the family whose tier has no table here.
        missing: Deltas that could be built (`--deltas`).
        notes: What the figures are, and what they are not.
        paragraph: For somebody who has not seen any of this.
    """

    v: int = REPORT_VERSION
    family: str
    runtime: RuntimeName
    reference: str
    axes: list[Axis]
    margins: Margins
    confidence: float
    currency: str
    candidates: list[Candidate]
    comparisons: list[Comparison]
    tiers: list[TierTable]
    strays: int
    missing: list[Missing]
    notes: list[str]
    paragraph: list[Part] = []

    @property
    def paragraph_text(self) -> str:
        """The paragraph as text."""
        return "".join(part.text for part in self.paragraph)
