"""Health evidence in, a verdict out: commit or roll back. Pure.

What was not measured counts as failed. The limits come from the signed release; the tier may be stricter about
memory, never more generous.
"""

from dataclasses import dataclass
from typing import Final

from protocol.messages import TrialEvidence
from protocol.release import ClassPrompt, HealthPlan

TRIES_MAX: Final = 3
"""Trials that may be begun for one release. The counter is durable before each start, so a model that takes the
whole device down is given up after three."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes: code: empty when the trial was passed; detail: one line for the operator."""

    code: str
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the model may be committed."""
        return not self.code


def judge(evidence: TrialEvidence, health: HealthPlan, memory_bytes_max: int) -> Verdict:
    """Compare what was measured with what was asked for; the first thing that fails is named.

    Args:
        evidence: From the trial.
        health: From the signed release.
        memory_bytes_max: What the tier gives to a model.
    """
    if evidence.latency is None or evidence.memory_peak_bytes is None:
        return Verdict("trial.crashed", evidence.detail or "the trial did not finish")
    needed = prompts_needed(health)
    if evidence.prompts_passed < needed:
        return Verdict(
            "trial.answers",
            f"{evidence.prompts_passed} of {evidence.prompts_total} golden prompts answered well, {needed} needed",
        )
    if not evidence.latency.p99_ms <= health.latency_p99_ms_max:  # also true of NaN
        return Verdict(
            "trial.latency",
            f"p99 latency {evidence.latency.p99_ms:.1f} ms, allowed {health.latency_p99_ms_max:.1f} ms",
        )
    limit = min(health.memory_peak_bytes_max, memory_bytes_max)
    if evidence.memory_peak_bytes > limit:
        return Verdict("trial.memory", f"peak memory {evidence.memory_peak_bytes} bytes, allowed {limit}")
    return Verdict("", f"{evidence.prompts_passed} of {evidence.prompts_total} golden prompts answered well")


def prompts_needed(health: HealthPlan) -> int:
    """How many prompts must pass: every text prompt, and the required share of the class prompts."""
    classes = sum(isinstance(prompt, ClassPrompt) for prompt in health.prompts)
    texts = len(health.prompts) - classes
    share = health.class_accuracy_min * classes
    return texts + int(share) + (share > int(share))
