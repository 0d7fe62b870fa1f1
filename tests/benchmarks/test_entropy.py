from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.entropy import conditional_bytes, floor_bytes, interval_bits, table_bits, words_bits
from benchmarks.fields import Array, Fields, block_bytes, split
from benchmarks.gguf_files import as_bf16, as_type, write_gguf
from benchmarks.weights import round_bf16
from protocol.tensors.regions import BytesSource, Layout

KINDS = gguf.GGMLQuantizationType
ROWS, COLUMNS = 64, 256


def fields(codes: list[int], step: float = 1.0) -> Fields:
    steps = np.array([[step]], np.float32)
    return Fields(np.array([codes], np.int16), steps, np.zeros_like(steps), -127, 127, {})


@pytest.mark.parametrize("layout", [layout for layout in Layout if block_bytes(layout)])
def test_fields_are_what_the_reference_implementation_multiplies(layout: Layout) -> None:
    kind = KINDS[layout.value.upper()]
    size = block_bytes(layout)
    assert size is not None
    blocks = np.random.default_rng(1).integers(0, 256, (50, size), np.uint8)
    # Scales that are numbers: the high byte of each float16 is that of a number below one.
    for at in {Layout.Q4_K: (1, 3), Layout.Q6_K: (209,)}.get(layout, (1,)):
        blocks[:, at] = 0x2C
    found = split(layout, blocks.tobytes())
    weights = found.steps * found.codes - found.offsets
    expected = gguf.quants.dequantize(blocks, kind).reshape(weights.shape)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


def test_no_update_leaves_nothing_open() -> None:
    old = fields([3, -7, 0])
    assert interval_bits(old, old, np.zeros((1, 3))) == 0


def test_half_a_step_costs_one_bit() -> None:
    old = fields([3, -7, 0])
    assert interval_bits(old, old, np.full((1, 3), 0.5)) == pytest.approx(3)


def test_a_quarter_of_a_step_costs_the_entropy_of_one_in_four() -> None:
    old = fields([5])
    expected = -0.25 * np.log2(0.25) - 0.75 * np.log2(0.75)
    assert interval_bits(old, old, np.full((1, 1), 0.25)) == pytest.approx(expected)


@pytest.mark.parametrize(("update", "bits"), [(0.0, 1.5), (0.5, 1.0)])
def test_a_cell_half_as_wide_is_one_of_several(update: float, bits: float) -> None:
    # The old cell covers one new cell and half of each neighbour, or two whole ones.
    old, new = fields([0], step=2.0), fields([0], step=1.0)
    assert interval_bits(old, new, np.full((1, 1), update)) == pytest.approx(bits)


def test_beyond_the_last_code_there_is_nothing_to_choose() -> None:
    old = fields([127])
    assert interval_bits(old, old, np.full((1, 1), 0.5)) == 0


def test_a_step_of_zero_leaves_nothing_open() -> None:
    assert interval_bits(fields([1], step=0.0), fields([1]), np.full((1, 1), 0.5)) == 0


def test_a_table_costs_its_symbols_and_itself() -> None:
    symbols = np.arange(1024) % 4
    # Two bits each, and three free parameters of half the logarithm of the count.
    assert table_bits(np.zeros(1024, np.int64), symbols) == pytest.approx(2 * 1024 + 3 * 0.5 * 10)


def test_a_context_that_tells_the_symbol_leaves_nothing() -> None:
    symbols = np.arange(1024) % 4
    assert table_bits(symbols, symbols) == 0


def test_words_that_did_not_change_cost_nothing() -> None:
    words = np.arange(1000, dtype=np.uint16)
    assert words_bits(words, words) == 0
    assert words_bits(words, words + np.arange(1000, dtype=np.uint16) % 2) > 900


def test_a_pair_of_files_has_both_estimates(tmp_path: Path) -> None:
    draws = np.random.default_rng(2)
    before: Array = round_bf16(draws.standard_normal((ROWS, COLUMNS)).astype(np.float32))
    after = round_bf16(before + 0.003 * draws.standard_normal(before.shape).astype(np.float32))
    paths = {}
    for name, weights in (("before", before), ("after", after)):
        template = tmp_path / f"{name}.template"
        writer = gguf.GGUFWriter(template, "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for tag, tensor in (("bf16", as_bf16("w", weights)), ("q8_0", as_type("w", weights, KINDS.Q8_0))):
            paths[name, tag] = tmp_path / f"{name}.{tag}.gguf"
            write_gguf(template, paths[name, tag], [tensor], {})
    old, new = (BytesSource(paths[name, "q8_0"].read_bytes()) for name in ("before", "after"))
    assert conditional_bytes(old, old) == 0
    floor = floor_bytes(old, new, paths["before", "bf16"], paths["after", "bf16"])
    # Updates of a seventh of a step on average: some 0.5 bits for each weight.
    assert 0.2 < 8 * floor / before.size < 0.8
    assert floor < conditional_bytes(old, new) < new.length
