"""What `make bench-requantize` measured, what follows from it, and what it has to show. No processes, no files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from benchmarks.acceptance import Line
from benchmarks.requantize_series import Chain, Cost, Facts
from benchmarks.requantize_sources import ForWhom
from benchmarks.rows import aligned
from server.requantize.figures import TextFigures, difference, figures, share_of_gain
from server.requantize.guards import Margins, check_texts, is_passed, reasons
from server.requantize.readings import Readings
from server.requantize.rows import FROZEN, NOTHING, PLAIN, REPAIR, TRAP, Row, row
from server.scorecard.statistics import Interval

HELD_OUT = ("sources", "manuals")
GAINED = HELD_OUT[0]
"""The text of the kind that was trained on: where the update gains, so that it can be said how much of it is kept."""

INDEPENDENT = "well quantized anew"
"""The new model quantized as well as the installed file was, without regard to it."""

NEAREST, GOOD = "nearest", "good"
"""How the installed file was quantized: rounded to nearest by llama.cpp, or by descent on what the layers put out."""

_WANTED = 0.93


class Measured(Struct, frozen=True, kw_only=True):
    """A file that was measured.

    Attributes:
        delta_bytes: Of the project's own delta from the installed file.
        file_bytes: Of the file.
        readings: By name of the text.
        extrapolation: Of the choice.
        changed: Codes that differ from the installed ones; None for files that were not chosen.
        seconds: Of the choice alone.
    """

    delta_bytes: int
    file_bytes: int
    readings: Readings
    extrapolation: float = 0.0
    changed: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One update of one installed file.

    Attributes:
        pair: What was trained: `large`, `lora`.
        base: `NEAREST` or `GOOD`.
        kind: `q4_0`, `q8_0`, `q4_k_m`.
    """

    pair: str
    base: str
    kind: str

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.pair}, {self.kind}, installed {self.base}"


@dataclass(slots=True)
class Results:
    """All that was measured.

    Attributes:
        files: By cell and name of the row.
        peers: Fewest bytes of any peer's delta to the plain file, by cell.
        cost: Of the whole command; None where it did not run.
        chain: Ten updates in a row; None likewise.
        facts: Answers on the narrow task; None likewise.
        sources: One file for two versions beside one for each, by the versions that a fleet has.
    """

    files: dict[Cell, dict[str, Measured]] = field(default_factory=dict)
    peers: dict[Cell, int] = field(default_factory=dict)
    cost: Cost | None = None
    chain: Chain | None = None
    facts: Facts | None = None
    sources: dict[tuple[str, str], tuple[ForWhom, ...]] = field(default_factory=dict)

    def full(self, cell: Cell) -> Measured | None:
        """The file whose gain is the whole of it: plain, or where the installed file is a good one, one as good."""
        return self.files.get(cell, {}).get(PLAIN if cell.base == NEAREST else INDEPENDENT)


def table_rows(results: Results, cell: Cell) -> list[Row]:
    """A cell's files for people, by their bytes, the ones that were not chosen first."""
    files = results.files[cell]
    order = [name for name in (NOTHING, PLAIN, FROZEN, INDEPENDENT, REPAIR, TRAP) if name in files]
    order += sorted((name for name in files if name not in order), key=lambda name: files[name].delta_bytes)
    return [_row(results, cell, name) for name in order]


def _row(results: Results, cell: Cell, name: str) -> Row:
    files, each, full = results.files[cell], results.files[cell][name], results.full(cell)
    texts: dict[str, TextFigures] = {}
    for text, reading in each.readings.items():
        installed = files[NOTHING].readings.get(text) if NOTHING in files else None
        whole = full.readings.get(text) if full is not None else None
        texts[text] = figures(reading, installed, whole)
    return row(name, each.delta_bytes, each.file_bytes, texts)


def is_no_worse(chosen: Measured, plain: Measured) -> bool:
    """Whether the guards of the command would let a file pass."""
    return is_passed(check_texts(chosen.readings, plain.readings, HELD_OUT, Margins()))


def guard_lines(results: Results, cell: Cell) -> list[str]:
    """Why files that were chosen are not no worse than plain, for people: one line for each guard that did not pass."""
    plain = results.files[cell].get(PLAIN)
    if plain is None:
        return []
    return [
        f"{name}: {reason}"
        for name, each in _chosen(results, cell)
        for reason in reasons(check_texts(each.readings, plain.readings, HELD_OUT, Margins()))
    ]


def gain(results: Results, cell: Cell, name: str, text: str = GAINED) -> Interval | None:
    """Share of the gain that a file keeps; None where something was not measured."""
    files, full = results.files.get(cell, {}), results.full(cell)
    if full is None or NOTHING not in files or name not in files:
        return None
    if any(text not in each.readings for each in (files[name], files[NOTHING], full)):
        return None
    return share_of_gain(files[name].readings[text], files[NOTHING].readings[text], full.readings[text])


