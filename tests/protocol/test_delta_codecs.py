"""Layouts, prediction, streams, compression and bsdiff: each by itself."""

import contextlib
from fractions import Fraction
from itertools import pairwise

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.delta.bsdiff import decode_bsdiff, encode_bsdiff
from protocol.delta.compression import compress, decompress, decompress_up_to
from protocol.delta.gain import with_gains
from protocol.delta.layouts import LAYOUTS, Array, Formula, Words
from protocol.delta.prediction import GAIN_SHIFT, predict_plain, predict_scaled, widen_half
from protocol.delta.symbols import Payload, decode_symbols, encode_symbols
from protocol.delta.tensor import RUNS_MAX, Run, decode_tensor, encode_tensor, read_runs, write_runs
from protocol.delta.varints import write_signed, write_varint
from protocol.errors import PatchError
from protocol.tensors import Layout
from tests.protocol.model_files import blocks, moved_blocks

SCALED = [layout for layout in LAYOUTS if LAYOUTS[layout].formula is not Formula.PLAIN]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splitting_and_joining_is_exact_for_any_bytes(layout: Layout) -> None:
    row = LAYOUTS[layout]
    data = np.random.default_rng(7).integers(0, 256, (64, row.block_bytes), dtype=np.uint8)
    assert np.array_equal(row.join(row.split(data)), data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_of_a_block_belongs_to_one_field(layout: Layout) -> None:
    row = LAYOUTS[layout]
    bits = sum(field.count * field.width for field in row.fields)
    assert bits == 8 * row.block_bytes


@pytest.mark.parametrize("layout", SCALED)
def test_fields_mean_what_the_reference_says(layout: Layout) -> None:
    row = LAYOUTS[layout]
    data = np.frombuffer(blocks(layout, 20, 3), np.uint8).reshape(20, -1)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[layout.name]).reshape(20, -1)
    fields = row.split(data)
    codes = fields["codes"].view(np.int8) if row.is_signed else fields["codes"]

    def scale(name: str) -> Array:
        return fields[name].view(np.float16).astype(np.float32)

    def per_code(name: str) -> Array:
        sub = fields[name].view(np.int8) if row.fields[1].width == 8 else fields[name]
        return np.repeat(sub.astype(np.float32) - row.sub_zero, codes.shape[1] // sub.shape[1], axis=1)

    value = codes.astype(np.float32) - row.zero
    found = scale("d") * value
    if row.formula is Formula.AFFINE:
        found = found + scale("m")
    elif row.formula is Formula.SUBSCALED:
        found = found * per_code("sub")
    elif row.formula is Formula.SUBSCALED_AFFINE:
        found = found * per_code("sub") - scale("dmin") * per_code("submin")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_wire_numbers_are_unique_and_fixed() -> None:
    numbers = {layout.value: row.number for layout, row in LAYOUTS.items()}
    assert len(set(numbers.values())) == len(numbers)
    assert [numbers[name] for name in ("raw", "f32", "q4_0", "q8_0", "q6_k", "iq4_xs")] == [
        0,
        1,
        16,
        20,
        25,
        27,
    ]


def test_half_precision_is_widened_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(np.float16).astype(np.float64)
    finite = np.isfinite(numbers)
    assert np.array_equal(widen_half(bits)[finite], (numbers[finite] * 2.0**24).astype(np.int64))


def _reference(
    old: int, ratio: int, offset: int, zero: int, shift: int, low: int, high: int
) -> tuple[int, int]:
    """SPEC section 6.8 in exact arithmetic."""
    exact = Fraction((old - zero) * ratio + offset, 1 << shift) + Fraction(1, 2)
    code = exact.numerator // exact.denominator
    distance = exact - code - Fraction(1, 2)
    steps = -(-abs(distance) * 512 // 1)
    context = int(steps).bit_length() if steps else 0
    return min(max(code + zero, low), high), context | (0x80 if distance > 0 else 0)


@given(st.integers(-128, 127), st.integers(-(1 << 22), 1 << 22), st.integers(-(1 << 28), 1 << 28))
@settings(max_examples=300, deadline=None)
def test_prediction_with_a_gain_is_the_arithmetic_of_the_specification(
    old: int, gain: int, offset: int
) -> None:
    row = LAYOUTS[Layout.I8]
    codes = np.array([[old]], np.int8).view(np.uint8)
    expected, context = predict_plain(row, codes, gain, offset)
    assert (int(expected.view(np.int8)[0, 0]), int(context[0, 0])) == _reference(
        old, gain, offset, 0, GAIN_SHIFT, -128, 127
    )


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 15))
@settings(max_examples=300, deadline=None)
def test_prediction_from_any_two_scales_is_the_arithmetic_of_the_specification(
    old_d: int, new_d: int, code: int
) -> None:
    row = LAYOUTS[Layout.Q4_0]
    old: dict[str, Array] = {"d": np.array([[old_d]], np.uint16), "codes": np.full((1, 32), code, np.uint8)}
    new = {"d": np.array([[new_d]], np.uint16)}
    expected, context = predict_scaled(row, old, new)
    steps = [int(widen_half(np.array([d], np.uint16))[0]) for d in (old_d, new_d)]
    ratio = (steps[0] << 16) // steps[1] if steps[1] else 0
    ratio = min(max(ratio, -64 << 16), 64 << 16)
    assert (int(expected[0, 0]), int(context[0, 0])) == _reference(code, ratio, 0, 8, 16, 0, 15)


