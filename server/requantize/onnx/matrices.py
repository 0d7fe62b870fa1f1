"""Which quantized tensors of the installed file are which weights of the new model, and what reads them there.

onnxruntime's quantizers name a quantized tensor after the float one: `X_quantized` with `X_scale` and `X_zero_point`, `X_Q4` with `X_scales` and
`X_zero_points`. A tensor is chosen where that name and the shape lead to a float initializer of the new model; every other one stays as installed,
with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from protocol.errors import ModelFileError
from server.diagnosis.weights import Floats
from server.requantize.onnx.graph import FLOAT_TYPES, INT8, UINT4, UINT8, Graph, Node
from server.requantize.onnx.storage import Form, Grid

_QUANTIZED_NAME: Final = re.compile(r"(?P<float>.+)(_quantized|_(DQ_)?Q\d)")

_BY_NAME: Final = -1
"""The operator is not told: a later node is, and the quantizer names both alike."""

_OPERATORS: Final = {
    "ConvInteger": (1, _BY_NAME, 3),
    "DequantizeLinear": (0, 1, 2),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "Gather": (0, _BY_NAME, _BY_NAME),
    "GatherBlockQuantized": (0, 2, 3),
    "MatMulInteger": (1, _BY_NAME, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "MatMulNBits": (1, 2, 3),
    "QGemm": (3, 4, 5),
    "QLinearConv": (3, 4, 5),
    "QLinearMatMul": (3, 4, 5),
}
"""Which inputs of an operator are codes, their scales, their zero points."""

_FIRST_AXIS: Final = frozenset({"ConvInteger", "QLinearConv"})
_BLOCKS: Final = frozenset({"MatMulNBits", "GatherBlockQuantized"})
_BLOCK_DEFAULT: Final = 128  # of GatherBlockQuantized
_BITS: Final = frozenset({2, 4, 8})


@dataclass(frozen=True, slots=True)
class Readers:
    """What reads weights in the new model.

    Attributes:
        products: Tensors that they are multiplied with.
        lookups: Tensors of the numbers of rows that are looked up.
        is_transposed: Whether what they are multiplied with lies along their first dimension.
        is_plain: Whether something else reads them, a convolution for example: an error of any weight counts alike.
    """

    products: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()
    is_transposed: bool = False
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """Quantized weights and the float ones that they stand for.

    Attributes:
        name: Of the initializer in the new model.
        stored: Of the installed file's initializer with the codes.
        form: How codes lie in its bytes.
        grid: Which weights they stand for.
        readers: Of the float ones.
        offset: Where the bytes start in the installed file.
    """

    name: str
    stored: str
    form: Form
    grid: Grid
    readers: Readers
    offset: int

    def target(self, floats: Floats) -> Floats:
        """Weights of a model in floats, in the descent's rows."""
        rows, columns = self.form.shape
        return floats.reshape(columns, rows).T if self.form.is_transposed else floats.reshape(rows, columns)

    def installed(self, model: Graph) -> bytes:
        """The bytes of the codes."""
        return model.array_bytes(self.stored)

    def installed_weights(self, model: Graph) -> Floats:
        """What the installed codes stand for, in the shape that the new model has."""
        codes = self.form.codes(self.installed(model))
        part = self.grid.rows(codes, slice(0, len(codes)), *self.form.range(codes))
        found = part.weights(part.codes)
        return np.ascontiguousarray(found.T if self.form.is_transposed else found).reshape(self.form.dims)


class _LeftError(Exception):
    """Why a tensor stays as installed."""


