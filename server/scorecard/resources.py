"""What an inference costs by the model's own dimensions: size, operations, bytes moved, keys and values. Pure; formulas with their sources.

One multiplication and one addition are two operations. What is left out is small beside the matrices: norms, activations, softmax, sampling.

Text model, one token after `t` others (Hoffmann et al. 2022, appendix F, "Parameters, FLOPs"):
  operations = 2 * (weights of all matrices that the token passes) + 2 * layers * heads * (key length + value length) * t
  bytes moved = bytes of those matrices + keys and values of t tokens, read once, and of one written (Pope et al. 2022, section 2)
  keys and values of a token = 2 bytes * layers * key-value heads * (key length + value length) (Ainslie et al. 2023: grouped queries; float16,
  llama.cpp's default)
Of experts only those count that a token is sent to (Fedus et al. 2021). An input embedding is looked up, and counts with one row; where it is
the output matrix too, it counts as that.

Classifier, one input, from the operators that the runtime names in its profile:
  matrix products: 2 * outputs * length of the inner dimension; convolutions: 2 * outputs * weights of one filter (Molchanov et al. 2017,
  appendix A.1); others: 1 for each output, and 0 where values are only arranged
  bytes moved = all weights once, each intermediate result written once and read once
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from protocol.tensors import GgufFile, Region
from server.scorecard.work import OperatorCost

_CACHE_BYTES: Final = 2  # float16
_EMBEDDING: Final = "token_embd.weight"
_OUTPUT: Final = "output.weight"
_EXPERTS: Final = "_exps."

_PRODUCTS: Final = frozenset(
    {
        "MatMul",
        "MatMulInteger",
        "QLinearMatMul",
        "FusedMatMul",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "MatMulNBits",
    }
)
_GEMMS: Final = frozenset({"Gemm", "QGemm", "FusedGemm"})
_FILTER_INPUT: Final = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "ConvTranspose": 1, "QLinearConv": 3}
_UNCOUNTED: Final = frozenset(
    {"LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention"}
)
_ARRANGING: Final = frozenset(
    {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Gather", "Slice", "Concat", "Split", "Shape", "Constant",
     "ConstantOfShape", "Expand", "Pad", "Cast", "QuantizeLinear", "DequantizeLinear"}
)  # fmt: skip


class Cost(Struct, frozen=True, kw_only=True):
    """What something takes, estimated.

    Attributes:
        what: For example "one token after 512".
        operations: Multiplications and additions.
        moved_bytes: Between memory and processor, at least.
    """

    what: str
    operations: int
    moved_bytes: int


class Resources(Struct, frozen=True, kw_only=True):
    """What the model takes by its dimensions.

    Attributes:
        size_bytes: Of all files.
        parameters: Weights in them; of an ONNX file those of tensors that are large enough to be mapped.
        cache_bytes_per_token: Keys and values; None for a classifier, and where layers differ.
        costs: Of inferences.
        notes: What an estimate leaves out.
    """

    size_bytes: int
    parameters: int
    cache_bytes_per_token: int | None
    costs: tuple[Cost, ...]
    notes: tuple[str, ...] = ()


class TextShape(Struct, frozen=True, kw_only=True):
    """Dimensions of a text model.

    Attributes:
        attention_weights: `2 * layers * heads * (key length + value length)`: operations for each token before.
        matrix_weights: Of all matrices that a token passes.
        matrix_bytes: Of the same.
        cache_bytes_per_token: Keys and values; None where the file gives heads layer by layer.
    """

    attention_operations: int
    matrix_weights: float
    matrix_bytes: float
    cache_bytes_per_token: int | None


def text_resources(
    files: Sequence[GgufFile], size_bytes: int, prompt_tokens: int, contexts: Sequence[int]
) -> Resources:
    """Estimate a text model.

    Args:
        files: All parts; the first has the metadata.
        size_bytes: Of all of them.
        prompt_tokens: Of the prompt whose reading is estimated.
        contexts: Numbers of tokens after which making one is estimated.
    """
    tensors = [tensor for file in files for tensor in file.tensors]
    shape = text_shape(files[0], tensors)
    cache = shape.cache_bytes_per_token or 0

    def token(before: int) -> tuple[int, int]:
        operations = 2 * shape.matrix_weights + shape.attention_operations * before
        return round(operations), round(shape.matrix_bytes + cache * (before + 1))

    costs = [
        Cost(what=f"one token after {before:,}", operations=token(before)[0], moved_bytes=token(before)[1])
        for before in contexts
    ]
    prompt = round(sum(token(before)[0] for before in range(prompt_tokens)))
    # Its tokens pass the matrices side by side: the weights are read once.
    costs.append(
        Cost(
            what=f"a prompt of {prompt_tokens:,} tokens",
            operations=prompt,
            moved_bytes=round(shape.matrix_bytes + cache * prompt_tokens),
        )
    )
    notes = (
        ()
        if shape.cache_bytes_per_token is not None
        else ("layers have different numbers of heads: attention is left out",)
    )
    return Resources(
        size_bytes=size_bytes,
        parameters=sum(math.prod(tensor.dims) for tensor in tensors),
        cache_bytes_per_token=shape.cache_bytes_per_token,
        costs=tuple(costs),
        notes=notes,
    )


def text_shape(file: GgufFile, tensors: Sequence[Region]) -> TextShape:
    """Dimensions from a file's metadata and tensors."""
    architecture = file.metadata.get("general.architecture", "")

    def number(key: str, default: int | None = None) -> int | None:
        value = file.metadata.get(f"{architecture}.{key}", default)
        return value if isinstance(value, int) else None

    layers, heads, width = (
        number(key) for key in ("block_count", "attention.head_count", "embedding_length")
    )
    groups = number("attention.head_count_kv", heads)
    attention, cache = 0, None
    if layers and heads and width and groups:
        key = number("attention.key_length", width // heads) or 0
        value = number("attention.value_length", width // heads) or 0
        attention = 2 * layers * heads * (key + value)
        cache = _CACHE_BYTES * layers * groups * (key + value)
    used, experts = number("expert_used_count", 1) or 1, number("expert_count", 1) or 1
    is_tied = all(tensor.name != _OUTPUT for tensor in tensors)
    weights = size = 0.0
    for tensor in tensors:
        share = used / experts if _EXPERTS in tensor.name else 1.0
        if tensor.name == _EMBEDDING and not is_tied:
            share = 1 / tensor.dims[0]  # one row
            size += share * tensor.length
        elif len(tensor.dims) >= 2:
            weights += share * math.prod(tensor.dims)
            size += share * tensor.length
    return TextShape(
        attention_operations=attention, matrix_weights=weights, matrix_bytes=size, cache_bytes_per_token=cache
    )


def classifier_resources(
    tensors: Sequence[Region], size_bytes: int, operators: Sequence[OperatorCost]
) -> Resources:
    """Estimate a classifier."""
    operations = sum(_operations(each) for each in operators)
    arranged = sum(
        each.output_bytes for each in operators if each.kind not in {"DequantizeLinear", "Constant"}
    )
    weights = sum(tensor.length for tensor in tensors)
    left_out: Mapping[str, None] = dict.fromkeys(each.kind for each in operators if each.kind in _UNCOUNTED)
    return Resources(
        size_bytes=size_bytes,
        parameters=sum(math.prod(tensor.dims) for tensor in tensors),
        cache_bytes_per_token=None,
        costs=(Cost(what="one input", operations=operations, moved_bytes=weights + 2 * arranged),),
        notes=tuple(f"operations of {kind} are left out" for kind in left_out),
    )


def _operations(operator: OperatorCost) -> int:
    outputs = sum(math.prod(shape) for shape in operator.outputs)
    if operator.kind in _PRODUCTS and operator.inputs and operator.inputs[0]:
        return 2 * outputs * operator.inputs[0][-1]
    if operator.kind in _GEMMS and operator.inputs and operator.outputs:
        return 2 * outputs * (math.prod(operator.inputs[0]) // max(1, operator.outputs[0][0]))
    filter_input = _FILTER_INPUT.get(operator.kind)
    if filter_input is not None and len(operator.inputs) > filter_input:
        return 2 * outputs * math.prod(operator.inputs[filter_input][1:])
    return 0 if operator.kind in _ARRANGING or operator.kind in _UNCOUNTED else outputs
