"""Where models run: what may be configured, what onnxruntime is told, and what becomes of a provider that is not there."""

import logging
from pathlib import Path

import numpy as np
import pytest

from device.adapters.doctor import Level, look_at_runtimes
from device.adapters.engine_onnx import load_onnx, usable_providers
from device.adapters.engines import LocalEngine
from device.adapters.gpu_layers import layer_costs, layers_that_fit
from device.compute import (
    PROCESSOR,
    Compute,
    LlamaSettings,
    OnnxSettings,
    check_llama,
    check_onnx,
    provider_options,
)
from device.config import load_config
from device.ports import ModelSource, TrialOrder
from protocol.errors import EngineError, RequestError
from tests.adapters import write_parts
from tests.models import health_plan, language_model, prompts, write_classifier

MB = 1 << 20
CUDA = "CUDAExecutionProvider"
AZURE = "AzureExecutionProvider"
"""Is in every package of onnxruntime for x86-64, starts everywhere, and takes no node of a usual model."""

MAIN = 'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'
JETSON = """
[onnx]
providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
gpu_memory_mb_max = 512
device_id = 1
[onnx.options.TensorrtExecutionProvider]
trt_fp16_enable = true
trt_max_workspace_size = 1000
[llama]
gpu_layers = "all"
gpu_memory_mb_max = 2048
main_gpu = 1
threads = 4
"""


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "model.onnx", seed=1)


def write_config(folder: Path, text: str) -> Path:
    path = folder / "device.toml"
    path.write_text(MAIN + text)
    return path


def test_a_configuration_says_where_models_run(tmp_path: Path) -> None:
    compute = load_config(write_config(tmp_path, JETSON)).compute
    assert compute.llama == LlamaSettings(gpu_layers="all", gpu_memory_mb_max=2048, main_gpu=1, threads=4)
    assert provider_options(compute.onnx) == {
        "TensorrtExecutionProvider": {
            "device_id": "1",
            "trt_fp16_enable": "1",
            "trt_max_workspace_size": "1000",  # what is set by name counts
        },
        CUDA: {
            "device_id": "1",
            "gpu_mem_limit": str(512 * MB),
            "arena_extend_strategy": "kSameAsRequested",
        },
        PROCESSOR: {},
    }


def test_without_a_word_models_run_on_one_thread_of_the_processor(tmp_path: Path) -> None:
    compute = load_config(write_config(tmp_path, "")).compute
    assert compute == Compute()
    assert provider_options(compute.onnx) == {PROCESSOR: {}}
    assert (compute.onnx.threads, compute.llama.gpu_layers) == (1, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[onnx]\nproviders = ["cuda"]\n', "'cuda' is no execution provider"),
        ('[onnx]\nproviders = ["/lib/x.so"]\n', "is no execution provider"),
        ("[onnx]\nproviders = []\n", "length >= 1"),
        (f'[onnx]\nproviders = ["{CUDA}", "{CUDA}"]\n', "names one twice"),
        ("[onnx]\ngpu_memory_mb_max = 100\n", "can be told a limit"),
        ("[onnx]\nthreads = 0\n", "threads"),
        (f"[onnx.options.{CUDA}]\ncudnn_conv_algo_search = 'HEURISTIC'\n", "does not name it"),
        (
            "onnx = {providers = ['TensorrtExecutionProvider'], options.TensorrtExecutionProvider.trt_engine_cache_enable = true}\n",
            "TensorrtExecutionProvider.trt_engine_cache_enable: such a cache does not look at the weights",
        ),
        ("[llama]\ngpu_layers = -1\n", "gpu_layers"),
        ("[llama]\ngpu_layers = 'some'\n", "gpu_layers"),
        ("[llama]\ngpu_memory_mb_max = 100\n", "no layer is to run there"),
        ("[llama]\nlayers = 3\n", "unknown field `layers`"),
    ],
)
def test_what_cannot_be_is_refused_with_file_and_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_config(write_config(tmp_path, text))
    assert "device.toml: " in caught.value.message
    assert said in caught.value.message


def test_settings_that_fit_come_back_as_they_are() -> None:
    onnx, llama = OnnxSettings(threads=3), LlamaSettings(gpu_layers=7)
    assert check_onnx(onnx) is onnx
    assert check_llama(llama) is llama


