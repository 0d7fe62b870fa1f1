"""How installations and trials give way: the priorities of real threads and processes."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from device.adapters.engines import LocalEngine
from device.adapters.priority import DEFAULT_PRIORITY, Priority, gently
from device.config import load_config
from device.executor import Executor
from device.ports import ModelSource, TrialOrder
from protocol.constants import CHUNK_BYTES
from protocol.errors import StorageError
from protocol.ids import digest_of
from tests.device.harness import DEVICE, TOPICS, Cache, Device, fine_tuned, model_bytes
from tests.device.test_trial_process import trial_children
from tests.models import health_plan, write_classifier
from tests.server.brokers import wait_until

WAIT_S = 60.0
IOPRIO_GET = {"x86_64": 252, "aarch64": 31}.get(platform.machine())
V1 = model_bytes(1, 4 * CHUNK_BYTES)
V2 = fine_tuned(V1, 2)


def nice_of(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def io_of(thread: int) -> int:
    assert IOPRIO_GET is not None
    return int(ctypes.CDLL(None).syscall(IOPRIO_GET, 1, thread))


def own() -> tuple[int, int, int]:
    thread = threading.get_native_id()
    return thread, nice_of(thread), io_of(thread) if IOPRIO_GET else 0


@pytest.mark.parametrize(("io", "level"), [("low", 2 << 13 | 7), ("idle", 3 << 13), ("normal", None)])
def test_gentle_work_gives_way_and_nothing_else_does(io: str, level: int | None) -> None:
    before = own()
    priority = Priority(min(before[1] + 5, 19), io)  # type: ignore[arg-type]  # one of three
    thread, nice, io_level = gently(priority, own)
    assert thread != before[0]
    assert nice == priority.nice
    if IOPRIO_GET:
        assert io_level == (before[2] if level is None else level)
    assert own() == before


def test_what_gentle_work_starts_gives_way_too() -> None:
    priority = Priority(19, "idle")
    command = [sys.executable, "-c", "import os; print(os.nice(0))"]
    assert gently(priority, lambda: subprocess.check_output(command)) == b"19\n"


def test_who_is_nicer_already_stays_so() -> None:
    nice = max(17, os.nice(0))
    assert gently(Priority(nice), lambda: gently(Priority(3), own))[1] == nice


def test_gentle_work_raises_what_it_raises() -> None:
    def work() -> None:
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"):
        gently(DEFAULT_PRIORITY, work)


def test_a_trial_has_the_priority_that_the_configuration_gives(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model.onnx", seed=1)
    order = TrialOrder(ModelSource("onnx", str(model)), health_plan(soak_ms=600_000), 1 << 30)
    nice = max(13, os.nice(0))
    engine = LocalEngine(priority=Priority(nice, "idle"))
    trial = threading.Thread(target=engine.trial, args=(order,))
    trial.start()
    try:
        assert wait_until(lambda: any(child.nice() == nice for child in trial_children(os.getpid())), WAIT_S)
        (child,) = trial_children(os.getpid())
        assert wait_until(lambda: child.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE, WAIT_S)
    finally:
        engine.stop()
        trial.join(WAIT_S)


def test_installing_and_reading_back_are_gentle_and_loading_what_will_serve_is_not() -> None:
    cache = Cache()
    for version, model in (("v1", V1), ("v2", V2)):
        cache.publish(version, model)
    cache.publish_delta(V1, V2)
    device = Device(cache, V1)
    names: list[str] = []
    is_gentle = False

    def gentle(work: Callable[[], object]) -> object:
        nonlocal is_gentle
        names.append(getattr(work, "func", work).__name__)
        is_gentle = True
        try:
            return work()
        finally:
            is_gentle = False

    load = device.engine.load
    loads: list[bool] = []

    def watched_load(source: ModelSource) -> object:
        loads.append(is_gentle)
        return load(source)

    device.engine.load = watched_load  # type: ignore[method-assign, assignment]  # to see who calls it
    device.executor = Executor(
        disk=device.disk,
        transport=device,
        engine=device.engine,
        workers=device,
        post=device.queue.append,
        gently=gentle,
    )
    device.queue.clear()
    device.queue.append(device.executor.boot_event(1 << 30))
    device.connect()
    device.settle()
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle()
    assert device.answer() == digest_of(V2)
    assert set(names) == {"open_blob", "install_step", "measure_slot"}
    assert loads == [False, False]


def test_priorities_come_from_a_table(tmp_path: Path) -> None:
    main = 'device = "pi-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'
    (tmp_path / "device.toml").write_text(main)
    assert _priority(tmp_path) == tuple(DEFAULT_PRIORITY)
    (tmp_path / "device.toml").write_text(f'{main}[priority]\nnice = 0\nio = "idle"\n')
    assert _priority(tmp_path) == (0, "idle")


def _priority(folder: Path) -> tuple[int, object]:
    priority = load_config(folder / "device.toml").priority
    return priority.nice, priority.io
