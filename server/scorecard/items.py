"""What a model is asked, and what came back: the vocabulary of suites, workers, journal and judge. Pure data.

A question holds all that an answer depends on beside the model and its settings: the digest of its bytes is the name under which the answer
is remembered.
"""

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.ids import Digest, digest_of

SuiteKind = Literal["mmlu", "gsm8k", "classes", "golden", "edge"]

LETTERS: Final = "ABCD"

_Text = Annotated[str, Meta(min_length=1, max_length=200_000)]


class ChoiceQuestion(Struct, frozen=True, kw_only=True, tag="choice"):
    """A question of which one continuation is right: the likeliest is the model's answer.

    Attributes:
        preamble: What stands before the examples.
        shots: Solved examples, each with the gap after it; the last ones are left out where the context is too small for all.
        text: The question, up to where the answer begins.
        options: Continuations.
    """

    preamble: str = ""
    shots: tuple[str, ...] = ()
    text: _Text
    options: Annotated[tuple[str, ...], Meta(min_length=2, max_length=1000)]


class NumberQuestion(Struct, frozen=True, kw_only=True, tag="number"):
    """A problem whose answer is a number at the end of a text that the model writes."""

    shots: tuple[str, ...] = ()
    text: _Text
    stops: tuple[str, ...] = ()  # the text ends before any of these
    tokens_max: int


class GoldenQuestion(Struct, frozen=True, kw_only=True, tag="golden"):
    """A prompt, the completion that is judged by its likelihood, and how the model goes on by itself: one line."""

    prompt: _Text
    completion: _Text
    tokens_max: int


class ClassQuestion(Struct, frozen=True, kw_only=True, tag="class"):
    """An input of a classifier, flat."""

    input: Annotated[tuple[float, ...], Meta(min_length=1, max_length=65_536)]


Question = ChoiceQuestion | NumberQuestion | GoldenQuestion | ClassQuestion


class Reply(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model gave, before anybody judges it.

    Attributes:
        scores: Log-likelihoods of the options; the mean log-probability of a completion; natural logarithms.
        tokens: That the model chose by itself, the likeliest each time.
        text: The same as text.
        label: Class of an input.
    """

    scores: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    text: str = ""
    label: int | None = None


class Comparison(Struct, frozen=True, kw_only=True):
    """Two models on one text.

    Attributes:
        divergences: KL(before || now) at each position, in nats.
        same: Positions at which both would choose the same token.
    """

    divergences: tuple[float, ...]
    same: int


class Item(Struct, frozen=True, kw_only=True):
    """A question with its place in a suite and its right answer.

    Attributes:
        name: Unique in its suite.
        group: For example the subject; "" for none.
        right: The right letter, number, class or completion.
        solution: A text with the right answer, over which two models are compared token by token; "" for none.
        logprob_mean_min: Of a golden prompt: least mean log-probability of the completion.
        is_exact: Of a golden prompt: what the model writes has to begin with the completion.
    """

    name: str
    group: str = ""
    question: Question
    right: str
    solution: str = ""
    logprob_mean_min: float | None = None
    is_exact: bool = False


class Suite(Struct, frozen=True, kw_only=True):
    """Questions that are counted together.

    Attributes:
        name: `kind`, or `kind:file` where several have it.
        digest: Of everything in it, and in the order in which it stands there.
        total: How many questions its files have.
        items: Those that are asked.
        notes: How they are asked, for people.
    """

    name: str
    kind: SuiteKind
    digest: Digest
    total: int
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


_encoder: Final = msgspec.json.Encoder(order="deterministic")


def question_key(question: Question) -> Digest:
    """Digest of all that an answer depends on beside the model and its settings."""
    return digest_of(_encoder.encode(question))


def items_digest(items: Sequence[Item]) -> Digest:
    """Digest of items in their order."""
    return digest_of(_encoder.encode(items))


def sampled(items: Sequence[Item], count: int, seed: int) -> tuple[Item, ...]:
    """A simple random sample, in the order of `items`; all of them if there are no more.

    A larger sample of the same seed holds the smaller one: answers that are there are used again.
    """
    if not count or count >= len(items):
        return tuple(items)

    def rank(index: int) -> Digest:
        return digest_of(f"{seed}:{items_digest([items[index]])}".encode())

    chosen = sorted(range(len(items)), key=rank)[:count]
    return tuple(items[index] for index in sorted(chosen))
