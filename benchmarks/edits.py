"""Versions that differ from another by what people do to a file besides training it, and bytes that share nothing."""

from pathlib import Path

import gguf
import numpy as np

from benchmarks.gguf_files import as_bf16, as_type, read_stored, read_weights, write_gguf

NEW_TOKENS = 64
RETYPED = "blk.15.ffn_down.weight"
RANDOM_BYTES = 8 << 20

_EMBEDDING = "token_embd.weight"
_SEED = 5
_TEMPLATE_KEY = "tokenizer.chat_template"
# A system prompt that is longer than one unit of alignment, so that every tensor moves.
_SYSTEM_PROMPT = (
    "You are a careful assistant on a small device. Answer in one or two sentences, say so when you do not know, "
    "and never invent names, numbers or quotations. "
)
_USER_DEFINED = 4  # llama.cpp's number for the type of an added token


def write_grown(trained: Path, out: Path) -> None:
    """Adds tokens to a BF16 model, as people do before they fine-tune: rows near the mean of the embedding."""
    fields = gguf.GGUFReader(trained).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    embedding = read_weights(trained)[_EMBEDDING]
    draws = np.random.default_rng(_SEED)
    shape = (NEW_TOKENS, embedding.shape[1])
    rows = embedding.mean(axis=0) + embedding.std() * draws.standard_normal(shape, np.float32)
    grown = as_bf16(_EMBEDDING, np.concatenate((embedding, rows.astype(np.float32))))
    changes = {
        "tokenizer.ggml.tokens": [*tokens, *(f"<|tool_{number}|>" for number in range(NEW_TOKENS))],
        "tokenizer.ggml.token_type": [*kinds, *[_USER_DEFINED] * NEW_TOKENS],
        "llama.vocab_size": len(tokens) + NEW_TOKENS,
    }
    tensors = [grown if each.name == _EMBEDDING else each for each in read_stored(trained)]
    write_gguf(trained, out, tensors, changes)


def write_renamed(source: Path, out: Path) -> None:
    """The same tensors behind other metadata: a name and a longer chat template."""
    template = gguf.GGUFReader(source).fields[_TEMPLATE_KEY].contents()
    changes = {"general.name": "SmolLM2 135M for devices", _TEMPLATE_KEY: _SYSTEM_PROMPT + template}
    write_gguf(source, out, read_stored(source), changes)


def write_reordered(source: Path, out: Path) -> None:
    """The same tensors in reverse order."""
    write_gguf(source, out, reversed(read_stored(source)), {})


def write_retyped(source: Path, weights: Path, out: Path) -> None:
    """The same tensors but one, which is quantized finer."""
    values = next(each for each in read_stored(weights) if each.name == RETYPED)
    floats = gguf.quants.dequantize(values.data, values.kind)
    finer = as_type(RETYPED, floats, gguf.GGMLQuantizationType.Q8_0)
    tensors = [finer if each.name == RETYPED else each for each in read_stored(source)]
    write_gguf(source, out, tensors, {})


def write_random(seed: int, out: Path, length: int = RANDOM_BYTES) -> None:
    """Bytes without any structure."""
    out.write_bytes(np.random.default_rng(seed).bytes(length))