def test_a_code_is_expected_where_its_weight_now_lies() -> None:
    row = LAYOUTS[Layout.Q8_0]
    scales = np.array([0.01, 0.02], np.float16).view(np.uint16).reshape(2, 1)
    old: dict[str, Array] = {"d": scales[:1], "codes": np.arange(32, dtype=np.uint8).reshape(1, 32)}
    expected, _ = predict_scaled(row, old, {"d": scales[1:]})
    assert expected[0, :5].tolist() == [0, 1, 1, 2, 2]


@given(
    st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3, 250, 255]), max_size=400),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 1 << 24),
)
@settings(max_examples=200, deadline=None)
def test_streams_come_back_as_they_were(values: list[int], width: int, factor: int) -> None:
    symbols = (np.array(values, np.uint64) * np.uint64(factor)).astype(f"<u{width // 8}")
    payload = Payload(encode_symbols(symbols, "fast"))
    assert np.array_equal(decode_symbols(payload, len(symbols), width), symbols)
    payload.expect_end()


@given(st.binary(max_size=40), st.integers(0, 50), st.sampled_from([8, 16, 32]))
@settings(max_examples=500, deadline=None)
def test_any_bytes_as_a_stream_are_decoded_or_refused(data: bytes, count: int, width: int) -> None:
    with contextlib.suppress(PatchError):
        assert len(decode_symbols(Payload(data), count, width)) == count


def test_rare_values_cost_less_than_a_bit() -> None:
    rng = np.random.default_rng(1)
    symbols = (rng.random(200_000) < 0.02).astype(np.uint8)
    entropy_bytes = 200_000 * 0.1414 / 8
    assert len(encode_symbols(symbols, "small")) < 1.1 * entropy_bytes


@given(st.integers(0, 1 << 40), st.integers(-(1 << 40), 1 << 40))
def test_integers_of_both_signs_come_back(unsigned: int, signed: int) -> None:
    out = bytearray()
    write_varint(unsigned, out)
    write_signed(signed, out)
    payload = Payload(out)
    assert (payload.varint(1 << 40), payload.signed(1 << 40)) == (unsigned, signed)


def test_an_integer_beyond_its_limit_is_refused() -> None:
    for data in (b"\xff" * 9, b"\x81\x01", b"\x80"):
        with pytest.raises(PatchError):
            Payload(data).varint(128)


def test_a_frame_that_would_grow_is_refused_before_it_does() -> None:
    bomb = compress(bytes(100 << 20), "fast")
    for length in (0, 1000, (100 << 20) - 1, (100 << 20) + 1):
        with pytest.raises(PatchError):
            decompress(bomb, length)
    with pytest.raises(PatchError):
        decompress_up_to(bomb, 1000)


@given(st.binary(max_size=60))
def test_any_bytes_as_a_frame_are_refused(data: bytes) -> None:
    with pytest.raises(PatchError):
        decompress(data, 17)


def test_a_damaged_frame_is_refused() -> None:
    frame = bytearray(compress(b"some text that is long enough " * 20, "small"))
    for length in range(len(frame)):
        with pytest.raises(PatchError):
            decompress(bytes(frame[:length]), 600)


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_bsdiff_gives_back_any_bytes(base: bytes, extra: bytes, cut: int) -> None:
    new = base[cut:] + extra + base[:cut]
    assert decode_bsdiff(encode_bsdiff(new, base, "fast"), base, len(new)) == new


def _bsdiff_payload(instructions: list[tuple[int, int, int]], difference: bytes, extra: bytes) -> bytes:
    words = [value if value >= 0 else (1 << 63) - value for row in instructions for value in row]
    control = np.frombuffer(b"".join(word.to_bytes(8, "little") for word in words), np.uint8)
    columns = control.reshape(-1, 24).T.tobytes()
    return b"".join(
        len(part).to_bytes(4, "little") + bytes(4) + part for part in (columns, difference, extra)
    )


@pytest.mark.parametrize(
    ("instructions", "difference", "extra"),
    [
        ([(-1, 5, 0)], b"", b"abcde"),
        ([(5, -1, 0)], b"abcde", b""),
        ([(11, 0, 0)], b"abcdefghijk", b""),
        ([(0, 0, 8), (5, 0, 0)], b"abcde", b""),
        ([(0, 0, -1), (5, 0, 0)], b"abcde", b""),
        ([(5, 0, 0)], b"abcd", b""),
        ([(4, 0, 0)], b"abcde", b""),
        ([(2, 2, 0)], b"ab", b"cd"),
        ([(0, 0, 1 << 62), (5, 0, 0)], b"abcde", b""),
        ([], b"abcde", b""),
    ],
)
def test_hostile_instructions_are_refused(
    instructions: list[tuple[int, int, int]], difference: bytes, extra: bytes
) -> None:
    with pytest.raises(PatchError):
        decode_bsdiff(_bsdiff_payload(instructions, difference, extra), b"0123456789", 5)


