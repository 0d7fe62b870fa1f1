"""Low-rank adapters for the small language model of `models.py`, and that model with an adapter merged into its weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.gguf_files import Stored, read_stored, read_weights, write_gguf

MATRICES: Final = tuple(
    f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn_q", "attn_v", "ffn_down")
)
RANK: Final = 4
ALPHA: Final = 8.0

Parts = dict[str, npt.NDArray[np.float32]]


def adapter_parts(model: Path, seed: int, *, size: float = 1.0, names: Sequence[str] = MATRICES) -> Parts:
    """Factors of random numbers, by tensor name; `size` is about the share of the weights that they change these by."""
    rng, weights, parts = np.random.default_rng(seed), read_weights(model), {}
    for name in names:
        rows, columns = weights[name].shape
        scale = size * float(weights[name].std()) * np.sqrt(RANK) / ALPHA
        parts[f"{name}.lora_a"] = rng.normal(0, 1, (RANK, columns)).astype(np.float32)
        parts[f"{name}.lora_b"] = rng.normal(0, scale, (rows, RANK)).astype(np.float32)
    return parts


def write_parts(
    path: Path, parts: Mapping[str, npt.NDArray[Any]], *, architecture: str = "llama", **keys: str
) -> Path:
    """A file as llama.cpp's convert_lora_to_gguf.py writes it.

    Args:
        path: Where.
        parts: Tensors by name.
        architecture: Of the model.
        keys: What shall stand in `general.type` and `adapter.type`: `general`, `kind`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", keys.get("general", "adapter"))
    writer.add_string("adapter.type", keys.get("kind", "lora"))
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, values in parts.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_adapter(path: Path, model: Path, seed: int, *, size: float = 1.0) -> Path:
    """Write an adapter of random numbers."""
    return write_parts(path, adapter_parts(model, seed, size=size))


def write_merged(path: Path, model: Path, adapter: Path) -> Path:
    """Write the model with W + alpha / r * B A in place of each W that the adapter changes."""
    parts, tensors = read_weights(adapter), []
    for tensor in read_stored(model):
        down, up = (parts.get(tensor.name + end) for end in (".lora_a", ".lora_b"))
        data = tensor.data
        if down is not None and up is not None:
            data = (data + ALPHA / RANK * up @ down).astype(np.float32)
        tensors.append(Stored(tensor.name, data, tensor.kind))
    write_gguf(model, path, tensors, {})
    return path
