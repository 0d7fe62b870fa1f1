"""Stolen, lost and replaced keys on a live fleet, by the runbook; `make key-rotation` does it with more devices and three rollouts."""

import json
from pathlib import Path

import pytest

from server import cli
from tests.key_rotation import runbook
from tests.key_rotation.__main__ import Outcome, Step, main, run, summary
from tests.key_rotation.runbook import run_line
from tests.server.brokers import MOSQUITTO_PATH

BROKER = "embedded" if MOSQUITTO_PATH is None else "mosquitto"


# paho leaves the socket of a handshake that failed to the collector, which closes it, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_15_16_17_19_a_live_fleet_outlives_a_lost_root_key_and_the_theft_of_everything_on_the_server(
    tmp_path: Path,
) -> None:
    outcome = run(tmp_path, devices=2, broker=BROKER, seed=1, is_reduced=True)
    assert not outcome.violation, summary(outcome)
    assert len(outcome.steps) == 8
    assert outcome.answers > 100


def test_the_outcome_names_what_was_violated_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(
        3, "mosquitto", [Step("a root key is lost", 1.5, "root 3")], violation="device-1 runs v9"
    )
    assert "VIOLATION: device-1 runs v9" in summary(outcome)
    monkeypatch.setattr("tests.key_rotation.__main__.run", lambda *_, **__: outcome)
    assert main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["steps"][0]["shown"] == "root 3"


def test_a_command_of_the_runbook_that_fails_or_is_not_known_is_no_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runbook, "main", lambda words: cli.main([*words, "--dir", "/nowhere"]))
    with pytest.raises(AssertionError, match="keys list"):
        run_line("whimbrel keys list")
    with pytest.raises(AssertionError, match="runs curl"):
        run_line("curl example.org")
