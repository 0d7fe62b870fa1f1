"""GGUF: from bytes to metadata and tensor regions, with every count and offset checked before it is used.

Format: ggml `docs/gguf.md`, versions 2 and 3, little-endian. Block sizes: `gguf-py/gguf/constants.py`. The checks go
beyond those of llama.cpp's own loader: offsets must be contiguous and nothing may follow the last tensor but padding.
`docs/security/input.md` lists the attacks behind them.
"""

import math
import struct
from dataclasses import dataclass, field

from protocol.errors import ModelFileError
from protocol.tensors.cursor import Cursor
from protocol.tensors.regions import Layout, ReadAt, Region, cover, row_elements

MAGIC = b"GGUF"

# Limits of this implementation. The largest published models have some 2,000 tensors and 10 MB of metadata.
MAX_TENSORS = 65_536
MAX_KEY_VALUES = 65_536
MAX_STRING_BYTES = 1 << 20
MAX_METADATA_BYTES = 64 << 20
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_ELEMENTS = (1 << 63) - 1
"""llama.cpp counts the weights of a tensor in an int64."""
ALIGNMENT_RANGE = (8, 4096)
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1  # empty key, type, one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

# type number: (weights in a block, bytes of a block, layout). RAW: the size is known, the inside is not split.
GGML_TYPES: dict[int, tuple[int, int, Layout]] = {
    0: (1, 4, Layout.F32),
    1: (1, 2, Layout.F16),
    2: (32, 18, Layout.Q4_0),
    3: (32, 20, Layout.Q4_1),
    6: (32, 22, Layout.Q5_0),
    7: (32, 24, Layout.Q5_1),
    8: (32, 34, Layout.Q8_0),
    9: (32, 36, Layout.RAW),
    10: (256, 84, Layout.Q2_K),
    11: (256, 110, Layout.Q3_K),
    12: (256, 144, Layout.Q4_K),
    13: (256, 176, Layout.Q5_K),
    14: (256, 210, Layout.Q6_K),
    15: (256, 292, Layout.RAW),
    16: (256, 66, Layout.RAW),
    17: (256, 74, Layout.RAW),
    18: (256, 98, Layout.RAW),
    19: (256, 50, Layout.RAW),
    20: (32, 18, Layout.IQ4_NL),
    21: (256, 110, Layout.RAW),
    22: (256, 82, Layout.RAW),
    23: (256, 136, Layout.IQ4_XS),
    24: (1, 1, Layout.I8),
    25: (1, 2, Layout.I16),
    26: (1, 4, Layout.I32),
    27: (1, 8, Layout.I64),
    28: (1, 8, Layout.F64),
    29: (256, 56, Layout.RAW),
    30: (1, 2, Layout.BF16),
    34: (256, 54, Layout.RAW),
    35: (256, 66, Layout.TQ2_0),
    39: (32, 17, Layout.MXFP4),
    40: (64, 36, Layout.NVFP4),
    41: (128, 18, Layout.RAW),
}

REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Numbers that ggml gave up: its table has blocks of zero weights for them, and a loader that divides by that dies."""

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A metadata array whose elements were checked and passed over.

    Attributes:
        element_type: As GGUF numbers it.
        count: Of its elements.
        offset: Where in the file the first of them starts.
    """

    element_type: int
    count: int
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says about itself.

    Attributes:
        version: 2 or 3.
        metadata: Keys in file order; arrays only as their type and count.
        regions: The whole file, in order, without gaps.
        pairs: Where in the file each key with its value lies, start and end.
        infos: Where the descriptions of the tensors lie, start and end.
    """

    version: int
    metadata: dict[str, Scalar | ArrayValue]
    regions: tuple[Region, ...]
    pairs: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    infos: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def tensors(self) -> tuple[Region, ...]:
        """The regions that are tensors."""
        return tuple(region for region in self.regions if region.name)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    dims: tuple[int, ...]
    layout: Layout
    length: int | None  # unknown where the type is
    row_bytes: int
    offset: int


def parse_gguf(source: ReadAt) -> GgufFile:
    """Read the header of a GGUF file and map its tensors.

    Raises:
        ModelFileError: Anything is wrong or beyond the limits above; the message names the field.
    """
    cursor = Cursor(source, "GGUF", end=min(source.length, MAX_METADATA_BYTES))
    if cursor.read(4, "magic") != MAGIC:
        raise ModelFileError("GGUF: magic is not 'GGUF'")
    version = cursor.unsigned(4, "version")
    if version not in {2, 3}:
        hint = "a big-endian file" if version in {2 << 24, 3 << 24} else ""
        raise ModelFileError(f"GGUF: version {version} is not 2 or 3", hint=hint)
    tensor_count = _count(cursor, "tensor count", MAX_TENSORS, _MIN_TENSOR_BYTES)
    key_count = _count(cursor, "metadata count", MAX_KEY_VALUES, _MIN_KEY_VALUE_BYTES)
    metadata: dict[str, Scalar | ArrayValue] = {}
    pairs: dict[str, tuple[int, int]] = {}
    for _ in range(key_count):
        start = cursor.position
        key = _string(cursor, "metadata key")
        if key in metadata:
            raise ModelFileError(f"GGUF: metadata key {key!r} occurs twice")
        metadata[key] = _value(cursor, key)
        pairs[key] = start, cursor.position
    alignment = _alignment(metadata)
    start = cursor.position
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    if len({info.name for info in infos}) != len(infos):
        raise ModelFileError("GGUF: a tensor name occurs twice")
    data_start = _padded(cursor.position, alignment)
    regions = _place(infos, data_start, alignment, source.length)
    return GgufFile(version, metadata, cover(regions, source.length), pairs, (start, cursor.position))


def _count(cursor: Cursor, field: str, limit: int, entry_bytes: int) -> int:
    count = cursor.unsigned(8, field)
    if count > limit or count * entry_bytes > cursor.remaining:
        raise ModelFileError(f"GGUF: {field} {count} is more than the file can hold or {limit}")
    return count


def _string(cursor: Cursor, field: str, limit: int = MAX_STRING_BYTES) -> str:
    length = cursor.unsigned(8, f"length of {field}")
    if length > limit:
        raise ModelFileError(f"GGUF: {field} has {length} bytes, at most {limit} are accepted")
    try:
        return cursor.read(length, field).decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"GGUF: {field} is not UTF-8") from error


def _value(cursor: Cursor, key: str) -> Scalar | ArrayValue:
    field = f"metadata {key!r}"
    kind = cursor.unsigned(4, f"type of {field}")
    if key == _ALIGNMENT_KEY and kind != _UINT32:
        raise ModelFileError(
            f"GGUF: {field} has the type {kind}, expected {_UINT32}"
        )  # llama.cpp aborts on it
    if kind == _STRING:
        return _string(cursor, field)
    if kind == _ARRAY:
        return _skip_array(cursor, field)
    return _scalar(cursor, kind, field)


def _scalar(cursor: Cursor, kind: int, field: str) -> int | float | bool:
    if kind not in _SCALARS:
        raise ModelFileError(f"GGUF: {field} has the unknown type {kind}")
    packed = struct.Struct(_SCALARS[kind])
    value: int | float | bool = packed.unpack(cursor.read(packed.size, field))[0]
    return value


def _skip_array(cursor: Cursor, field: str) -> ArrayValue:
    kind = cursor.unsigned(4, f"element type of {field}")
    count = cursor.unsigned(8, f"length of {field}")
    if kind not in _SCALARS and kind != _STRING:  # arrays of arrays least of all
        raise ModelFileError(f"GGUF: {field} is an array of type {kind}, which is not accepted")
    element_bytes = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
    start = cursor.position
    if count * element_bytes > cursor.remaining:
        raise ModelFileError(f"GGUF: {field} has {count} elements, more than the file can hold")
    if kind != _STRING:
        cursor.skip(count * element_bytes, field)
        return ArrayValue(kind, count, start)
    cursor.skip_strings(count, MAX_STRING_BYTES, field)
    return ArrayValue(kind, count, start)


def read_array(source: ReadAt, array: ArrayValue) -> list[bytes]:
    """The elements of a metadata array that `parse_gguf` has checked, each as its bytes: strings as UTF-8, numbers little-endian.

    Raises:
        ModelFileError: The source is not the one that was parsed.
    """
    cursor = Cursor(source, "GGUF", position=array.offset)  # it was found within MAX_METADATA_BYTES
    if array.element_type == _STRING:
        return [cursor.read(cursor.unsigned(8, "string length"), "string") for _ in range(array.count)]
    width = struct.calcsize(_SCALARS[array.element_type])
    data = cursor.read(array.count * width, "array")
    return [data[at : at + width] for at in range(0, len(data), width)]


def _alignment(metadata: dict[str, Scalar | ArrayValue]) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    low, high = ALIGNMENT_RANGE
    if not isinstance(alignment, int) or not low <= alignment <= high or alignment & (alignment - 1):
        raise ModelFileError(f"GGUF: general.alignment {alignment!r} is not a power of two in {low}..{high}")
    return alignment


def _tensor_info(cursor: Cursor) -> _TensorInfo:
    name = _string(cursor, "tensor name", MAX_NAME_BYTES)
    if not name:
        raise ModelFileError("GGUF: a tensor name is empty")
    if not name.isprintable():  # C ends a name at a zero byte: two names would become one
        raise ModelFileError(f"GGUF: tensor name {name!r} has characters that cannot be printed")
    rank = cursor.unsigned(4, f"dimensions of {name!r}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise ModelFileError(
            f"GGUF: tensor {name!r} has {rank} dimensions, 1 to {MAX_DIMENSIONS} are accepted"
        )
    shape = tuple(cursor.unsigned(8, f"shape of {name!r}") for _ in range(rank))
    if not all(shape):
        raise ModelFileError(f"GGUF: tensor {name!r} has a dimension of 0")
    if math.prod(shape) > MAX_ELEMENTS:
        raise ModelFileError(f"GGUF: tensor {name!r} has more than {MAX_ELEMENTS} weights")
    kind = cursor.unsigned(4, f"type of {name!r}")
    offset = cursor.unsigned(8, f"offset of {name!r}")
    dims = shape[::-1]
    if kind in REMOVED_TYPES:
        raise ModelFileError(
            f"GGUF: tensor {name!r} has the type {kind}, which was removed from the format",
            hint="quantize the model again with a current llama.cpp",
        )
    if kind not in GGML_TYPES:
        return _TensorInfo(name, dims, Layout.RAW, None, 0, offset)
    weights, block_bytes, layout = GGML_TYPES[kind]
    if shape[0] % weights:
        raise ModelFileError(f"GGUF: tensor {name!r} has rows of {shape[0]}, not a multiple of {weights}")
    length = shape[0] // weights * block_bytes * math.prod(shape[1:])
    row = row_elements(dims) if weights == 1 else shape[0]
    return _TensorInfo(name, dims, layout, length, row // weights * block_bytes, offset)


def _place(infos: list[_TensorInfo], data_start: int, alignment: int, file_length: int) -> list[Region]:
    """Turn relative offsets into regions; each tensor must follow the one before, as llama.cpp demands.

    A tensor of a type from after this was written ends where the next one starts.
    """
    regions: list[Region] = []
    expected = 0
    for index, info in enumerate(infos):
        end = infos[index + 1].offset if index + 1 < len(infos) else file_length - data_start
        if info.offset != expected:
            raise ModelFileError(f"GGUF: tensor {info.name!r} has offset {info.offset}, expected {expected}")
        length = end - info.offset if info.length is None else info.length
        if length <= 0:
            raise ModelFileError(f"GGUF: tensor {info.name!r} has {length} bytes")
        region = Region(info.name, info.layout, data_start + info.offset, length, info.dims, info.row_bytes)
        if region.end > file_length:
            raise ModelFileError(
                f"GGUF: tensor {info.name!r} ends at {region.end}, the file at {file_length}"
            )
        regions.append(region)
        expected = _padded(info.offset + length, alignment)
    # Without tensors the padding before an empty data section may be left out.
    if file_length > data_start + expected:
        raise ModelFileError(f"GGUF: {file_length - data_start - expected} bytes follow the last tensor")
    return regions


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
