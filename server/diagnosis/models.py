"""A model on disk, opened for comparison: its tensors by name, and what a GGUF file says about itself.

A model may be several files: external tensors of an ONNX model, parts of a split one. Bytes are read where they lie, a stretch at a time.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from protocol.errors import ModelFileError, RequestError
from protocol.tensors import ReadAt, Region, map_files, parse_gguf, parse_onnx, parse_safetensors
from protocol.tensors.gguf import MAGIC, ArrayValue, Scalar
from protocol.tensors.safetensors import looks_like_safetensors
from server.adapters.blobs import FileSource, storage_errors

Kind = Literal["gguf", "onnx", "safetensors"]

_ONNX_FIRST_BYTE: Final = 0x08  # ModelProto.ir_version, which every writer puts first
_START_BYTES: Final = 9
_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.(gguf|safetensors)")


@dataclass(frozen=True, slots=True)
class Model:
    """An open model.

    Attributes:
        label: What a person calls it.
        kind: Of its first file.
        path: Of its first file.
        files: All that it was opened with, by the names that they have for each other, the first one first.
        source: The first file, which has the metadata.
        metadata: Of a GGUF file; nothing for the others.
        tensors: Where each lies, by name.
        other: Stretches of its first file that are no tensor's: the graph of an ONNX model, with its smallest tensors.
    """

    label: str
    kind: Kind
    path: Path
    files: Mapping[str, Path]
    source: ReadAt
    metadata: Mapping[str, Scalar | ArrayValue]
    tensors: Mapping[str, tuple[ReadAt, Region]]
    other: tuple[Region, ...]


def files_of(path: Path) -> dict[str, Path]:
    """A model's file, and the files beside it that it cannot do without, by name; the given one first."""
    shard = _SHARD.fullmatch(path.name)
    found = {path.name: path}
    if shard:
        pattern = f"{shard['stem']}-*-of-{shard['count']}{path.suffix}"
        found |= {other.name: other for other in sorted(path.parent.glob(pattern)) if other.is_file()}
    return found


@contextmanager
def opened_model(files: Mapping[str, Path], label: str) -> Iterator[Model]:
    """Open a model.

    Args:
        files: By the names that they have for each other, the model first.
        label: What a person calls it.

    Raises:
        RequestError: A file cannot be read.
        ModelFileError: One is no model, or damaged.
    """
    with ExitStack() as stack:
        first = next(iter(files))
        sources: dict[str, ReadAt] = {name: _opened(path, stack) for name, path in files.items()}
        kind = _kind(sources[first], label)
        try:
            model = _model(kind, files, sources, label, stack)
        except ModelFileError as error:
            raise ModelFileError(f"{label}: {error.message}", hint=error.hint) from error
        yield model


@contextmanager
def laid_out(model: Model) -> Iterator[Path]:
    """The first file of a model at a place where its other files lie beside it under the names that it has for them.

    Raises:
        StorageError: There is no room for copies.
    """
    if len(model.files) == 1 or all(path.name == name for name, path in model.files.items()):
        yield model.path
        return
    with tempfile.TemporaryDirectory(prefix="whimbrel-diagnose-") as folder:
        for name, path in model.files.items():
            with storage_errors(Path(folder) / name):
                try:
                    os.link(path, Path(folder) / name)
                except OSError:  # another file system
                    shutil.copyfile(path, Path(folder) / name)
        yield Path(folder) / next(iter(model.files))


def _model(
    kind: Kind, files: Mapping[str, Path], sources: dict[str, ReadAt], label: str, stack: ExitStack
) -> Model:
    first = next(iter(files))
    metadata: Mapping[str, Scalar | ArrayValue] = {}
    maps: dict[str, tuple[Region, ...]] = {}
    if kind == "gguf":
        parsed = {
            name: parse_gguf(source)
            for name, source in sources.items()
            if name.endswith(".gguf") or name == first
        }
        metadata = parsed[first].metadata
        maps = {name: file.regions for name, file in parsed.items()}
    else:
        for location in _external(sources[first], kind):
            if location not in sources:
                sources[location] = _opened(files[first].parent / location, stack)
        maps = map_files(sources)
    tensors: dict[str, tuple[ReadAt, Region]] = {}
    for name, regions in maps.items():
        for region in regions:
            if region.name:
                tensors.setdefault(region.name, (sources[name], region))
    if not tensors:
        raise ModelFileError("there are no tensors in it")
    other = tuple(region for region in maps[first] if not region.name)
    return Model(label, kind, files[first], files, sources[first], metadata, tensors, other)


def _external(source: ReadAt, kind: Kind) -> list[str]:
    if kind == "safetensors":
        parse_safetensors(source)  # refuses what is damaged
        return []
    return list(parse_onnx(source).external)


def _opened(path: Path, stack: ExitStack) -> ReadAt:
    if not path.is_file():
        problem = "is no plain file" if path.exists() else "no such file"
        raise RequestError(f"{path}: {problem}", hint="give a model file: GGUF, ONNX or safetensors")
    try:
        return FileSource(stack.enter_context(path.open("rb")))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error


def _kind(source: ReadAt, label: str) -> Kind:
    start = source.read_at(0, _START_BYTES)
    if start[:4] == MAGIC:
        return "gguf"
    if looks_like_safetensors(start, source.length):
        return "safetensors"
    if start[:1] == bytes([_ONNX_FIRST_BYTE]):
        return "onnx"
    what = "the file is empty" if not start else f"it starts with {start[:4].hex(' ')}"
    raise ModelFileError(f"{label} is no model: {what}", hint="give a GGUF, ONNX or safetensors file")
