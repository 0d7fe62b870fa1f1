"""What an ONNX model is asked: named arrays of samples from files, and whether two files share any.

A file is an `.npz` of NumPy with an array for each input of the model, the samples along the first dimension; an array without dimensions is
given with every sample. Or it is a suite of the kind `classes` as `whimbrel score` reads it (JSON lines with `input`), for a model with one input.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.errors import RequestError
from protocol.ids import Digest, digest_of
from server.adapters.blobs import storage_errors
from server.scorecard.items import ClassQuestion
from server.scorecard.suites import Asking, read_suite

FILE_BYTES_MAX: Final = 1 << 30
"""All samples are in memory at once."""

SAMPLES_MIN: Final = 32
"""Of a held-out set: fewer say nothing that an interval could hold."""

_NAMELESS: Final = ""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs of a model.

    Attributes:
        name: For people; unique among the sets of one choice.
        arrays: By name of the input; those with dimensions have the samples along the first one. One without a name is the model's only input, its
            samples flat.
    """

    name: str
    arrays: Mapping[str, Array]

    def __len__(self) -> int:
        """How many samples."""
        return next(len(each) for each in self.arrays.values() if each.ndim)

    @property
    def digest(self) -> Digest:
        """Of names, types, shapes and values."""
        state = hashlib.sha256()
        for name, values in sorted(self.arrays.items()):
            state.update(f"{name}:{values.dtype.str}:{values.shape};".encode())
            state.update(np.ascontiguousarray(values).tobytes())
        return Digest(state.hexdigest())

    def part(self, start: int, stop: int) -> "Samples":
        """Some samples."""
        return Samples(
            self.name, {name: each[start:stop] if each.ndim else each for name, each in self.arrays.items()}
        )

    def hashes(self) -> list[Digest]:
        """Of each sample, whatever it was filled up with: zeros at the end of a row do not count."""
        varying = sorted((name, values) for name, values in self.arrays.items() if values.ndim)
        found = []
        for number in range(len(self)):
            rows = (
                np.trim_zeros(np.asarray(each[number], np.float64).reshape(-1), "b") for _, each in varying
            )
            found.append(digest_of(b"|".join(row.tobytes() for row in rows)))
        return found


def read_samples(paths: Sequence[Path]) -> Samples:
    """Read one set from one file or several with the same inputs; it is called like the first.

    Raises:
        RequestError: A file is missing, damaged or too large, or does not fit the others.
    """
    read = [_read(path) for path in paths]
    first = read[0]
    for path, other in zip(paths[1:], read[1:], strict=True):
        if {name: _kind(each) for name, each in other.arrays.items()} != {
            name: _kind(each) for name, each in first.arrays.items()
        }:
            raise RequestError(
                f"{path}: its inputs have not the names, types and shapes of those in {paths[0]}"
            )
    arrays = {
        name: np.concatenate([each.arrays[name] for each in read]) if values.ndim else values
        for name, values in first.arrays.items()
    }
    return Samples(paths[0].name, arrays)


def check_unseen(sets: Sequence[Samples], seen: Sequence[Samples]) -> None:
    """Refuse sets that share a sample with each other, or with what was seen before.

    Args:
        sets: On which files are judged.
        seen: By which they were chosen.

    Raises:
        RequestError: Names both sets and the samples.
    """
    known = {key: (other.name, place) for other in seen for place, key in enumerate(other.hashes())}
    for each in sets:
        for place, key in enumerate(each.hashes()):
            name, theirs = known.setdefault(key, (each.name, place))
            if name != each.name:
                raise RequestError(
                    f"sample {place} of {each.name} is sample {theirs} of {name}",
                    hint="judge on samples that were not used before",
                )


def _read(path: Path) -> Samples:
    if not path.is_file():
        raise RequestError(f"{path}: no such file", hint="give an .npz with an array for each input")
    if path.stat().st_size > FILE_BYTES_MAX:
        raise RequestError(f"{path}: more than {FILE_BYTES_MAX:,} bytes", hint="give fewer samples")
    if path.suffix != ".npz":
        return _classes(path)
    try:
        with storage_errors(path), np.load(path, allow_pickle=False) as file:
            size = sum(each.file_size for each in file.zip.infolist())
            if size > FILE_BYTES_MAX:
                raise RequestError(f"{path}: more than {FILE_BYTES_MAX:,} bytes", hint="give fewer samples")
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise RequestError(
            f"{path}: no .npz of plain arrays: {error}", hint="write it with numpy.savez"
        ) from error
    counts = {len(each) for each in arrays.values() if each.ndim}
    if len(counts) != 1 or 0 in counts:
        raise RequestError(
            f"{path}: the arrays have {' and '.join(map(str, sorted(counts))) or 'no'} samples",
            hint="expected is an array for each input of the model, with the samples along the first dimension",
        )
    strange = next((name for name, each in arrays.items() if each.dtype.kind not in "biuf"), None)
    if strange is not None:
        raise RequestError(f"{path}: {strange} has the type {arrays[strange].dtype}, numbers are expected")
    return Samples(path.name, arrays)


def _classes(path: Path) -> Samples:
    rows = []
    for item in read_suite("classes", path, Asking()).items:
        if not isinstance(item.question, ClassQuestion):
            raise RequestError(f"{path}: {item.name} is text", hint='expected are lines with "input"')
        rows.append(item.question.input)
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise RequestError(f"{path}: inputs of {min(widths)} and of {max(widths)} numbers")
    return Samples(path.name, {_NAMELESS: np.asarray(rows, np.float64)})


def _kind(values: Array) -> tuple[str, tuple[int, ...]]:
    return values.dtype.str, values.shape[1:] if values.ndim else ()
