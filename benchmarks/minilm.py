"""MiniLM in several versions: contrastive training on neighbouring paragraphs, ONNX, dynamic int8.

Each version is exported by the same code, so that two files differ in what training changed.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor
from torch.nn import functional

from benchmarks.bert import Bert, Size
from benchmarks.texts import training_text
from benchmarks.wordpiece import WordPiece
from protocol.tensors import BytesSource, parse_safetensors

RATES = {"large": 5e-5, "tiny": 1e-5}

_SEED = 0
_STEPS = 30
_PAIRS = 12  # of neighbouring paragraphs in a step; each is told from the others' second paragraphs
_TOKENS = 64
_PARAGRAPH_CHARACTERS_MIN = 80
_WARM_UP_STEPS = 10
_WEIGHT_DECAY = 0.01
_SHARPNESS = 20.0  # cosines are multiplied by it, as in the model's own training
_OPSET = 17


def load(weights: Path) -> Bert:
    """The published model; its pooler, which sentence embeddings do not use, is left out."""
    content = memoryview(weights.read_bytes())
    model = Bert(Size())
    tensors = {
        region.name: torch.from_numpy(
            np.frombuffer(content[region.offset : region.end], np.float32).reshape(region.dims).copy()
        )
        for region in parse_safetensors(BytesSource(content))
        if region.name.endswith((".weight", ".bias")) and not region.name.startswith("pooler")
    }
    model.load_state_dict(tensors)
    return model


def train(model: Bert, vocabulary: Path, rate: float, report: Callable[[str], None]) -> None:
    """Trains in place: each paragraph is to be nearer to the one after it than to those of other pairs."""
    tokenizer = WordPiece(vocabulary.read_text("utf-8").split("\n"))
    paragraphs = [part for part in training_text().split("\n\n") if len(part) > _PARAGRAPH_CHARACTERS_MIN]
    draws = np.random.default_rng(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / _WARM_UP_STEPS)
        starts = draws.integers(0, len(paragraphs) - 1, _PAIRS)
        texts = [paragraphs[at] for at in starts] + [paragraphs[at + 1] for at in starts]
        embedded = _embedded(model, *_batch(tokenizer, texts))
        similarity = embedded[:_PAIRS] @ embedded[_PAIRS:].T * _SHARPNESS
        loss = functional.cross_entropy(similarity, torch.arange(_PAIRS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            report(f"step {step + 1} of {_STEPS}: loss {loss.item():.3f}")


def relative_change(before: Bert, after: Bert) -> float:
    """Root of the summed squares of the change over that of the weights before."""
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    change = sum(float((second - first).detach().double().square().sum()) for first, second in pairs)
    return math.sqrt(change / sum(float(first.detach().double().square().sum()) for first, _ in pairs))


def export(model: Bert, out: Path) -> None:
    """Writes the model as float32 ONNX."""
    example = torch.ones(2, 16, dtype=torch.long)
    axes = {0: "sequences", 1: "tokens"}
    with warnings.catch_warnings():
        # The exporter that follows a trace: the newer one needs another package and gives the same graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (example, torch.ones_like(example)),
            out,
            input_names=["tokens", "mask"],
            output_names=["hidden"],
            dynamic_axes={"tokens": axes, "mask": axes, "hidden": axes},
            opset_version=_OPSET,
            dynamo=False,
        )


def quantize(source: Path, out: Path, *, per_channel: bool) -> None:
    """Dynamic int8 by onnxruntime's quantizer, one scale for each tensor or for each output channel."""
    quantize_dynamic(source, out, weight_type=QuantType.QInt8, per_channel=per_channel)


def _batch(tokenizer: WordPiece, texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [tokenizer.encode(text, _TOKENS) for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, mask


def _embedded(model: Bert, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states over a sequence's tokens, at length one."""
    hidden = model(tokens, mask) * mask[..., None]
    return functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
