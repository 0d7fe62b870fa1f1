"""Applications ask the endpoint while the model is swapped; `make swap-load` does it ten thousand times with a whole agent."""

import random
from pathlib import Path

import pytest

from tests.kill.models import write_models
from tests.swap_load import agent
from tests.swap_load.__main__ import class_questions, main, summary
from tests.swap_load.clients import ClassQuestions, Outcome
from tests.swap_load.swapper import (
    CountingLeases,
    UnsafeClosingLeases,
    UnsafeFollowingLeases,
    run,
)

SEED = 5
REQUESTS = 600
SWAPS = 8


def swap_under_load(folder: Path, leases: CountingLeases) -> Outcome:
    models = [model for model, _ in write_models(folder, SEED).values()]
    rng = random.Random(SEED)
    questions = ClassQuestions([[rng.gauss(0, 1) for _ in range(64)] for _ in range(20)])
    outcome = run(
        folder / "state", "onnx", models, questions, count=REQUESTS, swaps=SWAPS, seed=SEED, leases=leases
    )
    questions.check_that_versions_differ()
    return outcome


def test_a_swap_under_load_loses_no_request_and_mixes_no_versions(tmp_path: Path) -> None:
    outcome = swap_under_load(tmp_path, CountingLeases())
    assert outcome.is_good, outcome.problems
    assert outcome.answered >= REQUESTS
    assert outcome.swaps == SWAPS
    assert outcome.swaps_in_use > 0
    assert len(outcome.by_version) == SWAPS + 1


def test_a_model_that_is_closed_under_its_users_is_found(tmp_path: Path) -> None:
    outcome = swap_under_load(tmp_path, UnsafeClosingLeases())
    assert outcome.lost > 0
    assert "the model is closed" in outcome.problems[0]


def test_a_request_that_changes_to_another_model_is_found(tmp_path: Path) -> None:
    outcome = swap_under_load(tmp_path, UnsafeFollowingLeases())
    assert outcome.mixed > 0, outcome


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["two slots", "in place"])
def test_a_whole_agent_swaps_under_load_runs_its_hook_and_ends_when_it_is_asked_to(
    tmp_path: Path, in_place: bool
) -> None:
    questions = class_questions(SEED)
    outcome = agent.run(
        tmp_path, questions, count=300, swaps=2, seed=SEED, requests_per_s=100, in_place=in_place
    )
    questions.check_that_versions_differ()
    assert outcome.is_good, outcome.problems
    assert outcome.problems == []
    assert outcome.swaps == 2
    assert len(outcome.by_version) == 3
    assert (outcome.refused > 0) is in_place


def test_the_table_names_what_went_wrong_and_mistakes_are_planted_where_they_can_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = summary(Outcome(answered=3, swaps=1, mixed=1, problems=["mixed: version 1"]))
    assert "answered by a mixture             1" in text
    assert "PROBLEM: mixed: version 1" in text
    with pytest.raises(SystemExit) as ended:
        main(["--broken", "close"])
    assert ended.value.code == 2
    assert "--executor" in capsys.readouterr().err
