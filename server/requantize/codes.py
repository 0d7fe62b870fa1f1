"""Quantized rows as linear codes: each weight is step * code + offset with codes in a range. One table for all layouts that have such codes.

Which bits hold what is the business of `protocol/delta/layouts.py`, how a weight follows from its code that of `server/diagnosis/weights.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS, Array, Formula
from protocol.tensors import Layout
from server.diagnosis.weights import Floats, scaling

Codes = npt.NDArray[np.int16]

LINEAR_LAYOUTS: Final = frozenset(
    layout
    for layout, row in LAYOUTS.items()
    if row.formula is not Formula.PLAIN and not row.codebook and layout is not Layout.TQ2_0
)
"""Layouts whose weights are linear in their codes: the simple quantizations and the K-quants. One code of TQ2_0 means nothing."""


@dataclass(frozen=True, slots=True)
class LinearRows:
    """Rows of weights that are linear in their codes: what a descent needs to know of them.

    Attributes:
        codes: Shape (rows, columns), signed where the layout's are.
        steps: What a code is multiplied with, same shape; 0 where a block has no scale.
        offsets: What is added, same shape.
        low: Smallest code.
        high: Largest code.
    """

    codes: Codes
    steps: Floats
    offsets: Floats
    low: int
    high: int

    def weights(self, codes: Codes) -> Floats:
        """What weights the codes stand for with these scales."""
        return self.steps * codes.astype(np.float32) + self.offsets

    def nearest(self, weights: Floats) -> Codes:
        """Codes whose weights are nearest to the given ones; the installed code where a block has no scale."""
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.clip(np.rint((weights - self.offsets) / self.steps), self.low, self.high)
        return np.where(self.steps == 0, self.codes, np.nan_to_num(wanted)).astype(np.int16)


@dataclass(frozen=True, slots=True)
class CodedRows(LinearRows):
    """Rows of a quantized tensor, taken apart.

    Attributes:
        layout: Of the tensor.
        fields: All fields of its blocks, the codes among them.
    """

    layout: Layout
    fields: Mapping[str, Array]

    @classmethod
    def read(cls, layout: Layout, data: bytes, columns: int) -> Self:
        """Take whole rows apart.

        Args:
            layout: One of `LINEAR_LAYOUTS`.
            data: Bytes of whole rows.
            columns: Weights of a row.
        """
        row = LAYOUTS[layout]
        fields = row.split(np.frombuffer(data, np.uint8).reshape(-1, row.block_bytes))
        stored = fields[row.codes.name]
        step, offset = scaling(layout, fields)
        each = stored.shape[1] // step.shape[1]
        low, high = code_range(layout)
        return cls(
            (stored.view(np.int8) if row.is_signed else stored).reshape(-1, columns).astype(np.int16),
            np.repeat(step, each, 1).reshape(-1, columns),
            np.repeat(offset - step * np.float32(row.zero), each, 1).reshape(-1, columns),
            low,
            high,
            layout,
            fields,
        )

    def joined(self, codes: Codes) -> bytes:
        """The rows' bytes with other codes and the same scales."""
        row = LAYOUTS[self.layout]
        stored = self.fields[row.codes.name]
        words = codes.astype(np.int8 if row.is_signed else np.uint8).view(np.uint8).reshape(stored.shape)
        return row.join({**self.fields, row.codes.name: words}).tobytes()

    def with_scales(self, halves: npt.NDArray[np.uint16]) -> Self:
        """The same codes with other scales.

        Args:
            halves: Half-precision bits of the field `d`, one for each block.
        """
        fields = {**self.fields, "d": halves.reshape(self.fields["d"].shape)}
        return self.read(self.layout, LAYOUTS[self.layout].join(fields).tobytes(), self.codes.shape[1])


def code_range(layout: Layout) -> tuple[int, int]:
    """Smallest and largest code.

    Eight signed bits end at -127, as in ggml's quantizer: kernels negate codes, and -128 has no negative there.
    """
    row = LAYOUTS[layout]
    half = 1 << (row.codes.width - 1)
    return (1 - half, half - 1) if row.is_signed else (0, 2 * half - 1)
