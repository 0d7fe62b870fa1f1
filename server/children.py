"""Questions to a child process: an order on its standard input, an answer or its trouble as JSON. A damaged model may take its process with it."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from protocol.errors import EngineError, ModelFileError

_DETAIL_CHARS: Final = 300

_Answer = TypeVar("_Answer")
_Order = TypeVar("_Order", bound=Struct)


class Trouble(Struct, frozen=True, kw_only=True, tag=True):
    """A child's last word, if it has no answer."""

    detail: str
    is_missing: bool = False  # it is the runtime that is not there


def ask_child(
    module: str,
    order: Struct,
    kind: type[_Answer],
    label: str,
    timeout_s: float,
    *,
    missing: str,
    hint: str,
    runtime: str = "llama.cpp",
    package: str = "llama-cpp-python",
) -> _Answer:
    """Run a module that ends in `answer_parent`.

    Args:
        module: Its name.
        order: For it.
        kind: Of its answer; a struct with a tag, or a list.
        label: What a person calls the model that it opens.
        timeout_s: For all of it.
        missing: What is said where the runtime is not installed: what needs it.
        hint: What to do then.
        runtime: What the child runs the model with, as people call it.
        package: The same as it is installed.

    Raises:
        ModelFileError: The runtime does not load the model, crashes, or does not answer in time: the file is to blame.
        EngineError: The runtime is not installed.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", module],
            input=msgspec.json.encode(order),
            capture_output=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{label} did not answer within {timeout_s:g} s") from None
    try:
        result: _Answer | Trouble = msgspec.json.decode(child.stdout, type=kind | Trouble)
    except msgspec.MsgspecError:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise ModelFileError(f"{runtime} crashed with {label}: {how}") from None
    if not isinstance(result, Trouble):
        return result
    if result.is_missing:
        raise EngineError(f"{missing} {package}, which is not installed", hint=hint)
    raise ModelFileError(f"{label}: {result.detail[:_DETAIL_CHARS]}")


def answer_parent(kind: type[_Order], answer: Callable[[_Order], object]) -> int:
    """In the child: read the order, answer it, print nothing else. Returns the exit code."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=kind)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up in the answer
    out.write(msgspec.json.encode(answer(order)))
    out.flush()
    return 0
