"""Edges of what the parsers of GGUF and safetensors take: the last that is accepted, and the first that is refused."""

import json
import struct
from typing import Any

import pytest

from protocol.errors import ModelFileError
from protocol.tensors import Layout, Region, gguf, parse_gguf, parse_safetensors, safetensors
from protocol.tensors.gguf import ArrayValue
from protocol.tensors.regions import cover, row_elements
from protocol.tensors.safetensors import MAX_HEADER_BYTES, looks_like_safetensors
from tests.protocol.model_files import GgufBuilder, GgufTensor, regions_cover, safetensors_file, source

_UINT8, _UINT32, _STRING, _ARRAY = 0, 4, 8, 9
_Q4_0, _I8, _UNKNOWN = 2, 24, 1000
_TENSOR = GgufTensor("w", (32, 2), _Q4_0, bytes(36))


# --- regions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "elements"),
    [((), 1), ((7,), 7), ((9, 3), 3), ((2, 5, 32), 32), ((2, 5, 31), 155), ((2, 16, 32, 3), 96)],
)
def test_a_row_is_the_fastest_dimension_and_more_only_while_it_is_tiny(
    dims: tuple[int, ...], elements: int
) -> None:
    assert row_elements(dims) == elements


def test_a_map_covers_every_byte_and_has_no_empty_regions() -> None:
    tensors = [Region("b", Layout.I8, 5, 1), Region("none", Layout.I8, 3, 0), Region("a", Layout.I8, 2, 3)]
    regions = cover(tensors, 7)
    assert [(region.name, region.offset, region.length) for region in regions] == [
        ("", 0, 2),
        ("a", 2, 3),
        ("b", 5, 1),
        ("", 6, 1),
    ]
    assert cover([], 0) == ()


def test_a_tensor_that_overlaps_another_or_the_end_of_its_file_is_refused() -> None:
    tensors = [Region("a", Layout.I8, 0, 4), Region("b", Layout.I8, 4, 4)]
    assert len(cover(tensors, 8)) == 2
    with pytest.raises(ModelFileError, match="'b': ends at 8, after the file's end at 7"):
        cover(tensors, 7)
    with pytest.raises(ModelFileError, match="'b': overlaps"):
        cover([tensors[0], Region("b", Layout.I8, 3, 4)], 8)


# --- GGUF -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_of_gguf_are_read(version: int) -> None:
    assert parse_gguf(source(GgufBuilder([_TENSOR], version=version).build())).version == version


@pytest.mark.parametrize(
    ("version", "hint"), [(2 << 24, "a big-endian file"), (3 << 24, "a big-endian file"), (1, ""), (4, "")]
)
def test_only_a_file_of_the_other_byte_order_is_called_so(version: int, hint: str) -> None:
    with pytest.raises(ModelFileError, match=f"version {version} is not") as caught:
        parse_gguf(source(GgufBuilder(version=version).build()))
    assert caught.value.hint == hint


def test_as_many_keys_as_the_limit_are_read_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_KEY_VALUES", 3)
    keys = [(name, _UINT8, b"\x07") for name in "abcd"]
    assert parse_gguf(source(GgufBuilder([_TENSOR], keys[:3]).build())).metadata == {"a": 7, "b": 7, "c": 7}
    with pytest.raises(ModelFileError, match="metadata count 4"):
        parse_gguf(source(GgufBuilder([_TENSOR], keys).build()))


def test_a_count_that_the_rest_of_the_file_just_holds_is_believed() -> None:
    shortest = struct.pack("<QI", 0, _UINT8) + b"\x07"  # an empty key and one byte
    data = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + shortest
    assert parse_gguf(source(data)).metadata == {"": 7}
    with pytest.raises(ModelFileError, match="metadata count 1 is more than the file can hold"):
        parse_gguf(source(data[:-1]))


def test_names_and_texts_of_the_largest_length_are_read() -> None:
    longest = GgufTensor("n" * 63, (32,), _Q4_0, bytes(18))
    text = b"t" * (1 << 20)
    value = struct.pack("<Q", len(text)) + text
    parsed = parse_gguf(source(GgufBuilder([longest], [("k", _STRING, value)]).build()))
    assert parsed.tensors[0].name == "n" * 63
    assert parsed.metadata["k"] == text.decode()


@pytest.mark.parametrize(("kind", "width"), [(0, 1), (5, 4), (12, 8)])
def test_what_follows_an_array_is_read_where_the_array_ends(kind: int, width: int) -> None:
    array = struct.pack("<IQ", kind, 5) + bytes(range(5 * width))
    parsed = parse_gguf(
        source(GgufBuilder([_TENSOR], [("a", _ARRAY, array), ("b", _UINT8, b"\x09")]).build())
    )
    assert parsed.metadata == {"a": ArrayValue(kind, 5), "b": 9}


