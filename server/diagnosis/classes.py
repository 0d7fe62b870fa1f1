"""From the classes that two versions of a classifier give to the same inputs to findings: which changed, and by which margin. Pure."""

from collections.abc import Sequence

from msgspec import Struct

from protocol.release import ClassPrompt
from server.diagnosis.findings import Finding, finding


class ClassAnswer(Struct, frozen=True, kw_only=True):
    """What a version says to an input.

    Attributes:
        label: The class; None where there is no answer.
        scores: Of all classes, logits or logarithms of probabilities; none where the model gives a class only.
        trouble: Why there is no answer; "" where there is one.
    """

    label: int | None = None
    scores: list[float] = []
    trouble: str = ""


class Shift(Struct, frozen=True, kw_only=True):
    """What became of one input.

    Attributes:
        name: Of the input.
        right: The class that the health plan asks for.
        old_label: The class of the older version; None where it has no answer.
        new_label: Of the newer one.
        is_worse: The older version was right, and the newer one is not.
        old_lead: By how much the class that the older version gives led there: over the class that the newer version gives, or over
            the next one where both give the same; None where a version gives no scores.
        new_lead: Likewise of the newer version: by how much its class leads over that of the older one, or over the next.
        trouble: Why a version has no answer.
    """

    name: str
    right: int
    old_label: int | None
    new_label: int | None
    is_worse: bool
    old_lead: float | None
    new_lead: float | None
    trouble: str = ""

    @property
    def is_other(self) -> bool:
        """Whether the versions give different classes, or one of them none."""
        return self.old_label != self.new_label


def compare_classes(
    prompts: Sequence[ClassPrompt], old: Sequence[ClassAnswer], new: Sequence[ClassAnswer]
) -> list[Shift]:
    """Compare answers to the same inputs in the same order."""
    return [_compare(*each) for each in zip(prompts, old, new, strict=True)]


def _compare(prompt: ClassPrompt, old: ClassAnswer, new: ClassAnswer) -> Shift:
    return Shift(
        name=prompt.name,
        right=prompt.label,
        old_label=old.label,
        new_label=new.label,
        is_worse=old.label == prompt.label != new.label,
        old_lead=_lead(old, new.label),
        new_lead=_lead(new, old.label),
        trouble=new.trouble or old.trouble,
    )


def _lead(answer: ClassAnswer, other: int | None) -> float | None:
    """By how much an answer's class leads over another one, or over the next if that is the same."""
    scores = answer.scores
    if answer.label is None or other is None or len(scores) < 2 or max(answer.label, other) >= len(scores):
        return None
    rest = [score for label, score in enumerate(scores) if label != answer.label]
    below = scores[other] if other != answer.label else max(rest)
    return round(scores[answer.label] - below, 4)


def findings_of_classes(shifts: Sequence[Shift]) -> list[Finding]:
    """What the answers say."""
    found = []
    silent = [each for each in shifts if each.new_label is None and each.old_label is not None]
    worse = [each for each in shifts if each.is_worse and each.new_label is not None]
    other = [
        each
        for each in shifts
        if None not in {each.old_label, each.new_label} and each.is_other and not each.is_worse
    ]
    if silent:
        summary = f"{len(silent)} of {len(shifts)} inputs have no answer any more: {silent[0].trouble}"
        found.append(finding("prompts.unanswered", summary, [each.name for each in silent]))
    if worse:
        ranked = sorted(worse, key=lambda each: -(each.new_lead or 0.0))
        summary = f"{len(worse)} of {len(shifts)} inputs got a wrong class; {told_class(ranked[0])}"
        found.append(finding("prompts.worse", summary, [each.name for each in ranked]))
    if other:
        summary = f"{len(other)} of {len(shifts)} inputs changed their class, and had a wrong one; {told_class(other[0])}"
        found.append(finding("prompts.diverged", summary, [each.name for each in other]))
    return found


def told_class(shift: Shift) -> str:
    """An input in one line: its classes, and by how much each version preferred its own."""
    if shift.new_label is None or shift.old_label is None:
        return f"{shift.name}: no answer: {shift.trouble}"
    if not shift.is_other:
        return f"{shift.name}: class {shift.new_label} as before, ahead by {_number(shift.new_lead)}, was {_number(shift.old_lead)}"
    return (
        f"{shift.name}: class {shift.old_label} (ahead by {_number(shift.old_lead)}) became {shift.new_label}"
        f" (ahead by {_number(shift.new_lead)}); {shift.right} is right"
    )


def _number(value: float | None) -> str:
    return "an unknown margin" if value is None else f"{value:.2f}"
