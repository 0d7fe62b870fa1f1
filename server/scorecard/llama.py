"""Text models under llama.cpp, for the scorecard; the only module of the server that imports it, and only in a worker.

Written to llama.cpp's own interface (`llama.h`): contexts of several lengths over weights that are loaded once, logits only where they are
looked at, and examples that many questions share evaluated once. What is shared depends on the question alone, so that no answer depends on
those before.

Questions of suites are tokenized as the model's file says; golden prompts as devices do: nothing is added, no text is read as a special token,
and a completion is tokenized apart from its prompt.
"""

import ctypes
import functools
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.errors import EngineError
from server.scorecard.items import (
    ChoiceQuestion,
    GoldenQuestion,
    Item,
    NumberQuestion,
    Question,
    Reply,
)
from server.scorecard.resident import peak_bytes, resident_bytes
from server.scorecard.statistics import log_softmax
from server.scorecard.work import (
    ROWS_MAX,
    ContextMemory,
    Memory,
    MemoryOrder,
    Model,
    Quantize,
    Speed,
    SpeedOrder,
)

_BATCH_TOKENS: Final = 512
_SEQUENCE: Final = 0
_PIECE_BYTES_MAX: Final = 256
_STRIDE: Final = 7_919
"""Token numbers for measurements of speed and memory, which depend on how many there are and not on which."""

_Row = npt.NDArray[np.float32]


