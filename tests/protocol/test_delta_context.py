"""The context coder: the library and the Python reference give the same bytes, for everything that a caller may pass."""

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.delta.context import ContextModel
from protocol.delta.layouts import LAYOUTS
from protocol.delta.native import context as native
from protocol.delta.reference import context as reference
from protocol.delta.reference.coder import Encoder
from protocol.delta.reference.numbers import code_number
from protocol.delta.reference.scales import lattice
from protocol.delta.reference.state import MODELS, State
from protocol.delta.runs import (
    BASIS_BYTES_MAX,
    COLUMNS_MAX,
    DIVISORS,
    RANK_MAX,
    Basis,
    ContextRun,
    Flag,
    read_context_runs,
    write_context_runs,
)
from protocol.tensors import Layout
from tests.protocol.context_segments import (
    Segment,
    basis_for,
    check,
    check_payload,
    flag_sets,
    needs_library,
    new_state,
    on_lattice,
    scaled_by_columns,
    tensor,
    three_segments,
)
from tests.protocol.model_files import blocks
from tools import context_tables

_CASES = [(name, flags) for name in LAYOUTS for flags in flag_sets(name)]
_QUANTIZED = [Layout.Q4_0, Layout.Q4_1, Layout.Q5_0, Layout.Q5_1, Layout.Q8_0, Layout.TQ2_0, Layout.MXFP4]
_STATE_BYTES_MAX = 262_144


def _run(
    name: Layout, flags: Flag, count: int, row_codes: int, first_block: int = 0, basis: Basis | None = None
) -> ContextRun:
    place = 0 if Flag.BASE in flags else None
    gain = (70_000, -20_000) if Flag.GAIN in flags else None
    return ContextRun(LAYOUTS[name].number, flags, 0, count, row_codes, first_block, place, gain, basis)


@needs_library
def test_the_library_and_the_reference_agree_on_what_a_state_is() -> None:
    state = bytearray(b"\xaa" * native.state_bytes())
    native.reset(state)
    assert state == new_state()


def test_a_state_leaves_room_for_a_basis() -> None:
    assert reference.state_bytes() + BASIS_BYTES_MAX < _STATE_BYTES_MAX


@pytest.mark.parametrize(("name", "flags"), _CASES)
def test_segments_that_follow_each_other_are_coded_alike(name: Layout, flags: Flag) -> None:
    check(three_segments(name, flags))


@pytest.mark.parametrize("name", DIVISORS)
def test_old_rows_foretell_alike(name: Layout) -> None:
    segments = three_segments(name, Flag.BASE | Flag.RANK, has_forecast=True)
    assert check(segments) != check(three_segments(name, Flag.BASE | Flag.RANK))


@needs_library
@pytest.mark.parametrize("name", [Layout.Q4_0, Layout.Q6_K, Layout.I8, Layout.BF16])
def test_a_device_may_change_from_one_to_the_other_between_segments(name: Layout) -> None:
    segments = three_segments(name, Flag.BASE | Flag.SPARSE | Flag.DRIFT)
    payloads, state = check(segments), new_state()
    for segment, payload, coder in zip(segments, payloads, (native, reference, native), strict=True):
        assert coder.decode(state, segment.runs, segment.window, payload) == segment.result


def test_a_stored_model_is_taken_up_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = three_segments(Layout.Q5_K, Flag.BASE | Flag.SPARSE)
    payloads, model = check(segments), ContextModel()
    model.reset()
    for segment, payload in zip(segments, payloads, strict=True):
        assert model.decode(segment.runs, segment.window, payload) == segment.result
        monkeypatch.setattr(native, "is_available", lambda: False)
        model = ContextModel.load(model.dump())


def test_what_was_learned_makes_the_next_segment_smaller() -> None:
    first, second, _ = three_segments(Layout.Q4_0, Flag.BASE)
    alone = Segment([_started(run) for run in second.runs], second.window, second.result)
    assert len(check([first, second])[1]) < len(check([alone])[0])


def _started(run: ContextRun) -> ContextRun:
    return ContextRun(
        run.layout,
        run.flags | Flag.START,
        run.slot,
        run.blocks,
        run.row_codes,
        run.first_block,
        run.base_offset,
    )


