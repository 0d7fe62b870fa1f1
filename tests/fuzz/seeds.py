"""Writes the seeds of the corpus: `python -m tests.fuzz.seeds`. Small valid files of every kind, for fuzzers to start from."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from protocol.delta.compression import compress
from protocol.delta.context import ContextModel
from protocol.delta.format import Codec, Header, Profile, SegmentHeader
from protocol.delta.layouts import LAYOUTS
from protocol.delta.runs import Basis, ContextRun, Flag, write_context_runs
from protocol.tensors import Layout
from tests.fuzz.mutation import Patch, seal_patch
from tests.fuzz.targets import join_input
from tests.protocol.context_segments import scaled_by_columns
from tests.protocol.delta_files import delta
from tests.protocol.model_files import (
    GGML_NUMBERS,
    GgufBuilder,
    GgufTensor,
    block_file,
    blocks,
    external_tensor,
    moved_blocks,
    onnx_file,
    onnx_model,
    safetensors_file,
)

CORPUS = Path(__file__).resolve().parent / "corpus"


def gguf_seeds() -> Iterator[tuple[str, bytes]]:
    """Metadata of every type, several layouts, no tensors, another alignment, a type of the future."""
    text = struct.pack("<Q", 5) + b"llama"
    values = [(f"k{kind}", kind, bytes(size)) for kind, size in enumerate((1, 1, 2, 2, 4, 4, 4, 1))]
    values += [("k10", 10, bytes(8)), ("k11", 11, bytes(8)), ("k12", 12, bytes(8)), ("name", 8, text)]
    values += [
        ("tokens", 9, struct.pack("<IQ", 8, 3) + 3 * text),
        ("scores", 9, struct.pack("<IQ", 6, 2) + bytes(8)),
    ]
    small = [GgufTensor("w", (32, 2), 2, bytes(36)), GgufTensor("norm", (8,), 0, bytes(32))]
    yield "metadata", GgufBuilder(small, values).build()
    yield "empty", GgufBuilder().build()
    alignment = [("general.alignment", 4, struct.pack("<I", 64))]
    yield "alignment", GgufBuilder(small, alignment, alignment=64).build()
    yield "future", GgufBuilder([GgufTensor("new", (32,), 1000, bytes(40)), *small]).build()
    yield "k", block_file(Layout.Q4_K, bytes(144))


def onnx_seeds() -> Iterator[tuple[str, bytes]]:
    """Embedded and external initializers, packed weights, a subgraph, values that are no bytes."""
    packed = np.zeros((4, 2, 16), np.uint8)
    yield "plain", onnx_file({"w": np.zeros((4, 64), np.int8), "s": np.zeros(20, np.float32)})
    yield "packed", onnx_file({"w": packed}, matmul_nbits="w")
    external = external_tensor(
        "w", np.zeros((4, 64), np.float32), location="m.data", offset="64", length="1024"
    )
    yield "external", onnx_model([], [external])
    inner = helper.make_tensor("inner", TensorProto.FLOAT, [20], [0.0] * 20)
    constant = helper.make_node("Constant", [], ["c"], value=inner)
    branch = helper.make_graph([constant], "branch", [], [])
    yield (
        "nested",
        onnx_model([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)], []),
    )
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft", bits=4, K=64, N=4
    )
    tensors = [
        helper.make_tensor("w", TensorProto.UINT8, [4, 2, 16], packed.tobytes(), raw=True),
        helper.make_tensor("i4", TensorProto.INT4, [16, 16], bytes(128), raw=True),
        helper.make_tensor("i64", TensorProto.INT64, [3], [1, 2, 3]),
    ]
    yield "types", onnx_model([node], tensors)


def safetensors_seeds() -> Iterator[tuple[str, bytes]]:
    """Plain types, AWQ, GPTQ, FP8 with scales."""
    yield (
        "plain",
        safetensors_file(
            {"a": ("F16", (2, 8), bytes(32)), "b": ("I8", (64,), bytes(64)), "c": ("F4", (4,), bytes(2))}
        ),
    )
    zeros, scales = ("I32", (1, 1), bytes(4)), ("F16", (1, 8), bytes(16))
    yield (
        "awq",
        safetensors_file({"l.qweight": ("I32", (8, 1), bytes(32)), "l.qzeros": zeros, "l.scales": scales}),
    )
    yield (
        "gptq",
        safetensors_file({"l.qweight": ("I32", (1, 8), bytes(32)), "l.qzeros": zeros, "l.scales": scales}),
    )
    yield "fp8", safetensors_file({"w": ("F8_E4M3", (2, 8), bytes(16)), "w_scale": ("F32", (), bytes(4))})
    yield (
        "mxfp4",
        safetensors_file({"a_blocks": ("U8", (1, 2, 16), bytes(32)), "a_scales": ("U8", (1, 2), bytes(2))}),
    )
    yield "empty", safetensors_file({})


def planner_seeds() -> Iterator[tuple[str, bytes]]:
    """Pairs of every kind: fine-tuned, grown, renamed, of different kinds."""
    old = blocks(Layout.Q4_0, 32, 1)
    moved = moved_blocks(Layout.Q4_0, old, 2)
    yield "moved", join_input(_matrix("w", old), _matrix("w", moved))
    yield "grown", join_input(_matrix("w", old), _matrix("w", moved + old[:36]))
    yield "renamed", join_input(_matrix("w", old), _matrix("v", moved))
    yield "retyped", join_input(_matrix("w", old), block_file(Layout.Q8_0, bytes(34 * 8)))
    yield (
        "onnx",
        join_input(onnx_file({"w": np.zeros((4, 64), np.int8)}), onnx_file({"w": np.ones((4, 64), np.int8)})),
    )
    yield "awq", join_input(_awq(bytes(32)), _awq(bytes(range(32))))
    yield "kinds", join_input(_awq(bytes(32)), _matrix("w", old))


def _awq(data: bytes) -> bytes:
    layer = {"l.qweight": ("I32", (8, 1), data), "l.qzeros": ("I32", (1, 1), bytes(4))}
    return safetensors_file({**layer, "l.scales": ("F16", (1, 8), bytes(16))})


def _matrix(name: str, data: bytes) -> bytes:
    return GgufBuilder([GgufTensor(name, (64, len(data) // 36), 2, data)]).build()


def reader_seeds() -> Iterator[tuple[str, bytes]]:
    """Every rung of the ladder, one and several segments, several layouts, with the tensor codec and with the context codec."""
    for layout in (Layout.Q4_0, Layout.Q8_0, Layout.Q4_K, Layout.F32, Layout.IQ4_XS):
        old = blocks(layout, max(4, 200 // LAYOUTS[layout].block_bytes), 1)
        pair = block_file(layout, old), block_file(layout, moved_blocks(layout, old, 2))
        yield layout.value, _reader_seed(*pair, 1024, is_portable=True)
    for layout in GGML_NUMBERS:
        count = 1 + 1500 // LAYOUTS[layout].block_bytes
        old = blocks(layout, count, 1)
        pair = block_file(layout, old), block_file(layout, moved_blocks(layout, old, 2))
        yield f"context-{layout.value}", _reader_seed(*pair, 1024)
    integers = np.random.default_rng(1).integers(-60, 60, (16, 64)).astype(np.int8)
    pair = onnx_file({"w": integers}), onnx_file({"w": (integers * 1.5).astype(np.int8)})
    yield "i8", _reader_seed(*pair, 4096, is_portable=True)
    yield "context-i8", _reader_seed(*pair, 1024)
    text = b"".join(b"token %d\n" % i for i in range(150))
    changed = text.replace(b"7\n", b"seven\n") + text[::-1]
    yield "text", _reader_seed(text, changed, 1024, is_portable=True)
    yield "self", _reader_seed(b"", text, 1024, is_portable=True)
    yield "context-text", _reader_seed(text, changed, 1024)
    yield "rank", _rank_seed(Flag.BASE | Flag.RANK | Flag.START)
    yield "flags", _rank_seed(~Flag.GAIN)
    yield "columns", _columns_seed(Layout.I8, Flag.BASE | Flag.SCALES | Flag.SPARSE)
    yield "columns-rank", _columns_seed(Layout.I8, Flag.BASE | Flag.SCALES | Flag.RANK)
    yield "u8-columns-rank", _columns_seed(Layout.U8, Flag.BASE | Flag.SCALES | Flag.RANK | Flag.SPARSE)
    yield "i8-rank", _columns_seed(Layout.I8, Flag.BASE | Flag.RANK | Flag.GAIN | Flag.SPARSE)
    yield (
        "raw",
        _reader_seed(b"", np.random.default_rng(2).integers(0, 256, 200, dtype=np.uint8).tobytes(), 1024),
    )
    yield "copy", _reader_seed(text, text, 1024)
    yield "edits", _reader_seed(text * 2, text[:50] + b"a name" + text[60:] + b"another" + text, 1024)
    yield "empty", _reader_seed(b"", b"", 1024)


def _rank_seed(flags: Flag) -> bytes:
    """Rows of blocks that move along a basis that foretells from old rows."""
    columns, rank, rows = 64, 2, 8
    rng = np.random.default_rng(3)
    sides = [rng.integers(-90, 90, rank * columns).astype(np.int8).tobytes() for _ in range(2)]
    basis = Basis(columns, rank, sides[0], sides[1], bytes([20, 24, 10, 30]))
    base = blocks(Layout.Q8_0, rows * columns // 32, 1)
    new = moved_blocks(Layout.Q8_0, base, 2)
    number, half = LAYOUTS[Layout.Q8_0].number, len(base) // 2 // 34
    runs = [
        ContextRun(number, flags if part == 0 else flags & ~Flag.START, 0, half, columns, part * half, 0)
        for part in range(2)
    ]
    return _context_seed(basis, base, new, [[replace(run, basis=basis)] for run in runs])


def _columns_seed(name: Layout, flags: Flag) -> bytes:
    """A scale for each column, then the codes that they scale, which may move along a basis: what there is in ONNX int8 models."""
    columns, rows = 64, 8
    old, new = (
        np.frombuffer(data, np.uint8)
        for segment in [scaled_by_columns(0.002, columns, rows)]
        for data in (segment.window, segment.result)
    )
    if name is Layout.U8:
        old, new = (np.concatenate([data[: 4 * columns], data[4 * columns :] ^ 0x80]) for data in (old, new))
    directions = np.random.default_rng(4).integers(-3, 4, columns).astype(np.int8) * 42
    basis = Basis(columns, 1, directions.tobytes(), b"", bytes([26, 0])) if Flag.RANK in flags else None
    gain = (64_000, 9_000) if Flag.GAIN in flags else None
    scale_flags = Flag.BASE | Flag.START | (flags & Flag.SCALES)
    scales = ContextRun(LAYOUTS[Layout.F32].number, scale_flags, 0, columns, columns, 0, 0)
    number, half = LAYOUTS[name].number, rows // 2 * columns
    codes = [
        ContextRun(number, flags | Flag.START, 0, half, columns, 0, 4 * columns, gain, basis),
        ContextRun(number, flags, 0, half, columns, half, 0, gain, basis),
    ]
    return _context_seed(basis, old.tobytes(), new.tobytes(), [[scales, codes[0]], [codes[1]]])


def _context_seed(
    basis: Basis | None, base: bytes, new: bytes, parts: Sequence[Sequence[ContextRun]]
) -> bytes:
    """A tables record if there is a basis, and context segments that go on with each other; their windows lie where their results do."""
    model = ContextModel()
    model.basis = basis
    model.reset()
    records = []
    if basis is not None:
        packed = compress(basis.pack(), "fast")
        records.append((SegmentHeader(Codec.TABLES, 0, 0, 0, 0, len(packed), bytes(16), 0), packed))
    at = 0
    for index, runs in enumerate(parts):
        length = sum(run.length for run in runs)
        window, result = base[at : at + length], new[at : at + length]
        parameters, payload = write_context_runs(runs), model.encode(runs, window, result)
        header = SegmentHeader(
            Codec.CONTEXT,
            len(parameters),
            length,
            at,
            length,
            len(payload),
            bytes(16),
            0,
            continues=index > 0,
        )
        records.append((header, parameters + payload))
        at += length
    frame = Header(Profile.SMALL, len(base), hashlib.sha256(base).digest(), len(new), bytes(32), 0, len(new))
    return join_input(base, seal_patch(Patch(frame, records), base, repairs=True))


def _reader_seed(base: bytes, new: bytes, segment_bytes: int, *, is_portable: bool = False) -> bytes:
    return join_input(base, delta(base, new, segment_bytes, is_portable=is_portable)[0])


SEEDS = {"gguf": gguf_seeds, "onnx": onnx_seeds, "safetensors": safetensors_seeds}
SEEDS |= {"planner": planner_seeds, "reader": reader_seeds}


def main() -> None:
    """Write all seeds; other inputs that are kept stay."""
    for target, seeds in SEEDS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds():
            (folder / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
