"""From answers to figures: what was right, how fast, what changed. Pure, and the same answers always give the same figures."""

from collections.abc import Sequence
from statistics import median
from typing import Final

import numpy as np

from server.scorecard.card import (
    Divergence,
    GroupDrift,
    GroupScore,
    PromptScore,
    SpeedScore,
    SuiteDrift,
    SuiteScore,
    TextDrift,
)
from server.scorecard.items import (
    LETTERS,
    ChoiceQuestion,
    ClassQuestion,
    Comparison,
    GoldenQuestion,
    Item,
    Reply,
    Suite,
)
from server.scorecard.statistics import Paired, clustered_mean, holm, paired, quantile, wilson
from server.scorecard.suites import last_number
from server.scorecard.work import Speed

Replies = Sequence[Reply | None]

_ANSWER_CHARS_MAX: Final = 160


def answer_of(item: Item, reply: Reply) -> str:
    """What counts as the answer, to be compared with `item.right` and with another model's."""
    question = item.question
    if isinstance(question, ChoiceQuestion):
        best = max(range(len(reply.scores)), key=lambda index: reply.scores[index])
        is_lettered = item.right in LETTERS
        return LETTERS[best] if is_lettered else str(best)
    if isinstance(question, ClassQuestion):
        return str(reply.label)
    if isinstance(question, GoldenQuestion):
        return reply.text.strip()
    return last_number(reply.text)


def is_right(item: Item, reply: Reply) -> bool:
    """Whether a reply counts as right."""
    if not isinstance(item.question, GoldenQuestion):
        return answer_of(item, reply) == item.right
    is_likely = item.logprob_mean_min is None or reply.scores[0] >= item.logprob_mean_min
    return is_likely and (not item.is_exact or answer_of(item, reply).startswith(item.right.strip()))


def score_speed(speed: Speed) -> SpeedScore:
    """Sum up latencies."""
    steps = speed.step_ms
    prompt_ms = median(speed.prompt_ms) if speed.prompt_ms else 0.0
    return SpeedScore(
        load_ms=median(speed.load_ms),
        step="token" if speed.prompt_ms else "inference",
        count=len(steps),
        p50_ms=quantile(steps, 0.5),
        p95_ms=quantile(steps, 0.95),
        p99_ms=quantile(steps, 0.99),
        steps_per_s=1000 * len(steps) / sum(steps),
        prompt_tokens_per_s=1000 * speed.prompt_tokens / prompt_ms if prompt_ms else 0.0,
        prompt_tokens=speed.prompt_tokens,
    )


def score_suite(suite: Suite, replies: Replies) -> SuiteScore:
    """Count right answers."""
    judged = [
        (item, reply, is_right(item, reply))
        for item, reply in zip(suite.items, replies, strict=True)
        if reply is not None
    ]
    right = sum(each for _, _, each in judged)
    groups: dict[str, list[bool]] = {}
    for item, _, each in judged:
        if item.group:
            groups.setdefault(item.group, []).append(each)
    is_prompts = suite.kind in {"golden", "edge"}
    return SuiteScore(
        name=suite.name,
        kind=suite.kind,
        digest=suite.digest,
        total=suite.total,
        asked=len(suite.items),
        count=len(judged),
        right=right,
        accuracy=wilson(right, len(judged)) if judged else None,
        groups=tuple(
            GroupScore(name=name, count=len(each), right=sum(each)) for name, each in sorted(groups.items())
        ),
        prompts=tuple(_prompt_score(*each) for each in judged) if is_prompts else (),
        notes=suite.notes,
    )


def _prompt_score(item: Item, reply: Reply, is_good: bool) -> PromptScore:  # noqa: FBT001 - a row of `judged`
    return PromptScore(
        name=item.name,
        is_right=is_good,
        logprob_mean=reply.scores[0] if reply.scores else None,
        logprob_mean_min=item.logprob_mean_min,
    )


def suite_drift(suite: Suite, earlier: Replies, now: Replies) -> SuiteDrift | None:
    """What changed; None where the two have no question in common."""
    both = [
        (item, first, second)
        for item, first, second in zip(suite.items, earlier, now, strict=True)
        if first is not None and second is not None
    ]
    if not both:
        return None
    flips = [(item.group, is_right(item, first), is_right(item, second)) for item, first, second in both]
    groups = sorted({group for group, _, _ in flips if group})
    by_group = [_paired([flip for flip in flips if flip[0] == group]) for group in groups]
    adjusted = holm([each.p_value for each in by_group])
    return SuiteDrift(
        name=suite.name,
        kind=suite.kind,
        before=wilson(sum(before for _, before, _ in flips), len(flips)),
        paired=_paired(flips),
        changed=sum(answer_of(item, first) != answer_of(item, second) for item, first, second in both),
        groups=tuple(
            GroupDrift(name=name, paired=each, p_holm=p_holm)
            for name, each, p_holm in zip(groups, by_group, adjusted, strict=True)
        ),
    )


def _paired(flips: Sequence[tuple[str, bool, bool]]) -> Paired:
    gained = sum(not before and now for _, before, now in flips)
    lost = sum(before and not now for _, before, now in flips)
    return paired(gained, lost, len(flips))


def text_drift(comparisons: Sequence[Comparison | None]) -> TextDrift | None:
    """Sum up comparisons; None where there is none."""
    found = [each for each in comparisons if each is not None and each.divergences]
    if not found:
        return None
    values = np.concatenate([np.asarray(each.divergences) for each in found])
    return TextDrift(
        texts=len(found),
        positions=len(values),
        mean=clustered_mean(
            [sum(each.divergences) for each in found], [len(each.divergences) for each in found]
        ),
        median=float(np.median(values)),
        p99=float(np.quantile(values, 0.99)),
        largest=float(values.max()),
        same=sum(each.same for each in found) / len(values),
    )


def divergences_of(suite: Suite, before: Replies, now: Replies) -> list[Divergence]:
    """Where the greedy answers part; nothing for suites without texts."""
    found = []
    for item, first, second in zip(suite.items, before, now, strict=True):
        if first is None or second is None or not (first.tokens or second.tokens):
            continue
        pairs = zip(first.tokens, second.tokens, strict=False)
        token = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
        shorter = min(len(first.tokens), len(second.tokens))
        if token is None and len(first.tokens) != len(second.tokens):
            token = shorter  # one of them ends here
        found.append(
            Divergence(
                suite=suite.name,
                name=item.name,
                token=token,
                tokens=shorter,
                before=_line(first.text),
                now=_line(second.text),
            )
        )
    return found


def _line(text: str) -> str:
    """One line without control characters: whoever made a model does not get to move a reader's cursor."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return plain if len(plain) <= _ANSWER_CHARS_MAX else plain[: _ANSWER_CHARS_MAX - 1] + "…"
