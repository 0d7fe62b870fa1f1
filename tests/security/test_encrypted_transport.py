"""Encrypted releases from the operator to the trial: a real server, a real broker with somebody who listens to all of it, real devices."""

import base64
import logging
import random
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.x509 import load_der_x509_certificate
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from device import cli
from device.adapters.clock import SystemClock
from device.adapters.disk import RealDisk
from device.adapters.identity import CA_FILE, install, write_private
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import load_config
from device.runtime import DeviceRuntime
from device.states import State
from protocol.identity import make_key
from protocol.ids import DeviceId, digest_of
from protocol.release import parse_delta_target, parse_file_target
from server.adapters.vault import VAULT_KEY_FILE, Vault
from server.config import read_config
from server.home import KEYS_FOLDER, opened
from server.identity import authority_of, issuer, make_broker_certificate, revoke_name
from server.operations import (
    add_release,
    export_release,
    init_repository,
    publish_release,
    rollout_status,
    start_rollout,
)
from server.runtime import Server
from tests.device.test_enrolment import Lab as EnrolledLab
from tests.device.test_enrolment import running
from tests.device.test_mqtt_tls import Terminator
from tests.models import prompts, write_classifier, write_health_plan
from tests.server.brokers import secured_mosquitto, wait_until

HIDDEN = 3_000  # a quarter of a megabyte: several chunks
WAIT_S = 60.0
RUN_BYTES = 64


