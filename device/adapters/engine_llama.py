"""Text models under llama.cpp. The only module of the device that imports it, and only when a model is loaded.

Tokens are made as where the thresholds of a health plan are measured: nothing is added, no text is read as a special
token, and a completion is tokenized apart from its prompt. Another way would give other log-probabilities. Texts for
applications (`write`) are tokenized as the model was taught to read them.

Keys and values of past tokens belong to the loaded weights and go with them; every answer begins with an empty context.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from device.adapters.foreign_text import error_line
from device.adapters.gpu_layers import layer_costs, layers_that_fit
from device.adapters.text_stream import TextStream
from device.compute import ON_PROCESSOR, LlamaSettings
from device.ports import QuestionError, Sampling, Written
from protocol.errors import EngineError, WhimbrelError
from protocol.release import Prompt, TextPrompt

CONTEXT_TOKENS: Final = 512
"""Prompt and answer together. Each token keeps its keys, values and a row of logits in memory."""

ANSWER_TOKENS_MAX: Final = 48
"""Longest continuation: one line."""

_LOG: Final = logging.getLogger(__name__)

_ALL_LAYERS: Final = -1  # llama.cpp's word for it

_THREADS_MAX: Final = 2
"""More would take the processor of a small board away from its own work."""


class LlamaModel:
    """A loaded text model; one answer at a time, from any thread. No answer depends on those before.

    Args:
        llama: A `llama_cpp.Llama` that keeps the logits of all tokens.
    """

    def __init__(self, llama: Any) -> None:
        self._lock: Final = threading.Lock()
        self._llama: Any | None = llama
        self._chat: Final = _chat_formatter(llama)

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
                raise EngineError(f"llama.cpp gave no answer: {error_line(error)}") from error

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
                raise EngineError(f"llama.cpp gave no answer: {error_line(error)}") from error
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[np.arange(len(after)), after] - np.log(np.exp(scores).sum(axis=1))
        mean = float(chosen.mean())
        if not np.isfinite(mean):
            raise EngineError("the model's log-probabilities are not finite")
        return mean

    def chat_prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation of (role, content) in the template of the model file, up to where the answer begins.

        Raises:
            QuestionError: The file has no template, or its template refuses the conversation.
        """
        if self._chat is None:
            raise QuestionError(
                "the model file has no chat template that can be read",
                hint="use /v1/completions with a prompt of your own",
            )
        try:
            given = [{"role": role, "content": content} for role, content in messages]
            return str(self._chat(messages=given).prompt)
        except Exception as error:  # templates are programs, and may raise anything
            raise QuestionError(
                f"the model's chat template refuses the messages: {error_line(error)}"
            ) from error

    def write(self, prompt: str, sampling: Sampling, tell: Callable[[str], None]) -> Written:
        """Continue a text, from an empty context; see `TextModel.write`.

        Raises:
            QuestionError: A prompt without tokens, or with as many as the context has.
            EngineError: The model gives no finite numbers, or is closed.
        """
        with self._lock:  # `close` waits for `tell` to end the text
            tell("")
            llama = self._opened()
            try:
                return _write(llama, prompt, sampling, tell)
            except (ValueError, RuntimeError, IndexError) as error:
                raise EngineError(f"llama.cpp gave no answer: {error_line(error)}") from error

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


def load_llama(path: str, settings: LlamaSettings = ON_PROCESSOR.llama, adapter: str = "") -> LlamaModel:
    """Load a GGUF file, its weights mapped and not copied, with as many layers on an accelerator as the settings say.

    Args:
        path: The file.
        settings: Where it runs.
        adapter: A GGUF file with a low-rank adapter, which is added to the weights; empty for none.

    Raises:
        EngineError: The runtime is missing, or refuses a file.
    """
    llama_cpp = _llama_cpp()
    threads = settings.threads or _threads()
    layers = _gpu_layers(path, adapter, settings)
    try:
        llama = llama_cpp.Llama(
            path,
            n_ctx=CONTEXT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=layers,
            main_gpu=settings.main_gpu if layers else 0,
            use_mmap=True,
            logits_all=True,
            verbose=False,
        )
    except Exception as error:
        raise EngineError(f"llama.cpp cannot load the file: {error_line(error)}") from error
    if adapter:
        try:
            _add_adapter(llama_cpp, llama, adapter)
        except EngineError:
            llama.close()
            raise
    return LlamaModel(llama)


