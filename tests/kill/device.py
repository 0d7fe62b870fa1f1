"""One agent as its own process, seen from outside: its trace, its state folder, and what must hold in it after any kill."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device.adapters.disk import RealDisk
from device.adapters.engines import LocalEngine
from device.config import load_config
from device.executor import CURRENT_LINK
from device.journal import Journal, Record
from device.ports import ModelSource
from device.rewriting import put_back
from device.runtime import install_factory
from device.slots import SlotHealth, SlotName, measure_slot, slot_file, slot_folder
from device.states import State
from device.trial import TRIES_MAX
from protocol.errors import WhimbrelError
from protocol.release import Release

POLL_S = 0.002
END_S_MAX = 30.0


class Device:
    """The state folder of a device, and the process that runs on it from time to time."""

    def __init__(
        self, folder: Path, port: int, releases: dict[str, Release], *, in_place: bool = False
    ) -> None:
        self.is_in_place = in_place
        self._config_file = folder / "device.toml"
        self._config_file.write_text(
            'device = "kill-1"\nfleet = "lab"\nfamily = "digits"\nstate_folder = "state"\n'
            f'broker = "127.0.0.1:{port}"\n'
            f"[slots]\nin_place = {str(in_place).lower()}\n"
        )
        self.config = load_config(self._config_file)
        self.trace_file = folder / "trace.jsonl"
        self.log = folder / "agent.log"
        self._releases = releases
        self._disk = RealDisk(self.config.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._tries_before = 0
        self._started_s = 0.0
        self.start_s = 0.5  # until the agent is up; measured at every start that comes so far
        self.trace = Trace(self.trace_file)

    def provision(self, version: str, files: dict[str, Path], root: Path) -> None:
        install_factory(self.config, self._releases[version], files, root.read_bytes())

    def start(self) -> None:
        self._tries_before = self.tries
        if self.trace.booted_ms / 1000 > self._started_s > 0:
            self.start_s = self.trace.booted_ms / 1000 - self._started_s
        self._started_s = time.time()
        command = [sys.executable, "-m", "device.cli", "run", "--config", str(self._config_file)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--trace", str(self.trace_file)], stdout=log, stderr=log
            )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return -signal.SIGKILL

    def close(self) -> None:
        if self._process is not None:
            self.kill()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Follow the trace until `condition` holds; false when the process or the time came to an end before."""
        end = time.monotonic() + timeout_s
        while True:
            self.trace.follow()
            if condition():
                return True
            if time.monotonic() > end or (self._process is not None and self._process.poll() is not None):
                return False
            time.sleep(POLL_S)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def tries(self) -> int:
        """Trials begun in the update under way."""
        record = self.record()
        if record is None or record.update is None or record.update.outcome != "running":
            return 0
        return record.update.tries

    @property
    def may_be_killed(self) -> bool:
        """Three trials cut short are taken for a model that takes the device down, as they should be.

        A life begins one trial of an update at most, so only one that began after two of them has to be spared.
        """
        return self._tries_before < TRIES_MAX - 1 or self.tries < TRIES_MAX - 1

    def record(self) -> Record | None:
        return Journal(self._disk).load()

    def examine(self) -> list[str]:
        """What is wrong with the folder of a device that does not run; empty when all is well."""
        try:
            record = self.record()
        except WhimbrelError as error:
            return [f"the record does not load: {error}"]
        if record is None or record.active is None:
            return ["no version is active"]
        wrong = self._examine_active(record, record.active)
        pointed = self._pointed()
        if pointed is None:
            wrong.append("the link `current` leads nowhere")
        elif pointed is not record.active and record.state is not State.COMMITTING:
            # It is moved right after the commit is durable. A kill may come in between: then it leads to the version before, as long
            # as that is whole, and the next start moves it, once the model answers and a wish that has waited was taken up.
            stale = self._examine_slot(self._disk, record, pointed, "the slot that the link names")
            if record.state not in {State.IDLE, State.SYNCING} or stale:
                found = "; ".join(["", *stale])
                wrong.append(
                    f"the link `current` names slot {pointed.value} in state {record.state.value}{found}"
                )
        elif pointed is not record.active and not self.is_in_place:
            wrong += self._examine_slot(self._disk, record, pointed, "the slot that `current` names")
        return wrong

    def _examine_active(self, record: Record, active: SlotName) -> list[str]:
        """The active slot must be whole, and where its files are rewritten, it must be possible to put them back, on a copy."""
        if not self.is_in_place:
            return self._examine_slot(self._disk, record, active, "the active slot")
        with tempfile.TemporaryDirectory(dir=self.config.folder.parent) as folder:
            copied = Path(folder) / "state"
            sockets = shutil.ignore_patterns("*.sock")  # that the killed agent left
            shutil.copytree(self.config.folder, copied, symlinks=True, ignore=sockets)
            disk = RealDisk(copied)
            try:
                put_back(disk, active)
            except WhimbrelError as error:
                return [f"the active slot cannot be put back: {error}"]
            return self._examine_slot(disk, record, active, "the active slot")

    def _examine_slot(self, disk: RealDisk, record: Record, name: SlotName, what: str) -> list[str]:
        """A slot that is served must hold a signed release, byte for byte, that starts and answers."""
        slot = record.slots[name]
        release = self._releases.get(slot.version)
        if slot.health is not SlotHealth.GOOD or release is None:
            return [f"{what} is {slot.health.value}, version {slot.version!r}"]
        signed = {file.name: file.sha256 for file in release.files}
        if measure_slot(disk, name) != signed:
            return [f"the bytes of {what} are not those of {slot.version}"]
        try:
            model = LocalEngine().load(ModelSource(slot.runtime, disk.path(slot_file(name, slot.main_file))))
            prompt = release.health.prompts[0]
            answer = model.answer(prompt)
            model.close()
        except WhimbrelError as error:
            return [f"the model of {what} does not start: {error}"]
        return (
            [] if answer == str(getattr(prompt, "label", None)) else [f"the model of {what} answers {answer}"]
        )

    def _pointed(self) -> SlotName | None:
        link = self.config.folder / CURRENT_LINK
        if not link.is_symlink():
            return None
        target = str(link.readlink())
        return next((name for name in SlotName if slot_folder(name) == target), None)


class Trace:
    """What the agent wrote down about itself, across all its lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.state = State.IDLE
        self.boots = 0
        self.booted_ms = 0
        self.chunks = 0
        self.chunks_again = 0
        self.visits: dict[State, int] = dict.fromkeys(State, 0)
        self.lasted_ms: dict[State, int] = {}  # the last stay in each state that no kill cut short
        self._entered_ms: int | None = None
        self._stored: set[tuple[str, int]] = set()  # in the update under way

    def follow(self) -> None:
        """Read what was added."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data.rpartition(b"\n")[0]
        if not complete:
            return
        self._offset += len(complete) + 1
        for line in complete.split(b"\n"):
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        match line["kind"]:
            case "boot":
                self.boots += 1
                self.booted_ms = line["t"]
                self._entered_ms = None
            case "transition":
                self._move(State(line["to"]), line["t"])
                if line["trigger"] == "requested":
                    self._stored.clear()
            case "chunk":
                self.chunks += 1
                chunk = (line["blob"], line["index"])
                self.chunks_again += chunk in self._stored
                self._stored.add(chunk)

    def _move(self, state: State, now_ms: int) -> None:
        if self._entered_ms is not None:
            self.lasted_ms[self.state] = now_ms - self._entered_ms
        self.state = state
        self._entered_ms = now_ms
        self.visits[state] += 1
