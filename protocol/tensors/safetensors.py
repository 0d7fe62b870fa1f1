"""safetensors: from bytes to tensor regions.

Format: huggingface/safetensors README. A u64 header length, a JSON header, then the tensors, without holes.
"""

import json
import math
from typing import Any

from protocol.errors import ModelFileError
from protocol.tensors.cursor import Cursor
from protocol.tensors.regions import Layout, ReadAt, Region, cover

# Limits of this implementation; the format itself allows a header of 100 MB.
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 262_144
MAX_DIMENSIONS = 16

_DTYPES: dict[str, tuple[int, Layout]] = {
    "F64": (8, Layout.F64),
    "F32": (4, Layout.F32),
    "F16": (2, Layout.F16),
    "BF16": (2, Layout.BF16),
    "F8_E4M3": (1, Layout.F8),
    "F8_E5M2": (1, Layout.F8),
    "I64": (8, Layout.I64),
    "U64": (8, Layout.I64),
    "I32": (4, Layout.I32),
    "U32": (4, Layout.I32),
    "I16": (2, Layout.I16),
    "U16": (2, Layout.I16),
    "I8": (1, Layout.I8),
    "U8": (1, Layout.U8),
    "BOOL": (1, Layout.U8),
}


def looks_like_safetensors(start: bytes, file_length: int) -> bool:
    """Tell by the first nine bytes: a plausible header length and an opening brace."""
    header_length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and 2 <= header_length <= min(MAX_HEADER_BYTES, file_length - 8)


def parse_safetensors(source: ReadAt) -> tuple[Region, ...]:
    """Map a safetensors file.

    Raises:
        ModelFileError: The header is damaged, or offsets do not cover the data exactly.
    """
    cursor = Cursor(source, "safetensors")
    header_length = cursor.unsigned(8, "header length")
    if header_length > MAX_HEADER_BYTES:
        raise ModelFileError(f"safetensors: header length {header_length} is more than {MAX_HEADER_BYTES}")
    header = _parse_json(cursor.read(header_length, "header"))
    if len(header) > MAX_TENSORS:
        raise ModelFileError(f"safetensors: {len(header)} tensors, at most {MAX_TENSORS} are accepted")
    data_start = cursor.position
    tensors = [_tensor(name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda region: (region.offset, region.length))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise ModelFileError(
                f"safetensors: tensor {tensor.name!r} does not start where the one before ends"
            )
        position = tensor.end
    if position != source.length:
        raise ModelFileError(f"safetensors: the tensors end at {position}, the file at {source.length}")
    return cover(tensors, source.length)


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError("safetensors: the header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelFileError("safetensors: the header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ModelFileError("safetensors: a name occurs twice in the header")
    return result


def _tensor(name: str, entry: Any, data_start: int) -> Region:
    if not isinstance(entry, dict):
        raise ModelFileError(f"safetensors: tensor {name!r} is not described by an object")
    dtype = entry.get("dtype")
    shape = _sizes(entry.get("shape"), MAX_DIMENSIONS)
    offsets = _sizes(entry.get("data_offsets"), 2)
    if shape is None or offsets is None or len(offsets) != 2:
        raise ModelFileError(f"safetensors: tensor {name!r} has a wrong shape or wrong offsets")
    start, end = offsets
    if start > end:
        raise ModelFileError(f"safetensors: tensor {name!r} ends before it starts")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        # Newer data types (FP4, FP6) are carried as they are.
        return Region(name, Layout.RAW, data_start + start, end - start, shape)
    width, layout = _DTYPES[dtype]
    if end - start != math.prod(shape) * width:
        raise ModelFileError(
            f"safetensors: tensor {name!r} has {end - start} bytes, its shape needs another number"
        )
    row_bytes = shape[-1] * width if shape else width
    return Region(name, layout, data_start + start, end - start, shape, row_bytes)


def _sizes(value: Any, limit: int) -> tuple[int, ...] | None:
    """Return a JSON array of at most `limit` sizes as a tuple, None for anything else."""
    if not isinstance(value, list) or len(value) > limit:
        return None
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)
