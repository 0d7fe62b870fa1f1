"""Scorecards of text models: every figure beside the same figure by other means, which share no code with the scorecard's adapter."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from protocol.errors import EngineError
from protocol.tensors import BytesSource, parse_gguf
from server import operations
from server.scorecard.items import ChoiceQuestion, GoldenQuestion, Item, NumberQuestion, Question, Reply
from server.scorecard.keeping import Plan
from server.scorecard.resources import text_resources
from server.scorecard.suites import Asking, read_suite
from server.scorecard.verdict import Limits
from server.scorecard.work import Ask, Compare, Load, MemoryOrder, Model, Replied, Rows, SpeedOrder
from server.scorecard.worker import Worker
from server.scoring import score_release
from tests.models import language_model, write_language_model
from tests.server.scorecard.test_suites import mmlu

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it"
)

CONTEXT = 512
TOLERANCE = 0.05
"""llama.cpp keeps keys and values in 16 bits, and sums those of a batch in another order than those of a token."""

SHOTS = tuple(
    f"Example {number}\nA. a\nB. b\nC. c\nD. d\nAnswer: {'ABCD'[number]}\n\n" for number in range(3)
)
LETTERS = (" A", " B", " C", " D")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("model") / "tiny.gguf", 1)


@pytest.fixture(scope="module")
def worker(file: Path) -> Iterator[Worker]:
    with Worker(model_of(file)) as started:
        started.ask(Load())
        yield started


def model_of(file: Path) -> Model:
    return Model(path=str(file), runtime="llama", threads=1, context_tokens=CONTEXT)


def ask(worker: Worker, question: Question) -> Reply:
    answer = worker.ask(Ask(question=question))
    assert isinstance(answer, Replied)
    return answer.reply


class Independent:
    """llama-cpp-python's own class, from the first token on, one token at a time."""

    def __init__(self, file: Path) -> None:
        self._llama = llama_cpp.Llama(str(file), n_ctx=CONTEXT, n_threads=1, n_batch=1, verbose=False)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=special))

    def logprobs(self, tokens: Sequence[int]) -> Any:
        """Natural log-probabilities after each token, shape (tokens, vocabulary)."""
        self._llama.reset()
        rows = []
        for token in tokens:
            self._llama.eval([token])
            logits = llama_cpp.llama_get_logits(self._llama.ctx)
            rows.append(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).astype(np.float64))
        return special.log_softmax(np.array(rows), axis=1)

    def loglikelihood(self, context: str, continuation: str) -> float:
        """As lm-evaluation-harness has it: the continuation's tokens are those behind the context's in the joint text."""
        joined, before = self.tokens(context + continuation), len(self.tokens(context))
        rows = self.logprobs(joined[:-1])
        return float(sum(rows[place - 1][joined[place]] for place in range(before, len(joined))))

    def close(self) -> None:
        self._llama.close()


@pytest.fixture(scope="module")
def independent(file: Path) -> Iterator[Independent]:
    made = Independent(file)
    yield made
    made.close()


def choice(number: int, **changes: Any) -> ChoiceQuestion:
    fields = {
        "preamble": "Questions.\n\n",
        "shots": SHOTS,
        "text": f"Number {number}\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        "options": LETTERS,
    }
    return ChoiceQuestion(**{**fields, **changes})


def test_options_are_judged_as_an_independent_evaluation_judges_them(
    worker: Worker, independent: Independent
) -> None:
    for question in (
        choice(1),
        choice(2, shots=(), preamble=""),
        choice(3, options=(" Ab", "xyz", " longer one")),
    ):
        text = question.preamble + "".join(question.shots) + question.text
        direct = [independent.loglikelihood(text, option) for option in question.options]
        assert ask(worker, question).scores == pytest.approx(direct, abs=TOLERANCE)


def test_an_answer_does_not_depend_on_what_was_asked_before(worker: Worker, file: Path) -> None:
    questions: list[Question] = [choice(number) for number in range(3)]
    questions.append(choice(7, shots=SHOTS[:1]))
    questions.append(GoldenQuestion(prompt="once upon", completion=" a time", tokens_max=8))
    questions.append(NumberQuestion(text="Question: how many?\nAnswer:", tokens_max=12))
    with Worker(model_of(file)) as fresh:
        fresh.ask(Load())
        alone = [ask(fresh, question) for question in questions]
    for order in itertools.islice(itertools.permutations(range(len(questions))), 0, 720, 97):
        assert [ask(worker, questions[index]) for index in order] == [alone[index] for index in order]


def test_examples_are_left_out_where_the_context_is_too_small(worker: Worker) -> None:
    text = "q" * 440 + "\nAnswer:"
    few = choice(0, shots=SHOTS, text=text, preamble="")
    assert ask(worker, few) == ask(worker, choice(0, shots=SHOTS[:1], text=text, preamble=""))
    with pytest.raises(EngineError, match=r"a question of \d+ tokens, the context has 512"):
        ask(worker, choice(0, text="q" * 600))


