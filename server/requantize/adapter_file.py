"""Writes low-rank adapters as GGUF files that llama.cpp loads: what stands in them, and in how many bits.

Keys and names as llama.cpp's `convert_lora_to_gguf.py` has them; see `server/releases/adapter_files.py`, which reads them.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from protocol.errors import ModelFileError
from protocol.tensors.gguf import MAGIC
from server.adapters.blobs import write_file
from server.diagnosis.weights import Floats
from server.releases.adapter_files import (
    ALPHA_KEY,
    ARCHITECTURE_KEY,
    DOWN,
    KIND_KEY,
    TYPE_KEY,
    UP,
    read_factors,
)
from server.requantize.model import ModelFile, opened_gguf

_VERSION: Final = 3
_ALIGNMENT: Final = 32
_FLOAT, _STRING = 6, 8  # types of values in metadata
_F16, _Q8_0 = 1, 8  # ggml types
_BLOCK: Final = 32  # weights of a block of Q8_0, which share a scale
_F16_MAX: Final = 65_504.0

Parts = dict[str, Floats]
"""Factors by tensor name."""


def read_parts(path: Path) -> Parts:
    """All factors of an adapter, as floats.

    Raises:
        RequestError: There is no such file.
        ModelFileError: It is damaged, or no low-rank adapter.
    """
    with opened_gguf(path) as file:
        names = [each.name + end for each in read_factors(path, file.gguf) for end in (DOWN, UP)]
        return {name: file.values(name).reshape(file.region(name).dims) for name in names}


def write_packed(out: Path, architecture: str, alpha: float, parts: Mapping[str, Floats]) -> None:
    """Write an adapter in few bits: Q8_0 where rows are whole blocks, else F16.

    Args:
        out: Appears under its name when it is whole.
        architecture: Of the model.
        alpha: B A is multiplied with this, and divided by the rank.
        parts: In the order in which they shall stand.

    Raises:
        ModelFileError: A number of them is none, or too large.
        StorageError: The file cannot be written.
    """
    pairs: dict[str, str | float] = {
        TYPE_KEY: "adapter",
        ARCHITECTURE_KEY: architecture,
        KIND_KEY: "lora",
        ALPHA_KEY: alpha,
    }
    header = [
        struct.pack("<4sIQQ", MAGIC, _VERSION, len(parts), len(pairs)),
        *map(_pair, pairs, pairs.values()),
    ]
    data: list[bytes] = []
    offset = 0
    for name, values in parts.items():
        if not np.isfinite(values).all() or np.abs(values).max(initial=0) > _F16_MAX:
            raise ModelFileError(f"{out}: {name} has numbers that 16 bits cannot hold")
        is_blocks = values.shape[-1] % _BLOCK == 0
        stored = q8_0(values) if is_blocks else values.astype("<f2").tobytes()
        dims = struct.pack(f"<I{values.ndim}Q", values.ndim, *reversed(values.shape))
        header.append(_string(name) + dims + struct.pack("<IQ", _Q8_0 if is_blocks else _F16, offset))
        data.append(_aligned(stored))
        offset += len(data[-1])
    write_file(out, _aligned(b"".join(header)) + b"".join(data))


def pack(source: Path, out: Path) -> None:
    """Write an adapter anew in few bits, without what else its metadata say.

    Raises:
        ModelFileError: It is damaged, or no low-rank adapter.
        StorageError: The file cannot be written.
    """
    with opened_gguf(source) as file:
        alpha, architecture = file.gguf.metadata.get(ALPHA_KEY), file.gguf.metadata.get(ARCHITECTURE_KEY)
    parts = read_parts(source)
    assert isinstance(alpha, float)  # `read_factors` has looked
    write_packed(out, str(architecture), alpha, parts)


def q8_0(values: Floats) -> bytes:
    """Weights in ggml's Q8_0: blocks of 32 with a scale, as `quantize_row_q8_0_ref` of ggml-quants.c."""
    blocks = values.astype(np.float32).reshape(-1, _BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.rint(blocks * inverse[:, None]).astype(np.int8)
    stored = np.empty((len(blocks), 2 + _BLOCK), np.uint8)
    stored[:, :2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    stored[:, 2:] = codes.view(np.uint8)
    return stored.tobytes()


def architecture_of(model: ModelFile) -> str:
    """Of a model.

    Raises:
        ModelFileError: It does not say.
    """
    found = model.gguf.metadata.get(ARCHITECTURE_KEY)
    if not isinstance(found, str):
        raise ModelFileError(f"{model.path}: metadata has no text {ARCHITECTURE_KEY}")
    return found


def _pair(key: str, value: str | float) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    return _string(key) + struct.pack("<If", _FLOAT, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
