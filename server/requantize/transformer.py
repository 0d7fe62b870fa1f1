"""The Llama architecture in numpy: forward, and backward through its layers. No files.

Weights are named and shaped as in a GGUF file, without `.weight`: each matrix is (outputs, inputs), biases end with `.bias`.
Of a Llama file `attn_q` and `attn_k` are permuted so that rotary embedding turns neighbouring pairs (0, 1), (2, 3), ... as
llama.cpp does; other architectures turn the halves of a head against each other. Sources: Touvron et al. (2023);
Su et al. (2021) for rotary embedding; Ainslie et al. (2023) for grouped queries; Shazeer (2020) for SwiGLU.

The element type of the weights decides the arithmetic: float32 to train, float64 to check gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a Llama model's metadata says of its size.

    Attributes:
        layers: Number of transformer blocks.
        heads: Query heads; the model's width is a multiple.
        kv_heads: Key and value heads; each serves `heads / kv_heads` query heads.
        epsilon: Added to the mean square in RMS normalization.
        rope_base: Base of the rotary frequencies.
        rope_factors: What the frequencies are divided by, one for each pair (`rope_freqs.weight`); nothing for 1.
        is_rope_halved: Pairs are weight i and i + size / 2 of a head, instead of neighbours.
    """

    layers: int
    heads: int
    kv_heads: int
    epsilon: float
    rope_base: float
    rope_factors: tuple[float, ...] = ()
    is_rope_halved: bool = False


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What one layer's forward pass keeps for its backward pass."""

    attn_unit: Array  # normalized inputs before the norm's weight, and the factor that normalized them
    attn_factor: Array
    attn_in: Array
    query: Array
    key: Array
    value: Array
    attention: Array
    mixed: Array
    ffn_unit: Array
    ffn_factor: Array
    ffn_in: Array
    gate: Array
    up: Array
    ffn_mid: Array


# Per adapted matrix: its inputs and the gradient at its outputs, both flattened to (tokens, features).
Taps = dict[str, tuple[Array, Array]]


def forward_layer(shape: Shape, weights: Weights, hidden: Array) -> tuple[Array, LayerTrace]:
    """One block: hidden states of shape (sequences, tokens, width) in and out, and what backward needs."""
    cosine, sine = _rotation(shape, hidden, weights)
    attn_in, attn_unit, attn_factor = rms_norm(hidden, weights["attn_norm"], shape.epsilon)
    query = _rotated(shape, _split(_projected(attn_in, weights, "attn_q"), shape.heads), cosine, sine)
    key = _rotated(shape, _split(_projected(attn_in, weights, "attn_k"), shape.kv_heads), cosine, sine)
    value = _split(_projected(attn_in, weights, "attn_v"), shape.kv_heads)
    grouped = _grouped(query, shape)
    scores = grouped @ key[:, :, None].swapaxes(-1, -2) / np.sqrt(query.shape[-1]).astype(hidden.dtype)
    tokens = hidden.shape[1]
    scores = np.where(np.tri(tokens, dtype=bool), scores, np.array(-np.inf, hidden.dtype))
    attention = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attention /= attention.sum(axis=-1, keepdims=True)
    mixed = _joined((attention @ value[:, :, None]).reshape(query.shape))
    middle = hidden + _projected(mixed, weights, "attn_output")
    ffn_in, ffn_unit, ffn_factor = rms_norm(middle, weights["ffn_norm"], shape.epsilon)
    gate, up = _projected(ffn_in, weights, "ffn_gate"), _projected(ffn_in, weights, "ffn_up")
    ffn_mid = gate * _sigmoid(gate) * up
    out = middle + _projected(ffn_mid, weights, "ffn_down")
    trace = LayerTrace(
        attn_unit=attn_unit,
        attn_factor=attn_factor,
        attn_in=attn_in,
        query=grouped,
        key=key,
        value=value,
        attention=attention,
        mixed=mixed,
        ffn_unit=ffn_unit,
        ffn_factor=ffn_factor,
        ffn_in=ffn_in,
        gate=gate,
        up=up,
        ffn_mid=ffn_mid,
    )
    return out, trace


