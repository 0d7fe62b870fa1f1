"""A trial from inside: `python -m device.adapters.trial_child`, an order on standard input, lines of JSON out.

Started by `trial.py` only. It confines itself first (`confinement.py`), then loads the model and answers the golden prompts. Limits of time
and memory are the parent's: this process may hang or die at any point.
"""

import math
import random
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

import msgspec

from device.adapters.confinement import confine, end_with, take_stdout
from device.adapters.engine_llama import LlamaModel
from device.adapters.engine_onnx import OnnxModel
from device.adapters.engines import load_model
from device.adapters.priority import give_way
from device.adapters.trial import (
    BEAT_MS,
    LATENCY_SAMPLES_MAX,
    LATENCY_SAMPLES_MIN,
    Answering,
    ChildOrder,
    Line,
    Loaded,
    Measured,
    Started,
    Troubled,
)
from protocol.errors import EngineError
from protocol.release import ClassPrompt, HealthPlan, Prompt, TextPrompt


class _Trial:
    """One trial; speaks while it goes on."""

    def __init__(self, model: OnnxModel | LlamaModel, health: HealthPlan, out: BinaryIO) -> None:
        self._model = model
        self._health = health
        self._out = out
        self._passed = 0
        self._spoke_ms = 0.0
        self._answers = 0
        self._latencies_ms: list[float] = []
        self._rng = random.Random(0)  # noqa: S311 - chooses which samples to keep

    def run(self) -> Measured:
        """Warm up, answer every prompt, gather samples, soak.

        Raises:
            EngineError: The model did not answer; names the prompt.
        """
        prompts = self._health.prompts
        self._judge(prompts[0])  # the first answer pays for caches and lazy set-up
        self._beat()
        for prompt in prompts:
            self._passed += self._measure(prompt)
        classes = [prompt for prompt in prompts if isinstance(prompt, ClassPrompt)]
        repeated: Iterator[Prompt] = cycle(classes)
        while classes and self._answers < LATENCY_SAMPLES_MIN:
            self._measure(next(repeated))
        repeated = cycle(prompts)
        end_ms = _now_ms() + self._health.soak_ms
        while _now_ms() < end_ms:
            self._measure(next(repeated))
        return Measured(
            passed=self._passed, latencies_ms=self._latencies_ms, memory_peak_bytes=_memory_peak_bytes()
        )

    def _measure(self, prompt: Prompt) -> bool:
        begin_ms = _now_ms()
        is_good = self._judge(prompt)
        self._keep(_now_ms() - begin_ms)
        self._beat()
        return is_good

    def _judge(self, prompt: Prompt) -> bool:
        try:
            if isinstance(prompt, TextPrompt):
                return self._judge_text(prompt)
            return self._model.answer(prompt) == str(prompt.label)
        except EngineError as error:
            raise EngineError(f"prompt {prompt.name}: {error}") from error

    def _judge_text(self, prompt: TextPrompt) -> bool:
        if not isinstance(self._model, LlamaModel):
            raise EngineError("it is text, and the model answers class prompts only")
        score = self._model.logprob_mean(prompt.prompt, prompt.completion)
        if not math.isfinite(score):
            raise EngineError("its log-probability is not finite")
        is_exact = not prompt.exact or self._model.answer(prompt).strip().startswith(
            prompt.completion.strip()
        )
        return score >= prompt.logprob_mean_min and is_exact

    def _keep(self, latency_ms: float) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R): bounded, and each answer has the same chance."""
        self._answers += 1
        if len(self._latencies_ms) < LATENCY_SAMPLES_MAX:
            self._latencies_ms.append(latency_ms)
            return
        place = self._rng.randrange(self._answers)
        if place < LATENCY_SAMPLES_MAX:
            self._latencies_ms[place] = latency_ms

    def _beat(self) -> None:
        now_ms = _now_ms()
        if now_ms - self._spoke_ms >= BEAT_MS:
            self._spoke_ms = now_ms
            _speak(self._out, Answering(passed=self._passed))


def main() -> int:
    """Run the trial that standard input orders; the exit status is of no interest once the last line is out."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=ChildOrder)
    end_with(order.parent)
    give_way(order.priority)
    out = take_stdout()
    folder = Path(order.order.model.path).parent
    _speak(out, Started(confinement=confine([folder], accelerators=order.compute.has_accelerator)))
    begin_ms = _now_ms()
    try:
        model = load_model(order.order.model, order.compute)
    except EngineError as error:
        _speak(out, Troubled(detail=f"runtime refused the file: {error}"))
        return 0
    _speak(out, Loaded(load_ms=_now_ms() - begin_ms))
    try:
        line: Line = _Trial(model, order.order.health, out).run()
    except EngineError as error:
        line = Troubled(detail=str(error))
    _speak(out, line)
    return 0


def _speak(out: BinaryIO, line: Line) -> None:
    out.write(msgspec.json.encode(line) + b"\n")
    out.flush()


def _memory_peak_bytes() -> int:
    """Largest resident set of this program; `getrusage` would count the parent's, as it was at the fork."""
    for line in Path("/proc/self/status").read_bytes().splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024  # proc_pid_status(5): in KiB
    return 0


def _now_ms() -> float:
    return time.perf_counter() * 1000


if __name__ == "__main__":
    sys.exit(main())