def find_matrices(new: Graph, installed: Graph) -> tuple[tuple[Matrix, ...], dict[str, str]]:
    """Pair the tensors.

    Returns:
        Those that can be chosen, in the order of the installed file, and for each other quantized tensor why it stays as installed.

    Raises:
        ModelFileError: None can be chosen.
    """
    found: dict[str, Matrix] = {}
    kept: dict[str, str] = {}
    readers = new.readers()
    for node in installed.nodes:
        if node.operator not in _OPERATORS:
            continue
        name = node.input(_OPERATORS[node.operator][0])
        place = installed.stored.get(name)
        if place is None or name in found or name in kept:
            continue
        if node.operator == "Gather" and place.data_type not in {INT8, UINT8}:
            continue  # a table of something else
        try:
            found[name] = _matrix(new, installed, node, name, readers)
        except _LeftError as reason:
            kept[name] = str(reason)
    if not found:
        why = f": {next(iter(kept))}: {next(iter(kept.values()))}" if kept else ""
        raise ModelFileError(
            f"{installed.path}: no quantized tensor is known to be one of {new.path}{why}",
            hint="give the file that onnxruntime's quantizer made, and the new model with the names of the one that was quantized",
        )
    return tuple(found.values()), kept


def _matrix(
    new: Graph,
    installed: Graph,
    node: Node,
    stored: str,
    readers: dict[str, list[tuple[Node, int]]],
) -> Matrix:
    match = _QUANTIZED_NAME.fullmatch(stored)
    name = match["float"] if match else stored
    if match is None or not new.is_float(name):
        raise _LeftError(f"the new model has no floats {name}")
    place = installed.stored[stored]
    if place.offset is None:
        raise _LeftError("too few bytes, or not stored as bytes")
    dims = new.stored[name].dims
    how = _readers(readers.get(name, []), dims)
    if node.operator in _BLOCKS:
        form, grid = _blocks(installed, node, stored, dims)
        if how.is_transposed != form.is_transposed:  # as the operator reads them, another matrix
            how = Readers(is_plain=True)
    else:
        form = Form(dims, is_signed=place.data_type == INT8, is_transposed=how.is_transposed)
        if place.data_type not in {INT8, UINT8} or place.dims != dims:
            raise _LeftError(f"its type or shape is not that of eight-bit {name}")
        grid = _grid(installed, node, form, match["float"])
    if form.length != place.length:
        raise _LeftError(f"{place.length} bytes, {form.length} are expected")
    if not (np.isfinite(grid.scales).all() and np.isfinite(grid.zeros).all()):
        raise ModelFileError(f"{installed.path}: the scales of {stored} are no numbers")
    return Matrix(name, stored, form, grid, how, place.offset)


def _readers(reading: Sequence[tuple[Node, int]], dims: tuple[int, ...]) -> Readers:
    """By what reads them: matrix products, looking up, or something else."""
    products: list[str] = []
    lookups: list[str] = []
    transposed: set[bool] = set()
    for node, at in reading:
        if node.operator == "MatMul" and at == 1 and len(dims) == 2:
            products.append(node.inputs[0])
            transposed.add(True)
        elif node.operator == "Gemm" and at == 1 and not node.integers.get("transA"):
            products.append(node.inputs[0])
            transposed.add(not node.integers.get("transB"))
        elif node.operator == "Gather" and at == 0 and not node.integers.get("axis") and len(dims) == 2:
            lookups.append(node.inputs[1])
            transposed.add(False)
        else:
            return Readers(is_plain=True)
    if len(transposed) != 1:
        return Readers(is_plain=True)
    return Readers(tuple(dict.fromkeys(products)), tuple(dict.fromkeys(lookups)), transposed.pop())


def _grid(installed: Graph, node: Node, form: Form, name: str) -> Grid:
    """Scales and zero points of bytes: one for all, or one for each place along a dimension."""
    _, scale_at, zero_at = _OPERATORS[node.operator]
    scale_name = f"{name}_scale" if scale_at == _BY_NAME else node.input(scale_at)
    zero_name = f"{name}_zero_point" if zero_at == _BY_NAME else node.input(zero_at)
    scales = _values(installed, scale_name, "scale")
    zeros = _values(installed, zero_name, "zero point") if zero_name else np.zeros(1, np.float32)
    axis = node.integers.get("axis", 1) if node.operator == "DequantizeLinear" else len(form.dims) - 1
    if node.operator in _FIRST_AXIS:
        axis = 0
    if node.operator == "Gather" and scales.size > 1:
        raise _LeftError(f"{scales.size} scales of rows that are looked up")
    if node.integers.get("block_size"):
        raise _LeftError("blocks of bytes are not known here")
    return Grid(_along(scales, axis, form), _along(zeros, axis, form))


