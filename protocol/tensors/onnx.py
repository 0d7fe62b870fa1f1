"""ONNX: where the initializers' bytes lie, found by walking the protobuf wire format.

Nothing is re-serialised and no protobuf library is used: a delta must give back the very bytes of the file. Field
numbers are those of `onnx/onnx.proto3`; unknown fields are passed over.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocol.errors import ModelFileError
from protocol.tensors.cursor import Cursor
from protocol.tensors.regions import Layout, ReadAt, Region, cover

# Limits of this implementation.
MAX_FILE_BYTES = (1 << 31) - 1  # what protobuf itself can hold
MAX_DEPTH = 8
MAX_FIELDS = 4_000_000
MAX_TENSORS = 262_144
MAX_DIMENSIONS = 32
MAX_NAME_BYTES = 4096
# Smaller tensors stay inside the raw regions around them: a region of its own costs more than it gives.
MIN_TENSOR_BYTES = 64

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# data type: (bits of an element, layout)
_DATA_TYPES: dict[int, tuple[int, Layout]] = {
    1: (32, Layout.F32),
    2: (8, Layout.U8),
    3: (8, Layout.I8),
    4: (16, Layout.I16),
    5: (16, Layout.I16),
    6: (32, Layout.I32),
    7: (64, Layout.I64),
    9: (8, Layout.U8),
    10: (16, Layout.F16),
    11: (64, Layout.F64),
    12: (32, Layout.I32),
    13: (64, Layout.I64),
    16: (16, Layout.BF16),
    17: (8, Layout.F8),
    18: (8, Layout.F8),
    19: (8, Layout.F8),
    20: (8, Layout.F8),
    21: (4, Layout.PACKED4),
    22: (4, Layout.PACKED4),
}


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What an ONNX file holds.

    Attributes:
        regions: The whole file, in order, without gaps.
        external_locations: File names that initializers point to, each once, in order of appearance. Not checked
            for path traversal here: the importer refuses what is no bare file name of the release.
    """

    regions: tuple[Region, ...]
    external_locations: tuple[str, ...]


@dataclass(slots=True)
class _Walk:
    """What has been collected so far, and how much more may be."""

    source: ReadAt
    fields_left: int = MAX_FIELDS
    has_graph: bool = False
    tensors: list[Region] = field(default_factory=list)
    packed4_names: set[str] = field(default_factory=set)
    locations: dict[str, None] = field(default_factory=dict)


def parse_onnx(source: ReadAt) -> OnnxFile:
    """Map an ONNX file.

    Raises:
        ModelFileError: The file is no well-formed ModelProto with a graph, or passes a limit.
    """
    if source.length > MAX_FILE_BYTES:
        raise ModelFileError(f"ONNX: {source.length} bytes, protobuf cannot hold more than {MAX_FILE_BYTES}")
    walk = _Walk(source)
    for number, wire, start, end in _fields(walk, 0, source.length):
        if number == 7 and wire == _BYTES:
            walk.has_graph = True
            _walk_graph(walk, start, end, MAX_DEPTH)
    if not walk.has_graph:
        raise ModelFileError("ONNX: there is no graph in the file")
    tensors = [_with_packing(walk, tensor) for tensor in walk.tensors]
    return OnnxFile(cover(tensors, source.length), tuple(walk.locations))


