"""A whole run with a small fleet: real agents, a real broker, real models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulator.live.brokers import MOSQUITTO

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 6


def run(folder: Path, models: Path, broker: str) -> tuple[dict[str, Any], str, str]:
    """The JSON document, the progress and the page of a run that must have passed."""
    report = folder / "report.html"
    command = [
        sys.executable,
        "-m",
        "simulator.cli",
        "run",
        "--devices",
        str(DEVICES),
        "--seed",
        "3",
        "--json",
    ]
    command += ["--models", str(models), "--broker", broker, "--report", str(report)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("whimbrel*")) == []
    return json.loads(done.stdout), done.stderr, report.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["embedded", pytest.param(MOSQUITTO, marks=pytest.mark.mosquitto)])
def test_a_small_fleet_takes_the_good_release_and_gives_the_bad_one_back(
    broker: str, tmp_path: Path, models: Path
) -> None:
    if broker == MOSQUITTO:
        from tests.server.brokers import MOSQUITTO_MISSING, MOSQUITTO_PATH  # noqa: PLC0415 - only this case needs it

        if MOSQUITTO_PATH is None:
            pytest.skip(MOSQUITTO_MISSING)
    document, progress, page = run(tmp_path, models, broker)
    assert document["is_passed"] is True
    totals = document["totals"]
    assert totals["on_good_version"] == totals["devices"] == DEVICES
    assert totals["chunks_twice"] == totals["redundant_chunks"] == totals["failed"] == 0
    assert totals["cut_devices"] >= 2
    assert totals["killed_devices"] >= 1
    assert totals["delta_chunks"] >= 20
    good, bad = document["rollouts"]
    assert (good["state"], bad["state"]) == ("finished", "stopped")
    canaries = {member["device"] for member in bad["members"]}
    assert len(canaries) == bad["canary_count"] == 2
    for device in document["devices"]:
        assert (device["bad_outcome"] == "") == (device["device"] not in canaries)
    # All outputs come from one record: what the document says is on the page and in the summary.
    for check in document["checks"]:
        assert check["is_passed"]
        assert check["measured"] in page
    assert f"All {len(document['checks'])} checks passed" in progress
    killed = [fault for fault in document["faults"] if fault["kind"] == "kill"]
    assert killed
    assert all(fault["is_mid_update"] for fault in killed)
