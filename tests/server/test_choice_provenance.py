"""The record that `whimbrel requantize` leaves beside a file: signed with the release as its provenance, refused when it is about other bytes."""

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.errors import ReleaseError
from protocol.ids import digest_of
from server import operations
from server.cli import main
from server.releases.provenance import PROVENANCE_BYTES_MAX, decode_statement, with_scorecard
from server.releases.requantized import EMBEDDED_BYTES_MAX
from server.requantize.choice import Chosen
from server.requantize.provenance import Sources, write_record
from server.requantize.settings import Settings
from server.scorecard.card import Check
from server.statements import ChoiceRecord, record_beside
from tests.server.samples import write_health, write_model

Json = dict[str, Any]

PASSED = (
    Check(name="sources.txt: divergence", status="passed", detail="-0.1000 nats (-0.1100 to -0.0900)"),
    Check(name="golden", status="passed", detail="9 of the 9 prompts that plain answers as it has to"),
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    operations.init_repository(tmp_path / "server", "lab")
    return tmp_path / "server"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "v2.onnx", 2)


def _sources(model: Path) -> Sources:
    return Sources(
        new=digest_of(b"new"),
        installed=digest_of(b"installed"),
        before=digest_of(b"before"),
        start=None,
        calibration_model=digest_of(b"new"),
        calibration_tokens=digest_of(b"tokens"),
        calibration_runs=(40, 256),
        result=digest_of(model.read_bytes()),
    )


def _record(model: Path, guards: tuple[Check, ...] | None = PASSED, tensors: int = 2) -> Path:
    """As the command writes it, about a file that is there."""
    chosen = Chosen(
        price=6.25e-9,
        delta_bytes=250_000,
        file_bytes=model.stat().st_size,
        changed={f"blk.{number}.ffn_down.weight": 17 for number in range(tensors)},
        codes=1_000_000,
        kept=(),
        objective_before=0.2,
        objective_after=0.1,
        rounds=((6.25e-9, 250_000),),
        divergences=(),
        seconds=60.0,
        settings=Settings(budget_bytes=275_000, extrapolation=0.5, workers=2),
        sources=_sources(model),
    )
    return write_record(model, chosen, guards)


def _add(home: Path, *files: Path, options: tuple[str, ...] = ()) -> int:
    words = ["release", "add", "digits", "2", *map(str, files), "--runtime", "onnx", "--dir", str(home)]
    return main([*words, "--health", str(write_health(home.parent / "health.json")), *options])


def _statement(home: Path, capsys: pytest.CaptureFixture[str]) -> Json:
    capsys.readouterr()
    assert main(["release", "show", "digits", "2", "--json", "--dir", str(home)]) == 0
    shown: Json = json.loads(capsys.readouterr().out)
    return shown["provenance"]  # type: ignore[no-any-return]  # JSON


def test_a_release_says_how_its_file_was_chosen(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model)
    assert _add(home, model) == 0
    assert f"How it was chosen is signed with it, from {record}" in capsys.readouterr().out
    statement = _statement(home, capsys)
    build, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert build["buildType"] == "urn:whimbrel:requantization:1"
    asked = build["externalParameters"]
    assert asked["requantized"]["budget_bytes"] == 275_000
    assert asked["requantized"]["extrapolation"] == 0.5
    assert not {"price", "workers"} & set(asked["requantized"])  # not asked for; without effect
    assert asked["calibration"] == {
        "tokens_sha256": digest_of(b"tokens"),
        "runs": 40,
        "run_tokens": 256,
    }
    assert build["internalParameters"] == {"price": 6.25e-9, "delta_bytes": 250_000, "guards": "2 passed"}
    assert {each["name"]: each["digest"]["sha256"] for each in build["resolvedDependencies"]} == {
        "new model": digest_of(b"new"),
        "installed file": digest_of(b"installed"),
        "installed version in floats": digest_of(b"before"),
    }
    (embedded,) = run["byproducts"]
    assert embedded["name"] == "requantized"
    assert embedded["mediaType"] == "application/json"
    assert b64decode(embedded["content"]) == record.read_bytes()
    assert embedded["digest"]["sha256"] == digest_of(record.read_bytes())


def test_all_files_of_a_fleet_that_it_was_chosen_for_are_named(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model)
    content = json.loads(record.read_bytes())
    shares = {"installed": 0.75, "older": 0.25}
    content["sent"] = [
        {"name": name, "sha256": digest_of(name.encode()), "share": share, "delta_bytes": 9}
        for name, share in shares.items()
    ]
    record.write_text(json.dumps(content))
    assert _add(home, model) == 0
    build = _statement(home, capsys)["predicate"]["buildDefinition"]
    named = {each["name"]: each["digest"]["sha256"] for each in build["resolvedDependencies"]}
    assert named["installed file"] == digest_of(b"installed")
    assert named["installed file of 0.25 of the fleet"] == digest_of(b"older")


def test_a_file_of_which_samples_said_what_counts_names_them(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model)
    content = json.loads(record.read_bytes())
    names = ("new", "installed", "before", "result")
    sources = {name: content["sources"][name] for name in names}
    record.write_text(json.dumps({**content, "sources": {**sources, "samples": digest_of(b"samples")}}))
    assert _add(home, model) == 0
    build = _statement(home, capsys)["predicate"]["buildDefinition"]
    assert build["externalParameters"]["calibration"] == {"samples_sha256": digest_of(b"samples")}


