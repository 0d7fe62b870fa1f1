"""ONNX: where the initializers' bytes lie, found by walking the protobuf wire format.

Nothing is re-serialised and no protobuf library is used: a delta must give back the very bytes of the file. Field
numbers are those of `onnx/onnx.proto3`; unknown fields are passed over. What an initializer means to the nodes that read
it is in `onnx_weights.py`. Every tensor of a file is visited, wherever it hides: each could name a file to be opened.
`docs/security/input.md` lists the attacks behind the checks.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from protocol.errors import ModelFileError
from protocol.tensors.cursor import Cursor
from protocol.tensors.onnx_weights import (
    DATA_TYPES,
    USE_INPUTS_MAX,
    Initializer,
    Use,
    tensor_region,
    uses_of_node,
)
from protocol.tensors.regions import ReadAt, Region, cover

# Limits of this implementation. A large language model has some 20,000 nodes of ten fields, and 5,000 initializers.
MAX_FILE_BYTES = (1 << 31) - 1  # what protobuf itself can hold
MAX_DEPTH = 8
MAX_FIELDS = 2_000_000
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 32
MAX_NAME_BYTES = 4096
MAX_TEXT_BYTES = 64 << 20  # names of all kinds together
MAX_LOCATIONS = 64
MAX_ELEMENTS = 1 << 48  # of one tensor; no file that protobuf or a file system can hold has more
# Smaller tensors stay inside the raw regions around them: a region of its own costs more than it gives.
MIN_TENSOR_BYTES = 64

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIELD_NUMBER_MAX = (1 << 29) - 1  # what protobuf allows; libraries cut longer ones down to another field
_ENUM_MAX = (1 << 31) - 1  # likewise: an enumeration is an int32, and a longer number becomes another value
_EXTERNAL = 1  # TensorProto.DataLocation

# Entries of `TensorProto.external_data` that the format names. onnxruntime reads others as orders ("prepacked..."), and
# the onnx library set each as an attribute of an object of its own (CVE-2026-34445).
_ENTRY_KEYS = frozenset({"location", "offset", "length", "checksum"})
# Locations that tell onnxruntime to read its own memory at the address `offset` (microsoft/onnxruntime#28709).
_MEMORY_MARKER = "_MEM_ADDR_"
# An operator that carries, or names the file of, a program that was compiled for one accelerator.
_COMPILED_OPERATOR = "EPContext"


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What an ONNX file holds.

    Attributes:
        regions: The whole file, in order, without gaps.
        external: For each file that initializers point to, in order of appearance, the tensors in it by offset. How long
            that file is the ONNX file does not say; `map_external` checks it.
    """

    regions: tuple[Region, ...]
    external: Mapping[str, tuple[Region, ...]]


@dataclass(slots=True)
class _Walk:
    """What has been collected so far, and how much more may be."""

    source: ReadAt
    fields_left: int = MAX_FIELDS
    text_bytes_left: int = MAX_TEXT_BYTES
    has_graph: bool = False
    initializers: list[Initializer] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    locations: set[str] = field(default_factory=set)


def parse_onnx(source: ReadAt) -> OnnxFile:
    """Map an ONNX file, and what it says about the files of external data beside it.

    Raises:
        ModelFileError: The file is no well-formed ModelProto with a graph, or passes a limit; an external file would lie
            outside the model's folder.
    """
    if source.length > MAX_FILE_BYTES:
        raise ModelFileError(f"ONNX: {source.length} bytes, protobuf cannot hold more than {MAX_FILE_BYTES}")
    walk = _Walk(source)
    for number, wire, start, end in _fields(walk, 0, source.length):
        if wire != _BYTES:
            continue
        if number == 7:
            walk.has_graph = True
            _walk_graph(walk, start, end, MAX_DEPTH)
        elif number == 20:
            _walk_training(walk, start, end)
        elif number == 25:
            _walk_function(walk, start, end)
    if not walk.has_graph:
        raise ModelFileError("ONNX: there is no graph in the file")
    names = {initializer.name for initializer in walk.initializers}
    embedded: list[Region] = []
    external: dict[str, dict[tuple[int, int], Region]] = {}
    for initializer in walk.initializers:
        if initializer.location is None and initializer.length is None:
            continue  # a few values, or one field for each of them
        region = tensor_region(initializer, walk.uses, names)
        if initializer.location is not None:
            # Two initializers may share their bytes (tied weights); such bytes are mapped once.
            place = external.setdefault(initializer.location, {})
            if region is not None and region.length:
                place.setdefault((region.offset, region.length), region)
        elif region is not None and region.length >= MIN_TENSOR_BYTES:
            embedded.append(region)
    by_offset = {name: tuple(place[key] for key in sorted(place)) for name, place in external.items()}
    return OnnxFile(cover(embedded, source.length), by_offset)


