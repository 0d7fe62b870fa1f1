"""Fits the gain with which codes without scales in their block are predicted (ONNX int8: the scale is another tensor).

Only the writer comes here; floating point is allowed, because what it finds is sent and checked by counting.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUT_BY_NUMBER, NAME_BY_NUMBER, Array, BlockLayout
from protocol.delta.prediction import GAIN_SHIFT, predict_plain
from protocol.delta.tensor import GAIN_LIMIT, Run
from protocol.tensors.regions import Layout

_CODES_MIN = 256  # fewer values cannot pay for ten bytes of parameters
_MOVED_MIN = 0.15  # steps, for each code that changed: less is lost in what moved codes besides
_SPREAD_MIN = 1e-3  # of codes that are not all the same; single precision tells no less
_FITTED = {Layout.I8, Layout.U8, Layout.PACKED4, Layout.I4}


def with_gains(runs: Sequence[Run], result: bytes, window: bytes) -> list[Run]:
    """Return the runs, each with a gain where that predicts more codes exactly than the old codes themselves do."""
    fitted: list[Run] = []
    position = 0
    for run in runs:
        new = result[position : position + run.length]
        gain = None
        if run.base_offset is not None:
            gain = fit_gain(run, window[run.base_offset : run.base_offset + run.length], new)
        fitted.append(Run(run.layout, run.blocks, run.base_offset, gain))
        position += run.length
    return fitted


def fit_gain(run: Run, old: bytes, new: bytes, *, by_position: bool = False) -> tuple[int, int] | None:
    """Return gain and offset of a run, or None where they do not help.

    Args:
        run: The run.
        old: Its bytes in the base.
        new: Its bytes in the result.
        by_position: For a coder that uses the position within a code's cell: a gain helps it that moves no code to the next.
    """
    if NAME_BY_NUMBER[run.layout] not in _FITTED:
        return None
    layout = LAYOUT_BY_NUMBER[run.layout]
    return _fit(layout, _codes(layout, old), _codes(layout, new), by_position=by_position)


def _codes(layout: BlockLayout, data: bytes) -> Array:
    return layout.codes.split(np.frombuffer(data, np.uint8).reshape(-1, layout.block_bytes))


def _fit(layout: BlockLayout, old: Array, new: Array, *, by_position: bool) -> tuple[int, int] | None:
    changed = old != new
    changes = int(np.count_nonzero(changed))
    if old.size < _CODES_MIN or not changes:
        return None
    x, before, after = (_centred(layout, codes) for codes in (old.reshape(-1), old[changed], new[changed]))
    mean = float(x.mean(dtype=np.float64))
    spread = float(np.vdot(x, x)) / x.size - mean**2
    if spread < _SPREAD_MIN:
        return None
    # The slope is near 1: what changed says how near, and most codes did not.
    moves = (after - before).astype(np.float64)
    tilt = float((moves * (before - mean)).sum()) / x.size / spread
    shift = float(moves.sum()) / x.size - tilt * mean
    gain, offset = round((1 + tilt) * (1 << GAIN_SHIFT)), round(shift * (1 << GAIN_SHIFT))
    if abs(gain) > GAIN_LIMIT or abs(offset) > GAIN_LIMIT << 8:
        return None
    if by_position:
        x *= gain / (1 << GAIN_SHIFT) - 1
        x += offset / (1 << GAIN_SHIFT)
        moved = float(np.abs(x, out=x).mean())
        return (gain, offset) if moved > _MOVED_MIN * changes / x.size else None
    expected, _ = predict_plain(layout, old, gain, offset)
    better = np.count_nonzero(expected != new) < 0.98 * changes
    return (gain, offset) if better else None


def _centred(layout: BlockLayout, codes: Array) -> npt.NDArray[np.float32]:
    values = (codes.view(np.int8) if layout.is_signed else codes).astype(np.float32)
    values -= layout.zero
    return values
