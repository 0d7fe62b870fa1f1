"""GGUF maps: what is understood, and what is refused with the name of the field."""

import itertools
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ModelFileError
from protocol.tensors import Layout, map_regions, parse_gguf
from tests.protocol.model_files import GgufBuilder, GgufTensor, gguf_file, regions_cover, source, weights

_TENSOR = GgufTensor("w", (32, 2), 2, bytes(36))
_STRING, _ARRAY, _UINT32 = 8, 9, 4


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_a_file_of_the_reference_writer_is_mapped_tensor_by_tensor(tmp_path: Path) -> None:
    data = gguf_file(
        tmp_path / "m.gguf",
        {
            "embd": (weights((8, 64), 1), Kind.Q8_0),
            "norm": (weights((64,), 2), Kind.F32),
            "ffn": (weights((4, 64), 3), Kind.Q4_0),
        },
    )
    parsed = parse_gguf(source(data))
    assert regions_cover(data, parsed.regions)
    assert [(t.name, t.layout, t.length, t.dims, t.row_bytes) for t in parsed.tensors] == [
        ("embd", Layout.Q8_0, 8 * 68, (8, 64), 68),
        ("norm", Layout.F32, 256, (64,), 256),
        ("ffn", Layout.Q4_0, 4 * 36, (4, 64), 36),
    ]
    assert parsed.metadata["general.architecture"] == "llama"


def test_keys_and_descriptions_of_tensors_are_found_in_the_file_without_gaps(tmp_path: Path) -> None:
    data = gguf_file(tmp_path / "m.gguf", {"norm": (weights((64,), 2), Kind.F32)})
    parsed = parse_gguf(source(data))
    spans = [*parsed.pairs.values(), parsed.infos]
    assert spans[0][0] == len(b"GGUF") + 4 + 8 + 8
    assert all(first[1] == second[0] for first, second in itertools.pairwise(spans))
    for key, (start, end) in parsed.pairs.items():
        assert data[start:end].startswith(_text(key))
    assert data[slice(*parsed.infos)] == _text("norm") + struct.pack("<IQIQ", 1, 64, 0, 0)


def test_a_file_without_tensors_is_one_raw_region() -> None:
    data = GgufBuilder().build()
    assert [region.layout for region in parse_gguf(source(data)).regions] == [Layout.RAW]


def test_types_without_a_known_inside_are_raw_regions_with_a_name() -> None:
    data = GgufBuilder([GgufTensor("w", (256,), 16, bytes(66))]).build()
    tensors = parse_gguf(source(data)).tensors
    assert [(t.name, t.layout, t.length) for t in tensors] == [("w", Layout.RAW, 66)]


def test_a_type_from_after_this_was_written_ends_where_the_next_tensor_starts() -> None:
    tensors = [GgufTensor("new", (32,), 1000, bytes(70)), GgufTensor("w", (32, 2), 2, bytes(36))]
    parsed = parse_gguf(source(GgufBuilder(tensors).build())).tensors
    assert [(t.name, t.layout, t.length) for t in parsed] == [("new", Layout.RAW, 96), ("w", Layout.Q4_0, 36)]


def test_rows_of_a_convolution_are_not_the_width_of_its_kernel() -> None:
    data = GgufBuilder([GgufTensor("conv", (3, 80, 16), 1, bytes(2 * 3 * 80 * 16))]).build()
    tensor = parse_gguf(source(data)).tensors[0]
    assert (tensor.dims, tensor.row_bytes) == ((16, 80, 3), 2 * 3 * 80)


