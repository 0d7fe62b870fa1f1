"""Deltas of files whose tensors other files describe."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protocol.delta.layouts import LAYOUTS
from protocol.delta.writer import make_delta
from protocol.errors import ModelFileError
from protocol.tensors import BytesSource, Layout, Region, map_files, map_regions
from tests.protocol.delta_files import apply, delta
from tests.protocol.model_files import (
    blocks,
    external_model,
    moved_blocks,
    onnx_file,
    safetensors_file,
    weights,
)

Arrays = Mapping[str, npt.NDArray[Any]]


def _tensors(update: float) -> Arrays:
    floats = {f"w{i}": weights((256, 128), i, update) for i in range(4)}
    steps = {name: np.abs(weights((256, 128), i)).max() / 127 for i, name in enumerate(floats)}
    codes = {f"{name}_quantized": np.rint(floats[name] / steps[name]).astype(np.int8) for name in floats}
    return {**codes, "norm": floats["w0"]}


def _delta(base: bytes, new: bytes, maps: tuple[Sequence[Region], Sequence[Region]]) -> bytes:
    out = io.BytesIO()
    make_delta(BytesSource(base), BytesSource(new), out, maps=maps)
    return out.getvalue()


def _map(folder: Path, name: str) -> tuple[Region, ...]:
    return map_files({path.name: BytesSource(path.read_bytes()) for path in folder.iterdir()})[name]


def test_a_file_of_external_data_costs_what_the_same_tensors_cost_inside_the_model(tmp_path: Path) -> None:
    versions = {"old": _tensors(0), "new": _tensors(0.01)}
    for version, tensors in versions.items():
        external_model(tmp_path / version, tensors)
    old, new = ((tmp_path / version / "model.onnx.data").read_bytes() for version in versions)
    maps = _map(tmp_path / "old", "model.onnx.data"), _map(tmp_path / "new", "model.onnx.data")
    patch = _delta(old, new, maps)
    assert apply(old, patch) == new
    embedded, _ = delta(onnx_file(versions["old"]), onnx_file(versions["new"]), 1 << 20)
    assert len(patch) < 1.02 * len(embedded)
    as_bytes, _ = delta(old, new, 1 << 20)
    assert len(patch) < 0.7 * len(as_bytes)


def test_parts_of_a_packed_weight_in_different_files_are_coded_as_codes() -> None:
    """The weight of the layer lies in one shard, its zero points and scales in another."""
    words = blocks(Layout.AWQ4, 128 * 32, 1)
    moved = moved_blocks(Layout.AWQ4, words, 2)
    others = {"l.qzeros": ("I32", (4, 32), bytes(512)), "l.scales": ("F16", (4, 256), bytes(2048))}
    beside = BytesSource(safetensors_file(others))
    old, new = (safetensors_file({"l.qweight": ("I32", (128, 32), data)}) for data in (words, moved))
    maps = tuple(map_files({"1": BytesSource(file), "2": beside})["1"] for file in (old, new))
    assert {region.layout for region in maps[0] if region.name} == {Layout.AWQ4}
    patch = _delta(old, new, (maps[0], maps[1]))
    assert apply(old, patch) == new
    as_words, _ = delta(old, new, 1 << 20)
    assert len(patch) < 0.7 * len(as_words)


def test_a_wrong_map_costs_bytes_and_never_correctness() -> None:
    old, new = blocks(Layout.Q4_0, 300, 1), blocks(Layout.Q4_0, 300, 2)
    half = len(old) // 2
    maps = [
        (
            Region("a", Layout.F32, 0, half - half % 4),
            Region("", Layout.RAW, half - half % 4, len(old) - half + half % 4),
        ),
        (Region("b", Layout.Q4_0, 0, len(old), (9600,)),),
    ]
    assert len(old) % LAYOUTS[Layout.Q4_0].block_bytes == 0
    assert apply(old, _delta(old, new, (maps[0], maps[1]))) == new


@pytest.mark.parametrize(
    "regions",
    [
        pytest.param((), id="nothing"),
        pytest.param((Region("", Layout.RAW, 0, 999),), id="too short"),
        pytest.param((Region("", Layout.RAW, 0, 1001),), id="too long"),
        pytest.param((Region("", Layout.RAW, 1, 999),), id="starts late"),
        pytest.param((Region("", Layout.RAW, 0, 500), Region("", Layout.RAW, 501, 499)), id="gap"),
        pytest.param((Region("", Layout.RAW, 0, 500), Region("", Layout.RAW, 499, 501)), id="overlap"),
        pytest.param((Region("", Layout.RAW, 0, 0), Region("", Layout.RAW, 0, 1000)), id="empty region"),
    ],
)
def test_a_map_that_does_not_cover_its_file_is_refused(regions: tuple[Region, ...]) -> None:
    data = bytes(1000)
    right = map_regions(BytesSource(data))
    for maps in ((regions, right), (right, regions)):
        with pytest.raises(ModelFileError, match="of 1000 bytes"):
            _delta(data, data, maps)
