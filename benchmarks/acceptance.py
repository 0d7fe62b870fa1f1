"""The table of what the delta coder has to reach, with the measured figure beside each line."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from benchmarks.rows import Estimate, Results, aligned, megabytes_per_second

FULL = ("large.q4_0", "large.q4_k_m")
FULL_Q8 = ("large.q8_0",)
MERGED = ("lora.q4_0",)
LITTLE = ("tiny.q4_0", "last2.q4_0")
FAR = ("x4.q4_0",)
ONNX = ("minilm-large.int8", "minilm-large.int8pc")
NOT_WORSE = ("silero-5.1-6.0", "silero-6.0-6.2", "magika-3.2-3.3", "metadata.q4_0", "grown.q4_0", "random")
FINE_TUNES = (*FULL, *FULL_Q8, *MERGED, *LITTLE, *FAR)
FLOORED = ("large.q4_0", "lora.q4_0", "tiny.q4_0")

_MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Line:
    """One requirement.

    Attributes:
        what: In words.
        must: The bound.
        aim: The better bound that is hoped for.
        figure: What was measured, the worst of the pairs concerned; None where nothing was.
        at: The pair that it was measured on, or why there is no figure.
        is_minimum: Whether the figure must reach the bound from above.
        unit: Of all three.
    """

    what: str
    must: float
    aim: float
    figure: float | None
    at: str
    is_minimum: bool = False
    unit: str = ""

    @property
    def status(self) -> str:
        """`aim`, `ok`, `short`, or `not run`."""
        if self.figure is None:
            return "not run"
        sign = -1 if self.is_minimum else 1
        if sign * self.figure <= sign * self.aim:
            return "aim"
        return "ok" if sign * self.figure <= sign * self.must else "short"


def lines(results: Results) -> list[Line]:
    """All requirements that one run can show."""
    return [*_sizes(results), *_speeds(results), *_memory(results), _IN_PLACE]


def report(results: Results) -> str:
    """The requirements as a table."""
    heading = ("requirement", "must", "aim", "measured", "", "on")
    return aligned([heading, *(_cells(line) for line in lines(results))], left=1)


def is_reached(results: Results) -> bool:
    """Whether no requirement with a figure is short."""
    return all(line.status != "short" for line in lines(results))


# The device has no entry point for it that a benchmark could call.
_IN_PLACE = Line(
    "apply in place with inverse delta, times the time", 1.6, 1.3, None, "measured by benchmarks.inplace"
)


def _sizes(results: Results) -> Iterable[Line]:
    best = partial(_of_best_peer, results, "small")
    for what, pairs, must, aim in (
        ("small, of best peer: full fine-tune Q4_0, Q4_K_M", FULL, 0.55, 0.50),
        ("small, of best peer: full fine-tune Q8_0", FULL_Q8, 0.66, 0.60),
        ("small, of best peer: merged LoRA Q4_0", MERGED, 0.72, 0.68),
        ("small, of best peer: tiny update, last layers", LITTLE, 0.78, 0.70),
        ("small, of best peer: moved four times as far", FAR, 0.34, 0.31),
    ):
        yield _worst(what, pairs, must, aim, best)
    # The bound of that line was set when bsdiff4, which does far better there, had not been run on such a pair.
    yield _worst("  the same, of hdiffpatch alone", FAR, 0.34, 0.31, partial(_of_peer, results, "hdiffpatch"))
    yield _worst("fast, of small: the same pairs", FINE_TUNES, 1.25, 1.15, partial(_of_small, results))
    yield _worst("small, of best peer: ONNX int8", ONNX, 0.75, 0.60, best)
    yield _worst("small, of best peer: vendor, metadata, growth, random", NOT_WORSE, 1.01, 1.0, best)
    floor = partial(_of_floor, results)
    yield _worst("small, of floor: Q4_0 full, LoRA, tiny", FLOORED, 1.42, 1.28, floor)
    yield _worst("small, of floor: Q8_0 full", FULL_Q8, 1.55, 1.45, floor)


def _speeds(results: Results) -> Iterable[Line]:
    for method in ("small", "fast"):
        yield _worst(
            f"{method}, build speed of bsdiff4's",
            (*FINE_TUNES, *ONNX),
            8,
            20,
            partial(_of_bsdiff_speed, results, method),
            is_minimum=True,
        )
    for method, must, aim in (("small", 6, 12), ("fast", 50, 150)):
        yield _worst(
            f"{method}, apply of full fine-tune Q4_0",
            FULL[:1],
            must,
            aim,
            partial(_apply_speed, results, method),
            is_minimum=True,
            unit=" MB/s",
        )


def _memory(results: Results) -> Iterable[Line]:
    pairs = tuple(dict.fromkeys(row.pair for row in results.rows))
    for what, must, aim, action in (
        ("build memory, both profiles", 600, 300, "build"),
        ("apply memory, both profiles", 128, 64, "apply"),
    ):
        yield _worst(what, pairs, must, aim, partial(_peak, results, action), unit=" MB")


def _worst(
    what: str,
    pairs: tuple[str, ...],
    must: float,
    aim: float,
    figure: Callable[[str], float | None],
    *,
    is_minimum: bool = False,
    unit: str = "",
) -> Line:
    """A line with the worst figure of the pairs, and how many of them had none."""
    figures = {pair: value for pair in pairs if (value := figure(pair)) is not None}
    if not figures:
        return Line(what, must, aim, None, "none of its pairs was run", is_minimum, unit)
    worst = (min if is_minimum else max)(figures, key=lambda pair: figures[pair])
    left = len(pairs) - len(figures)
    at = worst + (f" (without {left} of {len(pairs)} pairs)" if left else "")
    return Line(what, must, aim, figures[worst], at, is_minimum, unit)


def _of_best_peer(results: Results, method: str, pair: str) -> float | None:
    row = results.row(pair, method)
    return results.ratio_to_best_peer(row) if row else None


def _of_peer(results: Results, peer: str, pair: str) -> float | None:
    ours, other = results.row(pair, "small"), results.row(pair, peer)
    return (ours.patch_bytes or 0) / other.patch_bytes if ours and other and other.patch_bytes else None


def _of_small(results: Results, pair: str) -> float | None:
    small, fast = results.row(pair, "small"), results.row(pair, "fast")
    if small is None or fast is None or not small.patch_bytes:
        return None
    return (fast.patch_bytes or 0) / small.patch_bytes


def _of_floor(results: Results, pair: str) -> float | None:
    row, floor = results.row(pair, "small"), results.estimates.get(pair, Estimate()).floor_bytes
    return (row.patch_bytes or 0) / floor if row and floor else None


def _of_bsdiff_speed(results: Results, method: str, pair: str) -> float | None:
    ours, peer = results.row(pair, method), results.row(pair, "bsdiff4")
    if ours is None or peer is None or ours.build is None or peer.build is None:
        return None
    return peer.build.cpu_s / max(ours.build.cpu_s, 1e-3)


def _apply_speed(results: Results, method: str, pair: str) -> float | None:
    row = results.row(pair, method)
    return megabytes_per_second(row, row.apply) if row else None


def _peak(results: Results, action: str, pair: str) -> float | None:
    """Megabytes, the larger of the two profiles."""
    rows = [row for row in results.rows if row.pair == pair and row.is_ours]
    costs = [row.build if action == "build" else row.apply for row in rows]
    return max((cost.peak_bytes / _MEGABYTE for cost in costs if cost), default=None)


def _cells(line: Line) -> tuple[str, ...]:
    sign = "at least " if line.is_minimum else "at most "
    figure = "" if line.figure is None else f"{line.figure:.4g}{line.unit}"
    return (line.what, f"{sign}{line.must:g}{line.unit}", f"{line.aim:g}", figure, line.status, line.at)
