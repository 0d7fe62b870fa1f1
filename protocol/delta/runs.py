"""Runs of the context coder: what the parameters of a segment say of its blocks, packed, read and checked. SPEC section 6.11."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Final, Self

from protocol.delta.layouts import LAYOUT_BY_NUMBER, NAME_BY_NUMBER, Formula
from protocol.delta.symbols import Payload
from protocol.delta.tensor import GAIN, RUNS_MAX, check_gain, takes_gain
from protocol.delta.varints import write_signed, write_varint
from protocol.errors import PatchError
from protocol.tensors.regions import Layout

# --- Specification constants ------------------------------------------------------------------------------------

DIVISORS: Final = {Layout.Q8_0: 127, Layout.Q4_0: 8, Layout.Q5_0: 16}
"""Layouts whose scale is a block's maximum divided by a constant."""

SLOTS: Final = 3
"""Models of codes that a state has room for."""

COLUMNS_MAX: Final = 4096
"""Columns with statistics of their own."""

RANK_MAX: Final = 16

SCALED: Final = frozenset({Layout.I8, Layout.U8})
"""Layouts whose columns may have their scales in another tensor, of float32."""

RANKED: Final = frozenset({*DIVISORS, Layout.I8, Layout.U8})
"""Layouts whose rows may move along a basis."""

GROUP_CODES: Final = 32
BASIS_BYTES_MAX: Final = 24_576
"""Directions and forecast of one basis: a state with it stays below its limit."""

VARIANCE_BITS_MIN, VARIANCE_BITS_MAX = 12, 40
FORECAST_SHIFT_MAX = 40

_BASIS = struct.Struct("<BBI")
_ROW_CODES_MAX = 1 << 30
_BLOCKS_MAX = 1 << 40


class Flag(IntFlag):
    """What a run's flags byte says."""

    NONE = 0
    BASE = 1
    GAIN = 2
    SPARSE = 4  # most groups do not change
    DRIFT = 8  # columns move together
    LATTICE = 16  # scales came from bfloat16 maxima
    SCALES = 16  # of F32: they are the scales of columns; of codes without scales: those are of their columns; of bytes: keeps them
    GRID = 32  # weights came from bfloat16
    RANK = 64  # rows move along the basis that the last tables record brought
    START = 128  # statistics of rows and columns start anew


