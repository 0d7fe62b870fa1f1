"""Write the tables of the context model: `python -m tools.context_tables` (SPEC section 6.11).

An old weight lies anywhere in its old cell with the same probability; training moved it by a logistic amount of scale b.
From that follow the probability that its new code is another than expected, and how much each outcome says about b. The
coder itself uses integers only, so what floating point gives here is rounded once and is part of the specification. The
same numbers go into a C header and a Python module; a test regenerates both.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "protocol" / "delta" / "native" / "tables.h"
MODULE = ROOT / "protocol" / "delta" / "context_tables.py"

SPREADS = 32
"""Spread classes: half octaves of b in steps of the new scale; class s stands for 2 ** ((s - 22) / 2)."""

OFFSETS = 33
"""Offset classes: how far the middle of the old cell lies from the expected code."""

OUTCOMES = 6
"""The expected code; one step to the nearer side; one to the other; two, three, four or more steps."""

SCALE_SPREADS = 24
"""Spread classes of scales: half octaves of b in units of the scale; class 10 begins at one unit."""

SCALE_OUTCOMES = 17
"""By how many units a scale moved, either way; the last is any more."""

GRID_SPREADS = 64
"""Spread classes where weights came from bfloat16: sixths of an octave of b in distances of its points."""

_PROBABILITY_BITS = 22
_SCORE_BITS = 8
_SCORE_MIN, _SCORE_MAX = -2.0, 3.0
_SCORE_TRUST, _SCALE_TRUST = 0.8, 0.75
_LOG_SHARES = 3
_LOG_FIRST, _LOG_LAST, _LINEAR = 64, 4096, 2048
_HALF = 32768
_OFFSET_UNIT = 64


def offset_edges() -> list[int]:
    """Lower edges of the offset classes, in units of 2**-16 steps: three to an octave, then equal ones."""
    edges = [0]
    edge = _LOG_FIRST
    while edge < _LOG_LAST:
        edges += [round(edge * 2 ** (k / _LOG_SHARES)) for k in range(_LOG_SHARES)]
        edge *= 2
    edges += range(_LOG_LAST, _HALF, _LINEAR)
    assert len(edges) == OFFSETS
    return edges


def offset_classes() -> list[int]:
    """The class of each multiple of 64 from 0 to half a step."""
    edges = offset_edges()
    return [
        max(k for k, edge in enumerate(edges) if edge <= value) for value in range(0, _HALF + 1, _OFFSET_UNIT)
    ]


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def at_least(steps: int, offset: float, spread: float) -> float:
    """Probability that the new code is at least `steps` (1 or more) above the expected one."""
    near, far = (offset - steps + 1) / spread, (offset - steps) / spread
    return spread * (_softplus(near) - _softplus(far))


def _outcome_probability(outcome: int, offset: float, spread: float, *, is_near: bool = False) -> float:
    up = [at_least(k, offset, spread) for k in range(1, 6)]
    down = [at_least(k, -offset, spread) for k in range(1, 6)]
    if is_near:
        down = [0.0] * 5
    values = (
        1 - up[0] - down[0],
        up[0] - up[1],
        down[0] - down[1],
        up[1] - up[2] + down[1] - down[2],
        up[2] - up[3] + down[2] - down[3],
        up[3] + down[3],
    )
    return max(values[outcome], 1e-9)


def _middles() -> list[float]:
    edges = [*offset_edges(), _HALF]
    return [(low + high) / 2 / 65536 for low, high in itertools.pairwise(edges)]


def _spread(index: int) -> float:
    return float(2 ** ((index - 22) / 2))


def changes() -> list[int]:
    """Probability of another code than the expected one, by offset and spread class."""
    one = 1 << _PROBABILITY_BITS
    return [
        min(max(round(one * (at_least(1, offset, b) + at_least(1, -offset, b))), 64), one - 64)
        for offset in _middles()
        for b in map(_spread, range(SPREADS))
    ]


def nears() -> list[int]:
    """Probability that a change goes to the nearer side, by offset and spread class."""
    one = 1 << _PROBABILITY_BITS
    found = []
    for offset in _middles():
        for b in map(_spread, range(SPREADS)):
            up, down = at_least(1, offset, b), at_least(1, -offset, b)
            found.append(min(max(round(one * up / max(up + down, 1e-30)), 64), one - 64))
    return found


def scores() -> list[int]:
    """Derivative of the logarithm of an outcome's probability by the logarithm of b, in units of 1/256.

    Trusted by four fifths, because real moves have longer tails than logistic ones.
    """
    found = []
    for outcome in range(OUTCOMES):
        for offset in _middles():
            for b in map(_spread, range(SPREADS)):
                low, high = (
                    math.log(_outcome_probability(outcome, offset, b * factor)) for factor in (0.9, 1 / 0.9)
                )
                score = (high - low) / (2 * math.log(1 / 0.9))
                found.append(
                    round(min(max(score, _SCORE_MIN), _SCORE_MAX) * _SCORE_TRUST * (1 << _SCORE_BITS))
                )
    return found


def scale_scores() -> list[int]:
    """The same for a block's scale, whose largest weight is known exactly: outcomes are moves by 0 to 16 of its own units.

    Trusted by three quarters, because another weight may have become the largest.
    """
    found = []
    for b in (2 ** ((index - 10 + 0.5) / 2) for index in range(SCALE_SPREADS)):
        for outcome in range(SCALE_OUTCOMES):
            low, high = (math.log(_scale_probability(outcome, b * factor)) for factor in (0.99, 1 / 0.99))
            score = min((high - low) / (2 * math.log(1 / 0.99)), _SCORE_MAX)
            found.append(round(score * _SCALE_TRUST * (1 << _SCORE_BITS)))
    return found


def _scale_probability(outcome: int, spread: float) -> float:
    def beyond(units: float) -> float:
        return 2 / (1 + math.exp(min(units / spread, 700)))

    if outcome == 0:
        return 1 - beyond(0.5)
    if outcome == SCALE_OUTCOMES - 1:
        return max(beyond(outcome - 0.5), 1e-12)
    return max(beyond(outcome - 0.5) - beyond(outcome + 0.5), 1e-12)


def pulls() -> list[int]:
    """Derivative of the logarithm of an outcome's probability by the offset, towards the nearer side, in units of 1/256."""
    found = []
    for outcome in range(OUTCOMES):
        for offset in _middles():
            for b in map(_spread, range(SPREADS)):
                h = b / 8
                low, high = (
                    math.log(_outcome_probability(outcome, offset + move, b, is_near=outcome > 2))
                    for move in (-h, h)
                )
                limit = 4 / b
                found.append(round(min(max((high - low) / (2 * h), -limit), limit) * (1 << _SCORE_BITS)))
    return found


