"""Applications that ask the local endpoint without a pause, and compare every answer with what its version really answers."""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Final, Protocol

from device.adapters.engine_llama import load_llama
from device.adapters.engine_onnx import load_onnx
from device.adapters.openai import INPUTS_MAX
from device.ports import Sampling

CLIENTS: Final = 6
ANSWER_S_MAX: Final = 60.0
PROBLEMS_SHOWN: Final = 5
_BATCH_MAX: Final = 12
_TOKENS: Final = 6


@dataclass
class Outcome:
    """What the applications saw."""

    answered: int = 0
    lost: int = 0  # no answer, or an error
    refused: int = 0  # 503 with Retry-After: to be asked again
    may_refuse: bool = False
    mixed: int = 0  # another answer than that of the version that it names
    stale: int = 0  # the version before, asked for after the new one answered
    swaps: int = 0
    swaps_in_use: int = 0  # at which somebody used the model that went
    by_version: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.answered > 0 and not (
            self.lost or self.mixed or self.stale or (self.refused and not self.may_refuse)
        )


class Questions(Protocol):
    """What is asked, and what each model answers."""

    def learn(self, version: str, model: Path) -> None:
        """Note what a version answers: its file is loaded apart from everything that is tested."""

    def draw(self, rng: random.Random, model: str) -> tuple[str, dict[str, Any], Any]:
        """A path, a body, and a key of the expected answer."""

    def read(self, data: bytes) -> tuple[set[str], Any]:
        """The models that an answer names, and what it says."""

    def expected(self, version: str, key: Any) -> Any:
        """What a version says."""


class ClassQuestions:
    """Lists of numbers for a classifier, one or several in a request."""

    def __init__(self, inputs: Sequence[Sequence[float]]) -> None:
        self._inputs = [list(values) for values in inputs]
        self._answers: dict[str, list[tuple[str, list[float]]]] = {}

    def learn(self, version: str, model: Path) -> None:
        loaded = load_onnx(str(model))
        found = [loaded.classify(values) for values in self._inputs]
        loaded.close()
        self._answers[version] = [(each.label, list(each.scores)) for each in found]

    def check_that_versions_differ(self) -> None:
        """Models that answer alike would hide a mixture."""
        for one, other in combinations(self._answers.values(), 2):
            assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))

    def draw(self, rng: random.Random, model: str) -> tuple[str, dict[str, Any], Any]:
        count = rng.choice([1, 1, rng.randint(2, min(_BATCH_MAX, INPUTS_MAX))])
        key = tuple(rng.randrange(len(self._inputs)) for _ in range(count))
        inputs = [self._inputs[number] for number in key]
        return "/v1/classify", {"model": model, "input": inputs if count > 1 else inputs[0]}, key

    def read(self, data: bytes) -> tuple[set[str], Any]:
        answer = json.loads(data)
        return {answer["model"]}, [(each["label"], each["scores"]) for each in answer["data"]]

    def expected(self, version: str, key: Any) -> Any:
        return [self._answers[version][number] for number in key]


class TextQuestions:
    """Texts that a language model continues, half of them as streams."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = list(prompts)
        self._answers: dict[str, list[str]] = {}

    def learn(self, version: str, model: Path) -> None:
        loaded = load_llama(str(model))
        self._answers[version] = []
        for prompt in self._prompts:
            pieces: list[str] = []
            loaded.write(prompt, Sampling(tokens_max=_TOKENS), pieces.append)
            self._answers[version].append("".join(pieces))
        loaded.close()

    def check_that_versions_differ(self) -> None:
        """Models that answer alike would hide a mixture."""
        for one, other in combinations(self._answers.values(), 2):
            assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))

    def draw(self, rng: random.Random, model: str) -> tuple[str, dict[str, Any], Any]:
        key = rng.randrange(len(self._prompts))
        body = {"model": model, "prompt": self._prompts[key], "max_tokens": _TOKENS, "temperature": 0}
        return "/v1/completions", {**body, "stream": rng.random() < 0.5}, key

    def read(self, data: bytes) -> tuple[set[str], Any]:
        if not data.startswith(b"data: "):
            answer = json.loads(data)
            return {answer["model"]}, answer["choices"][0]["text"]
        *events, done, rest = data.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b""), "a stream that does not end"
        pieces = [json.loads(event.removeprefix(b"data: ")) for event in events]
        return {each["model"] for each in pieces}, "".join(each["choices"][0]["text"] for each in pieces)

    def expected(self, version: str, key: Any) -> Any:
        return self._answers[version][key]


class Clients:
    """Asks from several threads until it is stopped.

    Args:
        address: Host and port of the endpoint.
        family: Name of the model.
        questions: What is asked.
        seed: Of what each client asks.
        generation: The number of the version that answers for certain, where versions are numbers.
        pause_s: Between two requests of a client.
    """

    def __init__(
        self,
        address: tuple[str, int],
        family: str,
        questions: Questions,
        seed: int,
        *,
        generation: Callable[[], int] | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self.outcome = Outcome()
        self._address = address
        self._family = family
        self._questions = questions
        self._generation = generation
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._began_s = time.monotonic()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(random.Random(f"{seed}/{number}"),))
            for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def asked(self) -> int:
        """Requests that came to an end."""
        return self.outcome.answered + self.outcome.lost + self.outcome.refused

    def stop(self) -> Outcome:
        """Let requests under way end; what was seen."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self.outcome.seconds = time.monotonic() - self._began_s
        return self.outcome

    def _ask_on(self, rng: random.Random) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=ANSWER_S_MAX)
        while not self._is_over.is_set():
            self._ask(connection, rng)
            if self._pause_s:
                self._is_over.wait(self._pause_s * 2 * rng.random())
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, rng: random.Random) -> None:
        path, body, key = self._questions.draw(rng, self._family)
        lowest = None if self._generation is None else self._generation()
        began_s = time.monotonic()
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self._note("lost", f"no answer: {error!r}")
            return
        latency_ms = (time.monotonic() - began_s) * 1000
        if response.status == 503 and response.getheader("Retry-After"):
            self._note("refused", data.decode())
            return
        if response.status != 200:
            self._note("lost", f"status {response.status}: {data.decode()}")
            return
        self._judge(response.getheader("x-whimbrel-version") or "", data, key, lowest)
        with self._lock:
            self.outcome.latencies_ms.append(latency_ms)

    def _judge(self, version: str, data: bytes, key: Any, lowest: int | None) -> None:
        try:
            models, said = self._questions.read(data)
            expected = self._questions.expected(version, key)
        except (ValueError, KeyError, AssertionError) as error:
            self._note("lost", f"not an answer: {error!r}: {data[:300]!r}")
            return
        if models != {f"{self._family}:{version}"} or said != expected:
            self._note("mixed", f"{models}, version {version}: {said!r} instead of {expected!r}"[:500])
        elif lowest is not None and int(version) < lowest:
            self._note("stale", f"version {version} after {lowest} answered")
        with self._lock:
            self.outcome.answered += 1
            self.outcome.by_version[version] += 1

    def _note(self, kind: str, problem: str) -> None:
        with self._lock:
            setattr(self.outcome, kind, getattr(self.outcome, kind) + 1)
            if kind != "refused" and len(self.outcome.problems) < PROBLEMS_SHOWN:
                self.outcome.problems.append(f"{kind}: {problem}")
