"""A live fleet: a broker, a server on a folder, and agents as they run, each with a real model and real trials."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec.structs import replace

from device.adapters.clock import SystemClock
from device.adapters.disk import RealDisk
from device.adapters.identity import CA_FILE, install, write_private
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import AgentConfig, DeviceConfig, enrolled
from device.runtime import DeviceRuntime, install_factory
from protocol.identity import certificate_request, decode_claim, make_key
from protocol.ids import DeviceId, Family, FleetId
from protocol.release import decode_release
from protocol.topics import Topics
from server import operations
from server.config import TlsSettings, read_config
from server.fleet.identities import use_claim
from server.home import opened
from server.identity import accept_device, claim_device, tls_settings
from server.runtime import Server
from tests.models import prompts
from tests.server.brokers import Address, SecuredBroker, running_broker, secured_mosquitto

FAMILY: Final = "digits"
TOPICS: Final = Topics(FleetId("lab"))
WAIT_S: Final = 120.0
PROMPTS: Final = prompts()


class NotReachedError(AssertionError):
    """Something that has to happen did not happen in time, or something happened that must not."""


class Fleet:
    """Devices on one loop, which the caller turns by waiting.

    Args:
        home: The server's folder, with a repository.
        broker: Where everybody meets.
        folder: For the devices.
        seed: Of the devices' jitter.
    """

    def __init__(self, home: Path, broker: Address, folder: Path, seed: int) -> None:
        self.home = home
        self.broker = broker
        self._folder = folder
        self._seed = seed
        self._loop = MqttLoop()
        self._pool = WorkerPool(threads=2)
        self._configs: dict[str, DeviceConfig] = {}
        self._turns = 0
        self.devices: dict[str, DeviceRuntime] = {}
        self.answers = 0
        self.server: Server | None = None

    # The server

    def start_server(self) -> None:
        """Run the server on its folder, with what lies there now."""
        config = read_config(self.home)
        self.server = Server(
            replace(config, broker=f"{self.broker.host}:{self.broker.port}", tls=self.tls), seed=self._seed
        )
        self.server.start()
        self.server.wait_connected(WAIT_S)

    def stop_server(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    @property
    def tls(self) -> TlsSettings | None:
        """How a server proves to the broker who it is; nothing on a broker that lets everybody in."""
        return tls_settings() if isinstance(self.broker, SecuredBroker) else None

    def forget_revoked(self) -> None:
        """The broker reads again who is revoked; nothing to do on one that lets everybody in."""
        if isinstance(self.broker, SecuredBroker):
            self.broker.reload()

    # The devices

    def provision(self, name: str, version: str, root: Path | None = None) -> None:
        """What an installer does: a first version, the start of trust, a certificate where the broker asks for one.

        Args:
            name: Of the device.
            version: That it comes with.
            root: The start of trust; None takes what `release export` gives, the newest.
        """
        factory = self._folder / f"factory-{version}"
        operations.export_release(self.home, FAMILY, version, factory)
        release = decode_release((factory / "release.json").read_bytes())
        config = DeviceConfig(
            agent=AgentConfig(device=DeviceId(name), fleet=FleetId("lab"), family=Family(FAMILY), tier="pi"),
            folder=self._folder / name,
            broker_host=self.broker.host,
            broker_port=self.broker.port,
            clock="trusted",  # a device that asks for the time would not get as far as looking at what the thief signed
        )
        if isinstance(self.broker, SecuredBroker):
            config = dataclasses.replace(config, tls=enrolled(config.folder))
        files = {file.name: factory / file.name for file in release.files}
        install_factory(config, release, files, (root or factory / "root.json").read_bytes())
        if isinstance(self.broker, SecuredBroker):
            self._enroll(config)
        self._configs[name] = config

    def _enroll(self, config: DeviceConfig) -> None:
        """By a claim that an operator accepts; how a claim travels is for tests/device/test_enrolment.py."""
        device = config.agent.device
        claim, key = decode_claim(claim_device(self.home, device).text), make_key()
        topic = TOPICS.claim_request(claim.claim)
        request = certificate_request(device, key, claim.private_key, topic)
        with opened(self.home) as home:
            now_ms = home.clock.now_ms()
            home.store.change_identities(lambda known: use_claim(known, claim.claim, request, topic, now_ms))
        record = accept_device(self.home, device).record
        disk = RealDisk(config.folder)
        authority = x509.load_der_x509_certificate(claim.authority).public_bytes(Encoding.PEM)
        write_private(disk, CA_FILE, authority)
        install(disk, key, x509.load_der_x509_certificate(record.certificate))
        disk.close()

    def start(self, *names: str) -> None:
        """Switch devices on, and wait until each answers and is connected."""
        for name in names:
            self.devices[name] = DeviceRuntime(
                self._configs[name],
                self._loop,
                self._pool,
                clock=SystemClock(),
                rng=random.Random(f"{self._seed} {name}"),
            )
            self.devices[name].start()
        self.wait(
            lambda: all(self.devices[name].transport.is_connected and self.serves(name) for name in names),
            "the devices are up",
        )

    def stop(self, *names: str) -> None:
        """Switch devices off."""
        for name in names:
            self.devices.pop(name).stop()

    def serves(self, name: str) -> bool:
        return bool(self.devices[name].agent.serving)

    def version(self, name: str) -> str:
        """What a device runs."""
        return self.devices[name].agent.record.active_slot.version

    def root(self, name: str) -> int:
        """The newest root that a device trusts."""
        return self.devices[name].agent.record.floors.root

    def status(self) -> list[str]:
        """Each device in one line, for whoever looks for the reason of a failure."""
        lines = []
        for name, device in self.devices.items():
            record, update = device.agent.record, device.agent.record.update
            told = (
                f"{update.outcome} {update.code} {update.detail} {update.states_ms}"
                if update is not None
                else ""
            )
            lines.append(
                f"{name}: {self.version(name)} root {record.floors.root} {device.agent.state} {told}"
            )
        return lines

    # Time

    def wait(self, is_done: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        """Let the fleet go on until something is so.

        Raises:
            NotReachedError: It was not so in time, or a device answered wrongly.
        """
        if not self._run_until(is_done, timeout_s):
            lines = "\n".join(self.status())
            raise NotReachedError(f"not reached within {timeout_s:.0f} s: {what}\n{lines}")

    def go_on(self, seconds: float) -> None:
        """Let the fleet go on for a while.

        Raises:
            NotReachedError: A device answered wrongly.
        """
        self._run_until(lambda: False, seconds)

    def _run_until(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        """Turn the loop; meanwhile devices are asked, one after the other."""

        def has_come() -> bool:
            self._ask_one()
            return is_done()

        return self._loop.run_until(has_come, timeout_s)

    def _ask_one(self) -> None:
        self._turns += 1
        serving = [name for name in self.devices if self.serves(name)]
        if not serving:
            return
        name = serving[self._turns % len(serving)]
        prompt = PROMPTS[self._turns % len(PROMPTS)]
        answer = self.devices[name].infer(prompt)
        if answer != str(prompt.label):
            raise NotReachedError(f"{name} answers {answer} to {prompt.name}")
        self.answers += 1

    def close(self) -> None:
        """Switch everything off."""
        self.stop(*self.devices)
        self._loop.close()
        self._pool.close()
        self.stop_server()


@contextlib.contextmanager
def broker_of(kind: str, home: Path, folder: Path, devices: int) -> Iterator[Address]:
    """A broker: `embedded` lets everybody in, `mosquitto` only whoever has a certificate of this server's authority."""
    if kind == "mosquitto":
        with secured_mosquitto(home, folder, devices_max=devices + 10) as secured:
            yield secured
    else:
        with running_broker(kind, folder) as address:
            yield address