def test_show_tells_people_how_it_was_chosen_and_whether_it_was_judged(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model, guards=None)
    assert _add(home, model, options=("--builder", "https://ci.example/7")) == 0
    capsys.readouterr()
    assert main(["release", "show", "digits", "2", "--dir", str(home)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"  source       new model sha256 {digest_of(b'new')}",
        f"  source       installed file sha256 {digest_of(b'installed')}",
        "  delta_bytes  250000",
        "  guards       none: written without being judged",
        "  build type   urn:whimbrel:requantization:1",
        f"  record       sha256 {digest_of(record.read_bytes())}, in the statement",
    ):
        assert line in lines
    (asked,) = (line for line in lines if line.startswith("  requantized  "))
    assert {"budget_bytes=275000", "extrapolation=0.5", "metric=outputs"} <= set(asked[15:].split(", "))
    assert any(line.startswith("  builder      https://ci.example/7 (whimbrel ") for line in lines)


def test_a_record_of_other_bytes_is_refused_and_nothing_is_added(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model)
    chosen = digest_of(model.read_bytes())
    write_model(model, 3)
    assert _add(home, model) == 1
    error = capsys.readouterr().err
    assert f"{record} is the record of a file with the digest {chosen}" in error
    assert f"v2.onnx has {digest_of(model.read_bytes())}" in error
    assert "remove the record" in error
    assert operations.list_releases(home) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "is no record of `whimbrel requantize`"),
        (b"[]", "is no record of `whimbrel requantize`"),
        (b"\xff", "is no record of `whimbrel requantize`"),
        (b"[" * 100_000, "is no record of `whimbrel requantize`"),
        (b'{"requantized": 2}', "record of version 2, known is 1"),
        (b'{"requantized": 1, "price": "x"}', "is no record of `whimbrel requantize`: "),
        (b" " * ((4 << 20) + 1), "a record has at most 4194304 bytes"),
    ],
    ids=["torn", "no object", "no text", "deep", "another version", "a wrong field", "too long"],
)
def test_what_is_no_record_is_refused_before_a_file_is_copied(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str], data: bytes, words: str
) -> None:
    record = _record(model)
    record.write_bytes(data)
    assert _add(home, model) == 1
    error = capsys.readouterr().err
    assert words in error
    assert str(record) in error
    assert error.count("\n") == 1
    assert not [path for path in (home / "blobs").rglob("*") if path.is_file()]


def test_what_somebody_says_goes_before_what_lies_beside(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model)
    write_model(model, 3)  # the record is nobody's business any more
    said = ("--source", "hf://org/model", "--source-sha256", digest_of(b"source"))
    assert _add(home, model, options=said) == 0
    assert (
        f"{record} is not taken up: --provenance or --source says something else" in capsys.readouterr().out
    )
    build = _statement(home, capsys)["predicate"]["buildDefinition"]
    assert build["buildType"] == "urn:whimbrel:quantization:1"


def test_options_that_contradict_the_record_are_refused(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model)
    assert _add(home, model, options=("--quantizer", "llama-quantize b6700")) == 1
    assert f"{record} says how v2.onnx was made" in capsys.readouterr().err


def test_a_record_of_one_file_does_not_explain_a_release_of_two(
    home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, other = _record(model), tmp_path / "labels.txt"
    other.write_text("zero one two")
    assert _add(home, model, other) == 0
    assert f"{record} is not taken up: the release has 2 files" in capsys.readouterr().out
    assert _statement(home, capsys) is None
    with pytest.raises(ReleaseError, match=r"explains v2.onnx alone, the release has 2 files"):
        operations.add_release(
            home,
            "digits",
            "3",
            [model, other],
            runtime="onnx",
            health=home.parent / "health.json",
            provenance=ChoiceRecord(record),
        )


def test_a_long_record_is_named_by_its_digest(
    home: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _record(model, tensors=5_000)
    assert record.stat().st_size > EMBEDDED_BYTES_MAX
    assert _add(home, model) == 0
    (named,) = _statement(home, capsys)["predicate"]["runDetails"]["byproducts"]
    assert named["digest"]["sha256"] == digest_of(record.read_bytes())
    assert "content" not in named
    assert main(["release", "show", "digits", "2", "--dir", str(home)]) == 0
    assert ", not in the statement, for its length" in capsys.readouterr().out


def test_the_longest_record_that_is_embedded_leaves_room_for_the_scorecard_and_stays_when_that_is_bound(
    home: Path, model: Path
) -> None:
    record = _record(model)
    data = record.read_bytes()
    record.write_bytes(data + b" " * (EMBEDDED_BYTES_MAX - len(data)))
    release = operations.add_release(
        home, "digits", "2", [model], runtime="onnx", health=write_health(home.parent / "h.json"),
        provenance=ChoiceRecord(record),
    ).release  # fmt: skip
    statement = operations.show_release(home, "digits", "2").provenance
    assert statement is not None
    scored = msgspec.structs.replace(release, scorecard_sha256=digest_of(b"scorecard"))
    bound = with_scorecard(statement, scored)
    assert len(bound) <= PROVENANCE_BYTES_MAX
    byproducts = decode_statement(bound, "bound").predicate.run_details.byproducts
    assert [each.name for each in byproducts] == ["requantized", "scorecard"]
    assert b64decode(byproducts[0].content) == record.read_bytes()


def test_a_file_without_a_record_has_none(model: Path) -> None:
    assert record_beside(model) is None
    assert record_beside(model.with_name("missing.gguf")) is None
