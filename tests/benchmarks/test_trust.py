"""What the benchmark of trust measures: real repositories, handshakes and reports."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.trust import FAMILY, ROLES, Report, repositories, show_documents, signatures_checked
from benchmarks.trust_memory import main as memory
from benchmarks.trust_repositories import build
from benchmarks.trust_traffic import measure_handshakes
from protocol.ids import Version
from protocol.release import release_target
from protocol.trust import Documents, Floors, verify

NOW_MS = int(time.time() * 1000)


def test_a_repository_of_the_benchmark_is_believed_by_a_device_and_lists_every_release() -> None:
    repository = build(2, 3, NOW_MS).repository
    documents = repository.documents
    needed = Documents(
        timestamp=documents.timestamp,
        snapshot=documents.snapshot,
        targets=documents.targets,
        delegated=tuple((role, data) for role, data in documents.delegated if role in ROLES),
    )

    def work() -> set[str]:
        return set(verify(repository.roots[-1], needed, Floors(), NOW_MS, ROLES).targets)

    assert {release_target(FAMILY, Version(f"1.{number}")) for number in (1, 2, 3)} <= work()
    # Root, targets and the family by two each, and three online roles by one.
    assert signatures_checked(work) == 9


def test_a_handshake_takes_both_certificates_along(tmp_path: Path) -> None:
    handshakes, lengths = measure_handshakes(tmp_path, NOW_MS)
    assert [each.version for each in handshakes] == ["TLS 1.3", "TLS 1.2"]
    for each in handshakes:
        assert each.sent > lengths["device"]
        assert each.received > lengths["broker"]


def test_rows_for_programs_are_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_documents(Report(as_json=True), build(1, 1, NOW_MS))
    row = json.loads(capsys.readouterr().out)
    assert row["kind"] == "documents"
    assert row["update"] > sum(
        row[role] for role in ("timestamp", "snapshot", "targets", "releases", "artifacts")
    )


def test_a_fresh_process_says_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(["nothing"]) == 0
    assert int(capsys.readouterr().out) > 1 << 20


def test_what_cannot_be_is_named_and_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.trust.SIZES", ((1, 1), (1, 700)))
    assert [each.releases for each in repositories(Report(as_json=False), NOW_MS)] == [1]
    assert "allowed are" in capsys.readouterr().out