class LlamaEngine:
    """A loaded GGUF file with a context.

    Args:
        model: Which file, how many threads, how long a context.

    Raises:
        EngineError: llama.cpp is missing or refuses the file.
    """

    def __init__(self, model: Model) -> None:
        self._cpp: Final = _llama_cpp()
        self._weights: Final = _Weights(self._cpp, model)
        self._vocab: Final = self._cpp.llama_model_get_vocab(self._weights.model)
        self._context: Final = _Context(
            self._cpp,
            self._weights,
            min(model.context_tokens, trained_tokens(self._cpp, self._weights)),
            model.threads,
        )
        self._held: tuple[int, ...] = ()  # tokens that the context holds: examples that questions share

    def ask(self, question: Question) -> Reply:
        """See `Engine.ask`."""
        if isinstance(question, ChoiceQuestion):
            return self._choose(question)
        if isinstance(question, NumberQuestion):
            return self._solve(question)
        if isinstance(question, GoldenQuestion):
            return self._complete(question)
        raise EngineError("a text model cannot classify inputs of numbers")

    def rows(self, item: Item) -> _Row:
        """See `Engine.rows`: the distribution before each token of the solution."""
        question = item.question
        if isinstance(question, GoldenQuestion):
            before = self._tokens(question.prompt, is_plain=True)
            after = self._tokens(item.solution, is_plain=True)
        elif isinstance(question, NumberQuestion):
            before = self._tokens(question.text)
            after = self._tokens(question.text + item.solution)[len(before) :]
        else:
            raise EngineError("only prompts and problems have a solution to be read")
        room = self._context.tokens - len(before)
        if not before or not after or room < 1:
            raise EngineError(
                f"a text of {len(before) + len(after)} tokens, the context has {self._context.tokens}"
            )
        after = after[: min(ROWS_MAX, room)]
        self._hold(())
        rows = self._context.evaluate([*before, *after[:-1]], 0, len(after))
        self._context.keep(0)
        return rows

    def read(self, tokens: tuple[int, ...]) -> _Row:
        """See `Engine.read`."""
        if not 0 < len(tokens) <= self._context.tokens:
            raise EngineError(f"a text of {len(tokens)} tokens, the context has {self._context.tokens}")
        if not 0 <= min(tokens) <= max(tokens) < self._context.vocabulary:
            raise EngineError(f"a token is not among the {self._context.vocabulary} of the vocabulary")
        self._hold(())
        rows = self._context.evaluate(tokens, 0, len(tokens))
        self._context.keep(0)
        return rows

    def close(self) -> None:
        """See `Engine.close`."""
        self._context.close()
        self._weights.close()

    def _choose(self, question: ChoiceQuestion) -> Reply:
        text, tokens, shared = self._fitted(
            question.preamble, question.shots, question.text, question.options
        )
        row = self._read(tokens, shared)
        scores = []
        for option in question.options:
            after = self._tokens(text + option)[len(tokens) :] or self._tokens(option, is_plain=True)
            score = row[after[0]]
            if len(after) > 1:
                rows = log_softmax(self._context.evaluate(after[:-1], len(tokens), len(after) - 1))
                score += rows[np.arange(len(after) - 1), after[1:]].sum()
                self._context.keep(len(tokens))
            scores.append(float(score))
        self._context.keep(shared)
        return Reply(scores=tuple(scores))

    def _solve(self, question: NumberQuestion) -> Reply:
        _, tokens, shared = self._fitted("", question.shots, question.text, ("",), question.tokens_max)
        reply = self._greedy(self._read(tokens, shared), len(tokens), question.tokens_max, question.stops)
        self._context.keep(shared)
        return reply

    def _complete(self, question: GoldenQuestion) -> Reply:
        before = self._tokens(question.prompt, is_plain=True)
        after = self._tokens(question.completion, is_plain=True)
        if (
            not before
            or not after
            or len(before) + max(len(after), question.tokens_max) > self._context.tokens
        ):
            raise EngineError(
                f"prompt and completion have {len(before)} and {len(after)} tokens, the context has {self._context.tokens}"
            )
        row = self._read(before, 0)
        scores = [row[after[0]]]
        if len(after) > 1:
            rows = log_softmax(self._context.evaluate(after[:-1], len(before), len(after) - 1))
            scores += list(rows[np.arange(len(after) - 1), after[1:]])
            self._context.keep(len(before))
        reply = self._greedy(row, len(before), question.tokens_max, ("\n",))
        self._context.keep(0)
        return Reply(scores=(float(np.mean(scores)),), tokens=reply.tokens, text=reply.text)

    def _greedy(
        self, row: npt.NDArray[np.float64], position: int, tokens_max: int, stops: Sequence[str]
    ) -> Reply:
        chosen: list[int] = []
        written = b""
        while len(chosen) < tokens_max and position + len(chosen) < self._context.tokens:
            token = int(row.argmax())
            if self._cpp.llama_vocab_is_eog(self._vocab, token):
                break
            written += self._piece(token)
            text = written.decode(errors="replace")
            chosen.append(token)
            ends = [text.find(stop) for stop in stops if stop in text]
            if ends:
                return Reply(tokens=tuple(chosen), text=text[: min(ends)])
            row = log_softmax(self._context.evaluate([token], position + len(chosen) - 1, 1))[-1]
        return Reply(tokens=tuple(chosen), text=written.decode(errors="replace"))

    def _fitted(
        self, preamble: str, shots: tuple[str, ...], text: str, options: Sequence[str], reserve: int = 0
    ) -> tuple[str, list[int], int]:
        """The whole text with as many examples as fit, its tokens, and how many of them other questions share."""
        for count in range(len(shots), -1, -1):
            prefix = preamble + "".join(shots[:count])
            whole = prefix + text
            tokens = self._tokens(whole)
            longest = max(len(self._tokens(whole + option)) for option in options) + reserve
            if longest <= self._context.tokens:
                return whole, tokens, _shared(self._tokens(prefix), tokens) if prefix else 0
        raise EngineError(f"a question of {longest} tokens, the context has {self._context.tokens}")

    def _read(self, tokens: Sequence[int], shared: int) -> npt.NDArray[np.float64]:
        """Log-probabilities after a text."""
        if not tokens:
            raise EngineError("a question has no tokens")
        self._hold(tuple(tokens[:shared]))
        row: npt.NDArray[np.float64] = log_softmax(self._context.evaluate(tokens[shared:], shared, 1))[-1]
        return row

    def _hold(self, tokens: tuple[int, ...]) -> None:
        if tokens != self._held:
            self._held = ()
            self._context.keep(0)
            if tokens:
                self._context.evaluate(tokens, 0, 0)
            self._held = tokens

    def _tokens(self, text: str, *, is_plain: bool = False) -> list[int]:
        """As the file says, with special tokens; `is_plain`: without."""
        data = text.encode()
        size = len(data) + 8
        buffer = (ctypes.c_int32 * size)()
        count = self._cpp.llama_tokenize(
            self._vocab, data, len(data), buffer, size, not is_plain, not is_plain
        )
        if count < 0:
            raise EngineError("llama.cpp cannot tokenize a text")
        return list(buffer[:count])

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(_PIECE_BYTES_MAX)
        length = self._cpp.llama_token_to_piece(self._vocab, token, buffer, _PIECE_BYTES_MAX, 0, False)
        return buffer.raw[: max(0, length)]


