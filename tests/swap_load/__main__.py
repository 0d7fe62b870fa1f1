"""Swaps under load: applications ask the local endpoint without a pause, and every answer is compared with what its version really answers.

By default a whole agent runs as its own process and gets new versions from a real server; `--executor` leaves out what brings the versions, so that swaps are as
dense as they can be; `--llama` does that with two language models. `--broken` plants a mistake that must be found.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, NamedTuple

from protocol.release import RuntimeName
from protocol.tensors import BytesSource
from protocol.tensors.gguf import parse_gguf
from tests.endings import run_in_folder
from tests.kill.models import write_models
from tests.models import language_model
from tests.swap_load import agent, swapper
from tests.swap_load.clients import ClassQuestions, Outcome, TextQuestions
from tests.swap_load.swapper import CountingLeases, UnsafeClosingLeases, UnsafeFollowingLeases

BROKEN: Final = {"close": UnsafeClosingLeases, "follow": UnsafeFollowingLeases}
PROMPTS: Final = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was",
    "def add(a, b):",
)
EXCHANGED: Final = ("blk.10.ffn_up.weight", "blk.11.ffn_up.weight")


def class_questions(seed: int) -> ClassQuestions:
    rng = random.Random(seed)
    return ClassQuestions([[rng.gauss(0, 1) for _ in range(64)] for _ in range(50)])


def other_language_model(model: Path, folder: Path) -> Path:
    """The same model with two of its layers exchanged in part: another one that works, and answers otherwise."""
    data = bytearray(model.read_bytes())
    tensors = {region.name: region for region in parse_gguf(BytesSource(bytes(data))).regions}
    one, other = (tensors[name] for name in EXCHANGED)
    first = bytes(data[one.offset : one.offset + one.length])
    data[one.offset : one.offset + one.length] = data[other.offset : other.offset + other.length]
    data[other.offset : other.offset + other.length] = first
    changed = folder / "other.gguf"
    changed.write_bytes(data)
    return changed


class Swapped(NamedTuple):
    """What is swapped without an agent around it, and what is asked."""

    runtime: RuntimeName
    models: list[Path]
    questions: ClassQuestions | TextQuestions


def classifiers(folder: Path, seed: int) -> Swapped:
    return Swapped("onnx", [model for model, _ in write_models(folder, seed).values()], class_questions(seed))


def language_models(folder: Path) -> Swapped:
    model = language_model()
    return Swapped("llama", [model, other_language_model(model, folder)], TextQuestions(PROMPTS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.swap_load", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="requests (default: %(default)s)")
    parser.add_argument("--swaps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=150.0, help="requests a second for a whole agent (default: %(default)s)"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--executor", action="store_true", help="swaps without an agent around them")
    kind.add_argument("--llama", action="store_true", help="the same with language models")
    kind.add_argument("--in-place", action="store_true", help="an agent that rewrites its only copy")
    parser.add_argument("--broken", choices=sorted(BROKEN), default="", help="with --executor or --llama")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    if arguments.broken and not (arguments.executor or arguments.llama):
        parser.error("--broken is for --executor or --llama")

    def work(folder: Path) -> Outcome:
        questions: ClassQuestions | TextQuestions
        if arguments.llama or arguments.executor:
            runtime, models, questions = (
                language_models(folder) if arguments.llama else classifiers(folder, arguments.seed)
            )
            outcome = swapper.run(
                folder / "state",
                runtime,
                models,
                questions,
                count=arguments.count,
                swaps=arguments.swaps,
                seed=arguments.seed,
                leases=BROKEN.get(arguments.broken, CountingLeases)(),
                progress=_progress,
            )
        else:
            questions = whole = class_questions(arguments.seed)
            outcome = agent.run(
                folder,
                whole,
                count=arguments.count,
                swaps=arguments.swaps,
                seed=arguments.seed,
                requests_per_s=arguments.rate,
                in_place=arguments.in_place,
                progress=_progress,
            )
        questions.check_that_versions_differ()
        return outcome

    def is_good(outcome: Outcome) -> bool:
        return outcome.is_good and outcome.swaps >= arguments.swaps and not outcome.problems

    def text(outcome: Outcome) -> str:
        return json.dumps(asdict(outcome)) + "\n" if arguments.json else summary(outcome)

    return run_in_folder("swap load", work, is_good, text)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text} ")


def summary(outcome: Outcome) -> str:
    """The table that is printed."""
    ordered = sorted(outcome.latencies_ms) or [0.0]
    shares = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.99, 1.0)]
    lines = [
        "",
        f"requests answered                 {outcome.answered}",
        f"swaps                             {outcome.swaps}",
        f"lost                              {outcome.lost}",
        f"refused for now (503)             {outcome.refused}",
        f"answered by a mixture             {outcome.mixed}",
        f"answered by a version let go of   {outcome.stale}",
        "latency p50, p99, max             " + ", ".join(f"{each:.1f} ms" for each in shares),
        f"seconds                           {outcome.seconds:.0f}",
    ]
    if outcome.swaps_in_use:
        lines.insert(3, f"  while a request used the model  {outcome.swaps_in_use}")
    lines += [f"PROBLEM: {problem}" for problem in outcome.problems]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
