"""The owner's command after a swap."""

import json
import logging
import sys
from functools import partial
from pathlib import Path

import pytest

from device.adapters.hooks import SwapHook
from tests.server.brokers import wait_until

APPEND = (
    "import json, os, sys, time; "
    "open(sys.argv[1], 'a').write(json.dumps({k: v for k, v in os.environ.items() if k.startswith('WHIMBREL_')}) + '\\n'); "
    "time.sleep(float(sys.argv[2]))"
)


def command(log: Path, lasts_s: float = 0.0) -> list[str]:
    return [sys.executable, "-S", "-c", APPEND, str(log), str(lasts_s)]


def runs(log: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def is_idle(hook: SwapHook) -> bool:
    return not hook._is_running


def test_without_a_command_nothing_runs() -> None:
    hook = SwapHook((), 1.0)
    hook.run({"WHIMBREL_VERSION": "1"})
    assert is_idle(hook)


def test_it_learns_what_answers_now(tmp_path: Path) -> None:
    hook = SwapHook(command(tmp_path / "log"), 30.0)
    hook.run({"WHIMBREL_VERSION": "1"})
    assert wait_until(lambda: is_idle(hook))
    assert runs(tmp_path / "log") == [{"WHIMBREL_VERSION": "1"}]


def test_swaps_while_it_runs_have_it_run_once_more_with_the_last_of_them(tmp_path: Path) -> None:
    hook = SwapHook(command(tmp_path / "log", 0.5), 30.0)
    hook.run({"WHIMBREL_VERSION": "1"})
    assert wait_until(lambda: len(runs(tmp_path / "log")) == 1)
    hook.run({"WHIMBREL_VERSION": "2"})
    hook.run({"WHIMBREL_VERSION": "3"})
    assert wait_until(lambda: is_idle(hook))
    assert [each["WHIMBREL_VERSION"] for each in runs(tmp_path / "log")] == ["1", "3"]


def test_one_that_does_not_end_is_killed_with_what_it_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "pid"
    hook = SwapHook(["sh", "-c", f"sleep 60 & echo $! > {log}; wait"], 0.5)
    with caplog.at_level(logging.WARNING):
        hook.run({})
        assert wait_until(lambda: is_idle(hook))
    assert "sh was killed after 0.5 s" in caplog.text
    child = int(log.read_text())
    assert wait_until(lambda: not is_alive(child))


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_that_fails_or_is_not_there_is_told_and_the_next_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for line, said in ((["false"], "false ended with 1"), ([str(tmp_path / "none")], "No such file")):
        hook = SwapHook(line, 5.0)
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                hook.run({})
                assert wait_until(partial(is_idle, hook))
            assert said in caplog.text


def test_it_does_not_outlive_the_agent(tmp_path: Path) -> None:
    hook = SwapHook(command(tmp_path / "log", 60), 120.0)
    hook.run({})
    assert wait_until(lambda: len(runs(tmp_path / "log")) == 1)
    hook.run({})
    hook.stop()
    assert wait_until(lambda: is_idle(hook))
    hook.run({})
    assert len(runs(tmp_path / "log")) == 1
