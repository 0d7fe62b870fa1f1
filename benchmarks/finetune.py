"""Fine-tunes SmolLM2-135M: the recipes and the training loop. No files; the text is in `texts.py`.

The recipes are small on purpose: what is studied is how weights move, not how good a model becomes. Each is seeded, but
threads add in different orders on different machines, so that results agree in size and kind, not bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.llama import EMBEDDING, OUTPUT_NORM, Adapter, Llama
from benchmarks.weights import round_bf16
from examples.smollm2.model_file import tensor_name
from server.requantize.transformer import MATRICES, Array, Shape

WEIGHTS_SEED = 3
BATCH_SEED = 11

_WARM_UP_STEPS = 10
_FINAL_RATE = 0.1  # of the peak; cosine in between (Loshchilov and Hutter, 2017)
_GRADIENT_NORM_MAX = 1.0
_WEIGHT_DECAY = 0.01
_RANK = 8
_ADAPTER_SCALE = 2.0  # alpha / rank with alpha = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train.

    Attributes:
        kind: `full` trains all weights; `lora` adapters on all matrices of all layers, merged at the end; `last` the
            last two layers, the final norm and the head.
        rate: Peak learning rate.
        steps: Optimizer steps.
        sequences: Sequences of a step.
        tokens: Tokens of a sequence.
    """

    kind: str
    rate: float
    steps: int
    sequences: int
    tokens: int


RECIPES = {
    "large": Recipe("full", 5e-5, steps=120, sequences=5, tokens=128),
    "tiny": Recipe("full", 1e-5, steps=60, sequences=2, tokens=128),
    "lora": Recipe("lora", 3e-4, steps=60, sequences=5, tokens=128),
    "last2": Recipe("last", 5e-5, steps=60, sequences=5, tokens=128),
    "facts": Recipe("full", 1e-4, steps=150, sequences=5, tokens=128),
}

CHAIN = Recipe("full", 5e-5, steps=20, sequences=5, tokens=128)
"""From each version of a chain to the next: training goes on where the version before was released, with batches of its own."""


def train(
    shape: Shape,
    base: Mapping[str, Array],
    tokens: npt.NDArray[np.int32],
    recipe: Recipe,
    report: Callable[[str], None],
    *,
    number: int = 0,
) -> dict[str, Array]:
    """Trains a copy of the base and returns its weights, rounded to bfloat16.

    Args:
        shape: The model's size.
        base: float32 weights by GGUF name.
        tokens: The training text.
        recipe: What to train, and how.
        report: Takes lines about the progress.
        number: Of the training, where several follow each other: draws other batches.
    """
    torch.manual_seed(WEIGHTS_SEED)
    model, trained = _prepared(shape, base, recipe.kind)
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.999), weight_decay=_WEIGHT_DECAY)
    draws = np.random.default_rng(BATCH_SEED + number)
    losses: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(step, recipe.steps)
        starts = draws.integers(0, len(tokens) - recipe.tokens - 1, recipe.sequences)
        batch = np.stack([tokens[start : start + recipe.tokens] for start in starts]).astype(np.int64)
        losses.append(_step(model, trained, optimizer, torch.from_numpy(batch)))
        if step % 20 == 19:
            report(f"step {step + 1} of {recipe.steps}: loss {np.mean(losses[-20:]):.3f}")
    weights = {name: weight.detach() for name, weight in model.weights.items()}
    for name, adapter in model.adapters.items():
        weights[name] = weights[name] + adapter.update().detach()
    return {name: round_bf16(weight.numpy()) for name, weight in weights.items()}


def _schedule(step: int, steps: int) -> float:
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - _FINAL_RATE) + _FINAL_RATE
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * decay


def _step(model: Llama, trained: list[Tensor], optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    # Arithmetic in bfloat16 where the processor has it, weights and moments in float32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(batch)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, _GRADIENT_NORM_MAX)
    optimizer.step()
    return float(loss.item())


def _prepared(shape: Shape, base: Mapping[str, Array], kind: str) -> tuple[Llama, list[Tensor]]:
    """The model, and which of its tensors are trained."""
    weights = {name: torch.tensor(value) for name, value in base.items()}
    if kind == "lora":
        adapters = {
            name: Adapter(
                down=(torch.randn(_RANK, weights[name].shape[1]) * 0.25 / math.sqrt(_RANK)).requires_grad_(),
                up=torch.zeros(weights[name].shape[0], _RANK, requires_grad=True),
                scale=_ADAPTER_SCALE,
            )
            for name in (tensor_name(layer, matrix) for layer in range(shape.layers) for matrix in MATRICES)
        }
        return Llama(shape, weights, adapters), [
            part for adapter in adapters.values() for part in (adapter.down, adapter.up)
        ]
    last = tuple(f"blk.{layer}." for layer in (shape.layers - 2, shape.layers - 1))
    names = [
        name
        for name in weights
        if kind == "full" or name in {EMBEDDING, OUTPUT_NORM} or name.startswith(last)
    ]
    trained = [weights[name].requires_grad_() for name in names]
    return Llama(shape, weights, lookup_trains=kind == "full"), trained
