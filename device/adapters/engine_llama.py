"""Text models under llama.cpp. The only module of the device that imports it, and only when a model is loaded.

Tokens are made as where the thresholds of a health plan are measured: nothing is added, no text is read as a special
token, and a completion is tokenized apart from its prompt. Another way would give other log-probabilities.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from protocol.errors import EngineError
from protocol.release import Prompt, TextPrompt

CONTEXT_TOKENS: Final = 512
"""Prompt and answer together. Each token keeps its keys, values and a row of logits in memory."""

ANSWER_TOKENS_MAX: Final = 48
"""Longest continuation: one line."""

_THREADS_MAX: Final = 2
"""More would take the processor of a small board away from its own work."""

_DETAIL_CHARS_MAX: Final = 300
"""A report carries one line."""


class LlamaModel:
    """A loaded text model; one answer at a time, from any thread. No answer depends on those before.

    Args:
        llama: A `llama_cpp.Llama` that keeps the logits of all tokens.
    """

    def __init__(self, llama: Any) -> None:
        self._lock: Final = threading.Lock()
        self._llama: Any | None = llama

    def answer(self, prompt: Prompt) -> str:
        """Continue a prompt greedily up to the end of the line or of the text, at most `ANSWER_TOKENS_MAX` tokens.

        Raises:
            EngineError: A class prompt, a prompt without tokens or with too many, or a closed model.
        """
        if not isinstance(prompt, TextPrompt):
            raise EngineError(
                f"prompt {prompt.name} asks for a class, and a text model answers text prompts only"
            )
        with self._lock:  # `close` waits for a running answer
            llama = self._opened()
            try:
                return _greedy(llama, _tokens(llama, prompt.prompt))
            except (ValueError, RuntimeError, IndexError) as error:
                raise EngineError(f"llama.cpp gave no answer: {_line(error)}") from error

    def logprob_mean(self, prompt: str, completion: str) -> float:
        """Mean natural log-probability per token of a completion after a prompt, teacher-forced.

        Raises:
            EngineError: One of them has no tokens, both have too many, or the model gives no finite number.
        """
        with self._lock:
            llama = self._opened()
            try:
                before, after = _tokens(llama, prompt), _tokens(llama, completion)
                scores = _scores(llama, before + after)[len(before) - 1 : -1].astype(np.float64)
            except (ValueError, RuntimeError, IndexError) as error:
                raise EngineError(f"llama.cpp gave no answer: {_line(error)}") from error
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[np.arange(len(after)), after] - np.log(np.exp(scores).sum(axis=1))
        mean = float(chosen.mean())
        if not np.isfinite(mean):
            raise EngineError("the model's log-probabilities are not finite")
        return mean

    def close(self) -> None:
        """Give the memory back, after the answer that is under way; a second call does nothing."""
        with self._lock:
            llama, self._llama = self._llama, None
            if llama is not None:
                llama.close()

    def _opened(self) -> Any:
        if self._llama is None:
            raise EngineError("the model is closed")
        return self._llama


def load_llama(path: str) -> LlamaModel:
    """Load a GGUF file, its weights mapped and not copied.

    Raises:
        EngineError: The runtime is missing, or refuses the file.
    """
    try:
        import llama_cpp  # noqa: PLC0415 - a device without it runs other models
    except ImportError as error:
        raise EngineError(
            "llama-cpp-python is not installed", hint="install whimbrel with the extra 'llama'"
        ) from error
    threads = _threads()
    try:
        llama_cpp.llama_log_set(_silence(), ctypes.c_void_p())
        llama = llama_cpp.Llama(
            path,
            n_ctx=CONTEXT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=True,
            logits_all=True,
            verbose=False,
        )
    except Exception as error:
        raise EngineError(f"llama.cpp cannot load the file: {_line(error)}") from error
    return LlamaModel(llama)


@functools.cache
def _silence() -> Any:
    """A log callback that drops everything. Cached: llama.cpp keeps a pointer to it for good."""
    import llama_cpp  # noqa: PLC0415 - a device without it runs other models

    return llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


def _threads() -> int:
    """Half of the cores: llama.cpp's threads spin while they wait for each other, so each needs a core of its own."""
    return max(1, min(_THREADS_MAX, (os.cpu_count() or 1) // 2))


def _tokens(llama: Any, text: str) -> list[int]:
    tokens: list[int] = list(llama.tokenize(text.encode(), add_bos=False, special=False))
    if not tokens:
        raise EngineError("a prompt or completion has no tokens")
    return tokens


def _scores(llama: Any, tokens: Sequence[int]) -> Any:
    """Logits after each token, shape (tokens, vocabulary), computed from an empty context."""
    if len(tokens) > CONTEXT_TOKENS:
        raise EngineError(f"a prompt of {len(tokens)} tokens, the context has {CONTEXT_TOKENS}")
    llama.reset()
    llama.eval(tokens)
    return llama.scores[: len(tokens)]


def _greedy(llama: Any, tokens: Sequence[int]) -> str:
    answer: list[int] = []
    row = _scores(llama, tokens)[-1]
    while len(answer) < ANSWER_TOKENS_MAX and len(tokens) + len(answer) < CONTEXT_TOKENS:
        if not np.isfinite(row).all():
            raise EngineError("the model's scores are not finite")
        token = int(row.argmax())
        if token == llama.token_eos() or b"\n" in llama.detokenize([token]):
            break
        answer.append(token)
        llama.eval([token])
        row = llama.scores[llama.n_tokens - 1]
    return bytes(llama.detokenize(answer)).decode(errors="replace")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:_DETAIL_CHARS_MAX] or type(error).__name__
