"""What a model takes while it runs, by formula: weights, keys and values, logits, runtime. Pure.

The terms are those of llama.cpp as the agent calls it; docs/tiers.md compares them with what was measured.
"""

from typing import Final

from msgspec import Struct

from protocol.tensors.gguf import GgufFile

LLAMA_BYTES: Final = 80 << 20
"""Python, llama.cpp and its work space, without what grows with context, vocabulary or weights: measured with a small model."""

ONNX_BYTES: Final = 80 << 20
"""Python, onnxruntime, the graph of a model with some hundred operators and their results."""

ONNX_WEIGHTS: Final = 1.5
"""Of the length of the files: weights, and while it loads those that it has not packed yet. Measured is up to 1.5."""

BATCH_TOKENS: Final = 512
"""llama.cpp evaluates as many tokens at a time, and keeps logits for a batch."""

_CACHE_BYTES: Final = 2  # llama.cpp keeps keys and values as 16-bit floats
_LOGIT_BYTES: Final = 4
_LOGIT_COPIES: Final = 2  # of a batch: in the graph, and as its output
_EMBEDDING: Final = "token_embd.weight"


class ModelNeeds(Struct, frozen=True, kw_only=True):
    """What a model takes, apart from how long its context is.

    Attributes:
        weights_bytes: Length of its files, which are mapped.
        parameters: Weights that it has; 0 if unknown.
        cache_token_bytes: Keys and values of one token.
        logits_token_bytes: Logits of one token.
        fixed_bytes: Runtime, and what does not grow.
    """

    weights_bytes: int
    parameters: int = 0
    cache_token_bytes: int = 0
    logits_token_bytes: int = 0
    fixed_bytes: int = 0

    def memory_bytes(self, context_tokens: int) -> int:
        """Peak of a process that runs the model with a full context."""
        return self.weights_bytes + self.fixed_bytes + self.context_bytes(context_tokens)

    def context_bytes(self, context_tokens: int) -> int:
        """What grows with the context: keys and values, the logits of all tokens, and those of a batch."""
        rows = context_tokens + _LOGIT_COPIES * min(context_tokens, BATCH_TOKENS)
        return context_tokens * self.cache_token_bytes + rows * self.logits_token_bytes


def llama_needs(model: GgufFile, weights_bytes: int) -> ModelNeeds:
    """Needs of a text model.

    Args:
        model: Its first file.
        weights_bytes: Length of all its files.
    """
    vocabulary = next((tensor.dims[0] for tensor in model.tensors if tensor.name == _EMBEDDING), 0)
    return ModelNeeds(
        weights_bytes=weights_bytes,
        parameters=_parameters(model),
        cache_token_bytes=_cache_token_bytes(model),
        logits_token_bytes=_LOGIT_BYTES * vocabulary,
        fixed_bytes=LLAMA_BYTES,
    )


def onnx_needs(weights_bytes: int) -> ModelNeeds:
    """Needs of an ONNX model."""
    return ModelNeeds(
        weights_bytes=weights_bytes, fixed_bytes=ONNX_BYTES + int((ONNX_WEIGHTS - 1) * weights_bytes)
    )


def _parameters(model: GgufFile) -> int:
    total = 0
    for tensor in model.tensors:
        count = 1
        for size in tensor.dims:
            count *= size
        total += count
    return total


def _cache_token_bytes(model: GgufFile) -> int:
    architecture = model.metadata.get("general.architecture", "")

    def number(*keys: str) -> int:
        found = (model.metadata.get(f"{architecture}.{key}") for key in keys)
        return next((value for value in found if isinstance(value, int)), 0)

    heads = number("attention.head_count")
    width = number("embedding_length") // heads if heads else 0
    # Where the count differs from block to block it is an array, and as many as there are heads is the most it can be.
    groups = number("attention.head_count_kv", "attention.head_count")
    key = number("attention.key_length") or width
    value = number("attention.value_length") or width
    return number("block_count") * groups * (key + value) * _CACHE_BYTES
