"""Suites from their files, in the formats in which they are published. Bounded; an error names the file, the line and what was expected.

| kind | files | questions and prompt |
| --- | --- | --- |
| mmlu | `test/*_test.csv` and `dev/*_dev.csv` | Hendrycks et al. (2021), `evaluate.py`: five solved examples of the subject, the likeliest of A to D |
| gsm8k | `test.jsonl`, perhaps `train.jsonl` | Cobbe et al. (2021): the number after `####`, else the last one |
| classes | JSON lines of `input` or `text` | a label |
| golden, edge | TOML or JSON lines | prompts of a health plan (`protocol/release.py`) |
"""

import csv
import io
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from protocol.errors import RequestError
from protocol.release import ClassPrompt, HealthPlan, Prompt
from server.scorecard.items import (
    LETTERS,
    ChoiceQuestion,
    ClassQuestion,
    GoldenQuestion,
    Item,
    NumberQuestion,
    Suite,
    SuiteKind,
    items_digest,
    sampled,
)

FILE_BYTES_MAX: Final = 256 << 20
"""MMLU has 7 MB, GSM8K 5; a set of a hundred thousand images as JSON lines has about this."""

ITEMS_MAX: Final = 200_000
CELL_CHARS_MAX: Final = 131_072
SHOTS_MAX: Final = 32

GOLDEN_TOKENS_MAX: Final = 48
"""How far a model goes on after a golden prompt: as far as in a trial on a device."""

_NUMBER: Final = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARK: Final = "####"
_STOPS: Final = ("Question:",)  # the model goes on with another problem


class Asking(Struct, frozen=True, kw_only=True):
    """How suites are asked.

    Attributes:
        sample: Questions of each suite, 0 for all; prompts are always asked all.
        samples: The same by kind of suite, instead of `sample`.
        seed: Draws the sample.
        shots: Solved examples before each question, where the suite has them.
        tokens_max: Longest text that answers a problem.
    """

    sample: int = 0
    samples: dict[str, int] = {}
    seed: int = 0
    shots: int = 5
    tokens_max: int = 256


class _Problem(Struct):
    question: str
    answer: str


