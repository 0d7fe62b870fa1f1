"""How an ONNX file holds quantized weights, taken apart and put together again. Pure.

Sources: the operators DequantizeLinear, MatMulInteger and ConvInteger of ONNX; MatMulNBits and GatherBlockQuantized of onnxruntime
(`ContribOperators.md`). Codes that do not fill a byte are packed along a row, the low bits first.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from server.diagnosis.weights import Floats
from server.requantize.codes import Codes, LinearRows

Stored = npt.NDArray[Any]
"""Codes as wide as they are stored."""

REDUCED_MAX: Final = 64
"""Quantizers asked for a reduced range keep seven bits, since processors without VNNI add two products of eight bits in sixteen; such
tensors stay in that range."""


@dataclass(frozen=True, slots=True)
class Form:
    """How codes of one tensor lie in its bytes.

    Attributes:
        dims: Of the weights as the model in floats has them.
        is_signed: Whether a byte is a signed code.
        bits: Of a code; 8 for bytes.
        block: Columns of a row of blocks, 0 where rows have no blocks. A row is filled up to whole blocks.
        is_transposed: The descent's rows are the last dimension: what a matrix is multiplied with lies along the first one.
        is_stored_by_rows: The bytes are in the descent's order already, whatever the weights' dimensions.
    """

    dims: tuple[int, ...]
    is_signed: bool = False
    bits: int = 8
    block: int = 0
    is_transposed: bool = False
    is_stored_by_rows: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the descent."""
        first, rest = self.dims[0], int(np.prod(self.dims[1:], dtype=np.int64))
        return (rest, first) if self.is_transposed else (first, rest)

    @property
    def length(self) -> int:
        """Of the tensor, in bytes."""
        rows, _ = self.shape
        return rows * self._stored_columns * self.bits // 8

    @property
    def _stored_columns(self) -> int:
        columns = self.shape[1]
        return -(-columns // self.block) * self.block if self.block else columns

    def codes(self, data: bytes) -> Stored:
        """Codes as the descent has them, shape `shape`; a view of as few bytes as can be."""
        words = np.frombuffer(data, np.uint8)
        if self.bits < 8:
            each = 8 // self.bits
            mask = np.uint8((1 << self.bits) - 1)
            parts = [words >> np.uint8(place * self.bits) & mask for place in range(each)]
            words = np.stack(parts, axis=-1).reshape(-1)
        stored = words.view(np.int8) if self.is_signed else words
        rows, columns = self.shape
        if self.is_transposed and not self.is_stored_by_rows:
            return stored.reshape(columns, rows).T
        return stored.reshape(rows, self._stored_columns)[:, :columns]

    def joined(self, codes: Codes, data: bytes) -> bytes:
        """The tensor's bytes with other codes; what fills up a row stays.

        Args:
            codes: All of them, shape `shape`.
            data: The tensor's bytes before.
        """
        words = codes.astype(np.int8 if self.is_signed else np.uint8).view(np.uint8)
        if self.is_transposed and not self.is_stored_by_rows:
            return np.ascontiguousarray(words.T).tobytes()
        rows, columns = self.shape
        if self.bits == 8 and self._stored_columns == columns:
            return words.tobytes()
        filled = np.array(Form((rows, self._stored_columns), bits=self.bits).codes(data), np.uint8)
        filled[:, :columns] = words
        if self.bits == 8:
            return filled.tobytes()
        each = 8 // self.bits
        parts = filled.reshape(-1, each)
        packed = np.zeros(len(parts), np.uint8)
        for place in range(each):
            packed |= parts[:, place] << np.uint8(place * self.bits)
        return packed.tobytes()

    def range(self, codes: Stored) -> tuple[int, int]:
        """Smallest and largest code that the quantizer would give, judged by those that there are."""
        if self.bits < 8:
            return 0, (1 << self.bits) - 1
        low, high = int(codes.min()), int(codes.max())
        if not self.is_signed:
            return (0, 2 * REDUCED_MAX - 1) if high < 2 * REDUCED_MAX else (0, 255)
        if low >= -REDUCED_MAX and high <= REDUCED_MAX:
            return -REDUCED_MAX, REDUCED_MAX
        return (-128, 127) if low == -128 else (-127, 127)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which weights codes stand for: scale * (code - zero).

    Attributes:
        scales: Shape (rows or 1, columns or 1, or blocks of columns).
        zeros: Likewise.
        repeat: Columns of a block; 1 where the arrays have one value for each column, or one for all.
    """

    scales: Floats
    zeros: Floats
    repeat: int = 1

    def rows(self, codes: Stored, part: slice, low: int, high: int) -> LinearRows:
        """Some rows as the descent takes them.

        Args:
            codes: All of the tensor's.
            part: Which rows.
            low: Smallest code.
            high: Largest code.
        """
        chosen = np.array(codes[part], np.int16)
        steps = self._spread(self.scales, part, chosen.shape)
        zeros = self._spread(self.zeros, part, chosen.shape)
        return LinearRows(chosen, steps, np.asarray(-steps * zeros, np.float32), low, high)

    def _spread(self, values: Floats, part: slice, shape: tuple[int, ...]) -> Floats:
        some = values[part] if len(values) > 1 else values
        if self.repeat > 1 and some.shape[1] > 1:
            some = np.repeat(some, self.repeat, axis=1)[:, : shape[1]]
        return np.array(np.broadcast_to(some, shape), np.float32)
