"""Edges of the push reader: hand-made files that a writer would not make, and stored states that contradict themselves."""

import hashlib
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from protocol.delta import reader as reader_module
from protocol.delta.codecs import decode_segment, read_tables, read_window, segment_checksum
from protocol.delta.compression import compress
from protocol.delta.context import ContextModel
from protocol.delta.format import (
    NOTES_MAX,
    SEGMENT_DIGEST_BYTES,
    Codec,
    Header,
    Profile,
    SegmentHeader,
    segment_memory_bytes,
)
from protocol.delta.moves import MOVE_BYTES_MIN, Move
from protocol.delta.reader import STATE_BYTES_MAX, DeltaReader
from protocol.delta.runs import VARIANCE_BITS_MIN, Basis
from protocol.delta.tensor import read_runs, working_bytes
from protocol.errors import PatchError, PatchLimitError, TruncatedPatchError, WrongBaseError
from protocol.tensors import BytesSource, Layout
from tests.protocol.delta_files import _joined, apply, delta, header_end, header_of, records, with_header
from tests.protocol.model_files import block_file, blocks, moved_blocks

_BASE = np.random.default_rng(8).bytes(9000)
_NOTE = b"a note"

Segments = list[tuple[SegmentHeader, bytes]]


def raw(data: bytes) -> tuple[SegmentHeader, bytes]:
    return SegmentHeader(Codec.RAW, 0, len(data), 0, 0, len(data), b"", zlib.crc32(data)), data


def copy(offset: int, length: int) -> tuple[SegmentHeader, bytes]:
    checksum = zlib.crc32(_BASE[offset : offset + length])
    return SegmentHeader(Codec.COPY, 0, length, offset, length, 0, b"", checksum), b""


def note(data: bytes = _NOTE, **changes: Any) -> tuple[SegmentHeader, bytes]:
    record = SegmentHeader(Codec.NOTES, 0, 0, 0, 0, len(data), b"", zlib.crc32(data))
    return replace(record, **changes), data


def file_of(result: bytes, segments: Segments, **changes: Any) -> bytes:
    usual = Header(
        Profile.FAST,
        len(_BASE),
        hashlib.sha256(_BASE).digest(),
        len(result),
        hashlib.sha256(result).digest(),
        8 << 20,
        2048,
    )
    return _joined(replace(usual, **changes), segments)


_RESULT = _BASE[1000:6000] + b"inserted" + _BASE[:500]
_SEGMENTS = [copy(1000, 5000), note(), raw(b"inserted"), copy(0, 500)]
_PATCH = file_of(_RESULT, _SEGMENTS)


def test_a_file_by_hand_is_applied() -> None:
    assert apply(_BASE, _PATCH) == _RESULT


def test_the_announced_result_is_compared_at_the_end() -> None:
    with pytest.raises(PatchError, match="announced SHA-256"):
        apply(_BASE, with_header(_PATCH, result_sha256=bytes(32)))
    for length in (len(_RESULT) + 1, len(_RESULT) - 1):
        with pytest.raises(PatchError):
            apply(_BASE, with_header(_PATCH, result_length=length))


def test_a_file_may_need_all_the_memory_that_is_accepted_and_no_more() -> None:
    declared = header_of(_PATCH).decoder_memory_bytes
    assert apply(_BASE, _PATCH, memory_limit_bytes=declared) == _RESULT
    with pytest.raises(
        PatchLimitError, match=f"needs {declared} bytes of memory, {declared - 1} are accepted"
    ):
        apply(_BASE, _PATCH, memory_limit_bytes=declared - 1)


def test_a_file_for_a_base_of_another_length_is_refused() -> None:
    for base in (_BASE[:-1], _BASE + b"x"):
        with pytest.raises(WrongBaseError, match=f"base of 9000 bytes, this one has {len(base)}"):
            apply(base, _PATCH)


def test_a_file_has_as_many_notes_as_the_limit_and_no_more() -> None:
    assert apply(_BASE, file_of(b"x", [note()] * NOTES_MAX + [raw(b"x")])) == b"x"
    with pytest.raises(PatchLimitError, match=f"more than {NOTES_MAX} note records"):
        apply(_BASE, file_of(b"x", [note()] * (NOTES_MAX + 1) + [raw(b"x")]))


