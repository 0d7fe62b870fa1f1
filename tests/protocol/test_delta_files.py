"""Whole delta files: any two files give a delta that gives the new one back, and a small one where that is possible."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from protocol.delta.format import RECORD_BYTES_MAX, SEGMENT_BYTES_MAX, Codec
from protocol.delta.inspection import inspect_delta
from protocol.delta.layouts import LAYOUTS
from protocol.delta.writer import make_delta
from protocol.errors import ModelFileError, PatchLimitError
from protocol.tensors import BytesSource, Layout
from tests.protocol.delta_files import apply, delta
from tests.protocol.model_files import (
    GGML_NUMBERS,
    block_file,
    blocks,
    gguf_file,
    moved_blocks,
    onnx_file,
    onnx_model,
    safetensors_file,
    weights,
)

_LARGE = np.random.default_rng(13).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
_NOISE = np.random.default_rng(11).integers(0, 256, 20_000, dtype=np.uint8).tobytes()


def _check(base: bytes, new: bytes, segment_bytes: int = 4096) -> int:
    patch, stats = delta(base, new, segment_bytes)
    assert apply(base, patch) == new
    assert stats.patch_length == len(patch) == sum(stats.patch_bytes.values())
    # Whatever the files are: the new file itself, a header for each segment, and the two frame records.
    assert len(patch) <= len(new) + RECORD_BYTES_MAX * stats.segments.total() + 120
    return len(patch)


@pytest.mark.parametrize(
    ("base", "new"),
    [
        (b"", b""),
        (b"", b"x"),
        (b"x", b""),
        (b"", _NOISE),
        (_NOISE, b""),
        (_NOISE, _NOISE),
        (_NOISE, _NOISE[::-1]),
        (_NOISE, _NOISE[5000:] + _NOISE[:5000]),
        (_NOISE, _NOISE[:9000] + b"inserted" + _NOISE[9000:]),
        (bytes(50_000), bytes(70_000)),
        (_NOISE, bytes(50_000)),
        (b"GGUF", b"GGUF" + _NOISE),
    ],
)
def test_any_two_files_round_trip(base: bytes, new: bytes) -> None:
    _check(base, new)


@given(st.binary(max_size=3000), st.binary(max_size=3000))
@settings(max_examples=60, deadline=None)
def test_any_two_byte_strings_round_trip(base: bytes, new: bytes) -> None:
    _check(base, new, 1024)


def test_identical_files_cost_one_record() -> None:
    patch, stats = delta(_NOISE, _NOISE)
    assert stats.segments == {Codec.COPY: 1}
    assert len(patch) < 120


def test_edits_in_a_long_header_cost_only_themselves() -> None:
    first, second, third = _LARGE[:1000], _LARGE[1000:300_000], _LARGE[300_000:400_000]
    base = first + b"a name" + second + b"a template" + third
    new = first + b"another" + second + b"a longer template" + third
    patch, stats = delta(base, new, 128 << 10)
    assert apply(base, patch) == new
    assert stats.segments == {Codec.COPY: 3, Codec.RAW: 2}
    assert len(patch) < 200


def test_random_bytes_cost_hardly_more_than_themselves() -> None:
    other = np.random.default_rng(12).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    patch, stats = delta(_NOISE, other, 1 << 20)
    assert set(stats.segments) == {Codec.RAW}
    assert len(patch) <= 1.011 * len(other)


def test_changed_pieces_cost_only_themselves_wherever_they_lie() -> None:
    # What comes first in the changed middle is new, and what stands still lies elsewhere in the window than in the segment.
    rng = np.random.default_rng(3)
    base = rng.bytes(1 << 20)
    new = bytearray(base)
    for block in (30, 31, 62, 63):
        new[block << 14 : (block + 1) << 14] = rng.bytes(1 << 14)
    patch, _ = delta(base, bytes(new), 1 << 20)
    assert apply(base, patch) == bytes(new)
    assert len(patch) < 1.02 * (4 << 14)


def test_an_insertion_costs_only_itself() -> None:
    assert _check(_NOISE, _NOISE[:9000] + b"inserted" + _NOISE[9000:], 1 << 20) < 700


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(_LARGE[600_000:] + _LARGE[:600_000], id="rotated"),
        pytest.param(
            _LARGE[:300_000] + bytes(400_000) + _LARGE[300_000:], id="inserted far beyond the slack"
        ),
        pytest.param(_LARGE[:200_000] + _LARGE[700_000:], id="cut out"),
        pytest.param(_LARGE * 3, id="repeated"),
    ],
)
def test_bytes_that_moved_far_are_found_again(new: bytes) -> None:
    # A segment across a seam finds only one of its two halves.
    assert _check(_LARGE, new, 64 << 10) < (64 << 10) + 0.03 * len(new)


def _model(tmp_path: Path, kind: Kind, update: float, **changes: tuple[object, ...] | None) -> bytes:
    tensors = {
        "embd": (weights((64, 256), 1, update), kind),
        "norm": (weights((256,), 2, update), Kind.F32),
        "ffn": (weights((32, 256), 3, update), kind),
    }
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value  # type: ignore[assignment]
    return gguf_file(tmp_path / "m.gguf", tensors, name=f"update {update}")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_a_fine_tuned_gguf_costs_a_fraction_of_itself(tmp_path: Path, kind: Kind) -> None:
    base, new = _model(tmp_path, kind, 0), _model(tmp_path, kind, 0.001)
    assert _check(base, new, 1 << 20) < (0.35 if kind is Kind.F16 else 0.25) * len(new)


def _added(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    return model(0), model(0.001, more=(weights((8, 256), 9), Kind.Q4_0))


def _removed(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    return model(0), model(0.001, ffn=None)


def _renamed(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    return model(0), model(0.001, ffn=None, feed_forward=(weights((32, 256), 3, 0.001), Kind.Q4_0))


def _renamed_unchanged(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    return model(0), model(0, ffn=None, feed_forward=(weights((32, 256), 3), Kind.Q4_0))


def _retyped(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    return model(0), model(0, norm=(weights((256,), 2), Kind.F16))


def _grown(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    rows = np.concatenate([weights((64, 256), 1), weights((4, 256), 8)])
    return model(0), model(0, embd=(rows, Kind.Q4_0))


def _shrunk(model: Callable[..., bytes]) -> tuple[bytes, bytes]:
    return model(0), model(0, embd=(weights((64, 256), 1)[:50], Kind.Q4_0))


@pytest.mark.parametrize(
    "change", [_added, _removed, _renamed, _renamed_unchanged, _retyped, _grown, _shrunk]
)
def test_a_changed_set_of_tensors_costs_only_what_it_must(
    tmp_path: Path, change: Callable[[Callable[..., bytes]], tuple[bytes, bytes]]
) -> None:
    def model(update: float, **changes: tuple[object, ...] | None) -> bytes:
        return _model(tmp_path, Kind.Q4_0, update, **changes)

    base, new = change(model)
    assert _check(base, new) < 0.3 * len(new)


def test_reordered_tensors_are_found_by_their_names(tmp_path: Path) -> None:
    tensors = {name: (weights((32, 256), seed), Kind.Q4_0) for seed, name in enumerate("abcdef")}
    base = gguf_file(tmp_path / "a.gguf", tensors)
    new = gguf_file(tmp_path / "b.gguf", dict(reversed(tensors.items())))
    assert _check(base, new) < 0.1 * len(new)


@pytest.mark.parametrize("layout", GGML_NUMBERS)
@pytest.mark.parametrize(("is_portable", "codec"), [(False, Codec.CONTEXT), (True, Codec.TENSOR)])
def test_every_ggml_layout_goes_through_a_file(layout: Layout, is_portable: bool, codec: Codec) -> None:
    data = blocks(layout, 200, 4)
    patch, stats = delta(
        block_file(layout, data),
        block_file(layout, moved_blocks(layout, data, 5, 0.01)),
        1 << 20,
        is_portable=is_portable,
    )
    assert apply(block_file(layout, data), patch) == block_file(layout, moved_blocks(layout, data, 5, 0.01))
    codecs = {codec, Codec.TENSOR} if LAYOUTS[layout].codes.width > 8 else {codec}  # words in what is smaller
    assert sum(stats.segments[each] for each in codecs) == 1
    assert inspect_delta(BytesSource(patch)).layout_bytes[layout] == len(data)


def test_words_that_all_moved_by_a_little_are_coded_in_planes() -> None:
    """Weight decay alone: every number is some units in the last place smaller, which planes tell best."""
    old = weights((512, 256), 1)
    decayed = old * np.float32(1 - 1e-6)
    base, new = (safetensors_file({"w": ("F32", each.shape, each.tobytes())}) for each in (old, decayed))
    patch, stats = delta(base, new, 1 << 20)
    assert apply(base, patch) == new
    assert stats.segments[Codec.TENSOR] == 1
    assert not stats.segments[Codec.CONTEXT]
    assert len(patch) <= len(delta(base, new, 1 << 20, is_portable=True)[0])


def test_codes_whose_scale_was_chosen_anew_are_foretold_whatever_their_layout() -> None:
    """The codes of both layouts mean the same numbers, one as two's complement and one with a zero point."""
    values = np.random.default_rng(1).normal(0, 2.5, 1 << 17)
    sizes = []
    for layout, zero in ((TensorProto.INT4, 0), (TensorProto.UINT4, 8)):
        files = []
        for scale in (1.0, 0.85):
            codes = (np.clip(np.rint(values * scale), -8, 7).astype(np.int8) + zero & 15).astype(np.uint8)
            packed = (codes[0::2] | codes[1::2] << 4).tobytes()
            tensor = helper.make_tensor("w", layout, (512, 256), packed, raw=True)
            files.append(onnx_model([], [tensor]))
        portable, _ = delta(files[0], files[1], 1 << 20, is_portable=True)
        assert apply(files[0], portable) == files[1]
        sizes.append(_check(files[0], files[1], 1 << 20))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert sizes[0] < 0.17 * (1 << 16)


