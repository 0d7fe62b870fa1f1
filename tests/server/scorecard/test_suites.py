import json
from pathlib import Path

import pytest

from protocol.errors import RequestError
from server.scorecard.items import ChoiceQuestion, GoldenQuestion, Item, NumberQuestion, SuiteKind, sampled
from server.scorecard.suites import Asking, last_number, read_suite
from server.scorecard.verdict import read_limits

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2"

ORIGINAL = 'What is 1 + 1?,1,2,3,4,B\n"Two\nlines, and ""quotes""",w,x,y,z,D\n'
WITH_HEADER = "question,choice0,choice1,choice2,choice3,answer\n" + ORIGINAL.replace(",B\n", ",1\n").replace(
    ",D\n", ",3\n"
)


def mmlu(folder: Path, test: str, dev: str = "An example,1,2,3,4,C\n") -> Path:
    for name, text in (("test", test), ("dev", dev)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"high_school_sums_{name}.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    "text", [ORIGINAL, WITH_HEADER], ids=["as first released", "with a header and indices"]
)
def test_mmlu_is_read_in_both_of_its_forms(tmp_path: Path, text: str) -> None:
    suite = read_suite("mmlu", mmlu(tmp_path, text), Asking(shots=1))
    assert [item.right for item in suite.items] == ["B", "D"]
    assert {item.group for item in suite.items} == {"high_school_sums"}
    question = suite.items[0].question
    assert isinstance(question, ChoiceQuestion)
    assert question.preamble + "".join(question.shots) + question.text == (
        "The following are multiple choice questions (with answers) about high school sums.\n\n"
        "An example\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\n"
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert question.options == (" A", " B", " C", " D")


def test_gsm8k_asks_for_the_number_after_the_mark(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,204"},
        {"question": "\u2028", "answer": "#### -3"},
    ]
    rows[1]["question"] = "A line\u2028separator?"
    (tmp_path / "test.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    )
    suite = read_suite("gsm8k", tmp_path, Asking())
    assert [item.right for item in suite.items] == ["1204", "-3"]
    assert suite.notes[0].startswith("0-shot")
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    asked = read_suite("gsm8k", tmp_path, Asking()).items[1].question
    assert isinstance(asked, NumberQuestion)
    assert asked.shots == ("Question: How many?\nAnswer: 2 + 2 = <<2+2=4>>4\n#### 1,204\n\n",)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 3 + 4 = 7", "7"),
        ("#### 1,000.50 and 8", "1000.5"),
        ("She pays $1,250.", "1250"),
        ("about -0.0", "0"),
        ("none", ""),
        ("007", "7"),
        ("#### none at all", ""),
        ("-12 of them", "-12"),
    ],
)
def test_the_number_that_a_text_answers_with(text: str, number: str) -> None:
    assert last_number(text) == number


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path) -> None:
    lines = "".join(f"Question {number},1,2,3,4,A\n" for number in range(200))
    folder = mmlu(tmp_path, lines)
    small, large = (read_suite("mmlu", folder, Asking(shots=0, sample=count)) for count in (20, 50))
    assert [len(each.items) for each in (small, large)] == [20, 50]
    assert small.digest == large.digest
    assert {item.name for item in small.items} < {item.name for item in large.items}
    other: tuple[Item, ...] = sampled(read_suite("mmlu", folder, Asking(shots=0)).items, 20, seed=1)
    assert {item.name for item in other} != {item.name for item in small.items}


def test_the_example_ships_a_dozen_golden_prompts_and_edge_cases() -> None:
    golden, edge = (
        read_suite(kind, EXAMPLE / f"{kind}.toml", Asking(sample=1)) for kind in ("golden", "edge")
    )
    assert len(golden.items) >= 12  # a sample never leaves a prompt out
    assert len(edge.items) >= 5
    assert all(isinstance(item.question, GoldenQuestion) for item in (*golden.items, *edge.items))


LINE = '{"question": "How many?", "answer": "#### 4"}\n'
CLASS = '{"input": [1, 2], "label": 0}\n'
PROMPT = '{"kind": "text", "name": "a", "prompt": "p", "completion": "c", "logprob_mean_min": -1}\n'


