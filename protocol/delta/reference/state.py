"""What the context coder keeps between blocks and between segments, with the bytes of the library's struct. SPEC section 6.11."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Final, NamedTuple, Self

import numpy as np

from protocol.delta.context_tables import (
    CHANCE_START,
    CHANGE,
    CONTINUE,
    GRID_START,
    LEAN_START,
    NEAR,
    OFFSETS,
    SCALE_SPREADS,
    SPREADS,
)
from protocol.delta.reference.arithmetic import clamp
from protocol.delta.reference.coder import COUNT_BITS, ONE
from protocol.delta.runs import COLUMNS_MAX, RANK_MAX, SLOTS

VERSION: Final = 1
UNKNOWN: Final = -(1 << 31)
"""For a logarithm that is not known yet."""

SPREAD_UNITS: Final = 12
"""Fractional bits of tracked logarithms."""

SPREAD_LIMIT: Final = 64 << SPREAD_UNITS
NUMBER_COUNTERS: Final = 96
"""Counters of `Coder.number`: nonzero, negative, the bit length in unary, the bit below the highest."""

EDGES, CHANCES, GRID_MAX, GRID_CHANCES, LEANS, WORD_LEVELS = 2, 24, 10, 48, 24, 16
_IN_UNITS_LIMIT: Final = 1 << 54


class Model(NamedTuple):
    """How codes and scales change, as places of counters in the list of all. Runs that share a slot share a model."""

    change: int
    activity: int
    near: int
    grid: int
    grid_near: int
    more: int
    quiet: int
    scale_change: int
    scale_history: int
    scale_near: int
    scale_more: int
    scale_flip: int
    scale_far: int
    sub_change: int
    sub_near: int
    sub_more: int
    half: int
    fresh: int
    spread: int  # mean log2 of b in the tensor before, units of 2**-12; UNKNOWN before the first
    reserved: int


_SIZES: Final = Model(
    change=EDGES * OFFSETS * SPREADS,
    activity=CHANCES * 4 * 2 * 3,
    near=OFFSETS * SPREADS,
    grid=GRID_CHANCES * (GRID_MAX + 1),
    grid_near=LEANS * (GRID_MAX + 1),
    more=2 * SPREADS * 16,
    quiet=64 * 2 * 4,
    scale_change=SCALE_SPREADS * 8 * 6 * 2,
    scale_history=SCALE_SPREADS * 64,
    scale_near=SCALE_SPREADS * 8 * 6,
    scale_more=SCALE_SPREADS * 2 * 16,
    scale_flip=3 * 12,
    scale_far=NUMBER_COUNTERS,
    sub_change=2 * 4 * 3 * 2,
    sub_near=2 * 4,
    sub_more=2 * 16,
    half=2 * 8 * NUMBER_COUNTERS,
    fresh=2 * 256,
    spread=1,
    reserved=1,
)
_HEAD: Final = 2  # size and version
_MODEL: Final = sum(_SIZES)
MODELS: Final = tuple(Model(*accumulate(_SIZES[:-1], initial=_HEAD + slot * _MODEL)) for slot in range(SLOTS))
WORDS: Final = _HEAD + SLOTS * _MODEL
FRESH_WORDS: Final = WORDS + 2 * WORD_LEVELS * NUMBER_COUNTERS
_COUNTERS: Final = FRESH_WORDS + 4 * 256

_TENSOR: Final = np.dtype(
    [
        ("drift_xy", "<i8"),
        ("drift_xx", "<i8"),
        ("variance", "<i8", RANK_MAX),
        ("right", "<i8", RANK_MAX),
        ("normal", "<i8", RANK_MAX * RANK_MAX),
        ("coefficient", "<i4", RANK_MAX),
        ("expected", "<i4", RANK_MAX),
        ("forecast", "<i4", RANK_MAX),
        ("mean", "<i4", RANK_MAX),
        ("row", "<i4"),
        ("row_spread", "<i4"),
        ("row_weight", "<i4"),
        ("mean_row_spread", "<i4"),
        ("drift", "<i4"),
        ("mean_drift", "<i4"),
        ("unit", "<i4"),
        ("scale_last", "<i4"),
        ("scale_before", "<i4"),
        ("half_last", "<i4", 2),
        ("half_before", "<i4", 2),
        ("last_change", "<i4"),
        ("before_change", "<i4"),
        ("is_left_busy", "<i4"),
        ("word_level", "<i4"),
        ("spread", "<i4", COLUMNS_MAX),
        ("drift_mean", "<i4", COLUMNS_MAX),
        ("weight", "<u2", COLUMNS_MAX),
        ("above", "u1", COLUMNS_MAX),
        ("busy", "u1", COLUMNS_MAX // 16),
    ],
    align=True,
)
_STATE: Final = np.dtype([("counters", "<u4", _COUNTERS), ("tensor", _TENSOR)], align=True)


@dataclass(slots=True)
class Tensor:
    """What is known of the tensor that is being coded. In wider tensors columns share entries."""

    drift_xy: int
    drift_xx: int
    variance: list[int]  # of what is expected of a coefficient, units of 2**-24
    right: list[int]
    normal: list[int]
    coefficient: list[int]  # of this row on the basis, units of 2**-12
    expected: list[int]  # before the row was seen
    forecast: list[int]  # from the old row alone
    mean: list[int]  # of what forecasts miss
    row: int
    row_spread: int  # log2 of this row's factor on b
    row_weight: int  # how sure that is
    mean_row_spread: int
    drift: int  # this row's factor on the columns' drift, units of 2**-14
    mean_drift: int
    unit: int  # log2 of the unit of drift, about 1/256 step; UNKNOWN at first
    scale_last: int
    scale_before: int
    half_last: list[int]
    half_before: list[int]
    last_change: int
    before_change: int
    is_left_busy: int
    word_level: int
    spread: list[int]  # log2 of b, units of 2**-12
    drift_mean: list[int]  # mean change, units of 2**(unit - 4); or ratios of scales less 1, units of 2**-16
    weight: list[int]  # Fisher information about spread, units of 1/16
    above: list[int]  # whether the code in the row above changed
    busy: list[int]  # the group above: whether a code changed, and twice how its scale did

    @classmethod
    def of(cls, record: Any) -> Self:
        """Return the contents of a record of the state."""
        return cls(**{field.name: record[field.name].tolist() for field in fields(cls)})

    def restart(self, prior: bytes, model_spread: int, *, keeps_ratios: bool) -> None:
        """Forget everything: a tensor starts.

        Args:
            prior: Logarithms of the variances that its coefficients have, one for each direction.
            model_spread: Where the slot's tensor before has come to, or `UNKNOWN`.
            keeps_ratios: The scales of its columns came before it.
        """
        fresh = Tensor.of(np.zeros((), _TENSOR))
        for field in fields(self):
            if field.name != "drift_mean" or not keeps_ratios:
                setattr(self, field.name, getattr(fresh, field.name))
        self.row = -1
        self.unit = UNKNOWN
        self.variance[: len(prior)] = [1 << bits for bits in prior]
        start = 8 << SPREAD_UNITS if model_spread == UNKNOWN else model_spread
        self.spread = [start] * COLUMNS_MAX
        self.weight = [8 * 16] * COLUMNS_MAX

    def in_units(self, value: int) -> int:
        """Return a weight or a step in the tensor's unit."""
        value = clamp(value, -_IN_UNITS_LIMIT, _IN_UNITS_LIMIT)
        return value >> self.unit if self.unit > 0 else value << -self.unit


