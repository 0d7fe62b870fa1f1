"""Each kind of damage, made on purpose, is named; healthy pairs give no finding that matters."""

import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from protocol.errors import ModelFileError, RequestError
from protocol.tensors import Layout
from server.cli import main
from server.diagnosis.comparison import TensorChange, moved_energy
from server.diagnosis.diagnose import Diagnosis, diagnose
from server.diagnosis.findings import finding
from server.diagnosis.models import files_of, opened_model
from server.diagnosis.weights import COMPARABLE, read_piece
from tests.models import language_model
from tests.protocol.model_files import GGML_NUMBERS, blocks
from tests.server import model_damage as damage
from tests.server.model_damage import Description, Kind
from tests.server.samples import publish_models

Edit = Callable[[damage.Fields, Layout], None]

LAYER = [f"blk.3.{name}.weight" for name in damage.MATRICES]


@pytest.fixture(scope="module")
def weights() -> dict[str, damage.Floats]:
    return damage.base_weights()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, weights: Mapping[str, damage.Floats]) -> Path:
    return damage.write_language_model(tmp_path_factory.mktemp("base") / "base.gguf", weights)


def diagnosed(old: Path, new: Path) -> Diagnosis:
    with opened_model(files_of(old), old.name) as before, opened_model(files_of(new), new.name) as after:
        return diagnose(before, after)


def grave(found: Diagnosis) -> list[str]:
    """Codes of what is no mere note."""
    return [each.code for each in found.findings if each.severity != "note"]


@pytest.mark.parametrize("layout", sorted(set(GGML_NUMBERS) & COMPARABLE - {Layout.BF16}))
def test_weights_are_those_that_ggml_reads(layout: Layout) -> None:
    floats = np.random.default_rng(1).normal(0, 1, 256)
    kinds: dict[Layout, Any] = {Layout.F32: np.float32, Layout.F16: np.float16}
    data = floats.astype(kinds[layout]).tobytes() if layout in kinds else blocks(layout, 16, seed=3)
    kind = gguf.GGMLQuantizationType(GGML_NUMBERS[layout])
    expected = gguf.quants.dequantize(np.frombuffer(data, np.uint8), kind).ravel()
    assert np.array_equal(read_piece(layout, data).values.ravel(), expected)


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (damage.zero_scales(0.2), "scales.zero"),
        (damage.stuck_bit, "scales.out_of_range"),
        (damage.nan_scales, "weights.not_finite"),
        (damage.dead_codes, "blocks.dead"),
        (damage.saturated_codes, "codes.saturated"),
        (damage.coarse_codes, "codes.coarse"),
        (damage.swapped_nibbles, "codes.permuted"),
        (damage.larger_scales, "weights.scaled"),
    ],
)
def test_damaged_blocks_of_a_layer_are_named(tmp_path: Path, base: Path, edit: Edit, code: str) -> None:
    found = diagnosed(base, damage.edit_blocks(base, tmp_path / "new.gguf", LAYER, edit))
    assert grave(found) == [code]
    assert set(found.findings[0].where) == set(LAYER)
    assert found.conclusion.startswith("Most likely ")
    assert "blk.3" in found.conclusion


def test_zeroed_scales_are_counted(tmp_path: Path, base: Path) -> None:
    new = damage.edit_blocks(base, tmp_path / "new.gguf", LAYER[:1], damage.zero_scales(0.25))
    (found,) = diagnosed(base, new).findings
    assert (found.evidence["blocks"], found.evidence["blocks_of_tensors"]) == (288, 1152)


