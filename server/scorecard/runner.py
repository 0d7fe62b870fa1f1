"""Asks models what no journal has yet: questions, measurements, comparisons. An answer is written as soon as it is there.

A question without an answer is named with the reason and counts as nothing: neither as wrong, nor as asked. Whoever judges has to look at
`missing` first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import msgspec
import numpy as np

from protocol.errors import EngineError
from protocol.ids import digest_of
from server.scorecard.card import Missing
from server.scorecard.items import Comparison, Item, Reply, question_key
from server.scorecard.journal import Journal
from server.scorecard.statistics import divergences
from server.scorecard.work import (
    Ask,
    Compare,
    Load,
    Memory,
    MemoryOrder,
    Model,
    Order,
    Replied,
    Rows,
    Speed,
    SpeedOrder,
)
from server.scorecard.worker import ANSWER_S_MAX, Worker

DEATHS_MAX: Final = 3
"""A runtime that died so often in one run will die again."""

Progress = Callable[[int, int, str], None]
"""Told after every answer: how many there are, of how many, of what."""

_Measured = TypeVar("_Measured", Speed, Memory)


class Runner:
    """One model, asked through a journal.

    Args:
        journal: Of this model.
        prepare: Gives the model's files a place and checks them; called once, and only if something has to be asked.
        progress: Told how it goes.
        timeout_s: After which an answer is given up.
    """

    def __init__(
        self,
        journal: Journal,
        prepare: Callable[[], Model],
        progress: Progress,
        timeout_s: float = ANSWER_S_MAX,
    ) -> None:
        self._journal = journal
        self._prepare = prepare
        self._progress = progress
        self._timeout_s = timeout_s
        self._worker: Worker | None = None
        self._deaths = 0
        self.missing: list[Missing] = []

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def measure(
        self, order: SpeedOrder | MemoryOrder, kind: type[_Measured], machine: str
    ) -> _Measured | None:
        """Measure in a process of its own, unless it was measured on this machine.

        Returns:
            None where it could not be done; `missing` says why.
        """
        key = f"measured:{digest_of(msgspec.json.encode([order, machine]))}"
        known = self._journal.get(key, kind)
        if known is not None:
            return known
        what = "speed" if isinstance(order, SpeedOrder) else "memory"
        self._progress(0, 1, what)
        self.close()
        try:
            with Worker(self._prepare(), self._timeout_s) as worker:
                answer = worker.ask(order)
        except EngineError as error:
            self.missing.append(Missing(what=what, reason=str(error)))
            return None
        assert isinstance(answer, kind)
        self._journal.put(key, answer)
        self._progress(1, 1, what)
        return answer

    def ask_all(self, items: Sequence[Item], what: str) -> list[Reply | None]:
        """Ask all questions of a suite that have no answer yet; one that stands there twice, once."""
        keys = [f"reply:{question_key(item.question)}" for item in items]
        done = sum(self._journal.get(key, Reply) is not None for key in keys)
        replies: list[Reply | None] = []
        for key, item in zip(keys, items, strict=True):
            reply = self._journal.get(key, Reply)
            if reply is None:
                answer = self.ask(Ask(question=item.question), f"{what}: {item.name}")
                if isinstance(answer, Replied):
                    reply = answer.reply
                    self._journal.put(key, reply)
                    done += keys.count(key)
                    self._progress(done, len(items), what)
            replies.append(reply)
        return replies

    def ask(self, order: Order, what: str) -> Replied | Rows | None:
        """Ask once; a worker that died is replaced for the next question."""
        if self._deaths >= DEATHS_MAX:
            self.missing.append(
                Missing(what=what, reason=f"not asked: the runtime died {self._deaths} times")
            )
            return None
        try:
            answer = self._ready().ask(order)
        except EngineError as error:
            self.missing.append(Missing(what=what, reason=str(error)))
            if not self._is_ready():
                self._deaths += 1
                self.close()
            return None
        assert isinstance(answer, Replied | Rows)
        return answer

    def _is_ready(self) -> bool:
        return self._worker is not None and self._worker.is_alive

    def _ready(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._prepare(), self._timeout_s)
            try:
                self._worker.ask(Load())
            except EngineError:
                self.close()
                raise
        return self._worker


def compare_all(
    journal: Journal, before: Runner, now: Runner, items: Sequence[Item], progress: Progress
) -> list[Comparison | None]:
    """Compare two models on the solutions of items, position by position, over all of the vocabulary.

    Args:
        journal: Of this pair.
        before: The model that is replaced.
        now: The other one.
        items: With solutions, or inputs of classifiers.
        progress: Told how it goes.
    """
    found: list[Comparison | None] = []
    for index, item in enumerate(items):
        key = f"compared:{digest_of(msgspec.json.encode([question_key(item.question), item.solution]))}"
        known = journal.get(key, Comparison)
        if known is None:
            first = now.ask(Compare(item=item), f"comparison: {item.name}")
            second = before.ask(Compare(item=item), f"comparison, the version before: {item.name}")
            if isinstance(first, Rows) and isinstance(second, Rows):
                known = _compared(second, first, item, now)
            if known is not None:
                journal.put(key, known)
                progress(index + 1, len(items), "comparison")
        found.append(known)
    return found


def _compared(before: Rows, now: Rows, item: Item, runner: Runner) -> Comparison | None:
    if before.width != now.width or len(before.data) != len(now.data):
        runner.missing.append(
            Missing(
                what=f"comparison: {item.name}",
                reason="the two versions have different vocabularies or classes",
            )
        )
        return None
    rows = [np.frombuffer(each.data, np.float32).reshape(-1, each.width) for each in (before, now)]
    return Comparison(
        divergences=tuple(round(float(each), 9) for each in divergences(rows[0], rows[1])),
        same=int((rows[0].argmax(axis=1) == rows[1].argmax(axis=1)).sum()),
    )


@contextmanager
def running(*runners: Runner) -> Iterator[None]:
    """End the workers, however it ends."""
    try:
        yield
    finally:
        for runner in runners:
            runner.close()
