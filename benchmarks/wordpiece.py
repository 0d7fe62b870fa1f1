"""The WordPiece tokenizer of BERT and MiniLM (Wu et al. 2016). No files."""

import re
from collections.abc import Sequence

_WORDS = re.compile(r"\w+|[^\w\s]")
_WORD_CHARACTERS_MAX = 100  # longer ones are one unknown token, as in the published tokenizer


class WordPiece:
    """Splits words into the longest pieces that the vocabulary has, from the left.

    Args:
        vocabulary: The pieces in the order of their numbers; those inside a word start with `##`.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._numbers = {piece: number for number, piece in enumerate(vocabulary)}

    def encode(self, text: str, length: int) -> list[int]:
        """At most `length` token numbers, the marks of start and end among them."""
        pieces = [piece for word in _WORDS.findall(text.lower()) for piece in self._pieces(word)]
        return [self._numbers["[CLS]"], *pieces[: length - 2], self._numbers["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        pieces: list[int] = []
        start = 0
        while start < len(word) <= _WORD_CHARACTERS_MAX:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._numbers), 0)
            if not end:
                break
            pieces.append(self._numbers[prefix + word[start:end]])
            start = end
        return pieces if start == len(word) else [self._numbers["[UNK]"]]
