"""A small language model as GGUF, and every kind of damage to it that `whimbrel diagnose` has a name for, made on purpose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from protocol.delta.layouts import LAYOUTS
from protocol.tensors import BytesSource, Layout, Region, parse_gguf

Floats = npt.NDArray[np.float32]
Kind = gguf.GGMLQuantizationType
Fields = dict[str, npt.NDArray[Any]]

LAYERS = 4
WIDTH = 192
TOKENS = 400
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
MATRICES = {"attn_q": (WIDTH, WIDTH), "ffn_down": (WIDTH, 2 * WIDTH)}


@dataclass
class Description:
    """What the file says beside its weights."""

    tokens: int = TOKENS
    merges: int = TOKENS - 100
    template: str | None = TEMPLATE
    end_token: int = 2
    special: Sequence[int] = (0, 1, 2)
    rope_base: float = 10_000.0
    name: str = "small"
    more: Mapping[str, int] = field(default_factory=dict)


def base_weights(seed: int = 1) -> dict[str, Floats]:
    """Matrices whose rows are of different size, as in trained models, and the norms before them."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Floats] = {"token_embd.weight": _matrix(rng, (TOKENS, WIDTH))}
    for layer in range(LAYERS):
        for name, shape in MATRICES.items():
            weights[f"blk.{layer}.{name}.weight"] = _matrix(rng, shape)
        weights[f"blk.{layer}.attn_norm.weight"] = rng.normal(1, 0.1, WIDTH).astype(np.float32)
    return weights


def _matrix(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    sizes = np.exp(rng.normal(0, 0.3, (shape[0], 1)))
    return (0.05 * sizes * rng.standard_normal(shape)).astype(np.float32)


def write_language_model(
    path: Path, weights: Mapping[str, Floats], kind: Any = Kind.Q4_1, about: Description | None = None
) -> Path:
    """Write a model; matrices get the quantization type, norms stay floats."""
    said = about or Description()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(said.name)
    writer.add_block_count(LAYERS)
    writer.add_rope_freq_base(said.rope_base)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(said.tokens)])
    writer.add_token_types([3 if number in said.special else 1 for number in range(said.tokens)])
    writer.add_token_merges([f"a{number} b{number}" for number in range(said.merges)])
    writer.add_eos_token_id(said.end_token)
    for key, value in said.more.items():
        writer.add_uint32(key, value)
    if said.template is not None:
        writer.add_chat_template(said.template)
    for name, values in weights.items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit_blocks(
    source: Path, out: Path, names: Sequence[str], edit: Callable[[Fields, Layout], None]
) -> Path:
    """Write a model again with the fields of some tensors' blocks edited in place; nothing else changes."""
    data = bytearray(source.read_bytes())
    regions = {region.name: region for region in parse_gguf(BytesSource(bytes(data))).tensors}
    for name in names:
        region: Region = regions[name]
        row = LAYOUTS[region.layout]
        blocks = np.frombuffer(data[region.offset : region.end], np.uint8).reshape(-1, row.block_bytes)
        fields = {key: values.copy() for key, values in row.split(blocks).items()}
        edit(fields, region.layout)
        data[region.offset : region.end] = row.join(fields).tobytes()
    out.write_bytes(data)
    return out


def rewrite_metadata(
    source: Path, out: Path, changes: Mapping[str, Any], layers_max: int | None = None
) -> Path:
    """Write a model again with other values for some metadata; None leaves a key out.

    Args:
        source: The model.
        out: The copy.
        changes: Values by key.
        layers_max: Layers that are kept, the first ones; all of them if not given.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, item in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changes[key] if key in changes else item.contents()
        if value is not None:
            element = item.types[-1] if item.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, item.types[0], sub_type=element)
    for tensor in reader.tensors:
        prefix, _, rest = tensor.name.partition(".")
        if layers_max is None or prefix != "blk" or int(rest.partition(".")[0]) < layers_max:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def halves(words: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Scale words as numbers that can be set in place."""
    return words.view(np.float16)


def zero_scales(share: float) -> Callable[[Fields, Layout], None]:
    """Scales of the first blocks become zero."""

    def edit(fields: Fields, _: Layout) -> None:
        fields["d"][: int(share * len(fields["d"]))] = 0

    return edit


def stuck_bit(fields: Fields, _: Layout) -> None:
    """One bit of the exponent is one in every tenth scale, as a bad memory line leaves it: 16 times as large where it was zero."""
    fields["d"][::10] |= 0x1000


