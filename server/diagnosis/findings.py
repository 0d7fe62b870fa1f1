"""What a diagnosis can find: the named findings, what each means, and in which order they explain a bad model.

The codes are stable: programs may rely on them. Pure data.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from msgspec import Struct

Severity = Literal["damage", "change", "note"]
"""`damage`: no way of training or quantizing well ends like this. `change`: it may be meant. `note`: harmless by itself."""

Cause = Literal["file", "tokenizer", "template", "architecture", "quantization", "noise", "training", "none"]

WHERE_MAX: Final = 12
"""Tensors, keys or prompts that a finding names; the count says how many there are."""


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that was found.

    Attributes:
        code: Stable name, a key of `MEANINGS`.
        severity: How bad it is.
        cause: Which kind of mistake leads to it.
        summary: One line for people, with the numbers that matter.
        where: Tensors, layers, keys or prompts concerned, those most concerned first, at most `WHERE_MAX`.
        count: How many there are.
        evidence: Numbers behind the summary.
    """

    code: str
    severity: Severity
    cause: Cause
    summary: str
    where: list[str] = []
    count: int = 0
    evidence: dict[str, float | int | str] = {}


class Meaning(NamedTuple):
    """What a finding stands for."""

    severity: Severity
    cause: Cause
    conclusion: str
    advice: str


MEANINGS: Final[Mapping[str, Meaning]] = {
    # What explains everything else comes first: with half a tokenizer, the weights do not matter any more.
    "tokenizer.cut": Meaning(
        "damage", "tokenizer", "the tokenizer was cut", "export the model again with its whole tokenizer"
    ),
    "tensors.missing": Meaning("damage", "file", "tensors are missing", "export the model again"),
    "tensors.reshaped": Meaning(
        "damage", "file", "tensors have another shape", "make sure that both are versions of one model"
    ),
    "architecture.changed": Meaning(
        "damage",
        "architecture",
        "numbers of the architecture differ",
        "convert the model again with the right configuration",
    ),
    "weights.not_finite": Meaning(
        "damage",
        "quantization",
        "scales or weights are NaN or infinite",
        "quantize again, and look for NaN in what is quantized",
    ),
    "scales.zero": Meaning(
        "damage", "quantization", "block scales are zero", "quantize again; these blocks are lost"
    ),
    "scales.out_of_range": Meaning(
        "damage",
        "quantization",
        "block scales are damaged: the weights are in proportion, and of another size",
        "quantize again",
    ),
    "codes.permuted": Meaning(
        "damage",
        "quantization",
        "codes are the same ones at other places: packed or ordered wrongly",
        "check the packing order",
    ),
    "blocks.dead": Meaning(
        "damage", "quantization", "blocks are dead: all their weights are the same", "quantize again"
    ),
    "codes.saturated": Meaning(
        "damage",
        "quantization",
        "blocks are saturated: their scale is too small for their weights",
        "quantize again",
    ),
    "codes.coarse": Meaning(
        "damage",
        "quantization",
        "only a part of the codes is used: quantized more coarsely than the type allows",
        "quantize again",
    ),
    "weights.unrelated": Meaning(
        "damage",
        "noise",
        "the weights have nothing to do with each other: another model, or scrambled",
        "look for the right file",
    ),
    "weights.noise": Meaning(
        "damage",
        "noise",
        "noise: a change that is large and goes in no direction, which training does not make",
        "take the layer from a good copy",
    ),
    "weights.scaled": Meaning(
        "damage",
        "quantization",
        "tensors are multiplied by a factor",
        "look for a scale that was applied twice or not at all",
    ),
    "tokenizer.special": Meaning(
        "change",
        "tokenizer",
        "special tokens differ: they leak into texts, or answers do not end",
        "take the special tokens of the older version",
    ),
    "tokenizer.changed": Meaning(
        "change",
        "tokenizer",
        "the tokenizer is another one",
        "use the tokenizer that the weights were trained with",
    ),
    "template.changed": Meaning(
        "change",
        "template",
        "the chat template differs",
        "use the template that the weights were trained with",
    ),
    "calibration.changed": Meaning(
        "change",
        "quantization",
        "the scales of activations are of another size: calibrated on other inputs",
        "calibrate with inputs as devices get them",
    ),
    "quantization.coarse": Meaning(
        "change",
        "quantization",
        "a coarser quantization of the same weights",
        "quantize with more bits, or with an importance matrix",
    ),
    "prompts.unanswered": Meaning(
        "damage", "file", "the runtime does not answer with the new file", "see the other findings"
    ),
    "weights.trained_far": Meaning(
        "change",
        "training",
        "other weights: a fine-tune that moved them very far",
        "train with a smaller learning rate, or shorter",
    ),
    "weights.trained": Meaning(
        "change",
        "training",
        "other weights: a fine-tune",
        "where answers got worse, it is the training or its data",
    ),
    "graph.changed": Meaning(
        "change", "architecture", "the graph, or very small tensors in it, differ", "compare the exports"
    ),
    "tensors.added": Meaning("change", "file", "tensors were added", "make sure that the runtime knows them"),
    "tensors.opaque": Meaning(
        "change", "file", "tensors changed that are of a type which cannot be compared", ""
    ),
    "prompts.worse": Meaning("change", "none", "prompts got worse", ""),
    "prompts.diverged": Meaning("note", "none", "prompts are answered otherwise", ""),
    "quantization.other": Meaning("note", "quantization", "the same weights in another quantization", ""),
    "weights.old_not_finite": Meaning(
        "note", "quantization", "the older version has scales or weights that are not finite", ""
    ),
    "metadata.changed": Meaning("note", "none", "descriptions in the file differ", ""),
}
"""In the order of likelihood within a severity: what is specific, and explains more, stands before what is general."""