class _Labelled(Struct, forbid_unknown_fields=True):
    label: int
    input: tuple[float, ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()
    name: str = ""
    group: str = ""


class _Prompts(Struct, forbid_unknown_fields=True):
    prompt: list[Prompt]


_problems: Final = msgspec.json.Decoder(_Problem)
_labelled: Final = msgspec.json.Decoder(_Labelled)
_prompts: Final[msgspec.json.Decoder[Prompt]] = msgspec.json.Decoder(Prompt)


def read_suite(kind: SuiteKind, path: Path, asking: Asking) -> Suite:
    """Read one suite.

    Args:
        kind: Which format.
        path: File or folder.
        asking: How it is asked.

    Raises:
        RequestError: It cannot be read, is malformed, or has no question.
    """
    if kind == "mmlu":
        items, notes = _mmlu(path, asking)
    elif kind == "gsm8k":
        items, notes = _gsm8k(path, asking)
    elif kind == "classes":
        items, notes = list(_classes(path)), ()
    else:
        items, notes = [_golden_item(prompt) for prompt in read_prompts(path)], ()
    if not items:
        raise RequestError(f"{path} has no question", hint=f"expected is a suite of the kind {kind}")
    names = [item.name for item in items]
    if len(set(names)) != len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise RequestError(f"{path}: two questions are called {twice!r}", hint="each is reported by its name")
    is_small = kind in {"golden", "edge"}
    chosen = (
        tuple(items) if is_small else sampled(items, asking.samples.get(kind, asking.sample), asking.seed)
    )
    return Suite(
        name=kind,
        kind=kind,
        digest=items_digest(items),
        total=len(items),
        items=chosen,
        notes=tuple(notes),
    )


def health_suite(plan: HealthPlan) -> Suite:
    """The prompts that devices ask in their trial."""
    items = tuple(_golden_item(prompt) for prompt in plan.prompts)
    return Suite(name="health plan", kind="golden", digest=items_digest(items), total=len(items), items=items)


def last_number(text: str) -> str:
    """The number that a text answers with, in plain digits; "" where there is none.

    It is the first one after `####` where a text has that, as GSM8K's own solutions do, and else the last one.
    """
    _, mark, after = text.partition(_MARK)
    found = _NUMBER.findall(after) if mark else _NUMBER.findall(text)
    if not found:
        return ""
    return _plain(found[0] if mark else found[-1])


def _plain(number: str) -> str:
    plain = number.replace(",", "").replace("$", "")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    digits = digits.lstrip("0") or "0"
    digits = "0" + digits if digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits


# MMLU


def _mmlu(path: Path, asking: Asking) -> tuple[list[Item], tuple[str, ...]]:
    test = path / "test" if (path / "test").is_dir() else path
    files = sorted(test.glob("*_test.csv")) if test.is_dir() else [test]
    if not files:
        raise RequestError(f"{test} has no *_test.csv", hint="expected is MMLU's folder, with test/ and dev/")
    items: list[Item] = []
    for file in files:
        subject = file.stem.removesuffix("_test")
        shots = _mmlu_shots(path, file, subject, asking.shots)
        preamble = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for line, (question, choices, right) in _mmlu_rows(file):
            asked = ChoiceQuestion(
                preamble=preamble,
                shots=shots,
                text=_mmlu_text(question, choices),
                options=tuple(f" {letter}" for letter in LETTERS),
            )
            items.append(
                Item(name=f"{subject} line {line}", group=subject, question=asked, right=LETTERS[right])
            )
            _check_count(len(items), file)
    return items, (f"{asking.shots}-shot, log-likelihood of A to D",)


def _mmlu_shots(path: Path, file: Path, subject: str, count: int) -> tuple[str, ...]:
    if count == 0:
        return ()
    folder = path / "dev" if (path / "dev").is_dir() else file.parent
    dev = folder / f"{subject}_dev.csv"
    if not dev.is_file():
        raise RequestError(
            f"{dev} is not there, and has the solved examples of {subject}", hint="or take --shots 0"
        )
    rows = [row for _, row in _mmlu_rows(dev)]
    if len(rows) < count:
        raise RequestError(
            f"{dev} has {len(rows)} solved examples, wanted are {count}", hint="take fewer --shots"
        )
    return tuple(
        f"{_mmlu_text(question, choices)} {LETTERS[right]}\n\n" for question, choices, right in rows[:count]
    )


def _mmlu_text(question: str, choices: Sequence[str]) -> str:
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{question.strip()}{options}\nAnswer:"


def _mmlu_rows(path: Path) -> Iterator[tuple[int, tuple[str, list[str], int]]]:
    """Rows with the line that each ends on; with a header and answers of 0 to 3, or without and A to D."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for number, row in enumerate(reader):
            if len(row) != 6:
                raise RequestError(
                    f"{path}:{reader.line_num}: {len(row)} columns, expected 6: question, four choices, answer"
                )
            if number == 0 and row[5].strip().lower() == "answer":
                continue
            question, *choices, answer = row
            if not question.strip():
                raise RequestError(f"{path}:{reader.line_num}: the question is empty")
            right = (LETTERS + "0123").find(answer.strip()) if len(answer.strip()) == 1 else -1
            if right < 0:
                raise RequestError(
                    f"{path}:{reader.line_num}: answer {answer[:40]!r}, expected A to D or 0 to 3"
                )
            yield reader.line_num, (question, choices, right % 4)
    except csv.Error as error:
        raise RequestError(
            f"{path}:{reader.line_num}: {error}", hint="expected are comma-separated values"
        ) from error


# GSM8K


def _gsm8k(path: Path, asking: Asking) -> tuple[list[Item], tuple[str, ...]]:
    file = path / "test.jsonl" if path.is_dir() else path
    train = file.with_name("train.jsonl")
    shots: tuple[str, ...] = ()
    if asking.shots and train.is_file():
        solved = [problem for _, problem in _gsm8k_problems(train)][: asking.shots]
        shots = tuple(f"Question: {each.question}\nAnswer: {each.answer}\n\n" for each in solved)
    items = []
    for line, problem in _gsm8k_problems(file):
        asked = NumberQuestion(
            shots=shots,
            text=f"Question: {problem.question}\nAnswer:",
            stops=_STOPS,
            tokens_max=asking.tokens_max,
        )
        right = last_number(problem.answer)
        items.append(Item(name=f"line {line}", question=asked, right=right, solution=f" {problem.answer}"))
    return items, (
        f"{len(shots)}-shot, greedy, at most {asking.tokens_max} tokens, the number after ####, else the last one",
    )


def _gsm8k_problems(path: Path) -> Iterator[tuple[int, _Problem]]:
    for line, problem in _json_lines(path, _problems, '{"question": text, "answer": text}'):
        if not problem.question.strip():
            raise RequestError(f"{path}:{line}: the question is empty")
        if _MARK not in problem.answer or not last_number(problem.answer):
            raise RequestError(f'{path}:{line}: "answer" has no number after {_MARK}')
        yield line, problem


# Classification


def _classes(path: Path) -> Iterator[Item]:
    expected = '{"input": numbers, "label": class} or {"text": text, "choices": texts, "label": index}'
    for line, row in _json_lines(path, _labelled, expected):
        where = f"{path}:{line}"
        if bool(row.input) == bool(row.text):
            raise RequestError(f'{where}: expected is either "input" or "text"', hint=expected)
        asked: ClassQuestion | ChoiceQuestion
        if row.input:
            if not 0 <= row.label < 1_000_000:
                raise RequestError(f'{where}: "label" is {row.label}, expected 0 to 999999')
            asked, right = ClassQuestion(input=row.input), str(row.label)
        else:
            if not 2 <= len(row.choices) <= 1000 or not all(row.choices):
                raise RequestError(
                    f'{where}: "choices" are {len(row.choices)}, expected 2 to 1000, none of them empty'
                )
            if not 0 <= row.label < len(row.choices):
                raise RequestError(f'{where}: "label" is {row.label}, expected 0 to {len(row.choices) - 1}')
            asked, right = ChoiceQuestion(text=row.text, options=row.choices), str(row.label)
        yield Item(name=row.name or f"line {line}", group=row.group, question=asked, right=right)


# Prompts


def _golden_item(prompt: Prompt) -> Item:
    if isinstance(prompt, ClassPrompt):
        asked = ClassQuestion(input=tuple(prompt.input))
        return Item(name=prompt.name, question=asked, right=str(prompt.label))
    return Item(
        name=prompt.name,
        question=GoldenQuestion(
            prompt=prompt.prompt, completion=prompt.completion, tokens_max=GOLDEN_TOKENS_MAX
        ),
        right=prompt.completion,
        solution=prompt.completion,
        logprob_mean_min=prompt.logprob_mean_min,
        is_exact=prompt.exact,
    )


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a health plan from TOML or JSON lines.

    Raises:
        RequestError: They cannot be read, or are malformed.
    """
    expected = 'prompts of a health plan, with "kind" "text" or "class"'
    if path.suffix != ".toml":
        return [prompt for _, prompt in _json_lines(path, _prompts, expected)]
    text = _text(path)
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RequestError(f"{path}: {error}", hint="expected is TOML with [[prompt]] tables") from error
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if line.strip() == "[[prompt]]"]
    listed = tables.pop("prompt", [])
    if tables or not isinstance(listed, list):
        raise RequestError(f"{path}: {next(iter(tables), 'prompt')!r}, expected are [[prompt]] tables only")
    prompts: list[Prompt] = []
    for index, table in enumerate(listed):
        line = f":{lines[index]}" if len(lines) == len(listed) else ""
        try:
            prompts.append(msgspec.convert(table, Prompt))
        except msgspec.MsgspecError as error:
            raise RequestError(f"{path}{line}: {error}", hint=f"expected are {expected}") from error
    _check_count(len(prompts), path)
    return prompts


# Files


def _json_lines(path: Path, decoder: msgspec.json.Decoder[Any], expected: str) -> Iterator[tuple[int, Any]]:
    count = 0
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not `splitlines`: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RequestError(f"{path}:{number}: {error}", hint=f"expected is {expected}") from error
        count += 1
        _check_count(count, path)
        yield number, row


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise RequestError(f"{path} has more than {FILE_BYTES_MAX} bytes", hint="split it")
        return path.read_bytes().decode()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}:{line}: not UTF-8", hint="save it as UTF-8") from error


def _check_count(count: int, path: Path) -> None:
    if count > ITEMS_MAX:
        raise RequestError(f"{path}: more than {ITEMS_MAX} questions", hint="split the suite")