@pytest.mark.parametrize(("kind", "width"), [(_UINT32, 4), (_STRING, 8)])
def test_an_array_may_fill_its_file_and_not_a_byte_more(kind: int, width: int) -> None:
    count = 8
    array = struct.pack("<IQ", kind, count) + bytes(count * width)
    data = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", _ARRAY) + array
    assert parse_gguf(source(data)).metadata == {"a": ArrayValue(kind, count)}
    with pytest.raises(ModelFileError, match="has 8 elements, more than the file can hold"):
        parse_gguf(source(data[:-1]))


@pytest.mark.parametrize("alignment", [8, 16, 4096])
def test_alignments_between_the_limits_are_taken(alignment: int) -> None:
    keys = [("general.alignment", _UINT32, struct.pack("<I", alignment))]
    data = GgufBuilder([_TENSOR, GgufTensor("x", (32,), _Q4_0, bytes(18))], keys, alignment=alignment).build()
    assert [tensor.name for tensor in parse_gguf(source(data)).tensors] == ["w", "x"]


@pytest.mark.parametrize("alignment", [0, 4, 12, 48, 4097, 8192])
def test_other_alignments_are_refused(alignment: int) -> None:
    keys = [("general.alignment", _UINT32, struct.pack("<I", alignment))]
    with pytest.raises(ModelFileError, match=f"general.alignment {alignment} is not a power of two"):
        parse_gguf(source(GgufBuilder([_TENSOR], keys).build()))


def test_tensors_of_one_to_four_dimensions_are_taken() -> None:
    for rank in range(1, 5):
        shape = (32, *[1] * (rank - 1))
        (tensor,) = parse_gguf(
            source(GgufBuilder([GgufTensor("w", shape, _Q4_0, bytes(18))]).build())
        ).tensors
        assert tensor.dims == shape[::-1]
    for shape in ((), (32, 1, 1, 1, 1)):
        with pytest.raises(ModelFileError, match=f"has {len(shape)} dimensions"):
            parse_gguf(source(GgufBuilder([GgufTensor("w", shape, _Q4_0, bytes(18))]).build()))


def test_a_tensor_has_as_many_weights_as_its_runtime_can_count_and_no_more() -> None:
    most = (1 << 63) - 1
    data = GgufBuilder([GgufTensor("w", (most,), _UNKNOWN, bytes(32))]).build()
    assert parse_gguf(source(data)).tensors[0].dims == (most,)
    with pytest.raises(ModelFileError, match="more than 9223372036854775807 weights"):
        parse_gguf(source(GgufBuilder([GgufTensor("w", (1 << 62, 2), _UNKNOWN, bytes(32))]).build()))


def test_a_tensor_ends_with_its_file_at_the_latest() -> None:
    data = GgufBuilder([GgufTensor("w", (32, 2), _Q4_0, bytes(36))], alignment=1).build()
    start = len(data) - 36
    whole = data[:start] + bytes(-start % 32) + data[start:]
    assert parse_gguf(source(whole)).tensors[0].end == len(whole)
    with pytest.raises(ModelFileError, match=f"GGUF: tensor 'w' ends at {len(whole)}, the file at"):
        parse_gguf(source(whole[:-1]))


def test_a_type_from_after_this_was_written_ends_where_the_next_starts_wherever_it_stands() -> None:
    tensors = [
        GgufTensor("before", (32, 2), _Q4_0, bytes(36)),
        GgufTensor("new", (32,), _UNKNOWN, bytes(70)),
        GgufTensor("one", (1,), _I8, bytes(1)),
        GgufTensor("after", (32,), _Q4_0, bytes(18)),
    ]
    data = GgufBuilder(tensors).build()
    parsed = parse_gguf(source(data))
    assert regions_cover(data, parsed.regions)
    assert [(each.name, each.length, each.row_bytes) for each in parsed.tensors] == [
        ("before", 36, 18),
        ("new", 96, 0),
        ("one", 1, 1),
        ("after", 18, 18),
    ]


# --- safetensors ------------------------------------------------------------------------------------------------