def lines(results: Results) -> list[Line]:
    """All requirements."""
    nearest, good = Cell("large", NEAREST, "q4_0"), Cell("large", GOOD, "q4_0")
    half = "  the same, divergence at most half of plain's"
    found = [
        _fewest("nearest, Q4_0: % of file for 93 % of the gain, no worse", results, nearest, 0.5, 0.2),
        _fewest(half, results, nearest, 0.8, 0.5, kl_share=0.5),
        _at_budget(results, good),
        _fewest("  the same: % of file for 93 %", results, good, 4, 1.5),
    ]
    for kind in ("q8_0", "q4_k_m"):
        cell = Cell("large", NEAREST, kind)
        line = _fewest(f"nearest, {kind.upper()}: of the best peer's bytes", results, cell, 1 / 4, 1 / 12)
        peer, plain = results.peers.get(cell), results.files.get(cell, {}).get(PLAIN)
        if line.figure is not None and peer is not None and plain is not None:
            figure = line.figure / 100 * plain.file_bytes / peer
            line = Line(line.what, line.must, line.aim, figure, line.at)
        elif line.figure is not None:
            line = Line(line.what, line.must, line.aim, None, "no peer was measured")
        found.append(line)
    cost, facts = results.cost, results.facts
    kept = None if facts is None or facts.kept is None else 100 * facts.kept
    return [
        *found,
        Line(
            "ten updates: divergence, of a fresh file's",
            1.3,
            1.1,
            None if results.chain is None else results.chain.ratio,
            _ran(results.chain),
        ),
        Line(
            "narrow task: answers kept, % of plain's",
            95,
            100,
            kept,
            _ran(kept),
            is_minimum=True,
        ),
        Line("whole command, min", 15, 4, None if cost is None else cost.wall_s / 60, _ran(cost)),
        Line(
            "  its memory, GB",
            6,
            2,
            None if cost is None else cost.peak_bytes / 1e9,
            "" if cost else "not run",
        ),
    ]


def series_lines(results: Results) -> list[str]:
    """What lies behind the figures of the chain and of the narrow task."""
    found = []
    if (chain := results.chain) is not None:
        sizes = ", ".join(f"{count:,}" for count in chain.delta_bytes)
        found += ["", f"chain, bytes of each update: {sizes}; of a file {chain.file_bytes:,}"]
        found += [
            f"chain, divergence of the last file on {text}: {kl:.4f}; of a fresh one {chain.fresh.kl[text]:.4f}, of plain {chain.plain.kl[text]:.4f}"
            for text, kl in chain.last.kl.items()
        ]
    if (facts := results.facts) is not None:
        cells = [
            (
                each.name,
                f"{each.delta_bytes:,}",
                f"{100 * each.delta_bytes / facts.file_bytes:.3f}",
                str(each.right),
                str(each.kept),
            )
            for each in facts.files
        ]
        heading = (f"narrow task, {facts.count} questions", "bytes", "% of file", "right", "of plain's")
        found += ["", aligned([heading, *cells], left=1), f"the new model in floats: {facts.reference} right"]
    return found


def _ran(figure: object) -> str:
    return "" if figure is not None else "not run"


def _chosen(results: Results, cell: Cell) -> list[tuple[str, Measured]]:
    files = results.files.get(cell, {})
    fixed = {NOTHING, PLAIN, FROZEN, INDEPENDENT, REPAIR, TRAP}
    found = [(name, each) for name, each in files.items() if name not in fixed]
    return sorted(found, key=lambda each: each[1].delta_bytes)


def _fewest(
    what: str, results: Results, cell: Cell, must: float, aim: float, *, kl_share: float | None = None
) -> Line:
    """The smallest of the files that keep enough and are no worse than plain, of those that were measured."""
    plain = results.files.get(cell, {}).get(PLAIN)
    tried = _chosen(results, cell)
    if plain is None or not tried:
        return Line(what, must, aim, None, "not run", unit=" %")
    for name, each in tried:
        kept = gain(results, cell, name)
        if kept is None or kept.value < _WANTED or not is_no_worse(each, plain):
            continue
        if kl_share is not None and not _is_within(each, plain, kl_share):
            continue
        return Line(what, must, aim, 100 * each.delta_bytes / each.file_bytes, name)
    return Line(what, must, aim, None, f"none of {len(tried)} files reaches it")


def _is_within(each: Measured, plain: Measured, share: float) -> bool:
    return all(sum(each.readings[text].kl) <= share * sum(plain.readings[text].kl) for text in HELD_OUT)


def _at_budget(results: Results, cell: Cell) -> Line:
    what = "good, Q4_0: % of an independent file's gain at 0.5 % of the file"
    best: tuple[float, str] | None = None
    for name, each in _chosen(results, cell):
        kept = gain(results, cell, name)
        if kept is not None and each.delta_bytes <= 0.005 * each.file_bytes:
            best = max(best or (0.0, ""), (100 * kept.value, name))
    return Line(what, 80, 90, best[0] if best else None, best[1] if best else "not run", is_minimum=True)


def json_lines(results: Results) -> Iterable[Mapping[str, object]]:
    """Every row with its figures and what they are beside plain's."""
    for cell, files in results.files.items():
        for each in table_rows(results, cell):
            line: dict[str, object] = {"cell": cell.name, **_builtins(each)}
            plain = files.get(PLAIN)
            if plain is not None:
                line["beside_plain"] = {
                    text: {
                        kind: _builtins(difference(kind, reading, plain.readings[text]))
                        for kind in ("kl", "flips")
                    }
                    for text, reading in files[each.name].readings.items()
                    if text in plain.readings
                }
            yield line


def _builtins(value: Struct) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(value)
    return found
