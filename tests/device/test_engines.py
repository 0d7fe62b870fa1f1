"""The runtimes of a device on real model files: answers, refusals, and a swap under load."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from device.adapters.clock import SystemClock
from device.adapters.engine_llama import LlamaModel, load_llama
from device.adapters.engine_onnx import OnnxModel, load_onnx
from device.adapters.engines import LocalEngine, load_model
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.compute import ON_PROCESSOR
from device.config import AgentConfig, DeviceConfig
from device.effects import Serve
from device.ports import ModelSource
from device.runtime import DeviceRuntime
from device.slots import SlotName, slot_file
from protocol.errors import EngineError
from protocol.ids import DeviceId, Family, FleetId
from protocol.release import ClassPrompt, Prompt, TextPrompt
from tests.models import FEATURES, language_model, prompts, write_classifier
from tests.server.brokers import wait_until

TEXT = TextPrompt(name="text", prompt="The capital of France is", completion=" Paris", logprob_mean_min=-9.0)
SWAPS = 40
WAIT_S = 30.0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("models") / "classifier.onnx", seed=1)


def write_graph(path: Path, node: onnx.NodeProto, shapes: dict[str, list[int | str]], kind: int) -> Path:
    """A model of one node, whose inputs and output are as told; the last of the shapes is the output."""
    *inputs, output = shapes.items()
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(output[0], kind, output[1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path))
    return path


def question(values: list[float]) -> ClassPrompt:
    return ClassPrompt(name="question", input=values, label=0)


def test_a_classifier_names_the_class_with_the_highest_score(classifier: Path) -> None:
    model = load_onnx(str(classifier))
    assert [model.answer(prompt) for prompt in prompts()] == [str(prompt.label) for prompt in prompts()]
    model.close()


def test_an_input_of_another_length_is_refused_and_the_shape_named(classifier: Path) -> None:
    model = load_onnx(str(classifier))
    for length in (1, FEATURES - 1, FEATURES + 1, 2 * FEATURES):
        with pytest.raises(EngineError, match=f"question has {length} values.*'batch', {FEATURES}"):
            model.answer(question([0.0] * length))
    model.close()


def test_a_classifier_refuses_a_text_prompt(classifier: Path) -> None:
    model = load_onnx(str(classifier))
    with pytest.raises(EngineError, match="class prompts only"):
        model.answer(TEXT)
    model.close()


def test_values_that_are_no_numbers_give_an_error_and_no_class(classifier: Path) -> None:
    model = load_onnx(str(classifier))
    with pytest.raises(EngineError, match="not finite"):
        model.answer(question([float("nan")] * FEATURES))
    model.close()


def test_an_image_is_answered_from_a_flat_list(tmp_path: Path) -> None:
    node = helper.make_node("GlobalMaxPool", ["x"], ["y"])
    path = write_graph(
        tmp_path / "image.onnx", node, {"x": ["n", 3, 2, 2], "y": ["n", 3, 1, 1]}, TensorProto.FLOAT
    )
    model = load_onnx(str(path))
    assert model.answer(question([0, 0, 0, 0, 0, 9, 0, 0, 1, 1, 1, 1])) == "1"
    model.close()


@pytest.mark.parametrize(
    ("shapes", "kind", "match"),
    [
        ({"x": [2], "z": [2], "y": [2]}, TensorProto.FLOAT, "one tensor"),
        ({"x": [2], "y": [2]}, TensorProto.INT64, r"one tensor\(float\)"),
    ],
)
def test_a_model_with_inputs_that_no_prompt_can_fill_is_refused_on_load(
    tmp_path: Path, shapes: dict[str, list[int | str]], kind: int, match: str
) -> None:
    node = helper.make_node("Add", ["x", "z" if "z" in shapes else "x"], ["y"])
    with pytest.raises(EngineError, match=match):
        load_onnx(str(write_graph(tmp_path / "odd.onnx", node, shapes, kind)))


def test_a_model_with_one_score_names_no_class(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMax", ["x"], ["y"], keepdims=1)
    path = write_graph(tmp_path / "one.onnx", node, {"x": [4], "y": [1]}, TensorProto.FLOAT)
    model = load_onnx(str(path))
    with pytest.raises(EngineError, match="names no class"):
        model.answer(question([1.0, 2.0, 3.0, 4.0]))
    model.close()


def test_a_failure_inside_the_graph_is_one_line(tmp_path: Path) -> None:
    reshape = helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = helper.make_graph(
        [reshape],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
        [numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "shape")],
    )
    path = tmp_path / "reshape.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    model = load_onnx(str(path))
    with pytest.raises(EngineError, match="onnxruntime gave no answer") as caught:
        model.answer(question([1.0, 2.0]))
    assert "\n" not in str(caught.value)
    model.close()


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("llama", marks=pytest.mark.llama)])
@pytest.mark.parametrize("content", [None, b"", b"no model at all" * 100])
def test_a_missing_an_empty_and_a_garbage_file_are_refused_in_one_line(
    tmp_path: Path, runtime: str, content: bytes | None
) -> None:
    if runtime == "llama":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = tmp_path / "model"
    if content is not None:
        path.write_bytes(content)
    source = ModelSource("llama" if runtime == "llama" else "onnx", str(path))
    with pytest.raises(EngineError, match="cannot load the file") as caught:
        LocalEngine().load(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_truncated_model_is_refused(tmp_path: Path, classifier: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(classifier.read_bytes()[: classifier.stat().st_size // 2])
    with pytest.raises(EngineError, match="cannot load the file"):
        load_onnx(str(path))


def test_a_closed_model_answers_no_more_and_closes_again_in_silence(classifier: Path) -> None:
    model = load_onnx(str(classifier))
    model.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.answer(prompts()[0])


def test_installed_runtimes_are_told_with_their_versions() -> None:
    versions = LocalEngine().versions()
    assert "onnx" in versions
    assert set(versions) <= {"onnx", "llama"}
    assert all(version[0].isdigit() for version in versions.values())


def ask_while(model_answers: Callable[[Prompt], str], work: Callable[[], None]) -> tuple[int, list[str]]:
    """Ask from two threads as long as `work` takes; how many answers were right, and what else came."""
    is_over = threading.Event()
    has_begun = threading.Barrier(3)
    right = [0, 0]
    wrong: list[str] = []

    def ask(number: int) -> None:
        has_begun.wait(WAIT_S)
        while not is_over.is_set():
            prompt = prompts()[right[number] % len(prompts())]
            try:
                answer = model_answers(prompt)
            except EngineError as error:
                answer = str(error)
            if answer == str(prompt.label):
                right[number] += 1
            else:
                wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    has_begun.wait(WAIT_S)
    try:
        work()
    finally:
        is_over.set()
        for thread in threads:
            thread.join(WAIT_S)
    return sum(right), wrong


def test_closing_under_load_gives_right_answers_before_and_one_clear_error_after(tmp_path: Path) -> None:
    model = load_onnx(str(write_classifier(tmp_path / "big.onnx", seed=1, hidden=20_000)))
    answered = threading.Event()

    def answer(prompt: Prompt) -> str:
        given = model.answer(prompt)
        answered.set()
        return given

    def close() -> None:
        assert answered.wait(WAIT_S)
        model.close()

    right, wrong = ask_while(answer, close)
    assert right > 0
    assert set(wrong) <= {"the model is closed"}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DeviceRuntime]:
    """A device that is not connected, with a model in each slot."""
    config = DeviceConfig(
        agent=AgentConfig(device=DeviceId("swap"), fleet=FleetId("lab"), family=Family("digits")),
        folder=tmp_path,
        broker_host="127.0.0.1",
        broker_port=1,
    )
    loop, pool = MqttLoop(), WorkerPool(threads=1)
    runtime = DeviceRuntime(config, loop, pool, clock=SystemClock(), rng=random.Random(1))
    for number, slot in enumerate(SlotName):
        name = slot_file(slot, "model.onnx")
        path = Path(runtime.disk.path(name))
        path.parent.mkdir(parents=True)
        write_classifier(path, seed=number, hidden=4_000)
    yield runtime
    runtime.stop()
    loop.close()
    pool.close()


def test_requests_never_notice_that_the_model_is_swapped(runtime: DeviceRuntime) -> None:
    def swap(slot: SlotName) -> None:
        before = runtime.executor.model
        runtime.executor.run((Serve(1, slot, "onnx", "model.onnx"),))
        assert wait_until(lambda: runtime.executor.model not in {None, before})

    def swap_again_and_again() -> None:
        for number in range(SWAPS):
            swap((SlotName.A, SlotName.B)[number % 2])

    swap(SlotName.B)
    right, wrong = ask_while(runtime.infer, swap_again_and_again)
    assert right > SWAPS
    assert wrong == []


def test_a_file_that_cannot_be_served_leaves_the_old_model_answering(runtime: DeviceRuntime) -> None:
    runtime.executor.run((Serve(1, SlotName.A, "onnx", "model.onnx"),))
    assert wait_until(lambda: runtime.executor.model is not None)
    Path(runtime.disk.path(slot_file(SlotName.B, "model.onnx"))).write_bytes(b"garbage")
    runtime.executor.run((Serve(2, SlotName.B, "onnx", "model.onnx"),))
    done = threading.Event()
    runtime._workers.submit(done.set)  # after the load that fails
    assert done.wait(WAIT_S)
    assert [runtime.infer(prompt) for prompt in prompts()] == [str(prompt.label) for prompt in prompts()]


def test_a_device_without_a_model_says_so(runtime: DeviceRuntime) -> None:
    with pytest.raises(EngineError, match="no model answers now"):
        runtime.infer(prompts()[0])


def test_each_runtime_gives_its_own_kind_of_model(classifier: Path) -> None:
    model = load_model(ModelSource("onnx", str(classifier)), ON_PROCESSOR)
    assert isinstance(model, OnnxModel)
    model.close()


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaModel]:
    model = load_llama(str(language_model()))
    yield model
    model.close()


@pytest.mark.llama
def test_a_greedy_answer_is_always_the_same_and_depends_on_no_answer_before(llama: LlamaModel) -> None:
    first = llama.answer(TEXT)
    llama.logprob_mean("Water boils at a temperature of", " 100 degrees")
    assert llama.answer(TEXT) == first
    assert first
    assert "\n" not in first


@pytest.mark.llama
def test_a_sensible_completion_is_more_likely_than_a_silly_one(llama: LlamaModel) -> None:
    sensible = llama.logprob_mean(TEXT.prompt, " Paris")
    silly = llama.logprob_mean(TEXT.prompt, " wheelbarrow")
    assert silly < sensible < 0
    assert llama.logprob_mean(TEXT.prompt, " Paris") == sensible


@pytest.mark.llama
def test_prompts_without_tokens_too_long_and_of_another_kind_are_refused(llama: LlamaModel) -> None:
    for prompt, completion in (("", " Paris"), ("Paris", "")):
        with pytest.raises(EngineError, match="no tokens"):
            llama.logprob_mean(prompt, completion)
    with pytest.raises(EngineError, match="the context has 512"):
        llama.logprob_mean("word " * 600, " end")
    with pytest.raises(EngineError, match="text prompts only"):
        llama.answer(prompts()[0])
    assert llama.logprob_mean(TEXT.prompt, " Paris") < 0  # and goes on answering


@pytest.mark.llama
def test_a_closed_text_model_answers_no_more() -> None:
    model = load_llama(str(language_model()))
    model.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.answer(TEXT)


def test_a_device_tells_nobody_about_its_sessions(tmp_path: Path) -> None:
    """onnxruntime 1.32 keeps an identifier and a queue of reports below the home folder unless it is told not to."""
    model = write_classifier(tmp_path / "model.onnx", seed=1)
    program = f"from device.adapters.engine_onnx import load_onnx; load_onnx({str(model)!r})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-c", program], check=True, env={**environment, "HOME": str(home)})
    assert [path for path in home.rglob("*") if path.is_file()] == []
