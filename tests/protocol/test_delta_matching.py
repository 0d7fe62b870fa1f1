"""Matching: by name, by content, by shape, and why there is no counterpart."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from protocol.delta.layouts import LAYOUTS
from protocol.delta.matching import Basis, Match, match_regions
from protocol.delta.sampling import SAMPLE_CODES, correlation, sample
from protocol.tensors import BytesSource, JoinedSource, Layout, Region, join_maps, map_regions
from tests.protocol.model_files import GGML_NUMBERS, GgufBuilder, GgufTensor, blocks, moved_blocks, weights

_ROW = 128
_KINDS = sorted(set(LAYOUTS) - {Layout.RAW})


def _tensor(name: str, layout: Layout, data: bytes, row: int = _ROW) -> GgufTensor:
    codes = len(data) // LAYOUTS[layout].block_bytes * LAYOUTS[layout].codes.count
    return GgufTensor(name, (row, codes // row), GGML_NUMBERS[layout], data)


def _matches(base: bytes, new: bytes) -> dict[str, Match]:
    maps = map_regions(BytesSource(base)), map_regions(BytesSource(new))
    found = match_regions(maps[0], maps[1], BytesSource(base), BytesSource(new))
    assert len(found) == len(maps[1])
    return {region.name: match for region, match in zip(maps[1], found, strict=True) if region.name}


def _file(tensors: Mapping[str, bytes], layout: Layout = Layout.Q4_0) -> bytes:
    return GgufBuilder([_tensor(name, layout, data) for name, data in tensors.items()]).build()


def _summary(found: Mapping[str, Match]) -> dict[str, tuple[str, str | None]]:
    return {name: (match.by.value, match.base.name if match.base else None) for name, match in found.items()}


def _q4(seed: int, count: int = 256) -> bytes:
    return blocks(Layout.Q4_0, count, seed)


def test_tensors_go_with_their_namesakes_in_any_order() -> None:
    parts = {name: _q4(seed) for seed, name in enumerate("abc")}
    moved = {name: moved_blocks(Layout.Q4_0, parts[name], 9) for name in "cab"}
    assert _summary(_matches(_file(parts), _file(moved))) == {name: ("name", name) for name in "abc"}


def test_renamed_tensors_are_found_by_their_content_even_when_they_changed() -> None:
    parts = {name: _q4(seed) for seed, name in enumerate("abc")}
    new = {f"layer.{name}": moved_blocks(Layout.Q4_0, parts[name], 9) for name in "cab"}
    found = _matches(_file(parts), _file(new))
    assert _summary(found) == {f"layer.{name}": ("content", name) for name in "abc"}
    assert all((match.correlation or 0) > 0.9 for match in found.values())


def test_layers_that_were_numbered_anew_go_with_what_they_were_not_with_their_namesakes() -> None:
    layers = [_q4(seed) for seed in range(5)]
    base = _file({f"blk.{i}": data for i, data in enumerate(layers)})
    pruned = _file({f"blk.{i}": data for i, data in enumerate(layers[:2] + layers[3:])})
    assert _summary(_matches(base, pruned)) == {
        "blk.0": ("name", "blk.0"),
        "blk.1": ("name", "blk.1"),
        "blk.2": ("content", "blk.3"),
        "blk.3": ("content", "blk.4"),
    }


def test_a_head_that_is_no_longer_tied_goes_with_the_embedding() -> None:
    data = _q4(1)
    new = _file({"embedding": data, "head": moved_blocks(Layout.Q4_0, data, 2)})
    assert _summary(_matches(_file({"embedding": data}), new))["head"] == ("content", "embedding")


def test_a_tensor_that_was_renamed_and_grew_is_found_by_what_both_have() -> None:
    data = _q4(1)
    found = _matches(_file({"embedding": data}), _file({"tokens": data + _q4(2, 16)}))
    assert _summary(found) == {"tokens": ("content", "embedding")}


def test_parts_that_became_one_go_with_the_first() -> None:
    parts = {name: _q4(seed, 64) for seed, name in enumerate("qkv")}
    found = _matches(_file(parts), _file({"qkv": b"".join(parts.values())}))
    assert _summary(found) == {"qkv": ("content", "q")}


def test_what_is_like_nothing_goes_by_shape_and_order_and_is_not_coded_against_it() -> None:
    base = _file({"a": _q4(1), "b": _q4(2)})
    found = _matches(base, _file({"c": _q4(3), "d": _q4(4)}))
    assert [(match.by, match.region.name if match.region else "") for match in found.values()] == [
        (Basis.SHAPE, "a"),
        (Basis.SHAPE, "b"),
    ]
    assert [match.base for match in found.values()] == [None, None]
    assert all(abs(match.correlation or 0) < 0.1 for match in found.values())


def test_retrained_tensors_keep_their_namesakes_and_say_that_they_share_nothing() -> None:
    match = _matches(_file({"a": _q4(1)}), _file({"a": _q4(2)}))["a"]
    assert (match.by, match.is_related, match.base) == (Basis.NAME, False, None)


def test_tensors_that_share_a_third_of_their_variance_are_coded_against_each_other() -> None:
    old = weights((64, 128), 1)
    mixed = old + 1.4 * weights((64, 128), 2)
    data = [_tensor("w", Layout.F32, values.astype("<f4").tobytes()) for values in (old, mixed)]
    match = _matches(*(GgufBuilder([each]).build() for each in data))["w"]
    assert 0.4 < (match.correlation or 0) < 0.7
    assert match.base is not None


def test_words_that_are_partly_the_same_are_coded_against_each_other() -> None:
    old, new = weights((64, 128), 1), weights((64, 128), 2)
    new[::8] = old[::8]
    data = [_tensor("w", Layout.F32, values.astype("<f4").tobytes()) for values in (old, new)]
    assert _matches(*(GgufBuilder([each]).build() for each in data))["w"].base is not None


def test_codes_that_are_nearly_all_the_same_are_related_though_they_do_not_correlate() -> None:
    old = np.full(4096, 0x88, np.uint8).tobytes()
    region = Region("zeros", Layout.PACKED4, 0, 4096, (64, 128), 64)
    new = bytearray(old)
    new[::64] = bytes([0x98]) * 64
    match = match_regions([region], [region], BytesSource(old), BytesSource(bytes(new)))[0]
    assert match.base == region


def test_a_retyped_tensor_has_no_counterpart_and_says_so() -> None:
    base = GgufBuilder([_tensor("w", Layout.Q8_0, blocks(Layout.Q8_0, 256, 1))]).build()
    match = _matches(base, _file({"w": _q4(1)}))["w"]
    assert (match.by, match.base) == (Basis.RETYPED, None)
    assert match.region is not None
    assert match.region.layout is Layout.Q8_0


def test_a_tensor_with_rows_of_another_length_has_no_counterpart_and_says_so() -> None:
    base = GgufBuilder([_tensor("w", Layout.Q4_0, _q4(1), 256)]).build()
    new = GgufBuilder([_tensor("w", Layout.Q4_0, _q4(1, 260), 128)]).build()
    assert _summary(_matches(base, new)) == {"w": ("reshaped", None)}


def test_a_vector_that_grew_goes_with_its_namesake() -> None:
    base = GgufBuilder([GgufTensor("bias", (64,), 0, weights((64,), 1).tobytes())]).build()
    longer = np.concatenate([weights((64,), 1), weights((8,), 2)])
    assert _summary(
        _matches(base, GgufBuilder([GgufTensor("bias", (72,), 0, longer.tobytes())]).build())
    ) == {"bias": ("name", "bias")}


def test_blocks_without_a_known_inside_are_matched_as_tensors_too() -> None:
    data = np.random.default_rng(1).integers(0, 256, (3, 66 * 100), dtype=np.uint8)
    base = GgufBuilder(
        [GgufTensor(n, (256, 100), 16, data[i].tobytes()) for i, n in enumerate("abc")]
    ).build()
    new = GgufBuilder([GgufTensor(n, (256, 100), 16, data[2 - i].tobytes()) for i, n in enumerate("xyc")])
    found = _matches(base, new.build())
    assert _summary(found) == {"x": ("content", "c"), "y": ("content", "b"), "c": ("content", "a")}


def test_files_that_are_split_differently_are_matched_as_one() -> None:
    parts = {name: _q4(seed) for seed, name in enumerate("abcd")}

    def split(*groups: str) -> tuple[JoinedSource, tuple[Region, ...]]:
        files = [BytesSource(_file({name: parts[name] for name in group})) for group in groups]
        return JoinedSource(files), join_maps([map_regions(f) for f in files], [f.length for f in files])

    base, base_map = split("ab", "c", "d")
    new, new_map = split("a", "bcd")
    found = match_regions(base_map, new_map, base, new)
    for region, match in zip(new_map, found, strict=True):
        if region.name:
            assert match.base is not None
            assert base.read_at(match.base.offset, match.base.length) == parts[region.name]


def test_names_that_occur_more_than_once_go_in_order() -> None:
    first, second = _q4(1, 8), _q4(2, 8)
    source = BytesSource(first + second)
    regions = [Region("w", Layout.Q4_0, at, len(first), (8, 32), 18) for at in (0, len(first))]
    assert [match.base for match in match_regions(regions, regions, source, source)] == regions


@pytest.mark.parametrize("layout", _KINDS)
def test_a_small_update_correlates_in_every_layout_and_chance_does_not(layout: Layout) -> None:
    data = blocks(layout, 3000, 1)
    if layout in {Layout.F32, Layout.F16, Layout.BF16, Layout.F64}:
        numbers = weights((3000,), 1)
        kinds = {Layout.F32: "<f4", Layout.F64: "<f8", Layout.F16: "<f2"}
        bf16 = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
        data = numbers.astype(kinds[layout]).tobytes() if layout in kinds else bf16
    region = Region("w", layout, 0, len(data))
    old = sample(BytesSource(data), region, region.length)
    new = sample(BytesSource(moved_blocks(layout, data, 2, 0.05)), region, region.length)
    other = np.random.default_rng(3).permutation(old)
    assert 2000 < len(old) <= SAMPLE_CODES
    assert correlation(old, new) > 0.8
    assert abs(correlation(old, other)) < 0.1


def test_numbers_that_are_none_do_not_spoil_a_sample() -> None:
    data = np.array([np.nan, np.inf, -np.inf, 3e38, 1.0, 2.0, 3.0, 4.0], "<f4").tobytes()
    region = Region("w", Layout.F32, 0, len(data))
    found = sample(BytesSource(data), region, len(data))
    assert found.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


def test_a_file_that_ends_early_is_matched_without_complaint() -> None:
    data = _file({"a": _q4(1)})
    regions = map_regions(BytesSource(data))
    found = match_regions(
        regions, [replace(r, name="b") for r in regions], BytesSource(data), BytesSource(b"")
    )
    assert len(found) == len(regions)
