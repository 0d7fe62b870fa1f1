"""A trial seen from outside: starts the child, watches its clock and its memory, and turns what it says into evidence.

The child (`trial_child.py`) runs code of a model runtime over a file that nobody has run here before: it may crash, hang,
eat all memory or write nonsense. Nothing of that reaches this process but lines of bounded length on a pipe.
"""

import contextlib
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec
from msgspec import Struct

from device.adapters.confinement import Confinement
from device.adapters.foreign_text import one_line
from device.adapters.priority import DEFAULT_PRIORITY, Priority
from device.compute import ON_PROCESSOR, Compute
from device.ports import TrialOrder
from protocol.errors import EngineError
from protocol.messages import LatencySummary, TrialEvidence
from protocol.release import HealthPlan

LATENCY_SAMPLES_MIN: Final = 50
"""Class prompts are repeated until there are so many: a percentile of a handful of inferences says nothing."""

LATENCY_SAMPLES_MAX: Final = 2048
"""Samples that the child keeps of a long soak, each inference with the same chance."""

BEAT_MS: Final = 20
"""The child speaks at most this often, so that a fast model does not spend its time on talking."""

_START_TIMEOUT_MS: Final = 60_000
"""Until the child's first line: an interpreter that starts from a cold, slow card."""

_MEMORY_POLL_MS: Final = 30
"""How often the resident set is looked at: what a model can take in between stays well under a device's reserve."""

_EXIT_TIMEOUT_MS: Final = 5_000
"""Between the end of the child's output and its end."""

_LINE_BYTES_MAX: Final = 128 * 1024
"""A line of the child: the result with all its samples."""

_STDERR_BYTES_MAX: Final = 4096
"""What is kept of the end of the child's error output."""

_STOPPED_DETAIL: Final = "the agent was stopped"
_DETAIL_CHARS_MAX: Final = 400


class ChildOrder(Struct, frozen=True, kw_only=True):
    """What the child gets on its standard input.

    Attributes:
        order: The trial.
        parent: Process id of the one that waits for the answer.
        priority: How far the trial gives way.
        compute: Where the model runs: where it will run when it serves.
    """

    order: TrialOrder
    parent: int
    priority: Priority = DEFAULT_PRIORITY
    compute: Compute = ON_PROCESSOR


class Started(Struct, frozen=True, kw_only=True, tag="started"):
    """The child is up and confined; loading begins.

    Attributes:
        confinement: What its kernel granted.
    """

    confinement: Confinement


class Loaded(Struct, frozen=True, kw_only=True, tag="loaded"):
    """The model is loaded.

    Attributes:
        load_ms: Import of the runtime and load of the file.
    """

    load_ms: float


class Answering(Struct, frozen=True, kw_only=True, tag="answering"):
    """An answer came in time; at most one such line per `BEAT_MS`.

    Attributes:
        passed: Prompts answered well so far.
    """

    passed: int


class Measured(Struct, frozen=True, kw_only=True, tag="measured"):
    """The trial ran to its end.

    Attributes:
        passed: Prompts answered well.
        latencies_ms: Of single inferences, unordered.
        memory_peak_bytes: Largest resident set of the child.
    """

    passed: int
    latencies_ms: list[float]
    memory_peak_bytes: int


class Troubled(Struct, frozen=True, kw_only=True, tag="troubled"):
    """The model could not be loaded or did not answer."""

    detail: str


_LOG: Final = logging.getLogger(__name__)

Line = Started | Loaded | Answering | Measured | Troubled
_order_encoder = msgspec.json.Encoder()
_line_decoder: Final = msgspec.json.Decoder(Line)