def test_onnx_models_with_integer_weights_round_trip() -> None:
    rng = np.random.default_rng(3)
    old = rng.integers(-127, 128, (64, 128)).astype(np.int8)
    new = np.clip(old + (rng.random(old.shape) < 0.05), -128, 127).astype(np.int8)
    packed = rng.integers(0, 256, (64, 4, 16)).astype(np.uint8)
    base_file = onnx_file({"w": old, "b": packed, "s": weights((64,), 1)}, matmul_nbits="b")
    new_file = onnx_file(
        {"w": new, "b": packed ^ 1, "s": weights((64,), 1, 0.01)}, matmul_nbits="b", doc="v2"
    )
    assert _check(base_file, new_file, 1 << 20) < 0.35 * len(new_file)


def test_safetensors_models_round_trip() -> None:
    def model(update: float) -> bytes:
        half = weights((64, 64), 1, update).astype(np.float16).tobytes()
        return safetensors_file({"a": ("F16", (64, 64), half), "b": ("F4", (4096,), bytes(2048))})

    assert _check(model(0), model(0.0001), 1 << 20) < 0.3 * len(model(0))


def test_a_delta_between_different_kinds_of_files_is_still_one(tmp_path: Path) -> None:
    _check(_model(tmp_path, Kind.Q4_0, 0), onnx_file({"w": np.zeros((64, 64), np.float32)}))


