"""A bounded pool of threads in which each device's work runs in order, one piece at a time."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class WorkerPool:
    """Threads that the devices of one process share.

    Args:
        threads: How many pieces of work run at a time.
    """

    def __init__(self, threads: int = 2) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="whimbrel-worker")

    def for_device(self, on_bug: Callable[[Exception], None]) -> "DeviceWorkers":
        """The queue of one device.

        Args:
            on_bug: Told, in a thread of the pool, of an exception that work let out: it is a bug, and meant to be loud.
        """
        return DeviceWorkers(self._executor, on_bug)

    def close(self) -> None:
        """Let running work end, drop what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class DeviceWorkers:
    """Work of one device: the `Workers` port.

    Args:
        executor: The shared pool.
        on_bug: Told of an exception that work let out.
    """

    def __init__(self, executor: ThreadPoolExecutor, on_bug: Callable[[Exception], None]) -> None:
        self._executor = executor
        self._on_bug = on_bug
        self._lock = threading.Condition()
        self._is_busy = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_running = False
        self._is_stopped = False

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` after everything submitted before it."""
        with self._lock:
            if self._is_stopped:
                return
            self._waiting.append(work)
            if self._is_running:
                return
            self._is_running = True
        self._schedule()

    def stop(self, timeout_s: float = 0.0) -> None:
        """Drop what waits, and wait for what runs to end by itself, for a bounded time."""
        with self._lock:
            self._is_stopped = True
            self._waiting.clear()
            self._lock.wait_for(lambda: not self._is_busy, timeout_s)

    def _schedule(self) -> None:
        try:
            self._executor.submit(self._run_next)
        except RuntimeError:  # the pool is closed: the process is about to end
            self.stop()

    def _run_next(self) -> None:
        with self._lock:
            if not self._waiting:
                self._is_running = False
                return
            work = self._waiting.popleft()
            self._is_busy = True
        try:
            work()
        except Exception as error:  # noqa: BLE001 - nobody else would ever see it
            self._on_bug(error)
        finally:
            with self._lock:
                self._is_busy = False
                self._lock.notify_all()
            self._schedule()
