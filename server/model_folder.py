"""Which files in a model's folder say what the bytes of one of them are: ONNX models, the other shards of a split model.

For commands that are given one file; a release names its files itself.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError
from protocol.tensors import ReadAt, Region, map_files, map_regions, parse_onnx
from server.adapters.blobs import FileSource, storage_errors

MODELS_MAX: Final = 64
"""ONNX files that are looked at, those called like the file first: a folder may hold any number of models."""

_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


def map_in_folder(path: Path, source: ReadAt) -> tuple[tuple[Region, ...], tuple[str, ...]]:
    """Map a file, with what the files beside it say about its tensors.

    Args:
        path: Where the file lies.
        source: Its bytes.

    Returns:
        The map, and the names of the other files that it rests on.

    Raises:
        StorageError: The folder, or a file that describes this one, cannot be read.
    """
    with ExitStack() as opened:
        if _SHARD.fullmatch(path.name):
            beside = dict(_shards(path, opened))
        elif any(region.name for region in map_regions(source)):
            beside = {}
        else:
            beside = dict(_models(path, opened))
        regions = map_files({**beside, path.name: source})[path.name]
        return regions, tuple(sorted(beside)) if any(region.name for region in regions) else ()


def _shards(path: Path, opened: ExitStack) -> Iterator[tuple[str, FileSource]]:
    shard = _SHARD.fullmatch(path.name)
    assert shard
    for other in _others(path, "*.safetensors"):
        found = _SHARD.fullmatch(other.name)
        if found and found.groups() == shard.groups():
            yield other.name, _opened(other, opened)


def _models(path: Path, opened: ExitStack) -> Iterator[tuple[str, FileSource]]:
    """ONNX models that keep tensors in the file."""
    models = sorted(_others(path, "*.onnx"), key=lambda model: not path.name.startswith(model.stem))
    for model in models[:MODELS_MAX]:
        source = _opened(model, opened)
        if path.name in _locations(source):
            yield model.name, source


def _others(path: Path, pattern: str) -> list[Path]:
    """Files beside one, by name."""
    with storage_errors(path.parent):
        found = sorted(path.parent.glob(pattern))
        return [other for other in found if other.name != path.name and other.is_file()]


def _opened(path: Path, opened: ExitStack) -> FileSource:
    with storage_errors(path):
        return FileSource(opened.enter_context(path.open("rb")))


def _locations(model: ReadAt) -> Mapping[str, object]:
    try:
        return parse_onnx(model).external
    except ModelFileError:
        return {}