class _Weights:
    """A loaded file, and the adapter beside it if there is one."""

    def __init__(self, cpp: Any, model: Model) -> None:
        self._cpp = cpp
        self.model: Final = _loaded(cpp, model.path)
        self._adapter: Final = (
            cpp.llama_adapter_lora_init(self.model, model.adapter.encode()) if model.adapter else None
        )
        if model.adapter and not self._adapter:
            self.close()
            raise EngineError(
                "llama.cpp cannot load the adapter",
                hint="it is damaged, or made for another model or a newer llama.cpp",
            )

    def adapt(self, context: Any) -> None:
        """Let a context use the adapter."""
        if self._adapter is None:
            return
        adapters = (self._cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
        if self._cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise EngineError("llama.cpp cannot add the adapter to the model")

    def close(self) -> None:
        """Give the memory back, the adapter's with it."""
        self._cpp.llama_model_free(self.model)


class _Context:
    """Keys and values of one sequence of tokens."""

    def __init__(self, cpp: Any, weights: _Weights, tokens: int, threads: int) -> None:
        self._cpp = cpp
        parameters = cpp.llama_context_default_params()
        parameters.n_ctx = tokens
        parameters.n_batch = parameters.n_ubatch = min(tokens, _BATCH_TOKENS)
        parameters.n_threads = parameters.n_threads_batch = threads
        # As devices run models. On a processor it also sums values in 16 bits, which moves SmolLM2's log-probabilities by a nat.
        parameters.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.no_perf = True
        self._context = cpp.llama_init_from_model(weights.model, parameters)
        if not self._context:
            raise EngineError(f"llama.cpp has no context of {tokens} tokens: too little memory")
        weights.adapt(self._context)
        self.tokens: Final[int] = tokens
        self.vocabulary: Final[int] = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(weights.model))
        self._batch = cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)

    def evaluate(self, tokens: Sequence[int], start: int, rows: int) -> _Row:
        """Append tokens at a position; give the logits after the last `rows` of them."""
        kept: list[_Row] = []
        first = len(tokens) - rows
        for begin in range(0, len(tokens), _BATCH_TOKENS):
            part = tokens[begin : begin + _BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(part)
            for index, token in enumerate(part):
                batch.token[index] = token
                batch.pos[index] = start + begin + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = _SEQUENCE
                batch.logits[index] = begin + index >= first
            if code := self._cpp.llama_decode(self._context, batch):
                raise EngineError(f"llama.cpp cannot evaluate {len(part)} tokens: code {code}")
            for index in range(max(0, first - begin), len(part)):
                pointer = self._cpp.llama_get_logits_ith(self._context, index)
                kept.append(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).copy())
        if not rows:
            return np.empty((0, self.vocabulary), np.float32)
        found = np.stack(kept)
        if not np.isfinite(found).all():
            raise EngineError("the model's scores are not finite")
        return found

    def keep(self, count: int) -> None:
        """Forget all tokens from a position on."""
        memory = self._cpp.llama_get_memory(self._context)
        if not self._cpp.llama_memory_seq_rm(memory, _SEQUENCE, count, -1):
            raise EngineError(
                "the model cannot forget a part of a text: it keeps a state and no keys and values"
            )

    def close(self) -> None:
        self._cpp.llama_batch_free(self._batch)
        self._cpp.llama_free(self._context)