@pytest.mark.parametrize(
    ("kind", "text", "where", "expected"),
    [
        ("mmlu", ORIGINAL + "a,b,c\n", ":4: 3 columns", "expected 6"),
        ("mmlu", ORIGINAL + "q,1,2,3,4,E\n", ":4: answer 'E'", "expected A to D or 0 to 3"),
        ("mmlu", ORIGINAL + "q,1,2,3,4,4\n", ":4: answer '4'", "expected A to D or 0 to 3"),
        ("mmlu", ORIGINAL + "q,1,2,3,4,AB\n", ":4: answer 'AB'", "expected A to D or 0 to 3"),
        ("mmlu", ORIGINAL + " ,1,2,3,4,A\n", ":4: the question is empty", ""),
        ("mmlu", ORIGINAL + '"open,1,2,3,4,A\n', ":4: ", "comma-separated"),
        ("mmlu", "", "has no question", "mmlu"),
        ("gsm8k", LINE + '{"question": "q"}\n', ":2: ", '"answer": text'),
        ("gsm8k", LINE + '{"question": "q", "answer": "4"}\n', ":2: ", "no number after ####"),
        ("gsm8k", LINE + "\n" + LINE.replace("4", "four"), ":3: ", "no number after ####"),
        ("gsm8k", LINE + "[" * 5000 + "\n", ":2: ", "expected is"),
        ("gsm8k", "", "has no question", "gsm8k"),
        ("classes", CLASS + '{"input": [1], "label": "x"}\n', ":2: ", "label"),
        ("classes", CLASS + '{"label": 1}\n', ":2: ", 'either "input" or "text"'),
        ("classes", CLASS + '{"input": [1], "text": "t", "label": 1}\n', ":2: ", 'either "input" or "text"'),
        ("classes", CLASS + '{"text": "t", "choices": ["a"], "label": 0}\n', ":2: ", "expected 2 to 1000"),
        ("classes", CLASS + '{"text": "t", "choices": ["a", "b"], "label": 2}\n', ":2: ", "expected 0 to 1"),
        ("classes", CLASS + '{"input": [1], "label": -1}\n', ":2: ", "expected 0 to 999999"),
        ("classes", CLASS + '{"input": [1], "label": 1, "lable": 2}\n', ":2: ", "lable"),
        ("golden", PROMPT + PROMPT, "'a'", "reported by its name"),
        ("golden", PROMPT + '{"kind": "image", "name": "b"}\n', ":2: ", "image"),
        ("edge", PROMPT + PROMPT.replace('"p"', "7").replace('"a"', '"b"'), ":2: ", "prompt"),
    ],
)
def test_a_malformed_suite_names_the_line_and_what_was_expected(
    tmp_path: Path, kind: SuiteKind, text: str, where: str, expected: str
) -> None:
    path = mmlu(tmp_path, text) if kind == "mmlu" else tmp_path / "suite.jsonl"
    if kind != "mmlu":
        path.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_suite(kind, path, Asking(shots=0))
    assert where in str(caught.value)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[[prompt]]\nkind = "text"\nname = "a"\n\n', ":1: "),
        (
            '[[prompt]]\nkind = "class"\nname = "a"\ninput = [1]\nlabel = 0\n\n[[prompt]]\nkind = "class"\nname = 7\n',
            ":7: ",
        ),
        ("[[prompt]\n", "line 1"),
        ("x = 1\n", "'x'"),
        ("prompt = 1\n", "'prompt'"),
    ],
)
def test_a_malformed_prompt_in_toml_names_its_line(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "golden.toml"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_suite("golden", path, Asking())
    assert where in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(LINE.encode() + b"\xff\n")
    with pytest.raises(RequestError, match=r"bytes\.jsonl:2: not UTF-8"):
        read_suite("gsm8k", tmp_path / "bytes.jsonl", Asking())
    with pytest.raises(RequestError, match="No such file"):
        read_suite("gsm8k", tmp_path / "none.jsonl", Asking())
    with pytest.raises(RequestError, match=r"has no \*_test.csv"):
        read_suite("mmlu", tmp_path, Asking())
    folder = mmlu(tmp_path / "mmlu", ORIGINAL)
    with pytest.raises(RequestError, match="1 solved examples, wanted are 5"):
        read_suite("mmlu", folder, Asking())
    (folder / "dev" / "high_school_sums_dev.csv").unlink()
    with pytest.raises(RequestError, match="--shots 0"):
        read_suite("mmlu", folder, Asking())


@pytest.mark.parametrize(
    "text", ["accuracy_drop_max = 2\n", "accuracy = 1\n", "kl_mean_max = -1\n", "= 1\n", "accuracy_min = 1\n"]
)
def test_malformed_limits_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"limits\.toml"):
        read_limits(path)
