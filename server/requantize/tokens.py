"""Text to tokens, by llama.cpp in a child process: a damaged vocabulary may take its process with it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from protocol.errors import EngineError, ModelFileError, RequestError
from server.adapters.blobs import storage_errors

TEXT_BYTES_MAX: Final = 64 << 20
"""Of all texts together: a few MB are plenty, and tokens are held in memory."""

TIMEOUT_S: Final = 600

_DETAIL_CHARS: Final = 300


class Order(Struct, frozen=True):
    """What a child is told: whose vocabulary, and the texts."""

    model: str
    texts: list[str]


class Trouble(Struct, frozen=True, tag=True):
    """A child's last word, if it has no tokens."""

    detail: str
    is_missing: bool = False  # it is the runtime that is not there


class Tokens(Struct, frozen=True, tag=True):
    """Tokens of all texts, one after the other."""

    tokens: list[int]


def read_tokens(model: Path, texts: Sequence[Path]) -> npt.NDArray[np.int32]:
    """Tokens of text files in a model's vocabulary, one file after the other.

    Args:
        model: A GGUF file; only its vocabulary is read.
        texts: UTF-8.

    Raises:
        RequestError: A file is missing or no text, or they are too long.
        EngineError: llama.cpp is not installed.
        ModelFileError: It does not read the vocabulary.
    """
    order = Order(str(model), _read(texts))
    try:
        child = subprocess.run(
            [sys.executable, "-m", "server.requantize.tokens_child"],
            input=msgspec.json.encode(order),
            capture_output=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"the tokenizer of {model} did not end within {TIMEOUT_S} s") from None
    try:
        result = msgspec.json.decode(child.stdout, type=Tokens | Trouble)
    except msgspec.MsgspecError:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise ModelFileError(f"llama.cpp crashed with the vocabulary of {model}: {how}") from None
    if isinstance(result, Tokens):
        return np.array(result.tokens, np.int32)
    if result.is_missing:
        raise EngineError(
            "tokens need llama-cpp-python, which is not installed",
            hint="install whimbrel with the extra 'llama'",
        )
    raise ModelFileError(f"{model}: {result.detail[:_DETAIL_CHARS]}")


def _read(paths: Sequence[Path]) -> list[str]:
    texts, left = [], TEXT_BYTES_MAX
    for path in paths:
        if not path.is_file():
            raise RequestError(f"{path}: no such file", hint="give text files with --calibration")
        with storage_errors(path), path.open("rb") as file:
            data = file.read(left + 1)
        left -= len(data)
        if left < 0:
            raise RequestError(
                f"{path}: the calibration texts have more than {TEXT_BYTES_MAX:,} bytes",
                hint="give less text",
            )
        try:
            texts.append(data.decode())
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{path}: byte {error.start} is no UTF-8", hint="give plain text with --calibration"
            ) from None
    return texts
