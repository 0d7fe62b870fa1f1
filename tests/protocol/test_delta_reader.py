"""The push reader: any split of the input, any interruption, and what is refused at once."""

import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from protocol.delta.format import HEADER_BYTES_MAX, HEADER_BYTES_MIN, REACH_BYTES_MAX, Codec, Reach
from protocol.delta.layouts import LAYOUTS
from protocol.delta.reader import STATE_BYTES_MAX, DeltaReader
from protocol.delta.tensor import Run, decode_tensor, encode_tensor, working_bytes
from protocol.errors import PatchError, PatchLimitError, TruncatedPatchError, WrongBaseError
from protocol.tensors import BytesSource, Layout
from tests.protocol.delta_files import (
    apply,
    apply_parts,
    delta,
    header_end,
    header_of,
    records,
    sealed,
    with_header,
    with_segment,
    without_segments,
)
from tests.protocol.model_files import block_file, blocks, moved_blocks

_BLOCKS = blocks(Layout.Q4_0, 450, 1)
_BASE = block_file(Layout.Q4_0, _BLOCKS)
_NEW = block_file(Layout.Q4_0, moved_blocks(Layout.Q4_0, _BLOCKS, 2))
_PATCH, _STATS = delta(_BASE, _NEW, 2048)


def test_bytes_may_come_in_any_pieces() -> None:
    rng = random.Random(5)
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, len(_PATCH)), rng.randrange(1, 60)))
        parts = [_PATCH[a:b] for a, b in pairwise([0, *cuts, len(_PATCH)])]
        assert apply_parts(_BASE, parts) == _NEW


def test_bytes_may_come_one_by_one() -> None:
    assert apply_parts(_BASE, (_PATCH[i : i + 1] for i in range(len(_PATCH)))) == _NEW


def test_a_file_that_ends_anywhere_too_early_is_called_truncated() -> None:
    for length in range(len(_PATCH)):
        with pytest.raises(TruncatedPatchError):
            apply(_BASE, _PATCH[:length])


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(PatchError, match="after the end"):
        apply(_BASE, _PATCH + b"\x00")
    with pytest.raises(PatchError, match="after the end"):
        apply_parts(_BASE, [_PATCH, b"\x00"])


def test_a_reader_goes_on_after_every_segment() -> None:
    reader = DeltaReader(BytesSource(_BASE))
    state = reader.dump()
    out = bytearray()
    pieces = 0
    while True:
        reader = DeltaReader.restore(BytesSource(_BASE), state)
        assert len(state) <= STATE_BYTES_MAX
        assert reader.result_offset == len(out)
        piece = next(reader.feed(_PATCH[reader.patch_offset :]), None)
        state = reader.dump()
        if piece is None:
            break
        assert piece.offset == len(out)
        out += piece.data
        pieces += 1
    reader.finish()
    assert pieces == _STATS.segments.total()
    assert bytes(out) == _NEW
    assert DeltaReader.restore(BytesSource(_BASE), state).is_finished


def test_a_reader_goes_on_after_an_interruption_at_any_byte() -> None:
    rng = random.Random(6)
    for _ in range(30):
        out = bytearray(len(_NEW))
        state = DeltaReader(BytesSource(_BASE)).dump()
        is_finished = False
        while not is_finished:
            reader = DeltaReader.restore(BytesSource(_BASE), state)
            start = reader.patch_offset
            for piece in reader.feed(_PATCH[start : start + rng.randrange(1, 6000)]):
                out[piece.offset : piece.offset + len(piece.data)] = piece.data
            # The power may go before the state was stored: the same segments are then decoded again.
            if rng.random() < 0.7:
                state = reader.dump()
                is_finished = reader.is_finished
        assert bytes(out) == _NEW


def test_only_a_reader_that_saw_everything_vouches_for_the_whole() -> None:
    reader = DeltaReader(BytesSource(_BASE))
    for _ in reader.feed(_PATCH):
        pass
    assert reader.is_result_verified
    reader = DeltaReader.restore(BytesSource(_BASE), DeltaReader(BytesSource(_BASE)).dump())
    for _ in reader.feed(_PATCH):
        pass
    assert reader.is_result_verified
    half = DeltaReader(BytesSource(_BASE))
    next(half.feed(_PATCH))
    reader = DeltaReader.restore(BytesSource(_BASE), half.dump())
    for _ in reader.feed(_PATCH[reader.patch_offset :]):
        pass
    assert reader.is_finished
    assert not reader.is_result_verified


def test_an_iterator_that_was_dropped_loses_nothing() -> None:
    reader = DeltaReader(BytesSource(_BASE))
    out = next(reader.feed(_PATCH)).data
    out += b"".join(piece.data for piece in reader.feed(b""))
    reader.finish()
    assert out == _NEW


