"""What the initializers of an ONNX file are to the nodes that read them: packed codes, their scales, their rows.

Pure data and arithmetic; the file itself is walked in `onnx.py`. Sources: `onnx/onnx.proto3`, the operators of onnxruntime
(`ContribOperators.md`), and the names that its quantizer gives.
"""

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from protocol.errors import ModelFileError
from protocol.tensors.regions import Layout, Region, row_elements

# data type: (bits of an element, layout)
DATA_TYPES: dict[int, tuple[int, Layout]] = {
    1: (32, Layout.F32),
    2: (8, Layout.U8),
    3: (8, Layout.I8),
    4: (16, Layout.I16),
    5: (16, Layout.I16),
    6: (32, Layout.I32),
    7: (64, Layout.I64),
    9: (8, Layout.U8),
    10: (16, Layout.F16),
    11: (64, Layout.F64),
    12: (32, Layout.I32),
    13: (64, Layout.I64),
    14: (64, Layout.F32),
    16: (16, Layout.BF16),
    17: (8, Layout.F8),
    18: (8, Layout.F8),
    19: (8, Layout.F8),
    20: (8, Layout.F8),
    21: (4, Layout.PACKED4),
    22: (4, Layout.I4),
    23: (4, Layout.PACKED4),
    24: (8, Layout.U8),
}

# operator: (input with the weights, input with their scales, input with their zero points or None)
_OPERATORS: dict[str, tuple[int, int, int | None]] = {
    "DequantizeLinear": (0, 1, None),
    "DynamicQuantizeMatMul": (1, 2, None),
    "GatherBlockQuantized": (0, 2, 3),
    "MatMulIntegerToFloat": (1, 3, None),
    "MatMulNBits": (1, 2, 3),
    "QAttention": (1, 4, None),
    "QGemm": (3, 4, None),
    "QLinearConv": (3, 4, None),
    "QLinearMatMul": (3, 4, None),
}
# Operators whose bytes hold `bits` (4 unless they say otherwise) bits a code, low nibble first.
_PACKED = {"GatherBlockQuantized", "MatMulNBits"}
USE_INPUTS_MAX = 5
"""No input beyond these says anything about weights."""

# MatMulInteger and ConvInteger are told the scale by a later Mul; onnxruntime's quantizer names both alike.
_QUANTIZED_ENDING, _SCALE_ENDING = "_quantized", "_scale"


@dataclass(slots=True)
class Initializer:
    """A TensorProto, as it stands in the file.

    Attributes:
        name: Of the tensor.
        shape: Its dimensions, fastest last.
        data_type: A number of `TensorProto.DataType`.
        location: The file that holds its bytes, None for the ONNX file itself.
        offset: Where in that file they start.
        length: In bytes; None for an external tensor that does not say, and for values that are no run of bytes.
    """

    name: str = ""
    shape: tuple[int, ...] = ()
    data_type: int = 0
    location: str | None = None
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """What a node makes of an initializer.

    Attributes:
        scales: Name of the tensor with its scales, or "".
        bits: Of a code, where bytes hold codes; 0 where its data type tells.
    """

    scales: str
    bits: int


def uses_of_node(op_type: str, inputs: Sequence[str], integers: Mapping[str, int]) -> dict[str, Use]:
    """Return what a node says about its weights.

    Args:
        op_type: The operator.
        inputs: Its first `USE_INPUTS_MAX` inputs.
        integers: Its attributes that are integers.
    """
    operator = _OPERATORS.get(op_type)
    if operator is None:
        return {}
    weights, scales, zeros = operator
    bits = integers.get("bits", 4) if op_type in _PACKED else 0
    uses: dict[str, Use] = {}
    if len(inputs) > max(weights, scales):
        uses[inputs[weights]] = Use(inputs[scales], bits)
    if zeros is not None and len(inputs) > zeros and inputs[zeros]:
        uses[inputs[zeros]] = Use("", bits)
    return uses


def tensor_region(
    initializer: Initializer, uses: Mapping[str, Use], names: AbstractSet[str]
) -> Region | None:
    """Return the region of an initializer in the file that holds its bytes.

    Args:
        initializer: From the file.
        uses: What nodes say, by name.
        names: Of all initializers.

    Raises:
        ModelFileError: Its length is not what its shape needs.
    """
    name, shape, length = initializer.name, initializer.shape, initializer.length
    if initializer.data_type not in DATA_TYPES:
        return None if length is None else Region(name, Layout.RAW, initializer.offset, length, shape)
    bits, layout = DATA_TYPES[initializer.data_type]
    needed = -(-math.prod(shape) * bits // 8)
    if length is None:
        length = needed
    if length != needed:
        raise ModelFileError(
            f"ONNX: tensor {name!r} has {length} bytes, its shape {list(shape)} needs another number"
        )
    row_bits = row_elements(shape) * bits
    row_bytes = length if row_bits % 8 else row_bits // 8
    region = Region(name, layout, initializer.offset, length, shape, row_bytes, _scales(name, uses, names))
    use = uses.get(name)
    return region if use is None or layout is not Layout.U8 else _packed(region, use.bits)


def _scales(name: str, uses: Mapping[str, Use], names: AbstractSet[str]) -> str:
    use = uses.get(name)
    if use is not None:
        return use.scales
    by_name = name.removesuffix(_QUANTIZED_ENDING) + _SCALE_ENDING
    return by_name if name.endswith(_QUANTIZED_ENDING) and by_name in names else ""


def _packed(region: Region, bits: int) -> Region:
    """Weights of MatMulNBits are bytes of shape [N, blocks, bytes of a block]; its rows are those of the matrix."""
    if bits not in {4, 8} or len(region.dims) < 2:
        return region if bits != 4 else replace(region, layout=Layout.PACKED4)
    codes_a_byte = 8 // bits
    row_bytes = math.prod(region.dims[1:]) if len(region.dims) == 3 else region.dims[-1]
    dims = (*region.dims[: 1 if len(region.dims) == 3 else -1], row_bytes * codes_a_byte)
    layout = Layout.PACKED4 if bits == 4 else region.layout
    return replace(region, layout=layout, dims=dims, row_bytes=row_bytes)