def nan_scales(fields: Fields, _: Layout) -> None:
    """One scale is NaN."""
    halves(fields["d"])[5] = np.nan


def dead_codes(fields: Fields, _: Layout) -> None:
    """All codes of every fourth block are zero."""
    fields["codes"][::4] = 0


def saturated_codes(fields: Fields, _: Layout) -> None:
    """A scale of a fifth of what is needed, and codes cut down to the range."""
    codes = fields["codes"].astype(np.float32)
    middle = codes.mean(axis=1, keepdims=True)
    fields["codes"][:] = np.clip(np.rint(7.5 + 5 * (codes - middle)), 0, 15).astype(np.uint8)


def coarse_codes(fields: Fields, _: Layout) -> None:
    """The two lowest bits are lost."""
    fields["codes"] &= 0b1100


def swapped_nibbles(fields: Fields, _: Layout) -> None:
    """Low and high nibbles are packed the wrong way round."""
    fields["codes"][:] = np.roll(fields["codes"], 16, axis=1)


def random_codes(fields: Fields, _: Layout) -> None:
    """Scales as they were, and noise between them."""
    fields["codes"][:] = np.random.default_rng(3).integers(0, 16, fields["codes"].shape)


def larger_scales(fields: Fields, _: Layout) -> None:
    """Every number of the grid is multiplied by one and a half."""
    for name in ("d", "m"):
        if name in fields:
            halves(fields[name])[:] *= np.float16(1.5)


def one_scale(fields: Fields, _: Layout) -> None:
    """All blocks of a Q4_0 tensor share the scale that the largest weight needs, as a quantizer does that does not know blocks."""
    scales = halves(fields["d"])
    values = scales.astype(np.float32) * (fields["codes"].astype(np.float32) - 8)
    scale = np.float16(np.abs(values).max() / 7)
    fields["codes"][:] = np.rint(values / np.float32(scale)) + 8
    scales[:] = scale


def other_scales(fields: Fields, _: Layout) -> None:
    """The same weights as Q4_0 with a scale for each block that is up to 15 % smaller, as a quantizer finds that looks for less error."""
    scales = halves(fields["d"])
    values = scales.astype(np.float32) * (fields["codes"].astype(np.float32) - 8)
    chosen = scales * np.random.default_rng(8).uniform(0.85, 1, scales.shape).astype(np.float16)
    safe = np.where(chosen == 0, 1, chosen).astype(np.float32)
    fields["codes"][:] = np.clip(np.rint(values / safe) + 8, 0, 15)
    scales[:] = chosen


def clipped_scales(fields: Fields, _: Layout) -> None:
    """A third of the scale that a block of Q4_0 needs, and codes cut down to the range."""
    codes = fields["codes"].astype(np.float32) - 8
    fields["codes"][:] = np.clip(np.rint(3 * codes) + 8, 0, 15).astype(np.uint8)
    halves(fields["d"])[:] /= np.float16(3)


def with_noise(weights: Mapping[str, Floats], layer: int, size: float, seed: int = 5) -> dict[str, Floats]:
    """Noise on the matrices of one layer, `size` times as large as they are."""
    rng = np.random.default_rng(seed)
    return {
        name: (values + size * values.std() * rng.standard_normal(values.shape)).astype(np.float32)
        if name.startswith(f"blk.{layer}.") and values.ndim == 2
        else values
        for name, values in weights.items()
    }


def fine_tuned(weights: Mapping[str, Floats], size: float, rank: int = 8, seed: int = 6) -> dict[str, Floats]:
    """What a low-rank adapter leaves when it is merged: each matrix moved by `size` of its length, in `rank` directions."""
    rng = np.random.default_rng(seed)
    moved = dict(weights)
    for name, values in weights.items():
        if values.ndim == 2 and name.startswith("blk."):
            change = rng.standard_normal((values.shape[0], rank)) @ rng.standard_normal(
                (rank, values.shape[1])
            )
            change *= size * np.linalg.norm(values) / np.linalg.norm(change)
            moved[name] = (values + change).astype(np.float32)
    return moved


def coarse_grid(weights: Mapping[str, Floats]) -> dict[str, Floats]:
    """Each matrix rounded with one scale for all of it, as a quantizer does that does not know blocks."""
    return {
        name: np.rint(values / (scale := np.abs(values).max() / 7)) * scale if values.ndim == 2 else values
        for name, values in weights.items()
    }