def test_one_scale_for_a_whole_tensor_is_a_bad_quantization_and_no_fine_tune(
    tmp_path: Path, weights: Mapping[str, damage.Floats]
) -> None:
    old = damage.write_language_model(tmp_path / "old.gguf", weights, Kind.Q4_0)
    matrices = [name for name, values in weights.items() if values.ndim == 2]
    new = damage.edit_blocks(old, tmp_path / "new.gguf", matrices, damage.one_scale)
    found = diagnosed(old, new)
    assert grave(found) == ["codes.coarse"]
    assert found.findings[0].cause == "quantization"


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.F16])
@pytest.mark.parametrize("size", [0.15, 1.0, 5.0])
def test_noise_in_one_layer_is_named_with_the_layer(
    tmp_path: Path, weights: Mapping[str, damage.Floats], kind: Any, size: float
) -> None:
    old = damage.write_language_model(tmp_path / "old.gguf", weights, kind)
    new = damage.write_language_model(tmp_path / "new.gguf", damage.with_noise(weights, 3, size), kind)
    found = diagnosed(old, new)
    assert grave(found) == ["weights.noise"]
    assert found.findings[0].where == ["blk.3"]


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize(
    ("size", "code"), [(0.01, "weights.trained"), (0.1, "weights.trained"), (0.4, "weights.trained_far")]
)
def test_a_fine_tune_is_no_quantization_and_no_noise(
    tmp_path: Path, weights: Mapping[str, damage.Floats], kind: Any, size: float, code: str
) -> None:
    old = damage.write_language_model(tmp_path / "old.gguf", weights, kind)
    new = damage.write_language_model(tmp_path / "new.gguf", damage.fine_tuned(weights, size), kind)
    assert grave(diagnosed(old, new)) == [code]


@pytest.fixture(scope="module")
def tuned_pair(
    tmp_path_factory: pytest.TempPathFactory, weights: Mapping[str, damage.Floats]
) -> tuple[Path, Path]:
    """Two Q4_0 files, before and after a fine-tune that stays far beneath the steps of four bits."""
    folder = tmp_path_factory.mktemp("tuned")
    tuned = damage.fine_tuned(weights, 0.003)
    return (
        damage.write_language_model(folder / "old.gguf", weights, Kind.Q4_0),
        damage.write_language_model(folder / "new.gguf", tuned, Kind.Q4_0),
    )


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.BF16])
def test_a_fine_tune_beneath_rounding_is_found_and_measured(
    tmp_path: Path, weights: Mapping[str, damage.Floats], kind: Any
) -> None:
    tuned = damage.fine_tuned(weights, 0.002)
    further = damage.fine_tuned(weights, 0.006)
    tuned = {name: further[name] if name in LAYER else values for name, values in tuned.items()}
    old = damage.write_language_model(tmp_path / "old.gguf", weights, kind)
    found = diagnosed(old, damage.write_language_model(tmp_path / "new.gguf", tuned, kind))
    assert grave(found) == ["weights.trained"]
    assert set(found.findings[0].where[:2]) == set(LAYER)
    moved = {each.name: each.moved for each in found.tensors if each.name.startswith("blk.")}
    assert all(0.003 < moved[name] < 0.008 for name in LAYER)
    assert all(0.001 < moved[name] < 0.003 for name in moved if "norm" not in name and name not in LAYER)


def test_movement_is_read_from_the_edges_that_weights_cross() -> None:
    rng = np.random.default_rng(2)
    weights = rng.uniform(0, 1000, 1_000_000)
    for spread in (0.01, 0.3, 1.0, 10.0):
        moves = rng.normal(0, spread, weights.size)
        change = float(np.square(np.floor(weights + moves) - np.floor(weights)).sum())
        energy = moved_energy(change, weights.size / 6, is_same_grid=True)
        assert energy == pytest.approx(float(np.square(moves).sum()), rel=0.05)
    assert moved_energy(0.0, 1.0, is_same_grid=True) == 0
    assert moved_energy(0.5, 1.0, is_same_grid=False) == 0


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (damage.zero_scales(0.05), "scales.zero"),
        (damage.stuck_bit, "scales.out_of_range"),
        (damage.nan_scales, "weights.not_finite"),
        (damage.dead_codes, "blocks.dead"),
        (damage.clipped_scales, "codes.saturated"),
        (damage.coarse_codes, "codes.coarse"),
        (damage.one_scale, "codes.coarse"),
        (damage.swapped_nibbles, "codes.permuted"),
        (damage.larger_scales, "weights.scaled"),
    ],
)
def test_damage_is_named_on_top_of_a_fine_tune(
    tmp_path: Path, tuned_pair: tuple[Path, Path], edit: Edit, code: str
) -> None:
    old, new = tuned_pair
    found = diagnosed(old, damage.edit_blocks(new, tmp_path / "new.gguf", LAYER, edit))
    assert grave(found) == [code, "weights.trained"]
    assert set(found.findings[0].where) == set(LAYER)


