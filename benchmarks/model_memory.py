"""The memory that a model takes under the agent's own engine, beside what `whimbrel tiers` reckons.

    python -m benchmarks.model_memory [--cache DIR] MODEL ...

A GGUF file evaluates a prompt that fills the context; an ONNX file answers one input, of zeros. `MODEL` is a file, or the name of one that
comes in a wheel of the package index (`wheels.py`), which is kept in DIR. Each is loaded in a process of its own.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import wheels
from benchmarks.catalog import CACHE
from device.adapters.engine_llama import CONTEXT_TOKENS, load_llama
from device.adapters.engine_onnx import open_session
from device.compute import ON_PROCESSOR
from protocol.errors import EngineError, WhimbrelError
from protocol.tensors import BytesSource, parse_gguf
from server.tiers.needs import llama_needs, onnx_needs

_MB = 1 << 20
_SIZES = (128, 1, 512)  # of a dimension that the model leaves open: the first that it takes
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what models take under llama.cpp and onnxruntime.")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        path = arguments.models[0]
        print(_filled(path) if path.suffix == ".gguf" else _answered(path), _peak_bytes())
        return 0
    print(
        f"{'model':<40}{'weights':>10}{'context':>10}{'modelled':>10}{'measured':>10}  of measured  asked with"
    )
    for model in arguments.models:
        try:
            path = _found(model, arguments.cache)
        except WhimbrelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        command = [sys.executable, "-m", "benchmarks.model_memory", "--child", str(path)]
        asked, measured = subprocess.run(command, capture_output=True, check=True, text=True).stdout.rsplit(
            maxsplit=1
        )
        length = path.stat().st_size
        is_text = path.suffix == ".gguf"
        needs = (
            llama_needs(parse_gguf(BytesSource(path.read_bytes())), length) if is_text else onnx_needs(length)
        )
        tokens = CONTEXT_TOKENS if is_text else 0
        modelled = needs.memory_bytes(tokens)
        numbers = [needs.weights_bytes, needs.context_bytes(tokens), modelled, int(measured)]
        columns = "".join(f"{number / _MB:>7.1f} MB" for number in numbers)
        print(f"{path.name:<40}{columns}{100 * modelled / int(measured):>11.0f} %  {asked}", flush=True)
    return 0


def _found(model: Path, cache: Path) -> Path:
    """A file, or one that is fetched."""
    member = wheels.VENDOR_MODELS.get(str(model))
    if member is None or model.is_file():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / model).is_file():
        wheels.fetch(member, cache / model)
    return cache / model


def _filled(path: Path) -> str:
    """Answer with a full context."""
    model = load_llama(str(path))
    words = CONTEXT_TOKENS
    while True:  # a word may be several tokens
        try:
            model.logprob_mean(" the" * words, " a")
        except EngineError:
            words -= 1
            if words < CONTEXT_TOKENS // 4:
                raise
        else:
            return f"{CONTEXT_TOKENS} tokens"


def _answered(path: Path) -> str:
    """Answer one input, of zeros, where one of the sizes fits."""
    session = open_session(str(path), ON_PROCESSOR.onnx)
    for size in _SIZES:
        given = {each.name: _zeros(each, size) for each in session.get_inputs()}
        try:
            session.run(None, given)
        except Exception:  # noqa: BLE001, S112 - onnxruntime has an exception for each of its codes
            continue
        return " and ".join("x".join(map(str, each.shape)) or "a number" for each in given.values())
    return "nothing, only loaded"


def _zeros(declared: Any, size: int) -> Any:
    shape = [each if isinstance(each, int) and each > 0 else size for each in declared.shape]
    if shape and declared.shape[0] != shape[0]:
        shape[0] = 1
    return np.zeros(shape, _TYPES[declared.type])


def _peak_bytes() -> int:
    """Largest resident set of this process (proc_pid_status(5): VmHWM, in KiB)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
