"""What is done with every build of onnxruntime."""

from pathlib import Path

from device.adapters.engine_onnx import load_onnx
from device.adapters.engines import LocalEngine
from device.compute import Compute, OnnxSettings
from device.ports import ModelSource, TrialOrder
from protocol.messages import TrialEvidence
from tests.models import CLASSES, health_plan, prompts, write_classifier


def answers(path: Path, settings: OnnxSettings) -> list[int]:
    """What a model answers to the prompts of the tests."""
    model = load_onnx(str(path), settings)
    try:
        return [int(model.answer(prompt)) for prompt in prompts()]
    finally:
        model.close()


def expected(shift: int = 0) -> list[int]:
    """What a model of `write_classifier` with that shift should answer."""
    return [(prompt.label + shift) % CLASSES for prompt in prompts()]


def tried(path: Path, settings: OnnxSettings) -> TrialEvidence:
    """A trial as a device holds it."""
    order = TrialOrder(ModelSource("onnx", str(path)), health_plan(load_timeout_ms=60_000), 2 << 30)
    return LocalEngine(compute=Compute(onnx=settings)).trial(order)


def two_versions(folder: Path) -> tuple[Path, Path]:
    """Models of one graph whose weights differ, and so their answers; at the same path one after the other, as in a slot."""
    return write_classifier(folder / "v1.onnx", 1), write_classifier(folder / "v2.onnx", 2, shift=1)
