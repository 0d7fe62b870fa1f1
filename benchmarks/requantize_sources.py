"""One file for a fleet that runs two versions, beside the best file for each of them: what goes to whose devices."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.requantize_series import calibrated
from benchmarks.rows import aligned
from server.requantize.choice import choose
from server.requantize.portions import Portion
from server.requantize.settings import Settings
from server.requantize.weighing import delta_sizes
from server.scorecard.journal import Journal

NEW = "v2_large"
PRICE = 8e-9
"""Nats a bit, as in the smaller of the measured choices."""

FLEETS: tuple[tuple[str, str], ...] = (("v2_tiny", "v1"), ("v2_last2", "v1"))
"""What most devices have after an interrupted rollout, and what the others still have."""

SHARE = 0.7
"""Of the fleet that has the first one."""


class ForWhom(Struct, frozen=True, kw_only=True):
    """One file.

    Attributes:
        chosen_for: Versions that it was chosen for; none of the plain file.
        sizes: Bytes of the delta from each version of the fleet.
        objective: Expected loss in nats per token, as the calibration sees it; None of the plain file.
    """

    chosen_for: tuple[str, ...]
    sizes: tuple[int, ...]
    objective: float | None = None


def run_sources(
    cache: Path, work: Path, kept: Journal, say: Callable[[str], None], *, is_measuring: bool
) -> dict[tuple[str, str], tuple[ForWhom, ...]]:
    """All files of each fleet; what is in the journal is taken from there.

    Args:
        cache: Files of the pairs.
        work: Keeps the calibration.
        kept: What was measured.
        say: Takes lines about the progress.
        is_measuring: Measure what is not there.
    """
    found = {}
    for fleet in FLEETS:
        files = [cache / f"{name}.q4_0.gguf" for name in fleet]
        missing = [path.name for path in (*files, cache / f"{NEW}.bf16.gguf") if not path.is_file()]
        if missing:
            say(f"sources: left out, {missing[0]} is missing: python -m benchmarks.pairs '*.q4_0'")
            continue
        rows = []
        for wanted in ((), fleet[:1], fleet[1:], fleet):
            key = f"sources {PRICE:g} {SHARE:g} {'+'.join(fleet)} for {'+'.join(wanted) or 'plain'}"
            row = kept.get(key, ForWhom)
            if row is None and is_measuring:
                row = _measure(cache, work, files, wanted, say)
                kept.put(key, row)
            if row is not None:
                rows.append(row)
        if rows:
            found[fleet] = tuple(rows)
    return found


def _measure(
    cache: Path, work: Path, files: Sequence[Path], wanted: tuple[str, ...], say: Callable[[str], None]
) -> ForWhom:
    if not wanted:
        return ForWhom(chosen_for=(), sizes=delta_sizes(files, cache / f"{NEW}.q4_0.gguf", 1))
    out = work / "sources.gguf"
    also = [Portion(files[1], 1 - SHARE)] if len(wanted) == len(files) else []
    chosen = choose(
        cache / f"{NEW}.bf16.gguf",
        cache / f"{wanted[0]}.q4_0.gguf",
        calibrated(cache, work, NEW, say),
        Settings(price=PRICE, workers=1),
        out,
        say,
        also=also,
    )
    sizes = tuple(each.delta_bytes for each in chosen.sent) or delta_sizes(files, out, 1)
    out.unlink()
    return ForWhom(chosen_for=wanted, sizes=sizes, objective=chosen.objective_after)


def source_lines(found: Mapping[tuple[str, str], Sequence[ForWhom]]) -> list[str]:
    """A table for each fleet."""
    lines = []
    for fleet, rows in found.items():
        shares = (SHARE, 1 - SHARE)
        titles = [f"to {name}, {100 * share:.0f} %, bytes" for name, share in zip(fleet, shares, strict=True)]
        table = [
            (
                "chosen for " + " and ".join(row.chosen_for) if row.chosen_for else "plain",
                *(f"{size:,}" for size in row.sizes),
                f"{sum(share * size for share, size in zip(shares, row.sizes, strict=True)):,.0f}",
                "-" if row.objective is None else f"{row.objective:.4f}",
            )
            for row in rows
        ]
        lines += ["", aligned([(f"new {NEW}", *titles, "mean", "expected loss"), *table], left=1)]
    return lines