def test_notes_are_counted_across_interruptions() -> None:
    patch = file_of(b"xy", [note()] * NOTES_MAX + [raw(b"x"), note(), raw(b"y")])
    reader = DeltaReader(BytesSource(_BASE))
    assert next(reader.feed(patch)).data == b"x"
    reader = DeltaReader.restore(BytesSource(_BASE), reader.dump())
    with pytest.raises(PatchLimitError, match="note records"):
        list(reader.feed(patch[reader.patch_offset :]))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([note(checksum=1)], "a note record is damaged"),
        ([(raw(b"abcd")[0], b"abce")], "raw record is damaged"),
    ],
)
def test_a_damaged_body_is_refused_before_it_is_used(segments: Segments, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        apply(_BASE, file_of(b"abcd", segments))


def test_a_reader_that_is_not_at_the_end_says_where_it_is() -> None:
    reader = DeltaReader(BytesSource(_BASE))
    list(reader.feed(_PATCH[:-1]))
    assert not reader.is_finished
    assert not reader.is_result_verified
    with pytest.raises(TruncatedPatchError, match=f"ends at byte {len(_PATCH) - 1}, before its end record"):
        reader.finish()
    assert list(reader.feed(_PATCH[-1:])) == []
    reader.finish()
    assert reader.is_result_verified


def test_a_piece_is_given_out_with_its_last_byte() -> None:
    inserted = records(_PATCH)[2]
    reader = DeltaReader(BytesSource(_BASE))
    assert len(list(reader.feed(_PATCH[: inserted.end - 1]))) == 3
    assert [piece.data for piece in reader.feed(_PATCH[inserted.end - 1 : inserted.end])] == [b"inserted"]


def test_what_is_no_delta_file_is_refused_with_its_first_bytes() -> None:
    reader = DeltaReader(BytesSource(_BASE))
    assert list(reader.feed(b"no delta fi")) == []
    with pytest.raises(PatchError, match="not a delta file"):
        list(reader.feed(b"l"))


def test_pieces_of_a_copy_are_no_longer_than_a_segment_may_be() -> None:
    pieces = list(DeltaReader(BytesSource(_BASE)).feed(_PATCH))
    assert [(piece.offset, len(piece.data), piece.codec) for piece in pieces] == [
        (0, 2048, Codec.COPY),
        (2048, 2048, Codec.COPY),
        (4096, 904, Codec.COPY),
        (5000, 8, Codec.RAW),
        (5008, 500, Codec.COPY),
    ]
    assert all(piece.moves == () for piece in pieces)


def test_a_reader_that_is_asked_tells_where_bytes_came_from() -> None:
    short, long = MOVE_BYTES_MIN - 1, MOVE_BYTES_MIN
    result = _BASE[100 : 100 + short] + _BASE[300 : 300 + long]
    patch = file_of(result, [copy(100, short), copy(300, long)])
    pieces = list(DeltaReader(BytesSource(_BASE), tells_moves=True).feed(patch))
    assert [piece.moves for piece in pieces] == [(), (Move(300, short, long),)]
    state = DeltaReader(BytesSource(_BASE), tells_moves=True)
    told = [move for piece in state.feed(_PATCH) for move in piece.moves]
    assert told == [Move(1000, 0, 2048), Move(3048, 2048, 2048), Move(5096, 4096, 904), Move(0, 5008, 500)]
    restored = DeltaReader.restore(
        BytesSource(_BASE), DeltaReader(BytesSource(_BASE)).dump(), tells_moves=True
    )
    assert [move for piece in restored.feed(_PATCH) for move in piece.moves] == told


def test_a_checksum_of_a_copy_covers_all_of_its_pieces() -> None:
    for at in (1000, 3047, 5999):
        damaged = bytearray(_BASE)
        damaged[at] ^= 1
        with pytest.raises(WrongBaseError, match="base at byte 1000 does not give"):
            apply(bytes(damaged), _PATCH)


# --- stored states ----------------------------------------------------------------------------------------------


def state_of(reader: DeltaReader, **changes: int) -> bytes:
    """A state that says something else, with a checksum that agrees."""
    names = ("header_length", "flags", "patch_offset", "result_offset", "notes", "copied", "copied_crc")
    data = reader.dump()
    fields = dict(zip(names, reader_module._STATE.unpack_from(data)[1:], strict=True)) | changes
    head = reader_module._STATE.pack(data[:4], *(fields[name] for name in names))
    return _with_checksum(head + data[len(head) : -4])


def _with_checksum(state: bytes) -> bytes:
    return state + zlib.crc32(state).to_bytes(4, "little")


@pytest.fixture
def in_a_copy() -> DeltaReader:
    reader = DeltaReader(BytesSource(_BASE))
    next(reader.feed(_PATCH))
    return reader


def restore(state: bytes, **given: Any) -> DeltaReader:
    return DeltaReader.restore(BytesSource(_BASE), state, **given)


def test_a_state_is_taken_up_where_it_was(in_a_copy: DeltaReader) -> None:
    restored = restore(in_a_copy.dump())
    assert (restored.patch_offset, restored.result_offset) == (header_end(_PATCH), 2048)
    rest = b"".join(piece.data for piece in restored.feed(_PATCH[restored.patch_offset :]))
    assert rest == _RESULT[2048:]
    assert restored.is_finished
    assert not restored.is_result_verified
    assert restored.dump() == restore(restored.dump()).dump()


@pytest.mark.parametrize(
    "changes",
    [
        {"header_length": 5000},
        {"header_length": 84},
        {"copied": 2049},
        {"patch_offset": 10},
        {"result_offset": len(_RESULT) + 1},
        {"header_length": 0, "patch_offset": 0},
        {"header_length": 0, "result_offset": 0, "copied": 0},
    ],
)
def test_a_state_that_contradicts_itself_is_refused(in_a_copy: DeltaReader, changes: dict[str, int]) -> None:
    with pytest.raises(PatchError, match="contradicts itself"):
        restore(state_of(in_a_copy, **changes))


def test_a_state_that_ends_inside_its_header_is_refused(in_a_copy: DeltaReader) -> None:
    state = in_a_copy.dump()
    for length in (reader_module._STATE.size + 12, reader_module._STATE.size + header_end(_PATCH) - 5):
        with pytest.raises(PatchError, match="contradicts itself"):
            restore(_with_checksum(state[:length]))


def test_a_finished_state_keeps_nothing_of_the_coder() -> None:
    base = blocks(Layout.Q4_0, 450, 1)
    old, new = block_file(Layout.Q4_0, base), block_file(Layout.Q4_0, moved_blocks(Layout.Q4_0, base, 2))
    patch, stats = delta(old, new)
    assert stats.segments[Codec.CONTEXT]
    reader = DeltaReader(BytesSource(old))
    lengths = [len(reader.dump()) for _ in reader.feed(patch)]
    assert max(lengths) > 1000
    assert len(reader.dump()) == reader_module._STATE.size + header_end(patch) + 4


def test_offsets_of_a_state_reach_from_the_header_to_the_end_of_the_result(in_a_copy: DeltaReader) -> None:
    start = header_end(_PATCH)
    assert restore(state_of(in_a_copy, patch_offset=start)).patch_offset == start
    with pytest.raises(PatchError, match="contradicts itself"):
        restore(state_of(in_a_copy, patch_offset=start - 1))
    assert restore(state_of(in_a_copy, result_offset=len(_RESULT))).result_offset == len(_RESULT)
    assert restore(state_of(in_a_copy, copied=2048, result_offset=2048)).result_offset == 2048


def test_a_state_is_of_a_length_that_one_can_have(in_a_copy: DeltaReader) -> None:
    state = in_a_copy.dump()
    shortest = reader_module._STATE.size + 4
    for wrong in (b"", state[: shortest - 1], state.ljust(STATE_BYTES_MAX + 1, b"\0"), b"WBS2" + state[4:]):
        with pytest.raises(PatchError, match="is not one"):
            restore(wrong)
    for length in (shortest, STATE_BYTES_MAX):
        with pytest.raises(PatchError, match="is damaged"):
            restore(state[: shortest - 4].ljust(length, b"\1"))


def test_a_state_before_the_header_is_a_beginning() -> None:
    reader = restore(DeltaReader(BytesSource(_BASE)).dump())
    assert (reader.header, reader.patch_offset, reader.result_offset) == (None, 0, 0)
    assert b"".join(piece.data for piece in reader.feed(_PATCH)) == _RESULT
    assert reader.is_result_verified


def test_a_state_is_checked_like_the_header_that_it_holds(in_a_copy: DeltaReader) -> None:
    with pytest.raises(PatchLimitError, match="are accepted"):
        restore(in_a_copy.dump(), memory_limit_bytes=1)
    with pytest.raises(WrongBaseError, match="made for a base of"):
        DeltaReader.restore(BytesSource(_BASE[:-1]), in_a_copy.dump())


def test_a_state_that_has_copied_more_than_the_record_holds_is_of_another_file(
    in_a_copy: DeltaReader,
) -> None:
    crc = zlib.crc32(_BASE[1000:5999])
    last = restore(state_of(in_a_copy, copied=4999, result_offset=4999, copied_crc=crc))
    assert b"".join(piece.data for piece in last.feed(_PATCH[last.patch_offset :])) == _RESULT[4999:]
    for copied in (5000, 5001):
        restored = restore(state_of(in_a_copy, copied=copied, result_offset=copied))
        with pytest.raises(PatchError, match="belongs to another delta"):
            list(restored.feed(_PATCH[restored.patch_offset :]))


@pytest.mark.parametrize("segments", [[raw(b"xy")], []])
def test_a_state_has_copied_nothing_of_a_record_that_is_no_copy(segments: Segments) -> None:
    patch = file_of(b"xy" if segments else b"", segments)
    reader = DeltaReader(BytesSource(_BASE))
    list(reader.feed(patch[: header_end(patch)]))
    if segments:
        restored = restore(state_of(reader, copied=1, result_offset=1))
        with pytest.raises(PatchError, match="belongs to another delta"):
            list(restored.feed(patch[restored.patch_offset :]))
    else:
        with pytest.raises(PatchError, match="contradicts itself"):
            restore(state_of(reader, copied=1, result_offset=1))


def test_a_finished_state_wants_no_more_bytes() -> None:
    reader = DeltaReader(BytesSource(_BASE))
    list(reader.feed(_PATCH))
    restored = restore(reader.dump())
    assert restored.is_finished
    assert list(restored.feed(b"")) == []
    with pytest.raises(PatchError, match="after the end"):
        list(restored.feed(b"x"))


# --- codecs -----------------------------------------------------------------------------------------------------


class Unreadable(BytesSource):
    """A base that must not be asked."""

    def read_at(self, offset: int, length: int) -> bytes:
        raise AssertionError(f"{length} bytes at {offset} were read")


def test_a_window_of_nothing_is_not_read() -> None:
    assert read_window(Unreadable(b"abc"), 1 << 40, 0) == b""
    with pytest.raises(WrongBaseError, match="could not be read at byte 3"):
        read_window(BytesSource(b"abc"), 1, 5)


def self_segment(data: bytes, body: bytes, **changes: Any) -> SegmentHeader:
    usual = SegmentHeader(Codec.SELF, 0, len(data), 0, 0, len(body), b"", zlib.crc32(body))
    return replace(usual, **changes)


def decode(segment: SegmentHeader, body: bytes, base: bytes = _BASE) -> bytes:
    return decode_segment(segment, body, BytesSource(base), header_of(_PATCH), ContextModel())


def test_what_a_segment_gives_has_the_announced_length_and_digest() -> None:
    data = b"text " * 100
    body = compress(data, "quick")
    assert decode(self_segment(data, body), body) == data
    with pytest.raises(PatchError):
        decode(self_segment(data + b"x", body), body)
    digest = b"0" * SEGMENT_DIGEST_BYTES
    with pytest.raises(PatchError, match=r"^a segment does not give the announced result"):
        decode(self_segment(data, body, digest=digest), body)
    shorter = SegmentHeader(Codec.RAW, 0, 5, 0, 0, 4, b"", zlib.crc32(b"four"))
    with pytest.raises(PatchError, match=r"^a segment does not give the announced result"):
        decode(shorter, b"four")
    with pytest.raises(WrongBaseError, match="base at byte 9 does not give"):
        decode(self_segment(data, body, digest=digest, window_offset=9, window_length=2), body)


@pytest.mark.parametrize("codec", [Codec.COPY, Codec.NOTES, Codec.TABLES])
def test_a_codec_that_gives_no_result_is_no_segment(codec: Codec) -> None:
    with pytest.raises(PatchError, match="gives no result"):
        decode(SegmentHeader(codec, 0, 4, 0, 0, 4, b"", zlib.crc32(b"body")), b"body")


def test_the_checksum_of_a_copy_is_that_of_its_result() -> None:
    assert segment_checksum(Codec.COPY, b"result", b"") == zlib.crc32(b"result")
    assert segment_checksum(Codec.SELF, b"result", b"body") == zlib.crc32(b"body")


_OLD, _NEW = (
    block_file(Layout.Q4_0, data)
    for data in (blocks(Layout.Q4_0, 450, 1), moved_blocks(Layout.Q4_0, blocks(Layout.Q4_0, 450, 1), 2))
)


def test_tensor_segments_are_decoded_in_the_memory_that_was_declared_and_in_no_less() -> None:
    patch, stats = delta(_OLD, _NEW, is_portable=True)
    assert stats.segments[Codec.TENSOR]
    assert apply(_OLD, patch) == _NEW
    needed = 0
    for each in records(patch):
        if each.segment and each.segment.codec is Codec.TENSOR:
            found, start = each.segment, each.offset + each.length
            parameters = patch[start : start + found.parameter_length]
            runs = read_runs(parameters, found.result_length, found.window_length)
            lengths = (found.result_length, found.window_length, found.body_length)
            needed = max(needed, segment_memory_bytes(Codec.TENSOR, *lengths, working_bytes(runs)))
    assert apply(_OLD, with_header(patch, decoder_memory_bytes=needed)) == _NEW
    with pytest.raises(PatchLimitError, match=f"a segment needs {needed} bytes of memory"):
        apply(_OLD, with_header(patch, decoder_memory_bytes=needed - 1))


@pytest.mark.parametrize("is_portable", [True, False])
def test_moves_of_weights_are_told_to_those_who_ask(is_portable: bool) -> None:
    patch, _ = delta(_OLD, _NEW, is_portable=is_portable)
    for tells_moves in (True, False):
        told = [
            move
            for piece in DeltaReader(BytesSource(_OLD), tells_moves=tells_moves).feed(patch)
            if piece.codec in {Codec.TENSOR, Codec.CONTEXT}
            for move in piece.moves
        ]
        assert bool(told) is tells_moves
        assert all(move.base_offset == move.result_offset for move in told)


def test_tables_are_for_the_segments_behind_them() -> None:
    basis = Basis(
        columns=64, rank=1, directions=bytes(range(64)), forecast=b"", prior=bytes([VARIANCE_BITS_MIN, 0])
    )
    body = compress(basis.pack(), "small")
    table = SegmentHeader(Codec.TABLES, 0, 0, 0, 0, len(body), b"", zlib.crc32(body))
    reader = DeltaReader(BytesSource(_BASE))
    list(reader.feed(file_of(b"x", [(table, body), raw(b"x")])))
    assert reader.is_finished
    found = reader._model.basis
    assert found is not None
    assert found.pack() == basis.pack()


def test_a_damaged_table_is_refused_before_it_is_unpacked() -> None:
    body = compress(b"table", "quick")
    with pytest.raises(PatchError, match="tables record is damaged"):
        read_tables(SegmentHeader(Codec.TABLES, 0, 0, 0, 0, len(body), b"", 1), body)


def test_every_record_of_a_real_file_is_compared_with_its_checksum() -> None:
    old = np.random.default_rng(1).bytes(5000)
    patch, _ = delta(old, old[:2500] + b"text " * 300 + old[2500:])
    for each in records(patch):
        if each.body_length:
            damaged = bytearray(patch)
            damaged[each.end - 1] ^= 1
            with pytest.raises(PatchError, match="damaged"):
                apply(old, bytes(damaged))
