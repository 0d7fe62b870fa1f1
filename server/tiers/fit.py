"""Whether a release fits a tier: the number that breaks, and what would fit instead. Pure.

A device refuses by the same rule (`device/admission.py`): what is in memory at a time are the version that answers and the one that is tried.
"""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Literal

from msgspec import Struct

from protocol.ids import Digest
from server.tiers.files import Measured, Tier
from server.tiers.needs import ModelNeeds

Budget = Literal["runtime", "memory", "disk", "latency"]

DISK_SLACK_BYTES: Final = 1 << 20
"""Records and metadata of one update, as a device counts them."""

CONTEXT_STEP: Final = 64
"""Contexts are proposed in steps of this many tokens; fewer are of no use."""

QUANTIZATIONS: Final = (
    ("Q8_0", 8.5),
    ("Q6_K", 6.56),
    ("Q5_K", 5.5),
    ("Q4_K", 4.5),
    ("Q3_K", 3.44),
    ("Q2_K", 2.63),
)
"""Types of llama.cpp with their bits a weight: block bytes times eight over block weights."""

_MB: Final = 1 << 20
_GB: Final = 10**9


class Subject(Struct, frozen=True, kw_only=True):
    """A release, as far as fitting goes.

    Attributes:
        runtime: That loads it.
        needs: Of its model, by formula.
        stated_bytes: Memory that the release says it takes; 0 for no statement.
        sha256: Of its first file.
    """

    runtime: str
    needs: ModelNeeds
    stated_bytes: int = 0
    sha256: str = ""


class Broken(Struct, frozen=True, kw_only=True):
    """A budget that does not suffice.

    Attributes:
        budget: Which.
        needed: In bytes, or in ms a token.
        available: Likewise.
        detail: One line with the parts.
    """

    budget: Budget
    needed: float
    available: float
    detail: str

    @property
    def percent_over(self) -> float:
        """How far beyond the budget it is."""
        return 100 * (self.needed / self.available - 1) if self.available else 0.0


class Fit(Struct, frozen=True, kw_only=True):
    """How a release fits a tier.

    Attributes:
        tier: Its name.
        broken: Budgets that do not suffice; none if it fits.
        would_fit: What would, in words.
        model_bytes: Memory of the new version.
        swap_bytes: Memory during the swap, the old version included.
        disk_bytes: Room during the update.
        token_ms: Time for a token; None if nothing is known about it.
        source: Where the memory comes from: measured, stated or modelled.
    """

    tier: str
    broken: list[Broken]
    would_fit: list[str]
    model_bytes: int
    swap_bytes: int
    disk_bytes: int
    token_ms: float | None
    source: Literal["measured", "stated", "modelled"]

    @property
    def is_good(self) -> bool:
        """Whether it fits."""
        return not self.broken


def fit(subject: Subject, name: str, tier: Tier, before: Sequence[Subject] = ()) -> Fit:
    """Compare what a release takes with what a tier has.

    Args:
        subject: The release.
        name: Of the tier.
        tier: What it has.
        before: Versions that its devices may run now; the largest of them counts.
    """
    model_bytes, source = _model_bytes(subject, tier, tier.context_tokens)
    beside = _beside(before, tier, tier.context_tokens)
    disk = _disk_bytes(subject, before)
    token_ms = _token_ms(subject, tier)
    broken: list[Broken] = []
    if subject.runtime != tier.runtime:
        detail = f"it is for {subject.runtime}, the tier runs {tier.runtime}"
        broken.append(Broken(budget="runtime", needed=0, available=0, detail=detail))
    if model_bytes + beside > tier.memory_mb * _MB:
        broken.append(_memory_broken(subject, tier, model_bytes, beside, source))
    if disk > tier.disk_mb * _MB:
        detail = f"both versions and the download take {_mb(disk)} of disk, the tier has {tier.disk_mb} MB"
        broken.append(Broken(budget="disk", needed=disk, available=tier.disk_mb * _MB, detail=detail))
    if token_ms is not None and tier.token_ms_max is not None and token_ms > tier.token_ms_max:
        detail = f"{token_ms:.1f} ms a token, the tier's objective is {tier.token_ms_max:g} ms"
        broken.append(Broken(budget="latency", needed=token_ms, available=tier.token_ms_max, detail=detail))
    return Fit(
        tier=name,
        broken=broken,
        would_fit=list(_would_fit(subject, tier, before, broken)),
        model_bytes=model_bytes,
        swap_bytes=model_bytes + beside,
        disk_bytes=disk,
        token_ms=token_ms,
        source=source,
    )


def _model_bytes(
    subject: Subject, tier: Tier, context_tokens: int
) -> tuple[int, Literal["measured", "stated", "modelled"]]:
    found = _measured(subject, tier)
    if found is not None and found.memory_mb is not None:
        return found.memory_mb * _MB, "measured"
    if subject.stated_bytes:
        return subject.stated_bytes, "stated"
    return subject.needs.memory_bytes(context_tokens), "modelled"