def informations() -> list[int]:
    """Fisher information about the offset in whether and where a code changes, in units of 1/256 of an inverse square step."""
    found = []
    for offset in _middles():
        for b in map(_spread, range(SPREADS)):
            h = b / 8
            up, down = at_least(1, offset, b), at_least(1, -offset, b)
            by_up = (at_least(1, offset + h, b) - at_least(1, offset - h, b)) / (2 * h)
            by_down = (at_least(1, -offset - h, b) - at_least(1, h - offset, b)) / (2 * h)
            still = max(1 - up - down, 0.02)
            value = by_up**2 / (up + 1e-3) + by_down**2 / (down + 1e-3) + (by_up + by_down) ** 2 / still
            found.append(max(round(value * (1 << _SCORE_BITS)), 1))
    return found


def continuations() -> list[int]:
    """Probability that a change of k steps or more is one of more than k, by spread class and k of 1 to 16."""
    one = 1 << _PROBABILITY_BITS
    found = []
    for b in map(_spread, range(SPREADS)):
        for steps in range(1, 17):
            more, least = at_least(steps + 1, 0.1, b), at_least(steps, 0.1, b)
            found.append(min(max(round(one * more / max(least, 1e-30)), 4096), one - 4096))
    return found


def logarithms() -> list[int]:
    """256 * log2(1 + i / 256)."""
    return [round(256 * math.log2(1 + i / 256)) for i in range(256)]


