"""A second execution provider that really runs: OpenVINO's, on the processor."""

from pathlib import Path

import onnxruntime

from device.adapters.doctor import Level, look_at_runtimes
from device.adapters.engine_onnx import usable_providers
from device.compute import PROCESSOR, Compute, OnnxSettings
from tests.accelerators.onnx_models import answers, expected, tried, two_versions
from tests.models import write_classifier

OPENVINO = "OpenVINOExecutionProvider"
ALONE = OnnxSettings(providers=(OPENVINO,))
FIRST = OnnxSettings(
    providers=("CUDAExecutionProvider", OPENVINO, PROCESSOR), options={OPENVINO: {"device_type": "CPU"}}
)


def test_this_is_the_build_that_is_meant() -> None:
    assert OPENVINO in onnxruntime.get_available_providers()


def test_a_whole_model_runs_there(tmp_path: Path) -> None:
    assert answers(write_classifier(tmp_path / "model.onnx", 1), ALONE) == expected()


def test_it_is_taken_where_the_preferred_one_is_missing() -> None:
    usable, trouble = usable_providers(FIRST)
    assert usable == (OPENVINO, PROCESSOR)
    assert "has no CUDAExecutionProvider" in trouble


def test_a_trial_is_held_there(tmp_path: Path) -> None:
    evidence = tried(write_classifier(tmp_path / "model.onnx", 1), ALONE)
    assert (evidence.detail, evidence.prompts_passed) == ("", evidence.prompts_total)


def test_each_version_answers_with_its_own_weights(tmp_path: Path) -> None:
    old, new = two_versions(tmp_path)
    slot = tmp_path / "slot.onnx"
    for source, shift in ((old, 0), (new, 1), (old, 0)):
        slot.write_bytes(source.read_bytes())
        assert answers(slot, FIRST) == expected(shift)


def test_an_option_that_it_does_not_know_is_a_reason_to_pass_it_over() -> None:
    usable, trouble = usable_providers(
        OnnxSettings(providers=(OPENVINO, PROCESSOR), options={OPENVINO: {"no_such": 1}})
    )
    assert usable == (PROCESSOR,)
    assert "no_such" in trouble


def test_the_doctor_names_it() -> None:
    finding = look_at_runtimes(None, Compute(onnx=ALONE))
    assert finding.level is Level.OK
    assert f"onnx runs on {OPENVINO}" in finding.text
