"""A device as it runs: real files, a real broker, a real server, a real model, real trials."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec.structs import replace

from device.adapters.clock import SystemClock
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import AgentConfig, DeviceConfig
from device.journal import Journal
from device.runtime import DeviceRuntime, install_factory
from device.states import State
from protocol.errors import RequestError
from protocol.ids import DeviceId, Family, FleetId, digest_of
from protocol.release import DeltaName, decode_release, parse_delta_target
from server.config import read_config
from server.home import opened
from server.operations import (
    RolloutPlan,
    add_release,
    init_repository,
    list_devices,
    publish_release,
    rollout_status,
    start_rollout,
)
from server.rollout_orders import explain_rollout, order_rollout
from server.rollouts.evidence import Rules
from server.rollouts.waves import parse_waves
from server.runtime import Server
from tests.models import prompts, write_classifier, write_health_plan
from tests.server.brokers import BROKERS, running_broker

HIDDEN = 40_000  # about 3 MB of weights: dozens of chunks
WAIT_S = 60.0


class Lab:
    """A server and devices on one loop."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder = folder
        self.server_folder = folder / "server"
        init_repository(self.server_folder, "lab")
        self.health = write_health_plan(folder / "health.json")
        self.publish("v1", seed=1)
        self.server = Server(replace(read_config(self.server_folder), broker=broker, port=0), seed=1)
        self.server.start()
        self.loop = MqttLoop()
        self.pool = WorkerPool(threads=2)
        self.devices: list[DeviceRuntime] = []

    def publish(self, version: str, *, seed: int, shift: int = 0) -> None:
        write_classifier(self.folder / f"{version}.onnx", seed, hidden=HIDDEN, shift=shift)
        self.publish_file(version)

    def publish_tuned(self, version: str, before: str) -> None:
        """Publish a version in which a few thousand weights of the one before are slightly other ones."""
        data = bytearray((self.folder / f"{before}.onnx").read_bytes())
        at = len(data) // 4
        for offset in range(at, at + 8_000, 4):
            data[offset] ^= len(version) + ord(version[-1])  # the lowest byte of the mantissa
        (self.folder / f"{version}.onnx").write_bytes(data)
        self.publish_file(version)

    def publish_file(self, version: str) -> None:
        model = self.folder / f"{version}.onnx"
        add_release(self.server_folder, "digits", version, [model], runtime="onnx", health=self.health)
        publish_release(self.server_folder, "digits", version)

    def config(self, name: str) -> DeviceConfig:
        host, port = self.server.broker_address
        return DeviceConfig(
            agent=AgentConfig(
                device=DeviceId(name), fleet=FleetId("lab"), family=Family("digits"), tier="pi"
            ),
            folder=self.folder / name,
            broker_host=host,
            broker_port=port,
            clock="none" if name.endswith("1") else "trusted",
        )

    def provision(self, name: str) -> DeviceConfig:
        config = self.config(name)
        release = next(
            decode_release(path.read_bytes())
            for path in (self.server_folder / "blobs").rglob("*")
            if path.is_file() and path.stat().st_size < 100_000 and b'"version":"v1"' in path.read_bytes()
        )
        model = self.folder / "v1.onnx"
        root = (self.server_folder / "metadata" / "1.root.json").read_bytes()
        install_factory(config, release, {release.files[0].name: model}, root)
        return config

    def start(self, config: DeviceConfig, seed: int) -> DeviceRuntime:
        runtime = DeviceRuntime(
            config,
            self.loop,
            self.pool,
            clock=SystemClock(),
            rng=random.Random(seed),
            trace_path=self.folder / f"{config.agent.device}.trace",
        )
        runtime.start()
        self.devices.append(runtime)
        return runtime

    def wait(self, is_done: Callable[[], bool]) -> None:
        assert self.loop.run_until(is_done, WAIT_S), [
            (runtime.config.agent.device, runtime.agent.state, runtime.agent.record.update)
            for runtime in self.devices
        ]

    def close(self) -> None:
        for runtime in self.devices:
            runtime.stop()
        self.loop.close()
        self.pool.close()
        self.server.stop()