@pytest.mark.parametrize("size", [0.15, 0.5])
def test_noise_in_one_layer_is_named_on_top_of_a_fine_tune(
    tmp_path: Path, tuned_pair: tuple[Path, Path], weights: Mapping[str, damage.Floats], size: float
) -> None:
    noisy = damage.with_noise(damage.fine_tuned(weights, 0.003), 3, size)
    new = damage.write_language_model(tmp_path / "new.gguf", noisy, Kind.Q4_0)
    found = diagnosed(tuned_pair[0], new)
    assert grave(found) == ["weights.noise", "weights.trained"]
    assert found.findings[0].where == ["blk.3"]


def test_another_quantizer_of_the_same_weights_is_no_fine_tune(
    tmp_path: Path, tuned_pair: tuple[Path, Path], weights: Mapping[str, damage.Floats]
) -> None:
    old, _ = tuned_pair
    matrices = [name for name, values in weights.items() if values.ndim == 2]
    found = diagnosed(old, damage.edit_blocks(old, tmp_path / "new.gguf", matrices, damage.other_scales))
    assert [each.code for each in found.findings] == ["quantization.other"]


def test_a_conclusion_tells_of_prompts_whatever_the_files_say(base: Path) -> None:
    worse = finding("prompts.worse", "3 of 4 prompts got worse; sun: …", ["sun"])
    with opened_model(files_of(base), "base") as model:
        found = diagnose(model, model, more=[worse])
    assert found.conclusion == (
        "3 of 4 prompts got worse, and nothing in the files explains it. They differ so: not at all."
    )


def test_another_model_is_told_from_a_fine_tune(tmp_path: Path, base: Path) -> None:
    new = damage.write_language_model(tmp_path / "new.gguf", damage.base_weights(seed=9))
    assert grave(diagnosed(base, new)) == ["weights.unrelated"]


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.F16])
def test_the_same_weights_in_another_quantization_are_healthy(
    tmp_path: Path, weights: Mapping[str, damage.Floats], base: Path, kind: Any
) -> None:
    new = damage.write_language_model(tmp_path / "new.gguf", weights, kind)
    assert (
        diagnosed(base, new).conclusion == diagnosed(new, base).conclusion == "Nothing that matters changed."
    )


@pytest.mark.parametrize(
    ("about", "code", "words"),
    [
        (Description(tokens=300, merges=200), "tokenizer.cut", "300 of 400 tokens and 200 of 300 merges"),
        (Description(template="[INST] {{ messages[0].content }} [/INST]"), "template.changed", "[INST]"),
        (Description(template=None), "template.changed", "is gone"),
        (Description(end_token=0), "tokenizer.special", "eos_token_id was 2, is 0"),
        (Description(special=(0, 1)), "tokenizer.special", "2 'token2'"),
        (Description(rope_base=1e6), "architecture.changed", "rope.freq_base was 10000, is 1e+06"),
    ],
)
def test_what_a_file_says_beside_its_weights_is_compared(
    tmp_path: Path,
    base: Path,
    weights: Mapping[str, damage.Floats],
    about: Description,
    code: str,
    words: str,
) -> None:
    new = damage.write_language_model(tmp_path / "new.gguf", weights, about=about)
    found = diagnosed(base, new)
    assert grave(found) == [code]
    assert words in found.findings[0].summary


