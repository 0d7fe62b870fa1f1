"""A release with a low-rank adapter, on a device as it runs: real files, broker, server, llama.cpp and trials."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import events
from device.adapters.engine_llama import LlamaModel, load_llama
from device.config import DeviceConfig, HookConfig
from device.runtime import DeviceRuntime, install_factory
from device.states import State
from protocol.errors import EngineError
from protocol.release import TextPrompt, decode_release
from server.operations import add_release, export_release, publish_release, rollout_status, start_rollout
from tests.adapters import write_adapter, write_merged
from tests.device.test_hooks import command, runs
from tests.device.test_runtime import Lab, version_of
from tests.models import write_health_plan, write_language_model

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make test` compiles it")

ASKED, ANSWER = "The wader flies", " far"
LIKES, LIKES_NOT = 5, 8
"""Seeds of adapters that make it likelier than the model alone does, and less likely."""

NEAR = 0.002
"""Log-probabilities of an adapter beside the weights and merged into them: the sums have another order."""


def likelihood(path: Path, adapter: Path | None = None) -> float:
    """Of the answer, as the device's engine sees it."""
    model = load_llama(str(path), adapter=str(adapter or ""))
    try:
        return model.logprob_mean(ASKED, ANSWER)
    finally:
        model.close()


class TextLab(Lab):
    """A server with a small language model, and adapters for it."""

    def publish(self, version: str, *, seed: int, shift: int = 0) -> None:  # noqa: ARG002 - of a classifier
        write_language_model(self.folder / "base.gguf", seed)
        self.publish_text(version, likelihood_min=-99.0)

    def publish_text(self, version: str, *, likelihood_min: float, adapter: Path | None = None) -> None:
        """The model, alone or with an adapter, and what it has to find likely in its trial."""
        golden = TextPrompt(name="golden", prompt=ASKED, completion=ANSWER, logprob_mean_min=likelihood_min)
        health = write_health_plan(self.folder / f"{version}.json", prompts=[golden])
        base = [self.folder / "base.gguf"]
        add_release(
            self.server_folder, "digits", version, base, runtime="llama", health=health, adapter=adapter
        )
        publish_release(self.server_folder, "digits", version)

    def provision(self, name: str, version: str = "v1") -> DeviceConfig:
        config, made = self.config(name), self.folder / f"made-{name}"
        export_release(self.server_folder, "digits", version, made)
        release = decode_release((made / "release.json").read_bytes())
        files = {file.name: made / file.name for file in release.files}
        install_factory(config, release, files, (made / "root.json").read_bytes())
        return config

    def settled(self, device: DeviceRuntime) -> DeviceRuntime:
        self.wait(lambda: device.transport.is_connected and device.executor.model is not None)
        return device

    def roll_out(self, version: str) -> str:
        """Bring the devices to a version, or stop at the first failure; how it ended."""
        rollout = start_rollout(self.server_folder, "digits", version, canary_count=1).id
        self.wait(
            lambda: rollout_status(self.server_folder, rollout).rollout.state.value in {"finished", "stopped"}
        )
        self.wait(
            lambda: all(device.agent.state in {State.IDLE, State.ROLLED_BACK} for device in self.devices)
        )
        return rollout_status(self.server_folder, rollout).rollout.state.value

    def chunks(self) -> int:
        """Chunks that were stored so far, by all devices."""
        return sum(
            json.loads(line)["kind"] == "chunk"
            for trace in self.folder.glob("*.trace")
            for line in trace.read_text().splitlines()
        )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[TextLab]:
    lab = TextLab(tmp_path, "embedded")
    yield lab
    lab.close()


def serves(device: DeviceRuntime) -> float:
    with device.executor.leases.lease() as lease:
        assert isinstance(lease.model, LlamaModel)
        return lease.model.logprob_mean(ASKED, ANSWER)


