"""Choosing the next quantized file against the installed one, on real fine-tunes (`make bench-requantize`).

`python -m benchmarks.requantize [--cells GLOB,...] [--cache DIR] [--evals DIR] [--json]`. Files are evaluated under llama.cpp on texts that were
used neither for calibration nor for settings (`texts.py`). What was measured is in journals: a run that was stopped goes on, and rows that are there are
not measured again. Prints a table for each cell, and what it has to show with the measured figure beside it.

The installed file is `v1` rounded to nearest by llama.cpp, or (`good`) by descent on what the layers put out. There 100 % of the gain is that of a file which
was made in the same way from the new model, without regard to the installed one.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
import numpy as np

from benchmarks import requantize_rows as found
from benchmarks import requantize_series as series
from benchmarks import texts
from benchmarks.acceptance import Line
from benchmarks.catalog import CACHE
from benchmarks.requantize_rows import GOOD, INDEPENDENT, NEAREST, Cell, Measured, Results
from benchmarks.requantize_sources import run_sources, source_lines
from benchmarks.rows import aligned
from protocol.errors import RequestError, WhimbrelError
from protocol.ids import digest_of
from server.requantize import rows
from server.requantize.calibration import SEQUENCE_TOKENS, SEQUENCES, Calibration
from server.requantize.choice import choose
from server.requantize.controls import write_frozen
from server.requantize.evaluation import Evaluator
from server.requantize.factors import write_factored
from server.requantize.model import sha256_of
from server.requantize.readings import Readings
from server.requantize.settings import Settings
from server.requantize.texts import Text, Tokens, check_unseen
from server.requantize.tokens import read_tokens
from server.requantize.weighing import delta_bytes
from server.requantize.work import MetricName
from server.scorecard.journal import Journal, journal

FOLDER = "requantize"

WIDE_RUNS = 160
"""Of 256 tokens each, where a file shall come very near to the float model: four times as many as otherwise."""

JUDGED_RUNS = 64
"""Of each held-out text, where a file shall come so near to plain that on eight times fewer the intervals are as wide as what the guards allow."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A file that is chosen, at a price in nats a bit: one descent, where a budget takes several to find its price."""

    price: float
    extrapolation: float = 0.0
    corrections: int = 0
    is_pulled_back: bool = False  # begins with the codes of the independent file
    learned: int = 0  # rounds; begins with the best codes for the new model then, and reads more text

    @property
    def name(self) -> str:
        """As tables show it."""
        parts = [f"chosen at {self.price:g}"]
        if self.extrapolation:
            parts.append(f"extrapolated by {self.extrapolation:g}")
        if self.corrections:
            parts.append(f"corrected {self.corrections}x")
        if self.learned:
            parts.append(f"learned in {self.learned} rounds")
        if self.is_pulled_back:
            parts.append("from independent")
        return ", ".join(parts)


CHOICES: dict[Cell, tuple[Choice, ...]] = {
    Cell("large", NEAREST, "q4_0"): (
        Choice(8e-9),
        Choice(2e-9),
        Choice(2e-8),
        Choice(8e-9, 0.5),
        Choice(2e-8, 0.5),
    ),
    Cell("large", GOOD, "q4_0"): (
        Choice(3e-10, 0.7),
        Choice(1.5e-10, 0.5, is_pulled_back=True),
        Choice(3e-10, 0.7, corrections=1),
        Choice(8e-11, 0.5, is_pulled_back=True),
        Choice(3e-10),
        Choice(4.5e-10, 0.7, corrections=1),
        Choice(1.5e-10, 0.5, corrections=1, is_pulled_back=True),
    ),
    Cell("large", NEAREST, "q8_0"): (
        Choice(1e-11, 1.0),
        Choice(2e-11),
        Choice(3e-12, 1.0),
        Choice(4e-12, 0.1, corrections=1),
        Choice(6.2e-12, learned=10),
    ),
    Cell("large", NEAREST, "q4_k_m"): (Choice(1e-9, 0.5), Choice(6e-9), Choice(1.5e-9)),
    Cell("lora", NEAREST, "q4_0"): (Choice(8e-9), Choice(2e-9)),
}
"""In the order in which they are measured."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter of the models: from the installed version in floats, or from the installed file, whose rounding it then mends too."""

    rank: int
    is_from_file: bool = False

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"adapter of rank {self.rank}{', from the installed file' if self.is_from_file else ''}"