REFUSED = {
    "magic": GgufBuilder(magic=b"GGUX"),
    "version 1": GgufBuilder(version=1),
    "big-endian": GgufBuilder(version=3 << 24),
    "tensor count": GgufBuilder(tensor_count=1 << 60),
    "more tensors than the file can hold": GgufBuilder(tensor_count=2),
    "metadata count": GgufBuilder(key_count=65_537),
    "occurs twice": GgufBuilder(key_values=[("a", 4, bytes(4)), ("a", 4, bytes(4))]),
    "unknown type 13": GgufBuilder(key_values=[("a", 13, bytes(4))]),
    "array of type 9": GgufBuilder(key_values=[("a", _ARRAY, struct.pack("<IQ", 9, 1))]),
    "elements, more than": GgufBuilder(key_values=[("a", _ARRAY, struct.pack("<IQ", 4, 1 << 61))]),
    "string of": GgufBuilder(key_values=[("a", _ARRAY, struct.pack("<IQQ", 8, 1, 1 << 40))]),
    "bytes, at most": GgufBuilder(key_values=[("a", _STRING, struct.pack("<Q", 1 << 21))]),
    "UTF-8": GgufBuilder(key_values=[("a", _STRING, struct.pack("<Q", 1) + b"\xff")]),
    "general.alignment 33": GgufBuilder(key_values=[("general.alignment", _UINT32, struct.pack("<I", 33))]),
    "general.alignment 8192": GgufBuilder(
        key_values=[("general.alignment", _UINT32, struct.pack("<I", 8192))]
    ),
    "'general.alignment' has the type 8": GgufBuilder(
        key_values=[("general.alignment", _STRING, _text("x"))]
    ),
    "'general.alignment' has the type 10": GgufBuilder(
        key_values=[("general.alignment", 10, struct.pack("<Q", 32))]
    ),
    "cannot be printed": GgufBuilder([GgufTensor("w\0a", (32,), 2, bytes(18))]),
    "which was removed": GgufBuilder([GgufTensor("w", (32,), 31, bytes(18))]),
    "more than 9223372036854775807 weights": GgufBuilder(
        [GgufTensor("w", (1 << 40, 1 << 40), 1000, bytes(18))]
    ),
    "tensor name": GgufBuilder([GgufTensor("n" * 64, (32,), 2, bytes(18))]),
    "name is empty": GgufBuilder([GgufTensor("", (32,), 2, bytes(18))]),
    "name occurs twice": GgufBuilder([_TENSOR, _TENSOR]),
    "5 dimensions": GgufBuilder([GgufTensor("w", (32, 1, 1, 1, 1), 2, bytes(18))]),
    "dimension of 0": GgufBuilder([GgufTensor("w", (32, 0), 2, b"")]),
    "has 0 bytes": GgufBuilder([GgufTensor("w", (32,), 1000, b"")]),
    "not a multiple of 32": GgufBuilder([GgufTensor("w", (33,), 2, bytes(18))]),
    "has offset 64": GgufBuilder([GgufTensor("w", (32,), 2, bytes(18), offset=64)]),
    "ends at": GgufBuilder([GgufTensor("w", (1 << 40, 1 << 20), 2, bytes(18))]),
    "follow the last tensor": GgufBuilder([_TENSOR], tail=bytes(32)),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_wrong_field_is_refused_by_name(field: str) -> None:
    data = REFUSED[field].build()
    expected = "tensor count 2" if field.startswith("more tensors") else field
    with pytest.raises(ModelFileError) as caught:
        parse_gguf(source(data))
    assert expected in str(caught.value)


def test_a_damaged_file_is_still_mapped_as_raw_bytes() -> None:
    data = REFUSED["has offset 64"].build()
    assert [region.layout for region in map_regions(source(data))] == [Layout.RAW]


def test_a_file_cut_anywhere_in_its_header_is_refused() -> None:
    data = GgufBuilder([_TENSOR], [("general.name", _STRING, _text("x"))]).build()
    for length in range(len(data) - 36):
        with pytest.raises(ModelFileError):
            parse_gguf(source(data[:length]))


@given(st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_byte_of_the_header_may_be_anything(offset: int, value: int) -> None:
    data = bytearray(GgufBuilder([_TENSOR], [("general.name", _STRING, _text("x"))]).build())
    data[offset % len(data)] = value
    try:
        regions = parse_gguf(source(bytes(data))).regions
    except ModelFileError:
        return
    assert regions_cover(bytes(data), regions)
