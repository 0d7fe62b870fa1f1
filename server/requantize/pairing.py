"""Two model files that belong together: what has to be the same in both, and how many codes are not."""

from typing import Final

import numpy as np

from protocol.errors import ModelFileError
from protocol.tensors.gguf import ArrayValue, read_array
from server.requantize.model import FLOAT_LAYOUTS, ModelFile, coded_rows

_ARCHITECTURE: Final = "general.architecture"
_TOKENIZER_ARRAYS: Final = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def check_pair(new: ModelFile, installed: ModelFile) -> None:
    """That one is the other, trained on and not yet quantized.

    Raises:
        ModelFileError: It is not, with what tells so.
    """
    if new.gguf.metadata.get(_ARCHITECTURE) != installed.gguf.metadata.get(_ARCHITECTURE):
        raise ModelFileError(f"{new.path}: {_ARCHITECTURE} is not that of {installed.path}")
    for key in _TOKENIZER_ARRAYS:
        if _array(new, key) != _array(installed, key):
            raise ModelFileError(
                f"{new.path}: {key} differs from that of {installed.path}",
                hint="another vocabulary needs a new file: quantize it and ship an ordinary delta",
            )
    for name, region in installed.tensors.items():
        if name not in new.tensors:
            raise ModelFileError(
                f"{new.path}: there is no tensor {name}, which {installed.path} has",
                hint="give the whole model in one file",
            )
        other = new.tensors[name]
        if other.dims != region.dims:
            raise ModelFileError(
                f"{new.path}: {name} has the shape {other.dims}, {region.dims} in {installed.path}"
            )
        if other.layout not in FLOAT_LAYOUTS:
            raise ModelFileError(
                f"{new.path}: {name} is {other.layout.value}, floats are needed",
                hint="give the model as it was before quantization: F32, F16 or BF16",
            )
    unknown = [name for name in new.tensors if name not in installed.tensors]
    if unknown:
        raise ModelFileError(f"{new.path}: {installed.path} has no tensor {unknown[0]}")


def _array(model: ModelFile, key: str) -> list[bytes] | None:
    value = model.gguf.metadata.get(key)
    return read_array(model.source, value) if isinstance(value, ArrayValue) else None


def changed_codes(made: ModelFile, installed: ModelFile, name: str) -> int:
    """How many codes of a tensor differ between two files of one layout."""
    one, other = (coded_rows(model, name).codes for model in (made, installed))
    return int(np.count_nonzero(one != other))