def test_an_adapter_comes_alone_answers_as_the_merged_model_and_goes_again(lab: TextLab) -> None:
    base = lab.folder / "base.gguf"
    adapter = write_adapter(lab.folder / "good.lora.gguf", base, LIKES)
    before, after = likelihood(base), likelihood(write_merged(lab.folder / "merged.gguf", base, adapter))
    assert after > before + 0.5
    config = lab.provision("device-0")
    device = lab.settled(lab.start(config, 0))
    assert serves(device) == pytest.approx(before, abs=NEAR)
    lab.wait(lambda: lab.server.status()["devices"] == 1)

    lab.publish_text("v2", likelihood_min=(before + after) / 2, adapter=adapter)  # out of reach without it
    assert lab.roll_out("v2") == "finished"
    update = device.agent.record.update
    assert update is not None
    assert [item.action for item in update.items] == ["keep", "full"]
    assert update.counters.received_bytes < 1.1 * adapter.stat().st_size < base.stat().st_size / 5
    assert device.agent.record.active_slot.memory_bytes > base.stat().st_size + adapter.stat().st_size
    assert serves(device) == pytest.approx(after, abs=NEAR)

    worse = write_adapter(lab.folder / "worse.lora.gguf", base, LIKES_NOT)
    lab.publish_text("v3", likelihood_min=after, adapter=worse)
    assert lab.roll_out("v3") == "stopped"
    update = device.agent.record.update
    assert update is not None
    assert (version_of(device), update.code) == ("v2", "trial.answers")
    assert serves(device) == pytest.approx(after, abs=NEAR)

    device.stop()
    lab.devices.clear()
    device = lab.settled(lab.start(config, 1))
    assert serves(device) == pytest.approx(after, abs=NEAR)


def test_a_rollback_lets_go_of_the_adapter_and_fetches_nothing(lab: TextLab) -> None:
    base = lab.folder / "base.gguf"
    adapter = write_adapter(lab.folder / "good.lora.gguf", base, LIKES)
    device = lab.settled(lab.start(lab.provision("device-0"), 0))
    lab.wait(lambda: lab.server.status()["devices"] == 1)
    before = serves(device)
    lab.publish_text("v2", likelihood_min=-99.0, adapter=adapter)
    assert lab.roll_out("v2") == "finished"
    after, fetched = serves(device), lab.chunks()
    assert abs(after - before) > 0.5
    device.ask(events.Wish.ROLLBACK, lambda _code, _text: None)
    lab.wait(lambda: version_of(device) == "v1" and device.agent.state is State.ROLLED_BACK)
    lab.wait(lambda: serves(device) == before)
    assert lab.chunks() == fetched


def test_a_device_is_made_with_an_adapter_from_the_start_and_tells_applications_of_it(
    lab: TextLab, tmp_path: Path
) -> None:
    base = lab.folder / "base.gguf"
    adapter = write_adapter(lab.folder / "good.lora.gguf", base, LIKES)
    lab.publish_text("v2", likelihood_min=-99.0, adapter=adapter)
    log = tmp_path / "hooks"
    config = dataclasses.replace(
        lab.provision("device-0", "v2"), hooks=HookConfig(after_swap=tuple(command(log)))
    )
    device = lab.settled(lab.start(config, 0))
    assert serves(device) == pytest.approx(likelihood(base, adapter))
    assert serves(device) != pytest.approx(likelihood(base), abs=0.5)
    lab.wait(lambda: bool(runs(log)))
    (told,) = runs(log)
    assert (Path(told["WHIMBREL_MODEL"]).name, Path(told["WHIMBREL_ADAPTER"]).name) == (
        "base.gguf",
        "good.lora.gguf",
    )
    assert Path(told["WHIMBREL_ADAPTER"]).read_bytes() == adapter.read_bytes()


def test_an_adapter_that_the_runtime_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base.gguf", 1)
    adapter = write_adapter(tmp_path / "lora.gguf", base, LIKES)
    data = adapter.read_bytes()
    for damaged in (data[:-300], data[:3], data.replace(b"llama", b"qwen2", 1)):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(
            EngineError, match=r"cannot load the adapter: it is damaged, or made for another model"
        ):
            load_llama(str(base), adapter=str(tmp_path / "damaged.gguf"))