@pytest.mark.parametrize("update", [0.001, 0.02, 0.3])
@pytest.mark.parametrize("name", _QUANTIZED)
def test_quantized_weights_after_a_little_training(name: Layout, update: float) -> None:
    rng = np.random.default_rng(5)
    weights = 0.02 * rng.standard_normal((24, 256))
    moved = weights + update * 0.02 * rng.standard_normal(weights.shape)
    old, new = (_quantized(name, values) for values in (weights, moved))
    every = Flag.SPARSE | Flag.DRIFT | Flag.GRID
    for flags in (Flag(0), every, *([every | Flag.LATTICE] if name in DIVISORS else [])):
        run = _run(name, Flag.START | Flag.BASE | flags, len(new) // LAYOUTS[name].block_bytes, 256)
        payload = check([Segment([run], old, new)])[0]
        assert len(payload) < len(new) * (0.1 if update < 0.01 else 0.9)


def _quantized(name: Layout, weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bytes:
    # Through bfloat16, as most models are published.
    bits = weights.astype(np.float32).view(np.uint32) & 0xFFFF0000
    quantized: bytes = gguf.quants.quantize(
        bits.view(np.float32), gguf.GGMLQuantizationType[name.name]
    ).tobytes()
    return quantized


@pytest.mark.parametrize("flags", [Flag(0), Flag.SPARSE | Flag.DRIFT])
@pytest.mark.parametrize("name", [Layout.Q4_0, Layout.TQ2_0, Layout.U8, Layout.F16, Layout.NVFP4])
def test_columns_of_rows_that_are_too_long_share_what_they_know(name: Layout, flags: Flag) -> None:
    count = LAYOUTS[name].codes.count
    row_codes = COLUMNS_MAX + 4 * max(count, 64)
    old, new = tensor(name, flags, 3, 2 * row_codes // count)
    check(
        [Segment([_run(name, Flag.START | Flag.BASE | flags, 2 * row_codes // count, row_codes)], old, new)]
    )


@pytest.mark.parametrize("row_codes", [1, 2, 7, 31, 33, 100])
@pytest.mark.parametrize("name", [Layout.I8, Layout.PACKED4, Layout.AWQ4, Layout.F32])
def test_rows_end_anywhere_in_a_group(name: Layout, row_codes: int) -> None:
    old, new = tensor(name, Flag(0), 4, 60, share=0.4)
    for flags in (Flag(0), Flag.SPARSE | Flag.DRIFT | Flag.GRID):
        check([Segment([_run(name, Flag.START | Flag.BASE | flags, 60, row_codes, 3)], old, new)])


def test_a_block_may_be_a_row() -> None:
    for name in (Layout.Q4_0, Layout.Q4_K):
        old, new = tensor(name, Flag(0), 4, 12, share=0.4)
        count = LAYOUTS[name].codes.count
        check([Segment([_run(name, Flag.START | Flag.BASE | Flag.DRIFT, 12, count)], old, new)])


@pytest.mark.parametrize("flags", [Flag(0), Flag.SPARSE | Flag.DRIFT | Flag.GRID])
@pytest.mark.parametrize(
    "name", [Layout.Q4_0, Layout.Q5_1, Layout.Q8_0, Layout.Q3_K, Layout.Q5_K, Layout.TQ2_0]
)
def test_scales_that_are_no_numbers_are_coded_alike(name: Layout, flags: Flag) -> None:
    halves = np.array(
        [0, 0x8000, 1, 0x8001, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7FFF, 0xFFFF, 0x3C00], np.uint16
    )
    rng = np.random.default_rng(6)
    count = len(halves) ** 2
    row = LAYOUTS[name]
    fields = [row.split(rng.integers(0, 256, (count, row.block_bytes), np.uint8)) for _ in range(2)]
    fields[1]["codes"] = fields[0]["codes"] ^ (rng.random(fields[0]["codes"].shape) < 0.1)
    for which in {"d", "m", "dmin"} & set(fields[0]):
        fields[0][which] = np.repeat(halves, len(halves))[:, None]
        fields[1][which] = np.tile(halves, len(halves))[:, None]
    old, new = (row.join(part).tobytes() for part in fields)
    check([Segment([_run(name, Flag.START | Flag.BASE | flags, count, row.codes.count * 4)], old, new)])


@pytest.mark.parametrize("rank", [1, RANK_MAX])
def test_rows_move_along_as_many_directions_as_there_may_be(rank: int) -> None:
    columns = 512
    basis = basis_for(columns, rank, 7, has_forecast=True)
    old, new = tensor(Layout.Q5_0, Flag(0), 8, columns // 32 * 8)
    flags = Flag.START | Flag.BASE | Flag.RANK
    check([Segment([_run(Layout.Q5_0, flags, columns // 32 * 8, columns, 0, basis)], old, new)])


def test_rows_that_move_along_a_basis_cost_less_with_it() -> None:
    rng = np.random.default_rng(9)
    weights = 0.02 * rng.standard_normal((96, 256))
    directions = np.clip(np.rint(40 * rng.standard_normal((2, 256))), -127, 127)
    moved = weights + 7e-6 * rng.standard_normal((96, 2)) @ directions  # by about a step
    old, new = (_quantized(Layout.Q8_0, values) for values in (weights, moved))
    basis = Basis(256, 2, directions.astype(np.int8).tobytes(), b"", bytes([30, 30, 0, 0]))
    flags = Flag.START | Flag.BASE
    plain = check([Segment([_run(Layout.Q8_0, flags, 96 * 8, 256)], old, new)])[0]
    along = check([Segment([_run(Layout.Q8_0, flags | Flag.RANK, 96 * 8, 256, 0, basis)], old, new)])[0]
    assert len(along) < 0.8 * len(plain)


def test_codes_of_eight_bits_that_move_along_a_basis_cost_less_with_it() -> None:
    rng = np.random.default_rng(9)
    weights = 25 * rng.standard_normal((128, 256))
    directions = np.clip(np.rint(50 * rng.standard_normal((1, 256))), -127, 127)
    moved = weights + 0.01 * rng.standard_normal((128, 1)) @ directions
    old, new = (np.clip(np.rint(values), -127, 127).astype(np.int8).tobytes() for values in (weights, moved))
    basis = Basis(256, 1, directions.astype(np.int8).tobytes(), b"", bytes([26, 0]))
    flags = Flag.START | Flag.BASE
    plain = check([Segment([_run(Layout.I8, flags, 128 * 256, 256)], old, new)])[0]
    along = check([Segment([_run(Layout.I8, flags | Flag.RANK, 128 * 256, 256, 0, basis)], old, new)])[0]
    assert len(along) < 0.9 * len(plain)


def test_codes_whose_columns_were_scaled_anew_cost_less_with_those_scales() -> None:
    segment = scaled_by_columns(0.0002)
    assert len(check([segment.with_flags(Flag.SCALES)])[0]) < 0.9 * len(check([segment])[0])


@pytest.mark.parametrize("old", [0.0, 1e-40, -0.5, 1.0, 3e38, float("inf")])
@pytest.mark.parametrize("new", [0.0, 1e-40, 0.25, -1.0, 3e38, float("nan")])
def test_scales_of_any_kind_are_coded_alike(old: float, new: float) -> None:
    segment = scaled_by_columns(0.001, rows=4)
    window, result = (
        np.full(64, scale, np.float32).tobytes() + data[256:]
        for scale, data in ((old, segment.window), (new, segment.result))
    )
    check([Segment(segment.with_flags(Flag.SCALES).runs, window, result)])


def test_a_basis_may_be_used_in_a_tensor_that_no_run_has_started() -> None:
    basis = basis_for(64, 4, 7, has_forecast=True)
    old, new = tensor(Layout.Q8_0, Flag(0), 8, 64)
    check([Segment([_run(Layout.Q8_0, Flag.BASE | Flag.RANK, 64, 64, 0, basis)], old, new)])


@pytest.mark.parametrize("divisor", DIVISORS.values())
def test_the_lattice_is_what_division_in_floating_point_gives(divisor: int) -> None:
    bits = np.arange(0x7F80, dtype=np.uint32)
    with np.errstate(over="ignore"):
        halves = ((bits << 16).view(np.float32) / np.float32(divisor)).astype(np.float16).view(np.uint16)
    assert lattice(divisor).scale_of[:0x7F80] == halves.tolist()


def test_a_payload_with_bytes_too_many_is_refused() -> None:
    segment = three_segments(Layout.Q4_0, Flag.BASE)[0]
    payload = check([segment])[0]
    assert check_payload(segment, payload + bytes(9), new_state()) is None
    assert check_payload(segment, payload, new_state()) == segment.result


@pytest.mark.parametrize(("name", "flags"), _CASES)
def test_damaged_payloads_have_the_same_result_everywhere(name: Layout, flags: Flag) -> None:
    segments = three_segments(name, flags, has_forecast=True)
    payload = check(segments[:1])[0]
    rng = np.random.default_rng(10)
    garbage = [rng.integers(0, 256, size, np.uint8).tobytes() for size in (7, 4 * len(payload))]
    flipped = bytearray(payload)
    flipped[len(flipped) // 3] ^= 0x10
    state = new_state()
    for wrong in (b"", payload[: len(payload) // 2], bytes(flipped), b"\xff" * len(payload), *garbage):
        check_payload(segments[0], wrong, state)


def test_a_state_that_garbage_has_left_is_still_a_state() -> None:
    rng = np.random.default_rng(11)
    state = new_state()
    for name in (Layout.Q4_0, Layout.Q6_K, Layout.BF16, Layout.Q8_0, Layout.I8):
        for segment in three_segments(name, Flag.BASE | Flag.DRIFT):
            reference.decode(state, segment.runs, segment.window, rng.bytes(500))
            check([segment], bytes(state))


@pytest.mark.parametrize("difference", [1 << 31, -(1 << 31), (1 << 47) - 1, -(1 << 46)])
def test_a_scale_that_no_half_can_reach_is_kept_within_what_there_is(difference: int) -> None:
    old, new = tensor(Layout.Q4_K, Flag(0), 8, 1)
    segment = Segment([_run(Layout.Q4_K, Flag.START | Flag.BASE, 1, 256)], old, new)
    state = State.unpack(new_state())
    coder = Encoder(state.counters)
    code_number(coder, MODELS[0].half, difference)  # the first decision of such a segment
    assert check_payload(segment, coder.finish(100) or b"", new_state()) is not None


@st.composite
def _segments(draw: st.DrawFn) -> Segment:
    """Any bytes under any parameters that a reader accepts."""
    runs, window, result = [], b"", b""
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(LAYOUTS)))
        flags = draw(st.sampled_from(flag_sets(name))) | draw(st.sampled_from([Flag(0), Flag.START]))
        layout = LAYOUTS[name]
        unit = layout.codes.count if layout.codes.count >= 32 else 32 if Flag.RANK in flags else 1
        row_codes = unit * draw(st.integers(1, 5))
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        basis = None
        if Flag.RANK in flags:
            basis = basis_for(row_codes, draw(st.integers(1, 5)), 1, has_forecast=draw(st.booleans()))
        row = row_codes // layout.codes.count if basis else 1
        count = row * draw(st.integers(1, 12))
        old, new = rng.bytes(count * layout.block_bytes), rng.bytes(count * layout.block_bytes)
        if draw(st.booleans()):
            new = bytes(np.where(rng.random(len(old)) < 0.1, list(new), list(old)).astype(np.uint8))
        if Flag.LATTICE in flags and name in DIVISORS:
            new = on_lattice(name, new)
        gain = None
        if Flag.GAIN in flags:
            gain = draw(st.integers(-1 << 22, 1 << 22)), draw(st.integers(-1 << 30, 1 << 30))
        place = len(window) if Flag.BASE in flags else None
        first = row * draw(st.integers(0, 1 << 20))
        slot = draw(st.integers(0, 2))
        runs.append(ContextRun(layout.number, flags, slot, count, row_codes, first, place, gain, basis))
        window, result = window + old, result + new
    return Segment(runs, window, result)


@settings(max_examples=50, deadline=None)
@given(st.lists(_segments(), min_size=1, max_size=3))
def test_any_blocks_are_coded_alike(segments: list[Segment]) -> None:
    check(segments)


@settings(max_examples=50, deadline=None)
@given(st.lists(_segments(), min_size=1, max_size=3), st.binary(max_size=400), st.booleans())
def test_any_payload_is_decoded_alike(segments: list[Segment], payload: bytes, is_long: bool) -> None:
    state = new_state()
    for segment in segments:
        check_payload(segment, payload * 8 if is_long else payload, bytes(state))
        reference.decode(state, segment.runs, segment.window, payload)


@settings(max_examples=50, deadline=None)
@given(_segments())
def test_runs_are_read_as_they_were_written(segment: Segment) -> None:
    basis = next((run.basis for run in segment.runs if run.basis), None)
    if all(run.basis in {None, basis} for run in segment.runs):
        parameters = write_context_runs(segment.runs)
        assert read_context_runs(parameters, len(segment.result), len(segment.window), basis) == segment.runs


def test_incompressible_blocks_cost_little_more_than_they_are() -> None:
    data = blocks(Layout.Q4_0, 400, 12)
    payload = check([Segment([_run(Layout.Q4_0, Flag.START, 400, 64)], b"", data)])[0]
    assert len(payload) < 1.02 * len(data)


def test_the_committed_tables_are_what_their_program_writes() -> None:
    assert context_tables.HEADER.read_text() == context_tables.header()
    assert context_tables.MODULE.read_text() == context_tables.module()