@pytest.fixture(params=BROKERS)
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    if request.param == "embedded":
        lab = Lab(tmp_path, "embedded")
        yield lab
        lab.close()
        return
    with running_broker(request.param, tmp_path / "broker") as running:
        lab = Lab(tmp_path, f"{running.host}:{running.port}")
        yield lab
        lab.close()


def version_of(runtime: DeviceRuntime) -> str:
    return runtime.agent.record.active_slot.version


def test_a_good_release_reaches_every_device_as_a_delta_and_a_bad_one_is_stopped(lab: Lab) -> None:
    devices = [lab.start(lab.provision(f"device-{number}"), number) for number in range(3)]
    lab.wait(lambda: all(device.transport.is_connected and device.executor.model for device in devices))
    lab.wait(lambda: lab.server.status()["devices"] == len(devices))
    lab.publish("v2", seed=2)
    first = start_rollout(lab.server_folder, "digits", "v2", canary_count=1)
    lab.wait(
        lambda: all(version_of(device) == "v2" and device.agent.state is State.IDLE for device in devices)
    )
    lab.wait(lambda: rollout_status(lab.server_folder, first.id).rollout.state.value == "finished")
    for device in devices:
        update = device.agent.record.update
        assert update is not None
        assert update.outcome == "committed"
        assert [item.action for item in update.items] == ["delta"]
        assert update.counters.redundant_chunks == 0
        for prompt in prompts():
            assert device.infer(prompt) == str(prompt.label)
    lab.publish("v3", seed=3, shift=1)
    second = start_rollout(lab.server_folder, "digits", "v3", canary_count=1)
    lab.wait(lambda: rollout_status(lab.server_folder, second.id).rollout.state.value == "stopped")
    lab.wait(lambda: all(device.agent.state in {State.IDLE, State.ROLLED_BACK} for device in devices))
    tried = [device for device in devices if device.agent.state is State.ROLLED_BACK]
    assert len(tried) == 1
    assert {version_of(device) for device in devices} == {"v2"}
    update = tried[0].agent.record.update
    assert update is not None
    assert update.code == "trial.answers"


def test_an_operator_promotes_a_rollout_and_leads_the_devices_back_to_the_version_before(lab: Lab) -> None:
    """Back is a newer request under newer metadata that names an older release, and nothing else."""
    devices = [lab.start(lab.provision(f"device-{number}"), number) for number in range(2)]
    lab.wait(lambda: all(device.transport.is_connected and device.executor.model for device in devices))
    lab.wait(lambda: lab.server.status()["devices"] == len(devices))
    lab.publish("v2", seed=2)
    plan = RolloutPlan(waves=parse_waves("1,100%", [3_600_000]), rules=Rules(), in_flight_max=1)
    first = start_rollout(lab.server_folder, "digits", "v2", failures_max=None, plan=plan)
    lab.wait(lambda: rollout_status(lab.server_folder, first.id).counts == {"committed": 1})
    assert "soaks for" in explain_rollout(lab.server_folder, first.id).standing
    order_rollout(lab.server_folder, first.id, "promote", by="alice", reason="seen enough")
    lab.wait(lambda: all(version_of(device) == "v2" for device in devices))
    lab.wait(lambda: rollout_status(lab.server_folder, first.id).counts == {"committed": 2})
    order_rollout(lab.server_folder, first.id, "abort", by="alice", reason="v1 was better")
    lab.wait(lambda: rollout_status(lab.server_folder, first.id).rollout.state.value == "stopped")
    sequences = [device.agent.record.desired_sequence for device in devices]
    plan = RolloutPlan(rules=Rules(), from_version="v2")
    second = start_rollout(lab.server_folder, "digits", "v1", failures_max=None, plan=plan)
    lab.wait(lambda: rollout_status(lab.server_folder, second.id).rollout.state.value == "finished")
    assert {version_of(device) for device in devices} == {"v1"}
    assert all(
        device.agent.record.desired_sequence > before
        for device, before in zip(devices, sequences, strict=True)
    )
    told = explain_rollout(lab.server_folder, first.id)
    assert [(each.action, each.by) for each in told.decisions] == [
        ("begin", ""),
        ("promote", "alice"),
        ("abort", "alice"),
    ]


