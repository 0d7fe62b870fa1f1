"""GGUF files in and out, tensor by tensor: the same model with other metadata, another order, other types."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from server.requantize.transformer import Array

_TYPES = gguf.GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it stands in a file: its name, its bytes in rows, its type."""

    name: str
    data: Array
    kind: Any


def read_stored(path: Path) -> list[Stored]:
    """All tensors of a file, in its order; mapped, not read."""
    return [Stored(each.name, each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors]


def read_weights(path: Path) -> dict[str, Array]:
    """All weights of a file as float32, by name."""
    return {
        each.name: np.asarray(gguf.quants.dequantize(each.data, each.kind), np.float32)
        for each in read_stored(path)
    }


def as_bf16(name: str, values: Array) -> Stored:
    """Weights for a file: matrices as BF16, vectors as F32, as llama.cpp wants. They are bfloat16 values already."""
    values = np.ascontiguousarray(values, np.float32)
    if values.ndim == 1:
        return Stored(name, values, _TYPES.F32)
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    return Stored(name, words.view(np.uint8).reshape(len(values), -1), _TYPES.BF16)


def as_type(name: str, values: Array, kind: Any) -> Stored:
    """Weights quantized by the reference implementation of a simple type."""
    return Stored(name, gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind), kind)


def write_gguf(template: Path, out: Path, tensors: Iterable[Stored], changes: Mapping[str, Any]) -> None:
    """Writes tensors behind the metadata of a template; all of them are held until the header is complete.

    Args:
        template: Whose metadata is taken, key by key in its order.
        out: Replaced when it exists.
        tensors: In the order in which they shall stand.
        changes: Values for keys of the template that shall differ.
    """
    writer = start_gguf(template, out, changes)
    for tensor in tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start_gguf(template: Path, out: Path, changes: Mapping[str, Any]) -> gguf.GGUFWriter:
    """A writer that has the metadata of a template, with some values changed, and no tensors yet."""
    reader = gguf.GGUFReader(template)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue  # the header's own fields, and what the writer has put there itself
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = changes[key] if key in changes else field.contents()
        writer.add_key_value(key, value, field.types[0], sub_type=element)
    return writer
