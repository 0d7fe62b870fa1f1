"""A live agent under SIGKILL; `make kill-test` does the same two hundred times."""

import json
import random
from pathlib import Path

import pytest

from device.executor import CURRENT_LINK
from device.slots import SlotName, slot_folder
from device.states import RESTING, State
from server.operations import add_release, init_repository
from tests.kill.__main__ import PHASES_S, Outcome, _draw_aim, main, run, summary
from tests.kill.device import Device, Trace
from tests.kill.models import VERSIONS, write_models
from tests.server.brokers import free_port

KILLS = 8
SEED = 20
WAIT_S = 30.0
MEND_S = 3.0


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["two slots", "in place"])
def test_a_killed_agent_always_comes_back_with_a_startable_model_and_ends_on_the_right_version(
    tmp_path: Path, in_place: bool
) -> None:
    outcome = run(KILLS, SEED, tmp_path, in_place=in_place)
    assert not outcome.violations, summary(outcome, SEED)
    assert outcome.kills == KILLS
    assert outcome.updates >= 1
    assert outcome.chunks_again == 0


def test_the_outcome_for_programs_counts_kills_by_state(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(kills=3)
    outcome.states.update({"trial": 2, "idle, starting": 1})
    monkeypatch.setattr("tests.kill.__main__.run", lambda *_, **__: outcome)
    assert main(["--json", "--seed", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["seed"], printed["kills"]) == (5, 3)
    assert printed["states"] == {"trial": 2, "idle, starting": 1}


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A provisioned device that does not run, and has no broker."""
    root = init_repository(tmp_path / "server", "lab", port=0)
    model, plan = write_models(tmp_path, SEED)[VERSIONS[0]]
    record = add_release(tmp_path / "server", "digits", "v1", [model], runtime="onnx", health=plan)
    device = Device(tmp_path, free_port(), {"v1": record.release})
    device.provision("v1", {model.name: model}, root)
    return device


def test_a_healthy_device_is_found_healthy(device: Device) -> None:
    assert device.examine() == []


def test_a_damaged_model_a_lost_record_and_a_wrong_link_are_violations(device: Device) -> None:
    link = device.config.folder / CURRENT_LINK
    model = next((device.config.folder / slot_folder(SlotName.A)).iterdir())
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "are not those of v1" in device.examine()[0]
    model.write_bytes(good)
    link.unlink()
    assert "leads nowhere" in device.examine()[0]
    link.symlink_to(slot_folder(SlotName.B))
    assert "names slot b" in device.examine()[0]
    for record in device.config.folder.glob("record.*"):
        record.write_bytes(b"damaged")
    assert "does not load" in device.examine()[0]


def test_a_kill_between_the_commit_and_the_link_is_mended_at_the_next_start(device: Device) -> None:
    link = device.config.folder / CURRENT_LINK
    link.unlink()
    link.symlink_to(slot_folder(SlotName.B))
    device.start()
    try:
        assert device.wait_for(lambda: device.trace.boots == 1, WAIT_S)
        device.wait_for(lambda: device.examine() == [], MEND_S)
    finally:
        device.close()
    assert device.examine() == []


def test_a_chunk_that_comes_twice_in_one_update_is_counted(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    requested = {"kind": "transition", "from": "idle", "trigger": "requested", "to": "syncing", "t": 5}
    chunk = {"kind": "chunk", "blob": "b", "index": 3, "t": 6}
    lines = [requested, chunk, {"kind": "boot", "t": 7}, chunk, requested, chunk]
    trace._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace.follow()
    assert (trace.chunks, trace.chunks_again, trace.boots) == (3, 1, 1)


@pytest.mark.parametrize("state", State)
def test_every_phase_that_is_still_ahead_is_aimed_at(state: State) -> None:
    rng = random.Random(SEED)
    aims = {_draw_aim(state, rng) for _ in range(1_000)}
    phases = list(PHASES_S)
    first = 0 if state in RESTING or state not in PHASES_S else phases.index(state)
    assert "start" in aims
    if state in RESTING:
        assert {phase.value for phase in phases[:-1]} <= aims
    elif state in PHASES_S:
        assert {phase.value for phase in phases} & aims >= {phase.value for phase in phases[first:-1]}
        assert not aims & {phase.value for phase in phases[:first]}


def test_the_table_names_the_seed_and_every_violation() -> None:
    good, bad = Outcome(kills=3), Outcome(kills=1, violations=["no version is active"])
    assert "after every kill there was a model that starts" in summary(good, 7)
    assert "VIOLATION: no version is active" in summary(bad, 7)
    assert "--seed 7" in summary(bad, 7)


def test_the_kill_test_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--count" in capsys.readouterr().out
