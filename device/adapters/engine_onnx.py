"""Classifiers under onnxruntime. The only module of the device that imports it, and only when a model is loaded."""

import functools
import logging
import math
import os
import re
import threading
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from device.adapters.foreign_text import one_line
from device.compute import ON_PROCESSOR, PROCESSOR, OnnxSettings, provider_options
from device.ports import Classified, QuestionError
from protocol.errors import EngineError
from protocol.release import ClassPrompt, Prompt

TELEMETRY: Final = ("ORT_DISABLE_TELEMETRY", "1")
"""Official builds from 1.32 on tell Microsoft about every session, unless this is in the environment before the import
(onnxruntime's Privacy.md). Nobody asked the owner of the device; whoever wants it sets the variable to 0."""

_LOG: Final = logging.getLogger(__name__)

_IDENTITY: Final = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178"
    "120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
"""A model that gives back its input, one number: what a provider that starts can run."""

_LOG_ERRORS: Final = 3
"""onnxruntime's severity "error": warnings about an odd processor would fill a device's log."""

_PLACE_IN_SOURCE: Final = re.compile(r"^\S+\.cc:\d+ .*?\([^()]*\) ")
"""Where in onnxruntime an error was raised, file and signature, which stands before what it says."""


class OnnxModel:
    """A loaded classifier; one answer at a time, from any thread.

    Args:
        session: An `onnxruntime.InferenceSession`.
    """

    def __init__(self, session: Any) -> None:
        inputs = session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            given = ", ".join(each.type for each in inputs) or "none"
            raise EngineError(f"the model's inputs are {given}; one tensor(float) is supported")
        self._lock: Final = threading.Lock()
        self._session: Any | None = session
        self._input_name: Final[str] = inputs[0].name
        self._input_shape: Final[list[int | str | None]] = list(inputs[0].shape)
        self._output_name: Final[str] = session.get_outputs()[0].name

    def answer(self, prompt: Prompt) -> str:
        """Classify one input: the number of the class with the highest score, or the label that the model names.

        Raises:
            EngineError: A text prompt, a wrong number of values, a result that names no class, or a closed model.
        """
        if not isinstance(prompt, ClassPrompt):
            raise EngineError(f"prompt {prompt.name} is text, and an ONNX model answers class prompts only")
        return _class_of(self._run(prompt.input, f"prompt {prompt.name}"))

    def classify(self, values: Sequence[float]) -> Classified:
        """Classify one input, with the scores of all classes.

        Raises:
            QuestionError: A wrong number of values.
            EngineError: A result that names no class, or a closed model.
        """
        output = self._run(values, "the input")
        label = _class_of(output)
        flat = output.reshape(-1)
        is_scores = output.dtype.kind in "iuf" and flat.size > 1
        return Classified(label, tuple(float(score) for score in flat) if is_scores else ())

    def _run(self, given: Sequence[float], name: str) -> Any:
        shape = _shape_for(self._input_shape, len(given))
        if shape is None:
            raise QuestionError(
                f"{name} has {len(given)} values, and the model's input has the shape {self._input_shape}"
            )
        values = np.asarray(given, dtype=np.float32).reshape(shape)
        with self._lock:  # `close` waits for a running answer
            if self._session is None:
                raise EngineError("the model is closed")
            try:
                return self._session.run([self._output_name], {self._input_name: values})[0]
            except Exception as error:
                raise EngineError(f"onnxruntime gave no answer: {_line(error)}") from error

    def close(self) -> None:
        """Give the memory back, after the answer that is under way; a second call does nothing."""
        with self._lock:
            self._session = None


def load_onnx(path: str, settings: OnnxSettings = ON_PROCESSOR.onnx) -> OnnxModel:
    """Load a model for one thread of the processor, so that it leaves the others to the device's own work, or as the settings say.

    Raises:
        EngineError: The runtime is missing or refuses the file, or none of the providers starts here.
    """
    return OnnxModel(open_session(path, settings))


def open_session(path: str, settings: OnnxSettings) -> Any:
    """The `onnxruntime.InferenceSession` of a model, whatever its inputs are.

    Raises:
        EngineError: As `load_onnx`.
    """
    providers, trouble = usable_providers(settings)
    if not providers:
        raise EngineError(f"no execution provider starts: {trouble}", hint="see onnx.providers")
    if trouble:
        _LOG.warning("the model runs on %s: %s", ", ".join(providers), trouble)
    try:
        return _session(path, settings, providers)
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"onnxruntime cannot load the file: {_line(error)}") from error