ADAPTERS: dict[Cell, tuple[Adapter, ...]] = {
    Cell("lora", NEAREST, "q4_0"): (Adapter(8), Adapter(8, is_from_file=True), Adapter(1, is_from_file=True)),
}
"""Likewise; measured before what is chosen, which takes longer."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not measured yet; 0 when all that ran is what it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requantize", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cells", default="*", metavar="GLOB,...", help="such as 'large.nearest.*'")
    parser.add_argument("--rows", default="*", metavar="GLOB,...", help="such as 'plain*'; * for all")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--evals", type=Path, metavar="DIR", help="with gsm8k/ and mmlu/: their questions are a third text"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help=f"(default: {FOLDER} in --cache)")
    parser.add_argument("--peers-from", type=Path, metavar="FILE", help="JSON lines of `make bench-delta`")
    parser.add_argument(
        "--series", default="chain,facts,cost,sources", metavar="NAME,...", help="(default: %(default)s)"
    )
    parser.add_argument("--measured", action="store_true", help="show what is there, measure nothing")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each row, too")
    options = parser.parse_args(arguments)
    try:
        results = run(options)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for cell in results.files:
        print(f"\n# {cell.name}\n")
        print("\n".join([*rows.lines(found.table_rows(results, cell)), *found.guard_lines(results, cell)]))
    lines = found.lines(results)
    heading = ("requirement", "must", "aim", "measured", "", "on")
    print(aligned([heading, *(_cells(line) for line in lines)], left=1))
    print("\n".join([*found.series_lines(results), *source_lines(results.sources)]))
    if options.json:
        for line in found.json_lines(results):
            print(json.dumps(line))
    return 0 if all(line.status != "short" for line in lines) else 1


def run(options: argparse.Namespace) -> Results:
    """Measure the cells that are asked for."""
    cells = [cell for cell in CHOICES if _is_wanted(cell, options.cells.split(","))]
    if not cells:
        names = ", ".join(f"{each.pair}.{each.base}.{each.kind}" for each in CHOICES)
        raise RequestError(f"no cell is called {options.cells}", hint=f"there are {names}")
    results = Results()
    wanted = [] if options.measured else options.rows.split(",")
    bench = _Bench(options.cache, options.work or options.cache / FOLDER, wanted, options.evals)
    if options.peers_from is not None:
        results.peers.update(_peers(options.peers_from))
    for cell in cells:
        files = bench.measured(cell)
        if files:
            results.files[cell] = files
    bench.series(results, options.series.split(","))
    return results


def _is_wanted(cell: Cell, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(f"{cell.pair}.{cell.base}.{cell.kind}", pattern) for pattern in patterns)


def _cells(line: Line) -> tuple[str, ...]:
    figure = "-" if line.figure is None else f"{line.figure:.3g}{line.unit}"
    return (line.what, f"{line.must:.3g}", f"{line.aim:.3g}", figure, line.status, line.at)


def _peers(path: Path) -> Iterator[tuple[Cell, int]]:
    """Fewest bytes of any peer on the pairs of the delta benchmark."""
    best: dict[Cell, int] = {}
    for text in path.read_text("utf-8").splitlines():
        if not text.startswith("{"):
            continue
        line = json.loads(text)
        pair, _, kind = str(line.get("pair", "")).partition(".")
        cell = Cell(pair, NEAREST, kind)
        if line.get("patch_bytes") and line.get("method") not in {"small", "fast"}:
            best[cell] = min(best.get(cell, 1 << 62), int(line["patch_bytes"]))
    yield from best.items()


class _Bench:
    """Files of the pairs, calibrations and texts, made when they are needed."""

    def __init__(self, cache: Path, work: Path, wanted: Sequence[str], evals: Path | None) -> None:
        self._cache = cache
        self._work = work
        self._wanted = wanted  # rows that are measured; what others have is taken
        self._evals = evals
        self._texts: list[Text] = []
        self._calibrations: dict[str, Calibration] = {}
        self._control_bytes: dict[
            Cell, int
        ] = {}  # of the first choice: what repair and the least error of weights may weigh
        work.mkdir(parents=True, exist_ok=True)

    def measured(self, cell: Cell) -> dict[str, Measured]:
        """All rows of a cell; only those that are there, unless it is measuring."""
        names = (
            "v1.bf16.gguf",
            f"v2_{cell.pair}.bf16.gguf",
            f"v1.{cell.kind}.gguf",
            f"v2_{cell.pair}.{cell.kind}.gguf",
        )
        missing = [name for name in names if not (self._cache / name).is_file()]
        if missing:
            _say(
                f"{cell.name}: left out, {missing[0]} is missing: python -m benchmarks.pairs '{cell.pair}.*'"
            )
            return {}
        identity: dict[str, object] = {
            "cell": cell.name,
            "files": [sha256_of(self._cache / name) for name in names],
            "texts": [text.digest for text in self.texts(cell)],
        }
        kept_rows: dict[str, Measured] = {}
        with journal(self._work, digest_of(msgspec.json.encode(identity)), identity) as kept:
            for name in self._names(cell):
                known = kept.get(name, Measured)
                if known is None and any(fnmatchcase(name, pattern) for pattern in self._wanted):
                    known = self._measure(cell, name, kept)
                if known is not None:
                    kept_rows[name] = known
                    if name == CHOICES[cell][0].name:
                        self._control_bytes[cell] = known.delta_bytes
        return kept_rows

    def _names(self, cell: Cell) -> list[str]:
        chosen = [choice.name for choice in CHOICES[cell]]
        controls = (
            [rows.FROZEN, rows.TRAP, rows.REPAIR] if cell.kind == "q4_0" and cell.pair == "large" else []
        )
        independent = [INDEPENDENT] if cell.base == GOOD else []
        if cell.base == GOOD:
            controls = [rows.REPAIR]
        adapters = [adapter.name for adapter in ADAPTERS.get(cell, ())]
        return [rows.NOTHING, rows.PLAIN, *independent, *adapters, *chosen[:2], *controls, *chosen[2:]]

    def _measure(self, cell: Cell, name: str, kept: Journal) -> Measured:
        started = time.monotonic()
        made = self._made(cell, name)
        reference = self._cache / f"v2_{cell.pair}.bf16.gguf"
        with Evaluator(reference, self.texts(cell), self._work, threads=1, progress=_progress) as evaluator:
            readings: Readings = evaluator.measure(made.path, adapter=made.adapter)
        installed = self.installed(cell)
        size = made.delta_bytes
        if size is None:
            size = delta_bytes(installed, made.path) if made.path != installed else 0
        result = Measured(
            delta_bytes=size,
            file_bytes=made.path.stat().st_size,
            readings=readings,
            extrapolation=made.extrapolation,
            changed=made.changed,
            seconds=made.seconds,
        )
        kept.put(name, result)
        if made.path.parent == self._work and name != rows.FROZEN and "good" not in made.path.name:
            made.path.unlink()
        _say(f"{cell.name}: {name}: {size:,} bytes, {time.monotonic() - started:.0f} s")
        return result

    def _made(self, cell: Cell, name: str) -> "_Made":
        installed, plain = self.installed(cell), self._cache / f"v2_{cell.pair}.{cell.kind}.gguf"
        if name == rows.NOTHING:
            return _Made(installed)
        if name == rows.PLAIN:
            return _Made(plain)
        out = self._work / "row.gguf"
        if name == rows.FROZEN:
            write_frozen(plain, installed, out)
            return _Made(out)
        if name == INDEPENDENT:
            return _Made(self._good(f"v2_{cell.pair}", cell.kind))
        new, before = self._cache / f"v2_{cell.pair}.bf16.gguf", self._cache / "v1.bf16.gguf"
        adapter = next((each for each in ADAPTERS.get(cell, ()) if each.name == name), None)
        if adapter is not None:
            # The moments of the version before are there for other cells, and about those of the new one.
            moments = self.calibration("v1")
            write_factored(
                new, installed if adapter.is_from_file else before, moments, adapter.rank, out, _say, 1
            )
            return _Made(installed, delta_bytes=out.stat().st_size, adapter=out)
        choice = next((each for each in CHOICES[cell] if each.name == name), None)
        if choice is not None:
            settings = Settings(
                price=choice.price,
                extrapolation=choice.extrapolation,
                corrections=choice.corrections,
                learned=choice.learned,
                is_afresh=choice.learned > 0,
                workers=None if choice.learned else 1,
            )
        else:
            metric: MetricName = "weights" if name == rows.TRAP else "outputs"
            settings = Settings(budget_bytes=self._control_bytes[cell], metric=metric, workers=1)
        target = before if name == rows.REPAIR else new
        chosen = choose(
            target,
            installed,
            self.calibration(f"v2_{cell.pair}", is_wide=choice is not None and choice.learned > 0),
            settings,
            out,
            _say,
            before=before if settings.is_extrapolated else None,
            start=self._good(f"v2_{cell.pair}", cell.kind) if choice and choice.is_pulled_back else None,
        )
        return _Made(
            out, settings.extrapolation, sum(chosen.changed.values()), chosen.seconds, chosen.delta_bytes
        )

    def installed(self, cell: Cell) -> Path:
        """What devices have."""
        return self._cache / f"v1.{cell.kind}.gguf" if cell.base == NEAREST else self._good("v1", cell.kind)

    def _good(self, version: str, kind: str) -> Path:
        return series.good_file(self._cache, self._work, version, kind, _say)

    def calibration(self, version: str, *, is_wide: bool = False) -> Calibration:
        """Of a version, on the text that was trained on; if it is wide, on more of it, and as much text that was not."""
        key = f"{version}, wide" if is_wide else version
        if key not in self._calibrations:
            wide = self._wide_text(self._cache / f"{version}.bf16.gguf") if is_wide else None
            self._calibrations[key] = series.calibrated(
                self._cache, self._work, version, _say, wide, sequences=WIDE_RUNS if is_wide else SEQUENCES
            )
        return self._calibrations[key]

    def _wide_text(self, model: Path) -> Tokens:
        """The first half of the development text, and runs of as many tokens from all of the training text."""
        half = self._development(model)
        half = half[: len(half) // 2]
        trained = np.load(self._cache / "tokens.npy")
        starts = np.linspace(0, len(trained) - SEQUENCE_TOKENS, len(half) // SEQUENCE_TOKENS).astype(int)
        runs = trained[starts[:, None] + np.arange(SEQUENCE_TOKENS)]
        return np.concatenate([half, runs.reshape(-1)]).astype(np.int32)

    def _development(self, model: Path) -> Tokens:
        return self._tokens(model, "development", texts.development_text())

    def series(self, results: Results, wanted: Sequence[str]) -> None:
        """What one update does not show, where it is asked for."""
        names = ("v1.bf16.gguf", "v1.q4_0.gguf")
        identity: dict[str, object] = {
            "series": 1,
            "files": [sha256_of(self._cache / name) for name in names],
            "texts": [text.digest for text in self.texts()],
        }
        with journal(self._work, digest_of(msgspec.json.encode(identity)), identity) as kept:
            results.chain = kept.get("chain", series.Chain)
            results.facts = kept.get("facts", series.Facts)
            results.cost = kept.get("cost", series.Cost)
            is_measuring = "sources" in wanted and bool(self._wanted)
            results.sources = run_sources(self._cache, self._work, kept, _say, is_measuring=is_measuring)
            if "chain" in wanted and self._wanted:
                results.chain = series.run_chain(self._cache, self._work, self.texts(), kept, _say)
            if "facts" in wanted and self._wanted:
                results.facts = series.run_facts(self._cache, self._work, kept, _say)
            if "cost" in wanted and self._wanted:
                results.cost = series.run_cost(self._cache, kept, _say)

    def texts(self, cell: Cell | None = None) -> list[Text]:
        """Held-out texts, as much of them as a cell is judged on.

        Raises:
            RequestError: One of them shares text with what was trained and calibrated on, or chosen settings by.
        """
        if not self._texts:
            model = self._cache / "v1.q4_0.gguf"
            made = {"sources": texts.held_out_sources, "manuals": texts.held_out_manuals}
            if (evals := self._evals) is not None:
                made["questions"] = lambda: texts.held_out_questions(evals)
            self._texts = [Text(name, self._tokens(model, name, text())) for name, text in made.items()]
            seen = [
                Text("training", np.load(self._cache / "tokens.npy")),
                Text("development", self._development(model)),
            ]
            check_unseen(self._texts, seen)
        if cell is not None and cell.kind == "q8_0":
            return [replace(text, runs_max=JUDGED_RUNS) for text in self._texts]
        return self._texts

    def _tokens(self, model: Path, name: str, text: str) -> Tokens:
        digest = digest_of(text.encode())[:16]
        kept = self._work / f"tokens-{name}-{digest}.npy"
        if not kept.exists():
            plain = self._work / f"{name}.txt"
            plain.write_text(text, "utf-8")
            np.save(kept, read_tokens(model, [plain]))
        tokens: Tokens = np.load(kept)
        return tokens


@dataclass(frozen=True, slots=True)
class _Made:
    """A file of a row, and how it was chosen."""

    path: Path
    extrapolation: float = 0.0
    changed: int | None = None
    seconds: float = 0.0
    delta_bytes: int | None = None
    adapter: Path | None = None


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"{time.strftime('%X')} {line}", file=sys.stderr, flush=True)


def _progress(done: int, total: int, what: str) -> None:
    if done == total or os.isatty(2):
        _say(f"{what}: {done} of {total}")


if __name__ == "__main__":
    sys.exit(main())
