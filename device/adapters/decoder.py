"""Deltas decoded in a child process without rights, which costs a crash of it at most: the `Decoder` port on a device.

The child (`decoder_child.py`) reads the base and the delta, writes the result, and nothing else of this machine (`confinement.py`). It
stays for the steps of one file. What it says is bounded and, like what it writes, believed only as far as digests go: the agent
measures the result before anything runs it.
"""

import logging
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from device.adapters.confinement import Confinement
from device.adapters.foreign_text import one_line
from device.adapters.priority import DEFAULT_PRIORITY, Priority
from device.decoding import Decoded, DeltaJob, RewriteJob
from device.ports import Disk
from protocol.delta.format import Header
from protocol.errors import (
    DamagedJournalError,
    InverseFullError,
    NotInPlaceError,
    PatchError,
    PatchLimitError,
    StorageError,
    StorageFullError,
    StorageReadOnlyError,
    TruncatedPatchError,
    WhimbrelError,
    WrongBaseError,
)

STEP_S_MAX: Final = 3600.0
"""For a step of 8 or 16 MiB: the Python reference on the slowest board takes minutes."""

START_S_MAX: Final = 60.0
"""Until the child is up: an interpreter that starts from a cold, slow card."""

IDLE_S_MAX: Final = 30.0
"""A child that is asked nothing for so long ends: an update may be held for hours between two steps."""

MESSAGE_BYTES_MAX: Final = 1 << 20
"""A state of a reader, and a name for each file."""

LENGTH: Final = struct.Struct("<I")
"""Before each message, in both directions."""

_STDERR_BYTES_MAX: Final = 4096
_LOG: Final = logging.getLogger(__name__)
_ERRORS: Final[dict[str, type[WhimbrelError]]] = {
    kind.code: kind
    for kind in (
        PatchError,
        TruncatedPatchError,
        WrongBaseError,
        PatchLimitError,
        NotInPlaceError,
        StorageError,
        StorageFullError,
        StorageReadOnlyError,
        InverseFullError,
        DamagedJournalError,
    )
}
"""What a child may raise here."""


class Start(Struct, frozen=True, kw_only=True):
    """The first message to a child.

    Attributes:
        folder: State folder of the device.
        job: Which files it will work on.
        parent: Process id of the one that waits.
        priority: How far it gives way.
        file_bytes_max: No file that it writes gets longer.
        idle_s_max: It ends when it is asked nothing for so long.
    """

    folder: str
    job: DeltaJob | RewriteJob
    parent: int
    priority: Priority
    file_bytes_max: int
    idle_s_max: float


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """The child is confined. Nothing was decoded before."""

    confinement: Confinement


class Step(Struct, frozen=True, kw_only=True):
    """An order: the next step of the job; with the state, where the job has one."""

    state: bytes = b""


class Rewritten(Struct, frozen=True, kw_only=True, tag="rewritten"):
    """A step of a job in place is durable."""

    is_done: bool


class Failed(Struct, frozen=True, kw_only=True, tag="failed"):
    """A step raised one of our errors."""

    code: str
    message: str
    hint: str


Answer = Ready | Decoded | Rewritten | Failed
_answer_decoder: Final = msgspec.msgpack.Decoder(Answer)


def framed(message: Struct) -> bytes:
    """A message as it goes over a pipe."""
    data = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(data)) + data


class _GoneError(Exception):
    """The child ended in peace, before it read what it was asked."""