def measure_speed(model: Model, order: SpeedOrder) -> Speed:
    """Load, read prompts and make tokens, each timed by itself.

    Raises:
        EngineError: As `LlamaEngine`.
    """
    cpp = _llama_cpp()
    load_ms, step_ms, prompt_ms = [], [], []
    begin = time.perf_counter()
    weights = _Weights(cpp, model)
    load_ms.append(1000 * (time.perf_counter() - begin))
    for _ in range(order.loads - 1):
        weights.close()
        begin = time.perf_counter()
        weights = _Weights(cpp, model)
        load_ms.append(1000 * (time.perf_counter() - begin))
    tokens = order.prompt_tokens + order.decode_tokens
    context = _Context(cpp, weights, tokens, model.threads)
    prompt = _some_tokens(cpp, weights, tokens)
    context.evaluate(prompt[: order.prompt_tokens], 0, 1)  # pays for pages that nobody has touched
    for _ in range(order.prompt_runs):
        context.keep(0)
        begin = time.perf_counter()
        context.evaluate(prompt[: order.prompt_tokens], 0, 1)
        prompt_ms.append(1000 * (time.perf_counter() - begin))
        for position in range(order.prompt_tokens, tokens):
            begin = time.perf_counter()
            context.evaluate([prompt[position]], position, 1)
            step_ms.append(1000 * (time.perf_counter() - begin))
    context.close()
    weights.close()
    return Speed(
        load_ms=tuple(load_ms),
        step_ms=tuple(step_ms),
        prompt_ms=tuple(prompt_ms),
        prompt_tokens=order.prompt_tokens,
    )


def measure_memory(model: Model, order: MemoryOrder) -> Memory:
    """Fill contexts of ascending length, and look at the resident set.

    Raises:
        EngineError: As `LlamaEngine`.
    """
    cpp = _llama_cpp()
    runtime = resident_bytes()
    weights = _Weights(cpp, model)
    warm = _Context(cpp, weights, _BATCH_TOKENS, model.threads)
    made = resident_bytes()
    warm.evaluate(_some_tokens(cpp, weights, 1), 0, 1)  # a mapped file is resident once it was read
    read = resident_bytes() - made
    warm.close()
    loaded = resident_bytes()
    longest = trained_tokens(cpp, weights)
    contexts = []
    for tokens in sorted({min(each, longest) for each in order.contexts}):
        before = resident_bytes()
        context = _Context(cpp, weights, tokens, model.threads)
        cache = resident_bytes() - before
        context.evaluate(_some_tokens(cpp, weights, tokens), 0, 1)
        contexts.append(ContextMemory(tokens=tokens, cache_bytes=max(0, cache), peak_bytes=peak_bytes()))
        context.close()
    weights.close()
    return Memory(runtime_bytes=runtime, weights_bytes=max(read, loaded - runtime), contexts=tuple(contexts))


def quantize(model: Model, order: Quantize) -> None:
    """Write a model anew with llama.cpp's own quantizer.

    Raises:
        EngineError: llama.cpp is missing or refuses.
    """
    cpp = _llama_cpp()
    parameters = cpp.llama_model_quantize_default_params()
    parameters.ftype = order.file_type
    if order.embedding_type is not None:
        parameters.token_embedding_type = order.embedding_type
    parameters.nthread = model.threads
    if code := cpp.llama_model_quantize(model.path.encode(), order.out.encode(), ctypes.byref(parameters)):
        raise EngineError(f"llama.cpp cannot quantize the file as kind {order.file_type}: code {code}")


def trained_tokens(cpp: Any, weights: _Weights) -> int:
    """Longest context that the model was trained for."""
    return int(cpp.llama_model_n_ctx_train(weights.model))


def _some_tokens(cpp: Any, weights: _Weights, count: int) -> list[int]:
    size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(weights.model))
    return [_STRIDE * index % size for index in range(1, count + 1)]


def _shared(prefix: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens two begin with, without the last of the second."""
    count = 0
    for one, other in zip(prefix, tokens[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count


def _loaded(cpp: Any, path: str) -> Any:
    weights = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    if not weights:
        raise EngineError(
            "llama.cpp cannot load the file", hint="it is damaged, or made for a newer llama.cpp"
        )
    return weights


def _llama_cpp() -> Any:
    try:
        import llama_cpp  # noqa: PLC0415 - a server without it scores other models
    except ModuleNotFoundError as error:
        raise EngineError(
            f"llama-cpp-python is not installed: {error}", hint="install whimbrel with the extra 'llama'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python does not load: {error}", hint="install it anew") from error
    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _silence() -> Any:
    """A log callback that drops everything. Cached: llama.cpp keeps a pointer to it for good."""
    import llama_cpp  # noqa: PLC0415 - see `_llama_cpp`

    return llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
