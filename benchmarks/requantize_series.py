"""What one update does not show: ten in a row, an update of a narrow task, and what the whole command costs."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from msgspec import Struct

from benchmarks import texts
from benchmarks.catalog import CHAIN_VERSIONS
from benchmarks.facts import facts_suite
from benchmarks.running import measured
from protocol.errors import RequestError
from server.requantize import rows
from server.requantize.calibration import SEQUENCES, Calibration, calibrate
from server.requantize.choice import choose
from server.requantize.controls import write_frozen
from server.requantize.evaluation import Evaluator
from server.requantize.settings import Settings
from server.requantize.texts import Text, Tokens
from server.requantize.weighing import delta_bytes
from server.scorecard.journal import Journal
from server.scorecard.summary import is_right

CHAIN_SHARE = 0.005
FACTS_CHOICES = ((0.005, 0), (0.025, 60))
"""Share of the file that the delta may weigh, and steps of distillation."""

FACTS_SHIPPED = FACTS_CHOICES[1]
"""What somebody would send to whom such an update matters: less than half of plain's bytes."""

FACTS_OTHER_SHARE = 0.1
"""Of the calibration text, which is what the model was trained to know, and a little of what it is not to forget."""

GOOD_PRICE = 3e-11
"""Nats a bit: next to nothing, so that nearly every code that pays is moved."""

_TIMEOUT_S = 4 * 3600.0

Say = Callable[[str], None]


class Divergence(Struct, frozen=True, kw_only=True):
    """Mean divergence of a file from its float model, by text."""

    kl: dict[str, float]


class Chain(Struct, frozen=True, kw_only=True):
    """Ten updates in a row.

    Attributes:
        last: Divergence of the tenth file, which was chosen against the ninth, and so on.
        fresh: That of a file which was made from the tenth version alone, and well.
        plain: That of the tenth version as llama.cpp rounds it.
        delta_bytes: Of each update.
        file_bytes: Of any of the files.
    """

    last: Divergence
    fresh: Divergence
    plain: Divergence
    delta_bytes: tuple[int, ...]
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Of the two, mean over the texts."""
        return sum(self.last.kl[name] / self.fresh.kl[name] for name in self.last.kl) / len(self.last.kl)


class Answers(Struct, frozen=True, kw_only=True):
    """Of one file to the made-up questions.

    Attributes:
        name: As tables show it.
        delta_bytes: From the installed file.
        right: Right answers.
        kept: Of those that plain answers, how many this file answers too.
    """

    name: str
    delta_bytes: int
    right: int
    kept: int


class Facts(Struct, frozen=True, kw_only=True):
    """Answers to the made-up questions.

    Attributes:
        count: Questions.
        reference: Right answers of the new model in floats.
        files: Installed and plain, plain with the installed embedding, and a chosen file of each of `FACTS_CHOICES`.
        file_bytes: Of any of the files.
    """

    count: int
    reference: int
    files: tuple[Answers, ...]
    file_bytes: int

    @property
    def kept(self) -> float | None:
        """Share of plain's answers that `FACTS_SHIPPED` keeps; None where plain has none."""
        by_name = {each.name: each for each in self.files}
        right = by_name[rows.PLAIN].right
        return by_name[chosen_name(*FACTS_SHIPPED)].kept / right if right else None


def chosen_name(share: float, distillation: int) -> str:
    """Of a file that was chosen for a share of the file, and distilled if there are steps."""
    return f"{'distilled' if distillation else 'chosen'}, {100 * share:g} %"


class Cost(Struct, frozen=True, kw_only=True):
    """Of the whole command, with all rows of the table and the guards."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def calibrated(
    cache: Path,
    work: Path,
    version: str,
    say: Say,
    tokens: Tokens | None = None,
    *,
    sequences: int = SEQUENCES,
) -> Calibration:
    """Moments of a version, on the text that was trained on unless another one is given."""
    if tokens is None:
        tokens = np.load(cache / "tokens.npy")
    return calibrate(
        cache / f"{version}.bf16.gguf", tokens, work / "calibration", say, sequences=sequences, workers=1
    )


def good_file(cache: Path, work: Path, version: str, kind: str, say: Say) -> Path:
    """A version quantized well without regard to any other: descent from the plain file at next to no price."""
    out = work / f"{version}.good.{kind}.gguf"
    if not out.exists():
        model, plain = cache / f"{version}.bf16.gguf", cache / f"{version}.{kind}.gguf"
        choose(
            model,
            plain,
            calibrated(cache, work, version, say),
            Settings(price=GOOD_PRICE, workers=1),
            out,
            say,
        )
    return out


def run_chain(cache: Path, work: Path, judged: Sequence[Text], kept: Journal, say: Say) -> Chain | None:
    """Ten updates, each chosen against the file before; None where a version is missing."""
    known = kept.get("chain", Chain)
    versions = [f"v2_chain{number}" for number in range(1, CHAIN_VERSIONS + 1)]
    if known is not None:
        return known
    plain = cache / f"{versions[-1]}.q4_0.gguf"
    needed = [*(cache / f"{each}.bf16.gguf" for each in versions), plain]
    missing = [each.name for each in needed if not each.is_file()]
    if missing:
        say(f"chain: left out, {missing[0]} is missing: python -m benchmarks.pairs 'chain*'")
        return None
    installed = cache / "v1.q4_0.gguf"
    file_bytes, sizes, price = installed.stat().st_size, [], None
    for version in versions:
        out = work / f"{version}.chosen.gguf"
        if not out.exists():
            settings = Settings(budget_bytes=int(CHAIN_SHARE * file_bytes), first_price=price, workers=1)
            calibration = calibrated(cache, work, version, say)
            price = choose(cache / f"{version}.bf16.gguf", installed, calibration, settings, out, say).price
        sizes.append(delta_bytes(installed, out))
        installed = out
    fresh = good_file(cache, work, versions[-1], "q4_0", say)
    with Evaluator(cache / f"{versions[-1]}.bf16.gguf", judged, work, 1, _silent) as evaluator:
        last, best, rounded = (
            Divergence(
                kl={name: sum(each.kl) / len(each.kl) for name, each in evaluator.measure(file).items()}
            )
            for file in (installed, fresh, plain)
        )
    found = Chain(last=last, fresh=best, plain=rounded, delta_bytes=tuple(sizes), file_bytes=file_bytes)
    kept.put("chain", found)
    return found


def _silent(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody looks at."""