def _add_adapter(llama_cpp: Any, llama: Any, path: str) -> None:
    """Add an adapter to the loaded weights. Not by `Llama(lora_path=…)`, which copies the weights into memory instead of mapping them."""
    loaded = llama_cpp.llama_adapter_lora_init(llama._model.model, path.encode())  # noqa: SLF001 - no public way to it
    if not loaded:
        raise EngineError("llama.cpp cannot load the adapter: it is damaged, or made for another model")
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)  # the model frees them
    scales = (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(llama._ctx.ctx, adapters, 1, scales):  # noqa: SLF001 - likewise
        raise EngineError("llama.cpp cannot add the adapter to the model")


def gpu_trouble() -> str:
    """Why no layer can run on an accelerator, empty where it can.

    Raises:
        EngineError: The runtime is missing.
    """
    llama_cpp = _llama_cpp()
    if llama_cpp.llama_supports_gpu_offload():
        return ""
    return f"llama-cpp-python {llama_cpp.__version__} was built without an accelerator, or finds none"


def _gpu_layers(path: str, adapter: str, settings: LlamaSettings) -> int:
    """Layers for the accelerator: as llama.cpp counts them, the output is one of them."""
    if not settings.gpu_layers:
        return 0
    if trouble := gpu_trouble():
        _LOG.warning("all layers run on the processor: %s", trouble)
        return 0
    if settings.gpu_memory_mb_max is None:
        return _ALL_LAYERS if settings.gpu_layers == "all" else settings.gpu_layers
    try:
        costs = layer_costs(Path(path), CONTEXT_TOKENS, Path(adapter) if adapter else None)
    except (WhimbrelError, OSError) as error:
        raise EngineError(f"llama.cpp cannot load the file: {error_line(error)}") from error
    wanted = len(costs) if settings.gpu_layers == "all" else min(settings.gpu_layers, len(costs))
    layers = min(wanted, layers_that_fit(costs, settings.gpu_memory_mb_max << 20))
    if layers < wanted:
        _LOG.warning(
            "%d of %d layers run on the accelerator: more would pass llama.gpu_memory_mb_max",
            layers,
            len(costs),
        )
    return layers


def _llama_cpp() -> Any:
    try:
        import llama_cpp  # noqa: PLC0415 - a device without it runs other models
    except ModuleNotFoundError as error:
        raise EngineError(
            f"llama-cpp-python is not installed: {error}", hint="install whimbrel with the extra 'llama'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # for want of a library, as a rule
        raise EngineError(
            f"llama-cpp-python does not load: {error_line(error)}", hint="install it anew"
        ) from error
    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p())
    return llama_cpp


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


def _write(llama: Any, prompt: str, sampling: Sampling, tell: Callable[[str], None]) -> Written:
    tokens: list[int] = list(llama.tokenize(prompt.encode(), add_bos=True, special=True))
    room = CONTEXT_TOKENS - len(tokens)
    if not tokens or room <= 0:
        raise QuestionError(
            f"a prompt of {len(tokens)} tokens; the context has {CONTEXT_TOKENS} for prompt and answer together"
        )
    tokens_max = min(room, sampling.tokens_max or room)
    rng = np.random.default_rng(sampling.seed)
    text = TextStream(sampling.stop)
    count, row = 0, _scores(llama, tokens)[-1]
    while count < tokens_max:
        token = _drawn(row, sampling, rng)
        if _ends_answer(llama, token):
            tell(text.finish())
            return Written(len(tokens), count, "stop")
        count += 1
        tell(text.feed(llama.detokenize([token])))
        if text.is_stopped:
            return Written(len(tokens), count, "stop")
        if count < tokens_max:
            llama.eval([token])
            row = llama.scores[llama.n_tokens - 1]
    tell(text.finish())
    return Written(len(tokens), count, "length")


def _drawn(row: Any, sampling: Sampling, rng: np.random.Generator) -> int:
    """A token by its probability, among the likeliest that together have `top_p` of it (Holtzman et al. 2020)."""
    if not np.isfinite(row).all():
        raise EngineError("the model's scores are not finite")
    if sampling.temperature == 0:
        return int(row.argmax())
    scores = row.astype(np.float64) / sampling.temperature
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    sums = shares[order].cumsum()
    count = int(np.searchsorted(sums, sampling.top_p)) + 1
    drawn = np.searchsorted(sums[:count], rng.random() * sums[:count][-1], side="right")
    return int(order[min(int(drawn), count - 1)])


def _ends_answer(llama: Any, token: int) -> bool:
    import llama_cpp  # noqa: PLC0415 - a device without it runs other models

    return bool(llama_cpp.llama_vocab_is_eog(llama._model.vocab, token))  # noqa: SLF001 - no public way to it


def _chat_formatter(llama: Any) -> Any | None:
    """The template of the model file. It is a program, and part of what was signed; it runs in Jinja's sandbox."""
    template = llama.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: PLC0415 - see `load_llama`

    tokens = (llama.token_eos(), llama.token_bos())
    eos, bos = (llama._model.token_get_text(each) if each >= 0 else "" for each in tokens)  # noqa: SLF001 - likewise
    try:
        return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
    except Exception:  # noqa: BLE001 - the model does without: it can be asked to continue texts
        return None
