"""What a version of the model knows, as llama.cpp measures it, and the health plan made from that."""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from examples.smollm2.llama import Model
from examples.smollm2.questions import Question
from protocol.errors import ModelFileError
from protocol.release import HealthPlan, TextPrompt

_ANSWER_TOKENS_MAX = 24  # as many as the longest right answer has

# Prompts of the health plan: these facts, and all held-out prompts, which no training has seen.
_PLAN_FACTS = ("what", "states", "rollback", "slots", "chunk", "broker", "delta")
# Those that the model must give back word for word; chosen where version 2 is surest.
_PLAN_EXACT_MAX = 3
# Kernels of other processors round differently; that moves a mean log-probability by some hundredths.
_LOGPROB_MARGIN = 0.5

_LATENCY_P99_MS_MAX = 10_000.0  # one prompt with its completion on a Raspberry Pi 4 takes about two seconds
_MEMORY_PEAK_BYTES_MAX = 1_000_000_000
_LOAD_TIMEOUT_MS = 120_000
_PROMPT_TIMEOUT_MS = 60_000
_SOAK_MS = 1_000


class Measurement(msgspec.Struct, frozen=True):
    """One version's answer to one question.

    Attributes:
        name: Of the question.
        use: Of the question.
        prompt: What the model was given.
        expected: The right completion.
        answer: The greedy completion.
        logprob_mean: Mean natural log-probability per token of the right completion.
        paraphrase_logprob_mean: The same after the paraphrased prompt, which was never trained on.
    """

    name: str
    use: str
    prompt: str
    expected: str
    answer: str
    logprob_mean: float
    paraphrase_logprob_mean: float | None = None


def measure(file: Path, questions: Sequence[Question]) -> list[Measurement]:
    """Asks one version all questions.

    Raises:
        EngineError: llama.cpp cannot load the file.
    """
    with Model(file) as model:
        return [
            Measurement(
                name=each.name,
                use=each.use,
                prompt=each.prompt,
                expected=each.completion,
                answer=model.answer(each.prompt, _ANSWER_TOKENS_MAX),
                logprob_mean=model.logprob_mean(each.prompt, each.completion),
                paraphrase_logprob_mean=(
                    model.logprob_mean(each.paraphrased_prompt, each.completion) if each.paraphrase else None
                ),
            )
            for each in questions
        ]


def summary(measured: Sequence[Measurement]) -> str:
    """One line for people: means by use, and how many facts are answered word for word."""
    facts = [each for each in measured if each.use == "fact"]
    exact = sum(each.answer == each.expected for each in facts)
    means = []
    for use in ("fact", "general", "held-out"):
        values = [each.logprob_mean for each in measured if each.use == use]
        means.append(f"{use} {math.fsum(values) / len(values):.2f}")
    return f"mean log-probability {', '.join(means)}; {exact} of {len(facts)} facts word for word"


def health_plan(
    questions: Sequence[Question], good: Sequence[Measurement], bad: Sequence[Measurement], *, facts: bool
) -> HealthPlan:
    """The health plan that a good version passes with a margin and a bad one fails.

    Args:
        questions: All questions.
        good: What the version that must pass gave, in the order of `questions`.
        bad: The same of the damaged version.
        facts: Whether the plan asks for what version 2 has learned, or only for what the model knew before.

    Raises:
        ModelFileError: The bad version would pass.
    """
    chosen = [
        (question, ours, theirs)
        for question, ours, theirs in zip(questions, good, bad, strict=True)
        if question.use == "held-out" or (facts and question.name in _PLAN_FACTS)
    ]
    sure = sorted(
        (ours for _, ours, _ in chosen if facts and ours.use == "fact" and ours.answer == ours.expected),
        key=lambda ours: -ours.logprob_mean,
    )
    exact = {ours.name for ours in sure[:_PLAN_EXACT_MAX]}
    prompts = [
        TextPrompt(
            name=question.name,
            prompt=question.prompt,
            completion=question.completion,
            logprob_mean_min=round(ours.logprob_mean - _LOGPROB_MARGIN, 2),
            exact=question.name in exact,
        )
        for question, ours, _ in chosen
    ]
    # Not `<`: a damaged model may give no number at all.
    if any(theirs.logprob_mean >= ours.logprob_mean - 2 * _LOGPROB_MARGIN for _, ours, theirs in chosen):
        raise ModelFileError(
            "the damaged version passes a prompt of the health plan", hint="damage more scales"
        )
    return HealthPlan(
        prompts=list(prompts),
        latency_p99_ms_max=_LATENCY_P99_MS_MAX,
        memory_peak_bytes_max=_MEMORY_PEAK_BYTES_MAX,
        load_timeout_ms=_LOAD_TIMEOUT_MS,
        prompt_timeout_ms=_PROMPT_TIMEOUT_MS,
        soak_ms=_SOAK_MS,
    )
