"""What every parser reads through: never beyond the end, never more than a page and a field at a time."""

import struct

import pytest

from protocol.errors import ModelFileError
from protocol.tensors.cursor import Cursor

PAGE_BYTES = 64 * 1024


class Counting:
    """Bytes that remember how they were read.

    Args:
        data: What there is.
        length: What is said to be there.
    """

    def __init__(self, data: bytes, length: int | None = None) -> None:
        self._data = data
        self.length = len(data) if length is None else length
        self.reads: list[tuple[int, int]] = []

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return self._data[offset : offset + length]


def test_small_fields_are_read_a_page_at_a_time() -> None:
    data = bytes(range(256)) * 1024  # four pages
    source = Counting(data)
    cursor = Cursor(source, "file")
    assert b"".join(cursor.read(64, "field") for _ in range(len(data) // 64)) == data
    assert source.reads == [(page * PAGE_BYTES, PAGE_BYTES) for page in range(4)]


def test_a_large_field_is_read_at_once_and_nothing_after_it() -> None:
    source = Counting(bytes(3 * PAGE_BYTES))
    cursor = Cursor(source, "file", position=5)
    assert len(cursor.read(2 * PAGE_BYTES, "field")) == 2 * PAGE_BYTES
    assert source.reads == [(5, 2 * PAGE_BYTES)]


def test_nothing_beyond_the_end_of_a_field_is_looked_at() -> None:
    source = Counting(bytes(1000))
    cursor = Cursor(source, "file", position=900, end=950)
    assert cursor.read(50, "field") == bytes(50)
    assert source.reads == [(900, 50)]
    for read in (
        lambda: cursor.read(1, "more"),
        lambda: cursor.skip(1, "more"),
        lambda: cursor.varint("more"),
    ):
        with pytest.raises(ModelFileError, match="more needs 1 bytes, 0 are left"):
            read()
    with pytest.raises(ModelFileError, match="more needs 8 bytes, 0 are left"):
        cursor.skip_strings(1, 100, "more")


def test_a_file_that_was_cut_while_it_was_read_is_refused() -> None:
    cursor = Cursor(Counting(b"abc", length=10), "file")
    with pytest.raises(ModelFileError, match="field could not be read, the file ends at 3"):
        cursor.read(4, "field")


def strings(lengths: list[int]) -> bytes:
    return b"".join(struct.pack("<Q", length) + b"s" * length for length in lengths)


@pytest.mark.parametrize("first", range(9))
def test_strings_may_lie_across_pages_in_any_way(first: int) -> None:
    data = strings([first, *[1] * 20_000]) + b"behind"
    source = Counting(data)
    cursor = Cursor(source, "file")
    cursor.skip_strings(20_001, 9, "names")
    assert cursor.read(6, "rest") == b"behind"
    assert len(source.reads) <= 4


def test_a_string_of_exactly_the_largest_length_is_passed_over_and_no_longer_one() -> None:
    data = strings([0, 7, 7, 8])
    Cursor(Counting(data), "file").skip_strings(3, 7, "names")
    for count, limit in [(4, 7), (3, 6), (2, 6)]:
        with pytest.raises(ModelFileError, match=f"names has a string of {limit + 1} bytes"):
            Cursor(Counting(data), "file").skip_strings(count, limit, "names")


def test_a_string_that_is_cut_off_is_refused_wherever_it_ends() -> None:
    data = strings([3, 3])
    for length in range(len(data)):
        with pytest.raises(ModelFileError, match="are left"):
            Cursor(Counting(data[:length]), "file").skip_strings(2, 3, "names")


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\x00", 0),
        (b"\x7f", 127),
        (b"\x80\x01", 128),
        (b"\xff" * 9 + b"\x01", (1 << 64) - 1),
        (b"\x80" * 9 + b"\x01", 1 << 63),
    ],
)
def test_integers_up_to_64_bits_are_read(data: bytes, value: int) -> None:
    for before in (0, 1, PAGE_BYTES - 1, PAGE_BYTES):
        cursor = Cursor(Counting(bytes(before) + data + b"\x05"), "file")
        cursor.read(before, "before")
        assert cursor.varint("integer") == value
        assert cursor.varint("integer") == 5


@pytest.mark.parametrize("data", [b"\x80" * 9 + b"\x02", b"\xff" * 9 + b"\x7f", b"\x80" * 10 + b"\x01"])
def test_integers_of_more_than_64_bits_are_refused(data: bytes) -> None:
    with pytest.raises(ModelFileError, match="more than 64 bits"):
        Cursor(Counting(data), "file").varint("integer")
