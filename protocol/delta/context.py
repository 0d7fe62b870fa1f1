"""What a coder of context segments carries from one segment to the next, and which implementation does the work.

The library and the reference in Python give the same bytes and keep the same state, so a state that one of them left can be
taken up by the other.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Protocol, Self

from protocol.delta.native import context as native
from protocol.delta.reference import context as reference
from protocol.delta.runs import Basis, ContextRun
from protocol.errors import PatchError

_HEAD = struct.Struct("<II")  # lengths of the state and of the basis, unpacked
_DEFLATE_LEVEL = 1  # most of a state is as it was at the start


class Coder(Protocol):
    """An implementation."""

    def state_bytes(self) -> int:
        """Length of a state."""
        ...

    def reset(self, state: bytearray, /) -> None:
        """Make `state` that of a coder that has seen nothing."""
        ...

    def encode(self, state: bytearray, runs: Sequence[ContextRun], window: bytes, result: bytes, /) -> bytes:
        """Return the payload for `result`, and move `state` on."""
        ...

    def decode(
        self, state: bytearray, runs: Sequence[ContextRun], window: bytes, payload: bytes, /
    ) -> bytes | None:
        """Return the result, and move `state` on; None if not all of the payload was used."""
        ...


def implementation() -> Coder:
    """Return the library where it is, else the reference."""
    coder: Coder = native if native.is_available() else reference
    return coder


def is_fast() -> bool:
    """Tell whether context segments can be written at a bearable speed."""
    return native.is_available()


class ContextModel:
    """The state of one coder.

    Attributes:
        basis: What the last tables record brought.
    """

    def __init__(self) -> None:
        self._coder = implementation()
        self._state: bytearray | None = None
        self.basis: Basis | None = None

    def reset(self) -> None:
        """Forget everything that was learned; the basis stays."""
        if self._state is None:
            self._state = bytearray(self._coder.state_bytes())
        self._coder.reset(self._state)

    def encode(self, runs: Sequence[ContextRun], window: bytes, result: bytes) -> bytes:
        """Return the payload for `result`."""
        assert self._state is not None
        return self._coder.encode(self._state, runs, window, result)

    def decode(self, runs: Sequence[ContextRun], window: bytes, payload: bytes) -> bytes:
        """Return what `payload` stands for.

        Raises:
            PatchError: It goes on after its end, or nothing came before a segment that goes on.
        """
        if self._state is None:
            raise PatchError("a segment goes on from one that is not there")
        result = self._coder.decode(self._state, runs, window, payload)
        if result is None:
            raise PatchError("a context segment has bytes that it does not need")
        return result

    def snapshot(self) -> bytes | None:
        """Return what `rewind` takes."""
        return None if self._state is None else bytes(self._state)

    def rewind(self, snapshot: bytes | None) -> None:
        """Go back to a snapshot."""
        self._state = None if snapshot is None else bytearray(snapshot)

    def dump(self) -> bytes:
        """Return everything as bytes, compressed; nothing if there is nothing."""
        if self._state is None and self.basis is None:
            return b""
        state = bytes(self._state or b"")
        basis = self.basis.pack() if self.basis else b""
        return _HEAD.pack(len(state), len(basis)) + zlib.compress(state + basis, _DEFLATE_LEVEL)

    @classmethod
    def load(cls, data: bytes) -> Self:
        """Return the model that `dump` described.

        Raises:
            PatchError: The bytes are damaged, or of another version.
        """
        model = cls()
        if not data:
            return model
        expected = model._coder.state_bytes()
        try:
            state_length, basis_length = _HEAD.unpack_from(data)
            length = state_length + basis_length
            inflater = zlib.decompressobj()
            content = inflater.decompress(data[_HEAD.size :], length + 1)
        except (struct.error, zlib.error) as error:
            raise PatchError("a stored model is damaged", hint="start the delta again") from error
        if state_length not in {0, expected} or len(content) != length:
            raise PatchError("a stored model is of another version", hint="start the delta again")
        if state_length:
            model._state = bytearray(content[:state_length])
        if basis_length:
            model.basis = Basis.unpack(content[state_length:])
        return model