@pytest.mark.parametrize("flip", range(40))
def test_a_damaged_state_is_refused(flip: int) -> None:
    reader = DeltaReader(BytesSource(_BASE))
    next(reader.feed(_PATCH))
    state = bytearray(reader.dump())
    state[flip * len(state) // 40] ^= 0x10
    with pytest.raises(PatchError):
        DeltaReader.restore(BytesSource(_BASE), bytes(state))
    with pytest.raises(PatchError):
        DeltaReader.restore(BytesSource(_BASE), bytes(state[:flip]))


def test_a_base_of_another_length_is_refused_before_the_first_segment() -> None:
    reader = DeltaReader(BytesSource(_BASE[:-1]))
    with pytest.raises(WrongBaseError):
        next(reader.feed(_PATCH[: header_end(_PATCH)]), None)


def test_a_base_with_other_content_is_found_at_its_segment() -> None:
    damaged = bytearray(_BASE)
    damaged[-100] ^= 1
    with pytest.raises(WrongBaseError, match="does not give"):
        apply(bytes(damaged), _PATCH)


class _Short(BytesSource):
    """A base that claims more than it has."""

    @property
    def length(self) -> int:
        return len(_BASE)


def test_a_base_that_ends_early_is_refused() -> None:
    reader = DeltaReader(_Short(_BASE[:1000]))
    with pytest.raises(WrongBaseError, match="could not be read"):
        for _ in reader.feed(_PATCH):
            pass


def test_a_delta_that_declares_more_memory_than_accepted_is_refused_at_once() -> None:
    declared = header_of(_PATCH).decoder_memory_bytes
    assert apply(_BASE, _PATCH, memory_limit_bytes=declared) == _NEW
    reader = DeltaReader(BytesSource(_BASE), memory_limit_bytes=declared - 1)
    with pytest.raises(PatchLimitError):
        next(reader.feed(_PATCH[: header_end(_PATCH)]), None)


def test_a_segment_that_needs_more_than_was_declared_is_refused() -> None:
    declared = header_of(_PATCH).decoder_memory_bytes
    with pytest.raises(PatchLimitError, match="were declared"):
        apply(_BASE, with_header(_PATCH, decoder_memory_bytes=declared - 30_000))


@pytest.mark.parametrize("layout", [Layout.Q4_0, Layout.Q2_K, Layout.Q8_0, Layout.F32, Layout.PACKED4])
@pytest.mark.parametrize("share", [0.01, 0.45, None])
def test_memory_stays_below_what_was_declared(layout: Layout, share: float | None) -> None:
    count = (1 << 20) // LAYOUTS[layout].block_bytes
    base = blocks(layout, count, 1)
    new = blocks(layout, count, 2) if share is None else moved_blocks(layout, base, 3, share)
    runs = [Run(LAYOUTS[layout].number, count, 0)]
    payload = encode_tensor(new, base, runs, "fast")
    tracemalloc.start()
    try:
        assert decode_tensor(payload, base, runs) == new
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= working_bytes(runs) + len(new) + (4 << 20)


def test_a_small_file_cannot_ask_for_many_copies_at_once() -> None:
    # A feed that contains thousands of copy segments must not hold all their results.
    base = np.random.default_rng(1).integers(0, 256, 8 << 20, dtype=np.uint8).tobytes()
    patch, _ = delta(base, base, 1 << 20)
    reader = DeltaReader(BytesSource(base))
    tracemalloc.start()
    try:
        total = sum(len(piece.data) for piece in reader.feed(patch))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 8 << 20
    assert peak < 6 << 20


_FIRST = header_end(_PATCH)


def _doctored(offset: int, value: bytes) -> bytes:
    out = bytearray(_PATCH)
    out[offset : offset + len(value)] = value
    return sealed(bytes(out), records(_PATCH))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"\x00", "not a delta file"),
        (8, b"\x03\x00", "format version 3"),
        (8, b"\x01\x00", "format version 1"),
        (10, (HEADER_BYTES_MIN - 1).to_bytes(2, "little"), "wrong length"),
        (10, (HEADER_BYTES_MAX + 1).to_bytes(2, "little"), "wrong length"),
        (12, b"\x09", "profile"),
        (13, b"\x01", "flags"),
        (14, b"\x03", "codec revision"),
        (15, b"\xff" * 8, "a number"),
        (_FIRST, b"\x63", "unknown kind 99"),
        (_FIRST, bytes((0x80 | Codec.COPY,)), "unknown kind 128"),
        (_FIRST + 1, b"\xff" * 7, "a number"),
    ],
)
def test_a_hostile_field_is_refused_before_anything_is_read_for_it(
    offset: int, value: bytes, message: str
) -> None:
    with pytest.raises(PatchError) as caught:
        apply(_BASE, _doctored(offset, value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_length": 1 << 41}, "more than"),
        ({"result_length": 1 << 41}, "more than"),
        ({"segment_bytes_max": 0}, "segments of 0"),
        ({"segment_bytes_max": 1 << 40}, "segments of"),
        ({"reach": Reach(REACH_BYTES_MAX + 1, 0)}, "behind its result"),
    ],
)
def test_a_header_that_says_too_much_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        apply(_BASE, with_header(_PATCH, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"result_length": 1 << 32}, "bytes, limit"),
        ({"result_length": 0}, "bytes, limit"),
        ({"window_length": 1 << 32}, "base window of"),
        ({"payload_length": 1 << 32}, "payload of"),
        ({"window_offset": 1 << 40}, "leaves the base"),
        ({"window_offset": -1}, "leaves the base"),
        ({"parameter_length": 0}, "no parameters"),
        ({"parameter_length": 65_536}, "of parameters"),
    ],
)
def test_a_record_that_says_too_much_is_refused_before_anything_is_read_for_it(
    change: dict[str, int], message: str
) -> None:
    index = next(
        i for i, each in enumerate(records(_PATCH)) if each.segment and each.segment.parameter_length
    )
    with pytest.raises(PatchError, match=message):
        apply(_BASE, with_segment(_PATCH, index, **change))


