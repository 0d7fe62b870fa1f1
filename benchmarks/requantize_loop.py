"""A requantized file through the whole loop, on real models and a live fleet (`make requantize-loop`).

`python -m benchmarks.requantize_loop [--budget 1%] [--devices 4] [--cache DIR] [--work DIR]`. SmolLM2-135M as Q4_0 runs on all devices; the float model that was
trained on from it (pair `large`) is requantized, judged on held-out texts and golden prompts, scored, signed, rolled out as a delta, tried and committed.
What was measured of the models is kept in the folder of the work: a run that was stopped goes on.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import texts, update_loop
from benchmarks.catalog import CACHE
from benchmarks.update_loop import (
    DEVICES_FOLDER,
    INSTALLED_FILE,
    LINK,
    NEW_FILE,
    SERVER_FOLDER,
    Ingredients,
    Outcome,
)
from protocol.errors import RequestError, WhimbrelError
from server.adapters.blobs import storage_errors
from server.arguments import integer
from server.display import table
from server.rollouts.states import RolloutState
from simulator.output import own_descriptor

WORK: Final = CACHE.parent / "requantize-loop"
GOLDEN: Final = (
    Path(__file__).parents[1] / "examples" / "smollm2" / "golden.toml",
    Path(__file__).with_name("loop_golden.toml"),
)
"""The second ones were written when the first ones had refused files of 0.3 and 0.5 %, and judge the larger one afresh."""

GOLDEN_FILE: Final = "golden.toml"
CALIBRATION: Final = "calibration.txt"
HELD_OUT: Final = ("sources.txt", "manuals.txt")

FILES: Final = {NEW_FILE: "v2_large.bf16.gguf", INSTALLED_FILE: "v1.q4_0.gguf"}
"""Of the pair cache."""

BUDGET_DEFAULT: Final = "1%"
DEVICES_DEFAULT: Final = 4
DEVICES_MAX: Final = 64
SCORE_OPTIONS: Final = ("--context", "1024", "--memory-at", "512", "--drift-texts", "8", "--threads", "1")
"""Of a scorecard, the part that takes minutes: no suites, and few texts to compare the two versions on."""


def main(arguments: list[str] | None = None) -> int:
    """0 when every device runs the chosen file, which it fetched as a delta smaller than plain's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requantize_loop", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--budget", default=BUDGET_DEFAULT, metavar="SIZE", help="(default: 1%%)")
    parser.add_argument(
        "--devices",
        type=integer(1, DEVICES_MAX),
        default=DEVICES_DEFAULT,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help="with the models (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help="for everything else (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    # Devices load their models in this process.
    with own_descriptor(sys.stdout) as output, own_descriptor(sys.stderr) as errors:
        try:
            return _run(options, lambda line: print(line, file=output, flush=True))
        except WhimbrelError as error:
            print(f"error: {error}", file=errors, flush=True)
            return 2


def _run(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    began = time.monotonic()
    ingredients = Ingredients(
        folder=prepared(options.cache, options.work),
        calibration=CALIBRATION,
        held_out=HELD_OUT,
        golden=GOLDEN_FILE,
        budget=options.budget,
        devices=options.devices,
        score_options=SCORE_OPTIONS,
    )
    outcome = update_loop.run(ingredients, say)
    say("\n".join(["", *summary(outcome)]))
    wrong = problems(outcome)
    say("\n".join(f"WRONG: {each}" for each in wrong) or f"ok, in {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def prepared(cache: Path, work: Path) -> Path:
    """The folder of the work with models and texts, and without what an earlier run left of its fleet.

    Raises:
        RequestError: A model is missing.
        StorageError: The folder cannot be written.
    """
    for name in FILES.values():
        if not (cache / name).is_file():
            raise RequestError(
                f"{cache / name} is missing",
                hint="`make requantize-pair` trains and quantizes the pair (PyTorch, some minutes), or name its folder with --cache",
            )
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        for folder in (SERVER_FOLDER, DEVICES_FOLDER):
            if (work / folder).exists():
                shutil.rmtree(work / folder)
        for name, source in FILES.items():
            (work / name).unlink(missing_ok=True)
            (work / name).symlink_to((cache / source).resolve())
        (work / GOLDEN_FILE).write_text("\n".join(path.read_text("utf-8") for path in GOLDEN), "utf-8")
        parts = {
            CALIBRATION: texts.training_text,
            HELD_OUT[0]: texts.held_out_sources,
            HELD_OUT[1]: texts.held_out_manuals,
        }
        for name, text in parts.items():
            (work / name).write_text(text(), "utf-8")
    return work.resolve()


def summary(outcome: Outcome) -> Iterator[str]:
    """What was sent, and what became of each device, as a person reads it."""
    sizes = [
        ("the whole file", outcome.file_bytes),
        ("delta to plain quantization of the same model", outcome.plain_delta_bytes),
        ("delta to the chosen file, as promised", outcome.promised_bytes),
        *(("delta to the chosen file, as signed", length) for length in sorted(outcome.deltas.values())),
        *((f"fetched by {each.device}", each.transfer_bytes) for each in outcome.devices),
        *((f"over the air to {each.device}, everything", each.air_bytes) for each in outcome.devices),
    ]
    yield from table(
        ["WHAT", "BYTES", "% OF THE FILE", "SECONDS ON THE LINK"],
        [
            [what, f"{count:,}", f"{100 * count / outcome.file_bytes:.3f}", f"{count / LINK.bandwidth_bytes_s:,.1f}"]
            for what, count in sizes
        ],
    )  # fmt: skip
    yield ""
    yield from table(
        ["DEVICE", "ROLLOUT", "RUNS", "PROMPTS", "TO COMMIT", "OF WHICH"],
        [
            [
                each.device,
                each.status,
                each.version,
                f"{each.prompts[0]} of {each.prompts[1]}",
                "-" if each.commit_ms is None else f"{each.commit_ms / 1000:.1f} s",
                ", ".join(
                    f"{state} {ms / 1000:.1f}"
                    for state, ms in each.states_ms.items()
                    if ms and state != "idle"
                ),
            ]
            for each in outcome.devices
        ],
    )
    yield ""
    for device, (before, after) in outcome.answers.items():
        yield f"{device}, before: {' '.join(before.split())[:100]}"
        yield f"{device}, after:  {' '.join(after.split())[:100]}"
    card = outcome.release.scorecard
    yield ""
    yield f"Scorecard: {'none' if card is None else card.verdict}. Rollout: {outcome.rollout.rollout.state.value}."


def problems(outcome: Outcome) -> list[str]:
    """What is not as it should be; empty if all is."""
    found = []
    if outcome.rollout.rollout.state is not RolloutState.FINISHED:
        found.append(
            f"the rollout is {outcome.rollout.rollout.state.value}: {outcome.rollout.rollout.reason}"
        )
    if outcome.release.provenance is None:
        found.append("the release does not say how its file was chosen")
    if not outcome.promised_bytes < outcome.plain_delta_bytes:
        found.append("the delta is no smaller than plain's")
    for each in outcome.devices:
        if (each.status, each.outcome) != ("committed", "committed"):
            found.append(f"{each.device} is {each.status}, and reported {each.outcome or 'nothing'}")
        if each.file_sha256 != outcome.file_sha256:
            found.append(f"{each.device} serves another file")
        if not each.fetched <= set(outcome.deltas):
            found.append(f"{each.device} fetched something other than the delta")
    return found


if __name__ == "__main__":
    sys.exit(main())
