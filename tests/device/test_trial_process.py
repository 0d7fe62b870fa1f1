"""A trial in its own process: what a good model shows, and how each way to fail is caught, told apart and cleaned up."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from device.adapters.engines import LocalEngine
from device.ports import ModelSource, TrialOrder
from device.trial import judge
from protocol.errors import EngineError
from protocol.messages import TrialEvidence
from protocol.release import HealthPlan, TextPrompt
from tests.models import FEATURES, health_plan, language_model, prompts, write_classifier
from tests.server.brokers import wait_until

TIER_BYTES = 1 << 30
LONG_SOAK_MS = 600_000
WAIT_S = 60.0

PARENT = """
import sys
from device.adapters.trial import run_trial
from device.ports import ModelSource, TrialOrder
from tests.models import health_plan
run_trial(TrialOrder(ModelSource("onnx", sys.argv[1]), health_plan(soak_ms=int(sys.argv[2])), 1 << 30))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "model.onnx", seed=1)


def try_model(
    path: Path, plan: HealthPlan | None = None, *, memory_bytes_max: int = TIER_BYTES
) -> TrialEvidence:
    """A trial, after which no child is left, whatever happened."""
    order = TrialOrder(ModelSource("onnx", str(path)), plan or health_plan(), memory_bytes_max)
    evidence = LocalEngine().trial(order)
    assert trial_children(os.getpid()) == []
    return evidence


def code_of(
    evidence: TrialEvidence, plan: HealthPlan | None = None, memory_bytes_max: int = TIER_BYTES
) -> str:
    return judge(evidence, plan or health_plan(), memory_bytes_max).code