class Eavesdropper:
    """Subscribes to everything, and keeps it."""

    def __init__(self, port: int) -> None:
        self.heard: list[tuple[str, bytes]] = []
        is_up = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="eve")
        self._client.on_message = lambda _c, _u, message: self.heard.append(
            (message.topic, bytes(message.payload))
        )
        self._client.on_subscribe = lambda *_: is_up.set()
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe("#", 0)
        assert is_up.wait(WAIT_S)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def has_run_of(payload: bytes, blocks: set[bytes]) -> bool:
    """Whether 64 bytes of a file are in a payload; `blocks` are its blocks of 32, one of which lies in each such run."""
    return any(payload[at : at + RUN_BYTES // 2] in blocks for at in range(len(payload)))


def blocks_of(data: bytes) -> set[bytes]:
    size = RUN_BYTES // 2
    return {data[at : at + size] for at in range(0, len(data) - size, size)}


class Lab:
    """A server with the embedded broker, which devices reach over TLS."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "server"
        init_repository(self.home, "lab")
        self.health = write_health_plan(folder / "health.json")
        self.publish("v1", 1, is_encrypted=False)
        export_release(self.home, "digits", "v1", folder / "factory")
        make_broker_certificate(self.home, folder / "broker", ["127.0.0.1"])
        self.server = Server(msgspec.structs.replace(read_config(self.home), port=0), seed=1)
        self.server.start()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "broker" / "broker.pem", folder / "broker" / "broker.key")
        self.terminator = Terminator(self.server.broker_port, context)
        self.eve = Eavesdropper(self.server.broker_port)
        self.loop, self.pool = MqttLoop(), WorkerPool(threads=2)
        self.devices: list[DeviceRuntime] = []

    def publish(self, version: str, seed: int, *, is_encrypted: bool | None) -> bytes:
        model = write_classifier(self.folder / f"{version}.onnx", seed, hidden=HIDDEN)
        add_release(
            self.home,
            "digits",
            version,
            [model],
            runtime="onnx",
            health=self.health,
            is_encrypted=is_encrypted,
        )
        publish_release(self.home, "digits", version)
        return model.read_bytes()

    def device(self, name: str, settings: str = "") -> DeviceRuntime:
        """A device with version 1 and a certificate, running."""
        folder = self.folder / name
        folder.mkdir()
        path = folder / "device.toml"
        path.write_text(
            f'device = "{name}"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'
            f'broker = "127.0.0.1:{self.terminator.port}"\n{settings}[tls]\n'
        )
        assert cli.main(["provision", "--config", str(path), "--from", str(self.folder / "factory")]) == 0
        config, key = load_config(path), make_key()
        with opened(self.home) as home:
            record = issuer(authority_of(self.home), home.clock.now_ms(), 90)(
                DeviceId(name), key.public_key()
            )
            home.store.change_identities(lambda _: [record])
        disk = RealDisk(config.folder)
        write_private(disk, CA_FILE, authority_of(self.home).pem())
        install(disk, key, load_der_x509_certificate(record.certificate))
        runtime = DeviceRuntime(
            config,
            self.loop,
            self.pool,
            clock=SystemClock(),
            rng=random.Random(len(self.devices)),
            trace_path=folder / "trace",
        )
        runtime.start()
        self.devices.append(runtime)
        self.wait(lambda: runtime.transport.is_connected and runtime.executor.model is not None)
        return runtime

    def wait(self, is_done: Callable[[], bool]) -> None:
        assert self.loop.run_until(is_done, WAIT_S), [
            (device.config.agent.device, device.agent.state, device.agent.record.update)
            for device in self.devices
        ]

    def secrets(self) -> list[bytes]:
        """Every content key, and the one that they are locked with."""
        keys = [bytes.fromhex((self.home / KEYS_FOLDER / VAULT_KEY_FILE).read_text())]
        vault = Vault(self.home / KEYS_FOLDER)
        with opened(self.home) as home:
            repository = home.store.repository()
            assert repository is not None
            for target in home.publisher().checked(repository, home.clock.now_ms()).targets.values():
                record = home.store.content_key(target.digest)
                if record is not None:
                    keys.append(vault.unlock(target.digest, record.locked))
        return keys

    def close(self) -> None:
        for runtime in self.devices:
            runtime.stop()
        self.loop.close()
        self.pool.close()
        self.eve.close()
        self.terminator.close()
        self.server.stop()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def spellings(secret: bytes) -> list[str]:
    return [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]]


def test_an_encrypted_release_reaches_devices_and_nobody_who_listens(
    lab: Lab, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    devices = [lab.device("delta"), lab.device("whole", "delta_memory_mb_max = 1\n")]
    lab.wait(lambda: lab.server.status()["devices"] == len(devices))
    model = lab.publish("v2", 2, is_encrypted=True)
    rollout = start_rollout(lab.home, "digits", "v2", canary_count=1)
    lab.wait(lambda: rollout_status(lab.home, rollout.id).rollout.state.value == "finished")
    actions = []
    for device in devices:
        assert device.agent.record.active_slot.version == "v2"
        assert device.infer(prompts()[0]) == str(prompts()[0].label)
        update = device.agent.record.update
        assert update is not None
        assert update.counters.redundant_chunks == 0
        actions += [(item.action, bool(item.key)) for item in update.items]
    assert actions == [("delta", True), ("full", True)]
    heard = dict(lab.eve.heard)
    assert {topic.split("/")[1] for topic in heard} >= {"b", "md", "dev"}
    assert {f"wb1.lab/dev/{name}/keys" for name in ("delta", "whole")} <= heard.keys()
    blocks = blocks_of(model) - blocks_of((lab.folder / "v1.onnx").read_bytes())
    assert len(blocks) > 5_000
    assert has_run_of(b"before" + model[1_001 : 1_001 + RUN_BYTES], blocks_of(model))
    for topic, payload in lab.eve.heard:
        assert not has_run_of(payload, blocks), topic
    _assert_no_key_was_told(lab, caplog.text + "".join(capfd.readouterr()))


def _assert_no_key_was_told(lab: Lab, said: str) -> None:
    """Not on the air, not in a log, a trace or a report, and not in a file of a device."""
    secrets = lab.secrets()
    assert len(secrets) == 3  # of the file, of the delta, of the vault
    files = [path.read_bytes() for path in lab.folder.glob("*/state/**/*") if path.is_file()]
    files += [path.read_bytes() for path in lab.folder.glob("*/trace")]
    for secret in secrets:
        texts = spellings(secret)
        assert not any(text in said for text in texts)
        for data in [payload for _, payload in lab.eve.heard] + files:
            assert secret not in data
            assert not any(text.encode() in data for text in texts)


def test_a_device_that_was_revoked_gets_no_key_and_goes_on_answering(lab: Lab) -> None:
    device = lab.device("shelf-7")
    lab.wait(lambda: lab.server.status()["devices"] == 1)
    lab.publish("v2", 2, is_encrypted=True)
    revoke_name(lab.home, "shelf-7")  # no broker of ours was told, so it may still connect
    start_rollout(lab.home, "digits", "v2", canary_count=1)
    lab.wait(lambda: device.agent.state is State.FAILED)
    update = device.agent.record.update
    assert update is not None
    assert (update.outcome, update.code) == ("failed", "keys.no_certificate")
    assert device.infer(prompts()[0]) == str(prompts()[0].label)
    artifacts = _encrypted_artifacts(lab)
    assert artifacts
    stored = {path.name for path in (device.config.folder / "blobs").glob("*")}
    assert not artifacts & stored


def _encrypted_artifacts(lab: Lab) -> set[str]:
    with opened(lab.home) as home:
        repository = home.store.repository()
        assert repository is not None
        targets = home.publisher().checked(repository, home.clock.now_ms()).targets
    names = {path: parse_file_target(path) or parse_delta_target(path) for path in targets}
    return {targets[path].digest for path, name in names.items() if name is not None and name.is_encrypted}


@pytest.mark.mosquitto
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_enrolled_device_gets_an_encrypted_release_through_mosquitto(tmp_path: Path) -> None:
    init_repository(tmp_path / "server", "lab")
    with secured_mosquitto(tmp_path / "server", tmp_path / "broker") as broker:
        lab = EnrolledLab(tmp_path, broker)
        path, claim = lab.device(), lab.claim()
        with Server(lab.config, seed=1) as server:
            server.wait_connected(WAIT_S)
            lab.enroll(path, claim)
            model = write_classifier(tmp_path / "v3.onnx", 3, hidden=8_000)
            health = tmp_path / "health.json"
            add_release(lab.home, "digits", "v3", [model], runtime="onnx", health=health, is_encrypted=True)
            publish_release(lab.home, "digits", "v3")
            with running(path) as (loop, runtime):
                assert loop.run_until(lambda: runtime.transport.is_connected, WAIT_S)
                assert wait_until(lambda: server.status()["devices"] == 1, WAIT_S)
                rollout = start_rollout(lab.home, "digits", "v3", canary_count=1)
                done = loop.run_until(
                    lambda: rollout_status(lab.home, rollout.id).rollout.state == "finished", WAIT_S
                )
                assert done, (rollout_status(lab.home, rollout.id), runtime.agent.record)
                slot = runtime.agent.record.active_slot
                assert (slot.version, slot.files["v3.onnx"]) == ("v3", digest_of(model.read_bytes()))
            assert server.counters()["keys_answered"] >= 1
