"""safetensors: from bytes to tensor regions.

Format: huggingface/safetensors README. A u64 header length, a JSON header, then the tensors, without holes.
"""

import json
import math
from typing import Any

from protocol.errors import ModelFileError
from protocol.tensors.cursor import Cursor
from protocol.tensors.packing import with_packing
from protocol.tensors.regions import Layout, ReadAt, Region, cover, row_elements

# Limits of this implementation; the format itself allows a header of 100 MB. A file of 5 GB has some 1,000 tensors and
# 100 KB of header.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 16
MAX_NAME_BYTES = 4096
# Objects, arrays and values: what bounds the memory of a parsed header. A name, a type, a shape and two offsets for each
# tensor, and text about the file.
_MAX_CONTAINERS = 3 * MAX_TENSORS + 1_000
_MAX_VALUES = 12 * MAX_TENSORS

# data type: (bits of an element, layout)
_DTYPES: dict[str, tuple[int, Layout]] = {
    "F64": (64, Layout.F64),
    "F32": (32, Layout.F32),
    "C64": (64, Layout.F32),
    "F16": (16, Layout.F16),
    "BF16": (16, Layout.BF16),
    "F8_E4M3": (8, Layout.F8),
    "F8_E5M2": (8, Layout.F8),
    "F8_E4M3FNUZ": (8, Layout.F8),
    "F8_E5M2FNUZ": (8, Layout.F8),
    "F8_E8M0": (8, Layout.U8),
    "F4": (4, Layout.PACKED4),
    "I64": (64, Layout.I64),
    "U64": (64, Layout.I64),
    "I32": (32, Layout.I32),
    "U32": (32, Layout.I32),
    "I16": (16, Layout.I16),
    "U16": (16, Layout.I16),
    "I8": (8, Layout.I8),
    "U8": (8, Layout.U8),
    "BOOL": (8, Layout.U8),
}


def looks_like_safetensors(start: bytes, file_length: int) -> bool:
    """Tell by the first nine bytes: a plausible header length and an opening brace."""
    header_length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and 2 <= header_length <= min(MAX_HEADER_BYTES, file_length - 8)


def parse_safetensors(source: ReadAt) -> tuple[Region, ...]:
    """Map a safetensors file.

    Raises:
        ModelFileError: The header is damaged or beyond the limits above, or offsets do not cover the data exactly.
    """
    cursor = Cursor(source, "safetensors")
    header_length = cursor.unsigned(8, "header length")
    if header_length > MAX_HEADER_BYTES:
        raise ModelFileError(f"safetensors: header length {header_length} is more than {MAX_HEADER_BYTES}")
    text = cursor.read(header_length, "header")
    if not text.startswith(b"{"):  # README: no file that is something else at the same time
        raise ModelFileError("safetensors: the header does not start with '{'")
    header = _parse_json(text)
    _check_metadata(header.get("__metadata__", {}))
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
    return cover(with_packing(tensors), source.length)


def _parse_json(text: bytes) -> dict[str, Any]:
    # Counted in the text, where a string may hold such characters too: real headers stay far below.
    containers = text.count(b"{") + text.count(b"[")
    if containers > _MAX_CONTAINERS or text.count(b",") > _MAX_VALUES:
        raise ModelFileError("safetensors: the header has more entries than are accepted")
    try:
        # Decoded here: Python would take UTF-16 as well, which no other reader does.
        header: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError("safetensors: the header is not JSON") from error
    return header


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError("safetensors: __metadata__ is not a map from text to text")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ModelFileError("safetensors: a name occurs twice in the header")
    return result


def _tensor(name: str, entry: Any, data_start: int) -> Region:
    _check_name(name)
    if not isinstance(entry, dict):
        raise ModelFileError(f"safetensors: tensor {name!r} is not described by an object")
    dtype = entry.get("dtype")
    dims = _sizes(entry.get("shape"), MAX_DIMENSIONS)
    offsets = _sizes(entry.get("data_offsets"), 2)
    if dims is None or offsets is None or len(offsets) != 2:
        raise ModelFileError(f"safetensors: tensor {name!r} has a wrong shape or wrong offsets")
    start, end = offsets
    if start > end:
        raise ModelFileError(f"safetensors: tensor {name!r} ends before it starts")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        # Newer data types (FP6) are carried as they are.
        return Region(name, Layout.RAW, data_start + start, end - start, dims)
    bits, layout = _DTYPES[dtype]
    if 8 * (end - start) != math.prod(dims) * bits:
        raise ModelFileError(
            f"safetensors: tensor {name!r} has {end - start} bytes, its shape needs another number"
        )
    row_bits = row_elements(dims) * bits
    return Region(name, layout, data_start + start, end - start, dims, 0 if row_bits % 8 else row_bits // 8)


def _check_name(name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise ModelFileError("safetensors: a tensor name is not UTF-8") from error
    if length > MAX_NAME_BYTES:
        raise ModelFileError(
            f"safetensors: a tensor name has {length} bytes, at most {MAX_NAME_BYTES} are accepted"
        )


def _sizes(value: Any, limit: int) -> tuple[int, ...] | None:
    """Return a JSON array of at most `limit` sizes as a tuple, None for anything else."""
    if not isinstance(value, list) or len(value) > limit:
        return None
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)
