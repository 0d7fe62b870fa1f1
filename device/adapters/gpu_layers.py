"""How many layers of a GGUF model fit into an accelerator's memory: llama.cpp has no limit of its own, it takes a count of layers.

It counts from the end: the output first, then the block before it, and so on to the first. What a layer takes there is its
weights, its keys and values for each token of the context, and for the output a row of numbers for each token of a batch.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Final

from protocol.tensors.gguf import GgufFile, parse_gguf

_BLOCK: Final = re.compile(r"blk\.(\d+)\.")
_EMBEDDING: Final = "token_embd.weight"
_OUTPUT: Final = "output.weight"
_CACHE_BYTES: Final = 2  # llama.cpp keeps keys and values as 16-bit floats
_ROW_BYTES: Final = 4  # and logits and states as 32-bit ones


class _File:
    """Random access to an open file: `ReadAt`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.length = file.seek(0, 2)

    def read_at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)


def layer_costs(path: Path, context_tokens: int, adapter: Path | None = None) -> list[int]:
    """Bytes that each layer takes on an accelerator, in the order in which llama.cpp puts them there: the output first.

    Args:
        path: The model.
        context_tokens: Tokens of the context, and of a batch.
        adapter: What is added to its weights, each part where these are.

    Raises:
        ModelFileError: One of them is no well-formed GGUF file.
        OSError: One cannot be read.
    """
    model = _parsed(path)
    blocks: dict[int, int] = {}
    output = embedding = 0
    for tensor in model.tensors:
        if found := _BLOCK.match(tensor.name):
            number = int(found[1])
            blocks[number] = blocks.get(number, 0) + tensor.length
        elif tensor.name == _EMBEDDING:
            embedding = tensor.length  # stays in the machine's memory: a row is looked up for each token
        else:
            output += tensor.length
    if not any(tensor.name == _OUTPUT for tensor in model.tensors):
        output += embedding  # the output is the embedding then, and a copy of it goes there
    for tensor in _parsed(adapter).tensors if adapter is not None else ():
        if (found := _BLOCK.match(tensor.name)) and int(found[1]) in blocks:
            blocks[int(found[1])] += tensor.length
        else:
            output += tensor.length
    cache = context_tokens * _cache_bytes(model)
    logits = context_tokens * _ROW_BYTES * _vocabulary(model)
    return [output + logits, *(blocks[number] + cache for number in sorted(blocks, reverse=True))]


def _parsed(path: Path) -> GgufFile:
    with path.open("rb") as file:
        return parse_gguf(_File(file))


def layers_that_fit(costs: Sequence[int], bytes_max: int) -> int:
    """The largest count of layers, from the first of `costs` on, that takes no more than `bytes_max`."""
    return sum(total <= bytes_max for total in accumulate(costs))


def _vocabulary(model: GgufFile) -> int:
    """Entries of the vocabulary: the rows of the embedding."""
    dims = next((tensor.dims for tensor in model.tensors if tensor.name == _EMBEDDING), ())
    return dims[0] if dims else 0


def _cache_bytes(model: GgufFile) -> int:
    """Keys and values of one token in one block."""
    architecture = model.metadata.get("general.architecture", "")

    def number(keys: Iterable[str]) -> int:
        found = (model.metadata.get(f"{architecture}.{key}") for key in keys)
        return next((value for value in found if isinstance(value, int)), 0)

    heads = number(["attention.head_count"])
    width = number(["embedding_length"]) // heads if heads else 0
    # Where the count differs from block to block it is an array, and as many as there are heads is the most it can be.
    groups = number(["attention.head_count_kv", "attention.head_count"])
    key = number(["attention.key_length"]) or width
    value = number(["attention.value_length"]) or width
    return groups * (key + value) * _CACHE_BYTES
