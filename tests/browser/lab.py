"""A server with its page, and a few real agents that it serves."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from device.adapters.clock import SystemClock
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import AgentConfig, DeviceConfig
from device.runtime import DeviceRuntime, install_factory
from protocol.ids import DeviceId, Family, FleetId
from server.accounts import Role, UserRecord
from server.adapters.secrets import hash_password
from server.alerts.settings import WebhookSettings
from server.config import WebSettings, read_config
from server.home import opened
from server.operations import add_release, init_repository, publish_release, show_release
from server.runtime import Server
from server.web.serving import WebServer
from tests.models import write_classifier, write_health_plan

PASSWORD: Final = "a whimbrel flies far"
FAMILY: Final = "digits"
HIDDEN: Final = 20_000  # about 1.6 MB of weights
WAIT_S: Final = 60.0


class BrowserLab:
    """Versions v1 (which devices start with), v2 (good) and v3 (answers wrongly) are published, v4 is a draft.

    Args:
        folder: New or empty.
        devices: How many agents, in one thread of this process.
        webhooks: Where alerts go.
    """

    def __init__(self, folder: Path, devices: int, webhooks: tuple[WebhookSettings, ...] = ()) -> None:
        self.folder = folder
        self.home = folder / "server"
        init_repository(self.home, "lab", port=0)
        self._health = write_health_plan(folder / "health.json")
        for version, seed, shift in (("v1", 1, 0), ("v2", 2, 0), ("v3", 3, 1)):
            self.add(version, seed, shift)
            publish_release(self.home, FAMILY, version)
        self.add("v4", 4, 0)
        for name in ("viewer", "operator", "approver"):
            self.add_user(name, name)
        config = replace(read_config(self.home), webhooks=webhooks)
        self.server = Server(config, seed=1)
        self.server.start()
        self.server.wait_connected(WAIT_S)
        self.web = WebServer(self.server, WebSettings(port=0))
        self.web.start()
        self.url = self.web.url
        self._loop = MqttLoop()
        self._pool = WorkerPool(threads=2)
        self._is_stopping = threading.Event()
        self.devices = [self._start(f"device-{number:03d}", number) for number in range(devices)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, version: str, seed: int, shift: int) -> None:
        """Add a draft."""
        model = write_classifier(self.folder / f"{version}.onnx", seed, hidden=HIDDEN, shift=shift)
        add_release(self.home, FAMILY, version, [model], runtime="onnx", health=self._health)

    def add_user(self, name: str, role: Role) -> None:
        """Let somebody sign in with `PASSWORD`."""
        with opened(self.home) as home:
            user = UserRecord(
                name=name, role=role, password=hash_password(PASSWORD), created_ms=home.clock.now_ms()
            )
            home.store.change_accounts(lambda accounts: accounts.add(user))

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Wait, while the devices go on."""
        assert _until(is_done, WAIT_S), [
            (each.agent.state, each.agent.record.update) for each in self.devices
        ]

    def close(self) -> None:
        """Stop everything."""
        self._is_stopping.set()
        self._thread.join()
        for runtime in self.devices:
            runtime.stop()
        self._loop.close()
        self._pool.close()
        self.web.stop()
        self.server.stop()

    def _run(self) -> None:
        self._loop.run_until(self._is_stopping.is_set, float("inf"))

    def _start(self, name: str, seed: int) -> DeviceRuntime:
        host, port = self.server.broker_address
        agent = AgentConfig(device=DeviceId(name), fleet=FleetId("lab"), family=Family(FAMILY), tier="pi")
        config = DeviceConfig(agent=agent, folder=self.folder / name, broker_host=host, broker_port=port)
        release = show_release(self.home, FAMILY, "v1").record.release
        root = (self.home / "metadata" / "1.root.json").read_bytes()
        install_factory(config, release, {release.files[0].name: self.folder / "v1.onnx"}, root)
        runtime = DeviceRuntime(config, self._loop, self._pool, clock=SystemClock(), rng=random.Random(seed))
        runtime.start()
        return runtime


def _until(is_done: Callable[[], bool], seconds: float) -> bool:
    waiting = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if is_done():
            return True
        waiting.wait(0.05)
    return False
