"""The runtimes that this device has, behind the `Engine` port. Which one loads a file is decided here only.

A runtime's module is imported with the first model that it loads: an agent without a model does without numpy.
"""

import sys
import threading
from importlib import metadata
from typing import TYPE_CHECKING, Final

from device.adapters.priority import DEFAULT_PRIORITY, Priority
from device.adapters.trial import release_stopped, run_trial
from device.compute import ON_PROCESSOR, Compute
from device.ports import ModelSource, TrialOrder
from protocol.messages import TrialEvidence
from protocol.release import RuntimeName

if TYPE_CHECKING:
    from device.adapters.engine_llama import LlamaModel
    from device.adapters.engine_onnx import OnnxModel

_DISTRIBUTIONS: Final[dict[RuntimeName, str]] = {
    "onnx": "onnxruntime",
    "llama": "llama-cpp-python",
}
"""The names under which the package index knows the runtimes."""


class LocalEngine:
    """Inference on this device: the `Engine` port.

    Args:
        python: Interpreter in which trials run.
        priority: How far they give way to what serves.
        compute: Where models run, here and in trials.
    """

    def __init__(
        self,
        python: str = sys.executable,
        priority: Priority = DEFAULT_PRIORITY,
        compute: Compute = ON_PROCESSOR,
    ) -> None:
        self._python: Final = python
        self._priority: Final = priority
        self._compute: Final = compute
        self._is_stopped: Final = threading.Event()

    def versions(self) -> dict[str, str]:
        """Installed runtimes and their versions, read from the packages' metadata: none is imported."""
        found: dict[str, str] = {}
        for name, distribution in _DISTRIBUTIONS.items():
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return found

    def load(self, source: ModelSource) -> "OnnxModel | LlamaModel":
        """Load a model into this process.

        Raises:
            EngineError: The runtime is missing, or refuses the file.
        """
        return load_model(source, self._compute)

    def trial(self, order: TrialOrder) -> TrialEvidence:
        """Run a trial in a process of its own; waits for others of this process first.

        Raises:
            EngineError: No process could be started, which says nothing about the model.
        """
        return run_trial(order, self._python, self._is_stopped.is_set, self._priority, self._compute)

    def stop(self) -> None:
        """Break off the trial under way, and every later one: the agent is about to end."""
        self._is_stopped.set()
        release_stopped()


def load_model(source: ModelSource, compute: Compute) -> "OnnxModel | LlamaModel":
    """Load a model with the runtime that its release names, to where the device runs its models.

    Raises:
        EngineError: The runtime is missing, or refuses the file.
    """
    if source.runtime == "onnx":
        from device.adapters.engine_onnx import load_onnx  # noqa: PLC0415 - see the top

        return load_onnx(source.path, compute.onnx)
    from device.adapters.engine_llama import load_llama  # noqa: PLC0415 - see the top

    return load_llama(source.path, compute.llama, source.adapter)