def _along(values: Floats, axis: int, form: Form) -> Floats:
    """Values for each row or column of the descent."""
    if values.size == 1:
        return values.reshape(1, 1)
    axis %= len(form.dims)
    if values.size != form.dims[axis]:
        raise _LeftError(f"{values.size} scales do not fit its shape")
    if axis == (1 if form.is_transposed else 0):
        return values.reshape(-1, 1)
    if len(form.dims) == 2:
        return values.reshape(1, -1)
    raise _LeftError(f"scales along dimension {axis} of {len(form.dims)} are not known here")


def _blocks(installed: Graph, node: Node, stored: str, dims: tuple[int, ...]) -> tuple[Form, Grid]:
    """Codes in blocks along a row, with scales and perhaps zero points of each block."""
    _, scale_at, zero_at = _OPERATORS[node.operator]
    is_product = node.operator == "MatMulNBits"
    bits, block = node.integers.get("bits", 4), node.integers.get("block_size", _BLOCK_DEFAULT)
    data_type = installed.stored[stored].data_type
    axes = node.integers.get("gather_axis", 0), node.integers.get("quantize_axis", 1)
    if data_type not in {UINT8, UINT4} or bits not in _BITS or len(dims) != 2 or block < 1:
        raise _LeftError(f"codes of {bits} bits and type {data_type} are not known here")
    if (is_product and node.input(4)) or (not is_product and axes != (0, 1)):
        raise _LeftError("the order of its blocks is not known here")
    form = Form(
        dims, bits=bits, block=block if is_product else 0, is_transposed=is_product, is_stored_by_rows=True
    )
    rows, columns = form.shape
    if is_product and (node.integers.get("N"), node.integers.get("K")) != (rows, columns):
        raise _LeftError("its shape is another one in the new model")
    count = -(-columns // block)
    scales = _values(installed, node.input(scale_at), "scale")
    if scales.size != rows * count:
        raise _LeftError(f"{scales.size} scales, {rows * count} are expected")
    middle = 0 if data_type == UINT4 else 1 << (bits - 1)
    zeros = np.full((1, 1), middle, np.float32)
    if zero_name := node.input(zero_at):
        zeros = _block_zeros(installed, zero_name, bits, rows, count)
    return form, Grid(scales.reshape(rows, count), zeros, block)


def _block_zeros(installed: Graph, name: str, bits: int, rows: int, count: int) -> Floats:
    """Zero points: packed like codes, each row filled up to whole bytes, or as floats."""
    if installed.is_float(name):
        zeros = _values(installed, name, "zero point")
        if zeros.size != rows * count:
            raise _LeftError(f"{zeros.size} zero points, {rows * count} are expected")
        return zeros.reshape(rows, count)
    form = Form((rows, count), bits=bits, block=8 // bits)
    data = installed.array_bytes(name)
    if len(data) != form.length:
        raise _LeftError(f"zero points of {len(data)} bytes, {form.length} are expected")
    return np.asarray(form.codes(data), np.float32)


def _values(installed: Graph, name: str, what: str) -> Floats:
    if name not in installed.stored:
        raise _LeftError(f"its {what} is no initializer")
    return np.asarray(installed.array(name), np.float32).reshape(-1)


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """Weights that are floats in both files, of one shape and type: biases, norms, what the quantizer left out.

    Attributes:
        name: Of the initializer in both.
        offset: Where the bytes start in the installed file.
        bits: Of a weight.
    """

    name: str
    offset: int
    bits: int


def find_floats(new: Graph, installed: Graph) -> tuple[FloatTensor, ...]:
    """Tensors that are floats in both files and differ, in the order of the installed one."""
    return tuple(
        FloatTensor(name, place.offset, FLOAT_TYPES[place.data_type])
        for name, place in installed.stored.items()
        if place.offset is not None
        and place.data_type in FLOAT_TYPES
        and name in new.stored
        and (new.stored[name].dims, new.stored[name].data_type) == (place.dims, place.data_type)
        and new.array_bytes(name) != installed.array_bytes(name)
    )
