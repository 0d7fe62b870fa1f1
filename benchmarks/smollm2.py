"""SmolLM2-135M in several versions: the base in bfloat16, training, llama.cpp's quantizer."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.facts import facts_text
from benchmarks.finetune import Recipe, train
from benchmarks.gguf_files import as_bf16, read_stored, read_weights, write_gguf
from benchmarks.texts import training_text
from benchmarks.weights import extrapolate, relative_change, round_bf16
from examples.smollm2.llama import Model, quantize
from examples.smollm2.model_file import read_shape
from server.requantize.transformer import Array

# How llama.cpp numbers the kinds of files that it writes (llama_ftype in llama.h).
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q2_k": 10, "q4_k_m": 15}

_BF16_FILE_TYPE = 32
_DITHER_SEED = 7
_NOISE_SEED = 5
_Q8_0_BLOCK_WEIGHTS = 32
_Q8_0_BLOCK_BYTES = 34  # a float16 scale, then 32 int8 codes


def base_weights(model: Path) -> dict[str, Array]:
    """The first version: the model's weights dequantized, its Q8_0 embedding dithered, all rounded to bfloat16.

    The dither is uniform within each cell of the quantizer. Without it every embedding weight would stand in the middle
    of its Q8_0 cell, where no trained weight stands, and a small update would change no code at all.
    """
    draws = np.random.default_rng(_DITHER_SEED)
    weights = {}
    for tensor in gguf.GGUFReader(model).tensors:
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            blocks = np.asarray(tensor.data).reshape(-1, _Q8_0_BLOCK_BYTES)
            steps = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            dither = draws.uniform(-0.5, 0.5, (len(blocks), _Q8_0_BLOCK_WEIGHTS)).astype(np.float32)
            values = values + (steps * dither).reshape(values.shape)
        weights[tensor.name] = round_bf16(values)
    return weights


def training_tokens(model: Path) -> npt.NDArray[np.int32]:
    """The training text in the model's own vocabulary."""
    return _tokens(model, training_text())


def facts_tokens(model: Path) -> npt.NDArray[np.int32]:
    """The text of made-up facts, likewise."""
    return _tokens(model, facts_text())


def _tokens(model: Path, text: str) -> npt.NDArray[np.int32]:
    with Model(model, vocabulary_only=True) as vocabulary:
        return np.array(vocabulary.tokens(text), np.int32)


def write_base(model: Path, out: Path) -> None:
    """Writes the first version as BF16, with the model's own metadata."""
    _write(model, base_weights(model), out)


def write_trained(
    model: Path,
    base: Path,
    tokens: Path,
    recipe: Recipe,
    out: Path,
    report: Callable[[str], None],
    *,
    number: int = 0,
) -> None:
    """Writes a version after training by a recipe; `number` draws its batches."""
    before = read_weights(base)
    after = train(read_shape(gguf.GGUFReader(base)), before, np.load(tokens), recipe, report, number=number)
    report(f"relative change of the weights: {100 * relative_change(before, after):.3f} %")
    _write(model, after, out)


def write_far(model: Path, base: Path, trained: Path, factor: float, out: Path) -> None:
    """Writes a version that moved `factor` times as far as a trained one."""
    _write(model, extrapolate(read_weights(base), read_weights(trained), factor), out)


def write_noisy(model: Path, base: Path, layer: int, size: float, out: Path) -> None:
    """Writes a version with noise on the matrices of a layer, `size` times as large as their weights."""
    draws = np.random.default_rng(_NOISE_SEED)
    weights = read_weights(base)
    for name, values in weights.items():
        if name.startswith(f"blk.{layer}.") and values.ndim == 2:
            noise = draws.standard_normal(values.shape, np.float32)
            weights[name] = round_bf16(values + np.float32(size * values.std()) * noise)
    _write(model, weights, out)


def quantize_as(source: Path, out: Path, kind: str) -> None:
    """Quantizes a BF16 file to one of `FILE_TYPES`.

    Raises:
        EngineError: llama.cpp refuses.
    """
    quantize(source, out, FILE_TYPES[kind])


def _write(model: Path, weights: dict[str, Array], out: Path) -> None:
    tensors = (as_bf16(each.name, weights[each.name]) for each in read_stored(model))
    write_gguf(model, out, tensors, {"general.file_type": _BF16_FILE_TYPE})
