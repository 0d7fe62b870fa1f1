"""Layers of a language model on a device with memory of its own: Vulkan, whose driver here is Mesa's program for processors."""

import ctypes
import logging
import re
from collections.abc import Iterator

import pytest

from device.adapters import engine_llama
from device.adapters.doctor import Level, look_at_runtimes
from device.adapters.engine_llama import CONTEXT_TOKENS, LlamaModel, gpu_trouble, load_llama
from device.adapters.gpu_layers import layer_costs, layers_that_fit
from device.compute import Compute, LlamaSettings
from protocol.release import TextPrompt
from tests.models import language_model

MB = 1 << 20
PROMPT = TextPrompt(
    name="text", prompt="The capital of France is", completion=" Paris", logprob_mean_min=-9.0
)
BUFFER = re.compile(r"Vulkan0 (model|KV|compute|output) buffer size\s*=\s*([0-9.]+) MiB")
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What llama.cpp writes into its log, which a device drops."""
    import llama_cpp  # noqa: PLC0415 - after the path is known

    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode()))
    monkeypatch.setattr(engine_llama, "_silence", lambda: callback)
    yield lines
    monkeypatch.undo()
    llama_cpp.llama_log_set(engine_llama._silence(), ctypes.c_void_p())


def loaded(settings: LlamaSettings) -> LlamaModel:
    return load_llama(str(language_model()), settings)


def test_this_is_the_build_that_is_meant() -> None:
    assert gpu_trouble() == ""
    finding = look_at_runtimes(None, Compute(llama=LlamaSettings(gpu_layers="all")))
    assert finding.level is Level.OK
    assert "llama runs on accelerator, processor" in finding.text


def test_all_layers_there_say_what_the_processor_says(said: list[str]) -> None:
    there, here = loaded(LlamaSettings(gpu_layers="all")), loaded(LlamaSettings())
    counts = OFFLOADED.findall("".join(said))
    assert counts[0][0] == counts[0][1]
    assert there.answer(PROMPT) == here.answer(PROMPT)
    scores = [model.logprob_mean(PROMPT.prompt, PROMPT.completion) for model in (there, here)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    there.close()
    here.close()


@pytest.mark.parametrize("layers", [1, 8, 31])
def test_what_layers_take_there_is_what_was_counted(said: list[str], layers: int) -> None:
    loaded(LlamaSettings(gpu_layers=layers)).close()
    text = "".join(said)
    assert OFFLOADED.findall(text)[0][0] == str(layers)
    taken = sum(float(size) for _, size in BUFFER.findall(text)) * MB
    counted = sum(layer_costs(language_model(), CONTEXT_TOKENS)[:layers])
    assert 0.85 < taken / counted < 1.15, BUFFER.findall(text)


def test_a_limit_leaves_the_layers_that_pass_it_to_the_processor(
    said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    limit_mb = 160
    costs = layer_costs(language_model(), CONTEXT_TOKENS)
    fitting = layers_that_fit(costs, limit_mb * MB)
    assert 0 < fitting < len(costs)
    with caplog.at_level(logging.WARNING):
        model = loaded(LlamaSettings(gpu_layers="all", gpu_memory_mb_max=limit_mb))
    assert f"{fitting} of {len(costs)} layers run on the accelerator" in caplog.text
    assert OFFLOADED.findall("".join(said))[0][0] == str(fitting)
    assert model.answer(PROMPT)
    model.close()
