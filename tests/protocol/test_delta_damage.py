"""No byte of a delta file can be changed without an error or the very same result, whoever changes it."""

import numpy as np
import pytest

from protocol.delta.format import Codec
from protocol.delta.inspection import inspect_delta
from protocol.errors import PatchError
from protocol.tensors import BytesSource, Layout
from tests.protocol.delta_files import apply, delta, header_end, records, sealed, with_segment
from tests.protocol.model_files import GgufBuilder, GgufTensor, blocks, moved_blocks, onnx_file

_RNG = np.random.default_rng(21)
_MASKS = (0x01, 0xFF, 0x80, 0x10, 0x03)
_NOISE = _RNG.integers(0, 256, 6000, dtype=np.uint8).tobytes()


def _every_codec() -> tuple[bytes, bytes]:
    """A pair whose delta has all rungs: copied, moved, text, noise, tensors with and without a base."""
    old = blocks(Layout.Q4_0, 40, 1)
    steady = blocks(Layout.Q8_0, 70, 3)
    text = b"".join(b"token %d of the vocabulary\n" % i for i in range(200))

    def build(data: bytes, value: bytes, noise: bytes) -> bytes:
        tensors = [
            GgufTensor("steady", (70 * 32,), 8, steady),
            GgufTensor("w", (40 * 32,), 2, data),
            GgufTensor("x", (256 * len(noise) // 66,), 16, noise),
        ]
        return GgufBuilder(tensors, [("text", 8, len(value).to_bytes(8, "little") + value)]).build()

    base = build(old, text, _NOISE[:66])
    new = build(
        moved_blocks(Layout.Q4_0, old, 2, 0.03), text.replace(b"7 of", b"seven of"), _NOISE[: 20 * 66]
    )
    return base, new


_BASE, _NEW = _every_codec()
_PATCH, _STATS = delta(_BASE, _NEW, 2048)
_PORTABLE, _PORTABLE_STATS = delta(_BASE, _NEW, 2048, is_portable=True)
_RAW_PATCH, _RAW_STATS = delta(b"", _NOISE[:300], 2048)
_PAIRS = [
    pytest.param(_BASE, _NEW, _PATCH, id="model"),
    pytest.param(_BASE, _NEW, _PORTABLE, id="portable"),
    pytest.param(b"", _NOISE[:300], _RAW_PATCH, id="noise"),
]


def test_the_damaged_files_have_every_rung() -> None:
    found = set(_STATS.segments) | set(_PORTABLE_STATS.segments) | set(_RAW_STATS.segments)
    assert found == set(Codec) - {Codec.TABLES, Codec.NOTES, Codec.END}
    assert Codec.CONTEXT not in _PORTABLE_STATS.segments
    assert apply(_BASE, _PATCH) == _NEW


@pytest.mark.parametrize(("base", "new", "patch"), _PAIRS)
def test_no_byte_can_be_flipped_unnoticed(base: bytes, new: bytes, patch: bytes) -> None:
    assert apply(base, patch) == new
    for offset in range(len(patch)):
        damaged = bytearray(patch)
        damaged[offset] ^= _MASKS[offset % len(_MASKS)]
        with pytest.raises(PatchError):
            apply(base, bytes(damaged))


def test_inspection_notices_flipped_bytes_too() -> None:
    for offset in range(0, len(_PATCH), 3):
        damaged = bytearray(_PATCH)
        damaged[offset] ^= 0x20
        with pytest.raises(PatchError):
            inspect_delta(BytesSource(bytes(damaged)))


@pytest.mark.parametrize(("base", "new", "patch"), _PAIRS)
def test_bytes_changed_together_with_their_checksums_never_change_the_result(
    base: bytes, new: bytes, patch: bytes
) -> None:
    layout = records(patch)
    for offset in range(header_end(patch), len(patch)):
        damaged = bytearray(patch)
        damaged[offset] ^= _MASKS[offset % len(_MASKS)]
        try:
            result = apply(base, sealed(bytes(damaged), layout))
        except PatchError:
            continue
        assert result == new


def test_lengths_that_grow_with_their_checksums_are_refused() -> None:
    for index, record in enumerate(records(_PATCH)[:-1]):
        assert record.segment is not None
        for name in ("payload_length", "parameter_length", "result_length"):
            changed = with_segment(_PATCH, index, **{name: getattr(record.segment, name) + 1})
            if changed != _PATCH:  # not every record holds every length
                with pytest.raises(PatchError):
                    apply(_BASE, changed)


def test_self_compressed_segments_resist_damage() -> None:
    new = onnx_file({"w": np.zeros((64, 64), np.float32)}) + b"text " * 500
    patch, stats = delta(b"", new, 4096)
    assert stats.segments[Codec.SELF]
    layout = records(patch)
    for offset in range(layout[0].offset + layout[0].length, len(patch)):
        damaged = bytearray(patch)
        damaged[offset] ^= 0x11
        with pytest.raises(PatchError):
            apply(b"", bytes(damaged))
        try:
            assert apply(b"", sealed(bytes(damaged), layout)) == new
        except PatchError:
            continue