@dataclass(frozen=True, slots=True)
class Basis:
    """Directions in which the rows of a tensor move.

    Attributes:
        columns: Codes in a row.
        rank: How many directions.
        directions: `rank` rows of `columns` signed bytes.
        forecast: Likewise: weights with which an old row foretells its coefficients; empty without.
        prior: `rank` logarithms of variances, then `rank` shifts of forecasts.
    """

    columns: int
    rank: int
    directions: bytes
    forecast: bytes
    prior: bytes

    def pack(self) -> bytes:
        """Return the content of a tables record."""
        head = _BASIS.pack(self.rank, bool(self.forecast), self.columns)
        return head + self.prior + self.directions + self.forecast

    def cut(self, rank: int) -> "Basis":
        """Return the first `rank` directions."""
        size = rank * self.columns
        prior = self.prior[:rank] + self.prior[self.rank : self.rank + rank]
        return Basis(self.columns, rank, self.directions[:size], self.forecast[:size], prior)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read and check the content of a tables record.

        Raises:
            PatchError: Lengths or numbers are out of bounds.
        """
        if len(data) < _BASIS.size:
            raise PatchError("a basis ends inside its header")
        rank, has_forecast, columns = _BASIS.unpack_from(data)
        size = rank * columns
        if not 1 <= rank <= RANK_MAX or has_forecast > 1 or not 1 <= columns <= COLUMNS_MAX:
            raise PatchError(f"a basis has rank {rank} and {columns} columns")
        if columns % GROUP_CODES or size * (1 + has_forecast) > BASIS_BYTES_MAX:
            raise PatchError(f"a basis of rank {rank} has {columns} columns")
        if len(data) != _BASIS.size + 2 * rank + size * (1 + has_forecast):
            raise PatchError(f"a basis has a wrong length of {len(data)} bytes")
        prior = data[_BASIS.size : _BASIS.size + 2 * rank]
        variances, shifts = prior[:rank], prior[rank:]
        if min(variances) < VARIANCE_BITS_MIN or max(variances) > VARIANCE_BITS_MAX:
            raise PatchError("a basis has a variance out of bounds")
        if max(shifts) > FORECAST_SHIFT_MAX:
            raise PatchError("a basis has a shift out of bounds")
        at = _BASIS.size + 2 * rank
        return cls(columns, rank, data[at : at + size], data[at + size :], prior)


@dataclass(frozen=True, slots=True)
class ContextRun:
    """Blocks that lie side by side in the result and in their tensor, and in the base if they have a place there.

    Attributes:
        layout: Row of the layout table, by wire number.
        flags: How they are coded.
        slot: Which model of codes they share, less than `SLOTS`.
        blocks: How many, at least 1.
        row_codes: Codes in one row of the tensor.
        first_block: Index of the first block in its tensor.
        base_offset: Where the counterpart starts, relative to the base window; None without one.
        gain: As in `tensor.Run`.
        basis: What `Flag.RANK` refers to.
    """

    layout: int
    flags: Flag
    slot: int
    blocks: int
    row_codes: int
    first_block: int
    base_offset: int | None
    gain: tuple[int, int] | None = None
    basis: Basis | None = None

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self.blocks * LAYOUT_BY_NUMBER[self.layout].block_bytes


def write_context_runs(runs: Sequence[ContextRun]) -> bytes:
    """Return the parameters of a segment."""
    out = bytearray()
    write_varint(len(runs), out)
    expected = 0
    for run in runs:
        out += bytes((run.layout, run.flags, run.slot))
        for value in (run.blocks, run.row_codes, run.first_block):
            write_varint(value, out)
        if run.base_offset is not None:
            write_signed(run.base_offset - expected, out)
            expected = run.base_offset + run.length
        if run.gain:
            out += GAIN.pack(*run.gain)
    return bytes(out)


def read_context_runs(
    parameters: bytes, result_length: int, window_length: int, basis: Basis | None
) -> list[ContextRun]:
    """Read and check the parameters of a segment: every run inside the window, together as long as the result.

    Args:
        parameters: From the segment.
        result_length: Of the segment.
        window_length: Of its base window.
        basis: What the last tables record brought.

    Raises:
        PatchError: Anything is out of bounds.
    """
    payload = Payload(parameters)
    runs: list[ContextRun] = []
    expected, left = 0, result_length
    for _ in range(payload.varint(RUNS_MAX)):
        run = _read_run(payload, left, expected, window_length, basis)
        if run.base_offset is not None:
            expected = run.base_offset + run.length
        left -= run.length
        runs.append(run)
    payload.expect_end()
    if left:
        raise PatchError(f"the runs of a segment leave {left} bytes out")
    return runs


def _read_run(
    payload: Payload, left: int, expected: int, window_length: int, basis: Basis | None
) -> ContextRun:
    number, flags, slot = payload.byte(), Flag(payload.byte()), payload.byte()
    if number not in LAYOUT_BY_NUMBER or slot >= SLOTS:
        raise PatchError(f"a run has the unknown layout {number}, or the slot {slot}")
    layout = LAYOUT_BY_NUMBER[number]
    blocks = payload.varint(left // layout.block_bytes)
    row_codes, first_block = payload.varint(_ROW_CODES_MAX), payload.varint(_BLOCKS_MAX)
    if blocks == 0 or row_codes == 0:
        raise PatchError("a run has no blocks, or rows without codes")
    base_offset = None
    if Flag.BASE in flags:
        base_offset = expected + payload.signed(2 * window_length)
        if base_offset < 0 or base_offset + blocks * layout.block_bytes > window_length:
            raise PatchError("a run lies outside its base window")
    gain = None
    if Flag.GAIN in flags:
        gain = check_gain(layout, *GAIN.unpack(payload.take(GAIN.size)))
    run = ContextRun(
        number,
        flags,
        slot,
        blocks,
        row_codes,
        first_block,
        base_offset,
        gain,
        basis if Flag.RANK in flags else None,
    )
    check_run(run)
    return run


def check_run(run: ContextRun) -> None:
    """Check what a coder relies on: it may index by columns and look ahead to the end of a row.

    Raises:
        PatchError: The run's flags, rows or basis do not fit its layout.
    """
    name, layout = NAME_BY_NUMBER[run.layout], LAYOUT_BY_NUMBER[run.layout]
    has_scales = layout.formula is not Formula.PLAIN or layout.codebook
    if has_scales and run.row_codes % layout.codes.count:
        raise PatchError(f"rows of {run.row_codes} codes are not whole blocks of {name}")
    if Flag.LATTICE in run.flags and name not in {*DIVISORS, *SCALED, Layout.F32, Layout.RAW}:
        raise PatchError(f"{name} has neither a lattice of scales nor scales of columns")
    if Flag.SCALES in run.flags and Flag.DRIFT in run.flags and name in SCALED:
        raise PatchError(f"columns of {name} cannot have scales and drift")
    if (Flag.GAIN in run.flags) != (run.gain is not None) or (run.gain and not takes_gain(layout)):
        raise PatchError(f"{name} takes no gain")
    if Flag.RANK not in run.flags:
        return
    basis = run.basis
    row_blocks = run.row_codes // layout.codes.count
    if basis is None or name not in RANKED or basis.columns != run.row_codes:
        raise PatchError("a run refers to a basis that does not fit it")
    if Flag.BASE not in run.flags or run.first_block % row_blocks or run.blocks % row_blocks:
        raise PatchError("a run with a basis does not consist of whole rows")