def rates() -> list[int]:
    """How far a counter that was asked n times goes towards an outcome: 2**16 / (n + 1.6)."""
    return [655360 // (10 * n + 16) for n in range(1024)]


def logistics() -> list[int]:
    """Probability of a move by more than i / 64 times b, in units of 2**-20."""
    return [round((1 << 20) / (1 + math.exp(i / 64))) for i in range(1025)]


def sharpnesses() -> list[int]:
    """2**16 / b for the spread classes of the grid: sixths of an octave, class 29 stands for one unit."""
    return [round(65536 * 2 ** ((29 - i) / 6)) for i in range(GRID_SPREADS)]


def _probability(octaves: float) -> int:
    one = 1 << _PROBABILITY_BITS
    odds = math.pow(2, octaves)
    return min(max(round(one * odds / (1 + odds)), 64), one - 64)


def chance_starts() -> list[int]:
    """Probabilities in the middle of the classes of odds, an octave each; class 14 begins at even odds."""
    return [_probability(i - 14 + 0.5) for i in range(24)]


def grid_starts() -> list[int]:
    """The same, two to an octave; class 38 begins at even odds."""
    return [_probability((i - 38 + 0.5) / 2) for i in range(48)]


def lean_starts() -> list[int]:
    """Probability of the likelier side, by classes of the sides' odds, two to an octave."""
    return [_probability((i + 0.5) / 2) for i in range(24)]


def reciprocals() -> list[int]:
    """2**32 / n, rounded up; of the divisors that the coder divides by most."""
    return [0, *(-(-(1 << 32) // n) for n in range(1, 201))]


TABLES: dict[str, tuple[str, Callable[[], Sequence[int]]]] = {
    "OFFSET_CLASS": ("uint8_t", offset_classes),
    "CHANGE": ("uint32_t", changes),
    "NEAR": ("uint32_t", nears),
    "SCORE": ("int16_t", scores),
    "SCALE_SCORE": ("int16_t", scale_scores),
    "PULL": ("int32_t", pulls),
    "INFORMATION": ("int32_t", informations),
    "CONTINUE": ("uint32_t", continuations),
    "LOGISTIC": ("int32_t", logistics),
    "SHARPNESS": ("int32_t", sharpnesses),
    "CHANCE_START": ("uint32_t", chance_starts),
    "GRID_START": ("uint32_t", grid_starts),
    "LEAN_START": ("uint32_t", lean_starts),
    "LOG2": ("uint16_t", logarithms),
    "RECIPROCAL": ("uint64_t", reciprocals),
    "RATE": ("uint16_t", rates),
}


def header() -> str:
    """The C header."""
    lines = [
        "/* Written by tools/context_tables.py: do not edit. SPEC section 6.11. */",
        "#ifndef WHIMBREL_TABLES_H",
        "#define WHIMBREL_TABLES_H",
        "#include <stdint.h>",
        f"#define SPREADS {SPREADS}",
        f"#define OFFSETS {OFFSETS}",
        f"#define OUTCOMES {OUTCOMES}",
        f"#define GRID_SPREADS {GRID_SPREADS}",
        f"#define SCALE_SPREADS {SCALE_SPREADS}",
        f"#define SCALE_OUTCOMES {SCALE_OUTCOMES}",
    ]
    for name, (kind, make) in TABLES.items():
        values = list(make())
        lines.append(f"static const {kind} {name}[{len(values)}] = {{")
        lines += _rows(values)
        lines.append("};")
    lines.append("#endif")
    return "\n".join(lines) + "\n"


def module() -> str:
    """The Python module."""
    lines = [
        '"""Tables of the context model, written by `python -m tools.context_tables`: do not edit. SPEC section 6.11."""',
        "",
        "# fmt: off",
        f"SPREADS = {SPREADS}",
        f"OFFSETS = {OFFSETS}",
        f"OUTCOMES = {OUTCOMES}",
        f"GRID_SPREADS = {GRID_SPREADS}",
        f"SCALE_SPREADS = {SCALE_SPREADS}",
        f"SCALE_OUTCOMES = {SCALE_OUTCOMES}",
    ]
    for name, (_, make) in TABLES.items():
        lines.append(f"{name} = (")
        lines += _rows(list(make()))
        lines.append(")")
    lines.append("# fmt: on")
    return "\n".join(lines) + "\n"


def _rows(values: Sequence[int]) -> list[str]:
    return [
        "    " + ", ".join(map(str, values[start : start + 16])) + "," for start in range(0, len(values), 16)
    ]


if __name__ == "__main__":
    HEADER.write_text(header())
    MODULE.write_text(module())
