"""A scorecard for people: as lines of text, and as a page of its own (`page.py`). Pure."""

from collections.abc import Iterator
from typing import Final

from msgspec import UNSET

from server.display import bytes_text, table
from server.scorecard import frontier_display
from server.scorecard.card import (
    Divergence,
    Drift,
    Scorecard,
    SpeedScore,
    SuiteDrift,
    SuiteScore,
)
from server.scorecard.intervals import change_text, quantile_text, share_text

GROUPS_SHOWN: Final = 8
"""In text: those that changed most."""

PROMPTS_SHOWN: Final = 12
P_NOTABLE: Final = 0.05

VERDICTS: Final = {
    "passed": "passed",
    "failed": "failed",
    "undecided": "not passed: undecided",
    "incomplete": "not passed: incomplete",
}


def text_lines(card: Scorecard) -> list[str]:
    """The scorecard as text."""
    subject = card.subject
    lines = [
        f"{subject.family} {subject.version}: {VERDICTS[card.verdict]}",
        *(f"  {file.name}  sha256 {file.sha256}" for file in subject.files),
        f"  {card.runtime} {card.runtime_version}, {card.settings.threads} thread(s), {card.machine}",
        "",
        *table(["CHECK", "", ""], [[check.name, check.status, check.detail] for check in card.checks]),
    ]
    if card.missing_count:
        lines += ["", f"Missing: {card.missing_count}"]
        lines += [f"  {missing.what}: {missing.reason}" for missing in card.missing]
    lines += [
        "",
        *table(["SUITE", "ASKED", "RIGHT", "ACCURACY", "95 %"], [_suite_row(suite) for suite in card.suites]),
    ]
    lines += [f"  {suite.name}: {note}" for suite in card.suites for note in suite.notes]
    lines += ["", *_resource_lines(card)]
    if card.drift is not None:
        lines += ["", *_drift_lines(card.drift)]
    if card.frontier is not UNSET:
        lines += ["", *frontier_display.text_lines(card.frontier)]
    return lines


def speed_rows(speed: SpeedScore) -> list[tuple[str, str]]:
    """Speed, name by name."""
    rows = [("load", f"{speed.load_ms:.1f} ms, from the page cache")]
    rows += [
        (f"{name} of one {speed.step}", quantile_text(found))
        for name, found in (("p50", speed.p50_ms), ("p95", speed.p95_ms), ("p99", speed.p99_ms))
    ]
    unit = "tokens" if speed.step == "token" else "inferences"
    rows.append((f"{unit} per second", f"{speed.steps_per_s:,.1f}, over {speed.count:,}"))
    if speed.prompt_tokens:
        rows.append(
            ("prompt tokens per second", f"{speed.prompt_tokens_per_s:,.1f}, {speed.prompt_tokens} at once")
        )
    return rows


def memory_rows(card: Scorecard) -> list[list[str]]:
    """Memory by length of context: weights, keys and values, runtime, peak."""
    memory = card.memory
    if memory is None:
        return []
    per_token = card.resources.cache_bytes_per_token
    return [
        [
            f"{context.tokens:,}" if context.tokens else "-",
            bytes_text(memory.runtime_bytes),
            bytes_text(memory.weights_bytes),
            "-" if per_token is None else bytes_text(per_token * context.tokens),
            bytes_text(context.cache_bytes) if context.tokens else "-",
            bytes_text(context.peak_bytes),
        ]
        for context in memory.contexts
    ]


MEMORY_TITLES: Final = ["CONTEXT", "RUNTIME", "WEIGHTS", "KV COMPUTED", "KV MEASURED", "PEAK"]


def cost_rows(card: Scorecard) -> list[list[str]]:
    """What inferences take, estimated."""
    return [
        [
            cost.what,
            f"{cost.operations / 1e9:,.3f} GFLOP",
            bytes_text(cost.moved_bytes),
            f"{cost.operations / cost.moved_bytes:,.1f}" if cost.moved_bytes else "-",
        ]
        for cost in card.resources.costs
    ]