def test_a_provider_that_the_package_lacks_is_passed_over_and_named(
    classifier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = OnnxSettings(providers=(CUDA, PROCESSOR))
    usable, trouble = usable_providers(settings)
    assert usable == (PROCESSOR,)
    assert f"has no {CUDA}, it has " in trouble
    with caplog.at_level(logging.WARNING):
        model = load_onnx(str(classifier), settings)
    assert [model.answer(prompt) for prompt in prompts()] == [str(prompt.label) for prompt in prompts()]
    assert f"the model runs on {PROCESSOR}: onnxruntime" in caplog.text
    model.close()


def test_a_model_does_not_run_on_a_processor_that_is_not_named(classifier: Path) -> None:
    with pytest.raises(EngineError, match=f"no execution provider starts: .* has no {CUDA}"):
        load_onnx(str(classifier), OnnxSettings(providers=(CUDA,)))


def test_a_model_whose_parts_would_fall_back_to_the_processor_is_refused_where_that_is_not_named(
    classifier: Path,
) -> None:
    assert usable_providers(OnnxSettings(providers=(AZURE, PROCESSOR)))[0] == (AZURE, PROCESSOR)
    load_onnx(str(classifier), OnnxSettings(providers=(AZURE, PROCESSOR))).close()
    with pytest.raises(EngineError, match=r"cannot load the file: .*CPU EP"):
        load_onnx(str(classifier), OnnxSettings(providers=(AZURE,)))


def test_a_trial_runs_where_the_model_will_serve(classifier: Path) -> None:
    order = TrialOrder(ModelSource("onnx", str(classifier)), health_plan(), 1 << 30)
    evidence = LocalEngine(compute=Compute(onnx=OnnxSettings(providers=(CUDA,)))).trial(order)
    assert "no execution provider starts: onnxruntime" in evidence.detail
    assert evidence.prompts_passed == 0
    evidence = LocalEngine(compute=Compute(onnx=OnnxSettings(providers=(CUDA, PROCESSOR)))).trial(order)
    assert (evidence.detail, evidence.prompts_passed) == ("", evidence.prompts_total)


def test_the_doctor_says_where_models_run() -> None:
    fine = look_at_runtimes(None, Compute(onnx=OnnxSettings(threads=2)))
    assert fine.level is Level.OK
    assert "onnx runs on processor" in fine.text
    slow = look_at_runtimes(None, Compute(onnx=OnnxSettings(providers=(CUDA, PROCESSOR))))
    assert slow.level is Level.WARNING
    assert "onnx runs on processor only: onnxruntime" in slow.text
    broken = look_at_runtimes(None, Compute(onnx=OnnxSettings(providers=(CUDA,))))
    assert broken.level is Level.FAILED
    assert "or change [onnx] in the configuration" in broken.advice


@pytest.mark.llama
def test_layers_for_an_accelerator_that_llama_was_built_without_run_on_the_processor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from device.adapters.engine_llama import gpu_trouble, load_llama  # noqa: PLC0415 - after the skip

    if not gpu_trouble():
        pytest.skip("needs llama.cpp without an accelerator, as the lock file has it compiled")
    with caplog.at_level(logging.WARNING):
        load_llama(str(language_model()), LlamaSettings(gpu_layers="all", gpu_memory_mb_max=1)).close()
    assert "all layers run on the processor: llama-cpp-python" in caplog.text
    finding = look_at_runtimes(None, Compute(llama=LlamaSettings(gpu_layers=3)))
    assert finding.level is Level.WARNING
    assert "llama runs on processor only" in finding.text


def test_layers_are_counted_from_the_output_back(tmp_path: Path) -> None:
    context, width, vocabulary, heads, groups, inner = 8, 64, 96, 4, 2, 32
    path = write_gguf(tmp_path / "model.gguf", width, vocabulary, heads, groups, blocks=3, inner=inner)
    cache = context * groups * (width // heads) * 2 * 2
    logits = context * vocabulary * 4
    weights = [width * inner * 4 * (number + 1) for number in range(3)]
    output = vocabulary * width * 4 + width * 4  # the embedding once more, and the last norm
    costs = layer_costs(path, context)
    assert costs == [output + logits, weights[2] + cache, weights[1] + cache, weights[0] + cache]
    assert [layers_that_fit(costs, bytes_max) for bytes_max in (0, costs[0] - 1, costs[0], sum(costs))] == [
        0,
        0,
        1,
        4,
    ]
    assert layers_that_fit(costs, sum(costs) - 1) == 3
    parts = {"blk.1.ffn_up.weight": (inner * 2, width), "output_norm.weight": (1, width)}
    factors = {
        f"{name}.lora_{end}": np.zeros((2, columns) if end == "a" else (rows, 2), np.float32)
        for name, (rows, columns) in parts.items()
        for end in "ab"
    }
    sizes = [4 * 2 * (rows + columns) for rows, columns in parts.values()]
    adapted = layer_costs(path, context, write_parts(tmp_path / "lora.gguf", factors))
    assert adapted == [costs[0] + sizes[1], costs[1], costs[2] + sizes[0], costs[3]]


def write_gguf(
    path: Path, width: int, vocabulary: int, heads: int, groups: int, *, blocks: int, inner: int
) -> Path:
    """A GGUF file as llama.cpp's converters write it, by their own library."""
    import gguf  # noqa: PLC0415 - of the test environment only

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_tensor("token_embd.weight", np.zeros((vocabulary, width), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(width, np.float32))
    for number in range(blocks):
        writer.add_tensor(f"blk.{number}.ffn_up.weight", np.zeros((inner * (number + 1), width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
