"""Plots of what `make bench-requantize` measured: `python -m benchmarks.requantize_plots LINES --out DIR`, from its JSON lines.

One SVG file for each update: bytes against the divergence from the float model, and against the gain that is kept.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "whimbrel"  # the same figures give the same file

import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.requantize_rows import GAINED, INDEPENDENT  # noqa: E402
from server.requantize.rows import FROZEN, NOTHING, PLAIN, REPAIR, TRAP  # noqa: E402

_MARKS = {
    NOTHING: ("s", "tab:gray"),
    PLAIN: ("D", "tab:red"),
    FROZEN: ("d", "tab:orange"),
    REPAIR: ("v", "tab:brown"),
    TRAP: ("X", "tab:purple"),
    INDEPENDENT: ("*", "tab:green"),
}
_CHOSEN = ("o", "tab:blue")
_SIZE_INCHES = (9.0, 3.6)
_SMALLEST_SHARE = 0.02  # of the file in %, where nothing sent is drawn on a logarithmic scale
_KEPT = 93


def main(arguments: list[str] | None = None) -> int:
    """Write the plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requantize_plots", description=__doc__.splitlines()[0]
    )
    parser.add_argument("lines", type=Path, metavar="LINES", help="output of `benchmarks.requantize --json`")
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), metavar="DIR", help="(default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        text = options.lines.read_text("utf-8")
    except OSError as error:
        print(f"error: {options.lines}: {error.strerror}", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"cell"')]
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    for cell, each in cells.items():
        print(write_plot(cell, each, options.out))
    return 0


def write_plot(cell: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Draw one update; gives the file's path.

    Args:
        cell: Its name.
        rows: Its lines.
        folder: Where the file goes.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=_SIZE_INCHES, layout="constrained")
    for row in rows:
        _draw(left, right, row)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("delta, % of the file")
        axes.grid(alpha=0.3)
    left.set_ylabel(f"KL to the float model, {GAINED} (nats)")
    left.set_ylim(bottom=0)
    right.set_ylabel(f"gain kept, {GAINED} (%)")
    right.axhline(_KEPT, color="tab:gray", linestyle=":", linewidth=1)
    left.legend(fontsize="x-small")
    figure.suptitle(cell, fontsize="medium")
    path = folder / f"requantize-{cell.replace(', ', '-').replace(' ', '-')}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _draw(left: Axes, right: Axes, row: dict[str, Any]) -> None:
    name = row["name"]
    mark, colour = _MARKS.get(name, _CHOSEN)
    is_beyond = "extrapolated" in name
    label = name if name in _MARKS else ("chosen, extrapolated" if is_beyond else "chosen")
    known = left.get_legend_handles_labels()[1]
    share = max(_SMALLEST_SHARE, 100 * row["share"])
    found = row["texts"][GAINED]
    for axes, interval, factor in ((left, found["kl"], 1), (right, found["gain"], 100)):
        if interval is None:
            continue
        value, low, high = (factor * interval[key] for key in ("value", "low", "high"))
        axes.errorbar(
            [share],
            [value],
            yerr=[[value - low], [high - value]],
            marker=mark,
            color=colour,
            markerfacecolor="none" if is_beyond else colour,
            capsize=2,
            linestyle="none",
            label=None if label in known or axes is right else label,
        )


if __name__ == "__main__":
    sys.exit(main())
