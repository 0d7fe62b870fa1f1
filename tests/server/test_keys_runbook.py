"""The runbook docs/keys.md, run as it stands: every command in order, in one folder, with one passphrase for all."""

import re
from pathlib import Path

import pytest

from server import ceremony
from server.adapters.keys import PASSPHRASE_VARIABLE
from server.config import FOLDER_VARIABLE
from tests.key_rotation.runbook import RUNBOOK, run_line, sections
from tests.models import write_classifier, write_health_plan


def test_every_command_of_the_runbook_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classifier(tmp_path / "v1.onnx", 1, hidden=40)
    write_health_plan(tmp_path / "health.json")
    (tmp_path / "passphrase").write_text("correct horse battery\n")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "passphrase")
    monkeypatch.setenv(FOLDER_VARIABLE, "")  # the page sets it, and it is put back afterwards
    said: dict[str, str] = {}
    for section, lines in sections().items():
        for line in lines:
            run_line(line)
        said[section] = capsys.readouterr().out
    assert "A device that starts from root 1 runs this file." in said["A release"]
    status = ceremony.status(Path("fleet"))
    assert status.pending == []
    keys = {role.role: [key.key.name for key in role.keys] for role in status.roles}
    assert keys == {
        "root": ["ana-2", "ben-2", "dora-2"],
        "targets": ["ana-2", "ben-2", "dora-2"],
        "snapshot": ["snapshot-3"],
        "timestamp": ["timestamp-3"],
        "artifacts": ["artifacts-3"],
        "director": ["director-3"],
        "releases.digits": ["builder-3", "approver-3"],
    }
    online = {"snapshot", "timestamp", "artifacts", "director"}
    assert {role.role for role in status.roles if role.is_automatic} == online
    # What the page says that one will see.
    assert "root version 3 lacks 2 signature(s) of: ana, ben, dora, cem" in said["A key is lost"]
    for section, text in said.items():
        if "keys sign" in "".join(sections()[section]):
            assert re.search(r"^Published$", text, re.MULTILINE), section
    assert "targets version 4 lacks 2 signature(s)" in said["Somebody was on the server"]


def test_every_section_that_a_symptom_leads_to_is_there() -> None:
    text = RUNBOOK.read_text("utf-8")
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.*)$", text, re.MULTILINE)
    }
    led_to = set(re.findall(r"\]\(#([a-z0-9-]+)\)", text))
    assert len(led_to) >= 6
    assert led_to <= anchors
