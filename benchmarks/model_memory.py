"""The memory that a text model takes under the agent's own engine, beside what `whimbrel tiers` reckons.

    python -m benchmarks.model_memory MODEL.gguf ...

Each model is loaded in a process of its own and evaluates a prompt that fills the context.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from device.adapters.engine_llama import CONTEXT_TOKENS, load_llama
from protocol.errors import EngineError
from protocol.tensors import BytesSource, parse_gguf
from server.tiers.needs import llama_needs

_MB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what models take under llama.cpp.")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(_measured_bytes(arguments.models[0]))
        return 0
    print(f"{'model':<40}{'weights':>10}{'context':>10}{'modelled':>10}{'measured':>10}  of measured")
    for path in arguments.models:
        data = path.read_bytes()
        needs = llama_needs(parse_gguf(BytesSource(data)), len(data))
        command = [sys.executable, "-m", "benchmarks.model_memory", "--child", str(path)]
        measured = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        modelled = needs.memory_bytes(CONTEXT_TOKENS)
        numbers = [needs.weights_bytes, needs.context_bytes(CONTEXT_TOKENS), modelled, measured]
        columns = "".join(f"{number / _MB:>7.1f} MB" for number in numbers)
        print(f"{path.name:<40}{columns}  {100 * modelled / measured:.0f} %")
    return 0


def _measured_bytes(path: Path) -> int:
    """Largest resident set of this process after an answer with a full context (proc_pid_status(5): VmHWM, in KiB)."""
    model = load_llama(str(path))
    words = CONTEXT_TOKENS
    while True:  # a word may be several tokens
        try:
            model.logprob_mean(" the" * words, " a")
            break
        except EngineError:
            words -= 1
            if words < CONTEXT_TOKENS // 4:
                raise
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
