"""The steps are complete, the document is theirs, and the command asks, measures and compares."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from simulator.cli import _parser, main
from simulator.rehearsal.document import figures_in, rendered
from simulator.rehearsal.experiments import EXPERIMENTS
from simulator.rehearsal.models import CountingFile
from simulator.rehearsal.steps import all_steps

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "rehearsal.md"


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self) -> bool:
        return True


def test_the_document_is_what_the_steps_say_with_the_figures_that_it_carries() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert rendered(figures_in(text)) == text, "run `whimbrel-sim rehearse --write docs/rehearsal.md`"


def test_every_step_has_an_experiment_of_its_own_and_all_parts() -> None:
    steps = all_steps()
    assert {step.experiment for step in steps} == set(EXPERIMENTS)
    assert len({step.name for step in steps}) == len(steps) == 9
    for step in steps:
        assert len(step.followups) >= 3, step.name
        assert len({len(row) for row in step.table}) == 1, step.name


def test_every_command_in_the_document_is_one_that_exists() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [*(line for block in blocks for line in block.splitlines()), *inline]
    simulator = [line for line in lines if line.startswith((".venv/bin/whimbrel-sim ", "whimbrel-sim "))]
    assert len(simulator) > len(all_steps())
    for line in simulator:
        if "--help" not in line:
            _parser().parse_args(shlex.split(line.replace(" N ", " 10 "))[1:])
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert "demo" in targets
    for target in targets:
        assert f"\n{target}:" in makefile, target


def test_every_link_of_the_document_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT.read_text(encoding="utf-8")):
        assert (DOCUMENT.parent / link).exists(), link


def test_without_a_step_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rehearse"]) == 0
    shown = capsys.readouterr().out
    assert all(step.title in shown for step in all_steps())


def test_a_prediction_is_asked_for_measured_and_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("many\n200\n"))
    assert main(["rehearse", "transport"]) == 0
    shown = capsys.readouterr().out
    assert "'many' is no number" in shown
    assert "Measured: 100 times" in shown
    assert "You said: 200 times: off by a factor of 2.0" in shown
    assert "Follow-up questions" in shown


def test_programs_get_the_figures_and_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rehearse", "states", "--predict", "20%", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)
    assert step["predicted"] == 20.0
    assert step["figures"]["broken"] == 0
    assert step["figures"]["updated"] == step["figures"]["devices"]
    assert step["figures"]["cuts"] > 100
    assert step["measured"] == step["figures"]["median_extra_percent"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nonsense", "--predict", "1"], "requirements"),
        (["states", "--predict", "abc"], "no number"),
        (["states", "--predict", "inf"], "no number"),
        (["--all"], "--predict skip"),
        (["states", "--reuse"], "--write"),
        (["--write", "nowhere/rehearsal.md"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rehearse", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_script_without_a_prediction_is_told_what_to_give(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["rehearse", "states"]) == 1
    assert "--predict skip" in capsys.readouterr().err


def test_a_document_is_written_again_with_its_figures(tmp_path: Path) -> None:
    copy = tmp_path / "rehearsal.md"
    text = DOCUMENT.read_text(encoding="utf-8")
    copy.write_text(text.replace("The structure of the answer", "Something else"), encoding="utf-8")
    assert main(["rehearse", "--write", str(copy), "--reuse"]) == 0
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("no figures")
    assert main(["rehearse", "--write", str(copy), "--reuse"]) == 1


def test_a_counting_file_grows_shrinks_and_counts() -> None:
    file = CountingFile(b"abc")
    file.write_at(5, b"xy")
    assert file.read_at(0, 9) == b"abc\0\0xy"
    file.resize(2)
    assert (file.length, file.written) == (2, 2)