def test_another_name_in_the_file_is_no_damage(
    tmp_path: Path, base: Path, weights: Mapping[str, damage.Floats]
) -> None:
    new = damage.write_language_model(tmp_path / "new.gguf", weights, about=Description(name="other"))
    found = diagnosed(base, new)
    assert [each.code for each in found.findings] == ["metadata.changed"]
    assert found.conclusion == "Nothing that matters changed."


def test_a_missing_and_a_reshaped_tensor_are_named(
    tmp_path: Path, base: Path, weights: Mapping[str, damage.Floats]
) -> None:
    changed = {name: values for name, values in weights.items() if name != "blk.2.attn_q.weight"}
    changed["blk.1.attn_norm.weight"] = np.ones(128, np.float32)
    found = diagnosed(base, damage.write_language_model(tmp_path / "new.gguf", changed))
    assert grave(found) == ["tensors.missing", "tensors.reshaped"]
    assert [each.where for each in found.findings] == [["blk.2.attn_q.weight"], ["blk.1.attn_norm.weight"]]


def test_damaged_scales_of_an_onnx_model_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    codes, scales = (
        rng.integers(-127, 128, (128, 64), np.int8),
        rng.uniform(0.01, 0.02, 64).astype(np.float32),
    )
    other = scales.copy()
    other[::3] *= 8
    old, new = (
        _onnx(tmp_path / f"{name}.onnx", codes, each) for name, each in (("old", scales), ("new", other))
    )
    found = diagnosed(old, new)
    assert grave(found) == ["scales.out_of_range"]
    assert found.findings[0].where == ["scales"]


def test_a_calibration_on_other_inputs_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(-127, 128, (128, 64), np.int8)
    biases = rng.integers(-9000, 9000, 64, np.int32)
    scales = rng.uniform(0.01, 0.02, 64).astype(np.float32)
    old, new, trained = (
        _onnx(tmp_path / f"{name}.onnx", codes, scales, each)
        for name, each in (
            ("old", biases),
            ("new", biases * 60),
            ("trained", (biases + rng.integers(-9000, 9000, 64, np.int32)).astype(np.int32)),
        )
    )
    found = diagnosed(old, new)
    assert grave(found) == ["calibration.changed"]
    assert found.findings[0].evidence["factor_max"] == pytest.approx(60, rel=0.01)
    assert "calibration.changed" not in grave(diagnosed(old, trained))


def _onnx(path: Path, codes: Any, scales: Any, biases: Any = None) -> Path:
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", 128), ("y", 64))
    ]
    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    if biases is not None:
        tensors.append(numpy_helper.from_array(biases, "biases"))
    path.write_bytes(
        helper.make_model(helper.make_graph(nodes, "g", shapes[:1], shapes[1:], tensors)).SerializeToString()
    )
    return path


def test_files_that_cannot_be_compared_are_refused_in_a_line(tmp_path: Path, base: Path) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("a model")
    (tmp_path / "cut.gguf").write_bytes(base.read_bytes()[:-200])
    for name, words in (("empty", "the file is empty"), ("text", "starts with"), ("cut", "cut.gguf: GGUF: ")):
        with pytest.raises(ModelFileError, match=words):
            diagnosed(base, tmp_path / f"{name}.gguf")
    with pytest.raises(RequestError, match="no such file"):
        diagnosed(base, tmp_path / "nothing.gguf")
    model = _onnx(tmp_path / "m.onnx", np.ones((128, 64), np.int8), np.ones(64, np.float32))
    with pytest.raises(RequestError, match="is a gguf file"):
        diagnosed(base, model)


