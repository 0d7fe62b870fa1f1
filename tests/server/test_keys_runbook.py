"""The runbook docs/keys.md, run as it stands: every command in order, in one folder, with one passphrase for all."""

import re
import shlex
from pathlib import Path

import pytest

from server import ceremony
from server.adapters.keys import PASSPHRASE_VARIABLE
from server.cli import main
from tests.models import write_classifier, write_health_plan

RUNBOOK = Path(__file__).parents[2] / "docs/keys.md"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


def test_every_command_of_the_runbook_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classifier(tmp_path / "v1.onnx", 1, hidden=40)
    write_health_plan(tmp_path / "health.json")
    (tmp_path / "passphrase").write_text("correct horse battery\n")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "passphrase")
    for program, *words in commands():
        match program:
            case "whimbrel":
                assert main(words) == 0, (words, capsys.readouterr().err)
            case "export":
                monkeypatch.setenv(*words[0].split("="))
            case "rm":
                for name in words:
                    Path(name).unlink()
            case _:
                pytest.fail(f"{RUNBOOK} runs {program}")
    said = capsys.readouterr().out
    assert "A device that starts from root 1 runs this file." in said
    status = ceremony.status(Path("fleet"))
    assert status.pending == []
    keys = {role.role: [key.key.name for key in role.keys] for role in status.roles}
    assert keys == {
        "root": ["ana", "ben", "dora"],
        "targets": ["ana", "ben", "dora"],
        "snapshot": ["snapshot-2"],
        "timestamp": ["timestamp-2"],
        "artifacts": ["artifacts-2"],
        "director": ["director-2"],
        "releases.digits": ["builder-2", "approver-2"],
    }
    online = {"snapshot", "timestamp", "artifacts", "director"}
    assert {role.role for role in status.roles if role.is_automatic} == online
