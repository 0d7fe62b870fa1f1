"""The Llama architecture in PyTorch, for training: a dictionary of GGUF tensors in, logits out. No files.

Weights are named and shaped as in a GGUF file: each matrix is (outputs, inputs), and `attn_q` and `attn_k` are permuted
so that rotary embedding turns neighbouring pairs (0, 1), (2, 3), ... as llama.cpp does. So what was trained goes back
into a file as it is. Sources: Touvron et al. (2023); Su et al. (2021) for rotary embedding; Ainslie et al. (2023) for
grouped queries; Shazeer (2020) for SwiGLU; Hu et al. (2021) for low-rank adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from examples.smollm2.model_file import tensor_name
from server.requantize.transformer import Shape

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank update of one matrix, `up @ down * scale`.

    Attributes:
        down: Shape (rank, inputs).
        up: Shape (outputs, rank).
        scale: What the product is multiplied by.
    """

    down: Tensor
    up: Tensor
    scale: float

    def update(self) -> Tensor:
        """The change of the matrix when the adapter is merged into it."""
        return self.up @ self.down * self.scale


@dataclass(frozen=True, slots=True)
class Llama:
    """A model whose output matrix is tied to its token embedding.

    Attributes:
        shape: Numbers of layers and heads, and constants.
        weights: By GGUF name.
        adapters: By the GGUF name of the matrix that each changes.
        lookup_trains: Whether gradients reach the embedding through the input lookup too, or through the head only.
    """

    shape: Shape
    weights: Mapping[str, Tensor]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    lookup_trains: bool = True

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of shape (sequences, tokens, vocabulary) for token numbers of shape (sequences, tokens)."""
        embedding = self.weights[EMBEDDING]
        hidden = functional.embedding(tokens, embedding if self.lookup_trains else embedding.detach())
        cosine, sine = self._rotation(tokens.shape[1])
        for layer in range(self.shape.layers):
            hidden = hidden + self._attention(layer, self._norm(layer, "attn_norm", hidden), cosine, sine)
            hidden = hidden + self._feed_forward(layer, self._norm(layer, "ffn_norm", hidden))
        width = (hidden.shape[-1],)
        hidden = functional.rms_norm(hidden, width, self.weights[OUTPUT_NORM], self.shape.epsilon)
        return functional.linear(hidden, embedding)

    def _norm(self, layer: int, name: str, hidden: Tensor) -> Tensor:
        weight = self.weights[tensor_name(layer, name)]
        return functional.rms_norm(hidden, (hidden.shape[-1],), weight, self.shape.epsilon)

    def _linear(self, layer: int, name: str, inputs: Tensor) -> Tensor:
        full_name = tensor_name(layer, name)
        outputs = functional.linear(inputs, self.weights[full_name])
        adapter = self.adapters.get(full_name)
        if adapter is None:
            return outputs
        low = functional.linear(inputs, adapter.down)
        return outputs + functional.linear(low, adapter.up) * adapter.scale

    def _attention(self, layer: int, inputs: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        query = _rotated(_split(self._linear(layer, "attn_q", inputs), self.shape.heads), cosine, sine)
        key = _rotated(_split(self._linear(layer, "attn_k", inputs), self.shape.kv_heads), cosine, sine)
        value = _split(self._linear(layer, "attn_v", inputs), self.shape.kv_heads)
        group = self.shape.heads // self.shape.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value.to(query.dtype), is_causal=True)
        return self._linear(layer, "attn_output", mixed.transpose(1, 2).reshape(inputs.shape))

    def _feed_forward(self, layer: int, inputs: Tensor) -> Tensor:
        gate = functional.silu(self._linear(layer, "ffn_gate", inputs))
        return self._linear(layer, "ffn_down", gate * self._linear(layer, "ffn_up", inputs))

    def _rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        size = self.weights[tensor_name(0, "attn_q")].shape[0] // self.shape.heads
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] * self.shape.rope_base**-exponents
        return angles.cos().float(), angles.sin().float()


def _split(values: Tensor, heads: int) -> Tensor:
    sequences, tokens, width = values.shape
    return values.reshape(sequences, tokens, heads, width // heads).transpose(1, 2)


def _rotated(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = values[..., 0::2], values[..., 1::2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(values.dtype)
