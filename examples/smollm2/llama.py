"""llama.cpp: tokens, log-probabilities, greedy answers, and its quantizer. The only module here that imports it."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np

from protocol.errors import EngineError

_CONTEXT_TOKENS = 256
# llama.cpp's threads wait for each other by spinning: with a second one on a busy machine of two cores, answers take
# six times as long.
_THREADS = 1


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama-cpp-python publishes no types
def _no_log(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Swallows what llama.cpp would print; its return codes say what went wrong."""


class Model:
    """A GGUF file under llama.cpp.

    Args:
        path: The file.
        vocabulary_only: Loads the tokenizer and no weights.

    Raises:
        EngineError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        llama_cpp.llama_log_set(_no_log, ctypes.c_void_p())
        try:
            self._llama: Any = llama_cpp.Llama(
                os.fspath(path),
                vocab_only=vocabulary_only,
                n_ctx=_CONTEXT_TOKENS,
                n_threads=_THREADS,
                n_threads_batch=_THREADS,
                logits_all=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise EngineError(
                f"llama.cpp cannot load {path}", hint="the file is damaged or of another kind"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llama.close()

    def tokens(self, text: str) -> list[int]:
        """Token numbers; nothing is added and nothing is read as a special token."""
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=False))

    def logprob_mean(self, prompt: str, completion: str) -> float:
        """Mean natural log-probability per token that the model gives to a completion after a prompt."""
        before, after = self.tokens(prompt), self.tokens(completion)
        logits = self._logits(before + after)[len(before) - 1 : -1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(after)), after] - np.log(np.exp(logits).sum(axis=1))
        return float(chosen.mean())

    def answer(self, prompt: str, tokens_max: int) -> str:
        """The greedy continuation up to the end of the line."""
        tokens = self.tokens(prompt)
        answer: list[int] = []
        logits = self._logits(tokens)
        while len(answer) < tokens_max:
            token = int(logits[-1].argmax())
            if token == self._llama.token_eos() or b"\n" in self._llama.detokenize([token]):
                break
            answer.append(token)
            self._llama.eval([token])
            logits = self._llama.scores[: self._llama.n_tokens]
        return bytes(self._llama.detokenize(answer)).decode(errors="replace")

    def _logits(self, tokens: Sequence[int]) -> Any:
        self._llama.reset()
        self._llama.eval(tokens)
        return self._llama.scores[: len(tokens)]


def quantize_to_q4_1(source: Path, out: Path) -> None:
    """Quantizes with llama.cpp: float matrices to Q4_1; what has its type already is copied.

    Raises:
        EngineError: llama.cpp refuses.
    """
    quantize(source, out, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1, token_embedding_type=llama_cpp.GGML_TYPE_Q8_0)


def quantize(
    source: Path,
    out: Path,
    file_type: int,
    *,
    token_embedding_type: int | None = None,
    allows_quantized: bool = False,
) -> None:
    """Quantizes with llama.cpp's own quantizer.

    Args:
        source: A GGUF file with float matrices.
        out: The result; replaced when it exists.
        file_type: What kind of file, as llama.cpp numbers them (`llama_ftype`).
        token_embedding_type: Of the embedding (`ggml_type`), where it is not what the kind of file brings.
        allows_quantized: The source may be quantized itself: its weights are dequantized first.

    Raises:
        EngineError: llama.cpp refuses.
    """
    llama_cpp.llama_log_set(_no_log, ctypes.c_void_p())
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    if token_embedding_type is not None:
        parameters.token_embedding_type = token_embedding_type
    parameters.allow_requantize = allows_quantized
    parameters.nthread = _THREADS
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters))
    if code != 0:
        raise EngineError(f"llama.cpp cannot quantize {source.name}: code {code}")
