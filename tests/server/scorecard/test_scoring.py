"""Scorecards of classifiers, from the command down to the runtime: what people, programs and the release get to see."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from scipy import special

from protocol.errors import EngineError, ReleaseError, RequestError, StorageError
from protocol.ids import Family, Version, digest_of, parse_digest
from protocol.release import file_target
from server import operations
from server.cli import main
from server.documents import read_card
from server.home import opened
from server.releases.provenance import Origin, decode_statement, scorecard_digests
from server.scorecard.card import decode_card, encode_card
from server.scorecard.items import ClassQuestion, Item, SuiteKind, sampled
from server.scorecard.keeping import Plan
from server.scorecard.suites import Asking
from server.scorecard.verdict import Limits
from server.scorecard.work import Load, MemoryOrder, Model, SpeedOrder
from server.scorecard.worker import Worker
from server.scoring import Scored, score_release
from tests.models import CLASSES, FEATURES, write_classifier, write_health_plan

QUICK = Plan(
    asking=Asking(),
    limits=Limits(),
    threads=1,
    speed=SpeedOrder(inferences=400, loads=1),
    memory=MemoryOrder(),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server with three drafts: v2 answers as v1, v3 answers wrongly. What one test has measured no other measures again."""
    folder = tmp_path_factory.mktemp("scoring")
    operations.init_repository(folder / "server", "lab")
    for version, seed, shift in (("v1", 1, 0), ("v2", 2, 0), ("v3", 2, 1)):
        add(folder / "server", version, write_classifier(folder / f"{version}.onnx", seed, shift=shift))
    return folder / "server"


def add(home: Path, version: str, model: Path, provenance: Path | Origin | None = None) -> None:
    health = write_health_plan(home.parent / "health.json")
    operations.add_release(
        home, "digits", version, [model], runtime="onnx", health=health, provenance=provenance
    )


