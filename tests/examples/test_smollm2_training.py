"""The adapter is trained by our own backward pass: it is held against finite differences on a tiny model."""

import gguf
import numpy as np
import pytest

from examples.smollm2.adapter import Adapter, Example, rounded_to_q4_1, train
from server.requantize.transformer import MATRICES, Array, Shape

_SHAPE = Shape(layers=2, heads=4, kv_heads=2, epsilon=1e-5, rope_base=100.0)
_WIDTH = 16
_HIDDEN_WIDTH = 24
_VOCABULARY = 19


def _layer(rng: np.random.Generator) -> dict[str, Array]:
    kv_width = _WIDTH // _SHAPE.heads * _SHAPE.kv_heads
    sizes = {
        "attn_q": (_WIDTH, _WIDTH),
        "attn_k": (kv_width, _WIDTH),
        "attn_v": (kv_width, _WIDTH),
        "attn_output": (_WIDTH, _WIDTH),
        "ffn_gate": (_HIDDEN_WIDTH, _WIDTH),
        "ffn_up": (_HIDDEN_WIDTH, _WIDTH),
        "ffn_down": (_WIDTH, _HIDDEN_WIDTH),
    }
    layer: dict[str, Array] = {name: rng.normal(0.0, 0.4, size) for name, size in sizes.items()}
    layer["attn_norm"] = rng.normal(1.0, 0.1, _WIDTH)
    layer["ffn_norm"] = rng.normal(1.0, 0.1, _WIDTH)
    return layer


def _adapter(rng: np.random.Generator) -> Adapter:
    adapter = Adapter.initialized(
        _SHAPE,
        [_layer(rng) for _ in range(_SHAPE.layers)],
        rng.normal(1.0, 0.1, _WIDTH),
        rng.normal(0.0, 0.5, (_VOCABULARY, _WIDTH)),
        matrices=MATRICES,
        rank=2,
        scale=0.7,
        rounding=lambda matrix: matrix,
        rng=rng,
    )
    for pair in adapter.pairs.values():
        pair.up[:] = rng.normal(0.0, 0.3, pair.up.shape)
    return adapter


def _examples(rng: np.random.Generator) -> list[Example]:
    examples = []
    for tokens, prompt in ((6, 3), (4, 1), (5, 4)):
        positions = np.arange(prompt - 1, tokens - 1)
        targets = rng.integers(0, _VOCABULARY, len(positions))
        examples.append(Example(rng.normal(0.0, 1.0, (tokens, _WIDTH)), positions, targets))
    return examples


def test_gradients_of_all_matrices_agree_with_finite_differences() -> None:
    rng = np.random.default_rng(11)
    adapter, examples = _adapter(rng), _examples(rng)
    _, gradients = adapter.loss_and_gradients(examples)
    assert len(gradients) == _SHAPE.layers * len(MATRICES)
    step = 1e-6
    for key, both in gradients.items():
        pair = adapter.pairs[key]
        for parameter, gradient in zip((pair.down, pair.up), both, strict=True):
            for flat in rng.choice(parameter.size, 6, replace=False):
                position = np.unravel_index(flat, parameter.shape)
                kept = parameter[position]
                losses = []
                for value in (kept - step, kept + step):
                    parameter[position] = value
                    losses.append(adapter.loss_and_gradients(examples)[0])
                parameter[position] = kept
                measured = (losses[1] - losses[0]) / (2 * step)
                assert measured == pytest.approx(gradient[position], rel=1e-4, abs=1e-8), key


def test_padding_does_not_reach_the_loss() -> None:
    rng = np.random.default_rng(12)
    adapter, examples = _adapter(rng), _examples(rng)
    together = adapter.loss_and_gradients(examples)[0] * sum(len(each.targets) for each in examples)
    alone = sum(adapter.loss_and_gradients([each])[0] * len(each.targets) for each in examples)
    assert together == pytest.approx(alone, rel=1e-12)


def test_a_new_adapter_changes_nothing() -> None:
    rng = np.random.default_rng(13)
    adapter = Adapter.initialized(
        _SHAPE,
        [_layer(rng)],
        np.ones(_WIDTH),
        rng.normal(0.0, 1.0, (_VOCABULARY, _WIDTH)),
        matrices=("ffn_down",),
        rank=3,
        scale=1.0,
        rounding=lambda matrix: matrix,
        rng=rng,
    )
    assert np.array_equal(adapter.merged(0, "ffn_down"), adapter.layers[0]["ffn_down"])


def test_training_learns_what_it_is_shown() -> None:
    rng = np.random.default_rng(14)
    adapter, examples = _adapter(rng), _examples(rng)
    before = adapter.loss_and_gradients(examples)[0]
    steps: list[int] = []
    after = train(
        adapter,
        examples,
        steps=60,
        batch=3,
        rate=0.05,
        weight_decay=0.0,
        rng=rng,
        progress=lambda step, _: steps.append(step),
    )
    assert after < before / 4
    assert steps == list(range(1, 61))


def test_rounding_is_that_of_the_file_format() -> None:
    rng = np.random.default_rng(15)
    matrix = rng.normal(0.0, 0.05, (48, 96)).astype(np.float32)
    matrix[3, 32:64] = 0.25  # a block of equal weights has no scale
    stored = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(
        rounded_to_q4_1(matrix), gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_1)
    )
