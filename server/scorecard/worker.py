"""The process that runs one model, and the handle by which another one uses it.

A process of its own, so that memory is the model's alone, and a runtime that dies or hangs costs one answer (ADR 8). This module is also the
child: `python -m server.scorecard.worker`, the model and the parent's number as arguments, orders on standard input, answers on standard output, each a frame of
four bytes of length and so many of MessagePack.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import IO, Final, Self

import msgspec
import numpy as np

from protocol.errors import EngineError
from server.scorecard import llama, onnx
from server.scorecard.work import (
    FRAME_BYTES_MAX,
    Answer,
    Ask,
    Compare,
    Done,
    Engine,
    Failed,
    Load,
    Memory,
    MemoryOrder,
    Model,
    Order,
    Quantize,
    Read,
    Replied,
    Rows,
    Speed,
    SpeedOrder,
)

ANSWER_S_MAX: Final = 900
"""After which a worker is taken for hung. The longest order is a measurement of memory: 8,192 tokens of a large model."""

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_LENGTH_BYTES: Final = 4
_DETAIL_CHARS_MAX: Final = 400

_encoder: Final = msgspec.msgpack.Encoder()
_orders: Final[msgspec.msgpack.Decoder[Order]] = msgspec.msgpack.Decoder(Order)
_answers: Final[msgspec.msgpack.Decoder[Answer]] = msgspec.msgpack.Decoder(Answer)


class Worker:
    """A running worker; a context manager.

    Args:
        model: What it runs.
        timeout_s: After which an answer is given up, and the worker ended.
    """

    def __init__(self, model: Model, timeout_s: float = ANSWER_S_MAX) -> None:
        self._timeout_s = timeout_s
        command = [sys.executable, "-m", __name__, msgspec.json.encode(model).decode(), str(os.getpid())]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise EngineError(f"no process for the model could be started: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

    def ask(self, order: Order) -> Answer:
        """Give an order and wait.

        Returns:
            The answer, never `Failed`.

        Raises:
            EngineError: The model cannot do it, or the worker died or hung; `is_alive` tells which.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        watch = threading.Timer(self._timeout_s, self._child.kill)
        watch.start()
        try:
            _write(self._child.stdin, _encoder.encode(order))
            data = _read(self._child.stdout)
        except OSError:
            data = None
        finally:
            watch.cancel()
        if data is None:
            raise EngineError(self._death())
        answer = _answers.decode(data)
        if isinstance(answer, Failed):
            raise EngineError(answer.detail)
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether another order makes sense."""
        return self._child.poll() is None

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not read
                    continue

    def _death(self) -> str:
        code = self._child.wait()
        if code == -signal.SIGKILL:
            return f"the runtime was killed: no answer within {self._timeout_s:g} s, or too little memory"
        if code < 0:
            return f"the runtime died of {signal.Signals(-code).name}"
        return f"the runtime ended with {code}"


def main() -> int:
    """The child: answers until its input ends."""
    ctypes.CDLL(None, use_errno=True).prctl(
        _PR_SET_PDEATHSIG, signal.SIGKILL
    )  # a measurement may take minutes
    if os.getppid() != int(sys.argv[2]):  # it died before the line above
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the whole group; the parent decides
    model = msgspec.json.decode(sys.argv[1], type=Model)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a runtime prints
    engine: Engine | None = None
    while (data := _read(sys.stdin.buffer)) is not None:
        answer: Answer
        try:
            order = _orders.decode(data)
            if isinstance(order, Load):
                engine = _engine(model)
                answer = Done()
            else:
                answer = _answer(engine, model, order)
        except (EngineError, MemoryError, ValueError) as error:
            answer = Failed(detail=str(error)[:_DETAIL_CHARS_MAX] or type(error).__name__)
        _write(out, _encoder.encode(answer))
    return 0


def _engine(model: Model) -> Engine:
    return llama.LlamaEngine(model) if model.runtime == "llama" else onnx.OnnxEngine(model)


def _answer(
    engine: Engine | None,
    model: Model,
    order: Ask | Compare | Read | Quantize | SpeedOrder | MemoryOrder,
) -> Answer:
    if isinstance(order, Quantize):
        if model.runtime != "llama":
            raise EngineError(f"{model.runtime} has no quantizer here")
        llama.quantize(model, order)
        return Done()
    if isinstance(order, SpeedOrder):
        speed: Speed = (llama if model.runtime == "llama" else onnx).measure_speed(model, order)
        return speed
    if isinstance(order, MemoryOrder):
        memory: Memory = (llama if model.runtime == "llama" else onnx).measure_memory(model, order)
        return memory
    if engine is None:
        raise EngineError("the model is not loaded")
    if isinstance(order, Ask):
        return Replied(reply=engine.ask(order.question))
    found = engine.read(order.tokens) if isinstance(order, Read) else engine.rows(order.item)
    rows = np.ascontiguousarray(found, np.float32)
    return Rows(width=rows.shape[1], data=rows.tobytes())


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(_LENGTH_BYTES, "little"))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    header = pipe.read(_LENGTH_BYTES)
    if len(header) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(header, "little")
    if length > FRAME_BYTES_MAX:
        return None
    data = pipe.read(length)
    return data if len(data) == length else None


if __name__ == "__main__":
    sys.exit(main())
