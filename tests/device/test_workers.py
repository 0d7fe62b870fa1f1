"""Long work of many devices on few threads, and how it ends."""

import threading
from pathlib import Path

import pytest

from device.adapters.disk import RealDisk
from device.adapters.engines import LocalEngine
from device.adapters.workers import WorkerPool
from device.ports import ModelSource, TrialOrder
from protocol.errors import StorageError
from tests.models import health_plan, write_classifier

WAIT_S = 30.0


def no_bug(error: Exception) -> None:
    raise AssertionError from error


def order(folder: Path) -> TrialOrder:
    """A trial that would go on for an hour."""
    model = write_classifier(folder / "model.onnx", seed=1)
    return TrialOrder(ModelSource("onnx", str(model)), health_plan(soak_ms=3_600_000), 1 << 30)


def test_work_of_one_device_runs_in_order_and_never_at_the_same_time() -> None:
    pool = WorkerPool(threads=4)
    seen: dict[int, list[int]] = {device: [] for device in range(8)}
    running = [threading.Lock() for _ in seen]
    queues = [pool.for_device(no_bug) for _ in seen]
    done = threading.Barrier(len(seen) + 1)

    def work(device: int, number: int) -> None:
        assert running[device].acquire(blocking=False), "two at a time"
        seen[device].append(number)
        running[device].release()

    for number in range(100):
        for device in seen:
            queues[device].submit(lambda device=device, number=number: work(device, number))  # type: ignore[misc]
    waiters = [threading.Event() for _ in seen]
    for device in seen:
        queues[device].submit(waiters[device].set)
    assert all(waiter.wait(WAIT_S) for waiter in waiters)
    done.abort()
    pool.close()
    assert all(numbers == list(range(100)) for numbers in seen.values())


def test_a_bug_in_work_is_told_and_what_comes_after_it_still_runs() -> None:
    pool = WorkerPool(threads=1)
    bugs: list[Exception] = []
    seen: list[int] = []
    workers = pool.for_device(bugs.append)
    ended = threading.Event()

    def bug() -> None:
        seen.pop()

    workers.submit(bug)
    workers.submit(ended.set)
    assert ended.wait(WAIT_S)
    pool.close()
    assert [type(bug) for bug in bugs] == [IndexError]


def test_work_that_waits_is_dropped_when_a_device_stops() -> None:
    pool = WorkerPool(threads=1)
    workers = pool.for_device(no_bug)
    begun, may_end = threading.Event(), threading.Event()
    ran: list[int] = []

    def hold() -> None:
        begun.set()
        may_end.wait(WAIT_S)

    workers.submit(hold)
    workers.submit(lambda: ran.append(1))
    assert begun.wait(WAIT_S)
    workers.stop()
    may_end.set()
    pool.close()
    assert not ran


def test_stopping_waits_for_work_that_runs() -> None:
    pool = WorkerPool(threads=1)
    workers = pool.for_device(no_bug)
    begun, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def hold() -> None:
        begun.set()
        may_end.wait(WAIT_S)
        ended.append(1)

    workers.submit(hold)
    assert begun.wait(WAIT_S)
    threading.Timer(0.05, may_end.set).start()
    workers.stop(WAIT_S)
    assert ended
    pool.close()


def test_a_closed_disk_takes_and_gives_nothing(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "state")
    disk.prepare()
    disk.create("file", 10)
    disk.close()
    for use in (
        lambda: disk.write("file", 0, b"x"),
        lambda: disk.read("file", 0, 1),
        lambda: disk.create("y", 1),
    ):
        with pytest.raises(StorageError, match="has ended"):
            use()
    assert (tmp_path / "state" / "file").read_bytes() == bytes(10)


def test_a_trial_is_broken_off_when_the_agent_ends_and_so_is_one_that_waits_for_its_turn(
    tmp_path: Path,
) -> None:
    trial = order(tmp_path)
    engines = [LocalEngine(), LocalEngine()]
    details: list[str] = []
    threads = [
        threading.Thread(target=lambda engine=engine: details.append(engine.trial(trial).detail))
        for engine in engines
    ]
    for thread in threads:
        thread.start()
    for engine, thread in zip(engines, threads, strict=True):
        engine.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert details == ["the agent was stopped"] * 2
