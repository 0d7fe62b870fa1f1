"""Calls of the context coder in plain Python: the same functions as `protocol/delta/native/context.py`. SPEC section 6.11."""

from collections.abc import Sequence
from itertools import chain
from typing import Final

from protocol.delta.reference.arithmetic import STEP, clamp, quotient, ratio_of, wide
from protocol.delta.reference.blocks import Kind, Parts, join, split
from protocol.delta.reference.coder import Coder, Decoder, Encoder
from protocol.delta.reference.expect import RATIO_LIMIT
from protocol.delta.reference.fresh import code_fresh
from protocol.delta.reference.groups import code_group
from protocol.delta.reference.run import GROUP_MAX, Context, Group
from protocol.delta.reference.scales import code_half, code_scale, code_subs, scale_bits, scale_from
from protocol.delta.reference.state import SPREAD_LIMIT, UNKNOWN, State, reset, state_bytes
from protocol.delta.reference.words import code_words
from protocol.delta.runs import ContextRun, Flag

__all__ = ["decode", "encode", "reset", "state_bytes"]

_BATCH_CODES: Final = 1 << 12
"""Codes taken apart at once: a list takes eight times the memory of its bytes, and more."""

_ROWS_MAX: Final = 1 << 24
_OLD_LIMIT: Final = 1 << 24


def encode(state: bytearray, runs: Sequence[ContextRun], window: bytes, result: bytes) -> bytes:
    """Return the payload for `result`, and move `state` on."""
    unpacked = State.unpack(state)
    coder = Encoder(unpacked.counters)
    _code_runs(unpacked, coder, runs, window, result)
    unpacked.pack_into(state)
    # No decision costs more than 22 bits; a segment that needs more room than its result is sent raw anyway.
    payload = coder.finish(2 * len(result) + 1024)
    return result + bytes(1) if payload is None else payload


def decode(state: bytearray, runs: Sequence[ContextRun], window: bytes, payload: bytes) -> bytes | None:
    """Return the result, and move `state` on; None for a payload with bytes too many."""
    unpacked = State.unpack(state)
    coder = Decoder(unpacked.counters, payload)
    result = _code_runs(unpacked, coder, runs, window, None)
    unpacked.pack_into(state)
    return result if coder.is_used_up else None


def _code_runs(
    state: State, coder: Coder, runs: Sequence[ContextRun], window: bytes, result: bytes | None
) -> bytes:
    out = bytearray()
    for run in runs:
        x = Context.of(run, coder, state)
        if Flag.START in run.flags:
            prior = run.basis.prior[: run.basis.rank] if run.basis else b""
            keeps_ratios = x.has_scales and x.shape.kind is not Kind.FLOAT
            state.tensor.restart(prior, state.spread(x.model), keeps_ratios=keeps_ratios)
        new = memoryview(result)[len(out) : len(out) + run.length] if result is not None else None
        old = (
            None
            if run.base_offset is None
            else memoryview(window)[run.base_offset : run.base_offset + run.length]
        )
        out += _code_run(x, old, new, run.length)
        if old is not None and not x.shape.is_words:
            _remember(x)
    return bytes(out)


def _remember(x: Context) -> None:
    """The next tensor of this slot starts from what this one has come to."""
    mean = quotient(sum(x.tensor.spread[: x.columns]), x.columns) + x.tensor.mean_row_spread
    x.state.set_spread(x.model, clamp(mean, -SPREAD_LIMIT, SPREAD_LIMIT))


