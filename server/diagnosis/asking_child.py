"""A model from inside: `python -m server.diagnosis.asking_child`, an order on standard input, answers as JSON out.

Started by `asking.py` only. Tokens are made as on devices: nothing is added, and no text is read as a special token.
"""

import ctypes
import functools
import os
import sys
from typing import Any, Final

import numpy as np

from protocol.release import TextPrompt
from server.children import Trouble, answer_parent
from server.diagnosis.asking import Answer, Candidate, Order

CONTEXT_TOKENS: Final = 512
"""As on devices: prompt and answer together."""

_THREADS_MAX: Final = 2


def main() -> int:
    """Answer the order of standard input; nothing else is printed."""
    return answer_parent(Order, _answered)


def _answered(order: Order) -> list[Answer] | Trouble:
    try:
        import llama_cpp  # noqa: PLC0415 - what it lacks is answered, not raised
    except ImportError as error:
        return Trouble(detail=str(error), is_missing=True)
    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p())
    threads = max(1, min(_THREADS_MAX, (os.cpu_count() or 1) // 2))
    try:
        llama = llama_cpp.Llama(
            order.model,
            n_ctx=CONTEXT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )
        return [_answer(llama, prompt, order) for prompt in order.prompts]
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        return Trouble(detail=f"llama.cpp does not answer: {' '.join(str(error).split())}")


@functools.cache
def _silence() -> Any:
    """A log callback that drops everything. Cached: llama.cpp keeps a pointer to it for good."""
    import llama_cpp  # noqa: PLC0415 - see `_answered`

    return llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


def _answer(llama: Any, prompt: TextPrompt, order: Order) -> Answer:
    tokens = _tokens(llama, prompt.prompt)
    expected = _tokens(llama, prompt.completion)
    room = CONTEXT_TOKENS - len(tokens)
    if not tokens or room <= max(0, len(expected)):
        message = f"prompt {prompt.name}: {len(tokens)} tokens, the context has {CONTEXT_TOKENS} for prompt and answer"
        raise ValueError(message)
    logprob = _logprob_mean(llama, tokens, expected)
    llama.reset()
    llama.eval(tokens)
    said: list[int] = []
    steps: list[list[Candidate]] = []
    while len(said) < min(order.tokens_max, room):
        best = _best(llama, llama.scores[llama.n_tokens - 1], order.candidates)
        steps.append(best)
        token = best[0].token
        said.append(token)
        if token == llama.token_eos() or "\n" in best[0].text:
            break
        if len(said) < min(order.tokens_max, room):
            llama.eval([token])
    text = bytes(llama.detokenize(said)).decode(errors="replace")
    return Answer(
        name=prompt.name, prompt_tokens=tokens, tokens=said, text=text, steps=steps, logprob_mean=logprob
    )


def _tokens(llama: Any, text: str) -> list[int]:
    return list(llama.tokenize(text.encode(), add_bos=False, special=False))


def _logprob_mean(llama: Any, before: list[int], after: list[int]) -> float | None:
    if not after:
        return None
    llama.reset()
    llama.eval(before + after)
    scores = llama.scores[len(before) - 1 : len(before) + len(after) - 1].astype(np.float64)
    with np.errstate(all="ignore"):
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[np.arange(len(after)), after] - np.log(np.exp(scores).sum(axis=1))
    mean = float(chosen.mean())
    return mean if np.isfinite(mean) else None


def _best(llama: Any, row: Any, count: int) -> list[Candidate]:
    finite = np.where(np.isfinite(row), row, -np.inf)
    if not np.isfinite(row).any():
        message = "the model's scores are not finite"
        raise ValueError(message)
    chosen = np.argsort(-finite, kind="stable")[:count]
    return [
        Candidate(
            token=int(token),
            text=bytes(llama.detokenize([int(token)], special=True)).decode(errors="replace"),
            logit=round(float(row[token]), 4),
        )
        for token in chosen
        if np.isfinite(row[token])
    ]


if __name__ == "__main__":
    sys.exit(main())
