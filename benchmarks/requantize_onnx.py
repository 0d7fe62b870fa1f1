"""Choosing the next quantized ONNX file against the installed one, on a real fine-tune: `python -m benchmarks.requantize_onnx [KIND ...] [--cache DIR]`.

The pair `minilm-large`: MiniLM-L6, all weights trained on, quantized by onnxruntime (`int8`, `int8pc`) or in blocks of four bits (`int4`). Paragraphs of
the training text calibrate; judged is on paragraphs that neither training nor calibration has seen, of two kinds (`texts.py`). Prints the table of
`whimbrel requantize` and its guards for each kind. What was measured of a kind is in a journal, and is not measured again.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from benchmarks import texts
from benchmarks.catalog import CACHE
from benchmarks.wordpiece import WordPiece
from protocol.errors import RequestError, WhimbrelError
from protocol.ids import digest_of
from server.requantize.guards import Margins, is_passed
from server.requantize.onnx.calibration import calibrate
from server.requantize.onnx.choice import Settings
from server.requantize.onnx.graph import Graph
from server.requantize.onnx.inputs import Samples
from server.requantize.onnx.judging import Aim, Bench, Models, Questions, check_request
from server.requantize.onnx.matrices import find_floats, find_matrices
from server.requantize.onnx.orders import Asked
from server.requantize.onnx.verdict import Row, lines
from server.scorecard.card import Check
from server.scorecard.journal import journal

KINDS = {"int8": (0.005, 0.01), "int8pc": (0.005,), "int4": (0.01,)}
"""How the pair is quantized, and what deltas may weigh, as shares of the file."""

FOLDER = "requantize-onnx"

_CALIBRATION, _HELD_OUT = 96, 160  # paragraphs
_MEASURED_BY = 2  # grows when something else is measured, so that no journal from before is believed
_TOKENS = 32
_FIRST_PRICE = 3.5e-9  # where the search begins, near to where it ends: it saves rounds
_CHARACTERS_MIN = 80
_ASKED = Asked(kind="embedding", output="hidden", mask="mask")


class Measured(Struct, frozen=True, kw_only=True):
    """One kind of quantization.

    Attributes:
        rows: The table.
        checks: The guards.
        codes: Codes and floats that could change.
        changed: Those that do.
        seconds: Of the whole work, on a machine that may do other things.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    codes: int
    changed: int
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not measured yet; 0 when every guard passes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requantize_onnx", description=__doc__.splitlines()[0]
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="DIR", help=f"(default: {FOLDER} in --cache)")
    options = parser.parse_args(arguments)
    is_good = True
    try:
        for kind in options.kinds or KINDS:
            if kind not in KINDS:
                raise RequestError(f"no kind is called {kind}", hint=f"there are {', '.join(KINDS)}")
            for share in KINDS[kind]:
                found = measured(kind, share, options.cache, options.work or options.cache / FOLDER)
                is_good = _show(kind, share, found) and is_good
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if is_good else 1


def _show(kind: str, share: float, found: Measured) -> bool:
    """Print a table; says whether every guard passed."""
    print(f"\n# minilm-large, {kind}, {100 * share:g} % of the file\n")
    print("\n".join(lines(found.rows)))
    print(f"{found.changed:,} of {found.codes:,} codes and floats changed")
    for check in found.checks:
        print(f"{check.status:<9}  {check.name}: {check.detail}")
    sys.stdout.flush()
    return is_passed(found.checks)


def measured(kind: str, share: float, cache: Path, work: Path) -> Measured:
    """One kind at one budget, from the journal if it is there."""
    names = (
        "minilm-v1.onnx",
        "minilm-v2_large.onnx",
        f"minilm-v1.{kind}.onnx",
        f"minilm-v2_large.{kind}.onnx",
    )
    for name in (*names, "minilm.vocab.txt"):
        if not (cache / name).is_file():
            raise RequestError(
                f"{cache / name} is missing", hint="python -m benchmarks.pairs 'minilm-large.*'"
            )
    before, new, installed, plain = (cache / name for name in names)
    models = Models(Graph(new), Graph(installed), Graph(before), plain)
    questions = _questions(cache / "minilm.vocab.txt")
    identity: dict[str, object] = {
        "measured_by": _MEASURED_BY,
        "kind": kind,
        "share": share,
        "files": [models.new.sha256, models.installed.sha256],
        "samples": [each.digest for each in (questions.calibration, *questions.held_out)],
    }
    work.mkdir(parents=True, exist_ok=True)
    with journal(work, digest_of(msgspec.json.encode(identity)), identity) as kept:
        found = kept.get(kind, Measured)
        if found is None:
            found = _measure(models, questions, share, work)
            kept.put(kind, found)
    return found


def _measure(models: Models, questions: Questions, share: float, work: Path) -> Measured:
    started = time.monotonic()
    aim = Aim(budget_bytes=int(share * models.installed.length))
    check_request(models, questions, aim, _ASKED)
    matrices, _ = find_matrices(models.new, models.installed)
    floats = find_floats(models.new, models.installed)
    calibration = calibrate(
        models.new, models.installed, matrices, floats, questions.calibration, _ASKED, work, _say
    )
    with tempfile.TemporaryDirectory(dir=work, prefix=".files-") as folder:
        bench = Bench(
            models,
            _ASKED,
            calibration,
            Settings(budget_bytes=1, first_price=_FIRST_PRICE, workers=1),
            Path(folder),
            _say,
        )
        trial, chosen = bench.chosen(aim, None)
        rows = bench.rows(trial, questions.held_out)
        checks = bench.checks(questions, Margins())
    return Measured(
        rows=rows,
        checks=checks,
        codes=chosen.codes,
        changed=sum(chosen.changed.values()),
        seconds=time.monotonic() - started,
    )


def _questions(vocabulary: Path) -> Questions:
    tokenizer = WordPiece(vocabulary.read_text("utf-8").split("\n"))

    used: set[tuple[int, ...]] = set()

    def drawn(name: str, text: str, count: int) -> Samples:
        """Paragraphs of which none begins as one that was drawn before does."""
        parts = [part.strip() for part in text.split("\n\n")]
        np.random.default_rng(texts.TEXT_SEED).shuffle(parts)
        rows: list[tuple[int, ...]] = []
        for part in parts:
            row = tuple(tokenizer.encode(part, _TOKENS)) if len(part) > _CHARACTERS_MIN else ()
            if row and row not in used and len(rows) < count:
                rows.append(row)
                used.add(row)
        return _samples(name, rows)

    return Questions(
        calibration=drawn("training", texts.training_text(), _CALIBRATION),
        held_out=(
            drawn("sources", texts.held_out_sources(), _HELD_OUT),
            drawn("manuals", texts.held_out_manuals(), _HELD_OUT),
        ),
    )


def _samples(name: str, rows: Sequence[tuple[int, ...]]) -> Samples:
    whole = [row + (0,) * (_TOKENS - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (_TOKENS - len(row)) for row in rows]
    return Samples(name, {"tokens": np.asarray(whole, np.int64), "mask": np.asarray(mask, np.int64)})


def _say(line: str) -> None:
    print(f"{time.strftime('%X')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
