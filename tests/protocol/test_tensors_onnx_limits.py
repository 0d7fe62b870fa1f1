"""Edges of what the walk through ONNX files takes: the last that is accepted, and the first that is refused; fields of another kind."""

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from protocol.errors import ModelFileError
from protocol.tensors import Layout, Region, map_external, onnx, parse_onnx
from protocol.tensors.onnx import MAX_FILE_BYTES
from protocol.tensors.onnx_weights import USE_INPUTS_MAX
from tests.protocol.model_files import external_tensor, onnx_file, onnx_model, source

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_F32 = np.zeros(16, np.float32)


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value >= 0x80 else bytes([value])


def field(number: int, wire: int, payload: bytes) -> bytes:
    return varint(number << 3 | wire) + (varint(len(payload)) if wire == _BYTES else b"") + payload


def text(number: int, value: str) -> bytes:
    return field(number, _BYTES, value.encode())


Junk = dict[str, tuple[bytes, bytes]]
"""What stands before and behind the fields of a kind of message."""


class Builder:
    """A model that has a message of every kind, with junk in some of them.

    Args:
        junk: By the kind of message.
    """

    def __init__(self, junk: Junk) -> None:
        self._junk = junk

    def message(self, kind: str, number: int, *fields: bytes) -> bytes:
        before, behind = self._junk.get(kind, (b"", b""))
        return field(number, _BYTES, before + b"".join(fields) + behind)

    def tensor(
        self, number: int, name: str, data_type: int = 1, dims: bytes = b"\x10", length: int = 64
    ) -> bytes:
        about = field(1, _BYTES, dims) + field(2, _VARINT, varint(data_type)) + text(8, name)
        return self.message("tensor", number, about, field(9, _BYTES, bytes(length)))

    def elsewhere(self, number: int, name: str) -> bytes:
        about = field(1, _BYTES, b"\x10") + field(2, _VARINT, b"\x01") + text(8, name)
        entries = [("location", "weights.data"), ("offset", "64"), ("length", "64")]
        placed = [self.message("entry", 13, text(1, key), text(2, value)) for key, value in entries]
        return self.message("tensor", number, about, *placed, field(14, _VARINT, b"\x01"))

    def sparse(self, number: int, name: str) -> bytes:
        return self.message(
            "sparse", number, self.tensor(1, f"{name} values"), self.tensor(2, f"{name} indices")
        )

    def attributes(self) -> bytes:
        """One of every kind that can hold a tensor."""
        inner = {name: self.message("graph", 6, self.tensor(5, name)) for name in ("g",)}
        graphs = b"".join(self.message("graph", 11, self.tensor(5, f"graphs {number}")) for number in (1, 2))
        return b"".join(
            self.message("attribute", 5, text(1, name), content)
            for name, content in [
                ("t", self.tensor(5, "t")),
                ("tensors", self.tensor(10, "tensors 1") + self.tensor(10, "tensors 2")),
                ("g", inner["g"]),
                ("graphs", graphs),
                ("sparse", self.sparse(22, "s")),
                ("sparses", self.sparse(23, "ss 1") + self.sparse(23, "ss 2")),
                ("bits", field(3, _VARINT, b"\x04")),
            ]
        )

    def model(self) -> bytes:
        inputs = text(1, "x") + text(1, "codes") + text(1, "scales")
        node = self.message("node", 1, inputs, text(4, "MatMulNBits"), self.attributes())
        graph = self.message(
            "graph",
            7,
            node,
            self.tensor(5, "codes", data_type=2, dims=b"\x04\x04\x10", length=256),
            self.elsewhere(5, "outside"),
            self.sparse(15, "sparse"),
        )
        constant = self.message("attribute", 5, text(1, "value"), self.tensor(5, "in a function"))
        default = self.message("attribute", 11, text(1, "value"), self.tensor(5, "default"))
        function = self.message("function", 25, self.message("node", 7, constant), default)
        starts = [self.message("graph", number, self.tensor(5, f"training {number}")) for number in (1, 2)]
        training = self.message("training", 20, *starts)
        before, behind = self._junk.get("model", (b"", b""))
        return before + field(1, _VARINT, b"\x08") + graph + training + function + behind


def seen(data: bytes) -> list[tuple[str, Layout, tuple[int, ...], int, str]]:
    """Everything that a map says, apart from where in the file it lies."""
    parsed = parse_onnx(source(data))
    found = [region for region in parsed.regions if region.name] + list(parsed.external["weights.data"])
    return [(each.name, each.layout, each.dims, each.length, each.scales) for each in found]


