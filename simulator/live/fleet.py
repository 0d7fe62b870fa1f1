"""A live fleet: its devices, links, traces and applications, started and stopped together."""

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from protocol.errors import TransportError
from protocol.ids import digest_of
from protocol.release import Release, ReleaseFile
from simulator.live.application import Applications
from simulator.live.devices import Device, Host, HostedDevice, ProcessDevice, TraceReader
from simulator.live.link import Cause, Link, LinkEmulator
from simulator.live.models import Models, unknown_model
from simulator.live.observer import Observer
from simulator.live.population import DevicePlan

ASK_INTERVAL_S: Final = {"onnx": 0.5, "llama": 4.0}
"""Between two questions of one application; a language model takes a second of a processor for an answer."""

ASKED_PER_S_MAX: Final = 100
"""Questions of all applications together: they share a thread with nothing, but a processor with everything."""

DESCRIPTORS_PER_DEVICE: Final = 24


class Fleet:
    """All devices of a run.

    Args:
        plans: Who they are.
        folder: Takes a folder per device.
        broker: Where their links lead.
        models: What they ask and which runtime they have.
        observer: Takes note of everything.
        on_lost: Told when a link goes down under a connection.
    """

    def __init__(
        self,
        plans: tuple[DevicePlan, ...],
        folder: Path,
        broker: tuple[str, int],
        models: Models,
        observer: Observer,
        on_lost: Callable[[Link, Cause], None],
    ) -> None:
        allow_descriptors(len(plans) * DESCRIPTORS_PER_DEVICE)
        self._folder = folder
        self._models = models
        self._observer = observer
        self._host = Host(
            len(plans) + 2
        )  # a trial waits its turn on a thread: with fewer, short work would wait behind it
        self._links = LinkEmulator(broker, on_lost)
        self._links.start()
        self.devices: dict[str, Device] = {}
        self.traces: TraceReader | None = None
        self._applications: Applications | None = None
        for plan in plans:
            link = self._links.add(plan.device, plan.link)
            place = folder / plan.device
            self.devices[plan.device] = (
                ProcessDevice(plan, link, place, models.runtime)
                if plan.kill is not None
                else HostedDevice(plan, link, place, self._host)
            )

    @property
    def bytes_down(self) -> dict[str, int]:
        """Bytes that reached each device so far."""
        return {name: device.link.bytes_down for name, device in self.devices.items()}

    def provision(self, fleet: str, release: Release, root: bytes) -> None:
        """Put the factory's version on every device: `release`, or a file that the server has never seen."""
        known = (release, self._models.files["v1"])
        unknown: tuple[Release, Path] | None = None
        for device in self.devices.values():
            if device.plan.factory == "v0" and unknown is None:
                unknown = _unknown(release, unknown_model(self._models, self._folder))
            chosen, file = unknown if device.plan.factory == "v0" and unknown is not None else known
            device.provision(fleet, chosen, file, root)
            self._observer.add_device(device.device, device.plan.factory)

    def start(self) -> None:
        """Start every agent and its application."""
        self.traces = TraceReader({name: device.trace for name, device in self.devices.items()}, self._heard)
        self.traces.start()
        for device in self.devices.values():
            device.start()

    def start_applications(self) -> None:
        """Begin to ask every model again and again."""
        devices = list(self.devices.values())
        interval_s = max(ASK_INTERVAL_S[self._models.runtime], len(devices) / ASKED_PER_S_MAX)
        self._applications = Applications(devices, self._models.prompts, interval_s, self._observer)
        self._applications.start()

    def start_cycles(self) -> None:
        """Let the links that sleep now and then begin to do so."""
        self._links.start_cycles()

    def check_alive(self, *, except_for: set[str]) -> None:
        """Refuse to wait for devices that ended by themselves.

        Raises:
            TransportError: One did; says what it said last.
        """
        if self._host.failure is not None:
            raise TransportError(f"the devices of this process ended: {self._host.failure!r}")
        for device in self.devices.values():
            if (
                isinstance(device, ProcessDevice)
                and device.device not in except_for
                and not device.is_running
            ):
                raise TransportError(f"{device.device} ended by itself: {device.last_words() or 'no word'}")

    def stop(self) -> None:
        """Stop everything, applications first."""
        if self._applications is not None:
            self._applications.stop()
        for device in self.devices.values():
            if isinstance(device, ProcessDevice):
                device.begin_stop()
        for device in self.devices.values():
            with contextlib.suppress(TransportError):  # the loop has ended already, which was told before
                device.stop()
        self._host.close()
        self._links.stop()
        if self.traces is not None:
            self.traces.stop()

    def _heard(self, device: str, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "transition":
                self._observer.moved(
                    device, line["from"], line["to"], line["version"], line["code"], int(line["t"])
                )
            case "chunk":
                self._observer.stored(device, line["blob"], line["index"])


def _unknown(release: Release, file: Path) -> tuple[Release, Path]:
    data = file.read_bytes()
    described = ReleaseFile(name=file.name, length=len(data), sha256=digest_of(data))
    return msgspec.structs.replace(release, version="v0", files=[described]), file


def allow_descriptors(count: int) -> None:
    """Raise the limit on open files as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(max(soft, count + 256), hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