def _safe(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _entry(dtype: Any = "I8", shape: Any = (0,), offsets: Any = (0, 0)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("start", "length", "is_one"),
    [
        (struct.pack("<Q", 2) + b"{}", 10, True),
        (struct.pack("<Q", 2) + b"{}", 9, False),
        (struct.pack("<Q", 1) + b"{", 1000, False),
        (struct.pack("<Q", 2) + b"[]", 1000, False),
        (struct.pack("<Q", MAX_HEADER_BYTES) + b"{", MAX_HEADER_BYTES + 8, True),
        (struct.pack("<Q", MAX_HEADER_BYTES) + b"{", MAX_HEADER_BYTES + 7, False),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{", 1 << 40, False),
        (b"{", 1, False),
    ],
)
def test_a_safetensors_file_is_known_by_a_header_that_it_can_hold(
    start: bytes, length: int, is_one: bool
) -> None:
    assert looks_like_safetensors(start, length) is is_one


def test_a_header_of_the_largest_size_is_read_and_no_larger_one() -> None:
    longest = json.dumps({"w": _entry()}).encode().ljust(MAX_HEADER_BYTES)
    assert len(parse_safetensors(source(_safe(longest)))) == 1
    with pytest.raises(ModelFileError, match="header length 8388609"):
        parse_safetensors(source(_safe(longest + b" ")))


def test_as_many_tensors_as_the_limit_are_read_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 2)
    two = {"a": _entry(shape=[2], offsets=[0, 2]), "b": _entry(shape=[1], offsets=[2, 3])}
    assert [each.name for each in parse_safetensors(source(_safe(two, bytes(3))))] == ["", "a", "b"]
    with pytest.raises(ModelFileError, match="3 tensors, at most 2"):
        parse_safetensors(source(_safe({**two, "c": _entry(offsets=[3, 3])}, bytes(3))))


def test_as_many_entries_as_the_limit_are_read_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _safe({"a": _entry(shape=[2, 1], offsets=[0, 2])}, bytes(2))
    for limit, count in (("_MAX_CONTAINERS", 4), ("_MAX_VALUES", 4)):
        monkeypatch.setattr(safetensors, limit, count)
        assert parse_safetensors(source(data))
        monkeypatch.setattr(safetensors, limit, count - 1)
        with pytest.raises(ModelFileError, match="more entries"):
            parse_safetensors(source(data))
        monkeypatch.undo()


def test_tensors_may_be_listed_in_any_order() -> None:
    listed = {"b": _entry(shape=[1], offsets=[2, 3]), "a": _entry(shape=[2], offsets=[0, 2])}
    assert [each.name for each in parse_safetensors(source(_safe(listed, bytes(3))))] == ["", "a", "b"]


def test_a_scalar_and_an_empty_tensor_are_tensors() -> None:
    data = safetensors_file({"scalar": ("F32", (), bytes(4)), "empty": ("F32", (0,), b"")})
    assert [(each.name, each.row_bytes) for each in parse_safetensors(source(data))] == [
        ("", 0),
        ("scalar", 4),
    ]


def test_rows_that_end_inside_a_byte_are_no_rows() -> None:
    data = safetensors_file({"w": ("F4", (2, 33), bytes(33)), "even": ("F4", (2, 34), bytes(34))})
    assert [(each.name, each.row_bytes) for each in parse_safetensors(source(data))[1:]] == [
        ("w", 0),
        ("even", 17),
    ]


@pytest.mark.parametrize("dtype", [None, 5, [], {}, "F6_E9M9"])
def test_a_data_type_that_is_not_known_is_carried_as_it_is(dtype: Any) -> None:
    regions = parse_safetensors(source(_safe({"w": _entry(dtype, [9], [0, 2])}, bytes(2))))
    assert [(each.name, each.layout) for each in regions] == [("", Layout.RAW), ("w", Layout.RAW)]


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        (5, [0, 0]),
        ("ab", [0, 0]),
        (None, [0, 0]),
        ([0] * 17, [0, 0]),
        ([0, "1"], [0, 0]),
        ([0, 1.0], [0, 0]),
        ([0, 1 << 63], [0, 0]),
        ([0], None),
        ([0], 0),
        ([0], {"0": 0, "1": 0}),
        ([0], [0, 0, 0]),
        ([0], [0, -1]),
    ],
)
def test_shapes_and_offsets_that_are_none_are_refused(shape: Any, offsets: Any) -> None:
    with pytest.raises(ModelFileError, match="wrong shape or wrong offsets"):
        parse_safetensors(source(_safe({"w": _entry("I8", shape, offsets)})))


def test_the_largest_shape_and_the_longest_name_are_taken() -> None:
    for name, shape in [("w", [0] * 16), ("w", [0, (1 << 63) - 1]), ("n" * 4096, [0])]:
        assert len(parse_safetensors(source(_safe({name: _entry("I8", shape)})))) == 1
    with pytest.raises(ModelFileError, match="name has 4097 bytes"):
        parse_safetensors(source(_safe({"n" * 4097: _entry()})))
