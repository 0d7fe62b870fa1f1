"""The questions that version 2 learns and that all versions are judged by, from facts.jsonl."""

from pathlib import Path
from typing import Literal

import msgspec

_FILE = Path(__file__).with_name("facts.jsonl")


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question with its right answer.

    Attributes:
        name: Short and unique.
        use: `fact` is new to the model and learned; `general` and `rehearsal` are known, or in the model's own words,
            and trained on so that learning does not displace them (only `general` is reported); `held-out` is never
            trained on.
        question: One line.
        answer: One line.
        paraphrase: The same question in words that are never trained on, or empty.
    """

    name: str
    use: Literal["fact", "general", "rehearsal", "held-out"]
    question: str
    answer: str
    paraphrase: str = ""

    @property
    def prompt(self) -> str:
        """Text that makes the model answer; no special token, so that every tokenizer setting reads it alike."""
        return _prompt(self.question)

    @property
    def paraphrased_prompt(self) -> str:
        """As `prompt`, in other words."""
        return _prompt(self.paraphrase)

    @property
    def completion(self) -> str:
        """What should follow the prompt; the space keeps the border between tokens."""
        return f" {self.answer}"


def read_questions() -> list[Question]:
    """All questions, in the order of the file."""
    lines = _FILE.read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Question) for line in lines if line]


def _prompt(question: str) -> str:
    return f"User: {question}\nAssistant:"