class ChildDecoder:
    """The `Decoder` port: one child at a time, for one file.

    Args:
        python: Interpreter for the child.
        priority: How far it gives way to what serves.
        idle_s_max: It ends when it is asked nothing for so long.
    """

    def __init__(
        self,
        python: str = sys.executable,
        priority: Priority = DEFAULT_PRIORITY,
        idle_s_max: float = IDLE_S_MAX,
    ) -> None:
        self._python: Final = python
        self._priority: Final = priority
        self._idle_s_max: Final = idle_s_max
        self._asking: Final = threading.Lock()
        self._lock: Final = threading.Lock()
        self._child: _Child | None = None
        self._is_stopped = False

    def decode(self, disk: Disk, job: DeltaJob, state: bytes) -> Decoded:
        """See `Decoder.decode`."""
        answer = self._ask(disk, job, state)
        if not isinstance(answer, Decoded):
            self._end()
            raise PatchError("the process that decoded the delta gave a wrong answer")
        if answer.is_finished:
            self._end()
        return answer

    def rewrite(self, disk: Disk, job: RewriteJob) -> bool:
        """See `Decoder.rewrite`."""
        answer = self._ask(disk, job, b"")
        if not isinstance(answer, Rewritten):
            self._end()
            raise PatchError("the process that decoded the delta gave a wrong answer")
        if answer.is_done:
            self._end()
        return answer.is_done

    def stop(self) -> None:
        """Break off what is under way, and every later step: the agent is about to end."""
        with self._lock:
            self._is_stopped = True
            if self._child is not None:
                self._child.kill()
        with self._asking:  # whoever asks has noticed
            self._end()

    def _ask(self, disk: Disk, job: DeltaJob | RewriteJob, state: bytes) -> Answer:
        with self._asking:
            for _ in range(2):  # one that was idle may have left
                try:
                    return self._child_for(disk, job).ask(Step(state=state), STEP_S_MAX)
                except _GoneError:
                    self._end()
                except WhimbrelError:
                    self._end()
                    raise
            raise StorageError("the process that decodes deltas ends at once")

    def _child_for(self, disk: Disk, job: DeltaJob | RewriteJob) -> "_Child":
        with self._lock:
            if self._is_stopped:
                raise StorageError("the agent was stopped")
            child = self._child
            if child is None or child.job != job:
                if child is not None:
                    child.end()
                start = Start(
                    folder=disk.path("."),
                    job=job,
                    parent=os.getpid(),
                    priority=self._priority,
                    file_bytes_max=_file_bytes_max(disk, job),
                    idle_s_max=self._idle_s_max,
                )
                child = self._child = _Child(start, self._python)
        child.wait_ready()
        return child

    def _end(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """One process, from its start to its end. A thread lives as long as it does: the kernel ends it with the thread that started it."""

    def __init__(self, start: Start, python: str) -> None:
        self.job: Final = start.job
        self._start: Final = start
        self._is_ready = False
        self._errors: Final = os.fdopen(os.memfd_create("decoder-errors"), "r+b")
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble: OSError | None = None
        begun = threading.Event()
        self._thread: Final = threading.Thread(
            target=self._live, args=(python, begun), name="whimbrel-decoder", daemon=True
        )
        self._thread.start()
        begun.wait()

    def wait_ready(self) -> None:
        """Wait until it is confined.

        Raises:
            StorageError: It cannot be started, which says nothing about the delta.
        """
        if self._is_ready:
            return
        if self._trouble is not None:
            raise StorageError(f"no process for decoding deltas could be started: {self._trouble}")
        try:
            answer = self.ask(self._start, START_S_MAX)
        except (PatchError, _GoneError) as error:
            raise StorageError(f"no process for decoding deltas could be started: {error}") from error
        if not isinstance(answer, Ready):
            raise StorageError("no process for decoding deltas could be started: it is another program")
        self._is_ready = True
        level = logging.INFO if answer.confinement.is_complete else logging.WARNING
        _LOG.log(level, "delta decoder confined: %s", answer.confinement)

    def ask(self, message: Struct, timeout_s: float) -> Answer:
        """Send a message and wait for the answer.

        Raises:
            _GoneError: The child ended in peace.
            PatchError: It crashed, hung, or said what nobody understands.
            StorageError: It was killed; or what it answered.
        """
        try:
            answer: Answer = _answer_decoder.decode(self._exchange(framed(message), timeout_s))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PatchError("the process that decoded the delta said what is no answer") from error
        if isinstance(answer, Failed):
            kind = _ERRORS.get(answer.code, PatchError)
            raise kind(one_line(answer.message), hint=one_line(answer.hint))
        return answer

    def kill(self) -> None:
        """Kill it; whoever waits for an answer notices."""
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """Kill it, and reap it."""
        process = self._process
        self.kill()
        self._thread.join()
        for stream in (process.stdin, process.stdout) if process is not None else ():
            if stream is not None:
                stream.close()
        self._errors.close()

    def _live(self, python: str, begun: threading.Event) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        try:
            self._process = subprocess.Popen(
                [python, "-B", "-m", "device.adapters.decoder_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,
                cwd=Path(__file__).resolve().parents[2],  # the child runs the code that this process runs
                env=environment,
            )
        except OSError as error:
            self._trouble = error
        finally:
            begun.set()
        if self._process is not None:
            self._process.wait()

    def _exchange(self, data: bytes, timeout_s: float) -> bytes:
        """Write a framed message and read one, within a time."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        to_child, from_child = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(to_child, False)
        os.set_blocking(from_child, False)
        unsent, received, end_s = memoryview(data), b"", time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(to_child, selectors.EVENT_WRITE)
            selector.register(from_child, selectors.EVENT_READ)
            while True:
                ready = selector.select(max(0.0, end_s - time.monotonic()))
                if not ready:
                    raise PatchError(f"decoding did not come to an end within {timeout_s:.0f} s")
                for key, _ in ready:
                    if key.fd == from_child:
                        part = os.read(from_child, 1 << 16)
                        if not part:
                            self._explain_end()
                        received += part
                        continue
                    try:
                        unsent = unsent[os.write(to_child, unsent) :]
                    except BrokenPipeError:
                        unsent = unsent[:0]  # why, its end will tell
                    if not unsent:
                        selector.unregister(to_child)
                if (answer := _first(received)) is not None:
                    return answer

    def _explain_end(self) -> None:
        """The child closed its output: say why.

        Raises:
            Exception: Always, as `ask`.
        """
        assert self._process is not None
        try:
            status = self._process.wait(START_S_MAX)
        except subprocess.TimeoutExpired:
            raise PatchError("the process that decoded the delta closed its output and went on") from None
        if status == 0:
            raise _GoneError
        if status == -signal.SIGKILL:
            raise StorageError(
                "the process that decoded the delta was killed", hint="the device may be short of memory"
            )
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        raise PatchError(f"the delta ended the process that decoded it {how}{self._last_words()}")

    def _last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _STDERR_BYTES_MAX))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {one_line(lines[-1])}" if lines else ""


def _first(received: bytes) -> bytes | None:
    """The first message among what was received, once it is all there."""
    if len(received) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(received)
    if length > MESSAGE_BYTES_MAX:
        raise PatchError("the process that decoded the delta said more than is accepted")
    whole = LENGTH.size + length
    if len(received) > whole:
        raise PatchError("the process that decoded the delta said more than it was asked")
    return received[LENGTH.size :] if len(received) == whole else None


def _file_bytes_max(disk: Disk, job: DeltaJob | RewriteJob) -> int:
    if isinstance(job, DeltaJob):
        return job.length
    header = Header.unpack(job.header)
    lengths: list[int] = [disk.length(name) or 0 for name in (job.journal, job.inverse)]
    return max(header.base_length, header.result_length, *lengths)