def test_tensors_are_found_in_every_corner_of_a_model() -> None:
    names = {name for name, *_ in seen(Builder({}).model())}
    plain = {"codes", "outside", "t", "g", "in a function", "default"}
    pairs = {f"{name} {number}" for name in ("tensors", "graphs", "training") for number in (1, 2)}
    sparse = {f"{name} {part}" for name in ("sparse", "s", "ss 1", "ss 2") for part in ("values", "indices")}
    assert names == plain | pairs | sparse
    assert ("codes", Layout.PACKED4, (4, 128), 256, "scales") in seen(Builder({}).model())


KNOWN: dict[str, dict[int, tuple[int, ...]]] = {
    "model": {_BYTES: (7, 20, 25)},
    "graph": {_BYTES: (1, 5, 15)},
    "training": {_BYTES: (1, 2)},
    "function": {_BYTES: (7, 11)},
    "sparse": {_BYTES: (1, 2)},
    "node": {_BYTES: (1, 4, 5)},
    "attribute": {_BYTES: (1, 5, 6, 10, 11, 22, 23), _VARINT: (3,)},
    "tensor": {_BYTES: (4, 8, 9, 13), _VARINT: (2, 14)},
    "entry": {_BYTES: (1, 2)},
}
"""The fields that the walk knows, by message, with the wire type that they have."""

WIRES = [(_VARINT, b"\x0b"), (_VARINT, b"\x01"), (_FIXED64, b"\x0b" * 8), (_FIXED32, b"\x0b" * 4)]
WIRES += [(_BYTES, b"\x0b"), (_BYTES, b"\x01")]
"""Contents that are no message, and another name or number wherever one is read; 1 makes a tensor lie elsewhere."""


@pytest.mark.parametrize("kind", KNOWN)
def test_a_field_of_another_wire_type_or_number_is_passed_over_as_every_reader_does(kind: str) -> None:
    expected = seen(Builder({}).model())
    known = {number: wire for wire, numbers in KNOWN[kind].items() for number in numbers}
    for number in sorted({*known, 3, 12, 99} - ({1} if kind == "tensor" else set())):
        for wire, payload in WIRES:
            if known.get(number) == wire:
                continue
            junk = field(number, wire, payload)
            for places in ((junk, b""), (b"", junk)):
                assert seen(Builder({kind: places}).model()) == expected, f"{kind} {number} {wire}"


@pytest.mark.parametrize("kind", ["graph", "training", "function", "sparse"])
def test_a_message_that_is_none_is_refused_wherever_it_stands(kind: str) -> None:
    for number in KNOWN[kind][_BYTES]:
        junk = field(number, _BYTES, b"\x0b")
        with pytest.raises(ModelFileError, match="unknown wire type 3"):
            parse_onnx(source(Builder({kind: (b"", junk)}).model()))