def _fields(walk: _Walk, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield `(field number, wire type, value start, value end)` of one message; varints are given by position."""
    cursor = Cursor(walk.source, "ONNX", position=start, end=end)
    while cursor.remaining:
        walk.fields_left -= 1
        if walk.fields_left < 0:
            raise ModelFileError(f"ONNX: more than {MAX_FIELDS} fields")
        tag = cursor.varint("field tag")
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ModelFileError(f"ONNX: field number 0 at offset {cursor.position}")
        value_start = cursor.position
        if wire == _VARINT:
            cursor.varint("integer")
        elif wire == _FIXED64:
            cursor.skip(8, "fixed64")
        elif wire == _FIXED32:
            cursor.skip(4, "fixed32")
        elif wire == _BYTES:
            length = cursor.varint("field length")
            value_start = cursor.position
            cursor.skip(length, f"field {number}")
        else:
            raise ModelFileError(f"ONNX: unknown wire type {wire} at offset {value_start}")
        yield number, wire, value_start, cursor.position


def _walk_graph(walk: _Walk, start: int, end: int, depth: int) -> None:
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire != _BYTES:
            continue
        if number == 1:
            _walk_node(walk, value_start, value_end, depth)
        elif number == 5:
            _walk_tensor(walk, value_start, value_end)


def _walk_node(walk: _Walk, start: int, end: int, depth: int) -> None:
    inputs: list[str] = []
    op_type = ""
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire != _BYTES:
            continue
        if number == 1 and len(inputs) < 2:
            inputs.append(_text(walk, value_start, value_end))
        elif number == 4:
            op_type = _text(walk, value_start, value_end)
        elif number == 5:
            _walk_attribute(walk, value_start, value_end, depth)
    if op_type == "MatMulNBits" and len(inputs) == 2:
        walk.packed4_names.add(inputs[1])


def _walk_attribute(walk: _Walk, start: int, end: int, depth: int) -> None:
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire != _BYTES:
            continue
        if number in {5, 10}:
            _walk_tensor(walk, value_start, value_end)
        elif number in {6, 11}:
            if depth == 0:
                raise ModelFileError(f"ONNX: graphs are nested deeper than {MAX_DEPTH}")
            _walk_graph(walk, value_start, value_end, depth - 1)


def _walk_tensor(walk: _Walk, start: int, end: int) -> None:
    shape: list[int] = []
    data_type = 0
    name = ""
    raw: tuple[int, int] | None = None
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if number == 1:
            shape += _integers(walk, wire, value_start, value_end)
            if len(shape) > MAX_DIMENSIONS:
                raise ModelFileError(f"ONNX: a tensor has more than {MAX_DIMENSIONS} dimensions")
        elif number == 2 and wire == _VARINT:
            data_type = _integers(walk, wire, value_start, value_end)[0]
        elif number == 8 and wire == _BYTES:
            name = _text(walk, value_start, value_end)
        elif wire == _BYTES and (
            number == 9 or (number == 4 and value_end - value_start >= MIN_TENSOR_BYTES)
        ):
            # float_data is packed little-endian, the same bytes as raw_data would be.
            raw = (value_start, value_end)
        elif number == 13 and wire == _BYTES:
            _walk_external(walk, value_start, value_end)
    if raw is None or raw[1] - raw[0] < MIN_TENSOR_BYTES:
        return
    if len(walk.tensors) >= MAX_TENSORS:
        raise ModelFileError(f"ONNX: more than {MAX_TENSORS} tensors")
    walk.tensors.append(_tensor_region(name, tuple(shape), data_type, raw))


def _tensor_region(name: str, shape: tuple[int, ...], data_type: int, raw: tuple[int, int]) -> Region:
    length = raw[1] - raw[0]
    if data_type not in _DATA_TYPES:
        return Region(name, Layout.RAW, raw[0], length, shape)
    bits, layout = _DATA_TYPES[data_type]
    if length != -(-math.prod(shape) * bits // 8):
        raise ModelFileError(
            f"ONNX: tensor {name!r} has {length} bytes, its shape {list(shape)} needs another number"
        )
    row_bytes = shape[-1] * bits // 8 if shape and shape[-1] * bits % 8 == 0 else length
    return Region(name, layout, raw[0], length, shape, row_bytes)


def _with_packing(walk: _Walk, tensor: Region) -> Region:
    """MatMulNBits declares its packed four-bit weights as bytes; the node that reads them tells."""
    if tensor.layout is not Layout.U8 or tensor.name not in walk.packed4_names:
        return tensor
    return Region(tensor.name, Layout.PACKED4, tensor.offset, tensor.length, tensor.dims, tensor.row_bytes)


def _walk_external(walk: _Walk, start: int, end: int) -> None:
    key = value = ""
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire == _BYTES and number == 1:
            key = _text(walk, value_start, value_end)
        elif wire == _BYTES and number == 2:
            value = _text(walk, value_start, value_end)
    if key == "location":
        walk.locations[value] = None


def _integers(walk: _Walk, wire: int, start: int, end: int) -> list[int]:
    """Read a repeated int64, packed or not."""
    if wire not in {_VARINT, _BYTES} or end - start > 10 * MAX_DIMENSIONS:
        raise ModelFileError(f"ONNX: dimensions at offset {start} are not integers")
    cursor = Cursor(walk.source, "ONNX", position=start, end=end)
    values: list[int] = []
    while cursor.remaining:
        value = cursor.varint("dimension")
        if value >= 1 << 63:
            raise ModelFileError(f"ONNX: a dimension at offset {start} is negative")
        values.append(value)
    return values


def _text(walk: _Walk, start: int, end: int) -> str:
    if end - start > MAX_NAME_BYTES:
        raise ModelFileError(f"ONNX: a name at offset {start} has more than {MAX_NAME_BYTES} bytes")
    try:
        return walk.source.read_at(start, end - start).decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"ONNX: a name at offset {start} is not UTF-8") from error
