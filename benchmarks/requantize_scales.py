"""Whether it pays to move the scales of blocks beside their codes: what is lost, and what the delta engine takes, with and without.

`python -m benchmarks.requantize_scales [--base nearest|good] [--cache DIR] [--work DIR]`. On the pair `large` (`pairs.py`) in Q4_0, the first 160 rows of six matrices
of three layers; `good` has their codes chosen first for the installed version, at next to no price. Prints a row for each price, with the codes alone and
with scales.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from benchmarks.catalog import CACHE
from benchmarks.requantize_series import GOOD_PRICE, calibrated
from protocol.errors import WhimbrelError
from server.diagnosis.weights import Floats
from server.display import table
from server.requantize.calibration import Calibration
from server.requantize.codes import CodedRows
from server.requantize.descent import Metric, descend
from server.requantize.model import opened_gguf
from server.requantize.rounds import price_of_bits
from server.requantize.scales import changed_scales, descend_with_scales
from server.requantize.settings import PAIRS
from server.requantize.weighing import delta_bytes
from server.requantize.work import metric_of

LAYERS: Final = (0, 15, 29)
MATRICES: Final = ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ROWS: Final = 160
PRICES: Final = {"nearest": (3e-8, 1e-8, 3e-9, 1e-9, 3e-10), "good": (3e-9, 1e-9, 3e-10)}
"""Nats a bit."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a matrix: as installed, what they shall be, and what an error costs."""

    name: str
    rows: CodedRows
    target: Floats
    metric: Metric


@dataclass(frozen=True, slots=True)
class Chosen:
    """What came of all parts at a price; `cpu_s` is what the descent took."""

    after: float
    codes: int
    scales: int
    bytes: int
    cpu_s: float


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requantize_scales", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--base", choices=PRICES, default="nearest", help="(default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="(default: requantize in --cache)")
    options = parser.parse_args(arguments)
    cache: Path = options.cache
    try:
        moments = calibrated(cache, options.work or cache / "requantize", "v2_large", _say)
        parts = read_parts(cache, moments, is_good=options.base == "good")
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(lines(parts, PRICES[options.base], Path(folder))))
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_parts(cache: Path, moments: Calibration, *, is_good: bool) -> list[Part]:
    """The rows of all layers."""
    parts = []
    with (
        opened_gguf(cache / "v1.bf16.gguf") as before,
        opened_gguf(cache / "v2_large.bf16.gguf") as new,
        opened_gguf(cache / "v1.q4_0.gguf") as held,
    ):
        for layer in LAYERS:
            for matrix in MATRICES:
                name = f"blk.{layer}.{matrix}.weight"
                region = held.region(name)
                columns = region.dims[-1]
                rows = CodedRows.read(region.layout, held.read_bytes(region, 0, ROWS), columns)
                metric = metric_of(moments, name, slice(0, ROWS), columns)
                if is_good:
                    gradient = metric.gradient(before.floats(name, 0, ROWS) - rows.weights(rows.codes))
                    codes, _ = descend(rows, rows.codes, gradient, metric, price_of_bits(GOOD_PRICE))
                    rows = CodedRows.read(region.layout, rows.joined(codes), columns)
                parts.append(Part(name, rows, new.floats(name, 0, ROWS), metric))
    return parts


def lines(parts: Sequence[Part], prices: Sequence[float], folder: Path) -> list[str]:
    """The table.

    Args:
        parts: What is chosen.
        prices: In nats a bit.
        folder: For the files that are weighed.
    """
    base = folder / "base.gguf"
    write(base, parts, [each.rows.joined(each.rows.codes) for each in parts])
    before = sum(each.metric.cost(each.target - each.rows.weights(each.rows.codes)) for each in parts)
    count = sum(each.rows.codes.size for each in parts)
    still, moving = (
        [choose(parts, price, base, folder / "new.gguf", moves_scales=each) for price in prices]
        for each in (False, True)
    )
    found = []
    for price, codes, both in zip(prices, still, moving, strict=True):
        share = less_lost(both, still)
        less = "-" if share is None else f"{100 * share:.1f}"
        for what, row, last in (("codes", codes, "-"), ("and scales", both, less)):
            size = f"{100 * row.bytes / base.stat().st_size:.2f}"
            lost = f"{1e3 * row.after:.3f}"
            found.append(
                [f"{price:g}", what, f"{row.codes:,}", f"{row.scales:,}", f"{row.bytes:,}", size, lost, last]
            )
    titles = [
        "NATS A BIT",
        "WHAT MOVES",
        "CODES",
        "SCALES",
        "BYTES",
        "% OF FILE",
        "LOST, NATS / 1000",
        "LESS %",
    ]
    return [
        f"{count:,} weights; {1e3 * before:.3f} thousandths of a nat are lost as installed",
        *table(titles, found),
        f"the descents of codes and scales took {sum(each.cpu_s for each in moving) / sum(each.cpu_s for each in still):.1f} times the processor time of codes alone",
        "less %: lost less than by codes alone at the same bytes, between the rows of these by the logarithm of bytes",
    ]


def less_lost(row: Chosen, others: Sequence[Chosen]) -> float | None:
    """Share of what is lost that a row saves beside others with the same bytes; None where these do not reach so far."""
    ranked = sorted(others, key=lambda each: each.bytes)
    if not ranked[0].bytes <= row.bytes <= ranked[-1].bytes:
        return None
    sizes, lost = np.log([each.bytes for each in ranked]), [each.after for each in ranked]
    return 1 - row.after / float(np.interp(np.log(row.bytes), sizes, lost))


def choose(parts: Sequence[Part], bit: float, base: Path, out: Path, *, moves_scales: bool) -> Chosen:
    """Descend in all parts at one price, and weigh what comes of it."""
    after, codes, scales, data = 0.0, 0, 0, []
    price = price_of_bits(bit, moves_scales=moves_scales)
    cpu_s = 0.0
    for each in parts:
        began = time.process_time()
        rows, chosen = each.rows, each.rows.codes
        gradient = each.metric.gradient(each.target - rows.weights(chosen))
        if moves_scales:
            rows, chosen, _ = descend_with_scales(rows, rows, chosen, gradient, each.metric, price, PAIRS)
        else:
            chosen, _ = descend(rows, chosen, gradient, each.metric, price, PAIRS)
        cpu_s += time.process_time() - began
        after += each.metric.cost(each.target - rows.weights(chosen))
        codes += int(np.count_nonzero(chosen != each.rows.codes))
        scales += changed_scales(rows, each.rows)
        data.append(rows.joined(chosen))
    write(out, parts, data)
    return Chosen(after, codes, scales, delta_bytes(base, out, 1), cpu_s)


def write(out: Path, parts: Sequence[Part], data: Sequence[bytes]) -> None:
    """A file of the parts alone."""
    writer = gguf.GGUFWriter(out, "llama")
    for part, blocks in zip(parts, data, strict=True):
        rows = np.frombuffer(blocks, np.uint8).reshape(len(part.rows.codes), -1)
        kind = gguf.GGMLQuantizationType[part.rows.layout.value.upper()]
        writer.add_tensor(part.name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