class Said:
    """A short file that is said to be long.

    Args:
        data: What there is.
        length: What is said.
    """

    def __init__(self, data: bytes, length: int) -> None:
        self._data = data
        self.length = length

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def test_a_file_that_protobuf_could_not_hold_is_refused_before_it_is_read() -> None:
    for length, message in [
        (MAX_FILE_BYTES, "could not be read"),
        (MAX_FILE_BYTES + 1, "protobuf cannot hold more"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            parse_onnx(Said(b"\x08\x07", length))


def test_values_that_are_no_run_of_bytes_are_no_tensor() -> None:
    tensor = helper.make_tensor("w", TensorProto.INT32, [100], list(range(100)))
    assert [region.name for region in parse_onnx(source(onnx_model([], [tensor]))).regions] == [""]


def test_a_tensor_has_a_region_of_its_own_from_64_bytes_on() -> None:
    data = onnx_file({"small": np.zeros(63, np.int8), "large": np.zeros(64, np.int8)})
    assert [region.name for region in parse_onnx(source(data)).regions if region.name] == ["large"]
    for length in (63, 64):
        found = map_external((Region("w", Layout.I8, 0, length),), 100)
        assert [region.name for region in found] == (["w", ""] if length == 64 else [""])


def test_an_empty_tensor_elsewhere_names_its_file_and_no_region() -> None:
    tensor = external_tensor("none", np.zeros(0, np.float32), location="weights.data")
    assert parse_onnx(source(onnx_model([], [tensor]))).external == {"weights.data": ()}


def test_as_many_fields_and_letters_as_are_left_are_read_and_no_more() -> None:
    data = field(99, _VARINT, b"\x01") * 3
    assert len(list(onnx._fields(onnx._Walk(source(data), fields_left=3), 0, len(data)))) == 3
    with pytest.raises(ModelFileError, match="fields"):
        list(onnx._fields(onnx._Walk(source(data), fields_left=2), 0, len(data)))
    assert onnx._text(onnx._Walk(source(b"name"), text_bytes_left=4), 0, 4) == "name"
    with pytest.raises(ModelFileError, match="names take more"):
        onnx._text(onnx._Walk(source(b"name"), text_bytes_left=3), 0, 4)
    walk = onnx._Walk(source(b"namename"), text_bytes_left=7)
    onnx._text(walk, 0, 4)
    with pytest.raises(ModelFileError, match="names take more"):
        onnx._text(walk, 4, 8)


def test_the_largest_number_of_a_field_is_passed_over() -> None:
    data = onnx_file({"w": _F32})
    assert parse_onnx(source(data + field((1 << 29) - 1, _VARINT, b"\x01"))).regions
    with pytest.raises(ModelFileError, match="field number 536870912"):
        parse_onnx(source(data + field(1 << 29, _VARINT, b"\x01")))


def test_inputs_that_say_nothing_about_weights_are_not_read() -> None:
    node = text(1, "input") * (USE_INPUTS_MAX + 1)
    walk = onnx._Walk(source(node), text_bytes_left=5 * USE_INPUTS_MAX)
    onnx._walk_node(walk, 0, len(node), 8)
    assert walk.text_bytes_left == 0


def test_an_attribute_that_is_no_integer_says_nothing_about_bits() -> None:
    codes = helper.make_tensor("w", TensorProto.UINT8, [4, 4, 16], bytes(256), raw=True)
    node = helper.make_node("MatMulNBits", ["x", "w", "scales"], ["y"], bits=8.0)
    found = next(each for each in parse_onnx(source(onnx_model([node], [codes]))).regions if each.name)
    assert found.layout is Layout.PACKED4


def tensor_of(change: Callable[[TensorProto], None]) -> bytes:
    tensor = helper.make_tensor("w", TensorProto.INT8, [64], bytes(64), raw=True)
    change(tensor)
    return onnx_model([], [tensor])


def shaped(dims: list[int], data_type: int = TensorProto.INT8) -> bytes:
    def change(tensor: TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(dims)
        tensor.data_type = data_type

    return tensor_of(change)


def test_tensors_of_up_to_32_dimensions_are_taken() -> None:
    assert parse_onnx(source(shaped([64, *[1] * 31]))).regions[1].name == "w"
    with pytest.raises(ModelFileError, match="more than 32 dimensions"):
        parse_onnx(source(shaped([64, *[1] * 32])))


def test_packed_dimensions_take_no_more_bytes_than_32_of_them_can() -> None:
    longest = b"\x81" + b"\x80" * 8 + b"\x00"  # a one in ten bytes
    for packed, is_taken in [(longest * 32, True), (longest * 32 + b"\x01", False)]:
        body = field(1, _BYTES, packed) + field(2, _VARINT, b"\x03") + field(9, _BYTES, b"w")
        data = field(7, _BYTES, field(5, _BYTES, body))
        if is_taken:
            assert parse_onnx(source(data)).regions
        else:
            with pytest.raises(ModelFileError, match="are not integers"):
                parse_onnx(source(data))


def test_the_largest_shape_is_taken_and_no_larger_one_even_beside_a_zero() -> None:
    unknown = 99  # a type of which nobody knows how long it is
    for dims, is_taken in [
        ([1 << 24, 1 << 24], True),
        ([1 << 24, 1 << 24, 0], True),
        ([1 << 24, (1 << 24) + 1], False),
        ([1 << 24, 1 << 25, 0], False),
    ]:
        if is_taken:
            assert parse_onnx(source(shaped(dims, unknown))).regions[1].dims == tuple(dims)
        else:
            with pytest.raises(ModelFileError, match="no file can hold"):
                parse_onnx(source(shaped(dims, unknown)))


def test_a_dimension_may_be_as_large_as_an_int64_and_not_negative() -> None:
    for value, message in [((1 << 63) - 1, "no file can hold"), (1 << 63, "is negative")]:
        body = field(1, _VARINT, varint(value))
        data = field(7, _BYTES, field(5, _BYTES, body))
        with pytest.raises(ModelFileError, match=message):
            parse_onnx(source(data))


def test_dimensions_of_another_wire_type_are_refused() -> None:
    for wire, payload in [(_FIXED64, bytes(8)), (_FIXED32, bytes(4))]:
        data = field(7, _BYTES, field(5, _BYTES, field(1, wire, payload)))
        with pytest.raises(ModelFileError, match="are not integers"):
            parse_onnx(source(data))


def test_dimensions_may_be_packed_or_not() -> None:
    for dims in (field(1, _BYTES, b"\x02\x08"), field(1, _VARINT, b"\x02") + field(1, _VARINT, b"\x08")):
        body = dims + field(2, _VARINT, b"\x01") + text(8, "w") + field(9, _BYTES, bytes(64))
        (*_, region) = parse_onnx(source(field(7, _BYTES, field(5, _BYTES, body)))).regions
        assert region.dims == (2, 8)


@pytest.mark.parametrize(("number", "value"), [(2, (1 << 31) - 1), (2, 1 << 31), (14, 1 << 31)])
def test_a_number_that_readers_cut_to_another_is_refused(number: int, value: int) -> None:
    body = field(1, _BYTES, b"\x10") + text(8, "w") + field(9, _BYTES, bytes(64))
    data = field(7, _BYTES, field(5, _BYTES, body + field(number, _VARINT, varint(value))))
    if value < 1 << 31:
        assert parse_onnx(source(data)).regions[1].layout is Layout.RAW
    else:
        with pytest.raises(ModelFileError, match="no value of an enumeration"):
            parse_onnx(source(data))


def test_a_tensor_that_only_says_to_lie_elsewhere_lies_nowhere() -> None:
    def change(tensor: TensorProto) -> None:
        tensor.data_location = TensorProto.EXTERNAL

    with pytest.raises(ModelFileError, match="lies in ''"):
        parse_onnx(source(tensor_of(change)))


def test_a_name_of_the_largest_length_is_read_and_no_longer_one() -> None:
    for length in (4096, 4097):
        data = onnx_file({"n" * length: np.zeros(64, np.int8)})
        if length == 4096:
            assert parse_onnx(source(data)).regions[1].name == "n" * length
        else:
            with pytest.raises(ModelFileError, match="more than 4096 bytes"):
                parse_onnx(source(data))


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(ModelFileError, match="is not UTF-8"):
        parse_onnx(source(field(7, _BYTES, field(5, _BYTES, field(8, _BYTES, b"\xff")))))


def test_as_many_tensors_and_files_as_the_limit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "MAX_TENSORS", 2)
    monkeypatch.setattr(onnx, "MAX_LOCATIONS", 2)
    for count in (2, 3):
        inside = onnx_file({f"w{number}": _F32 for number in range(count)})
        if count == 2:
            assert len(parse_onnx(source(inside)).regions) == 5
        else:
            with pytest.raises(ModelFileError, match="more than 2 tensors"):
                parse_onnx(source(inside))
    monkeypatch.setattr(onnx, "MAX_TENSORS", 9)
    for count in (2, 3):
        tensors = [external_tensor(f"w{number}", _F32, location=f"f{number}") for number in range(count)]
        if count == 2:
            assert set(parse_onnx(source(onnx_model([], tensors))).external) == {"f0", "f1"}
        else:
            with pytest.raises(ModelFileError, match="more than 2 files"):
                parse_onnx(source(onnx_model([], tensors)))


def test_packed_floats_are_a_tensor_from_64_bytes_on() -> None:
    for count in (15, 16):
        tensor = helper.make_tensor("w", TensorProto.FLOAT, [count], [0.5] * count)
        names = [region.name for region in parse_onnx(source(onnx_model([], [tensor]))).regions]
        assert ("w" in names) is (count == 16)
        tensor.dims[0] += 1  # a few values are bytes like those around them, whatever they say
        if count == 15:
            assert parse_onnx(source(onnx_model([], [tensor]))).regions


@pytest.mark.parametrize(
    ("entries", "is_taken"),
    [
        ({"location": "w", "offset": "9" * 19, "length": "64"}, True),
        ({"location": "w", "offset": "9" * 20, "length": "64"}, False),
        ({"location": "w", "offset": "+1", "length": "64"}, False),
        ({"location": "w", "offset": "٣", "length": "64"}, False),
        ({"location": "w", "offset": "", "length": ""}, True),
        ({"location": "w", "offset": "0", "length": "x"}, False),
    ],
)
def test_offsets_are_decimal_numbers_of_at_most_19_digits(entries: dict[str, str], is_taken: bool) -> None:
    data = onnx_model([], [external_tensor("w", _F32, **entries)])
    if is_taken:
        assert parse_onnx(source(data)).external["w"][0].offset == int(entries["offset"] or 0)
    else:
        with pytest.raises(ModelFileError, match="has the offset or length"):
            parse_onnx(source(data))


def test_a_tensor_elsewhere_of_unknown_type_has_to_say_how_long_it_is() -> None:
    tensor = external_tensor("w", _F32, location="w")
    tensor.data_type = 99
    with pytest.raises(ModelFileError, match="has no length"):
        parse_onnx(source(onnx_model([], [tensor])))
    tensor.external_data.add(key="length", value="64")
    assert parse_onnx(source(onnx_model([], [tensor]))).external["w"][0].length == 64


def test_a_location_may_begin_with_the_folder_itself() -> None:
    data = onnx_model([], [external_tensor("w", _F32, location="./deeper/w.data")])
    assert set(parse_onnx(source(data)).external) == {"deeper/w.data"}


def test_a_model_without_a_graph_is_none() -> None:
    model = ModelProto(ir_version=8, producer_name="nobody")
    with pytest.raises(ModelFileError, match="no graph"):
        parse_onnx(source(model.SerializeToString()))