class _Turn:
    """One trial at a time in a process: its latency must not measure the neighbours. Waiting costs a thread and no time of a processor."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken = False

    def take(self, is_stopped: Callable[[], bool]) -> bool:
        """Wait for the turn; false, and no turn, once `is_stopped`."""
        with self._changed:
            self._changed.wait_for(lambda: is_stopped() or not self._is_taken)
            if is_stopped():
                self._changed.notify()  # we may have been told in place of another
                return False
            self._is_taken = True
            return True

    def give_back(self) -> None:
        """The trial is over."""
        with self._changed:
            self._is_taken = False
            self._changed.notify()

    def look_again(self) -> None:
        """Somebody who waits may have been stopped."""
        with self._changed:
            self._changed.notify_all()


_turn: Final = _Turn()


def release_stopped() -> None:
    """Let trials that wait for their turn notice that they were stopped."""
    _turn.look_again()


def run_trial(
    order: TrialOrder,
    python: str = sys.executable,
    is_stopped: Callable[[], bool] = lambda: False,
    priority: Priority = DEFAULT_PRIORITY,
    compute: Compute = ON_PROCESSOR,
) -> TrialEvidence:
    """Try a model in a process of its own.

    Args:
        order: The trial; its limits are enforced from here.
        python: Interpreter for the child.
        is_stopped: Asked all the time; once it says so, the trial is broken off. While others of this process run, it is asked
            again after `release_stopped`.
        priority: How far the trial gives way to what serves.
        compute: Where the model runs.

    Raises:
        EngineError: No child could be started, which says nothing about the model.
    """
    if not _turn.take(is_stopped):  # before any clock starts
        return TrialEvidence(
            prompts_passed=0, prompts_total=len(order.health.prompts), detail=_STOPPED_DETAIL
        )
    try:
        child = _start(
            ChildOrder(order=order, parent=os.getpid(), priority=priority, compute=compute), python
        )
        watch = _Watch(child, order, is_stopped)
        try:
            watch.follow()
            return watch.evidence()
        finally:
            _end(child)
    finally:
        _turn.give_back()


class _Watch:
    """Follows one child from its first line to its last."""

    def __init__(
        self, child: "subprocess.Popen[bytes]", order: TrialOrder, is_stopped: Callable[[], bool]
    ) -> None:
        self._child = child
        self._is_stopped = is_stopped
        self._health = order.health
        self._memory_bytes_max = min(order.health.memory_peak_bytes_max, order.memory_bytes_max)
        self._memory_peak_bytes: int | None = None
        self._passed = 0
        self._load_ms: float | None = None
        self._measured: Measured | None = None
        self._detail = ""
        self._unread = b""
        self._stderr = b""
        now_ms = _now_ms()
        self._end_ms = now_ms + _trial_ms_max(order.health)
        self._silence_ms_max = _START_TIMEOUT_MS
        self._silence_detail = f"the trial's process did not start within {_START_TIMEOUT_MS} ms"
        self._heard_ms = now_ms

    def follow(self) -> None:
        """Return when the child has given its result, has ended, or has passed a limit."""
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        with selectors.DefaultSelector() as selector:
            for stream in (self._child.stdout, self._child.stderr):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            memory_ms = 0.0
            while not self._is_over():
                now_ms = _now_ms()
                if now_ms >= memory_ms:
                    memory_ms = now_ms + _MEMORY_POLL_MS
                    self._look_at_memory()
                for key, _ in selector.select(_MEMORY_POLL_MS / 1000):
                    if not self._read(key.fd, is_error=key.fileobj is self._child.stderr):
                        selector.unregister(key.fileobj)
                if self._is_over():
                    return
                if self._child.stdout not in selector.get_map():
                    self._explain_end(self._child.stderr)
                    return
                self._look_at_clock()

    def evidence(self) -> TrialEvidence:
        """What was measured; where there was trouble, no latency and one line that names it."""
        latency = _summary(self._measured) if self._measured is not None and not self._detail else None
        if self._measured is not None:
            self._memory_peak_bytes = max(self._measured.memory_peak_bytes, self._memory_peak_bytes or 0)
        return TrialEvidence(
            prompts_passed=self._passed,
            prompts_total=len(self._health.prompts),
            load_ms=self._load_ms,
            latency=latency,
            memory_peak_bytes=self._memory_peak_bytes,
            detail=one_line(self._detail, _DETAIL_CHARS_MAX),
        )

    def _is_over(self) -> bool:
        return bool(self._detail) or self._measured is not None

    def _read(self, descriptor: int, *, is_error: bool) -> bool:
        """Take what there is; false at the end of the stream."""
        try:
            data = os.read(descriptor, 65_536)
        except BlockingIOError:
            return True
        if is_error:
            self._stderr = (self._stderr + data)[-_STDERR_BYTES_MAX:]
            return bool(data)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if not self._is_over():
                self._hear(line)
        if len(self._unread) > _LINE_BYTES_MAX:
            self._detail = "the trial's process wrote a line without an end"
        return bool(data)

    def _hear(self, data: bytes) -> None:
        try:
            line = _line_decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._detail = "the trial's process wrote what is no progress line"
            return
        self._heard_ms = _now_ms()
        match line:
            case Started():
                _LOG.log(
                    logging.INFO if line.confinement.is_complete else logging.WARNING,
                    "trial confined: %s",
                    line.confinement,
                )
                self._silence_ms_max = self._health.load_timeout_ms
                self._silence_detail = f"not loaded within {self._health.load_timeout_ms} ms"
            case Loaded():
                self._load_ms = line.load_ms
                self._silence_ms_max = self._health.prompt_timeout_ms + BEAT_MS
                self._silence_detail = f"no answer within {self._health.prompt_timeout_ms} ms"
            case Answering():
                self._passed = self._counted(line.passed)
            case Measured():
                self._passed = self._counted(line.passed)
                self._measured = line
                if not _is_plausible(line):
                    self._detail = "the trial's process gave figures that cannot be"
            case Troubled():
                self._detail = line.detail or "the model did not answer"

    def _counted(self, passed: int) -> int:
        return max(0, min(passed, len(self._health.prompts)))

    def _look_at_memory(self) -> None:
        resident = _resident_bytes(self._child.pid)
        if resident:
            self._memory_peak_bytes = max(resident, self._memory_peak_bytes or 0)
        if resident > self._memory_bytes_max:
            self._detail = f"resident set passed {self._memory_bytes_max} bytes"

    def _look_at_clock(self) -> None:
        now_ms = _now_ms()
        if now_ms - self._heard_ms > self._silence_ms_max:
            self._detail = self._silence_detail
        elif self._is_stopped():
            self._detail = _STOPPED_DETAIL
        elif now_ms > self._end_ms:
            self._detail = f"not finished within {_trial_ms_max(self._health)} ms"

    def _explain_end(self, stderr: IO[bytes]) -> None:
        """The child closed its output without a result: say how it ended, and what its last words were."""
        status = _exit_status(self._child.pid)
        while len(self._stderr) <= _STDERR_BYTES_MAX:
            before = self._stderr
            if not self._read(stderr.fileno(), is_error=True) or self._stderr == before:
                break
        if status is None:
            self._detail = "the trial's process closed its output and went on"
        elif status < 0:
            self._detail = f"killed by signal {-status}"
        else:
            self._detail = f"ended with status {status} and no result"
        lines = self._stderr.decode(errors="replace").strip().splitlines()
        if lines:
            self._detail += f": {one_line(lines[-1])}"


def _start(order: ChildOrder, python: str) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    try:
        # A file in memory: a pipe would block this process on a child that does not read.
        with os.fdopen(os.memfd_create("trial-order"), "w+b") as stdin:
            stdin.write(_order_encoder.encode(order))
            stdin.seek(0)
            return subprocess.Popen(
                # -B: the child may write next to nothing, and half a byte code file would outlive it.
                [python, "-B", "-m", "device.adapters.trial_child"],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd=Path(__file__).resolve().parents[2],  # the child runs the code that this process runs
                env=environment,
            )
    except OSError as error:
        raise EngineError(f"no process for the trial could be started: {error}") from error


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Kill whatever is left of the child's process group, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # not reaped yet: the id is still the child's
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def _exit_status(pid: int) -> int | None:
    """How a child ended, without reaping it: an exit status, or the negative signal; `None` where it goes on."""
    end_ms = _now_ms() + _EXIT_TIMEOUT_MS
    while _now_ms() < end_ms:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        time.sleep(0.005)
    return None


def _resident_bytes(pid: int) -> int:
    """Resident set of a process, zero where it has ended (proc_pid_statm(5): the second field, in pages)."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _trial_ms_max(health: HealthPlan) -> int:
    """The longest that a trial can take with each single limit kept."""
    answers = len(health.prompts) + LATENCY_SAMPLES_MIN + 2  # one to warm up, one that ends after the soak
    return (
        _START_TIMEOUT_MS
        + health.load_timeout_ms
        + answers * (health.prompt_timeout_ms + BEAT_MS)
        + health.soak_ms
    )


def _is_plausible(measured: Measured) -> bool:
    samples = measured.latencies_ms
    return (
        0 < len(samples) <= LATENCY_SAMPLES_MAX
        and all(math.isfinite(sample) and sample >= 0 for sample in samples)
        and measured.memory_peak_bytes > 0
    )


def _summary(measured: Measured) -> LatencySummary:
    """Percentiles by nearest rank: each is a latency that was measured."""
    ordered = sorted(measured.latencies_ms)
    p50, p95, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 95, 99))
    return LatencySummary(p50_ms=p50, p95_ms=p95, p99_ms=p99)


def _now_ms() -> float:
    return time.monotonic() * 1000