def drift_rows(drift: Drift) -> list[list[str]]:
    """Flips of each suite."""
    return [_drift_row(suite) for suite in drift.suites]


def divergence_rows(found: tuple[Divergence, ...]) -> list[list[str]]:
    """Prompts that part, the earliest first; then those that do not."""
    ordered = sorted(found, key=lambda each: (each.token is None, each.token or 0, each.suite, each.name))
    return [
        [
            each.suite,
            each.name,
            "same" if each.token is None else str(each.token),
            str(each.tokens),
            each.before,
            each.now,
        ]
        for each in ordered
    ]


def notable_groups(suite: SuiteDrift) -> list[list[str]]:
    """Groups, those that changed most first."""
    ordered = sorted(
        suite.groups, key=lambda each: (each.p_holm, each.paired.p_value, -abs(each.paired.difference.value))
    )
    return [
        [
            each.name,
            str(each.paired.count),
            str(each.paired.gained),
            str(each.paired.lost),
            *change_text(each.paired.difference),
            f"{each.p_holm:.2g}",
        ]
        for each in ordered
    ]


GROUP_TITLES: Final = ["GROUP", "BOTH", "GAINED", "LOST", "POINTS", "95 %", "P (HOLM)"]


def _suite_row(suite: SuiteScore) -> list[str]:
    asked = f"{suite.count:,} of {suite.total:,}"
    return [suite.name, asked, f"{suite.right:,}", *share_text(suite.accuracy)]


def _resource_lines(card: Scorecard) -> Iterator[str]:
    resources = card.resources
    yield f"Size: {bytes_text(resources.size_bytes)}, {resources.parameters / 1e6:,.1f} M parameters"
    if card.speed is not None:
        yield from (f"  {name:<26} {text}" for name, text in speed_rows(card.speed))
    yield from table(MEMORY_TITLES, memory_rows(card))
    yield from table(["ESTIMATED", "OPERATIONS", "MOVED", "PER BYTE"], cost_rows(card))
    yield from (f"  {note}" for note in resources.notes)


def _drift_lines(drift: Drift) -> Iterator[str]:
    yield f"Against {drift.against.version}"
    titles = ["SUITE", "BOTH", "BEFORE", "GAINED", "LOST", "OTHER ANSWERS", "POINTS", "95 %", "P (MCNEMAR)"]
    yield from table(titles, drift_rows(drift))
    texts = drift.texts
    if texts is not None:
        yield (
            f"KL(before || now): mean {texts.mean.value:.5f} nats ({texts.mean.low:.5f} to {texts.mean.high:.5f}), median"
            f" {texts.median:.5f}, p99 {texts.p99:.4f}, largest {texts.largest:.4f}; same first choice {100 * texts.same:.1f} %;"
            f" {texts.positions:,} positions of {texts.texts} texts"
        )
    for suite in drift.suites:
        rows = notable_groups(suite)
        if rows:
            yield f"{suite.name}: groups that changed most, of {len(rows)}"
            yield from table(GROUP_TITLES, rows[:GROUPS_SHOWN])
    if drift.divergences:
        rows = divergence_rows(drift.divergences)
        parted = sum(each.token is not None for each in drift.divergences)
        yield f"Greedy answers: {parted} of {len(rows)} part; the earliest"
        yield from table(["SUITE", "PROMPT", "FIRST TOKEN", "OF"], [row[:4] for row in rows[:PROMPTS_SHOWN]])


def _drift_row(suite: SuiteDrift) -> list[str]:
    flips = suite.paired
    return [
        suite.name,
        f"{flips.count:,}",
        share_text(suite.before)[0],
        str(flips.gained),
        str(flips.lost),
        str(suite.changed),
        *change_text(flips.difference),
        f"{flips.p_value:.2g}",
    ]