def test_a_text_goes_on_with_the_likeliest_token_up_to_a_stop(
    worker: Worker, independent: Independent
) -> None:
    prompt = "Question: how many?\nAnswer:"
    reply = ask(worker, NumberQuestion(text=prompt, tokens_max=10))
    tokens = independent.tokens(prompt)
    for token in reply.tokens:
        assert int(independent.logprobs(tokens)[-1].argmax()) == token
        tokens.append(token)
    assert len(reply.tokens) == 10
    letter = next(each for each in reply.text if each.isascii())
    stopped = ask(worker, NumberQuestion(text=prompt, tokens_max=10, stops=(letter,)))
    assert letter not in stopped.text
    assert stopped.tokens == reply.tokens[: len(stopped.tokens)]


def test_golden_prompts_are_judged_as_a_device_judges_them(worker: Worker, independent: Independent) -> None:
    for prompt, completion in (("once upon", " a time"), ("a", "b"), ("<s>", " text")):
        before, after = (independent.tokens(text, special=False) for text in (prompt, completion))
        rows = independent.logprobs([*before, *after])[len(before) - 1 : -1]
        direct = float(rows[np.arange(len(after)), after].mean())
        reply = ask(worker, GoldenQuestion(prompt=prompt, completion=completion, tokens_max=4))
        assert reply.scores[0] == pytest.approx(direct, abs=TOLERANCE)


def test_rows_are_the_distributions_before_each_token_of_a_solution(
    worker: Worker, independent: Independent
) -> None:
    text, solution = "Question: how many?\nAnswer:", " seven, and\n#### 7"
    item = Item(name="q", question=NumberQuestion(text=text, tokens_max=4), right="7", solution=solution)
    answer = worker.ask(Compare(item=item))
    assert isinstance(answer, Rows)
    rows = np.frombuffer(answer.data, np.float32).reshape(-1, answer.width)
    joined, before = independent.tokens(text + solution), len(independent.tokens(text))
    direct = independent.logprobs(joined[:-1])[before - 1 :]
    assert special.log_softmax(rows.astype(np.float64), axis=1) == pytest.approx(direct, abs=TOLERANCE)


def test_keys_and_values_are_what_the_dimensions_say(file: Path) -> None:
    with Worker(model_of(file)) as fresh:
        memory = fresh.ask(MemoryOrder(contexts=(256, 1024, 4096)))
    data = file.read_bytes()
    resources = text_resources([parse_gguf(BytesSource(data))], len(data), 8, (0, 100))
    assert resources.cache_bytes_per_token == 2 * 2 * 2 * (
        16 + 16
    )  # float16, layers, groups, a key and a value
    matrices = 264 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert resources.parameters == matrices + 5 * 64
    first, later, prompt = resources.costs
    assert first.operations == 2 * matrices
    assert later.operations - first.operations == 100 * 2 * 2 * 4 * (16 + 16)
    assert first.moved_bytes == 4 * matrices + 256
    assert prompt.operations == 8 * 2 * matrices + sum(range(8)) * 2 * 2 * 4 * 32
    assert [each.tokens for each in memory.contexts] == [256, 1024]  # type: ignore[union-attr]  # the model's own limit


def _score(home: Path, version: str, against: str | None, suites: list[tuple[Any, Path]]) -> Any:
    plan = Plan(
        asking=Asking(shots=1, tokens_max=12),
        limits=Limits(),
        threads=1,
        context_tokens=CONTEXT,
        speed=SpeedOrder(prompt_tokens=8, prompt_runs=2, decode_tokens=10, loads=1),
        memory=MemoryOrder(contexts=(64,)),
    )
    return score_release(home, "tiny", version, suites=suites, plan=plan, against=against).card