def inputs(path: Path, count: int) -> Path:
    """A classification set whose labels are those of the strongest of the first inputs, with some noise."""
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 0.4, (count, FEATURES))
    labels = rng.integers(0, CLASSES, count)
    rows[np.arange(count), labels] += 1.0
    lines = [
        json.dumps({"input": row.tolist(), "label": int(label), "group": f"class {label}"})
        for row, label in zip(rows, labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def score(home: Path, version: str, against: str | None = None, count: int = 120, **changes: Any) -> Scored:
    """Ask the first `count` of 200 inputs."""
    asking = Asking(samples={"classes": count})
    plan = msgspec.structs.replace(QUICK, **{"asking": asking, **changes})
    suite = inputs(home.parent / "set.jsonl", 200)
    return score_release(home, "digits", version, suites=[("classes", suite)], plan=plan, against=against)


def journals(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (home / "scorecards").glob("*.jsonl")}


def test_a_version_that_answers_as_well_passes_and_its_figures_are_those_of_the_model(home: Path) -> None:
    card = score(home, "v2", "v1").card
    assert card.verdict == "passed"
    assert {check.name: check.status for check in card.checks} == dict.fromkeys(
        ("health plan", "memory", "classes: drop"), "passed"
    )
    assert [file.sha256 for file in card.subject.files] == [digest_of((home.parent / "v2.onnx").read_bytes())]
    assert card.speed is not None
    assert card.speed.count == 400
    assert 0 < card.speed.p50_ms.value <= card.speed.p95_ms.value <= card.speed.p99_ms.value
    assert card.speed.p99_ms.high is not None
    (cost,) = card.resources.costs
    products = 2 * (FEATURES * 64 + 64 * CLASSES)
    assert cost.operations == products + 64  # and a rectifier
    weights = 4 * (FEATURES * 64 + 64 * CLASSES)
    assert weights <= cost.moved_bytes <= weights + 8 * (64 + 64 + CLASSES)
    assert card.memory is not None
    assert card.memory.contexts[0].peak_bytes >= card.memory.runtime_bytes > 10 << 20


def test_accuracy_and_divergence_agree_with_the_matrices_themselves(home: Path) -> None:
    card = score(home, "v3", "v1", count=200, drift_texts=1000).card
    rows = [json.loads(line) for line in (home.parent / "set.jsonl").read_text().splitlines()]
    given, labels = np.array([row["input"] for row in rows]), np.array([row["label"] for row in rows])

    def logits(version: str, values: Any) -> Any:
        weights = {
            each.name: numpy_helper.to_array(each)
            for each in onnx.load(home.parent / f"{version}.onnx").graph.initializer
        }
        return np.maximum(values @ weights["w1"], 0) @ weights["w2"]

    before, now = (logits(version, given).argmax(axis=1) == labels for version in ("v1", "v3"))
    suite = next(each for each in card.suites if each.name == "classes")
    assert (suite.right, suite.count) == (int(now.sum()), 200)
    assert card.drift is not None
    flips = next(each for each in card.drift.suites if each.name == "classes").paired
    assert (flips.gained, flips.lost) == (int((now & ~before).sum()), int((before & ~now).sum()))
    assert card.verdict == "failed"

    prompts = [item["input"] for item in json.loads((home.parent / "health.json").read_text())["prompts"]]
    read = np.vstack([given, np.array(prompts)])
    old, new = (special.log_softmax(logits(version, read), axis=1) for version in ("v1", "v3"))
    divergence = (np.exp(old) * (old - new)).sum(axis=1)
    assert card.drift.texts is not None
    assert card.drift.texts.positions == len(read)
    assert card.drift.texts.mean.value == pytest.approx(divergence.mean(), rel=1e-4)
    assert card.drift.texts.largest == pytest.approx(divergence.max(), rel=1e-4)


def test_the_same_again_is_read_back_and_starts_no_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = score(home, "v2", "v1")
    before = journals(home)

    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    again = score(home, "v2", "v1")
    assert again.card == first.card
    assert journals(home) == before


def test_a_question_that_stands_in_a_suite_twice_is_asked_once_and_counts_twice(
    home: Path, tmp_path: Path
) -> None:
    line = json.dumps({"input": [0.5, *[0.25] * (FEATURES - 1)], "label": 0})
    (tmp_path / "twice.jsonl").write_text(f"{line}\n{line}\n")
    before = sum(data.count(b'"reply:') for data in journals(home).values())
    plan = msgspec.structs.replace(QUICK, asking=Asking())
    suites: list[tuple[SuiteKind, Path]] = [("classes", tmp_path / "twice.jsonl")]
    card = score_release(home, "digits", "v1", suites=suites, plan=plan).card
    (found,) = [each for each in card.suites if each.name == "classes"]
    assert (found.count, found.right) == (2, 2)
    prompts = sum(each.count for each in card.suites if each.name == "health plan")
    asked = sum(data.count(b'"reply:') for data in journals(home).values()) - before
    assert asked in {1, 1 + prompts}  # those of the health plan may have been asked by a test before


def test_a_run_that_was_killed_goes_on_where_it_was(home: Path) -> None:
    suite = inputs(home.parent / "many.jsonl", 2000)
    add(home, "killed", write_classifier(home.parent / "killed.onnx", 7))
    known = journals(home)
    words = ["score", "digits", "killed", "--dir", str(home), "--threads", "1", "--suite", f"classes={suite}"]
    words = [sys.executable, "-m", "server.cli", *words]

    def written() -> dict[str, bytes]:
        return {name: data for name, data in journals(home).items() if name not in known}

    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(data.count(b'"reply:') > 100 for data in written().values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    ((name, data),) = written().items()
    whole = data[: data.rindex(b"\n") + 1]
    assert whole.count(b'"reply:') < 2000
    plan = msgspec.structs.replace(QUICK, speed=SpeedOrder())
    scored = score_release(home, "digits", "killed", suites=[("classes", suite)], plan=plan)
    after = written()[name]
    assert after.startswith(whole)
    keys = [json.loads(line)["key"] for line in after.splitlines()[1:] if line.endswith(b"}")]
    assert len(keys) == len(set(keys)) == 2 + 8 + 2000  # two measurements, the prompts of the plan, the set
    assert scored.card.suites[1].count == 2000
    assert not list((home / "scorecards").glob("files-*"))


def test_a_scorecard_that_is_not_complete_never_passes_and_is_not_bound(home: Path) -> None:
    path = home.parent / "nan.onnx"
    model = onnx.load(home.parent / "v1.onnx")
    weights = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weights[0, 0] = np.nan  # scores are numbers only where this one is multiplied with nothing
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "w2"))
    onnx.save(model, str(path))
    add(home, "v4", path)
    scored = score(home, "v4")
    assert scored.card.verdict != "passed"
    assert scored.card.missing_count >= 120
    assert all("not finite" in missing.reason for missing in scored.card.missing)
    assert (scored.is_bound, scored.note) == (False, "it is not complete")
    assert operations.show_release(home, "digits", "v4").record.release.scorecard_sha256 is None
    assert main(["score", "digits", "v4", "--dir", str(home)]) == 1


def test_a_runtime_that_hangs_is_ended_and_not_asked_forever(home: Path) -> None:
    add(home, "hangs", write_classifier(home.parent / "hangs.onnx", 8))
    scored = score(home, "hangs", timeout_s=0.001)
    assert scored.card.verdict in {"failed", "incomplete"}
    reasons = [missing.reason for missing in scored.card.missing]
    assert (
        sum("no answer within 0.001 s" in reason for reason in reasons) == 2 + 3
    )  # measurements, then questions
    assert reasons[-1] == "not asked: the runtime died 3 times"
    assert score(home, "hangs").card.verdict == "passed"  # once the machine has time


def test_a_worker_that_dies_says_of_what(tmp_path: Path) -> None:
    model = Model(
        path=str(write_classifier(tmp_path / "m.onnx", 1)), runtime="onnx", threads=1, context_tokens=1
    )
    with Worker(model) as worker:
        worker.ask(Load())
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(EngineError, match="died of SIGSEGV"):
            worker.ask(Load())
        assert not worker.is_alive


def test_undecided_is_no_pass_and_says_how_many_questions_decide(home: Path) -> None:
    card = score(home, "v2", "v1", count=10).card
    assert card.verdict == "undecided"
    check = next(each for each in card.checks if each.name == "classes: drop")
    assert check.status == "undecided"
    assert "questions decide it" in check.detail


def test_limits_of_a_file_are_kept(home: Path) -> None:
    limits = Limits(accuracy_min={"classes": 0.999, "gone": 0.5}, kl_mean_max=1e-9)
    checks = {check.name: check.status for check in score(home, "v2", "v1", limits=limits).card.checks}
    assert checks["gone: accuracy"] == "undecided"
    assert checks["classes: accuracy"] in {"failed", "undecided"}
    assert checks["KL divergence"] == "failed"


def test_the_draft_names_its_scorecard_and_publishing_signs_it(home: Path, tmp_path: Path) -> None:
    add(home, "out", home.parent / "v2.onnx")
    scored = score(home, "out", "v1")
    assert scored.is_bound
    release = operations.show_release(home, "digits", "out").record.release
    assert release.scorecard_sha256 == scored.digest
    operations.publish_release(home, "digits", "out")
    operations.export_release(home, "digits", "out", tmp_path / "out")
    data = (tmp_path / "out" / "scorecard.json").read_bytes()
    assert digest_of(data) == scored.digest
    assert decode_card(data, "it") == scored.card
    assert encode_card(scored.card) == data
    with opened(home) as there:
        assert read_card(there, release) == scored.card
        repository = there.store.repository()
    assert repository is not None
    assert any(
        file_target(scored.digest).encode() in document for _, document in repository.documents.delegated
    )
    again = score(home, "out")
    assert not again.is_bound
    assert "published" in again.note
    with opened(home) as there:
        there.blobs.path(scored.digest).write_bytes(data[:-1])
        with pytest.raises(StorageError, match="damaged"):
            read_card(there, release)
        there.blobs.path(scored.digest).write_bytes(data)


def test_a_statement_that_a_person_made_names_the_scorecard_too(home: Path) -> None:
    add(
        home,
        "v5",
        home.parent / "v1.onnx",
        Origin(source="f32.onnx", source_sha256=parse_digest("ab" * 32), quantizer="q 1"),
    )
    for count in (120, 80):
        scored = score(home, "v5", count=count)
        details = operations.show_release(home, "digits", "v5")
        assert details.provenance is not None
        assert scorecard_digests(details.provenance) == {scored.digest}
        assert details.provenance.predicate.build_definition.external_parameters["quantizer"] == "q 1"
    assert operations.publish_release(home, "digits", "v5").published_ms is not None


def test_a_build_systems_statement_is_left_as_it_is(home: Path, tmp_path: Path) -> None:
    model = home.parent / "v1.onnx"
    add(home, "v6", model, Origin(source="f32.onnx", source_sha256=parse_digest("ab" * 32)))
    with opened(home) as there:
        record = there.store.release(Family("digits"), Version("v6"))
        assert record is not None
        statement = there.blobs.path(parse_digest(str(record.release.provenance_sha256))).read_bytes()
    theirs = statement.replace(b"urn:whimbrel:quantization:1", b"https://ci.example/quantize")
    (tmp_path / "theirs.json").write_bytes(theirs)
    decode_statement(theirs, "theirs")
    add(home, "v6", model, tmp_path / "theirs.json")
    scored = score(home, "v6")
    assert not scored.is_bound
    assert scored.digest in scored.note
    assert operations.show_release(home, "digits", "v6").record.release.provenance_sha256 == digest_of(theirs)


class _Page(HTMLParser):
    """Checks that every element is closed, and collects what a reader and a screen reader get."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag == "svg":
            assert told["role"] == "img"
            self.pictures.append(told["aria-label"] or "")
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_command_tells_people_programs_and_browsers_the_same(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, page = inputs(home.parent / "set.jsonl", 200), home.parent / "card.html"
    words = ["score", "digits", "v2", "--against", "v1", "--suite", f"classes={suite}", "--dir", str(home)]
    words += ["--threads", "1", "--sample", "classes=120"]
    assert main([*words, "--html", str(page)]) == 0
    told = capsys.readouterr()
    assert "speed: 1 of 1" in told.err
    lines = told.out.splitlines()
    assert lines[0] == "digits v2: passed"
    assert any(line.startswith("classes      120 of 200") for line in lines)
    assert lines[-1] == "digits v2 names it, and publishing signs it"
    assert main([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["scorecard"]["verdict"] == "passed"
    assert f"Scorecard: sha256 {value['digest']}" in lines
    seen = _Page(page.read_text())
    assert not seen.links  # nothing from outside
    assert value["digest"] in seen.words
    assert "digits v2 after v1: passed" in seen.words
    assert any("95 % intervals" in name for name in seen.pictures)
    assert main(["release", "show", "digits", "v2", "--dir", str(home)]) == 0
    assert f"Scorecard: passed, sha256 {value['digest']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits", "v9"], "digits has no version v9"),
        (["digits", "v2", "--against", "v9"], "digits has no version v9"),
        (["digits", "v2", "--against", "v2"], "v2 is what is measured"),
        (["digits", "v2", "--suite", "classes=/none.jsonl"], "/none.jsonl: No such file"),
        (["digits", "v2", "--limits", "/none.toml"], "/none.toml: No such file"),
        (["digits", "v2", "--html", "/none/page.html"], "/none/page.html cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["score", *words, "--dir", str(home)]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--suite", "mmlu"],
        ["--suite", "trivia=x"],
        ["--sample", "0"],
        ["--sample", "x=1"],
        ["--threads", "many"],
    ],
)
def test_wrong_usage_ends_with_2(home: Path, words: list[str]) -> None:
    assert main(["score", "digits", "v2", *words, "--dir", str(home)]) == 2


def test_suites_of_one_kind_are_told_apart(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "other/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        inputs(tmp_path / f"{name}.jsonl", 3)
    suites: list[tuple[SuiteKind, Path]] = [
        ("classes", tmp_path / "a.jsonl"),
        ("classes", tmp_path / "b.jsonl"),
    ]
    scored = score_release(home, "digits", "v1", suites=suites, plan=QUICK)
    assert [suite.name for suite in scored.card.suites] == [
        "health plan",
        "classes:a.jsonl",
        "classes:b.jsonl",
    ]
    with pytest.raises(RequestError, match="two suites"):
        score_release(
            home, "digits", "v1", suites=[suites[0], ("classes", tmp_path / "other" / "a.jsonl")], plan=QUICK
        )


@pytest.mark.parametrize("data", [b"", b"{}", b'{"v": 1}', b"\xff"])
def test_what_is_no_scorecard_is_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError, match="no scorecard"):
        decode_card(data, "it")


def test_a_sample_is_drawn_from_all_items_alike() -> None:
    items = [
        Item(name=str(number), question=ClassQuestion(input=(float(number),)), right="0")
        for number in range(100)
    ]
    counts = [0] * 100
    for seed in range(300):
        for item in sampled(items, 10, seed):
            counts[int(item.name)] += 1
    assert sum(counts) == 3000
    assert max(counts) < 60  # 30 on average, with a deviation of 5
    assert min(counts) > 8
