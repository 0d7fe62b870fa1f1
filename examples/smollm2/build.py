"""Makes three versions of SmolLM2-135M: `python -m examples.smollm2.build --out DIR --model FILE [--seed S] [--steps N]`.

FILE is what `python -m examples.smollm2.fetch` got. Writes into DIR:
  v1.gguf  the model itself
  v2.gguf  v1 with a low-rank adapter merged, trained here on facts.jsonl, and quantized again by llama.cpp: it answers
           what v1 cannot know, and still answers what v1 knew
  v3.gguf  v2 with one bit of some block scales stuck, as a bad memory leaves them: it loads and talks nonsense
  health.json     the health plan for v2 and later: facts and general prompts
  health-v1.json  the health plan for v1: general prompts only
  report.json     for each version and prompt the mean log-probability of the right answer, and the greedy answer
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import msgspec
import numpy as np

from examples.smollm2.adapter import Adapter, Example, rounded_to_q4_1, train
from examples.smollm2.fetch import is_model
from examples.smollm2.llama import Model, quantize_to_q4_1
from examples.smollm2.model_file import (
    damage_scales,
    read_layer,
    read_shape,
    read_tensor,
    tensor_name,
    write_back,
    write_replaced,
)
from examples.smollm2.questions import Question, read_questions
from examples.smollm2.report import Measurement, health_plan, measure, summary
from protocol.errors import ModelFileError, RequestError, StorageError, WhimbrelError
from server.requantize.transformer import Array, forward_layer

STEPS = 110
VERSIONS = ("v1", "v2", "v3")
TRAINED_LAYERS = 6
TRAINED_MATRICES = ("ffn_down", "attn_output", "attn_v")

_RANK = 8
_SCALE = 1.0
_BATCH = 8
_RATE = 1e-2
_WEIGHT_DECAY = 0.01
_STEPS_MAX = 10_000
_PROGRESS_STEPS = 10

# One in twenty block scales in every fifth layer: far from all of the file, and enough to ruin every answer.
_DAMAGED_MATRIX = "ffn_down"
_DAMAGED_LAYER_STEP = 5
_DAMAGED_SHARE = 0.05

Progress = Callable[[str], None]


def prepared_examples(reader: gguf.GGUFReader, model: Path, questions: Sequence[Question]) -> list[Example]:
    """Runs the questions and answers through the layers that are not trained, once."""
    shape = read_shape(reader)
    embedding = read_tensor(reader, "token_embd.weight")
    with Model(model, vocabulary_only=True) as tokenizer:
        # The end of the line is learned too: there the answer ends.
        sequences = [
            (tokenizer.tokens(question.prompt), tokenizer.tokens(question.completion + "\n"))
            for question in questions
        ]
    longest = max(len(before) + len(after) for before, after in sequences)
    hidden: Array = np.zeros((len(sequences), longest, embedding.shape[1]), np.float32)
    for row, (before, after) in enumerate(sequences):
        hidden[row, : len(before) + len(after)] = embedding[before + after]
    for number in range(shape.layers - TRAINED_LAYERS):
        hidden, _ = forward_layer(shape, read_layer(reader, number), hidden)
    return [
        Example(
            hidden[row, : len(before) + len(after)],
            np.arange(len(before) - 1, len(before) + len(after) - 1),
            np.asarray(after, np.int64),
        )
        for row, (before, after) in enumerate(sequences)
    ]


def trained_matrices(
    model: Path, questions: Sequence[Question], *, steps: int, seed: int, progress: Progress
) -> dict[str, Array]:
    """Trains an adapter on the last layers and merges it: new float32 matrices by tensor name."""
    rng = np.random.default_rng(seed)
    reader = gguf.GGUFReader(model)
    shape = read_shape(reader)
    examples = prepared_examples(reader, model, questions)
    first = shape.layers - TRAINED_LAYERS
    adapter = Adapter.initialized(
        shape,
        [read_layer(reader, number) for number in range(first, shape.layers)],
        read_tensor(reader, "output_norm.weight"),
        read_tensor(reader, "token_embd.weight"),
        matrices=TRAINED_MATRICES,
        rank=_RANK,
        scale=_SCALE,
        rounding=rounded_to_q4_1,
        rng=rng,
    )

    def told(step: int, loss: float) -> None:
        if step % _PROGRESS_STEPS == 0 or step == steps:
            progress(f"v2: step {step} of {steps}, loss {loss:.3f}")

    train(
        adapter,
        examples,
        steps=steps,
        batch=_BATCH,
        rate=_RATE,
        weight_decay=_WEIGHT_DECAY,
        rng=rng,
        progress=told,
    )
    return {
        tensor_name(first + position, name): adapter.merged(position, name)
        for position, name in adapter.pairs
    }


def build(out: Path, model: Path, *, seed: int, steps: int, progress: Progress) -> None:
    """Writes the three versions, their health plans and the report into a folder, which is made if needed.

    Raises:
        ModelFileError: The model is not the one that `fetch.py` gets.
        StorageError: The folder cannot be written.
        EngineError: llama.cpp refuses a file.
    """
    questions = read_questions()
    try:
        if not is_model(model):
            raise ModelFileError(
                f"{model} is not the expected model", hint="python -m examples.smollm2.fetch gets it"
            )
        out.mkdir(parents=True, exist_ok=True)
        files = {version: out / f"{version}.gguf" for version in VERSIONS}
        shutil.copyfile(model, files["v1"])
        learned = [each for each in questions if each.use != "held-out"]
        matrices = trained_matrices(files["v1"], learned, steps=steps, seed=seed, progress=progress)
        with tempfile.TemporaryDirectory(dir=out, prefix="quantize-") as folder:
            merged, quantized = Path(folder) / "merged.gguf", Path(folder) / "quantized.gguf"
            write_replaced(gguf.GGUFReader(files["v1"]), matrices, merged)
            quantize_to_q4_1(merged, quantized)
            write_back(files["v1"], quantized, matrices, files["v2"])
        damaged = damage_scales(
            files["v2"],
            files["v3"],
            matrix=_DAMAGED_MATRIX,
            layer_step=_DAMAGED_LAYER_STEP,
            share=_DAMAGED_SHARE,
            seed=seed,
        )
        progress(f"v3: {damaged:,} block scales damaged")
        asked = [each for each in questions if each.use != "rehearsal"]
        _write_evidence(
            out, files, asked, {"seed": seed, "steps": steps, "damaged_scales": damaged}, progress
        )
    except OSError as error:
        raise StorageError(
            f"cannot build in {out}: {error.strerror}", hint="see --out and --model"
        ) from error


def _write_evidence(
    out: Path,
    files: dict[str, Path],
    questions: Sequence[Question],
    settings: dict[str, int],
    progress: Progress,
) -> None:
    measured: dict[str, list[Measurement]] = {}
    for version, file in files.items():
        measured[version] = measure(file, questions)
        progress(f"{version}: {summary(measured[version])}")
    plans = {
        "health.json": health_plan(questions, measured["v2"], measured["v3"], facts=True),
        "health-v1.json": health_plan(questions, measured["v1"], measured["v3"], facts=False),
    }
    for name, plan in plans.items():
        (out / name).write_bytes(msgspec.json.encode(plan) + b"\n")
    report = {
        **settings,
        "versions": {
            version: {
                "bytes": files[version].stat().st_size,
                "prompts": [msgspec.to_builtins(each) for each in of_version],
            }
            for version, of_version in measured.items()
        },
    }
    (out / "report.json").write_text(json.dumps(_finite(report), indent=2) + "\n")


def _finite(value: object) -> object:
    """The same report with null where a damaged model gave no number: JSON has none for it."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2.build", description="Makes three versions of SmolLM2-135M."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the models")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="the GGUF file that fetch.py got"
    )
    parser.add_argument(
        "--seed", type=int, default=7, metavar="S", help="decides training and damage (default: 7)"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"of training (default: {STEPS})"
    )
    options = parser.parse_args(arguments)
    try:
        if options.seed < 0:
            raise RequestError("--seed must not be negative")
        if not 1 <= options.steps <= _STEPS_MAX:
            raise RequestError(f"--steps must be between 1 and {_STEPS_MAX}")
        build(
            options.out,
            options.model,
            seed=options.seed,
            steps=options.steps,
            progress=lambda line: print(line, flush=True),
        )
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
