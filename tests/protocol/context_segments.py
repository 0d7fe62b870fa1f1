"""Segments of the context coder for tests, and the comparison of everything that codes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from protocol.delta.layouts import LAYOUTS
from protocol.delta.native import context as native
from protocol.delta.reference import context as reference
from protocol.delta.reference.scales import lattice
from protocol.delta.runs import DIVISORS, SCALED, Basis, ContextRun, Flag, check_run
from protocol.delta.tensor import takes_gain
from protocol.tensors import Layout
from tests.protocol.model_files import blocks, moved_blocks

needs_library = pytest.mark.skipif(
    not native.is_available(), reason="no compiled library here: the reference is tested alone"
)


@dataclass(frozen=True)
class Segment:
    """What an encoder is given."""

    runs: Sequence[ContextRun]
    window: bytes
    result: bytes

    def with_flags(self, flags: Flag) -> "Segment":
        """Return the segment with more flags on all its runs."""
        return replace(self, runs=[replace(run, flags=run.flags | flags) for run in self.runs])


def new_state() -> bytearray:
    """Return the state of a coder that has seen nothing."""
    state = bytearray(reference.state_bytes())
    reference.reset(state)
    return state


def check(segments: Iterable[Segment], state: bytes | None = None) -> list[bytes]:
    """Code segments one after the other with all that can, and compare payloads, results and states. Returns the payloads."""
    coders = [reference, native] if native.is_available() else [reference]
    writers = [bytearray(state or new_state()) for _ in coders]
    readers = [bytearray(writer) for writer in writers]
    payloads = []
    for segment in segments:
        for run in segment.runs:
            check_run(run)
        found = {
            coder.encode(writer, segment.runs, segment.window, segment.result)
            for coder, writer in zip(coders, writers, strict=True)
        }
        assert len(found) == 1
        payload = found.pop()
        for coder, reader in zip(coders, readers, strict=True):
            assert coder.decode(reader, segment.runs, segment.window, payload) == segment.result
        assert all(state == writers[0] for state in (*writers, *readers))
        payloads.append(payload)
    return payloads


def check_payload(segment: Segment, payload: bytes, state: bytes | bytearray) -> bytes | None:
    """Decode any payload with all that can, and compare results and states. Returns the result."""
    ours = bytearray(state)
    result = reference.decode(ours, segment.runs, segment.window, payload)
    if native.is_available():
        theirs = bytearray(state)
        assert native.decode(theirs, segment.runs, segment.window, payload) == result
        assert theirs == ours
    assert result is None or len(result) == len(segment.result)
    return result


def flag_sets(name: Layout) -> list[Flag]:
    """Return combinations of all flags that a run of a layout may have."""
    every = Flag.SPARSE | Flag.DRIFT | Flag.GRID
    found = [Flag(0), Flag.BASE, *(Flag.BASE | flag for flag in (*every, every))]
    if takes_gain(LAYOUTS[name]):
        found += [Flag.BASE | Flag.GAIN, Flag.BASE | Flag.GAIN | every]
    if name in DIVISORS:
        found += [Flag.BASE | Flag.LATTICE, Flag.BASE | Flag.LATTICE | every]
        found += [Flag.BASE | Flag.RANK, Flag.BASE | Flag.RANK | Flag.LATTICE | Flag.SPARSE | Flag.GRID]
    if name in SCALED:
        found += [Flag.BASE | Flag.SCALES, Flag.BASE | Flag.SCALES | Flag.GAIN | Flag.SPARSE]
        found += [Flag.BASE | Flag.RANK, Flag.BASE | Flag.RANK | every]
        found.append(Flag.BASE | Flag.RANK | Flag.SCALES)
    if name in {Layout.F32, Layout.RAW}:
        found.append(Flag.BASE | Flag.SCALES)
    return found


def basis_for(columns: int, rank: int, seed: int, *, has_forecast: bool) -> Basis:
    """Return a basis of random directions."""
    rng = np.random.default_rng(seed)

    def directions() -> bytes:
        return rng.integers(-128, 128, rank * columns, np.int8).tobytes()

    prior = bytes([*rng.integers(12, 41, rank), *rng.integers(0, 41, rank)])
    return Basis(columns, rank, directions(), directions() if has_forecast else b"", prior)


def on_lattice(name: Layout, data: bytes) -> bytes:
    """Return blocks whose scales are such as come from bfloat16 maxima."""
    fields = LAYOUTS[name].split(np.frombuffer(data, np.uint8).reshape(-1, LAYOUTS[name].block_bytes))
    scales = np.array(lattice(DIVISORS[name]).scale_of, np.uint16)
    # Maxima of about 0.02 to 0.6, several of which fall on each scale.
    fields["d"] = scales[0x3CA0 + fields["d"] % 0x280] | fields["d"] & 0x8000
    return LAYOUTS[name].join(fields).tobytes()


def tensor(name: Layout, flags: Flag, seed: int, count: int, share: float = 0.1) -> tuple[bytes, bytes]:
    """Return blocks of a base, and what has become of them."""
    old = blocks(name, count, seed)
    new = moved_blocks(name, old, seed + 1, share)
    has_lattice = Flag.LATTICE in flags and name in DIVISORS
    return (on_lattice(name, old), on_lattice(name, new)) if has_lattice else (old, new)


def scaled_by_columns(update: float, columns: int = 64, rows: int = 40) -> Segment:
    """Return weights of eight bits after some training, with a scale for each column before them; START is set, SCALES is not."""
    rng = np.random.default_rng(12)
    weights = 0.02 * rng.standard_normal((rows, columns))
    versions = []
    after = weights + update * rng.standard_normal(weights.shape)
    # The first row has the largest weights, by which columns are scaled.
    weights[0], after[0] = 0.1, 0.1 + 0.01 * rng.standard_normal(columns)
    for moved in (weights, after):
        scales = (np.abs(moved).max(axis=0) / 127).astype(np.float32)
        versions.append(scales.tobytes() + np.rint(moved / scales).astype(np.int8).tobytes())
    flags = Flag.START | Flag.BASE
    runs = [
        ContextRun(LAYOUTS[Layout.F32].number, flags, 0, columns, columns, 0, 0),
        ContextRun(LAYOUTS[Layout.I8].number, flags, 0, rows * columns, columns, 0, 4 * columns),
    ]
    return Segment(runs, versions[0], versions[1])


def three_segments(
    name: Layout, flags: Flag, *, has_forecast: bool = False, seed: int = 1, rows: int = 4
) -> list[Segment]:
    """Return two tensors and a little that is new, cut twice: within a row where rows may be cut.

    Args:
        name: Of their layout.
        flags: Of the runs that may have a base.
        has_forecast: Whether a basis foretells where rows go.
        seed: Gives the blocks.
        rows: Of each tensor, at least 2.
    """
    layout = LAYOUTS[name]
    row_codes = max(64, 2 * layout.codes.count)
    row = row_codes // layout.codes.count
    basis = basis_for(row_codes, 3, seed, has_forecast=has_forecast) if Flag.RANK in flags else None
    gain = (60_000, 9_000) if Flag.GAIN in flags else None
    cut = rows // 2 * row + (0 if basis else row // 2)
    tensors = [tensor(name, flags, seed + k, row * rows) for k in (0, 10)]
    # The second tensor lies first in the base.
    window = tensors[1][0] + b"between" + tensors[0][0]
    starts = len(tensors[1][0]) + 7, 0
    size = layout.block_bytes

    def run(k: int, start: int, end: int) -> tuple[ContextRun, bytes]:
        place = starts[k] + start * size if Flag.BASE in flags else None
        first = Flag.START if start == 0 else Flag(0)
        made = ContextRun(layout.number, flags | first, k, end - start, row_codes, start, place, gain, basis)
        return made, tensors[k][1][start * size : end * size]

    fresh = ContextRun(layout.number, Flag.START, 2, row, row_codes, 0, None), blocks(name, row, seed + 20)
    parts = [run(0, 0, cut)], [run(0, cut, row * rows), run(1, 0, cut)], [run(1, cut, row * rows), fresh]
    return [Segment([r for r, _ in part], window, b"".join(data for _, data in part)) for part in parts]
