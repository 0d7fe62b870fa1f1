"""What a model file is made of, for everything that reads one: regions, layouts, and the port to read through.

Pure data and one in-memory source. Files are opened by adapters and commands, never here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from protocol.errors import ModelFileError


class ReadAt(Protocol):
    """Random access to bytes that do not change while they are read."""

    @property
    def length(self) -> int:
        """Length in bytes."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the bytes `[offset, offset + length)`; fewer only where the source ends early."""
        ...


class BytesSource:
    """A `ReadAt` over bytes in memory.

    Args:
        data: What is read; not copied.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data)

    @property
    def length(self) -> int:
        """Length in bytes."""
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        """See `ReadAt.read_at`."""
        return bytes(self._data[offset : offset + length])


class Layout(StrEnum):
    """How the bytes of a region are arranged. Names follow ggml and the ONNX/safetensors data types."""

    RAW = "raw"
    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U8 = "u8"
    PACKED4 = "packed4"  # two four-bit values a byte, low nibble first (ONNX MatMulNBits, UINT4; FP4)
    I4 = "i4"  # the same with two's complement values (ONNX INT4)
    F8 = "f8"  # E4M3 or E5M2: sign and magnitude in one byte
    AWQ4 = "awq4"  # words of eight four-bit codes along a row, in the order of AWQ's kernels
    GPTQ4 = "gptq4"  # words of eight four-bit codes below each other in one column
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    TQ2_0 = "tq2_0"


@dataclass(frozen=True, slots=True)
class Region:
    """One stretch of a model file.

    Attributes:
        name: The tensor's name, or "" for bytes that belong to no tensor.
        layout: How the bytes are arranged; `Layout.RAW` for anything not understood.
        offset: Where the region starts in the file.
        length: In bytes, at least 1.
        dims: The logical shape, fastest dimension last, whatever order the container uses; () for what is not a tensor.
        row_bytes: Bytes of one row, that is of neighbours along the fastest dimension; of one row of blocks where a block
            spans several rows; 0 where there are no rows.
        scales: Name of the tensor that holds the scales of this one, "" where the container names none. That tensor may
            be too small to have a region of its own.
    """

    name: str
    layout: Layout
    offset: int
    length: int
    dims: tuple[int, ...] = ()
    row_bytes: int = 0
    scales: str = ""

    @property
    def end(self) -> int:
        """The offset after the region's last byte."""
        return self.offset + self.length


_ROW_ELEMENTS_MIN = 32


def row_elements(dims: Sequence[int]) -> int:
    """Return how many elements make a row: the fastest dimension, or more of them where that one is tiny.

    A convolution's fastest dimension is the width of its kernel. Rows of three codes would tell a coder nothing, so the next
    dimensions join in, down to the output channels.
    """
    elements = dims[-1] if dims else 1
    for size in reversed(dims[1:-1]):
        if elements >= _ROW_ELEMENTS_MIN:
            break
        elements *= size
    return elements


def cover(tensors: Sequence[Region], file_length: int) -> tuple[Region, ...]:
    """Add raw regions around `tensors` so that the whole file is covered, in order, without gaps.

    Args:
        tensors: Regions in any order; empty ones are dropped.
        file_length: Length of the file in bytes.

    Returns:
        Regions in file order that touch each other and end at `file_length`.

    Raises:
        ModelFileError: Two tensors overlap, or one reaches past the end of the file.
    """
    regions: list[Region] = []
    position = 0
    for tensor in sorted(tensors, key=lambda region: (region.offset, region.length)):
        if tensor.length == 0:
            continue
        if tensor.offset < position:
            raise ModelFileError(
                f"tensor {tensor.name!r}: overlaps the bytes before it at offset {tensor.offset}"
            )
        if tensor.end > file_length:
            raise ModelFileError(
                f"tensor {tensor.name!r}: ends at {tensor.end}, after the file's end at {file_length}"
            )
        if tensor.offset > position:
            regions.append(Region("", Layout.RAW, position, tensor.offset - position))
        regions.append(tensor)
        position = tensor.end
    if position < file_length:
        regions.append(Region("", Layout.RAW, position, file_length - position))
    return tuple(regions)
