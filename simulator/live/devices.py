"""Devices of a live fleet: real agents with their own files, durable record, client and link."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from device.adapters.clock import SystemClock
from device.adapters.engines import LocalEngine
from device.adapters.mqtt import MqttLoop
from device.adapters.workers import WorkerPool
from device.config import load_config
from device.decoding import IN_PROCESS
from device.executor import CURRENT_LINK
from device.ports import Model, ModelSource
from device.runtime import DeviceRuntime, install_factory
from protocol.errors import EngineError, TransportError
from protocol.release import Prompt, Release, RuntimeName
from simulator.live.link import Link
from simulator.live.population import DevicePlan

CALL_S_MAX: Final = 30.0
"""Wait for the loop to do something; it never blocks for long."""

STOP_S_MAX: Final = 5.0
_POLL_S: Final = 0.02


class Device(ABC):
    """One device: its folder, its link, and a way to ask its model.

    Args:
        plan: Who it is.
        link: Its way to the broker.
        folder: Takes its configuration, state and trace.
    """

    def __init__(self, plan: DevicePlan, link: Link, folder: Path) -> None:
        self.plan = plan
        self.link = link
        self.folder = folder
        self.trace = folder / "trace.jsonl"
        self.config_path = folder / "device.toml"

    @property
    def device(self) -> str:
        """Its identity."""
        return self.plan.device

    def provision(self, fleet: str, release: Release, file: Path, root: bytes) -> None:
        """Write its configuration and put the factory's version on it."""
        self.folder.mkdir(parents=True)
        self.trace.touch()
        lines: dict[str, str | int] = {
            "device": self.device,
            "fleet": fleet,
            "family": release.family,
            "tier": self.plan.tier,
            "state_folder": "state",
            "clock": "trusted",  # as in virtual time
            "broker": f"127.0.0.1:{self.link.port}",
            **dict(self.plan.settings),
        }
        # TOML's basic strings are JSON's, for the characters that occur here.
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        self.config_path.write_text(text)
        install_factory(load_config(self.config_path), release, {release.files[0].name: file}, root)

    @abstractmethod
    def start(self) -> None:
        """Start the agent."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the agent and let go of everything."""

    @abstractmethod
    def ask(self, prompt: Prompt) -> str:
        """Answer a prompt with the model that the device runs now.

        Raises:
            EngineError: It did not answer.
        """


class HostedDevice(Device):
    """A device that shares this process and its loop with others."""

    def __init__(self, plan: DevicePlan, link: Link, folder: Path, host: "Host") -> None:
        super().__init__(plan, link, folder)
        self._host = host
        self._runtime: DeviceRuntime | None = None

    def start(self) -> None:
        """As `Device.start`."""

        def start() -> None:
            self._runtime = DeviceRuntime(
                load_config(self.config_path),
                self._host.loop,
                self._host.pool,
                clock=self._host.clock,
                rng=random.Random(self.plan.seed),
                decoder=IN_PROCESS,  # a process for each of a thousand devices would be most of what is measured
                trace_path=self.trace,
            )
            self._runtime.start()

        self._host.call(start)

    def stop(self) -> None:
        """As `Device.stop`."""
        if self._runtime is not None:
            self._host.call(self._runtime.stop)

    def ask(self, prompt: Prompt) -> str:
        """As `Device.ask`."""
        if self._runtime is None:
            raise EngineError("the device has not been started")
        return self._runtime.infer(prompt)


