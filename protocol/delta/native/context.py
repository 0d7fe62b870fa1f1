"""Calls of the context coder in the library: structs as in model.h and layout.h, filled from the layout table and from runs."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Final

from protocol.delta.layouts import LAYOUTS, Bits, BlockLayout, Formula, Order, Words
from protocol.delta.native import library
from protocol.delta.runs import DIVISORS, ContextRun, Flag
from protocol.tensors.regions import Layout

NO_ROOM: Final = -2
NO_MEMORY: Final = -1

_KINDS: Final = {
    Formula.PLAIN: 0,
    Formula.SCALED: 1,
    Formula.AFFINE: 2,
    Formula.SUBSCALED: 3,
    Formula.SUBSCALED_AFFINE: 4,
}
_INDEXED, _FLOAT, _WORD = 5, 6, 7
_EXPONENT_BITS: Final = {Layout.F16: 5, Layout.F32: 8, Layout.BF16: 8}

_int32, _int64 = ctypes.c_int32, ctypes.c_int64


class _Slice(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]  # the stubs' type is wider than any list
        (name, _int32) for name in ("byte", "count", "shift", "width", "element", "to", "stride")
    ]


class _Field(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]  # the stubs' type is wider than any list
        (name, _int32) for name in ("first", "slices", "count", "width", "flip")
    ]


class _Layout(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]  # the stubs' type is wider than any list
        *((name, _int32) for name in ("kind", "block_bytes", "zero", "sub_zero", "is_signed")),
        *((name, _int32) for name in ("word_bytes", "exponent_bits", "d_at", "m_at", "divisor")),
        *((name, _Field) for name in ("codes", "sub", "submin")),
    ]


class _Run(ctypes.Structure):
    _fields_ = [  # type: ignore[mutable-override]  # the stubs' type is wider than any list
        *((name, _int32) for name in ("layout", "flags", "slot", "row_codes")),
        *((name, _int64) for name in ("blocks", "base_offset", "first_block")),
        *((name, _int32) for name in ("gain", "offset", "rank", "is_start")),
        *((name, ctypes.c_char_p) for name in ("basis", "forecast", "prior")),
    ]


class _Table:
    """The layout table as the library reads it."""

    def __init__(self) -> None:
        self.index = {layout.number: at for at, layout in enumerate(LAYOUTS.values())}
        self._slices: list[_Slice] = []
        rows = [self._row(name, layout) for name, layout in LAYOUTS.items()]
        self.layouts = (_Layout * len(rows))(*rows)
        self.slices = (_Slice * len(self._slices))(*self._slices)

    def _row(self, name: Layout, layout: BlockLayout) -> _Layout:
        fields = {field.name: field for field in layout.fields}
        codes = layout.codes
        kind, word_bytes = _KINDS[layout.formula], 0
        if is_words(name):
            kind = _FLOAT if isinstance(codes, Words) and codes.order is Order.FLOAT else _WORD
            word_bytes = codes.width // 8
        elif layout.codebook:
            kind = _INDEXED
        d, m = fields.get("d"), fields.get("m") or fields.get("dmin")
        has_half = isinstance(d, Words) and d.width == 16
        sub = fields.get("sub") if has_half or d is None else d
        return _Layout(
            kind,
            layout.block_bytes,
            layout.zero,
            layout.sub_zero,
            layout.is_signed,
            word_bytes,
            _EXPONENT_BITS.get(name, 4 if kind == _FLOAT else 0),
            d.byte if isinstance(d, Words) and has_half else -1,
            m.byte if isinstance(m, Words) else -1,
            DIVISORS.get(name, 0),
            _Field() if word_bytes else self._field(codes),
            self._field(sub),
            self._field(fields.get("submin")),
        )

    def _field(self, field: Words | Bits | None) -> _Field:
        if field is None:
            return _Field()
        first = len(self._slices)
        if isinstance(field, Words):
            self._slices.append(_Slice(field.byte, field.count, 0, 8, 0, 0, 1))
            return _Field(first, 1, field.count, 8, 0)
        for part in field.slices:
            values = (part.byte, part.count, part.shift, part.width, part.element, part.to, part.stride)
            self._slices.append(_Slice(*values))
        return _Field(first, len(field.slices), field.count, field.width, field.flip)


def is_words(name: Layout) -> bool:
    """Tell whether a layout is coded by whole words: floating-point numbers, wide integers, and bytes of no known meaning."""
    codes = LAYOUTS[name].codes
    if name is Layout.RAW:
        return True
    return isinstance(codes, Words) and (codes.width > 8 or codes.order is Order.FLOAT)


@functools.cache
def _table() -> _Table:
    return _Table()


@functools.cache
def _library() -> ctypes.CDLL | None:
    loaded = library()
    if loaded is not None:
        loaded.whimbrel_state_bytes.restype = ctypes.c_size_t
        loaded.whimbrel_state_reset.restype = None
        pointers: list[Any] = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            _int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
        ]
        loaded.whimbrel_encode.argtypes = [*pointers, ctypes.c_char_p, ctypes.c_void_p, _int64]
        loaded.whimbrel_decode.argtypes = [*pointers, ctypes.c_void_p, ctypes.c_char_p, _int64]
        loaded.whimbrel_encode.restype = loaded.whimbrel_decode.restype = _int64
    return loaded


def is_available() -> bool:
    """Tell whether there is a library to call."""
    return _library() is not None


def state_bytes() -> int:
    """Length of a state."""
    loaded = _library()
    assert loaded is not None
    return int(loaded.whimbrel_state_bytes())


def reset(state: bytearray) -> None:
    """Make `state` that of a coder that has seen nothing."""
    loaded = _library()
    assert loaded is not None
    loaded.whimbrel_state_reset(_address(state))


def encode(state: bytearray, runs: Sequence[ContextRun], window: bytes, result: bytes) -> bytes:
    """Return the payload for `result`, and move `state` on."""
    loaded = _library()
    assert loaded is not None
    # No decision costs more than 22 bits; a segment that needs more room than its result is sent raw anyway.
    out = bytearray(2 * len(result) + 1024)
    length = loaded.whimbrel_encode(*_arguments(state, runs), window, result, _address(out), len(out))
    if length == NO_MEMORY:
        raise MemoryError
    return bytes(out[:length]) if length != NO_ROOM else result + bytes(1)


def decode(state: bytearray, runs: Sequence[ContextRun], window: bytes, payload: bytes) -> bytes | None:
    """Return the result, and move `state` on; None for a payload with bytes too many."""
    loaded = _library()
    assert loaded is not None
    result = bytearray(sum(run.length for run in runs))
    code = loaded.whimbrel_decode(*_arguments(state, runs), window, _address(result), payload, len(payload))
    if code == NO_MEMORY:
        raise MemoryError
    return bytes(result) if code == 0 else None


def _address(buffer: bytearray) -> ctypes.Array[ctypes.c_char]:
    # Not a pointer made with ctypes.cast: that is part of a cycle, and would keep the buffer until the collector runs.
    return (ctypes.c_char * len(buffer)).from_buffer(buffer)


def _arguments(
    state: bytearray, runs: Sequence[ContextRun]
) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[_Run], int, ctypes.Array[_Layout], ctypes.Array[_Slice]]:
    table = _table()
    assert len(state) == state_bytes()  # the library writes all of it
    return (
        _address(state),
        (_Run * len(runs))(*(_run(run, table) for run in runs)),
        len(runs),
        table.layouts,
        table.slices,
    )


def _run(run: ContextRun, table: _Table) -> _Run:
    gain, offset = run.gain or (0, 0)
    basis = run.basis
    return _Run(
        table.index[run.layout],
        run.flags & ~Flag.START & ~Flag.RANK,
        run.slot,
        run.row_codes,
        run.blocks,
        run.base_offset or 0,
        run.first_block,
        gain,
        offset,
        basis.rank if basis else 0,
        bool(run.flags & Flag.START),
        basis.directions if basis else None,
        (basis.forecast or None) if basis else None,
        basis.prior if basis else None,
    )
