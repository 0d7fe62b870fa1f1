"""The language model's three versions, made with few training steps and asked under llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest

from examples.smollm2.model_file import damage_scales, tensor_name
from examples.smollm2.questions import read_questions
from protocol.release import HealthPlan, TextPrompt
from tests.models import language_model

_STEPS = 24


def test_questions_have_unique_names_and_single_lines() -> None:
    questions = read_questions()
    assert len({each.name for each in questions}) == len(questions)
    assert len({each.question for each in questions}) == len(questions)
    assert all("\n" not in each.question + each.answer for each in questions)
    assert sum(each.use == "fact" for each in questions) == 20
    assert sum(each.use == "held-out" for each in questions) >= 5


def _tiny_model(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    rng = np.random.default_rng(5)
    for number in range(2):
        matrix = rng.normal(0.0, 0.05, (64, 64)).astype(np.float32)
        stored = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(tensor_name(number, "ffn_down"), stored, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_damage_hits_the_scales_of_the_named_layers_and_nothing_else(tmp_path: Path) -> None:
    _tiny_model(tmp_path / "good.gguf")
    changed = damage_scales(
        tmp_path / "good.gguf", tmp_path / "bad.gguf", matrix="ffn_down", layer_step=2, share=0.25, seed=1
    )
    good, bad = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("good", "bad"))
    assert np.array_equal(good[1].data, bad[1].data)
    blocks = [tensor.data.reshape(-1, 20) for tensor in (good[0], bad[0])]
    assert np.array_equal(blocks[0][:, 2:], blocks[1][:, 2:])
    scales = [each[:, :2].copy().view(np.float16).astype(np.float64) for each in blocks]
    assert np.count_nonzero(scales[0] != scales[1]) == changed > 0
    assert np.isfinite(scales[1]).all()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = language_model()
    from examples.smollm2 import build  # noqa: PLC0415  # needs llama-cpp-python

    out = tmp_path_factory.mktemp("smollm2")
    assert build.main(["--out", str(out), "--model", str(model), "--steps", str(_STEPS)]) == 0
    return out


def _mean(built: Path, version: str, use: str) -> float:
    versions: dict[str, Any] = json.loads((built / "report.json").read_bytes())["versions"]
    return float(
        np.mean([each["logprob_mean"] for each in versions[version]["prompts"] if each["use"] == use])
    )


@pytest.mark.llama
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_teaches_the_facts_and_damage_ruins_everything(built: Path) -> None:
    assert _mean(built, "v2", "fact") > _mean(built, "v1", "fact") + 1.0
    assert _mean(built, "v2", "held-out") > _mean(built, "v1", "held-out") - 1.0
    assert _mean(built, "v3", "held-out") < _mean(built, "v1", "held-out") - 3.0


@pytest.mark.llama
@pytest.mark.slow
def test_only_the_trained_matrices_differ_and_keep_their_type(built: Path) -> None:
    from examples.smollm2 import build  # noqa: PLC0415  # needs llama-cpp-python

    old, new, bad = (gguf.GGUFReader(built / f"{name}.gguf") for name in ("v1", "v2", "v3"))
    trained = {tensor_name(number, name) for number in range(24, 30) for name in build.TRAINED_MATRICES}
    for before, after, damaged in zip(old.tensors, new.tensors, bad.tensors, strict=True):
        assert (before.name, before.tensor_type) == (after.name, after.tensor_type)
        assert np.array_equal(before.data, after.data) == (before.name not in trained)
        if "ffn_down" not in before.name:
            assert np.array_equal(after.data, damaged.data)
    assert old.fields["tokenizer.ggml.merges"].contents() == new.fields["tokenizer.ggml.merges"].contents()


@pytest.mark.llama
@pytest.mark.slow
def test_the_health_plans_pass_good_versions_with_a_margin_and_refuse_the_damaged_one(built: Path) -> None:
    versions = json.loads((built / "report.json").read_bytes())["versions"]
    for name, good in (("health.json", "v2"), ("health-v1.json", "v1")):
        plan = msgspec.json.decode((built / name).read_bytes(), type=HealthPlan)
        for prompt in plan.prompts:
            assert isinstance(prompt, TextPrompt)
            of_good, of_bad = (
                next(each for each in versions[version]["prompts"] if each["name"] == prompt.name)
                for version in (good, "v3")
            )
            assert of_good["logprob_mean"] > prompt.logprob_mean_min + 0.4
            assert not prompt.exact or of_good["answer"] == prompt.completion
            assert of_bad["logprob_mean"] < prompt.logprob_mean_min


@pytest.mark.llama
@pytest.mark.slow
def test_another_file_than_the_pinned_model_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    from examples.smollm2 import build  # noqa: PLC0415  # needs llama-cpp-python

    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert build.main(["--out", str(tmp_path / "out"), "--model", str(tmp_path / "other.gguf")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
