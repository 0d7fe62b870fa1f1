"""Asking both versions the same prompts, each in a child process of its own: a damaged model may take its process with it.

What comes back are tokens and logits, or classes and scores; which of them are worse is decided in `answers.py` and `classes.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from msgspec import Meta, Struct

from protocol.errors import EngineError
from protocol.release import ClassPrompt, TextPrompt
from server.children import ask_child
from server.diagnosis.classes import ClassAnswer
from server.scorecard.items import ClassQuestion, Item
from server.scorecard.work import Ask, Compare, Load, Model, Replied, Rows
from server.scorecard.worker import Worker

ANSWER_TOKENS_MAX: Final = 48
"""Tokens of an answer that are compared: as long as the longest that a device judges."""

CANDIDATES: Final = 5
"""Tokens with the largest logits that are kept at each step."""

TIMEOUT_S: Final = 900
"""For all prompts of one version: a model of several GB on a slow machine takes minutes to load."""


class Candidate(Struct, frozen=True, kw_only=True):
    """A token with its logit."""

    token: int
    text: str
    logit: float


class Answer(Struct, frozen=True, kw_only=True):
    """What a version says to a prompt.

    Attributes:
        name: Of the prompt.
        prompt_tokens: The prompt as its tokenizer sees it.
        tokens: The greedy continuation, up to the end of the line.
        text: The same as text.
        steps: For each token of the continuation, the likeliest tokens; the first is the one that was taken.
        logprob_mean: Mean natural log-probability of the expected completion per token, None where it is not finite.
    """

    name: str
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    steps: list[list[Candidate]]
    logprob_mean: float | None


class Order(Struct, frozen=True, kw_only=True):
    """What a child is told."""

    model: str
    prompts: Annotated[list[TextPrompt], Meta(max_length=256)]
    tokens_max: int = ANSWER_TOKENS_MAX
    candidates: int = CANDIDATES


def ask(model: Path, prompts: Sequence[TextPrompt], label: str, timeout_s: float = TIMEOUT_S) -> list[Answer]:
    """Ask a GGUF model.

    Args:
        model: Its file.
        prompts: What to ask.
        label: What a person calls it.
        timeout_s: For everything together.

    Raises:
        ModelFileError: The runtime does not load it, crashes, or does not answer in time: the file is to blame.
        EngineError: The runtime is not installed.
    """
    return ask_child(
        "server.diagnosis.asking_child",
        Order(model=str(model), prompts=list(prompts)),
        list[Answer],
        label,
        timeout_s,
        missing="prompts need",
        hint="install whimbrel with the extra 'llama', or pass --no-prompts",
    )


def ask_classifier(
    model: Path, prompts: Sequence[ClassPrompt], label: str, timeout_s: float = TIMEOUT_S
) -> list[ClassAnswer]:
    """Ask an ONNX model. An input that it does not answer, or dies of, has an answer that says why.

    Args:
        model: Its file; external tensors lie beside it.
        prompts: What to ask.
        label: What a person calls it.
        timeout_s: For loading, and for each answer.

    Raises:
        EngineError: It cannot be loaded, or the runtime is not installed.
    """
    order = Model(path=str(model.absolute()), runtime="onnx", threads=1, context_tokens=0)
    answers: list[ClassAnswer] = []
    while len(answers) < len(prompts):  # once more for each input that the runtime dies of
        with Worker(order, timeout_s) as worker:
            try:
                worker.ask(Load())
            except EngineError as error:
                raise EngineError(f"{label}: {error}", hint="or pass --no-prompts") from error
            for prompt in prompts[len(answers) :]:
                answers.append(_class_answer(worker, prompt))
                if not worker.is_alive:
                    break
    return answers


def _class_answer(worker: Worker, prompt: ClassPrompt) -> ClassAnswer:
    question = ClassQuestion(input=tuple(prompt.input))
    try:
        replied = worker.ask(Ask(question=question))
    except EngineError as error:
        return ClassAnswer(trouble=str(error))
    assert isinstance(replied, Replied)
    try:
        rows = worker.ask(Compare(item=Item(name=prompt.name, question=question, right=str(prompt.label))))
    except EngineError:  # it gives a class and no scores
        return ClassAnswer(label=replied.reply.label)
    assert isinstance(rows, Rows)
    return ClassAnswer(
        label=replied.reply.label, scores=[float(each) for each in np.frombuffer(rows.data, np.float32)]
    )