def map_external(tensors: tuple[Region, ...], file_length: int) -> tuple[Region, ...]:
    """Return the map of a file of external data.

    Args:
        tensors: From `OnnxFile.external`.
        file_length: Of that file, in bytes.

    Raises:
        ModelFileError: A tensor reaches past the end of the file, or tensors overlap.
    """
    for tensor in tensors:
        if tensor.end > file_length:
            raise ModelFileError(
                f"ONNX: external tensor {tensor.name!r} ends at {tensor.end}, after its file's end at {file_length}"
            )
    large = [tensor for tensor in tensors if tensor.length >= MIN_TENSOR_BYTES]
    return cover(large, file_length)


def _fields(walk: _Walk, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield `(field number, wire type, value start, value end)` of one message; varints are given by position."""
    cursor = Cursor(walk.source, "ONNX", position=start, end=end)
    while cursor.remaining:
        walk.fields_left -= 1
        if walk.fields_left < 0:
            raise ModelFileError(f"ONNX: more than {MAX_FIELDS} fields")
        tag = cursor.varint("field tag")
        number, wire = tag >> 3, tag & 7
        if not 1 <= number <= _FIELD_NUMBER_MAX:
            raise ModelFileError(f"ONNX: field number {number} before offset {cursor.position}")
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
        elif number == 15:
            _walk_sparse(walk, value_start, value_end)


def _walk_training(walk: _Walk, start: int, end: int) -> None:
    """TrainingInfoProto: the graphs `initialization` and `algorithm`."""
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire == _BYTES and number in {1, 2}:
            _walk_graph(walk, value_start, value_end, MAX_DEPTH)


def _walk_function(walk: _Walk, start: int, end: int) -> None:
    """FunctionProto: its nodes, and the defaults of its attributes."""
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire == _BYTES and number == 7:
            _walk_node(walk, value_start, value_end, MAX_DEPTH)
        elif wire == _BYTES and number == 11:
            _walk_attribute(walk, value_start, value_end, MAX_DEPTH, {})


def _walk_sparse(walk: _Walk, start: int, end: int) -> None:
    """SparseTensorProto: the tensors `values` and `indices`."""
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire == _BYTES and number in {1, 2}:
            _walk_tensor(walk, value_start, value_end)


def _walk_node(walk: _Walk, start: int, end: int, depth: int) -> None:
    inputs: list[str] = []
    op_type = ""
    integers: dict[str, int] = {}
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire != _BYTES:
            continue
        if number == 1 and len(inputs) < USE_INPUTS_MAX:
            inputs.append(_text(walk, value_start, value_end))
        elif number == 4:
            op_type = _text(walk, value_start, value_end)
        elif number == 5:
            _walk_attribute(walk, value_start, value_end, depth, integers)
    if op_type == _COMPILED_OPERATOR:
        raise ModelFileError(
            f"ONNX: there is a node {_COMPILED_OPERATOR}: a program for one kind of accelerator, not a model",
            hint="publish the model that it was compiled from; each device compiles its own",
        )
    walk.uses.update(uses_of_node(op_type, inputs, integers))


def _walk_attribute(walk: _Walk, start: int, end: int, depth: int, integers: dict[str, int]) -> None:
    name = ""
    value: int | None = None
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if number == 3 and wire == _VARINT:
            value = _varint(walk, value_start, value_end)
        elif wire != _BYTES:
            continue
        elif number == 1:
            name = _text(walk, value_start, value_end)
        elif number in {5, 10}:
            _walk_tensor(walk, value_start, value_end)
        elif number in {22, 23}:
            _walk_sparse(walk, value_start, value_end)
        elif number in {6, 11}:
            if depth == 0:
                raise ModelFileError(f"ONNX: graphs are nested deeper than {MAX_DEPTH}")
            _walk_graph(walk, value_start, value_end, depth - 1)
    if value is not None:
        integers[name] = value


def _walk_tensor(walk: _Walk, start: int, end: int) -> None:
    shape: list[int] = []
    found = Initializer()
    entries: dict[str, str] = {}
    is_external = False
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if number == 1:
            shape += _dimensions(walk, wire, value_start, value_end)
            if len(shape) > MAX_DIMENSIONS:
                raise ModelFileError(f"ONNX: a tensor has more than {MAX_DIMENSIONS} dimensions")
        elif number == 2 and wire == _VARINT:
            found.data_type = _enumerated(walk, value_start, value_end)
        elif number == 14 and wire == _VARINT:
            is_external = _enumerated(walk, value_start, value_end) == _EXTERNAL
        elif wire != _BYTES:
            continue
        elif number == 8:
            found.name = _text(walk, value_start, value_end)
        elif number == 9 or (number == 4 and value_end - value_start >= MIN_TENSOR_BYTES):
            # float_data is packed little-endian, the same bytes as raw_data would be.
            found.offset, found.length = value_start, value_end - value_start
        elif number == 13:
            _walk_entry(walk, value_start, value_end, entries)
    found.shape = tuple(shape)
    if math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise ModelFileError(f"ONNX: tensor {found.name!r} has the shape {shape}, which no file can hold")
    if is_external or entries:
        _set_external(walk, found, entries)
    if len(walk.initializers) >= MAX_TENSORS:
        raise ModelFileError(f"ONNX: more than {MAX_TENSORS} tensors")
    walk.initializers.append(found)


def _walk_entry(walk: _Walk, start: int, end: int, entries: dict[str, str]) -> None:
    key = value = ""
    for number, wire, value_start, value_end in _fields(walk, start, end):
        if wire == _BYTES and number == 1:
            key = _text(walk, value_start, value_end)
        elif wire == _BYTES and number == 2:
            value = _text(walk, value_start, value_end)
    if key not in _ENTRY_KEYS or key in entries:
        problem = "occurs twice" if key in entries else "is not known"
        raise ModelFileError(
            f"ONNX: entry {key[:200]!r} of external data {problem}",
            hint="export the model again, with its external data beside it",
        )
    entries[key] = value


def _set_external(walk: _Walk, found: Initializer, entries: Mapping[str, str]) -> None:
    found.location = _checked_location(found.name, entries.get("location", ""))
    found.offset = _decimal(found.name, entries.get("offset") or "0")
    found.length = _decimal(found.name, entries["length"]) if entries.get("length") else None
    if found.length is None and found.data_type not in DATA_TYPES:
        raise ModelFileError(f"ONNX: external tensor {found.name!r} has no length")
    walk.locations.add(found.location)
    if len(walk.locations) > MAX_LOCATIONS:
        raise ModelFileError(f"ONNX: tensors lie in more than {MAX_LOCATIONS} files")


def _checked_location(name: str, location: str) -> str:
    """A hostile file must not make anyone read, or write, outside of the model's folder."""
    if _MEMORY_MARKER in location:
        raise ModelFileError(
            f"ONNX: tensor {name!r} lies at {location[:200]!r}, which is an address in the memory of its reader",
            hint="the file is hostile, or was cut out of a running session: export the model again",
        )
    parts = location.removeprefix("./").split("/")
    is_plain = (
        location.isprintable() and not {"\\", ":", "*"} & set(location) and not {"", ".", ".."} & set(parts)
    )
    if not is_plain:
        raise ModelFileError(
            f"ONNX: tensor {name!r} lies in {location[:200]!r}, which is no path inside the model's folder",
            hint="export the model again, with its external data beside it",
        )
    return "/".join(parts)


def _decimal(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ModelFileError(f"ONNX: external tensor {name!r} has the offset or length {text[:40]!r}")
    return int(text)


def _enumerated(walk: _Walk, start: int, end: int) -> int:
    value = _varint(walk, start, end)
    if value > _ENUM_MAX:
        raise ModelFileError(f"ONNX: {value} at offset {start} is no value of an enumeration")
    return value


def _varint(walk: _Walk, start: int, end: int) -> int:
    return Cursor(walk.source, "ONNX", position=start, end=end).varint("integer")


def _dimensions(walk: _Walk, wire: int, start: int, end: int) -> list[int]:
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
    walk.text_bytes_left -= end - start
    if walk.text_bytes_left < 0:
        raise ModelFileError(f"ONNX: names take more than {MAX_TEXT_BYTES} bytes")
    try:
        return walk.source.read_at(start, end - start).decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"ONNX: a name at offset {start} is not UTF-8") from error
