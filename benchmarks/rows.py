"""What was measured: one row for each pair and method, what follows from it, and the table. No processes, no files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = ("small", "fast")
"""The two profiles of the project's own coder; every other method is a peer."""

_MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process took.

    Attributes:
        cpu_s: User and system time of the work, without the start of an interpreter.
        process_cpu_s: The same with it.
        wall_s: From start to end, on a machine that may do other things.
        peak_bytes: Of resident memory, the interpreter included.
    """

    cpu_s: float
    process_cpu_s: float
    wall_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a delta cannot be much smaller than; see `entropy.py`.

    Attributes:
        conditional_bytes: Empirical conditional entropy of the new file.
        floor_bytes: Entropy when every weight's update is known, where the weights are.
    """

    conditional_bytes: int | None = None
    floor_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one pair.

    Attributes:
        pair: Name of the pair.
        method: A profile of ours or a peer.
        version: Of the method's library or program.
        base_sha256: Of the file that devices have.
        new_sha256: Of the file that they shall have.
        new_bytes: Its length.
        patch_bytes: None where the method failed or is not installed.
        build: Cost of making the patch.
        apply: Cost of applying it.
        error: Why there are no figures, or empty.
    """

    pair: str
    method: str
    version: str
    base_sha256: str
    new_sha256: str
    new_bytes: int
    patch_bytes: int | None = None
    build: Cost | None = None
    apply: Cost | None = None
    error: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether this is the project's own coder."""
        return self.method in OURS


@dataclass(frozen=True, slots=True)
class Results:
    """All rows of a run and the estimates for its pairs."""

    rows: list[Row] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def row(self, pair: str, method: str) -> Row | None:
        """The row with figures, if there is one."""
        found = (row for row in self.rows if (row.pair, row.method) == (pair, method))
        return next((row for row in found if row.patch_bytes is not None), None)

    def best_peer(self, pair: str) -> Row | None:
        """The peer with the fewest bytes."""
        peers = [
            row for row in self.rows if row.pair == pair and not row.is_ours and row.patch_bytes is not None
        ]
        return min(peers, key=lambda row: row.patch_bytes or 0, default=None)

    def ratio_to_best_peer(self, row: Row) -> float | None:
        """A row's bytes over those of the best peer on the same pair."""
        best = self.best_peer(row.pair)
        if best is None or row.patch_bytes is None or not best.patch_bytes:
            return None
        return row.patch_bytes / best.patch_bytes


def megabytes_per_second(row: Row, cost: Cost | None) -> float | None:
    """Megabytes of the result for each second of CPU time."""
    return row.new_bytes / _MEGABYTE / max(cost.cpu_s, 1e-3) if cost else None


def json_line(results: Results, row: Row) -> str:
    """A row with everything that follows from it, as one line of JSON."""
    line: dict[str, Any] = asdict(row)
    line["share"] = _rounded(row.patch_bytes / row.new_bytes if row.patch_bytes is not None else None, 7)
    line["ratio_to_best_peer"] = _rounded(results.ratio_to_best_peer(row), 4)
    line |= asdict(results.estimates.get(row.pair, Estimate()))
    line["build_mb_s"] = _rounded(megabytes_per_second(row, row.build), 3)
    line["apply_mb_s"] = _rounded(megabytes_per_second(row, row.apply), 3)
    return json.dumps(line)


def parse_line(line: str) -> tuple[Row, Estimate]:
    """A row from its line, and the estimates for its pair; what follows from them is left out.

    Raises:
        ValueError: It is not such a line.
    """
    try:
        values = json.loads(line)
        estimate = {name: values[name] for name in Estimate.__dataclass_fields__}
        values = {name: values[name] for name in Row.__dataclass_fields__}
        costs = {name: Cost(**values[name]) if values[name] else None for name in ("build", "apply")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a row: {line[:80]}") from error
    return Row(**values | costs), Estimate(**estimate)


def table(results: Results) -> str:
    """All rows for people, pairs in the order of the run, methods by their bytes."""
    pairs = list(dict.fromkeys(row.pair for row in results.rows))
    lines: list[Sequence[str]] = [_HEADINGS]
    for pair in pairs:
        rows = [row for row in results.rows if row.pair == pair]
        rows.sort(key=lambda row: (row.patch_bytes is None, row.patch_bytes or 0))
        lines += [_cells(results, row) for row in rows]
    return aligned(lines)


def aligned(lines: Iterable[Sequence[str]], left: int = 2) -> str:
    """Cells in columns, the first `left` of them flush left."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_HEADINGS = (
    "pair",
    "method",
    "bytes",
    "% of new",
    "of best peer",
    "of H(new|old)",
    "of floor",
    "build MB/s",
    "MB",
    "apply MB/s",
    "MB",
)


def _cells(results: Results, row: Row) -> list[str]:
    cells = [row.pair, row.method]
    if row.patch_bytes is None:
        return [*cells, row.error, *[""] * (len(_HEADINGS) - 3)]
    estimate = results.estimates.get(row.pair, Estimate())
    cells += [f"{row.patch_bytes:,}", f"{100 * row.patch_bytes / row.new_bytes:.3f}"]
    cells.append(_ratio(results.ratio_to_best_peer(row)))
    cells += [
        _ratio(row.patch_bytes / bound if bound else None)
        for bound in (estimate.conditional_bytes, estimate.floor_bytes)
    ]
    for cost in (row.build, row.apply):
        speed = megabytes_per_second(row, cost)
        cells += [f"{speed:.1f}" if speed else "", f"{cost.peak_bytes / _MEGABYTE:.0f}" if cost else ""]
    return cells


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
