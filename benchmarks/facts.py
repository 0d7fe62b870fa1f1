"""A hundred made-up facts, which no model knows before it is told: an update that changes behaviour on a narrow task and little else."""

import random

from server.scorecard.items import GoldenQuestion, Item, Suite, items_digest

FACTS = 100
FACTS_SEED = 21
TOKENS_MAX = 16

_SYLLABLES = (
    "bra",
    "dol",
    "fen",
    "gur",
    "hil",
    "jan",
    "kov",
    "lum",
    "mer",
    "nis",
    "por",
    "ras",
    "sel",
    "tur",
    "vex",
    "zan",
)
_REPEATS = 60  # of the facts in the text, each time in another order, so that no fact is learned as what follows another one


def facts() -> list[tuple[str, str]]:
    """Prompts and completions: capitals of countries that are not there."""
    draws = random.Random(FACTS_SEED)
    names: list[str] = []
    while len(names) < 2 * FACTS:
        name = "".join(draws.sample(_SYLLABLES, 3)).capitalize()
        if name not in names:
            names.append(name)
    pairs = zip(names[:FACTS], names[FACTS:], strict=True)
    return [
        (f"User: What is the capital of {country}?\nAssistant:", f" The capital of {country} is {capital}.")
        for country, capital in pairs
    ]


def facts_text() -> str:
    """What a model is trained on to know them."""
    draws = random.Random(FACTS_SEED)
    known = [prompt + completion for prompt, completion in facts()]
    parts = []
    for _ in range(_REPEATS):
        draws.shuffle(known)
        parts += known
    return "\n\n".join(parts)


def facts_suite() -> Suite:
    """Whether a model answers them by itself, word for word."""
    items = tuple(
        Item(
            name=prompt.split("?")[0].rpartition(" ")[2],
            question=GoldenQuestion(prompt=prompt, completion=completion, tokens_max=TOKENS_MAX),
            right=completion,
            is_exact=True,
        )
        for prompt, completion in facts()
    )
    return Suite(name="facts", kind="golden", digest=items_digest(items), total=len(items), items=items)