def usable_providers(settings: OnnxSettings) -> tuple[tuple[str, ...], str]:
    """Those execution providers of the settings that start on this machine, and why the others do not, in one line.

    A package may have a provider whose driver or device is missing. onnxruntime then says so in its log only, and takes the processor;
    or it fails, as for a model that it cannot run. So each is tried with a model that all can run, once in a process.

    Raises:
        EngineError: The runtime is missing.
    """
    return _usable_providers(msgspec.json.encode(settings))


@functools.lru_cache(maxsize=4)
def _usable_providers(encoded: bytes) -> tuple[tuple[str, ...], str]:
    settings = msgspec.json.decode(encoded, type=OnnxSettings)  # which has tables, and so is no key itself
    onnxruntime = _onnxruntime()
    usable: list[str] = []
    troubles: list[str] = []
    for name in settings.providers:
        if name == PROCESSOR:
            usable.append(name)
            continue
        available = onnxruntime.get_available_providers()
        if name not in available:
            troubles.append(
                f"onnxruntime {onnxruntime.__version__} has no {name}, it has {', '.join(available)}"
            )
            continue
        try:
            session = _session(_IDENTITY, settings, (name, PROCESSOR))
        except Exception as error:  # noqa: BLE001 - each provider has its own
            troubles.append(f"{name}: {_line(error)}")
            continue
        if name in session.get_providers():
            usable.append(name)
        else:
            troubles.append(f"{name} does not start: its driver, its device or a library is missing")
    return tuple(usable), "; ".join(troubles)


def _onnxruntime() -> Any:
    os.environ.setdefault(*TELEMETRY)
    try:
        import onnxruntime  # noqa: PLC0415 - a device without it runs other models
    except ModuleNotFoundError as error:
        raise EngineError(
            f"onnxruntime is not installed: {error}", hint="install whimbrel with the extra 'onnx'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # for want of a library, as a rule
        raise EngineError(f"onnxruntime does not load: {_line(error)}", hint="install it anew") from error
    onnxruntime.set_default_logger_severity(_LOG_ERRORS)
    return onnxruntime


def _session(model: str | bytes, settings: OnnxSettings, providers: Sequence[str]) -> Any:
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_ERRORS
    if PROCESSOR not in providers:  # or onnxruntime would give it what the others do not take
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    known = provider_options(settings)
    return onnxruntime.InferenceSession(
        model,
        options,
        providers=[(name, known.get(name, {})) for name in dict.fromkeys(providers)],
        enable_fallback=0,  # or it would try again on the processor, and print that
    )


def _shape_for(declared: Sequence[int | str | None], length: int) -> tuple[int, ...] | None:
    """Shape of `length` values as a batch of one; `None` where they do not fit.

    A first dimension without a size is the batch. One other dimension may be without a size: it takes what is left.
    """
    sizes = [size if isinstance(size, int) and size > 0 else None for size in declared]
    if len(sizes) > 1 and sizes[0] is None:
        sizes[0] = 1
    known = math.prod(size for size in sizes if size is not None)
    unknown = sizes.count(None)
    if unknown > 1 or length % known or (unknown == 0 and known != length):
        return None
    return tuple(length // known if size is None else size for size in sizes)


def _class_of(output: object) -> str:
    if not isinstance(output, np.ndarray):
        raise EngineError("the model's first output is no tensor")
    flat = output.reshape(-1)
    if flat.size == 0:
        raise EngineError("the model's first output is empty")
    if output.dtype.kind in "iuOUS" and flat.size == 1:
        return str(flat[0])  # a label, as exported classifiers of scikit-learn give it
    if output.dtype.kind not in "iuf" or flat.size == 1:
        raise EngineError(f"the model's first output, {output.dtype} {list(output.shape)}, names no class")
    if not np.isfinite(flat).all():
        raise EngineError("the model's scores are not finite")
    return str(int(flat.argmax()))


def _line(error: Exception) -> str:
    return one_line(_PLACE_IN_SOURCE.sub("", " ".join(str(error).split()))) or type(error).__name__
