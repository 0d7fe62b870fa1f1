"""Where a model comes from: what is said with a release, refused when it is about something else, and signed like everything else."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.errors import ReleaseError, RequestError, StorageError
from protocol.ids import Family, Version, digest_of
from protocol.release import Release, file_target, release_target
from protocol.trust import Floors, verify
from server import operations
from server.adapters.clock import SystemClock
from server.cli import main
from server.home import opened
from server.releases.provenance import (
    PROVENANCE_BYTES_MAX,
    Origin,
    check_statement,
    decode_statement,
    make_statement,
)
from tests.protocol.test_release import RELEASE
from tests.server.samples import write_health, write_model

Json = dict[str, Any]
SOURCE = digest_of(b"the model before")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    operations.init_repository(tmp_path / "server", "lab")
    return tmp_path / "server"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.onnx", 1)


def _statement(*files: Path) -> Json:
    """As a build system writes it, with fields that nobody here knows."""
    subject = [
        {"name": file.name, "digest": {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}
        for file in files
    ]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://ci.example/quantize/v1",
                "externalParameters": {"quantizer": "llama-quantize", "type": "Q4_0", "imatrix": None},
                "resolvedDependencies": [
                    {"uri": "hf://org/model@main", "digest": {"sha256": SOURCE}, "mediaType": "x"}
                ],
            },
            "runDetails": {
                "builder": {"id": "https://ci.example/runner", "version": {"llama.cpp": "b6700"}},
                "metadata": {"invocationId": "run 7", "finishedOn": "2026-11-23T10:00:00Z"},
                "byproducts": [{"name": "scorecard", "digest": {"sha256": digest_of(b"scorecard")}}],
            },
        },
        "x_ours": [1, 2, 3],
    }


def _written(path: Path, statement: object) -> Path:
    path.write_text(json.dumps(statement))
    return path


def _add(home: Path, model: Path, provenance: Path | Origin | None) -> Release:
    health = write_health(home.parent / "health.json")
    record = operations.add_release(
        home, "digits", "1", [model], runtime="onnx", health=health, provenance=provenance
    )
    return record.release


def test_a_statement_of_a_build_system_is_kept_byte_for_byte_and_signed(
    home: Path, model: Path, tmp_path: Path
) -> None:
    path = _written(tmp_path / "attestation.json", _statement(model))
    release = _add(home, model, path)
    assert release.provenance_sha256 == digest_of(path.read_bytes())
    operations.publish_release(home, "digits", "1")
    operations.export_release(home, "digits", "1", tmp_path / "out")
    assert (tmp_path / "out" / "provenance.json").read_bytes() == path.read_bytes()

    with opened(home) as there:
        repository = there.store.repository()
    assert repository is not None
    documents = msgspec.structs.replace(repository.documents, roots=repository.roots[1:])
    signed = verify(repository.roots[0], documents, Floors(), SystemClock().now_ms()).targets
    description = (tmp_path / "out" / "release.json").read_bytes()
    assert signed[release_target(Family("digits"), Version("1"))].digest == digest_of(description)
    assert json.loads(description)["provenance_sha256"] == release.provenance_sha256
    assert signed[file_target(digest_of(path.read_bytes()))].length == len(path.read_bytes())


def test_a_person_says_where_a_model_comes_from(home: Path, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "f16.onnx"
    source.write_bytes(b"the model before")
    words = ["release", "add", "digits", "1", str(model), "--runtime", "onnx", "--dir", str(home)]
    words += ["--health", str(write_health(tmp_path / "h.json")), "--source", str(source)]
    words += ["--quantizer", "onnxruntime 1.32", "--setting", "type=int8", "--setting", "per_channel=yes"]
    assert main([*words, "--builder", "https://ci.example/7"]) == 0
    details = operations.show_release(home, "digits", "1")
    assert details.provenance is not None
    build = details.provenance.predicate.build_definition
    assert build.external_parameters == {
        "family": "digits",
        "version": "1",
        "runtime": "onnx",
        "quantizer": "onnxruntime 1.32",
        "settings": {"type": "int8", "per_channel": "yes"},
    }
    assert [(each.uri, each.digest) for each in build.resolved_dependencies] == [
        ("f16.onnx", {"sha256": SOURCE})
    ]
    assert details.provenance.predicate.run_details.builder.id == "https://ci.example/7"
    assert "whimbrel" in details.provenance.predicate.run_details.builder.version


@pytest.mark.parametrize("command", ["show", "inspect"])
def test_show_tells_it_to_people_and_programs(
    home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    statement = _statement(model)
    statement["predicate"]["buildDefinition"]["externalParameters"]["evil"] = "\x1b[2J" + "x" * 1000
    _add(home, model, _written(tmp_path / "a.json", statement))
    words = ["release", command, "digits", "1", "--dir", str(home)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits 1: draft"
    for line in (
        f"  source       hf://org/model@main sha256 {SOURCE}",
        "  quantizer    llama-quantize",
        "  type         Q4_0",
        "  builder      https://ci.example/runner (llama.cpp b6700)",
        f"  scorecard    sha256 {digest_of(b'scorecard')}",
    ):
        assert line in lines
    assert all(line.isprintable() and len(line) < 300 for line in lines)
    assert main([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["provenance"]["predicateType"] == "https://slsa.dev/provenance/v1"
    assert value["release"]["provenance_sha256"] == digest_of((tmp_path / "a.json").read_bytes())


def test_show_says_that_nothing_was_said(home: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _add(home, model, None)
    assert main(["release", "show", "digits", "1", "--dir", str(home)]) == 0
    assert "Provenance: none was given" in capsys.readouterr().out
    operations.publish_release(home, "digits", "1")
    operations.export_release(home, "digits", "1", home.parent / "out")
    assert not (home.parent / "out" / "provenance.json").exists()


def _other_digest(statement: Json) -> None:
    statement["subject"][0]["digest"]["sha256"] = digest_of(b"other")


def _no_digest(statement: Json) -> None:
    statement["subject"][0]["digest"] = {"sha512": "00"}


def _other_name(statement: Json) -> None:
    statement["subject"][0] = {"name": "other.onnx", "digest": {"sha256": digest_of(b"other")}}


def _one_more(statement: Json) -> None:
    statement["subject"].append({"name": "extra.onnx", "digest": {"sha256": digest_of(b"extra")}})


def _nothing(statement: Json) -> None:
    statement["subject"] = []


def _older_type(statement: Json) -> None:
    statement["_type"] = "https://in-toto.io/Statement/v0.1"


def _other_predicate(statement: Json) -> None:
    statement["predicateType"] = "https://spdx.dev/Document"


def _no_builder(statement: Json) -> None:
    del statement["predicate"]["runDetails"]["builder"]


def _wrong_parameters(statement: Json) -> None:
    statement["predicate"]["buildDefinition"]["externalParameters"] = "Q4_0"


def _too_much(statement: Json) -> None:
    statement["x_ours"] = "x" * PROVENANCE_BYTES_MAX


REFUSED: list[tuple[Callable[[Json], None], str]] = [
    (_other_digest, "the statement says that m.onnx has the digest " + digest_of(b"other")),
    (_no_digest, "the statement says that m.onnx has the digest of none"),
    (_other_name, "the statement does not name it"),
    (_one_more, "subject 'extra.onnx' is no file of the release"),
    (_nothing, "subject"),
    (_older_type, "_type is 'https://in-toto.io/Statement/v0.1', expected"),
    (_other_predicate, "predicateType is 'https://spdx.dev/Document', expected"),
    (_no_builder, "builder"),
    (_wrong_parameters, "externalParameters"),
    (_too_much, "bytes, allowed are 262144"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_statement_about_something_else_is_refused(
    home: Path, model: Path, tmp_path: Path, change: Callable[[Json], None], message: str
) -> None:
    statement = _statement(model)
    change(statement)
    with pytest.raises(ReleaseError) as refused:
        _add(home, model, _written(tmp_path / "a.json", statement))
    assert message in str(refused.value)
    assert str(tmp_path / "a.json") in str(refused.value)
    assert operations.list_releases(home) == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"_type":1}'])
def test_what_is_no_statement_is_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        decode_statement(data, "a.json")


def test_an_envelope_is_to_be_opened_by_whoever_can_verify_it() -> None:
    envelope = {"payloadType": "application/vnd.in-toto+json", "payload": "e30=", "signatures": []}
    with pytest.raises(ReleaseError, match="a signed envelope"):
        decode_statement(json.dumps(envelope).encode(), "a.json")


def test_a_statement_speaks_of_the_scorecard_that_the_release_has(model: Path) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    file = msgspec.structs.replace(RELEASE.files[0], sha256=digest)
    release = msgspec.structs.replace(RELEASE, files=[file], scorecard_sha256=digest_of(b"scorecard"))
    statement = decode_statement(json.dumps(_statement(model)).encode(), "a.json")
    check_statement(statement, release, "a.json")
    other = msgspec.structs.replace(release, scorecard_sha256=digest_of(b"another"))
    with pytest.raises(ReleaseError, match="the release has the scorecard"):
        check_statement(statement, other, "a.json")
    made = decode_statement(make_statement(release, Origin(source="x", source_sha256=SOURCE)), "made")
    check_statement(made, release, "made")
    bare = _statement(model)
    del bare["predicate"]["runDetails"]["byproducts"]
    with pytest.raises(ReleaseError, match="names none"):
        check_statement(decode_statement(json.dumps(bare).encode(), "a.json"), release, "a.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantizer", "x"], "the source of the model is missing"),
        (["--source", "hf://org/model"], "has no digest"),
        (["--source", "hf://org/model", "--source-sha256", "abc"], "--source-sha256"),
        (["--source", "here", "--source-sha256", "0" * 64], "and not 000"),
        (["--source", "https://me:token@host/m", "--source-sha256", "0" * 64], "a password in its address"),
        (["--provenance", "a.json", "--source", "x"], "says everything itself"),
        (["--provenance", "missing.json"], "missing.json: No such file"),
    ],
)
def test_options_that_do_not_fit_are_told(
    home: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_bytes(b"the model before")
    health = str(write_health(tmp_path / "h.json"))
    words = ["release", "add", "digits", "1", str(model), "--runtime", "onnx", "--health", health]
    assert main([*words, "--dir", str(home), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "token" not in error


def test_a_statement_that_was_damaged_since_is_neither_shown_nor_signed(
    home: Path, model: Path, tmp_path: Path
) -> None:
    release = _add(home, model, _written(tmp_path / "a.json", _statement(model)))
    with opened(home) as there:
        path = there.blobs.path(digest_of((tmp_path / "a.json").read_bytes()))
    path.write_bytes(path.read_bytes() + b" ")
    assert release.provenance_sha256
    with pytest.raises(StorageError, match="damaged"):
        operations.show_release(home, "digits", "1")
    with pytest.raises(StorageError, match="damaged"):
        operations.publish_release(home, "digits", "1")


def test_too_many_settings_are_refused() -> None:
    origin = Origin(source="x", source_sha256=SOURCE, settings={f"n{i}": "1" for i in range(65)})
    with pytest.raises(RequestError, match="65 settings"):
        make_statement(RELEASE, origin)


def test_no_file_of_a_release_takes_the_place_of_what_is_exported_beside_it(home: Path, model: Path) -> None:
    for name in ("release.json", "root.json", "provenance.json"):
        other = model.with_name(name)
        model.rename(other)
        with pytest.raises(ReleaseError, match=f"may be called {name}"):
            _add(home, other, None)
        other.rename(model)
