"""Two versions of a classifier: which inputs changed their class, and by which margin."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from protocol.release import ClassPrompt
from server import operations
from server.cli import main
from server.diagnosis.asking import ask_classifier
from server.diagnosis.classes import ClassAnswer, compare_classes, findings_of_classes, told_class
from tests.models import CLASSES, FEATURES, write_classifier


def _inputs() -> list[dict[str, object]]:
    rows = np.eye(FEATURES)[:CLASSES]
    return [
        {"kind": "class", "name": f"class-{label}", "input": rows[label].tolist(), "label": label}
        for label in range(CLASSES)
    ]


def _plan(path: Path, prompts: Sequence[object]) -> Path:
    plan = {"prompts": prompts, "latency_p99_ms_max": 60_000, "memory_peak_bytes_max": 1 << 32}
    path.write_text(json.dumps(plan))
    return path


def _prompt(name: str, label: int) -> ClassPrompt:
    return ClassPrompt(name=name, input=[0.0], label=label)


def test_an_input_that_changed_its_class_is_told_with_both_margins() -> None:
    old = [ClassAnswer(label=0, scores=[3.0, 1.0, 0.5]), ClassAnswer(label=1, scores=[0.0, 2.0, 1.0])]
    new = [ClassAnswer(label=2, scores=[1.0, 0.0, 1.25]), ClassAnswer(label=1, scores=[0.0, 2.5, 1.0])]
    lost, kept = compare_classes([_prompt("a", 0), _prompt("b", 1)], old, new)
    assert (lost.is_worse, lost.old_lead, lost.new_lead) == (True, 2.5, 0.25)
    assert (kept.is_worse, kept.old_lead, kept.new_lead) == (False, 1.0, 1.5)
    (found,) = findings_of_classes([lost, kept])
    assert (found.code, found.where) == ("prompts.worse", ["a"])
    assert found.summary == (
        "1 of 2 inputs got a wrong class; a: class 0 (ahead by 2.50) became 2 (ahead by 0.25); 0 is right"
    )
    assert told_class(kept) == "b: class 1 as before, ahead by 1.50, was 1.00"


def test_an_input_that_was_wrong_before_is_no_worse_with_another_class() -> None:
    answers = [[ClassAnswer(label=label)] for label in (1, 0)]  # a model that gives no scores
    (shift,) = compare_classes([_prompt("a", 0)], *answers)
    assert (shift.is_worse, shift.old_lead, shift.new_lead) == (False, None, None)
    (found,) = findings_of_classes([shift])
    assert (found.code, found.severity) == ("prompts.diverged", "note")


def test_two_releases_of_a_classifier_are_asked_the_inputs_of_their_health_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab", port=0)
    health = _plan(tmp_path / "health.json", _inputs())
    for version, shift in (("v1", 0), ("v2", 1)):
        model = write_classifier(tmp_path / f"{version}.onnx", seed=1, shift=shift)
        operations.add_release(home, "digits", version, [model], runtime="onnx", health=health)
    assert main(["diagnose", "digits", "v1", "v2", "--dir", str(home), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [each["new_label"] for each in value["prompts"]] == [1, 2, 3, 0]
    assert all(
        each["is_worse"] and each["old_lead"] > 1 and each["new_lead"] > 1 for each in value["prompts"]
    )
    assert value["findings"][-1]["code"] == "prompts.worse"
    assert "4 of 4 inputs got a wrong class" in value["conclusion"]
    assert main(["diagnose", "digits", "v1", "v2", "--dir", str(home)]) == 0
    text = capsys.readouterr().out
    assert "Prompts: 4 of 4 worse\n  class-0: class 0 (ahead by " in text


def test_external_tensors_lie_beside_a_model_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab", port=0)
    health = _plan(tmp_path / "health.json", _inputs())
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        whole = onnx.load(write_classifier(tmp_path / f"{version}.onnx", seed=1))
        path = tmp_path / version / "model.onnx"
        onnx.save(
            whole,
            path,
            save_as_external_data=True,
            location="model.bin",
            size_threshold=0,
            convert_attribute=False,
        )
        files = [path, path.with_name("model.bin")]
        operations.add_release(home, "digits", version, files, runtime="onnx", health=health)
    assert main(["diagnose", "digits", "v1", "v2", "--dir", str(home), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [(each["new_label"], each["trouble"]) for each in value["prompts"]] == [
        (label, "") for label in range(CLASSES)
    ]
    assert value["findings"] == []


def test_inputs_that_the_newer_version_does_not_take_are_unanswered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [_matrix(tmp_path / f"{rows}.onnx", rows) for rows in (64, 65)]
    plan = _plan(
        tmp_path / "health.json", [{"kind": "class", "name": "one", "input": [1.0] + [0.0] * 63, "label": 0}]
    )
    names = [str(each) for each in models]
    assert main(["diagnose", *names, "--prompts", str(plan), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [each["code"] for each in value["findings"]][:2] == ["tensors.reshaped", "prompts.unanswered"]
    assert "64 numbers do not fit the model's input" in value["findings"][1]["summary"]
    texts = _plan(
        tmp_path / "texts.json",
        [{"kind": "text", "name": "a", "prompt": "a", "completion": "b", "logprob_mean_min": -1.0}],
    )
    assert main(["diagnose", *names, "--prompts", str(texts)]) == 1
    assert "texts.json has no prompts of kind class" in capsys.readouterr().err


def test_a_file_that_no_runtime_loads_is_unanswered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (
        _matrix(tmp_path / "old.onnx", 64),
        _matrix(tmp_path / "new.onnx", 64, operator="NoSuchOperator"),
    )
    plan = _plan(
        tmp_path / "health.json", [{"kind": "class", "name": "one", "input": [1.0] + [0.0] * 63, "label": 0}]
    )
    assert main(["diagnose", str(old), str(new), "--prompts", str(plan), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["findings"][0]["code"] == "prompts.unanswered"
    assert "onnxruntime cannot load the file" in value["findings"][0]["summary"]
    assert main(["diagnose", str(new), str(old), "--prompts", str(plan)]) == 1
    assert "or pass --no-prompts" in capsys.readouterr().err


def test_scores_are_those_of_the_model(tmp_path: Path) -> None:
    model = _matrix(tmp_path / "m.onnx", 64)
    prompt = ClassPrompt(name="one", input=[0.0, 2.0] + [0.0] * 62, label=1)
    (answer,) = ask_classifier(model, [prompt], "m")
    assert answer == ClassAnswer(label=1, scores=[0.0, 2.0] + [0.0] * 30)


def _matrix(path: Path, rows: int, operator: str = "MatMul") -> Path:
    weights = np.eye(rows, 32, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path
