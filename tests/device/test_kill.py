"""A live agent under SIGKILL; `make kill-test` does the same two hundred times."""

from pathlib import Path

import pytest

from tests.kill.__main__ import main, run, summary

KILLS = 8
SEED = 20


@pytest.mark.slow
def test_a_killed_agent_always_comes_back_with_a_startable_model_and_ends_on_the_right_version(
    tmp_path: Path,
) -> None:
    outcome = run(KILLS, SEED, tmp_path)
    assert not outcome.violations, summary(outcome, SEED)
    assert outcome.kills == KILLS
    assert outcome.updates >= 1
    assert outcome.chunks_again == 0


def test_the_kill_test_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--count" in capsys.readouterr().out
