"""GGUF in and out: weights of some layers as float32, a copy with some matrices replaced, a copy with bad scales."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np

from examples.smollm2.adapter import BLOCK_WEIGHTS
from protocol.errors import ModelFileError
from server.requantize.transformer import MATRICES, NORMS, Array, Shape

_Q4_1_BLOCK_BYTES = 20  # scale and minimum as float16, then 32 weights of 4 bits
# In the second byte of a float16 scale: the exponent's third bit. Set where it was clear, it multiplies by 16.
_STUCK_BIT = 0x10


def read_shape(reader: gguf.GGUFReader) -> Shape:
    """The model's size, from its metadata."""

    def value(key: str) -> float:
        return float(reader.fields[f"llama.{key}"].contents())

    return Shape(
        layers=int(value("block_count")),
        heads=int(value("attention.head_count")),
        kv_heads=int(value("attention.head_count_kv")),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        rope_base=value("rope.freq_base"),
    )


def read_tensor(reader: gguf.GGUFReader, name: str) -> Array:
    """One tensor as float32, in numpy's order of axes: (outputs, inputs)."""
    tensor = next(each for each in reader.tensors if each.name == name)
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


def read_layer(reader: gguf.GGUFReader, number: int) -> dict[str, Array]:
    """All weights of one transformer block, by the names that `transformer.py` uses."""
    return {name: read_tensor(reader, tensor_name(number, name)) for name in (*NORMS, *MATRICES)}


def tensor_name(layer: int, name: str) -> str:
    """How GGUF calls a layer's weight."""
    return f"blk.{layer}.{name}.weight"


def write_replaced(reader: gguf.GGUFReader, replaced: Mapping[str, Array], out: Path) -> None:
    """Writes the model again with the same metadata, some matrices as float32 and all others byte for byte."""
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue  # the header's own fields, and what the writer has put there itself
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        if tensor.name in replaced:
            writer.add_tensor(tensor.name, np.ascontiguousarray(replaced[tensor.name], np.float32))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_back(base: Path, quantized: Path, names: Iterable[str], out: Path) -> None:
    """Writes the base file again with the named tensors as they stand in the quantized one.

    llama.cpp's quantizer sorts the tensors anew. Here each stays where it was, so that two versions of a model differ
    only in what training changed.

    Raises:
        ModelFileError: A tensor has another type or length in the two files.
    """
    content = np.fromfile(base, np.uint8)
    sources = {each.name: each for each in gguf.GGUFReader(quantized).tensors}
    wanted = set(names)
    for tensor in gguf.GGUFReader(base).tensors:
        if tensor.name in wanted:
            source = sources[tensor.name]
            if (source.tensor_type, source.n_bytes) != (tensor.tensor_type, tensor.n_bytes):
                raise ModelFileError(f"{tensor.name} was quantized to {source.tensor_type.name}")
            start = int(tensor.data_offset)
            content[start : start + int(tensor.n_bytes)] = np.asarray(source.data).view(np.uint8).ravel()
    content.tofile(out)


def damage_scales(source: Path, out: Path, *, matrix: str, layer_step: int, share: float, seed: int) -> int:
    """Copies a model with one bit of some block scales stuck at one, as a bad memory line leaves them.

    Args:
        source: A GGUF file with Q4_1 matrices.
        out: The copy.
        matrix: Which matrix of a layer is hit.
        layer_step: Every how many layers one is hit, the first included.
        share: Share of the blocks of those matrices.
        seed: Decides which blocks.

    Returns:
        How many scales really changed.
    """
    rng = np.random.default_rng(seed)
    reader = gguf.GGUFReader(source)
    content = np.fromfile(source, np.uint8)
    hit = {tensor_name(number, matrix) for number in range(0, read_shape(reader).layers, layer_step)}
    changed = 0
    for tensor in reader.tensors:
        if tensor.name not in hit or tensor.tensor_type != gguf.GGMLQuantizationType.Q4_1:
            continue
        blocks = int(tensor.n_elements) // BLOCK_WEIGHTS
        chosen = rng.choice(blocks, int(blocks * share), replace=False)
        high_bytes = int(tensor.data_offset) + chosen * _Q4_1_BLOCK_BYTES + 1
        changed += int(np.count_nonzero(content[high_bytes] & _STUCK_BIT == 0))
        content[high_bytes] |= _STUCK_BIT
    content.tofile(out)
    return changed