def backward_layer(shape: Shape, weights: Weights, trace: LayerTrace, upstream: Array) -> tuple[Array, Taps]:
    """The gradient at the block's input, and the taps of all its matrices, from the gradient at its output."""
    taps: Taps = {"ffn_down": (_flat(trace.ffn_mid), _flat(upstream))}
    at_mid = _linear_back(upstream, weights["ffn_down"])
    sigmoid = _sigmoid(trace.gate)
    at_up = at_mid * trace.gate * sigmoid
    at_gate = at_mid * trace.up * sigmoid * (1 + trace.gate * (1 - sigmoid))
    taps["ffn_up"] = (_flat(trace.ffn_in), _flat(at_up))
    taps["ffn_gate"] = (_flat(trace.ffn_in), _flat(at_gate))
    at_ffn_in = _linear_back(at_up, weights["ffn_up"]) + _linear_back(at_gate, weights["ffn_gate"])
    at_middle = upstream + _rms_norm_back(at_ffn_in, weights["ffn_norm"], trace.ffn_unit, trace.ffn_factor)

    taps["attn_output"] = (_flat(trace.mixed), _flat(at_middle))
    at_mixed = _split(_linear_back(at_middle, weights["attn_output"]), shape.heads)
    at_grouped = _grouped(at_mixed, shape)
    at_attention = at_grouped @ trace.value[:, :, None].swapaxes(-1, -2)
    at_value = (trace.attention.swapaxes(-1, -2) @ at_grouped).sum(axis=2)
    at_scores = trace.attention * (
        at_attention - (at_attention * trace.attention).sum(axis=-1, keepdims=True)
    )
    at_scores /= np.sqrt(trace.query.shape[-1]).astype(upstream.dtype)
    cosine, sine = _rotation(shape, upstream, weights)
    at_query = _rotated(shape, (at_scores @ trace.key[:, :, None]).reshape(at_mixed.shape), cosine, -sine)
    at_key = _rotated(shape, (at_scores.swapaxes(-1, -2) @ trace.query).sum(axis=2), cosine, -sine)
    at_attn_in = np.zeros_like(upstream)
    for name, gradient in (("attn_q", at_query), ("attn_k", at_key), ("attn_v", at_value)):
        joined = _joined(gradient)
        taps[name] = (_flat(trace.attn_in), _flat(joined))
        at_attn_in += _linear_back(joined, weights[name])
    return at_middle + _rms_norm_back(
        at_attn_in, weights["attn_norm"], trace.attn_unit, trace.attn_factor
    ), taps


def rms_norm(inputs: Array, weight: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """Root-mean-square normalization: its result, the result before the weight, and the factor applied."""
    factor = 1.0 / np.sqrt(np.square(inputs).mean(axis=-1, keepdims=True) + np.array(epsilon, inputs.dtype))
    unit = inputs * factor
    return unit * weight, unit, factor


def head_loss(
    hidden: Array, targets: npt.NDArray[np.int64], norm: Array, embedding: Array, epsilon: float
) -> tuple[float, Array]:
    """Mean cross-entropy of the next tokens, and its gradient at the last block's output.

    Args:
        hidden: The last block's output at the positions that predict, shape (n, width).
        targets: The tokens that follow, shape (n,).
        norm: Weight of the final normalization.
        embedding: Token embedding, shape (vocabulary, width); the output matrix is tied to it.
        epsilon: As in `Shape`.
    """
    normed, unit, factor = rms_norm(hidden, norm, epsilon)
    logits = normed @ embedding.T
    logits -= logits.max(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    chosen = logits[rows, targets]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - chosen).mean())
    logits /= total * len(targets)
    logits[rows, targets] -= 1.0 / len(targets)
    return loss, _rms_norm_back(logits @ embedding, norm, unit, factor)


@dataclass(frozen=True, slots=True)
class HeadTrace:
    """What the head says of a run of positions.

    Attributes:
        normed: Its inputs, after the last normalization.
        at_hidden: Gradient at the last block's output, of the loss of labels that were drawn from the model itself.
        variance: p (1 - p) of each token of the vocabulary, summed over the positions: the curvature at its logit.
    """

    normed: Array
    at_hidden: Array
    variance: Array


