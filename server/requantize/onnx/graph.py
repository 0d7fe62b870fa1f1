"""An ONNX file: its nodes, its initializers, and where their bytes lie. The only module of the server that imports the `onnx` package.

The file goes through the project's own parser first, which refuses what is hostile: external files, memory addresses, nesting without end. Models
whose initializers lie in other files are refused here.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.errors import EngineError, ModelFileError, RequestError
from protocol.tensors import parse_onnx
from protocol.tensors.onnx import MIN_TENSOR_BYTES
from server.adapters.blobs import FileSource, storage_errors
from server.diagnosis.weights import Floats

FLOAT_TYPES: Final = {1: 32, 10: 16}
"""Data types of initializers (`TensorProto.DataType`) that count as floats, float and float16, and their bits."""

INT8, UINT8, INT4, UINT4 = 3, 2, 22, 21

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        operator: Its type, for example `MatMul`.
        inputs: Names, "" for one that is left out.
        outputs: Names.
        integers: Its attributes that are integers.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]

    def input(self, at: int) -> str:
        """Name of an input, "" where there is none."""
        return self.inputs[at] if at < len(self.inputs) else ""


@dataclass(frozen=True, slots=True)
class Stored:
    """An initializer.

    Attributes:
        dims: Its shape.
        data_type: A number of `TensorProto.DataType`.
        offset: Where its bytes start in the file; None where they are no run of bytes, or few and no floats.
        length: Of these bytes.
    """

    dims: tuple[int, ...]
    data_type: int
    offset: int | None
    length: int


class Graph:
    """A model that was read.

    Args:
        path: The file.

    Raises:
        RequestError: There is no such file.
        ModelFileError: It is damaged, or its tensors lie in other files.
        EngineError: The package `onnx` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        onnx = _onnx()
        places = _places(path)
        with storage_errors(path):
            data = path.read_bytes()
        self.sha256: Final = hashlib.sha256(data).hexdigest()
        self.length: Final = len(data)
        try:
            self._model: Final = onnx.load_model_from_string(data)
        except Exception as error:  # protobuf's own, which is no public name
            raise ModelFileError(f"{path}: no ONNX model: {_line(error)}") from error
        graph = self._model.graph
        self._tensors: Final = {each.name: each for each in graph.initializer}
        self.nodes: Final = tuple(
            Node(each.op_type, tuple(each.input), tuple(each.output), _integers(each)) for each in graph.node
        )
        self.inputs: Final = tuple(each.name for each in graph.input if each.name not in self._tensors)
        self.outputs: Final = tuple(each.name for each in graph.output)
        self.stored: Final[Mapping[str, Stored]] = {
            name: _located(each, places.get(name), data) for name, each in self._tensors.items()
        }

    def array(self, name: str) -> Array:
        """Values of an initializer.

        Raises:
            ModelFileError: There is none, or it is damaged.
        """
        from onnx import numpy_helper  # noqa: PLC0415 - it was there when the file was read

        try:
            return np.asarray(numpy_helper.to_array(self._tensors[name]))
        except KeyError:
            raise ModelFileError(f"{self.path}: there is no initializer {name}") from None
        except Exception as error:
            raise ModelFileError(f"{self.path}: the initializer {name} is damaged: {_line(error)}") from error

    def array_bytes(self, name: str) -> bytes:
        """Bytes of an initializer of few bits a value, or of bytes, as they are stored.

        Raises:
            ModelFileError: There is none.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self.path}: there is no initializer {name}")
        return bytes(tensor.raw_data) or self.array(name).tobytes()

    def floats(self, name: str) -> Floats:
        """Values of a float initializer, in single precision."""
        return np.asarray(self.array(name), np.float32)

    def is_float(self, name: str) -> bool:
        """Whether there is a float initializer of that name."""
        return name in self.stored and self.stored[name].data_type in FLOAT_TYPES

    def readers(self) -> dict[str, list[tuple[Node, int]]]:
        """Which nodes read each name, and as which of their inputs."""
        found: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for at, name in enumerate(node.inputs):
                found.setdefault(name, []).append((node, at))
        return found

    def with_taps(self, outputs: Iterable[str], replaced: Iterable[str]) -> bytes:
        """The model with more outputs, and with initializers that a run may replace: they become inputs with a default.

        Args:
            outputs: Names of tensors inside the graph.
            replaced: Names of initializers.
        """
        onnx = _onnx()
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.ir_version = max(model.ir_version, 4)  # before that, every initializer was an input
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in outputs if name not in self.outputs
        )
        known = {each.name for each in model.graph.input}
        for name in replaced:
            if name not in known:
                tensor = self._tensors[name]
                model.graph.input.append(
                    onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
                )
        data: bytes = model.SerializeToString()
        return data


def _located(tensor: Any, place: tuple[int, int] | None, data: bytes) -> Stored:
    """Where the project's own parser found the tensor; not believed where the bytes are others.

    That parser passes over what is smaller than a delta's rows. Such floats are looked for as the whole message that they are, name and all.
    """
    dims = tuple(int(size) for size in tensor.dims)
    raw = bytes(tensor.raw_data)
    if place is None and tensor.data_type in FLOAT_TYPES and 0 < len(raw) < MIN_TENSOR_BYTES:
        message = tensor.SerializeToString()
        start = data.find(message)
        if start >= 0 and data.find(message, start + 1) < 0:
            place = (start + message.rfind(raw), len(raw))
    if place is None or place[1] != len(raw) or data[place[0] : sum(place)] != raw:
        return Stored(dims, tensor.data_type, None, 0)
    return Stored(dims, tensor.data_type, *place)


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of each tensor that has a place of its own in the file."""
    if not path.is_file():
        raise RequestError(f"{path}: no such file", hint="give an ONNX file")
    with storage_errors(path), path.open("rb") as file:
        try:
            found = parse_onnx(FileSource(file))
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error.message}", hint=error.hint) from error
    if found.external:
        raise ModelFileError(
            f"{path}: its tensors lie in {next(iter(found.external))}",
            hint="save the model with all tensors in one file",
        )
    named = [region for region in found.regions if region.name]
    counts = Counter(region.name for region in named)  # names of attributes' tensors need not be unique
    return {region.name: (region.offset, region.length) for region in named if counts[region.name] == 1}


def _integers(node: Any) -> dict[str, int]:
    return {each.name: each.i for each in node.attribute if each.type == 2}  # AttributeProto.INT


def _onnx() -> ModuleType:
    try:
        import onnx  # noqa: PLC0415 - a server that never requantizes ONNX does without
    except ImportError as error:
        raise EngineError(
            f"the package onnx is not installed: {error}", hint="install whimbrel with the extra 'requantize'"
        ) from error
    module: ModuleType = onnx
    return module


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def names_text(names: Sequence[str], most: int = 5) -> str:
    """A few names, and that there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