def _code_run(x: Context, old: memoryview | None, new: memoryview | None, length: int) -> bytes:
    """Code a run in pieces of whole groups, so that temporaries stay small."""
    size, count = x.shape.layout.block_bytes, x.shape.count
    step = size * max(_BATCH_CODES // count, 1)
    out = bytearray()
    for start in range(0, length, step):
        end = min(start + step, length)
        piece = new[start:end] if new is not None else memoryview(bytes(end - start))
        if old is None:
            out += code_fresh(x, piece)
        elif x.shape.is_words:
            out += code_words(x, old[start:end], piece)
        elif x.shape.kind is Kind.PLAIN:
            out += _code_plain(x, old[start:end], piece)
        else:
            out += _code_blocks(x, old, start, piece)
    return bytes(out)


def _start_row(x: Context, old_row: list[int] | None) -> None:
    t = x.tensor
    if t.row >= 0:
        t.mean_row_spread += quotient(t.row_spread - t.mean_row_spread, 6)
        t.mean_drift += quotient(t.drift - t.mean_drift, 20)
    t.row = min(t.row + 1, _ROWS_MAX)
    if x.directions:
        x.directions.start_row(t, old_row)
    t.row_spread = t.mean_row_spread
    t.row_weight = 6 * 16
    t.drift = t.mean_drift
    t.drift_xy = t.drift_xx = 0
    t.last_change = t.before_change = t.is_left_busy = 0
    t.scale_last = t.scale_before = 0


def _code_codes(x: Context, g: Group, old: list[int], wanted: list[int]) -> list[int]:
    """Code codes of one step, cut where rows end. `wanted` is empty for a reader."""
    found: list[int] = []
    is_plain, row_codes, columns = x.shape.kind is Kind.PLAIN, x.row_codes, x.columns
    done = 0
    while done < len(old):
        if x.in_row == 0 and is_plain:
            _start_row(x, None)
        g.column = x.in_row % columns
        end = done + min(GROUP_MAX, len(old) - done, columns - g.column, row_codes - x.in_row)
        g.old, g.wanted = old[done:end], wanted[done:end]
        found += code_group(x, g)
        x.in_row = (x.in_row + end - done) % row_codes
        done = end
    return found


def _code_plain(x: Context, old: memoryview, new: memoryview) -> bytes:
    """Code blocks whose scale is elsewhere: as many at once as make a group."""
    shape = x.shape
    before = list(chain.from_iterable(split(shape, old).codes))
    after = list(chain.from_iterable(split(shape, new).codes)) if x.coder.is_encoder else []
    group, found = Group(shape.low, shape.high), []
    for start in range(0, len(before), GROUP_MAX):
        end = start + GROUP_MAX
        found += _code_codes(x, group, before[start:end], after[start:end])
    codes = [found[start : start + shape.count] for start in range(0, len(found), shape.count)]
    return join(shape, Parts([], [], [], [], codes))


def _code_blocks(x: Context, run: memoryview, start: int, new: memoryview) -> bytes:
    """Code blocks that have scales; `run` is all of the run's counterpart, of which they begin at `start`."""
    size = x.shape.layout.block_bytes
    old, now = split(x.shape, run[start : start + len(new)]), split(x.shape, new)
    for b in range(len(old.codes)):
        if x.in_row == 0:
            _start_row(x, _old_row(x, run[start + b * size :]))
        group = Group(x.shape.low, x.shape.high)
        _code_scales(x, old, now, b, group)
        now.codes[b] = _code_block(x, old, now, b, group)
    return join(x.shape, now)


def _old_row(x: Context, data: memoryview) -> list[int] | None:
    """Return the weights of a row of the base, where they foretell its coefficients."""
    if not x.directions or not x.directions.has_forecast or x.tensor.unit == UNKNOWN:
        return None
    blocks = split(x.shape, data[: x.columns // x.shape.count * x.shape.layout.block_bytes])
    in_units = x.tensor.in_units
    steps = [scale_from(x, d).step for d in blocks.d]
    return [
        clamp(in_units(code * step), -_OLD_LIMIT, _OLD_LIMIT)
        for codes, step in zip(blocks.codes, steps, strict=True)
        for code in codes
    ]


def _code_scales(x: Context, old: Parts, now: Parts, b: int, g: Group) -> None:
    """Code the scale, the offset and the sub-scales of a block, and fill in the steps that they give."""
    shape = x.shape
    if shape.divisor:
        before = scale_from(x, old.d[b])
        after = code_scale(x, before, now.d[b], old.codes[b])
        now.d[b] = scale_bits(x, after)
        g.old_step, g.new_step = before.step, after.step
        return
    ratio = STEP
    if shape.d:
        now.d[b] = code_half(x, 0, old.d[b], now.d[b])
    if shape.m:
        now.m[b] = code_half(x, 1, old.m[b], now.m[b])
    if shape.kind is not Kind.INDEXED:
        g.old_step, g.new_step = wide(old.d[b]), wide(now.d[b])
        ratio = ratio_of(g.old_step, g.new_step, RATIO_LIMIT)
    if shape.kind is Kind.AFFINE:
        g.old_offset, g.new_offset = wide(old.m[b]), wide(now.m[b])
    if shape.sub:
        now.sub[b] = code_subs(x, 0, old.sub[b], now.sub[b], ratio, shape.sub_range)
    if shape.submin:
        ratio = ratio_of(wide(old.m[b]), wide(now.m[b]), RATIO_LIMIT)
        limits = 0, (1 << shape.submin.width) - 1
        now.submin[b] = code_subs(x, 1, old.submin[b], now.submin[b], ratio, limits)


def _code_block(x: Context, old: Parts, now: Parts, b: int, g: Group) -> list[int]:
    """Code the codes of a block whose scales are known."""
    shape = x.shape
    before, after = old.codes[b], now.codes[b] if x.coder.is_encoder else []
    if shape.kind not in {Kind.SUBSCALED, Kind.SUBSCALED_AFFINE}:
        return _code_codes(x, g, before, after)
    share = shape.count // len(old.sub[b])
    old_d, new_d, found = g.old_step, g.new_step, []
    for i, (old_sub, new_sub) in enumerate(zip(old.sub[b], now.sub[b], strict=True)):
        g.old_step, g.new_step = old_d * old_sub, new_d * new_sub
        if shape.submin:
            g.old_offset = -wide(old.m[b]) * old.submin[b][i]
            g.new_offset = -wide(now.m[b]) * now.submin[b][i]
        found += _code_codes(x, g, before[i * share : (i + 1) * share], after[i * share : (i + 1) * share])
    return found