class Host:
    """The loop and the worker threads that hosted devices share.

    Args:
        threads: Long pieces of work at a time: trials and installations take a processor each.
    """

    def __init__(self, threads: int) -> None:
        self.loop = MqttLoop()
        self.pool = WorkerPool(threads)
        self.clock = SystemClock()
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)
        self._thread.start()

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in the loop's thread, and wait for it."""
        done = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - raised again by the caller below
                errors.append(error)
            finally:
                done.set()

        self.loop.call_soon_threadsafe(run)
        end = time.monotonic() + CALL_S_MAX
        while not done.wait(_POLL_S):
            if not self._thread.is_alive() or time.monotonic() > end:
                raise TransportError(f"the loop of the devices has ended: {self.failure!r}")
        if errors:
            raise errors[0]

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        except Exception as error:  # noqa: BLE001 - told by whoever waits for the fleet
            self.failure = error

    def close(self) -> None:
        """End the threads; the devices must be stopped before."""
        self.loop.stop()
        self._thread.join(CALL_S_MAX)
        self.pool.close()
        self.loop.close()


class ProcessDevice(Device):
    """A device in a process of its own, `python -m device.cli run`, which can be killed.

    Its application is another program: it opens the model through the `current` link, as SPEC allows, and so goes on
    while the agent is dead.
    """

    def __init__(self, plan: DevicePlan, link: Link, folder: Path, runtime: RuntimeName) -> None:
        super().__init__(plan, link, folder)
        self._runtime = runtime
        self._engine = LocalEngine()
        self._process: subprocess.Popen[bytes] | None = None
        self._opened: tuple[str, Model] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the process lives; a process that has ended is not waited for here."""
        if self._process is None or self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def start(self) -> None:
        """As `Device.start`."""
        command = [sys.executable, "-m", "device.cli", "run"]
        command += ["--config", str(self.config_path), "--trace", str(self.trace)]
        with (self.folder / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the simulator, which then stops its devices
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def kill(self) -> None:
        """End the process with SIGKILL, and with it what it has started: as when the power fails."""
        if self._process is not None and self._process.returncode is None:
            # The process leads a group of its own, whose number cannot be taken again before it is waited for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_S_MAX)

    def begin_stop(self) -> None:
        """Ask the process to end; `stop` waits for it."""
        if self.is_running and self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """As `Device.stop`."""
        process = self._process
        if process is not None and process.returncode is None:
            self.begin_stop()
            end = time.monotonic() + STOP_S_MAX
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while os.waitid(os.P_PID, process.pid, options) is None and time.monotonic() < end:
                time.sleep(_POLL_S)
            self.kill()
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def ask(self, prompt: Prompt) -> str:
        """As `Device.ask`."""
        folder = os.path.realpath(self.folder / "state" / CURRENT_LINK)
        if self._opened is None or self._opened[0] != folder:
            (file,) = Path(folder).iterdir()
            model = self._engine.load(ModelSource(self._runtime, str(file)))
            before, self._opened = self._opened, (folder, model)
            if before is not None:
                before[1].close()
        return self._opened[1].answer(prompt)

    def last_words(self) -> str:
        """The last line that the process printed, for the one who looks for the reason of its end."""
        with contextlib.suppress(OSError):
            lines = (self.folder / "output.log").read_text(errors="replace").strip().splitlines()
            return lines[-1][:200] if lines else ""
        return ""


class TraceReader:
    """Follows the trace files of all devices on a thread of its own.

    Args:
        paths: By device.
        heard: Told of each line, in the order of its file.
    """

    def __init__(self, paths: dict[str, Path], heard: Callable[[str, dict[str, Any]], None]) -> None:
        self._heard = heard
        self._files = {device: path.open("rb") for device, path in paths.items()}
        self._torn: dict[str, bytes] = dict.fromkeys(paths, b"")
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        # A file costs some microseconds to look at; a tenth of one processor is what following may take.
        self._pause_s = max(0.01, len(paths) * 0.0002)
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def read(self, device: str) -> None:
        """Take in all that a device has written until now."""
        with self._lock:
            data = self._torn[device] + self._files[device].read()
            *lines, self._torn[device] = data.split(b"\n")
            for line in lines:
                self._heard(device, json.loads(line))

    def stop(self) -> None:
        """Read what is left, and close."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(CALL_S_MAX)
        for device, file in self._files.items():
            self.read(device)
            file.close()

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            for device in self._files:
                self.read(device)
            time.sleep(self._pause_s)
