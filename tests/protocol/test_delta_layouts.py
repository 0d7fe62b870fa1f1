"""The layout table against ggml's own dequantization, and against packing as AWQ and GPTQ do it."""

import gguf
import gguf.quants
import numpy as np
import pytest

from protocol.delta.layouts import LAYOUTS, Array
from protocol.tensors import Layout
from protocol.tensors.gguf import GGML_TYPES
from tests.protocol.model_files import GGML_NUMBERS, blocks

_CODEBOOKS = [layout for layout, row in LAYOUTS.items() if row.codebook]
_SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
# gguf-py counts two floats in its header; the struct has two halves. No file holds this type.
del _SIZES[int(gguf.GGMLQuantizationType.Q8_1)]


def test_every_ggml_type_is_mapped_with_its_true_size() -> None:
    assert {number: GGML_TYPES[number][:2] for number in _SIZES} == _SIZES


@pytest.mark.parametrize("number", GGML_TYPES)
def test_a_block_has_as_many_codes_as_weights(number: int) -> None:
    weights, size, layout = GGML_TYPES[number]
    if layout is not Layout.RAW:
        row = LAYOUTS[layout]
        words = 2 if layout in {Layout.I64, Layout.F64} else 1  # of 32 bits, for a number of 64
        assert (row.block_bytes, row.codes.count) == (size, weights * words)


def test_every_type_that_ggml_can_take_apart_has_a_layout_or_is_a_lattice_or_base_three() -> None:
    raw = {gguf.GGMLQuantizationType(n).name for n, row in GGML_TYPES.items() if row[2] is Layout.RAW}
    assert {name for name in raw if not name.startswith(("IQ1", "IQ2", "IQ3"))} == {
        "Q8_1",
        "Q8_K",
        "TQ1_0",
        "Q1_0",
    }
    assert len(GGML_NUMBERS) == len([n for n in GGML_TYPES.values() if n[2] is not Layout.RAW]) - 5


@pytest.mark.parametrize("layout", _CODEBOOKS)
def test_codes_that_are_indices_mean_what_the_reference_says(layout: Layout) -> None:
    row = LAYOUTS[layout]
    data = np.frombuffer(blocks(layout, 256, 3), np.uint8).reshape(256, -1).copy()
    if layout is Layout.NVFP4:
        data[:, 0] = np.arange(256)  # every scale that there is
    kind = gguf.GGMLQuantizationType[layout.name]
    expected = gguf.quants.dequantize(data, kind).reshape(256, -1)
    fields = row.split(data)
    values = np.array(row.codebook, np.float32)[fields["codes"]]
    scale = _scales(layout, fields).astype(np.float32)
    found = values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def _scales(layout: Layout, fields: dict[str, Array]) -> Array:
    if layout is Layout.MXFP4:
        return np.asarray(np.exp2(fields["d"].astype(np.float64) - 128))
    if layout is Layout.NVFP4:
        exponent, mantissa = fields["d"] >> 3 & 15, (fields["d"] & 7).astype(np.float64)
        normal = (8 + mantissa) * np.exp2(exponent.astype(np.float64) - 11)
        return np.where(fields["d"] == 0x7F, 0 * normal, np.where(exponent == 0, mantissa / 1024, normal))
    scale = fields["d"].view(np.float16).astype(np.float64)
    return scale * (fields["sub"].astype(np.float64) - LAYOUTS[layout].sub_zero) if "sub" in fields else scale


def test_awq_words_hold_eight_neighbours_of_a_row_in_the_order_of_its_kernels() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (16, 64), dtype=np.uint32)
    words = np.zeros((16, 8), np.uint32)
    for column in range(8):
        for nibble, at in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, column] |= codes[:, 8 * column + at] << np.uint32(4 * nibble)
    row = LAYOUTS[Layout.AWQ4]
    found = row.split(words.view(np.uint8).reshape(-1, 4))["codes"]
    assert np.array_equal(found.reshape(16, 64), codes)


def test_gptq_words_hold_eight_neighbours_of_a_column() -> None:
    codes = np.random.default_rng(2).integers(0, 16, (64, 16), dtype=np.uint32)
    words = np.zeros((8, 16), np.uint32)
    for nibble in range(8):
        words |= codes[nibble::8] << np.uint32(4 * nibble)
    row = LAYOUTS[Layout.GPTQ4]
    found = row.split(words.view(np.uint8).reshape(-1, 4))["codes"]
    assert row.is_column
    assert np.array_equal(found.reshape(8, 16, 8).transpose(0, 2, 1).reshape(64, 16), codes)


def test_two_complement_nibbles_are_codes_in_the_order_of_their_numbers() -> None:
    values = np.arange(-8, 8, dtype=np.int8)
    data = ((values[::2] & 15) | (values[1::2] & 15) << 4).astype(np.uint8).reshape(-1, 1)
    row = LAYOUTS[Layout.I4]
    codes = row.split(data)["codes"].reshape(-1)
    assert np.array_equal(codes.astype(np.int8) - row.zero, values)
    assert np.array_equal(row.join({"codes": codes.reshape(-1, 2)}), data)
