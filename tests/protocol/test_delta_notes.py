"""Notes: which tensors changed and why they cost what they cost."""

import json

import numpy as np
import pytest

from protocol.delta.compression import compress
from protocol.delta.matching import Basis, Match, match_regions
from protocol.delta.notes import TENSORS_MAX, Notes, TensorNote, read_notes
from protocol.delta.planner import Planner
from protocol.errors import PatchError
from protocol.tensors import BytesSource, Layout, Region, map_regions
from tests.protocol.model_files import GgufBuilder, GgufTensor, blocks


def _notes(base: bytes, new: bytes, segment_bytes: int = 2048) -> dict[str, TensorNote]:
    """What the writer would note, with segments copied where nothing changed."""
    old_map, new_map = map_regions(BytesSource(base)), map_regions(BytesSource(new))
    matches = match_regions(old_map, new_map, BytesSource(base), BytesSource(new))
    notes = Notes(new_map, matches)
    for plan in Planner(BytesSource(base), BytesSource(new), segment_bytes, old_map).plan(new_map, matches):
        result = new[plan.result_offset : plan.result_offset + plan.length]
        window = base[plan.window_offset : plan.window_offset + plan.window_length]
        notes.add(plan, result, window, is_copy=result in window)
    return {note.name: note for note in read_notes(notes.pack())}


def _q4(seed: int, rows: int = 64) -> bytes:
    return blocks(Layout.Q4_0, 4 * rows, seed)


def _file(**tensors: bytes) -> bytes:
    return GgufBuilder(
        [GgufTensor(name, (128, len(data) // 72), 2, data) for name, data in tensors.items()]
    ).build()


def _with_changes(data: bytes, at: list[int]) -> bytes:
    out = bytearray(data)
    for offset in at:
        out[offset] ^= 0x10
    return bytes(out)


def test_changed_bytes_are_counted_and_unchanged_tensors_are_left_out() -> None:
    changed = _with_changes(_q4(1), [2, 3, 4000, 4607])
    found = _notes(_file(w=_q4(1), v=_q4(2)), _file(w=changed, v=_q4(2)))
    assert list(found) == ["w"]
    assert (found["w"].changed_bytes, found["w"].length, found["w"].layout) == (4, 4608, "q4_0")
    assert (found["w"].matched_by, found["w"].reason) == ("name", "a version of its namesake")
    assert (found["w"].correlation or 0) > 0.9


def test_appended_rows_count_as_changed() -> None:
    assert _notes(_file(w=_q4(1)), _file(w=_q4(1) + _q4(2, 2)))["w"].changed_bytes == 144


def test_retrained_tensors_are_called_so() -> None:
    note = _notes(_file(w=_q4(1)), _file(w=_q4(2)))["w"]
    assert (note.changed_bytes, note.matched_by) == (None, "name")
    assert note.reason.startswith("retrained: codes share nothing (correlation ")


def test_a_renamed_tensor_names_what_it_was() -> None:
    note = _notes(_file(old=_q4(1)), _file(new=_with_changes(_q4(1), [5])))["new"]
    assert (note.matched_by, note.counterpart, note.reason) == ("content", "old", "a version of old")


def test_a_retyped_tensor_says_what_it_was_and_a_new_one_that_it_is_new() -> None:
    base = GgufBuilder([GgufTensor("w", (128, 64), 8, blocks(Layout.Q8_0, 256, 1))]).build()
    found = _notes(base, _file(w=_q4(1), more=_q4(2)))
    assert (found["w"].reason, found["w"].changed_bytes) == ("retyped: was q8_0", None)
    assert found["more"].reason == "new: the base has nothing like it"


def test_tensors_without_a_known_inside_are_noted_too() -> None:
    data = np.random.default_rng(1).integers(0, 256, 66 * 200, dtype=np.uint8).tobytes()
    new = _with_changes(data, [0, 6000, 13_000])
    files = [GgufBuilder([GgufTensor("w", (256, 200), 16, each)]).build() for each in (data, new)]
    note = _notes(files[0], files[1])["w"]
    assert (note.layout, note.changed_bytes, note.matched_by) == ("raw", 3, "name")


def test_of_very_many_tensors_the_largest_are_noted() -> None:
    count = TENSORS_MAX + 10
    regions = [Region(f"w{i}", Layout.I8, 2 * i, 1 + (i >= 10), (1,), 1) for i in range(count)]
    notes = Notes(regions, [Match(Basis.NOTHING)] * count)
    for index in range(count):
        notes._count(index, b"x", b"")
    found = read_notes(notes.pack())
    assert (len(found), found[0].name) == (TENSORS_MAX, "w10")


def test_notes_of_the_first_format_are_still_read() -> None:
    note = read_notes(compress(b'{"tensors":[["w","q4_0",18,null]]}', "fast"))[0]
    assert note == TensorNote("w", "q4_0", 18, None)
    assert not note.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"tensors":[1]}',
        '{"tensors":[["w"]]}',
        '{"tensors":[["w","q4_0","x",1]]}',
        '{"tensors":[["w","q4_0",1e999,1]]}',
        '{"tensors":[["w","q4_0",1,1,"name","",{}]]}',
        json.dumps({"tensors": [["w", "q4_0", 1, 1, "name", "", 0, 0]]}),
        "[" * 100_000,
    ],
)
def test_unreadable_notes_are_refused(text: str) -> None:
    with pytest.raises(PatchError, match="not readable"):
        read_notes(compress(text.encode(), "fast"))


def test_notes_of_unknown_words_are_shown_without_a_reason() -> None:
    assert not TensorNote("w", "q4_0", 18, 1, "magic").reason