def test_the_same_files_give_the_same_delta(tmp_path: Path) -> None:
    base, new = _model(tmp_path, Kind.Q4_0, 0), _model(tmp_path, Kind.Q4_0, 0.01)
    assert delta(base, new)[0] == delta(base, new)[0]


def test_progress_ends_at_the_length_of_the_result() -> None:
    seen: list[tuple[int, int]] = []

    class Sink:
        def write(self, data: bytes, /) -> int:
            return len(data)

    make_delta(
        BytesSource(b""),
        BytesSource(_NOISE),
        Sink(),
        segment_bytes=4096,
        progress=lambda *step: seen.append(step),
    )
    assert {total for _, total in seen} == {len(_NOISE)}
    assert seen[-1][0] == len(_NOISE)


@pytest.mark.parametrize("segment_bytes", [0, 1023, SEGMENT_BYTES_MAX + 1])
def test_segments_outside_the_limits_are_refused(segment_bytes: int) -> None:
    with pytest.raises(PatchLimitError):
        delta(b"", b"x", segment_bytes)


class _Shrinking(BytesSource):
    """A file that loses its end while it is read."""

    def __init__(self, data: bytes, reads: int) -> None:
        super().__init__(data)
        self._left = reads

    def read_at(self, offset: int, length: int) -> bytes:
        self._left -= 1
        return super().read_at(offset, length if self._left > 0 else 0)


def test_a_file_that_changes_while_it_is_read_is_refused() -> None:
    class Sink:
        def write(self, data: bytes, /) -> int:
            return len(data)

    for reads in range(1, 8):
        with pytest.raises(ModelFileError):
            make_delta(BytesSource(b""), _Shrinking(_NOISE, reads), Sink(), segment_bytes=4096)


def test_notes_name_the_tensors_that_changed(tmp_path: Path) -> None:
    base = _model(tmp_path, Kind.Q4_0, 0)
    new = _model(tmp_path, Kind.Q4_0, 0, ffn=(weights((32, 256), 3, 0.1), Kind.Q4_0))
    found = inspect_delta(BytesSource(delta(base, new)[0]))
    assert [(note.name, note.layout) for note in found.tensors] == [("ffn", "q4_0")]
    assert found.segments.total() == sum(found.segments.values())
    assert sum(found.patch_bytes.values()) == found.patch_length
    assert sum(found.result_bytes.values()) == len(new)


def test_inspection_says_why_a_tensor_costs_what_it_costs(tmp_path: Path) -> None:
    base = _model(tmp_path, Kind.Q4_0, 0)
    new = _model(tmp_path, Kind.Q4_0, 0, ffn=(weights((32, 256), 99), Kind.Q4_0))
    (note,) = inspect_delta(BytesSource(delta(base, new)[0])).tensors
    assert (note.name, note.matched_by) == ("ffn", "name")
    assert note.reason.startswith("retrained: codes share nothing")
