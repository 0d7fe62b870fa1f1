"""Plots of what `make bench-requantize` measured: bytes against divergence and against the gain that is kept."""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "whimbrel"  # the same figures give the same file

import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.requantize_rows import (  # noqa: E402
    GAINED,
    INDEPENDENT,
    Cell,
    Measured,
    Results,
    gain,
)
from server.requantize.figures import figures  # noqa: E402
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


def write_plots(results: Results, folder: Path) -> list[Path]:
    """One SVG file for each cell that has a chosen file; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for cell, files in results.files.items():
        if PLAIN not in files or all(name in _MARKS for name in files):
            continue
        figure, (left, right) = plt.subplots(1, 2, figsize=_SIZE_INCHES, layout="constrained")
        for name, each in files.items():
            _draw(left, right, results, cell, name, each)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("delta, % of the file")
            axes.grid(alpha=0.3)
        left.set_ylabel(f"KL to the float model, {GAINED} (nats)")
        left.set_ylim(bottom=0)
        right.set_ylabel(f"gain kept, {GAINED} (%)")
        right.axhline(93, color="tab:gray", linestyle=":", linewidth=1)
        left.legend(fontsize="x-small")
        figure.suptitle(cell.name, fontsize="medium")
        path = folder / f"requantize-{cell.pair}-{cell.base}-{cell.kind}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        written.append(path)
    return written


def _draw(left: Axes, right: Axes, results: Results, cell: Cell, name: str, each: Measured) -> None:
    mark, colour = _MARKS.get(name, _CHOSEN)
    share = max(_SMALLEST_SHARE, 100 * each.delta_bytes / each.file_bytes)
    mean = figures(each.readings[GAINED]).kl
    label = name if name in _MARKS else ("chosen, extrapolated" if each.extrapolation else "chosen")
    fill = "none" if each.extrapolation else colour
    known = left.get_legend_handles_labels()[1]
    left.errorbar(
        [share],
        [mean.value],
        yerr=[[mean.value - mean.low], [mean.high - mean.value]],
        marker=mark,
        color=colour,
        markerfacecolor=fill,
        capsize=2,
        linestyle="none",
        label=None if label in known else label,
    )
    kept = gain(results, cell, name)
    if kept is not None:
        right.errorbar(
            [share],
            [100 * kept.value],
            yerr=[[100 * (kept.value - kept.low)], [100 * (kept.high - kept.value)]],
            marker=mark,
            color=colour,
            markerfacecolor=fill,
            capsize=2,
            linestyle="none",
        )
