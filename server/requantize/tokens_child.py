"""A vocabulary from inside: `python -m server.requantize.tokens_child`, an order on standard input, tokens as JSON out.

Started by `tokens.py` only. Nothing is added to a text, and nothing in it is read as a special token.
"""

import ctypes
import sys

from server.children import Trouble, answer_parent
from server.requantize.tokens import Order


def main() -> int:
    """Answer the order of standard input; nothing else is printed."""
    return answer_parent(Order, _tokens)


def _tokens(order: Order) -> list[int] | Trouble:
    try:
        import llama_cpp  # noqa: PLC0415 - what it lacks is answered, not raised
    except ImportError as error:
        return Trouble(detail=str(error), is_missing=True)
    silence = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p())
    try:
        vocabulary = llama_cpp.Llama(order.model, vocab_only=True, verbose=False)
        tokens: list[int] = []
        for text in order.texts:
            tokens += vocabulary.tokenize(text.encode(), add_bos=False, special=False)
    except (ValueError, RuntimeError) as error:
        return Trouble(detail=f"llama.cpp does not read the vocabulary: {' '.join(str(error).split())}")
    return tokens


if __name__ == "__main__":
    sys.exit(main())
