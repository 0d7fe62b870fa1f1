"""The BERT encoder in PyTorch, as MiniLM needs it. No files.

Modules are named as in the published weights, so that these load as they are. Sources: Devlin et al. (2018); Wang et
al. (2020) for MiniLM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Size:
    """MiniLM-L6's numbers, as its configuration has them."""

    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    inner: int = 1536
    positions: int = 512
    kinds: int = 2
    epsilon: float = 1e-12


class Layer(nn.Module):  # type: ignore[misc]  # torch is not in the environment that types are checked in
    """One transformer block: attention, then the feed-forward part, each followed by a normalization."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict(
                    {name: nn.Linear(size.width, size.width) for name in ("query", "key", "value")}
                ),
                "output": _dense_and_norm(size.width, size),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size.width, size.inner)})
        self.output = _dense_and_norm(size.inner, size)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Hidden states of shape (sequences, tokens, width); `bias` is added to the attention scores."""
        parts = self.attention["self"]
        query, key, value = (self._split(parts[name](hidden)) for name in ("query", "key", "value"))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = _projected(self.attention["output"], mixed, hidden)
        inner = functional.gelu(self.intermediate["dense"](hidden))
        return _projected(self.output, inner, hidden)

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Bert(nn.Module):  # type: ignore[misc]  # likewise
    """The encoder: token numbers and their mask in, hidden states out."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(size.vocabulary, size.width),
                "position_embeddings": nn.Embedding(size.positions, size.width),
                "token_type_embeddings": nn.Embedding(size.kinds, size.width),
                "LayerNorm": nn.LayerNorm(size.width, size.epsilon),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(size) for _ in range(size.layers))})

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token numbers and a mask of ones and zeros, both of shape (sequences, tokens)."""
        positions = torch.arange(tokens.shape[1])
        hidden = self.embeddings["word_embeddings"](tokens)
        hidden = hidden + self.embeddings["position_embeddings"](positions)
        hidden = hidden + self.embeddings["token_type_embeddings"](torch.zeros_like(tokens))
        hidden = self.embeddings["LayerNorm"](hidden)
        bias = (1 - mask[:, None, None].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, bias)
        return hidden


def _dense_and_norm(inputs: int, size: Size) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"dense": nn.Linear(inputs, size.width), "LayerNorm": nn.LayerNorm(size.width, size.epsilon)}
    )


def _projected(part: nn.ModuleDict, values: Tensor, residual: Tensor) -> Tensor:
    return part["LayerNorm"](part["dense"](values) + residual)