def trial_children(pid: int) -> list[psutil.Process]:
    """Processes below one that run a trial."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if any("trial_child" in word for word in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def write_endless(path: Path) -> Path:
    """A valid classifier whose every answer takes years: a loop of as many rounds as a 64-bit count allows."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Sin", ["before"], ["after"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, ["batch", FEATURES]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, ["batch", FEATURES]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["rounds", "go", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", FEATURES])],
        [
            numpy_helper.from_array(np.array(1 << 62, dtype=np.int64), "rounds"),
            numpy_helper.from_array(np.array(True), "go"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def test_a_good_model_shows_all_that_was_asked_for(model: Path) -> None:
    evidence = try_model(model)
    assert (evidence.prompts_passed, evidence.prompts_total) == (len(prompts()), len(prompts()))
    assert evidence.latency is not None
    assert 0 < evidence.latency.p50_ms <= evidence.latency.p95_ms <= evidence.latency.p99_ms
    assert evidence.load_ms is not None
    assert evidence.load_ms > 0
    assert evidence.memory_peak_bytes is not None
    assert evidence.memory_peak_bytes > 10 << 20  # an interpreter and a runtime at least
    assert evidence.detail == ""
    assert code_of(evidence) == ""


def test_wrong_answers_are_counted_and_measured_like_right_ones(tmp_path: Path) -> None:
    evidence = try_model(write_classifier(tmp_path / "shifted.onnx", seed=1, shift=1))
    assert evidence.prompts_passed == 0
    assert evidence.latency is not None
    assert evidence.detail == ""
    assert code_of(evidence) == "trial.answers"


def test_a_latency_limit_that_no_model_keeps_is_a_verdict_about_latency(model: Path) -> None:
    plan = health_plan(latency_p99_ms_max=1e-6)
    assert code_of(try_model(model, plan), plan) == "trial.latency"


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000])
def test_a_file_that_the_runtime_refuses_is_evidence_and_no_exception(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    evidence = try_model(path)
    assert evidence.detail.startswith("runtime refused the file")
    assert "\n" not in evidence.detail
    assert evidence.latency is None
    assert code_of(evidence) == "trial.crashed"


def test_prompts_of_another_kind_are_named_in_the_evidence(model: Path) -> None:
    prompt = TextPrompt(name="greeting", prompt="hello", completion=" world", logprob_mean_min=-1.0)
    evidence = try_model(model, health_plan(prompts=[prompt]))
    assert evidence.detail.startswith("prompt greeting: ")
    assert code_of(evidence) == "trial.crashed"


def run_aside(
    order: TrialOrder, meanwhile: Callable[[psutil.Process], None], engine: LocalEngine | None = None
) -> TrialEvidence:
    """Run a trial in a thread, and do something to its child once that is there."""
    results: list[TrialEvidence] = []
    trial = (engine or LocalEngine()).trial
    thread = threading.Thread(target=lambda: results.append(trial(order)))
    thread.start()
    try:
        assert wait_until(lambda: trial_children(os.getpid()), WAIT_S)
        meanwhile(trial_children(os.getpid())[0])
    except BaseException:
        for child in trial_children(os.getpid()):
            child.kill()  # its trial would go on for as long as the soak
        raise
    finally:
        thread.join(WAIT_S)
    assert trial_children(os.getpid()) == []
    return results[0]


def has_loaded_runtime(child: psutil.Process) -> bool:
    """Whether it has come as far as the runtime's library: from then on it loads or answers."""
    return b"onnxruntime" in Path(f"/proc/{child.pid}/maps").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_is_told_by_its_signal(model: Path, number: signal.Signals) -> None:
    def crash(child: psutil.Process) -> None:
        assert wait_until(lambda: has_loaded_runtime(child), WAIT_S)
        child.send_signal(number)

    plan = health_plan(soak_ms=LONG_SOAK_MS)
    order = TrialOrder(ModelSource("onnx", str(model)), plan, TIER_BYTES)
    evidence = run_aside(order, crash)
    assert evidence.detail.startswith(f"killed by signal {number.value}")
    assert evidence.latency is None
    assert code_of(evidence, plan) == "trial.crashed"


def test_a_process_that_stands_still_is_killed(model: Path) -> None:
    def stop(child: psutil.Process) -> None:
        assert wait_until(lambda: has_loaded_runtime(child), WAIT_S)
        child.suspend()

    plan = health_plan(soak_ms=LONG_SOAK_MS, prompt_timeout_ms=300, load_timeout_ms=2_000)
    evidence = run_aside(TrialOrder(ModelSource("onnx", str(model)), plan, TIER_BYTES), stop)
    assert evidence.detail in {"no answer within 300 ms", "not loaded within 2000 ms"}
    assert code_of(evidence, plan) == "trial.crashed"


@pytest.mark.parametrize(
    ("plan_bytes", "tier_bytes"), [(20 << 20, TIER_BYTES), (TIER_BYTES, 20 << 20)], ids=["release", "tier"]
)
def test_a_model_that_takes_more_memory_than_allowed_is_killed(
    model: Path, plan_bytes: int, tier_bytes: int
) -> None:
    plan = health_plan(memory_peak_bytes_max=plan_bytes, soak_ms=LONG_SOAK_MS)
    evidence = try_model(model, plan, memory_bytes_max=tier_bytes)
    assert evidence.detail == f"resident set passed {20 << 20} bytes"
    assert evidence.memory_peak_bytes is not None
    assert evidence.memory_peak_bytes > 20 << 20
    assert code_of(evidence, plan, tier_bytes) == "trial.crashed"


def test_an_answer_that_never_comes_ends_the_trial(tmp_path: Path) -> None:
    plan = health_plan(prompt_timeout_ms=200)
    evidence = try_model(write_endless(tmp_path / "endless.onnx"), plan)
    assert evidence.detail == "no answer within 200 ms"
    assert evidence.load_ms is not None
    assert evidence.prompts_passed == 0
    assert code_of(evidence, plan) == "trial.crashed"


def test_a_soak_is_kept_up_for_as_long_as_it_was_asked(model: Path) -> None:
    began = time.monotonic()
    evidence = try_model(model, health_plan(soak_ms=1_500))
    assert time.monotonic() - began > 1.5
    assert code_of(evidence) == ""


def test_an_engine_that_is_stopped_breaks_off_its_trial_and_begins_no_other(model: Path) -> None:
    engine = LocalEngine()
    plan = health_plan(soak_ms=LONG_SOAK_MS)
    order = TrialOrder(ModelSource("onnx", str(model)), plan, TIER_BYTES)

    def stop(child: psutil.Process) -> None:
        assert wait_until(lambda: has_loaded_runtime(child), WAIT_S)
        engine.stop()

    for evidence in (run_aside(order, stop, engine), engine.trial(order)):
        assert evidence.detail == "the agent was stopped"
        assert evidence.latency is None
    assert trial_children(os.getpid()) == []


def test_a_trial_that_waits_for_its_turn_ends_with_its_engine_and_keeps_nobody_waiting(model: Path) -> None:
    source = ModelSource("onnx", str(model))
    long = TrialOrder(source, health_plan(soak_ms=LONG_SOAK_MS), TIER_BYTES)
    first, second, third = LocalEngine(), LocalEngine(), LocalEngine()
    results: dict[str, TrialEvidence] = {}

    def wait(name: str, engine: LocalEngine) -> threading.Thread:
        order = TrialOrder(source, health_plan(), TIER_BYTES)
        thread = threading.Thread(target=lambda: results.update({name: engine.trial(order)}))
        thread.start()
        return thread

    def meanwhile(_child: psutil.Process) -> None:
        waiting = [wait("second", second), wait("third", third)]
        second.stop()
        waiting[0].join(WAIT_S)
        assert results["second"].detail == "the agent was stopped"
        assert "third" not in results
        first.stop()
        waiting[1].join(WAIT_S)

    assert run_aside(long, meanwhile, first).detail == "the agent was stopped"
    assert code_of(results["third"]) == ""


def test_trials_of_one_process_run_one_after_the_other(model: Path) -> None:
    order = TrialOrder(ModelSource("onnx", str(model)), health_plan(), TIER_BYTES)
    results: list[TrialEvidence] = []
    threads = [threading.Thread(target=lambda: results.append(LocalEngine().trial(order))) for _ in range(2)]
    at_once = 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        at_once = max(at_once, len(trial_children(os.getpid())))
        threads[-1].join(0.005)
    assert at_once == 1
    assert [code_of(evidence) for evidence in results] == ["", ""]


def test_an_interpreter_that_is_not_there_is_no_evidence_against_the_model(
    model: Path, tmp_path: Path
) -> None:
    order = TrialOrder(ModelSource("onnx", str(model)), health_plan(), TIER_BYTES)
    with pytest.raises(EngineError, match="no process for the trial"):
        LocalEngine(python=str(tmp_path / "no-python")).trial(order)


def program(path: Path, lines: str) -> str:
    """An interpreter that is none: it does what `lines` of shell say, whatever it is asked to run."""
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "detail"),
    [
        ("echo out of luck >&2; exit 3", "ended with status 3 and no result: out of luck"),
        ("echo hello", "the trial's process wrote what is no progress line"),
        ("head -c 300000 /dev/zero; sleep 60", "the trial's process wrote a line without an end"),
        (
            """echo '{"type":"measured","passed":8,"latencies_ms":[],"memory_peak_bytes":1}'""",
            "the trial's process gave figures that cannot be",
        ),
        (
            """echo '{"type":"measured","passed":8,"latencies_ms":[-1.0],"memory_peak_bytes":1}'""",
            "the trial's process gave figures that cannot be",
        ),
        ("""echo '{"type":"troubled","detail":""}'""", "the model did not answer"),
        ("head -c 3000000 /dev/zero >&2; exit 1", "ended with status 1 and no result"),
    ],
)
def test_whatever_the_process_says_is_at_most_evidence(
    tmp_path: Path, model: Path, lines: str, detail: str
) -> None:
    order = TrialOrder(ModelSource("onnx", str(model)), health_plan(), TIER_BYTES)
    evidence = LocalEngine(python=program(tmp_path / "child", lines)).trial(order)
    assert evidence.detail.startswith(detail)
    assert evidence.latency is None
    assert code_of(evidence) == "trial.crashed"


def test_what_the_process_started_itself_ends_with_it(tmp_path: Path, model: Path) -> None:
    note = tmp_path / "pid"
    lines = f"sleep 600 & echo $! > {note}; echo nonsense"
    order = TrialOrder(ModelSource("onnx", str(model)), health_plan(), TIER_BYTES)
    LocalEngine(python=program(tmp_path / "child", lines)).trial(order)
    assert wait_until(lambda: is_gone(int(note.read_text())), WAIT_S)


def test_a_trial_dies_with_the_agent(model: Path) -> None:
    agent = subprocess.Popen([sys.executable, "-c", PARENT, str(model), str(LONG_SOAK_MS)])
    try:
        assert wait_until(lambda: trial_children(agent.pid), WAIT_S)
        child = trial_children(agent.pid)[0]
        assert wait_until(lambda: has_loaded_runtime(child), WAIT_S)
    finally:
        agent.kill()
        agent.wait()
    assert wait_until(lambda: is_gone(child.pid), WAIT_S)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_prompt_that_is_asked_again_for_more_samples_counts_once(model: Path) -> None:
    one = prompts()[:1]
    evidence = try_model(model, health_plan(prompts=one))
    assert (evidence.prompts_passed, evidence.prompts_total) == (1, 1)
    assert code_of(evidence, health_plan(prompts=one)) == ""


@pytest.mark.llama
def test_a_text_model_is_judged_by_what_it_finds_likely() -> None:
    model = ModelSource("llama", str(language_model()))
    paris = TextPrompt(
        name="paris", prompt="The capital of France is", completion=" Paris", logprob_mean_min=-6.0
    )
    silly = TextPrompt(
        name="silly", prompt="The capital of France is", completion=" wheelbarrow", logprob_mean_min=-6.0
    )
    plan = health_plan(prompts=[paris, silly])
    evidence = LocalEngine().trial(TrialOrder(model, plan, 2 << 30))
    assert evidence.detail == ""
    assert (evidence.prompts_passed, evidence.prompts_total) == (1, 2)
    assert code_of(evidence, plan, 2 << 30) == "trial.answers"