# --- long copies -----------------------------------------------------------------------------------------------

_COPIED = np.random.default_rng(4).bytes(50_000)
_AROUND = _COPIED[:20_000] + b"inserted" + _COPIED[20_000:]
_COPIES, _COPIES_STATS = delta(_COPIED, _AROUND, 2048)


def test_one_record_copies_whatever_stands_together() -> None:
    assert _COPIES_STATS.segments == {Codec.COPY: 2, Codec.RAW: 1}
    assert len(_COPIES) < 170


def test_a_reader_goes_on_in_the_middle_of_a_copy() -> None:
    out = bytearray()
    state = DeltaReader(BytesSource(_COPIED)).dump()
    while True:
        reader = DeltaReader.restore(BytesSource(_COPIED), state)
        piece = next(reader.feed(_COPIES[reader.patch_offset :]), None)
        state = reader.dump()
        if piece is None:
            break
        assert piece.offset == len(out)
        assert len(piece.data) <= 2048
        out += piece.data
    reader.finish()
    assert bytes(out) == _AROUND


def test_a_copy_from_a_damaged_base_is_refused_at_its_end_also_after_a_restart() -> None:
    damaged = bytearray(_COPIED)
    damaged[5000] ^= 1
    with pytest.raises(WrongBaseError, match="does not give"):
        apply(bytes(damaged), _COPIES)
    reader = DeltaReader(BytesSource(damaged))
    pieces = reader.feed(_COPIES)
    for _ in range(4):
        next(pieces)
    reader = DeltaReader.restore(BytesSource(_COPIED), reader.dump())
    with pytest.raises(WrongBaseError, match="does not give"):
        for _ in reader.feed(_COPIES[reader.patch_offset :]):
            pass


def test_a_state_in_the_middle_of_a_copy_is_not_taken_for_another_delta() -> None:
    reader = DeltaReader(BytesSource(_COPIED))
    next(reader.feed(_COPIES))
    restored = DeltaReader.restore(BytesSource(_COPIED), reader.dump())
    cut = with_segment(_COPIES, 0, result_length=2000)
    with pytest.raises(PatchError):
        for _ in restored.feed(cut[restored.patch_offset :]):
            pass


def test_a_copy_takes_memory_for_a_piece_only() -> None:
    base = np.random.default_rng(1).bytes(32 << 20)
    patch, stats = delta(base, base, 1 << 20)
    assert stats.segments == {Codec.COPY: 1}
    reader = DeltaReader(BytesSource(base), memory_limit_bytes=header_of(patch).decoder_memory_bytes)
    tracemalloc.start()
    try:
        total = sum(len(piece.data) for piece in reader.feed(patch))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 32 << 20
    assert peak < 4 << 20


def test_segments_of_another_place_are_not_taken() -> None:
    first, second = records(_PATCH)[1:3]
    swapped = (
        _PATCH[: first.offset]
        + _PATCH[second.offset : second.end]
        + _PATCH[first.offset : first.end]
        + _PATCH[second.end :]
    )
    with pytest.raises(PatchError, match="damaged"):
        apply(_BASE, swapped)


def test_an_end_record_that_comes_too_early_is_refused() -> None:
    with pytest.raises(PatchError, match="does not agree"):
        apply(_BASE, without_segments(_PATCH))