@dataclass(slots=True)
class State:
    """A state taken apart: all counters, with the few words between them, and the tensor.

    Attributes:
        counters: Each the probability of a one in 22 bits, then how often it was asked in 10; see `Model`.
        tensor: The one that is being coded.
    """

    counters: list[int]
    tensor: Tensor

    @classmethod
    def unpack(cls, data: bytearray) -> Self:
        """Read the bytes of a state."""
        record = np.frombuffer(data, _STATE)[0]
        return cls(record["counters"].tolist(), Tensor.of(record["tensor"]))

    def pack_into(self, data: bytearray) -> None:
        """Write the bytes of a state."""
        record = np.zeros(1, _STATE)
        record["counters"] = self.counters
        for field in fields(Tensor):
            record["tensor"][field.name] = getattr(self.tensor, field.name)
        data[:] = record.tobytes()

    def spread(self, model: Model) -> int:
        """Return where tensors of a model start."""
        value = self.counters[model.spread]
        return value - (1 << 32) if value >> 31 else value

    def set_spread(self, model: Model, value: int) -> None:
        """Keep where the next tensor of a model starts."""
        self.counters[model.spread] = value & 0xFFFFFFFF


def state_bytes() -> int:
    """Return the length of a state."""
    return _STATE.itemsize


def reset(data: bytearray) -> None:
    """Make `data` that of a coder that has seen nothing."""
    counters = [0] * _COUNTERS
    counters[:_HEAD] = _STATE.itemsize, VERSION
    for model in MODELS:
        _reset_model(counters, model)
    counters[WORDS:] = [_counter(_part(1, 2))] * (_COUNTERS - WORDS)
    state = State(counters, Tensor.of(np.zeros((), _TENSOR)))
    state.pack_into(data)


def _counter(probability: int) -> int:
    return probability << COUNT_BITS


def _part(count: int, of: int) -> int:
    return ONE // of * count


def _reset_model(counters: list[int], model: Model) -> None:
    starts: dict[str, int | Sequence[int]] = {
        "change": EDGES * CHANGE,
        "activity": [chance for chance in CHANCE_START for _ in range(24)],
        "near": NEAR,
        "grid": [chance for chance in GRID_START for _ in range(GRID_MAX + 1)],
        "grid_near": [chance for chance in LEAN_START for _ in range(GRID_MAX + 1)],
        "more": 2 * CONTINUE,
        "quiet": _part(9, 10),
        "scale_change": _part(4, 10),
        "scale_history": _part(4, 10),
        "scale_near": _part(1, 2),
        "scale_more": _part(3, 10),
        "scale_flip": _part(1, 1024),
        "scale_far": _part(1, 2),
        "sub_change": _part(1, 4),
        "sub_near": _part(8, 10),
        "sub_more": _part(1, 4),
        "half": _part(1, 2),
        "fresh": _part(1, 2),
    }
    for name, start in starts.items():
        at, size = getattr(model, name), getattr(_SIZES, name)
        values = [start] * size if isinstance(start, int) else start
        counters[at : at + size] = map(_counter, values)
    counters[model.spread] = UNKNOWN & 0xFFFFFFFF
