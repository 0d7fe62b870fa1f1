"""Classifiers under onnxruntime, for the scorecard: in a worker only, since onnxruntime is large and may crash."""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.errors import EngineError
from server.scorecard.items import ClassQuestion, Item, Question, Reply
from server.scorecard.resident import peak_bytes, resident_bytes
from server.scorecard.work import (
    ContextMemory,
    Memory,
    MemoryOrder,
    Model,
    OperatorCost,
    Speed,
    SpeedOrder,
)

_PROCESSOR: Final = "CPUExecutionProvider"
_TELEMETRY: Final = ("ORT_DISABLE_TELEMETRY", "1")
_LOG_ERRORS: Final = 3
_DETAIL_CHARS_MAX: Final = 300
_WARM_INFERENCES: Final = 3
_SUM_TOLERANCE: Final = 1e-3
INPUT_TYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
"""Arrays of an input, by the name that onnxruntime has for its type."""


class OnnxEngine:
    """A loaded ONNX file.

    Args:
        model: Which file, how many threads.
        profile: Prefix of a file that gets the runtime's profile of what is run; graphs are then left as they are.

    Raises:
        EngineError: onnxruntime is missing or refuses the file.
    """

    def __init__(self, model: Model, profile: str = "") -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = model.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session: Any = ort.InferenceSession(model.path, options, providers=[_PROCESSOR])
        except Exception as error:  # onnxruntime has an exception for each of its codes
            raise EngineError(f"onnxruntime cannot load the file: {_line(error)}") from error
        self._input: Final = self._session.get_inputs()[0]

    def ask(self, question: Question) -> Reply:
        """See `Engine.ask`: the class with the highest score, as devices take it."""
        if not isinstance(question, ClassQuestion):
            raise EngineError("a classifier answers inputs of numbers only")
        output = self._outputs(question.input)[0].reshape(-1)
        if output.dtype.kind in "iu" and output.size == 1:
            return Reply(label=int(output[0]))
        if output.dtype.kind not in "iuf" or output.size < 2:
            raise EngineError(
                f"the model's first output, {output.dtype} {list(output.shape)}, names no class"
            )
        if not np.isfinite(output).all():
            raise EngineError("the model's scores are not finite")
        return Reply(label=int(output.argmax()))

    def rows(self, item: Item) -> npt.NDArray[np.float32]:
        """See `Engine.rows`: one row, of logits or of the logarithms of probabilities."""
        if not isinstance(item.question, ClassQuestion):
            raise EngineError("a classifier answers inputs of numbers only")
        for output in self._outputs(item.question.input):
            flat = output.reshape(-1)
            if flat.dtype.kind == "f" and flat.size > 1:
                if not np.isfinite(flat).all():
                    raise EngineError("the model's scores are not finite")
                wide = flat.astype(np.float64)
                if wide.min() >= 0 and abs(wide.sum() - 1) < _SUM_TOLERANCE:  # after a softmax of its own
                    wide = np.log(np.maximum(wide, np.finfo(np.float32).tiny))
                row: npt.NDArray[np.float32] = wide.astype(np.float32)[None, :]
                return row
        raise EngineError("the model gives no score for each class")

    def inputs(self) -> tuple[float, ...]:
        """Some input of the right size, for measurements."""
        sizes = [size if isinstance(size, int) and size > 0 else 1 for size in self._input.shape]
        return (0.0,) * math.prod(sizes)

    def end_profile(self) -> Path:
        """Write the profile."""
        return Path(self._session.end_profiling())

    def read(self, _tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """See `Engine.read`."""
        raise EngineError("a classifier has no tokens")

    def close(self) -> None:
        """See `Engine.close`."""
        self._session = None

    def _outputs(self, values: Sequence[float]) -> list[npt.NDArray[Any]]:
        shape = _shape_for(self._input.shape, len(values))
        kind = INPUT_TYPES.get(self._input.type)
        if shape is None or kind is None:
            raise EngineError(
                f"{len(values)} numbers do not fit the model's input {self._input.name}, {self._input.type} {self._input.shape}"
            )
        try:
            given = np.asarray(values, np.float64).astype(kind).reshape(shape)
            outputs = self._session.run(None, {self._input.name: given})
        except Exception as error:  # see above
            raise EngineError(f"onnxruntime gave no answer: {_line(error)}") from error
        tensors = [output for output in outputs if isinstance(output, np.ndarray) and output.size]
        if not tensors:
            raise EngineError("the model's outputs are no tensors")
        return tensors


def measure_speed(model: Model, order: SpeedOrder) -> Speed:
    """Load and infer, each timed by itself.

    Raises:
        EngineError: As `OnnxEngine`.
    """
    _onnxruntime()
    load_ms, step_ms = [], []
    for _ in range(order.loads):
        begin = time.perf_counter()
        engine = OnnxEngine(model)
        load_ms.append(1000 * (time.perf_counter() - begin))
    question = ClassQuestion(input=engine.inputs())
    for number in range(order.inferences + _WARM_INFERENCES):
        begin = time.perf_counter()
        engine.ask(question)
        if number >= _WARM_INFERENCES:
            step_ms.append(1000 * (time.perf_counter() - begin))
    return Speed(load_ms=tuple(load_ms), step_ms=tuple(step_ms))


def measure_memory(model: Model, _order: MemoryOrder) -> Memory:
    """Load and infer, look at the resident set, and then let the runtime say which operators it ran.

    Raises:
        EngineError: As `OnnxEngine`.
    """
    _onnxruntime()
    runtime = resident_bytes()
    engine = OnnxEngine(model)
    question = ClassQuestion(input=engine.inputs())
    engine.ask(question)
    weights = resident_bytes() - runtime
    contexts = (ContextMemory(tokens=0, cache_bytes=0, peak_bytes=peak_bytes()),)
    engine.close()
    with tempfile.TemporaryDirectory(prefix="whimbrel-score-") as folder:
        engine = OnnxEngine(model, profile=str(Path(folder) / "profile"))
        engine.ask(question)
        events = json.loads(engine.end_profile().read_bytes())
    return Memory(
        runtime_bytes=runtime,
        weights_bytes=max(0, weights),
        contexts=contexts,
        operators=tuple(_operators(events)),
    )


def _operators(events: list[dict[str, Any]]) -> list[OperatorCost]:
    """Those of onnxruntime's profile that ran a kernel; tensors are listed as `{type: shape}`."""
    found = []
    for event in events:
        told = event.get("args", {})
        if event.get("cat") == "Node" and "output_type_shape" in told:
            name = str(event.get("name", "")).removesuffix("_kernel_time")
            inputs, outputs = (
                _shapes(told.get(key, [])) for key in ("input_type_shape", "output_type_shape")
            )
            found.append(
                OperatorCost(
                    name=name,
                    kind=str(told.get("op_name", "")),
                    inputs=inputs,
                    outputs=outputs,
                    output_bytes=int(told.get("output_size", 0)),
                )
            )
    return found


def _shapes(listed: list[dict[str, list[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for tensor in listed for shape in tensor.values())


def _shape_for(declared: Sequence[int | str | None], length: int) -> tuple[int, ...] | None:
    """Shape of `length` values as a batch of one; None where they do not fit. One other dimension may be without a size."""
    sizes = [size if isinstance(size, int) and size > 0 else None for size in declared]
    if len(sizes) > 1 and sizes[0] is None:
        sizes[0] = 1
    known = math.prod(size for size in sizes if size is not None)
    unknown = sizes.count(None)
    if unknown > 1 or length % known or (unknown == 0 and known != length):
        return None
    return tuple(length // known if size is None else size for size in sizes)


def _onnxruntime() -> Any:
    os.environ.setdefault(*_TELEMETRY)
    try:
        import onnxruntime  # noqa: PLC0415 - a server without it scores other models
    except ModuleNotFoundError as error:
        raise EngineError(
            f"onnxruntime is not installed: {error}", hint="install whimbrel with the extra 'onnx'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"onnxruntime does not load: {_line(error)}", hint="install it anew") from error
    onnxruntime.set_default_logger_severity(_LOG_ERRORS)
    return onnxruntime


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:_DETAIL_CHARS_MAX] or type(error).__name__