def test_instructions_inside_their_bounds_are_followed() -> None:
    payload = _bsdiff_payload([(2, 1, 3), (2, 0, 0)], bytes(4), b"x")
    assert decode_bsdiff(payload, b"0123456789", 5) == b"01x56"


def test_a_bsdiff_stream_longer_than_the_result_is_refused() -> None:
    payload = _bsdiff_payload([(5, 0, 0)], bytes(6), b"")
    with pytest.raises(PatchError, match="longer"):
        decode_bsdiff(payload, b"0123456789", 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_a_moved_tensor_comes_back_from_its_base(layout: Layout, share: float) -> None:
    base = blocks(layout, 300, 5)
    new = moved_blocks(layout, base, 6, share)
    runs = [Run(LAYOUTS[layout].number, 300, 0)]
    payload = encode_tensor(new, base, runs, "fast")
    assert decode_tensor(payload, base, runs) == new
    if share < 0.1:
        assert len(payload) < 0.2 * len(new) + 100


def test_runs_of_many_kinds_share_a_segment() -> None:
    parts = [(Layout.Q4_0, 40), (Layout.F32, 16), (Layout.RAW, 5), (Layout.Q4_0, 60), (Layout.Q8_0, 3)]
    base = b"".join(blocks(layout, count, 8) for layout, count in parts)
    new = b"".join(moved_blocks(layout, blocks(layout, count, 8), 9) for layout, count in parts)
    runs, position = [], 0
    for index, (layout, count) in enumerate(parts):
        runs.append(Run(LAYOUTS[layout].number, count, None if index == 3 else position))
        position += runs[-1].length
    again = read_runs(write_runs(runs), len(new), len(base))
    assert again == runs
    assert decode_tensor(encode_tensor(new, base, runs, "fast"), base, again) == new


def test_a_gain_is_found_where_the_scale_of_a_whole_tensor_changed() -> None:
    rng = np.random.default_rng(2)
    old = rng.integers(-127, 128, 4096).astype(np.int8)
    new = np.round(old * 0.9).astype(np.int8)
    run = Run(LAYOUTS[Layout.I8].number, 4096, 0)
    fitted = with_gains([run], new.tobytes(), old.tobytes())
    assert fitted[0].gain is not None
    with_gain = encode_tensor(new.tobytes(), old.tobytes(), fitted, "fast")
    assert decode_tensor(with_gain, old.tobytes(), fitted) == new.tobytes()
    assert len(with_gain) < 0.1 * len(encode_tensor(new.tobytes(), old.tobytes(), [run], "fast"))
    assert read_runs(write_runs(fitted), 4096, 4096) == fitted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x01\xee\x00\x04",  # unknown layout
        b"\x01\x00\x08\x04",  # unknown flag
        b"\x01\x00\x00\x00",  # no blocks
        b"\x01\x00\x00\x05",  # more than the result
        b"\x01\x00\x00\x03",  # less than the result
        b"\x01\x00\x01\x04\x02",  # after the window
        b"\x01\x00\x01\x04\x01",  # before the window
        b"\x01\x00\x00\x04\x00",  # bytes left over
        b"\x01\x01\x02\x01" + bytes(8),  # a gain for a floating-point layout
        b"\x01\x00\x02\x04" + b"\xff\xff\xff\x7f" + bytes(4),  # a gain out of bounds
    ],
)
def test_hostile_runs_are_refused(data: bytes) -> None:
    with pytest.raises(PatchError):
        read_runs(data, 4, 4)


def test_more_runs_than_the_format_allows_are_refused() -> None:
    data = bytearray()
    write_varint(RUNS_MAX + 1, data)
    with pytest.raises(PatchError):
        read_runs(bytes(data) + b"\x00\x00\x01" * (RUNS_MAX + 1), RUNS_MAX + 1, 0)


@given(st.binary(max_size=60), st.sampled_from(list(LAYOUTS)))
@settings(max_examples=500, deadline=None)
def test_any_bytes_as_a_tensor_payload_give_blocks_or_are_refused(data: bytes, layout: Layout) -> None:
    runs = [Run(LAYOUTS[layout].number, 2, 0), Run(LAYOUTS[layout].number, 1, None)]
    base = blocks(layout, 2, 1)
    with contextlib.suppress(PatchError):
        assert len(decode_tensor(data, base, runs)) == 3 * LAYOUTS[layout].block_bytes


def test_words_keep_the_order_of_floating_point_numbers() -> None:
    numbers = np.array([-3.0, -1.0, -0.5, 0.25, 1.0, 2.0], np.float32)
    base = b"".join(number.tobytes() for number in numbers)
    near = np.nextafter(numbers, np.float32(10)).astype(np.float32).tobytes()
    runs = [Run(LAYOUTS[Layout.F32].number, 6, 0)]
    assert isinstance(LAYOUTS[Layout.F32].codes, Words)
    assert decode_tensor(encode_tensor(near, base, runs, "fast"), base, runs) == near
    assert all(a < b for a, b in pairwise(numbers))