def test_two_text_models_are_compared_by_answers_distributions_and_first_tokens(tmp_path: Path) -> None:
    home = tmp_path / "server"
    operations.init_repository(home, "lab")
    prompt = {
        "kind": "text",
        "name": "once",
        "prompt": "once upon",
        "completion": " a time",
        "logprob_mean_min": -50.0,
    }
    health = {"prompts": [prompt], "latency_p99_ms_max": 1e6, "memory_peak_bytes_max": 1 << 30}
    (tmp_path / "health.json").write_text(json.dumps(health))
    files = {
        "old": write_language_model(tmp_path / "old.gguf", 3),
        "new": write_language_model(tmp_path / "new.gguf", 3, noise=0.2),
    }
    for version, path in files.items():
        operations.add_release(
            home, "tiny", version, [path], runtime="llama", health=tmp_path / "health.json"
        )
    rows = "".join(f"Question {number},1,2,3,4,{'ABCD'[number % 4]}\n" for number in range(8))
    problems = "".join(
        json.dumps({"question": f"{n} + 1?", "answer": f"It is.\n#### {n + 1}"}) + "\n" for n in range(4)
    )
    (tmp_path / "test.jsonl").write_text(problems)
    suites = [("mmlu", mmlu(tmp_path / "mmlu", rows)), ("gsm8k", tmp_path / "test.jsonl")]
    card = _score(home, "new", "old", suites)
    assert card.missing_count == 0
    assert [suite.name for suite in card.suites] == ["health plan", "mmlu", "gsm8k"]
    assert card.speed.count == 20
    assert card.speed.p99_ms.high is None  # twenty tokens bound no p99

    old, new = Independent(files["old"]), Independent(files["new"])
    questions = read_suite("mmlu", tmp_path / "mmlu", Asking(shots=1)).items
    rights = {"old": [], "new": []}  # type: dict[str, list[bool]]
    for item in questions:
        assert isinstance(item.question, ChoiceQuestion)
        text = item.question.preamble + "".join(item.question.shots) + item.question.text
        for version, model in (("old", old), ("new", new)):
            tokens = model.tokens(text)
            after = model.logprobs(tokens)[-1]
            best = int(np.argmax([after[model.tokens(text + option)[len(tokens)]] for option in LETTERS]))
            rights[version].append("ABCD"[best] == item.right)
    flips = next(each for each in card.drift.suites if each.name == "mmlu").paired
    assert flips.gained == sum(not a and b for a, b in zip(rights["old"], rights["new"], strict=True))
    assert flips.lost == sum(a and not b for a, b in zip(rights["old"], rights["new"], strict=True))
    assert card.suites[1].right == sum(rights["new"])

    total, positions = 0.0, 0
    for item in read_suite("gsm8k", tmp_path / "test.jsonl", Asking()).items:
        assert isinstance(item.question, NumberQuestion)
        joined, before = old.tokens(item.question.text + item.solution), len(old.tokens(item.question.text))
        first, second = (model.logprobs(joined[:-1])[before - 1 :] for model in (old, new))
        total, positions = total + float((np.exp(first) * (first - second)).sum()), positions + len(first)
    before_tokens, after_tokens = (old.tokens(text, special=False) for text in ("once upon", " a time"))
    first, second = (
        model.logprobs([*before_tokens, *after_tokens])[len(before_tokens) - 1 : -1] for model in (old, new)
    )
    total, positions = total + float((np.exp(first) * (first - second)).sum()), positions + len(first)
    assert card.drift.texts.positions == positions
    assert card.drift.texts.mean.value == pytest.approx(total / positions, rel=0.01)
    assert card.drift.texts.mean.low < card.drift.texts.mean.value < card.drift.texts.mean.high

    for parted in card.drift.divergences:
        assert parted.token is None or 0 <= parted.token <= parted.tokens
    assert any(parted.token is not None for parted in card.drift.divergences)
    old.close()
    new.close()


QUESTIONS = [
    ("What is the capital of France?", "London", "Paris", "Rome", "Madrid", "B"),
    ("Which of these is a fruit?", "apple", "chair", "river", "stone", "A"),
    ("How many legs has a spider?", "two", "four", "six", "eight", "D"),
]


@pytest.mark.llama
def test_smollm2_answers_multiple_choice_as_in_an_independent_evaluation(tmp_path: Path) -> None:
    file = language_model()
    folder = mmlu(tmp_path, "".join(",".join(row) + "\n" for row in QUESTIONS))
    items = read_suite("mmlu", folder, Asking(shots=0)).items
    with Worker(model_of(file)) as worker:
        worker.ask(Load())
        ours = [ask(worker, item.question).scores for item in items]
    whole = llama_cpp.Llama(str(file), n_ctx=CONTEXT, n_threads=1, logits_all=True, verbose=False)
    for row, item, scores in zip(QUESTIONS, items, ours, strict=True):
        head = "The following are multiple choice questions (with answers) about high school sums.\n\n"
        text = f"{head}{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\nAnswer:"
        tokens = whole.tokenize(text.encode(), add_bos=False, special=True)
        letters = [
            whole.tokenize(f"{text} {letter}".encode(), add_bos=False, special=True)[len(tokens)]
            for letter in "ABCD"
        ]
        whole.reset()
        whole.eval(tokens)
        after = special.log_softmax(whole.scores[len(tokens) - 1].astype(np.float64))
        assert scores == pytest.approx(after[letters], abs=0.05)
        assert int(np.argmax(scores)) == int(np.argmax(after[letters]))
        assert item.right == row[5]
    whole.close()
