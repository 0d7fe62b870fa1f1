"""From the answers of two versions to findings: where they part, with which logits, and which are worse. Pure."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from protocol.release import TextPrompt
from server.diagnosis.asking import Answer, Candidate
from server.diagnosis.findings import Finding, finding

WORSE_LOGPROB: Final = 0.1
"""Mean natural log-probability per token that an expected completion may lose. Quantizing a small model from eight to four bits costs
some 0.05."""


class Divergence(Struct, frozen=True, kw_only=True):
    """What became of one prompt.

    Attributes:
        name: Of the prompt.
        is_worse: The expected completion has become less likely by more than `WORSE_LOGPROB`, or below what the plan asks for.
        old_logprob: Of the expected completion, mean per token; None where it is not finite.
        new_logprob: Likewise.
        prompt_token: Where the prompt itself is made of other tokens; None where it is not.
        step: Token of the answer from which on the versions differ; None where they answer alike.
        old: Likeliest tokens of the older version there, with their logits.
        new: Likewise of the newer one.
    """

    name: str
    is_worse: bool
    old_logprob: float | None
    new_logprob: float | None
    prompt_token: int | None
    step: int | None
    old: list[Candidate] = []
    new: list[Candidate] = []

    @property
    def is_other(self) -> bool:
        """Whether the versions answer differently."""
        return self.step is not None


def compare_answers(
    prompts: Sequence[TextPrompt], old: Sequence[Answer], new: Sequence[Answer]
) -> list[Divergence]:
    """Compare answers to the same prompts in the same order."""
    return [_compare(*each) for each in zip(prompts, old, new, strict=True)]


def _compare(prompt: TextPrompt, old: Answer, new: Answer) -> Divergence:
    step = _parting(old.tokens, new.tokens)
    is_lost = new.logprob_mean is None or new.logprob_mean < prompt.logprob_mean_min
    was_good = old.logprob_mean is not None and old.logprob_mean >= prompt.logprob_mean_min
    has_dropped = (
        new.logprob_mean is not None
        and old.logprob_mean is not None
        and new.logprob_mean < old.logprob_mean - WORSE_LOGPROB
    )
    return Divergence(
        name=prompt.name,
        is_worse=has_dropped or (is_lost and was_good),
        old_logprob=old.logprob_mean,
        new_logprob=new.logprob_mean,
        prompt_token=_parting(old.prompt_tokens, new.prompt_tokens),
        step=step,
        old=_at(old, step),
        new=_at(new, step),
    )


def findings_of_answers(divergences: Sequence[Divergence]) -> list[Finding]:
    """What the answers say."""
    found = []
    worse = [each for each in divergences if each.is_worse]
    other = [each for each in divergences if each.step is not None and not each.is_worse]
    resplit = [each for each in divergences if each.prompt_token is not None]
    if resplit:
        summary = f"{len(resplit)} of {len(divergences)} prompts are made of other tokens than before"
        found.append(finding("tokenizer.changed", summary, [each.name for each in resplit]))
    if worse:
        ranked = sorted(worse, key=lambda each: (each.new_logprob or -1e9) - (each.old_logprob or 0))
        summary = f"{len(worse)} of {len(divergences)} prompts got worse; {told(ranked[0])}"
        found.append(finding("prompts.worse", summary, [each.name for each in ranked]))
    if other:
        summary = f"{len(other)} of {len(divergences)} prompts are answered otherwise, and no worse; {told(other[0])}"
        found.append(finding("prompts.diverged", summary, [each.name for each in other]))
    return found


def told(divergence: Divergence) -> str:
    """A prompt in one line: its completion's log-probability, the first other token, and what both versions had there."""
    parts = [
        f"{divergence.name}: {_number(divergence.old_logprob)} to {_number(divergence.new_logprob)} a token"
    ]
    if divergence.step is not None:
        sides = [
            f"{who} {_candidates(side)}" for who, side in (("old", divergence.old), ("new", divergence.new))
        ]
        parts.append(f"from token {divergence.step + 1} on {', '.join(sides)}")
    return ", ".join(parts)


def _candidates(candidates: Sequence[Candidate]) -> str:
    return " ".join(f"{each.text!r} {each.logit:.2f}" for each in candidates[:2]) or "nothing"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _parting(old: Sequence[int], new: Sequence[int]) -> int | None:
    pairs = enumerate(zip(old, new, strict=False))
    shorter = min(len(old), len(new))
    at = next((number for number, (before, after) in pairs if before != after), shorter)
    return None if at == len(old) == len(new) else at


def _at(answer: Answer, step: int | None) -> list[Candidate]:
    return [] if step is None or step >= len(answer.steps) else answer.steps[step]
