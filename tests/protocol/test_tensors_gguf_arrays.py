"""Arrays in the metadata of GGUF files, read after the file was checked: tokens, scores, types of tokens."""

import struct

import pytest

from protocol.errors import ModelFileError
from protocol.tensors import parse_gguf
from protocol.tensors.gguf import ArrayValue, read_array
from tests.protocol.model_files import GgufBuilder, source

_UINT8, _INT32, _STRING, _ARRAY = 0, 5, 8, 9


def _array(kind: int, count: int, elements: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


FILE = GgufBuilder(
    key_values=[
        ("tokens", _ARRAY, _array(_STRING, 3, _text("the") + _text("") + _text("é"))),
        ("scores", _ARRAY, _array(_INT32, 2, struct.pack("<ii", -1, 1 << 20))),
        ("types", _ARRAY, _array(_UINT8, 3, bytes([7, 0, 255]))),
        ("empty", _ARRAY, _array(_INT32, 0, b"")),
    ]
).build()


def _found(name: str) -> ArrayValue:
    value = parse_gguf(source(FILE)).metadata[name]
    assert isinstance(value, ArrayValue)
    return value


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("tokens", [b"the", b"", "é".encode()]),
        ("scores", [struct.pack("<i", -1), struct.pack("<i", 1 << 20)]),
        ("types", [b"\x07", b"\x00", b"\xff"]),
        ("empty", []),
    ],
)
def test_elements_are_read_as_their_bytes(name: str, elements: list[bytes]) -> None:
    assert read_array(source(FILE), _found(name)) == elements


@pytest.mark.parametrize("name", ["tokens", "scores"])
def test_a_file_that_is_no_longer_the_one_that_was_parsed_is_refused(name: str) -> None:
    found = _found(name)
    with pytest.raises(ModelFileError):
        read_array(source(FILE[: found.offset + 7]), found)