def _measured(subject: Subject, tier: Tier) -> Measured | None:
    return tier.measurement(Digest(subject.sha256))


def _beside(before: Sequence[Subject], tier: Tier, context_tokens: int) -> int:
    """Memory of the version that goes on answering."""
    if tier.stop_first:
        return 0
    return max((_model_bytes(each, tier, context_tokens)[0] for each in before), default=0)


def _disk_bytes(subject: Subject, before: Sequence[Subject]) -> int:
    """Both versions; a download becomes the new one by a rename, or is smaller."""
    old = max((each.needs.weights_bytes for each in before), default=0)
    return subject.needs.weights_bytes + old + DISK_SLACK_BYTES


def _token_ms(subject: Subject, tier: Tier) -> float | None:
    """Each token reads all weights once: Pope et al., Efficiently Scaling Transformer Inference, section 2 (2022)."""
    found = _measured(subject, tier)
    if found is not None and found.tokens_per_s is not None:
        return float(1000 / found.tokens_per_s)
    if tier.memory_gb_per_s is None:
        return None
    return 1000 * subject.needs.weights_bytes / (tier.memory_gb_per_s * _GB)


def _memory_broken(subject: Subject, tier: Tier, model_bytes: int, beside: int, source: str) -> Broken:
    needed, available = model_bytes + beside, tier.memory_mb * _MB
    percent = 100 * (needed / available - 1)
    parts = f"{_mb(model_bytes)} ({source}"
    if source == "modelled":
        context = subject.needs.context_bytes(tier.context_tokens)
        parts += f": {_mb(subject.needs.weights_bytes)} of weights, {_mb(context)} for {tier.context_tokens} tokens"
        parts += f", {_mb(subject.needs.fixed_bytes)} of runtime"
    parts += ")"
    if beside:
        parts += f" beside {_mb(beside)} of the version that answers until then"
    detail = f"{parts}: {_mb(needed)} of memory, {percent:.0f} % over the {tier.memory_mb} MB of the tier"
    return Broken(budget="memory", needed=needed, available=available, detail=detail)


def _would_fit(
    subject: Subject, tier: Tier, before: Sequence[Subject], broken: Sequence[Broken]
) -> Iterator[str]:
    budgets = {each.budget for each in broken}
    if not budgets or "runtime" in budgets:
        return
    model_bytes, source = _model_bytes(subject, tier, tier.context_tokens)
    beside = _beside(before, tier, tier.context_tokens)
    available = tier.memory_mb * _MB
    if budgets == {"memory"} and beside and model_bytes <= available:
        yield f"stopping the old version first (stop_first = true): {_mb(model_bytes)}"
    if (
        budgets == {"memory"}
        and source == "modelled"
        and (context := _context_that_fits(subject, tier, before))
    ):
        yield f"a context of {context} tokens (context_tokens)"
    smaller = _quantization_that_fits(subject, tier, before, budgets)
    if smaller is not None:
        yield smaller
    elif budgets == {"memory"} and available > beside:
        yield f"a version that takes {_mb(available - beside)}"


def _context_that_fits(subject: Subject, tier: Tier, before: Sequence[Subject]) -> int:
    """The longest context below that of the tier, in steps; 0 for none."""
    for tokens in range((tier.context_tokens - 1) // CONTEXT_STEP * CONTEXT_STEP, 0, -CONTEXT_STEP):
        if _model_bytes(subject, tier, tokens)[0] + _beside(before, tier, tokens) <= tier.memory_mb * _MB:
            return tokens
    return 0


def _quantization_that_fits(
    subject: Subject, tier: Tier, before: Sequence[Subject], budgets: AbstractSet[Budget]
) -> str | None:
    """The largest quantization of the same weights that fits everything that broke."""
    needs = subject.needs
    beside = _beside(before, tier, tier.context_tokens)
    for name, bits in QUANTIZATIONS:
        weights = int(needs.parameters * bits / 8)
        if not weights or weights >= needs.weights_bytes:
            continue
        saved = needs.weights_bytes - weights
        model_bytes = _model_bytes(subject, tier, tier.context_tokens)[0] - saved
        fits_memory = model_bytes + beside <= tier.memory_mb * _MB
        fits_disk = _disk_bytes(subject, before) - saved <= tier.disk_mb * _MB
        speed = tier.memory_gb_per_s
        is_fast = speed is not None and 1000 * weights / (speed * _GB) <= (tier.token_ms_max or 0)
        if fits_memory and fits_disk and ("latency" not in budgets or is_fast):
            return f"a quantization of {bits:g} bits a weight ({name}), some {_mb(weights)}"
    return None


def _mb(count: float) -> str:
    return f"{count / _MB:.1f} MB"
