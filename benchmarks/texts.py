"""Texts that every Python ships, in parts that share nothing: to train and calibrate on, to choose settings on, to judge on. No network.

| part | what it is |
| --- | --- |
| training | the language reference and 60 modules of the standard library, in a seeded order |
| development | every other one of the modules that are left |
| sources | the rest of them |
| manuals | what the packages of the environment say about themselves: prose, another kind of text than what was trained on |
| questions | problems and exam questions from GSM8K and MMLU, where their files are given |
"""

import importlib.metadata
import pydoc_data.topics
import random
import sys
import sysconfig
from pathlib import Path

from server.scorecard.items import ChoiceQuestion, Item, NumberQuestion
from server.scorecard.suites import Asking, read_suite

TEXT_SEED = 1

_SOURCES = 60  # modules of the standard library that are trained on
_SOURCE_CHARACTERS_MAX = 20_000  # of each, so that a few long modules do not outweigh the rest
_MANUAL_CHARACTERS = (1_000, 12_000)  # shorter ones say nothing; longer ones are change logs
_QUESTIONS = 400
_SHARED_CHARACTERS_MAX = (
    100  # that a module may have in a row with one that is used for something else: not 64 tokens
)


def training_text() -> str:
    """The language reference and part of the standard library's sources, in a seeded order."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    sources, order = _shuffled_sources()
    parts = topics + sources[:_SOURCES]
    order.shuffle(parts)
    return "\n\n".join(parts)


def development_text() -> str:
    """Sources of the standard library that are neither trained on nor held out."""
    return "\n\n".join(_left_sources()[::2])


def held_out_sources() -> str:
    """Sources of the standard library that are neither trained on nor used to choose settings."""
    return "\n\n".join(_left_sources()[1::2])


def held_out_manuals() -> str:
    """What the packages of the environment say about themselves, in the order of their names; not this one, which changes."""
    least, most = _MANUAL_CHARACTERS
    found = {
        str(each.metadata["Name"]).lower(): str(each.metadata.json.get("description", ""))[:most]
        for each in importlib.metadata.distributions()
    }
    found.pop("whimbrel", None)
    return "\n\n".join(text for _, text in sorted(found.items()) if len(text) >= least)


def held_out_questions(evals: Path) -> str:
    """Problems of GSM8K with their solutions, and questions of MMLU with the right answer, a seeded sample of each.

    Args:
        evals: Folder with `gsm8k/test.jsonl` and `mmlu/test`, as published.

    Raises:
        RequestError: A file is missing or malformed.
    """
    asking = Asking(sample=_QUESTIONS, seed=TEXT_SEED, shots=0)
    problems = read_suite("gsm8k", evals / "gsm8k" / "test.jsonl", asking).items
    questions = read_suite("mmlu", evals / "mmlu", asking).items
    found = [f"{_asked(item)}{item.solution}" for item in problems]
    found += [f"{_asked(item)} {item.right}" for item in questions]
    random.Random(TEXT_SEED).shuffle(found)
    return "\n\n".join(found)


def _asked(item: Item) -> str:
    assert isinstance(item.question, ChoiceQuestion | NumberQuestion)
    return item.question.text


def _shuffled_sources() -> tuple[list[str], random.Random]:
    """All modules in the order from which each part takes its own, and the generator after it."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder / f"{name}.py" for name in sys.stdlib_module_names)
    sources = [
        path.read_text("utf-8", errors="replace")[:_SOURCE_CHARACTERS_MAX] for path in paths if path.is_file()
    ]
    order = random.Random(TEXT_SEED)
    order.shuffle(sources)
    return sources, order


def _left_sources() -> list[str]:
    """Modules that are not trained on, without those that have a passage in common with any before them: copied code, notices."""
    seen = _passages(training_text())
    left = []
    for source in _shuffled_sources()[0][_SOURCES:]:
        passages = _passages(source)
        if seen.isdisjoint(passages):
            left.append(source)
            seen |= passages
    return left


def _passages(text: str) -> set[int]:
    length = _SHARED_CHARACTERS_MAX
    return {hash(text[start : start + length]) for start in range(max(0, len(text) - length + 1))}
