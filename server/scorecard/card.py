"""The scorecard: a document that says what was measured of a version, and of which bytes. Pure data."""

from typing import Final, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from protocol.errors import ReleaseError
from protocol.ids import Digest
from protocol.release import ReleaseFile, RuntimeName
from server.scorecard.frontier import Frontier, check_frontier
from server.scorecard.items import SuiteKind
from server.scorecard.resources import Resources
from server.scorecard.statistics import Interval, Paired, Quantile
from server.scorecard.suites import Asking
from server.scorecard.work import Memory

CARD_VERSION: Final = 1

CARD_BYTES_MAX: Final = 16 << 20
"""All of MMLU and GSM8K make 200 kB."""

MISSING_MAX: Final = 50
"""More would say nothing new."""


Verdict = Literal["passed", "failed", "undecided", "incomplete"]


class Settings(Struct, frozen=True, kw_only=True):
    """How it was measured."""

    threads: int
    context_tokens: int
    asking: Asking
    drift_texts: int


class Subject(Struct, frozen=True, kw_only=True):
    """What a scorecard is about.

    Attributes:
        family: Of the release.
        version: Likewise.
        files: With their digests, to which the scorecard is bound.
    """

    family: str
    version: str
    files: tuple[ReleaseFile, ...]


class SpeedScore(Struct, frozen=True, kw_only=True):
    """Latency and speed on the machine that kept score.

    Attributes:
        load_ms: Median, the file being in the page cache.
        step: What a latency is of: "token" or "inference".
        count: Of latencies.
        p50_ms: Of them; likewise `p95_ms`, `p99_ms`.
        steps_per_s: Of all together.
        prompt_tokens_per_s: Of a prompt of `prompt_tokens`, median; 0 for a classifier.
        prompt_tokens: Likewise.
    """

    load_ms: float
    step: str
    count: int
    p50_ms: Quantile
    p95_ms: Quantile
    p99_ms: Quantile
    steps_per_s: float
    prompt_tokens_per_s: float
    prompt_tokens: int


class GroupScore(Struct, frozen=True, kw_only=True):
    """Answers of one group, for example a subject."""

    name: str
    count: int
    right: int


class PromptScore(Struct, frozen=True, kw_only=True):
    """How a prompt was answered; log-probabilities are means per token, None for a prompt that asks for a class."""

    name: str
    is_right: bool
    logprob_mean: float | None
    logprob_mean_min: float | None


class SuiteScore(Struct, frozen=True, kw_only=True):
    """Answers of one suite.

    Attributes:
        name: Of the suite.
        kind: Likewise.
        digest: Of all its questions.
        total: Questions that it has.
        asked: Those of the sample.
        count: Those that were answered.
        right: Those that were answered rightly.
        accuracy: Share of right answers; None without an answer.
        groups: By name.
        prompts: Each of them, where the suite is made of prompts that all have to be answered.
        notes: How it was asked.
    """

    name: str
    kind: SuiteKind
    digest: Digest
    total: int
    asked: int
    count: int
    right: int
    accuracy: Interval | None
    groups: tuple[GroupScore, ...]
    prompts: tuple[PromptScore, ...]
    notes: tuple[str, ...]


class GroupDrift(Struct, frozen=True, kw_only=True):
    """What changed in one group; `p_holm` is adjusted for the number of groups."""

    name: str
    paired: Paired
    p_holm: float


class SuiteDrift(Struct, frozen=True, kw_only=True):
    """What changed in one suite.

    Attributes:
        name: Of the suite.
        kind: Likewise.
        before: Share of right answers of the version before, on the same questions.
        paired: Both versions on the same questions.
        changed: Other answers, wrong ones for wrong ones included.
        groups: By name.
    """

    name: str
    kind: SuiteKind
    before: Interval
    paired: Paired
    changed: int
    groups: tuple[GroupDrift, ...]


class TextDrift(Struct, frozen=True, kw_only=True):
    """How far next-token distributions have moved, in nats: KL(before || now) over all of the vocabulary.

    Attributes:
        texts: That were read.
        positions: In all of them.
        mean: Over positions; its interval comes from drawing texts.
        median: Of positions, like `p99` and `largest`.
        same: Share of positions at which both would choose the same token.
    """

    texts: int
    positions: int
    mean: Interval
    median: float
    p99: float
    largest: float
    same: float


class Divergence(Struct, frozen=True, kw_only=True):
    """Where two greedy answers part.

    Attributes:
        suite: Of the prompt.
        name: Of the prompt.
        token: First token that differs, counted from 0; None if none does.
        tokens: Of the shorter answer.
        before: How the version before goes on, one line.
        now: Likewise.
    """

    suite: str
    name: str
    token: int | None
    tokens: int
    before: str
    now: str


class Drift(Struct, frozen=True, kw_only=True):
    """What changed against the version that is replaced."""

    against: Subject
    suites: tuple[SuiteDrift, ...]
    texts: TextDrift | None
    divergences: tuple[Divergence, ...]


class Check(Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    status: Literal["passed", "failed", "undecided"]
    detail: str


class Missing(Struct, frozen=True, kw_only=True):
    """What could not be measured, and why."""

    what: str
    reason: str


class Scorecard(Struct, frozen=True, kw_only=True):
    """Everything that was measured of a version.

    `verdict` is "passed" only if nothing is missing and every check passed. `frontier` says how a requantized file was chosen; it is absent for
    others, and decides nothing.
    """

    v: int = CARD_VERSION
    subject: Subject
    runtime: RuntimeName
    runtime_version: str
    machine: str
    settings: Settings
    verdict: Verdict
    checks: tuple[Check, ...]
    speed: SpeedScore | None
    memory: Memory | None
    resources: Resources
    suites: tuple[SuiteScore, ...]
    drift: Drift | None
    missing: tuple[Missing, ...]
    missing_count: int
    frontier: Frontier | UnsetType = UNSET


_encoder: Final = msgspec.json.Encoder(order="deterministic")
_decoder: Final = msgspec.json.Decoder(Scorecard)


def encode_card(card: Scorecard) -> bytes:
    """Canonical bytes."""
    return _encoder.encode(card)


def decode_card(data: bytes, source: str) -> Scorecard:
    """Read a scorecard.

    Raises:
        ReleaseError: Too long, malformed, of another version, or its frontier contradicts itself.
    """
    if len(data) > CARD_BYTES_MAX:
        raise ReleaseError(f"{source} has {len(data)} bytes, allowed are {CARD_BYTES_MAX}")
    try:
        card = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReleaseError(f"{source} is no scorecard: {error}", hint="score the version again") from error
    if card.v != CARD_VERSION:
        raise ReleaseError(f"{source} is a scorecard of version {card.v}, understood is {CARD_VERSION}")
    if card.frontier is not UNSET:
        check_frontier(card.frontier, f"what {source} says of how the file was chosen")
    return card
