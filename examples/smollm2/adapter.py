"""A low-rank adapter (Hu et al., 2021) on the last layers of a Llama model, and its training with AdamW.

Training knows that the merged weights will be quantized: the forward pass uses weights rounded as the file will hold
them, and the gradient passes the rounding unchanged (straight-through, Bengio et al., 2013). Without this most of a
small adapter would be rounded away, because the base weights already stand on their 4-bit grid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from server.requantize.transformer import Array, LayerTrace, Shape, backward_layer, forward_layer, head_loss

BLOCK_WEIGHTS = 32  # weights that share a scale and a minimum in Q4_1
_LEVELS_MAX = 15

_FIRST_MOMENT_DECAY = 0.9
_SECOND_MOMENT_DECAY = 0.99  # shorter than usual: there are only some hundred steps
_EPSILON = 1e-8
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the completion to be learned, up to the first layer that is trained.

    Attributes:
        hidden: Input of the first trained layer, shape (tokens, width).
        positions: Which tokens predict a token of the completion.
        targets: The tokens that they must predict.
    """

    hidden: Array
    positions: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


@dataclass(slots=True)
class Pair:
    """One adapted matrix: `scale * up @ down` is added to it."""

    down: Array
    up: Array
    scale: float

    def delta(self) -> Array:
        """What is added to the matrix."""
        return np.asarray(self.scale * (self.up @ self.down))

    def gradients(self, inputs: Array, upstream: Array) -> tuple[Array, Array]:
        """Gradients of `down` and `up` from the matrix's inputs and the gradient at its outputs, (tokens, features)."""
        through_up = upstream @ self.up
        through_down = inputs @ self.down.T
        return self.scale * (through_up.T @ inputs), self.scale * (upstream.T @ through_down)


@dataclass(slots=True)
class Adapter:
    """The trained layers of a model, frozen, with a `Pair` on some of their matrices.

    Attributes:
        shape: Of the whole model.
        layers: Weights of the last layers, the first trained one first.
        norm: Weight of the final normalization.
        embedding: Token embedding, tied to the output.
        pairs: By position in `layers` and name of the matrix.
        rounding: What quantization will do to a merged matrix; the identity trains without it.
    """

    shape: Shape
    layers: Sequence[Mapping[str, Array]]
    norm: Array
    embedding: Array
    pairs: dict[tuple[int, str], Pair]
    rounding: Callable[[Array], Array]

    @classmethod
    def initialized(
        cls,
        shape: Shape,
        layers: Sequence[Mapping[str, Array]],
        norm: Array,
        embedding: Array,
        *,
        matrices: Sequence[str],
        rank: int,
        scale: float,
        rounding: Callable[[Array], Array],
        rng: np.random.Generator,
    ) -> Self:
        """A new adapter, which changes nothing yet: `down` is random and `up` is zero."""
        pairs = {}
        for position, layer in enumerate(layers):
            for name in matrices:
                outputs, inputs = layer[name].shape
                down = rng.normal(0.0, inputs**-0.5, (rank, inputs)).astype(layer[name].dtype)
                pairs[position, name] = Pair(down, np.zeros((outputs, rank), layer[name].dtype), scale)
        return cls(shape, layers, norm, embedding, pairs, rounding)

    def merged(self, position: int, name: str) -> Array:
        """The adapted matrix before quantization."""
        return np.asarray(self.layers[position][name] + self.pairs[position, name].delta())

    def loss_and_gradients(
        self, examples: Sequence[Example]
    ) -> tuple[float, dict[tuple[int, str], tuple[Array, Array]]]:
        """Mean cross-entropy over all completion tokens of a batch, and the gradients of every pair."""
        hidden = _padded(examples)
        effective: list[dict[str, Array]] = [dict(layer) for layer in self.layers]
        for position, name in self.pairs:
            effective[position][name] = self.rounding(self.merged(position, name))
        traces: list[LayerTrace] = []
        for weights in effective:
            hidden, trace = forward_layer(self.shape, weights, hidden)
            traces.append(trace)
        rows = np.concatenate([np.full(len(each.positions), row) for row, each in enumerate(examples)])
        columns = np.concatenate([each.positions for each in examples])
        targets = np.concatenate([each.targets for each in examples])
        loss, at_head = head_loss(
            hidden[rows, columns], targets, self.norm, self.embedding, self.shape.epsilon
        )
        upstream = np.zeros_like(hidden)
        upstream[rows, columns] = at_head
        gradients = {}
        for position in reversed(range(len(effective))):
            upstream, taps = backward_layer(self.shape, effective[position], traces[position], upstream)
            for name, (inputs, at_outputs) in taps.items():
                if (position, name) in self.pairs:
                    gradients[position, name] = self.pairs[position, name].gradients(inputs, at_outputs)
        return loss, gradients