def run_facts(cache: Path, work: Path, kept: Journal, say: Say) -> Facts | None:
    """Answers that only the new model knows, of plain and of chosen files; None where a file is missing."""
    known = kept.get("facts", Facts)
    new, plain, installed = (
        cache / name for name in ("v2_facts.bf16.gguf", "v2_facts.q4_0.gguf", "v1.q4_0.gguf")
    )
    if known is not None:
        return known
    if not new.is_file() or not plain.is_file() or not (cache / "facts.npy").is_file():
        say("facts: left out, python -m benchmarks.pairs 'facts.*' makes the files")
        return None
    task, other = np.load(cache / "facts.npy"), np.load(cache / "tokens.npy")
    tokens = np.concatenate([task, other[: int(len(task) * FACTS_OTHER_SHARE / (1 - FACTS_OTHER_SHARE))]])
    calibration = calibrated(cache, work, "v2_facts", say, tokens)
    suite, file_bytes, out = facts_suite(), installed.stat().st_size, work / "facts.gguf"
    with Evaluator(new, (), work, 1, _silent) as evaluator:

        def right(file: Path) -> list[bool]:
            replies = evaluator.ask(file, suite)
            return [is_right(item, reply) for item, reply in zip(suite.items, replies, strict=True)]

        by_plain = right(plain)

        def answers(name: str, file: Path, make: Callable[[], int]) -> Answers:
            known = kept.get(f"facts: {name}", Answers)
            if known is not None:
                return known
            size, found = make(), right(file)
            known = Answers(
                name=name,
                delta_bytes=size,
                right=sum(found),
                kept=sum(one and other for one, other in zip(by_plain, found, strict=True)),
            )
            kept.put(f"facts: {name}", known)
            return known

        def frozen() -> int:
            write_frozen(plain, installed, out)
            return delta_bytes(installed, out)

        def chosen(share: float, distillation: int) -> int:
            settings = Settings(budget_bytes=int(share * file_bytes), distillation=distillation)
            return choose(new, installed, calibration, settings, out, say).delta_bytes

        files = [
            answers(rows.NOTHING, installed, lambda: 0),
            answers(rows.PLAIN, plain, lambda: delta_bytes(installed, plain)),
            answers(rows.FROZEN, out, frozen),
            *(answers(chosen_name(*each), out, partial(chosen, *each)) for each in FACTS_CHOICES),
        ]
        found = Facts(
            count=len(suite.items), reference=sum(right(new)), files=tuple(files), file_bytes=file_bytes
        )
    kept.put("facts", found)
    out.unlink(missing_ok=True)
    return found


def run_cost(cache: Path, kept: Journal, say: Say) -> Cost:
    """The whole command on the pair `large`, with nothing measured before.

    Raises:
        RequestError: It failed.
    """
    known = kept.get("cost", Cost)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "calibration": texts.training_text,
            "sources": texts.held_out_sources,
            "manuals": texts.held_out_manuals,
        }
        for part, text in parts.items():
            (folder / f"{part}.txt").write_text(text(), "utf-8")
        say("cost: whimbrel requantize, from nothing")
        command = [
            sys.executable,
            "-m",
            "server.cli",
            "requantize",
            str((cache / "v2_large.bf16.gguf").resolve()),
        ]
        command += ["--installed", str((cache / "v1.q4_0.gguf").resolve()), "--out", str(folder / "out.gguf")]
        command += ["--calibration", str(folder / "calibration.txt"), "--budget", "0.5%"]
        command += ["--held-out", str(folder / "sources.txt"), "--held-out", str(folder / "manuals.txt")]
        found = measured(command, _TIMEOUT_S)
    if isinstance(found, str):
        raise RequestError(f"whimbrel requantize: {found}")
    cost = Cost(wall_s=found.wall_s, cpu_s=found.process_cpu_s, peak_bytes=found.peak_bytes)
    kept.put("cost", cost)
    return cost