def test_a_device_that_is_stopped_again_and_again_fetches_nothing_twice(lab: Lab) -> None:
    config = lab.provision("device-0")
    device = lab.start(config, 0)
    lab.wait(lambda: device.transport.is_connected and device.executor.model is not None)
    lab.publish("v2", seed=2)
    start_rollout(lab.server_folder, "digits", "v2", canary_count=1)
    for restart in range(1, 4):
        lab.wait(lambda: lab.devices[-1].agent.state is not State.IDLE)
        lab.loop.run_until(lambda: False, 0.05 * restart)
        device.stop()
        lab.devices.remove(device)
        device = lab.start(config, restart)
    lab.wait(lambda: version_of(device) == "v2" and device.agent.state is State.IDLE)
    lines = [json.loads(line) for line in (lab.folder / "device-0.trace").read_text().splitlines()]
    chunks = Counter((line["blob"], line["index"]) for line in lines if line["kind"] == "chunk")
    assert len(chunks) > 20
    assert max(chunks.values()) == 1
    assert sum(line["kind"] == "boot" for line in lines) == 4


def test_a_device_that_missed_a_version_gets_to_the_newest_by_the_deltas_that_are_there(lab: Lab) -> None:
    """The straggler takes two deltas, one of which was built for others; nothing is built for it alone."""
    punctual, late = (lab.provision(name) for name in ("punctual", "late"))
    first = lab.start(punctual, 1)
    lab.wait(lambda: first.transport.is_connected and first.executor.model is not None)
    lab.publish_tuned("v2", "v1")
    rollout = start_rollout(lab.server_folder, "digits", "v2", canary_count=1)
    lab.wait(lambda: rollout_status(lab.server_folder, rollout.id).rollout.state.value == "finished")
    second = lab.start(late, 2)
    lab.wait(lambda: second.transport.is_connected and second.executor.model is not None)
    lab.wait(lambda: lab.server.status()["versions"] == {"digits v1": 1, "digits v2": 1})
    lab.publish_tuned("v3", "v2")
    rollout = start_rollout(lab.server_folder, "digits", "v3", canary_count=2)
    lab.wait(lambda: rollout_status(lab.server_folder, rollout.id).rollout.state.value == "finished")
    digests = [digest_of((lab.folder / f"{version}.onnx").read_bytes()) for version in ("v1", "v2", "v3")]
    update = second.agent.record.update
    assert update is not None
    (item,) = update.items
    assert [(link.base_sha256, link.sha256) for link in item.links] == list(pairwise(digests))
    assert update.outcome == "committed"
    assert update.counters.received_bytes < item.length / 20
    assert update.counters.redundant_chunks == 0
    assert version_of(second) == "v3"
    assert second.infer(prompts()[0]) == str(prompts()[0].label)
    with opened(lab.server_folder) as home:
        repository = home.store.repository()
        assert repository is not None
        targets = home.publisher().checked(repository, home.clock.now_ms()).targets
    assert {name for path in targets if (name := parse_delta_target(path))} == {
        DeltaName(base, result) for base, result in pairwise(digests)
    }


def test_a_device_that_was_stopped_is_known_to_be_offline(lab: Lab) -> None:
    def is_online() -> bool:
        return any(device.is_online for device in list_devices(lab.server_folder))

    device = lab.start(lab.provision("device-0"), 0)
    lab.wait(is_online)
    device.stop()
    lab.devices.clear()
    lab.wait(lambda: not is_online())


def test_provisioning_refuses_another_file_and_a_second_time(lab: Lab) -> None:
    config = lab.provision("device-0")
    assert Journal(
        DeviceRuntime(config, lab.loop, lab.pool, clock=SystemClock(), rng=random.Random(1)).disk
    ).load()
    with pytest.raises(RequestError, match="provisioned"):
        lab.provision("device-0")
