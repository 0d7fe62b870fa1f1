import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is installed for `make bench-delta` only")

from benchmarks.bert import Bert, Size  # noqa: E402 - after the check
from benchmarks.finetune import Recipe, train  # noqa: E402
from benchmarks.llama import EMBEDDING, OUTPUT_NORM, Llama  # noqa: E402
from benchmarks.weights import relative_change, round_bf16  # noqa: E402
from examples.smollm2.model_file import tensor_name  # noqa: E402
from server.requantize.transformer import MATRICES, NORMS, Array, Shape, forward_layer, rms_norm  # noqa: E402

SHAPE = Shape(layers=3, heads=4, kv_heads=2, epsilon=1e-5, rope_base=10_000.0)
WIDTH, INNER, VOCABULARY = 32, 48, 50


def weights() -> dict[str, Array]:
    draws = np.random.default_rng(3)
    shapes = {
        "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    found = {EMBEDDING: draws.standard_normal((VOCABULARY, WIDTH)), OUTPUT_NORM: np.ones(WIDTH)}
    for layer in range(SHAPE.layers):
        for name in MATRICES:
            found[tensor_name(layer, name)] = draws.standard_normal(shapes.get(name, (WIDTH, WIDTH))) / 6
        for name in NORMS:
            found[tensor_name(layer, name)] = 1 + 0.1 * draws.standard_normal(WIDTH)
    return {name: round_bf16(value.astype(np.float32)) for name, value in found.items()}


def test_the_model_agrees_with_the_one_in_numpy() -> None:
    base = weights()
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, (2, 9))
    model = Llama(SHAPE, {name: torch.tensor(value) for name, value in base.items()})
    found = model.logits(torch.from_numpy(tokens)).numpy()
    hidden = base[EMBEDDING][tokens]
    for layer in range(SHAPE.layers):
        own = {name: base[tensor_name(layer, name)] for name in (*NORMS, *MATRICES)}
        hidden, _ = forward_layer(SHAPE, own, hidden)
    normed, _, _ = rms_norm(hidden, base[OUTPUT_NORM], SHAPE.epsilon)
    np.testing.assert_allclose(found, normed @ base[EMBEDDING].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora", "last"])
def test_training_changes_what_the_recipe_says_and_lowers_the_loss(kind: str) -> None:
    base = weights()
    tokens = np.tile(np.arange(20, dtype=np.int32), 50)
    lines: list[str] = []
    trained = train(SHAPE, base, tokens, Recipe(kind, 1e-2, 40, 4, 16), lines.append)
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert losses[-1] < losses[0]
    changed = {name for name in base if not np.array_equal(base[name], trained[name])}
    expected = {
        "full": set(base),
        "lora": {name for name in base if name.endswith(tuple(f"{part}.weight" for part in MATRICES))},
        "last": {name for name in base if not name.startswith("blk.0.")},
    }
    assert changed == expected[kind]
    assert all(np.array_equal(round_bf16(value), value) for value in trained.values())
    assert relative_change(base, trained) > 0


def test_padding_does_not_change_what_the_encoder_says() -> None:
    torch.manual_seed(0)
    model = Bert(Size(vocabulary=30, width=16, layers=2, heads=2, inner=32, positions=12)).eval()
    tokens = torch.tensor([[1, 2, 3, 0, 0]])
    padded = model(tokens, torch.tensor([[1, 1, 1, 0, 0]]))[:, :3]
    torch.testing.assert_close(padded, model(tokens[:, :3], torch.ones(1, 3, dtype=torch.long)))
