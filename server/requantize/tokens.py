"""Text to tokens, by llama.cpp in a child process: a damaged vocabulary may take its process with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from protocol.errors import RequestError
from server.adapters.blobs import storage_errors
from server.children import ask_child

TEXT_BYTES_MAX: Final = 64 << 20
"""Of all texts together: a few MB are plenty, and tokens are held in memory."""

TIMEOUT_S: Final = 600


class Order(Struct, frozen=True):
    """What a child is told: whose vocabulary, and the texts."""

    model: str
    texts: list[str]


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
    tokens = ask_child(
        "server.requantize.tokens_child",
        Order(str(model), _read(texts)),
        list[int],
        f"the vocabulary of {model}",
        TIMEOUT_S,
        missing="tokens need",
        hint="install whimbrel with the extra 'llama'",
    )
    return np.array(tokens, np.int32)


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
