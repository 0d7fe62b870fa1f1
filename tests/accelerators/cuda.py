"""onnxruntime's build for NVIDIA. Its package lists CUDA and TensorRT everywhere; whether they start is another matter."""

from pathlib import Path

import onnxruntime
import pytest

from device.adapters.doctor import Level, look_at_runtimes
from device.adapters.engine_onnx import load_onnx, usable_providers
from device.compute import PROCESSOR, Compute, OnnxSettings
from protocol.errors import EngineError
from tests.accelerators.onnx_models import answers, expected, tried, two_versions
from tests.models import write_classifier

CUDA = "CUDAExecutionProvider"
BOTH = ("TensorrtExecutionProvider", CUDA)
SETTINGS = OnnxSettings(providers=(CUDA, PROCESSOR), gpu_memory_mb_max=256)
STARTS = CUDA in usable_providers(SETTINGS)[0]
without_gpu = pytest.mark.skipif(
    STARTS, reason="is about machines without CUDA's libraries or device, and this one has them"
)
with_gpu = pytest.mark.skipif(not STARTS, reason="needs an NVIDIA GPU, its driver, CUDA and cuDNN")


def test_this_is_the_build_that_is_meant() -> None:
    assert set(BOTH) <= set(onnxruntime.get_available_providers())


def test_with_the_processor_named_every_machine_answers(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "model.onnx", 1)
    assert answers(path, OnnxSettings(providers=(*BOTH, PROCESSOR), gpu_memory_mb_max=256)) == expected()
    evidence = tried(path, SETTINGS)
    assert (evidence.detail, evidence.prompts_passed) == ("", evidence.prompts_total)


@without_gpu
@pytest.mark.parametrize("name", BOTH)
def test_a_provider_that_is_listed_and_does_not_start_is_named(tmp_path: Path, name: str) -> None:
    usable, trouble = usable_providers(OnnxSettings(providers=(name, PROCESSOR)))
    assert usable == (PROCESSOR,)
    assert trouble.startswith(name)
    with pytest.raises(EngineError, match=f"no execution provider starts: {name}"):
        load_onnx(str(write_classifier(tmp_path / "model.onnx", 1)), OnnxSettings(providers=(name,)))


@without_gpu
def test_the_doctor_says_what_is_missing() -> None:
    finding = look_at_runtimes(None, Compute(onnx=SETTINGS))
    assert finding.level is Level.WARNING
    assert f"onnx runs on processor only: {CUDA} does not start" in finding.text


@with_gpu
def test_each_version_answers_with_its_own_weights(tmp_path: Path) -> None:
    slot = tmp_path / "slot.onnx"
    old, new = two_versions(tmp_path)
    for source, shift in ((old, 0), (new, 1), (old, 0)):
        slot.write_bytes(source.read_bytes())
        assert answers(slot, OnnxSettings(providers=(CUDA,), gpu_memory_mb_max=256)) == expected(shift)
