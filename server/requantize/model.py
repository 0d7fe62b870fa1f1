"""A GGUF model on disk: its tensors as floats, rows at a time, and what its metadata says of its shape. Which architectures are understood."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from protocol.delta.layouts import LAYOUTS
from protocol.errors import ModelFileError, RequestError
from protocol.tensors import Layout, Region, parse_gguf
from protocol.tensors.gguf import GgufFile
from server.adapters.blobs import FileSource, storage_errors
from server.diagnosis.weights import COMPARABLE, Floats, block_weights, read_piece
from server.requantize.codes import CodedRows
from server.requantize.transformer import MATRICES, NORMS, Array, Shape

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
OUTPUT_NORM: Final = "output_norm.weight"
ROPE_FACTORS: Final = "rope_freqs.weight"

FLOAT_LAYOUTS: Final = frozenset({Layout.F32, Layout.F16, Layout.BF16})

HALVED_ROPE: Final[Mapping[str, bool]] = {"llama": False, "mistral": False, "qwen2": True}
"""The architectures that `transformer.py` computes, and how each turns the pairs of a head."""

_DEFAULT_ROPE_BASE: Final = 10_000.0
_BIASES: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_READ_WEIGHTS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFile:
    """An open GGUF file.

    Attributes:
        path: Where it lies.
        source: Its bytes.
        gguf: What it says about itself.
        tensors: Where each lies, by name, in file order.
    """

    path: Path
    source: FileSource
    gguf: GgufFile
    tensors: Mapping[str, Region]

    def region(self, name: str) -> Region:
        """Where a tensor lies.

        Raises:
            ModelFileError: There is none of that name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(f"{self.path}: there is no tensor {name}") from None

    def read_bytes(self, region: Region, start: int, stop: int) -> bytes:
        """Bytes of the rows `start` to `stop` of a tensor."""
        size = row_bytes(region)
        return self.source.read_at(region.offset + start * size, (stop - start) * size)

    def floats(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """As `values`, of a tensor that is not quantized.

        Raises:
            ModelFileError: There is no such tensor, or it is quantized.
        """
        region = self.region(name)
        if region.layout not in FLOAT_LAYOUTS:
            raise ModelFileError(
                f"{self.path}: {name} is {region.layout.value}, floats are needed",
                hint="give the model as it was before quantization: F32, F16 or BF16",
            )
        return self.values(name, start, stop)

    def values(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows of a tensor as float32, shape (rows, columns), or (columns,) of a vector.

        Args:
            name: Of the tensor.
            start: First row.
            stop: Row after the last one; all of them unless given.

        Raises:
            ModelFileError: There is no such tensor, or its weights do not follow from its own bytes.
        """
        region = self.region(name)
        if region.layout not in COMPARABLE:
            raise ModelFileError(f"{self.path}: {name} has a layout whose weights are not computed here")
        rows, columns = rows_and_columns(region)
        stop = rows if stop is None else stop
        out = np.empty((stop - start, columns), np.float32)
        step = max(1, _READ_WEIGHTS // columns)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            piece = read_piece(region.layout, self.read_bytes(region, first, last))
            out[first - start : last - start] = piece.values.reshape(last - first, columns)
        return out[0] if len(region.dims) == 1 else out


@contextmanager
def opened_gguf(path: Path) -> Iterator[ModelFile]:
    """Open a GGUF file.

    Raises:
        RequestError: There is no such file.
        ModelFileError: It is none, or damaged.
        StorageError: It cannot be read.
    """
    if not path.is_file():
        problem = "is no plain file" if path.exists() else "no such file"
        raise RequestError(f"{path}: {problem}", hint="give a GGUF file")
    with storage_errors(path):
        file = path.open("rb", buffering=0)
    with file:
        source = FileSource(file)
        try:
            parsed = parse_gguf(source)
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error.message}", hint=error.hint) from error
        yield ModelFile(path, source, parsed, {region.name: region for region in parsed.tensors})


def sha256_of(path: Path) -> str:
    """Digest of a file.

    Raises:
        StorageError: It cannot be read.
    """
    with storage_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_and_columns(region: Region) -> tuple[int, int]:
    """A tensor as a matrix: neighbours along a row are multiplied with the same inputs."""
    return math.prod(region.dims[:-1]), region.dims[-1]


def row_bytes(region: Region) -> int:
    """Bytes of one row of `rows_and_columns`."""
    return region.dims[-1] // block_weights(region.layout) * LAYOUTS[region.layout].block_bytes


def coded_rows(model: ModelFile, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
    """Rows of a tensor whose layout has linear codes, taken apart; all of them unless `stop` is given."""
    region = model.region(name)
    count, columns = rows_and_columns(region)
    data = model.read_bytes(region, start, count if stop is None else stop)
    return CodedRows.read(region.layout, data, columns)


def tensor_name(layer: int, name: str) -> str:
    """How GGUF calls a layer's weight."""
    return f"blk.{layer}.{name}.weight"


def layer_matrices(model: ModelFile) -> tuple[str, ...]:
    """The matrices of all layers, in their order.

    Raises:
        ModelFileError: As `read_shape`.
    """
    layers = read_shape(model).layers
    return tuple(tensor_name(layer, name) for layer in range(layers) for name in MATRICES)


def head_of(model: ModelFile) -> str:
    """The matrix that makes logits: the embedding again, where there is no other."""
    return OUTPUT if OUTPUT in model.tensors else EMBEDDING


def read_layer(model: ModelFile, layer: int, matrices: tuple[str, ...] = MATRICES) -> dict[str, Array]:
    """Weights of one transformer block, by the names that `transformer.py` uses: norms, biases, and those matrices."""
    weights: dict[str, Array] = {name: model.values(tensor_name(layer, name)) for name in (*NORMS, *matrices)}
    for name in _BIASES:
        bias = f"blk.{layer}.{name}.bias"
        if bias in model.tensors:
            weights[f"{name}.bias"] = model.values(bias)
    return weights


def read_shape(model: ModelFile) -> Shape:
    """The model's size, from its metadata.

    Raises:
        ModelFileError: A key is missing, or the architecture is not among those that are computed.
    """
    architecture = model.gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in HALVED_ROPE:
        raise ModelFileError(
            f"{model.path}: the architecture {architecture!r} is not computed here",
            hint=f"known are {', '.join(HALVED_ROPE)}",
        )
    heads = int(_number(model, architecture, "attention.head_count"))
    layers = int(_number(model, architecture, "block_count"))
    if heads < 1 or layers < 1:
        raise ModelFileError(f"{model.path}: a model with {layers} layers of {heads} heads is none")
    shape = Shape(
        layers=layers,
        heads=heads,
        kv_heads=int(_number(model, architecture, "attention.head_count_kv", heads)),
        epsilon=_number(model, architecture, "attention.layer_norm_rms_epsilon"),
        rope_base=_number(model, architecture, "rope.freq_base", _DEFAULT_ROPE_BASE),
        is_rope_halved=HALVED_ROPE[architecture],
    )
    _check_computed(model, architecture, shape)
    if ROPE_FACTORS in model.tensors:
        shape = replace(shape, rope_factors=tuple(model.floats(ROPE_FACTORS).tolist()))
    return shape


def _check_computed(model: ModelFile, architecture: str, shape: Shape) -> None:
    """What `transformer.py` does not compute is refused, as a wrong gradient would only show in worse answers."""
    if _number(model, architecture, "expert_count", 0):
        raise ModelFileError(f"{model.path}: mixtures of experts are not computed here")
    scaling = model.gguf.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelFileError(f"{model.path}: rotary embedding scaled by {scaling!r} is not computed here")
    rows, _ = rows_and_columns(model.region(tensor_name(0, "attn_q")))
    size = rows // shape.heads
    turned = _number(model, architecture, "rope.dimension_count", size)
    if turned != size or shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        raise ModelFileError(
            f"{model.path}: rotary embedding of {turned:.0f} of {size} dimensions of a head is not computed here"
        )
    known = {EMBEDDING, OUTPUT, OUTPUT_NORM, ROPE_FACTORS}
    for layer in range(shape.layers):
        known |= {tensor_name(layer, name) for name in (*NORMS, *MATRICES)}
        known |= {f"blk.{layer}.{name}.bias" for name in _BIASES}
    other = [name for name in model.tensors if name not in known]
    if other:
        raise ModelFileError(f"{model.path}: the tensor {other[0]} has no place in what is computed here")


def _number(model: ModelFile, architecture: str, key: str, default: float | None = None) -> float:
    value = model.gguf.metadata.get(f"{architecture}.{key}", default)
    if not isinstance(value, int | float):
        raise ModelFileError(f"{model.path}: metadata has no number {architecture}.{key}")
    return float(value)