_SEVERITIES: Final[tuple[Severity, ...]] = ("damage", "change", "note")
_RANKS: Final = {code: rank for rank, code in enumerate(MEANINGS)}


def finding(code: str, summary: str, where: Sequence[str] = (), **evidence: float | str) -> Finding:
    """A finding with what its code says about it."""
    meaning = MEANINGS[code]
    return Finding(
        code=code,
        severity=meaning.severity,
        cause=meaning.cause,
        summary=summary,
        where=list(where[:WHERE_MAX]),
        count=len(where),
        evidence={name: _rounded(value) for name, value in evidence.items()},
    )


def ordered(findings: list[Finding]) -> list[Finding]:
    """The likeliest explanation first."""
    return sorted(findings, key=lambda each: (_SEVERITIES.index(each.severity), _RANKS[each.code]))


def conclusion(findings: list[Finding]) -> str:
    """What most likely happened, in a sentence or a few.

    Args:
        findings: In the order of likelihood.
    """
    grave = [each for each in findings if each.severity != "note" and each.cause != "none"]
    worse = next((each.summary.partition(";")[0] for each in findings if each.code == "prompts.worse"), None)
    if not grave and not worse:
        return "Nothing that matters changed."
    if not grave:
        notes = [MEANINGS[each.code].conclusion for each in findings if each.cause != "none"]
        return f"{worse}, and nothing in the files explains it. They differ so: {'; '.join(notes) or 'not at all'}."
    first, *others = (MEANINGS[each.code].conclusion for each in grave)
    text = f"Most likely {first}{_places(grave[0])}."
    if others:
        text += f" Also: {'; '.join(others)}."
    return f"{text} {worse}." if worse else text


def _places(found: Finding) -> str:
    if not found.where or found.cause in {"tokenizer", "template"}:
        return ""
    named = found.where[:3]
    more = f" and {found.count - len(named)} more" if found.count > len(named) else ""
    return f" ({', '.join(named)}{more})"


def _rounded(value: float | str) -> float | int | str:
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else "infinite"  # which JSON has no number for