def test_the_command_prints_for_people_and_for_programs(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = damage.edit_blocks(base, tmp_path / "new.gguf", LAYER, damage.zero_scales(0.2))
    assert main(["diagnose", str(base), str(new)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Most likely block scales are zero (blk.3.")
    assert "Tensors: 2 of 13 changed" in text
    assert main(["diagnose", str(base), str(new), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["findings"][0]["code"] == "scales.zero"
    assert {each["name"] for each in value["tensors"]} == set(LAYER)
    assert main(["diagnose", str(base)]) == 1
    assert "OLD NEW | FAMILY OLD NEW" in capsys.readouterr().err


def test_two_versions_of_a_family_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_models(tmp_path, {"v1": 1, "v2": 2})
    assert main(["diagnose", "digits", "v1", "v2", "--dir", str(tmp_path / "server"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["old"], value["new"]) == ("digits v1", "digits v2")
    assert [each["name"] for each in value["tensors"]] == ["w"]
    assert main(["diagnose", "digits", "v1", "v9", "--dir", str(tmp_path / "server")]) == 1
    assert "digits has no version v9" in capsys.readouterr().err


def test_an_identical_tensor_is_not_read_twice(base: Path) -> None:
    changes: list[TensorChange] = diagnosed(base, base).tensors
    assert all(each.is_identical for each in changes)


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of a real model; its vocabulary has no part in the test, and would take most of the time."""
    changes: dict[str, object] = {f"tokenizer.ggml.{name}": ["a"] for name in ("tokens", "merges")}
    changes |= {"tokenizer.ggml.token_type": [1], "llama.block_count": 2}
    short = tmp_path_factory.mktemp("short") / "short.gguf"
    return damage.rewrite_metadata(language_model(), short, changes, layers_max=2)


def _requantized(source: Path, out: Path, kind: int) -> Path:
    """llama.cpp's own quantizer on weights that are quantized already."""
    import llama_cpp  # noqa: PLC0415 - where it is not installed, `short_model` has skipped the test

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = kind, 1, True
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(out), ctypes.byref(parameters)) == 0
    return out


@pytest.mark.llama
def test_a_real_model_in_another_quantization_is_healthy_and_in_a_bad_one_is_not(
    tmp_path: Path, short_model: Path
) -> None:
    found = diagnosed(short_model, _requantized(short_model, tmp_path / "q8_0.gguf", 7))
    assert found.conclusion == "Nothing that matters changed."
    assert [each.code for each in found.findings] == ["quantization.other", "metadata.changed"]
    found = diagnosed(short_model, _requantized(short_model, tmp_path / "q2_k.gguf", 10))
    assert grave(found) == ["quantization.coarse"]
    assert all("ffn_down" in name for name in found.findings[0].where)


@pytest.mark.llama
def test_prompts_that_got_worse_are_shown_with_the_logits_of_the_first_other_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = language_model()
    names = [f"blk.7.{name}.weight" for name in ("attn_q", "attn_v", "ffn_down")]
    new = damage.edit_blocks(model, tmp_path / "new.gguf", names, damage.random_codes)
    plan = {
        "prompts": [
            {
                "kind": "text",
                "name": "sun",
                "prompt": "The sun rises in the",
                "completion": " east",
                "logprob_mean_min": -5.0,
            }
        ],
        "latency_p99_ms_max": 60_000,
        "memory_peak_bytes_max": 1 << 32,
    }
    (tmp_path / "health.json").write_text(json.dumps(plan))
    command = ["diagnose", str(model), str(new), "--prompts", str(tmp_path / "health.json"), "--json"]
    assert main(command) == 0
    value = json.loads(capsys.readouterr().out)
    assert [each["code"] for each in value["findings"]] == ["weights.noise", "prompts.worse"]
    assert value["findings"][0]["where"] == ["blk.7"]
    (prompt,) = value["prompts"]
    assert prompt["is_worse"]
    assert prompt["new_logprob"] < prompt["old_logprob"] - 1
    assert prompt["step"] is not None
    assert prompt["old"][0]["token"] != prompt["new"][0]["token"]
    assert prompt["old"][0]["logit"] > prompt["old"][1]["logit"]
