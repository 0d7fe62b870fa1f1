"""What happened live, with real files, a real broker and real models, happens in the simulator with the same bytes."""

import json
from pathlib import Path

import pytest

from device.states import State
from protocol.delta_graph import LINK_BYTES_PER_S
from server.operations import rollout_status, start_rollout
from simulator.fleet import run_fleet
from simulator.results import FleetResult
from simulator.scenario import DeviceKind, Link, Model, ReleasePlan, Scenario
from tests.device.test_runtime import Lab, version_of


def live_transitions(trace: Path) -> list[str]:
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    return [
        f"{line['from']} {line['trigger']} {line['to']} {line['code']}".strip()
        for line in lines
        if line["kind"] == "transition"
    ]


def simulated_transitions(result: FleetResult) -> list[str]:
    states = {state.value for state in State}
    texts = [line.partition(": ")[2].strip() for line in result.story if "device 0: " in line]
    return [text for text in texts if text.split()[0] in states and len(text.split()) >= 3]


@pytest.mark.slow
def test_an_update_recorded_live_takes_the_same_transitions_in_the_simulator(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "embedded")
    device = lab.start(lab.provision("device-0"), 0)
    lab.wait(lambda: lab.server.status()["devices"] == 1)
    lab.publish_tuned("v2", "v1")
    good = start_rollout(lab.server_folder, "digits", "v2", canary_count=1)
    lab.wait(lambda: version_of(device) == "v2" and device.agent.state is State.IDLE)
    lab.wait(lambda: rollout_status(lab.server_folder, good.id).rollout.state.value == "finished")
    update = device.agent.record.update
    assert update is not None
    lab.publish("v3", seed=3, shift=1)
    bad = start_rollout(lab.server_folder, "digits", "v3", canary_count=1)
    lab.wait(lambda: rollout_status(lab.server_folder, bad.id).rollout.state.value == "stopped")
    lab.wait(lambda: device.agent.state is State.ROLLED_BACK)
    lab.close()

    files = tuple(str(tmp_path / f"{version}.onnx") for version in ("v1", "v2", "v3"))
    plans = (
        ReleasePlan(version="v2", canary_count=1),
        ReleasePlan(version="v3", kind="wrong", canary_count=1),
    )
    kind = DeviceKind(
        link=Link(down_bytes_per_s=LINK_BYTES_PER_S), processor_percent=100
    )  # as configured live
    scenario = Scenario(devices=1, population=(kind,), model=Model(files=files), releases=plans)
    result = run_fleet(scenario, follow=0)
    assert result.failure is None
    assert [rollout.state for rollout in result.rollouts] == ["finished", "stopped"]
    assert simulated_transitions(result) == live_transitions(tmp_path / "device-0.trace")
    # The same files give the same deltas, so the same bytes were fetched.
    assert update.items[0].blob_length in result.delta_bytes.values()