def train(
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    steps: int,
    batch: int,
    rate: float,
    weight_decay: float,
    rng: np.random.Generator,
    progress: Callable[[int, float], None],
) -> float:
    """AdamW (Loshchilov and Hutter, 2019) with a short warm-up and a cosine to zero.

    Args:
        adapter: Changed in place.
        examples: What to learn; each is seen once before any is seen again.
        steps: How many batches.
        batch: Examples per step.
        rate: The highest step size.
        weight_decay: Decoupled, per step and relative to the rate.
        rng: Decides the order of the examples.
        progress: Told step number and batch loss after every step.

    Returns:
        The mean loss of the last round over the examples.
    """
    moments = {
        key: [(np.zeros_like(part), np.zeros_like(part)) for part in (pair.down, pair.up)]
        for key, pair in adapter.pairs.items()
    }
    order: list[int] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        if len(order) < batch:
            order += rng.permutation(len(examples)).tolist()
        chosen, order = order[:batch], order[batch:]
        loss, gradients = adapter.loss_and_gradients([examples[each] for each in chosen])
        losses.append(loss)
        progress(step, loss)
        warm = min(1.0, step / max(1.0, _WARM_UP_SHARE * steps))
        rate_now = rate * warm * 0.5 * (1.0 + np.cos(np.pi * (step - 1) / steps))
        for key, both in gradients.items():
            pair = adapter.pairs[key]
            for parameter, gradient, kept in zip((pair.down, pair.up), both, moments[key], strict=True):
                _adamw(parameter, gradient, kept, step=step, rate=rate_now, weight_decay=weight_decay)
    last_round = max(1, len(examples) // batch)
    return float(np.mean(losses[-last_round:])) if losses else float("nan")


def rounded_to_q4_1(matrix: Array) -> Array:
    """What is left of a float32 matrix after llama.cpp's Q4_1 quantizer (`quantize_row_q4_1_ref`).

    Blocks of 32 weights in a row of memory; each keeps a scale and a minimum as float16 and 4 bits per weight.
    """
    blocks = matrix.reshape(-1, BLOCK_WEIGHTS)
    low = blocks.min(axis=1, keepdims=True)
    step = (blocks.max(axis=1, keepdims=True) - low) / np.float32(_LEVELS_MAX)
    inverse = np.divide(np.float32(1.0), step, out=np.zeros_like(step), where=step != 0)
    levels = np.subtract(blocks, low)
    levels *= inverse
    levels += np.float32(0.5)
    np.trunc(levels, out=levels)
    np.minimum(levels, np.float32(_LEVELS_MAX), out=levels)
    levels *= step.astype(np.float16).astype(np.float32)
    levels += low.astype(np.float16).astype(np.float32)
    return np.asarray(levels.reshape(matrix.shape))


def _padded(examples: Sequence[Example]) -> Array:
    """A batch of one length; attention is causal, so what stands after a sequence never reaches it."""
    longest = max(len(each.hidden) for each in examples)
    first = examples[0].hidden
    batch = np.zeros((len(examples), longest, first.shape[1]), first.dtype)
    for row, each in enumerate(examples):
        batch[row, : len(each.hidden)] = each.hidden
    return batch


def _adamw(
    parameter: Array,
    gradient: Array,
    moments: tuple[Array, Array],
    *,
    step: int,
    rate: float,
    weight_decay: float,
) -> None:
    first, second = moments
    np.add(first * _FIRST_MOMENT_DECAY, gradient * (1.0 - _FIRST_MOMENT_DECAY), out=first)
    np.add(second * _SECOND_MOMENT_DECAY, gradient**2 * (1.0 - _SECOND_MOMENT_DECAY), out=second)
    unbiased_first = first / (1.0 - _FIRST_MOMENT_DECAY**step)
    unbiased_second = second / (1.0 - _SECOND_MOMENT_DECAY**step)
    change = unbiased_first / (np.sqrt(unbiased_second) + _EPSILON) + weight_decay * parameter
    np.subtract(parameter, rate * change, out=parameter)