def sampled_head(
    hidden: Array, draws: Array, norm: Array, head: Array, epsilon: float, rows: int = 64
) -> HeadTrace:
    """The gradient of the cross-entropy with labels that the model itself would choose: its square is the Fisher information.

    Args:
        hidden: The last block's output, shape (n, width).
        draws: One number in [0, 1) for each position, which decides its label.
        norm: Weight of the final normalization.
        head: Output matrix, shape (vocabulary, width).
        epsilon: As in `Shape`.
        rows: Positions whose logits are held at a time.
    """
    normed, unit, factor = rms_norm(hidden, norm, epsilon)
    at_normed = np.empty_like(normed)
    variance = np.zeros(len(head), np.float64)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = normed[part] @ head.T
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        variance += logits.sum(axis=0, dtype=np.float64) - np.square(logits).sum(axis=0, dtype=np.float64)
        below = np.cumsum(logits, axis=1, dtype=np.float64)
        labels = (below < draws[part, None] * below[:, -1:]).sum(axis=1)
        logits[np.arange(len(labels)), labels] -= 1.0
        at_normed[part] = logits @ head
    return HeadTrace(normed, _rms_norm_back(at_normed, norm, unit, factor), variance)


def distilled_head(
    hidden: Array,
    norm: Array,
    head: Array,
    epsilon: float,
    teacher_normed: Array,
    teacher_head: Array,
    rows: int = 64,
) -> tuple[float, Array]:
    """The KL divergence of a model from its teacher, summed over positions, and its gradient at the last block's output.

    Args:
        hidden: The last block's output, shape (n, width).
        norm: Weight of the final normalization.
        head: Output matrix, shape (vocabulary, width).
        epsilon: As in `Shape`.
        teacher_normed: What the teacher's output matrix takes at the same positions.
        teacher_head: That matrix.
        rows: Positions whose logits are held at a time.
    """
    normed, unit, factor = rms_norm(hidden, norm, epsilon)
    at_normed = np.empty_like(normed)
    divergence = 0.0
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        said = _log_softmax(normed[part] @ head.T)
        wanted = _log_softmax(teacher_normed[part] @ teacher_head.T)
        probable = np.exp(wanted)
        divergence += float((probable * (wanted - said)).sum(dtype=np.float64))
        at_normed[part] = (np.exp(said) - probable) @ head
    return divergence, _rms_norm_back(at_normed, norm, unit, factor)


def _log_softmax(logits: Array) -> Array:
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def _rms_norm_back(upstream: Array, weight: Array, unit: Array, factor: Array) -> Array:
    at_unit = upstream * weight
    return np.asarray(factor * (at_unit - unit * (at_unit * unit).mean(axis=-1, keepdims=True)))


def _flat(values: Array) -> Array:
    return np.asarray(values.reshape(-1, values.shape[-1]))


def _projected(inputs: Array, weights: Weights, name: str) -> Array:
    matrix, bias = weights[name], weights.get(f"{name}.bias")
    outputs = (_flat(inputs) @ matrix.T).reshape(*inputs.shape[:-1], matrix.shape[0])
    return outputs if bias is None else outputs + bias


def _linear_back(upstream: Array, matrix: Array) -> Array:
    return (_flat(upstream) @ matrix).reshape(*upstream.shape[:-1], matrix.shape[1])


def _split(values: Array, heads: int) -> Array:
    sequences, tokens, width = values.shape
    return values.reshape(sequences, tokens, heads, width // heads).swapaxes(1, 2)


def _joined(values: Array) -> Array:
    sequences, heads, tokens, size = values.shape
    return values.swapaxes(1, 2).reshape(sequences, tokens, heads * size)


def _grouped(values: Array, shape: Shape) -> Array:
    """Query heads beside the key and value head that serves them: (sequences, kv heads, group, tokens, size)."""
    sequences, _, tokens, size = values.shape
    return values.reshape(sequences, shape.kv_heads, shape.heads // shape.kv_heads, tokens, size)


def _rotation(shape: Shape, hidden: Array, weights: Weights) -> tuple[Array, Array]:
    size = weights["attn_q"].shape[0] // shape.heads
    frequencies = shape.rope_base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if shape.rope_factors:
        frequencies /= np.asarray(shape.rope_factors)
    angles = np.arange(hidden.shape[1])[:, None] * frequencies
    return np.cos(angles).astype(hidden.dtype), np.sin(angles).astype(hidden.dtype)


def _rotated(shape: Shape, values: Array, cosine: Array, sine: Array) -> Array:
    half = values.shape[-1] // 2
    first, second = (
        (slice(None, half), slice(half, None))
        if shape.is_rope_halved
        else (slice(0, None, 2), slice(1, None, 2))
    )
    even, odd = values[..., first], values[..., second]
    out = np.empty_like(values)
    out[..., first] = even * cosine - odd * sine
    out[..., second] = even * sine + odd * cosine
    return out


def _sigmoid(values: Array) -> Array:
    # The tanh form cannot overflow.
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)))
