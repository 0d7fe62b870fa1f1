"""What a runtime of this environment can do: `python -m device.adapters.runtime_check`, an order on standard input, a line of JSON out.

Started by `doctor.py` only: a process of its own, since a runtime or the driver of an accelerator may crash or hang.
"""

import sys
from typing import Final

import msgspec
from msgspec import Struct

from device.compute import PROCESSOR, Compute
from protocol.errors import EngineError
from protocol.release import RuntimeName

_PROCESSOR: Final = "processor"


class CheckOrder(Struct, frozen=True, kw_only=True):
    """What to look at.

    Attributes:
        runtime: Which runtime.
        compute: Where it is to run models.
    """

    runtime: RuntimeName
    compute: Compute


class CheckResult(Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        places: Where models run, the preferred place first; empty where they run nowhere.
        trouble: Why not everywhere where they should, empty where they do.
    """

    places: tuple[str, ...]
    trouble: str = ""


def check(order: CheckOrder) -> CheckResult:
    """Load the runtime, and see where it runs."""
    from device.adapters.engine_llama import gpu_trouble  # noqa: PLC0415 - the doctor itself does without numpy
    from device.adapters.engine_onnx import usable_providers  # noqa: PLC0415

    try:
        if order.runtime == "onnx":
            providers, trouble = usable_providers(order.compute.onnx)
            return CheckResult(
                places=tuple(_PROCESSOR if name == PROCESSOR else name for name in providers), trouble=trouble
            )
        trouble = gpu_trouble()
    except EngineError as error:
        return CheckResult(places=(), trouble=error.message)
    if not order.compute.llama.gpu_layers:
        return CheckResult(places=(_PROCESSOR,))
    return CheckResult(places=(_PROCESSOR,) if trouble else ("accelerator", _PROCESSOR), trouble=trouble)


def main() -> int:
    """Answer the order on standard input."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=CheckOrder)
    sys.stdout.buffer.write(msgspec.json.encode(check(order)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
