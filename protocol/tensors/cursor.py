"""A bounded position in a `ReadAt`: integers and byte strings out, never more memory than one page and one field."""

import struct

from protocol.errors import ModelFileError
from protocol.tensors.regions import ReadAt

_PAGE_BYTES = 64 * 1024
_LENGTH = struct.Struct("<Q")


class Cursor:
    """Reads forward through a source, checking every length against what is left.

    Args:
        source: What is read.
        what: Names the file kind in errors.
        position: Where to start.
        end: Where to stop; the source's length unless given.
    """

    def __init__(self, source: ReadAt, what: str, *, position: int = 0, end: int | None = None) -> None:
        self._source = source
        self._what = what
        self._page = b""  # of bytes up to `end` at most
        self._page_start = position
        self.position = position  # only moves forward, so never before the page
        self.end = source.length if end is None else end

    @property
    def remaining(self) -> int:
        """Bytes until the end."""
        return self.end - self.position

    def skip(self, length: int, field: str) -> None:
        """Move on by `length` bytes.

        Raises:
            ModelFileError: Fewer bytes are left.
        """
        if length > self.remaining:
            raise ModelFileError(f"{self._what}: {field} needs {length} bytes, {self.remaining} are left")
        self.position += length

    def read(self, length: int, field: str) -> bytes:
        """Return the next `length` bytes.

        Raises:
            ModelFileError: Fewer bytes are left.
        """
        start = self.position
        self.skip(length, field)
        inside = start - self._page_start
        if inside + length > len(self._page):
            wanted = max(length, min(_PAGE_BYTES, self.end - start))
            self._page = self._source.read_at(start, wanted)
            self._page_start = start
            inside = 0
            if len(self._page) < length:
                raise ModelFileError(
                    f"{self._what}: {field} could not be read, the file ends at {start + len(self._page)}"
                )
        return self._page[inside : inside + length]

    def unsigned(self, width: int, field: str) -> int:
        """Return a little-endian unsigned integer of `width` bytes."""
        return int.from_bytes(self.read(width, field), "little")

    def skip_strings(self, count: int, length_max: int, field: str) -> None:
        """Move on by `count` strings, each behind its length as eight bytes.

        Raises:
            ModelFileError: Fewer bytes are left, or a string is longer than `length_max`.
        """
        for _ in range(count):
            inside = self.position - self._page_start
            if inside + 8 > len(self._page):
                length = self.unsigned(8, f"string length in {field}")
            else:  # vocabularies have hundreds of thousands
                length = _LENGTH.unpack_from(self._page, inside)[0]
                self.position += 8
            if length > length_max:
                raise ModelFileError(f"{self._what}: {field} has a string of {length} bytes")
            self.skip(length, field)

    def varint(self, field: str) -> int:
        """Return a protobuf varint of at most 64 bits."""
        inside = self.position - self._page_start
        if inside < len(self._page) and self._page[inside] < 0x80:
            self.position += 1  # most are one byte; files have millions of them
            return self._page[inside]
        value = 0
        for shift in range(0, 70, 7):
            byte = self.read(1, field)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value
        raise ModelFileError(f"{self._what}: {field} is an integer of more than 64 bits")
