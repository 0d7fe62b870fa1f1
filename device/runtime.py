"""The driver of one device: events to the agent, effects to the executor, one timer. Any number share a loop.

All of it happens in the loop's thread, but for long effects, which the executor gives to the workers.
"""

import json
import logging
import os
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from device import effects, events
from device.adapters.clock import is_clock_set
from device.adapters.conditions import PERIOD_S, MachineConditions
from device.adapters.control import Held, Status
from device.adapters.decoder import ChildDecoder
from device.adapters.disk import RealDisk
from device.adapters.engines import LocalEngine
from device.adapters.hooks import SwapHook
from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport, Will
from device.adapters.priority import Priority, gently
from device.adapters.workers import WorkerPool
from device.admission import model_bytes
from device.agent import Agent
from device.config import DeviceConfig
from device.decoding import Decoder
from device.executor import CURRENT_LINK, ROOT_FILE, Executor
from device.journal import Journal, Record, SlotRecord
from device.slots import READ_BYTES, SlotHealth, SlotName, empty_slot, measure_file, slot_file, slot_folder
from protocol.errors import RequestError, WhimbrelError
from protocol.messages import Link, encode_message
from protocol.release import Prompt, Release, ReleaseFile, release_digest
from protocol.topics import Topics
from protocol.trust import check_root

if TYPE_CHECKING:
    from device.adapters.identity import Identity
    from device.adapters.renewer import Renewer

_LOG: Final = logging.getLogger(__name__)

WORK_END_S_MAX: Final = 10.0
"""Until work that was broken off has noticed: one disk operation, or the load of a model."""


class Clock(Protocol):
    """Milliseconds since 1970 that never go back."""

    def now_ms(self) -> int:
        """The instant."""


class DeviceRuntime:
    """One device on a loop.

    Args:
        config: Its settings.
        loop: The loop, shared with others or not.
        pool: Threads for long work.
        clock: Source of instants.
        rng: Source of jitter.
        decoder: Applies deltas; in a child process of its own where none is given.
        on_trace: Told of every transition.
        trace_path: File that gets a line of JSON per transition, stored chunk and boot; a kill loses none of them.
    """

    def __init__(
        self,
        config: DeviceConfig,
        loop: MqttLoop,
        pool: WorkerPool,
        *,
        clock: Clock,
        rng: random.Random,
        decoder: Decoder | None = None,
        on_trace: Callable[[effects.Trace, int], None] | None = None,
        trace_path: Path | None = None,
    ) -> None:
        self.config = config
        self.disk = RealDisk(config.folder)
        self.disk.prepare()
        self.agent = Agent(config.agent, rng)
        priority = Priority(config.priority.nice, config.priority.io)
        self.engine = LocalEngine(priority=priority, compute=config.compute)
        self._decoding = ChildDecoder(priority=priority)
        self._loop = loop
        self._clock = clock
        self._on_trace = on_trace
        self._trace = None if trace_path is None else _TraceFile(trace_path, config.agent.device)
        self._workers = pool.for_device(
            on_bug=lambda error: loop.call_soon_threadsafe(partial(_raise, error))
        )
        self._hook = SwapHook(config.hooks.after_swap, config.hooks.timeout_s)
        self._has_served = False
        policy = config.agent.policy
        self._conditions = None if policy.is_open else MachineConditions(policy, config.sources)
        self._held = ""  # code of what held updates at the last look
        self._is_stopped = False
        self._armed_ms: int | None = None
        self._thread = 0  # in which events are handled
        self._has_failed = False
        self._wishes = 0  # of operators, so far
        self._answers: dict[int, Callable[[str, str], None]] = {}
        topics = Topics(config.agent.fleet)
        self._link_topic = topics.link(config.agent.device)
        identity = self._make_identity()
        self.transport = MqttTransport(
            loop,
            BrokerAddress(config.broker_host, config.broker_port, identity.tls if identity else None),
            config.agent.device,
            rng,
            will=Will(self._link_topic, encode_message(Link(online=False))),
            on_connected=self._connected,
            on_disconnected=self._disconnected,
            on_message=self._heard,
        )
        self._renewer = None if identity is None else self._make_renewer(identity, topics, rng)
        self.executor = Executor(
            disk=self.disk,
            transport=self.transport,
            engine=self.engine,
            workers=self._workers,
            post=self._post,
            decoder=decoder or self._decoding,
            gently=partial(gently, priority),
            seal=identity.seal if identity else None,
            open_key=partial(identity.open_key, config.agent.fleet) if identity else None,
        )

    def _make_identity(self) -> "Identity | None":
        if self.config.tls is None:
            return None
        # Only here, since it loads much: a device without certificates does without.
        from device.adapters.identity import Identity  # noqa: PLC0415

        return Identity(self.config.agent.device, self.config.tls, self.disk, self._clock)

    def _make_renewer(self, identity: "Identity", topics: Topics, rng: random.Random) -> "Renewer | None":
        """What keeps the certificate fresh; somebody else's is their own business."""
        if self.config.tls is None or not self.config.tls.is_enrolled:
            return None
        from device.adapters.renewer import Renewer  # noqa: PLC0415 - as above

        device = self.config.agent.device
        return Renewer(identity, device, topics, self._loop, self.transport, self._clock, rng)

    def start(self) -> None:
        """Boot the agent from what the disk knows, and connect.

        Raises:
            DamagedRecordError: The durable record is lost.
            TrustError: The device was never provisioned.
        """
        event = self.executor.boot_event(_memory_bytes(), is_clock_set=self._is_clock_set())
        self._note("boot", {})
        self.handle(event)
        self._look_around()
        if self._renewer is not None:
            self._renewer.start()
        self.transport.start()

    def _is_clock_set(self) -> bool:
        if self.config.clock == "auto":
            return is_clock_set()
        return self.config.clock == "trusted"

    def stop(self) -> None:
        """Say goodbye and let go of everything; an update goes on at the next start.

        Work under way is broken off, so that another agent can start on the folder at once.
        """
        self._is_stopped = True
        if self._renewer is not None:
            self._renewer.stop()
        # A farewell keeps the broker from saying the Will; QoS 0, since nobody waits here for an acknowledgement.
        self.transport.publish(self._link_topic, encode_message(Link(online=False)), 0, retain=True)
        self.transport.close()
        self.disk.close()
        self.engine.stop()
        self._decoding.stop()
        self._hook.stop()
        self._workers.stop(WORK_END_S_MAX)
        self.executor.close()
        if self._trace is not None:
            self._trace.close()

    def handle(self, event: events.Event) -> None:
        """Let the agent take note of an event, and carry out what it orders."""
        if self._is_stopped:
            return
        now_ms = self._clock.now_ms()
        self._thread = threading.get_ident()
        for effect in self.agent.handle(event, now_ms):
            self._has_failed = False
            self.executor.run((effect,))
            if self._has_failed:  # those after it are dropped, as in a single run of all
                break
            self._observe(effect, now_ms)
        self._arm()

    def ask(self, wish: events.Wish, answer: Callable[[str, str], None]) -> None:
        """Pass on what an operator asks for.

        Args:
            wish: What.
            answer: Told once, with a code that is empty where it is done, and a line.
        """
        self._wishes += 1
        self._answers[self._wishes] = answer
        self.handle(events.OperatorAsked(self._wishes, wish))

    def status(self) -> Status:
        """How the agent stands."""
        held = self.agent.held
        return Status(
            pid=os.getpid(),
            state=self.agent.state.value,
            serving=self.agent.serving,
            is_connected=self.transport.is_connected,
            broker=f"{self.config.broker_host}:{self.config.broker_port}",
            trouble=self.transport.error,
            paused_ms=self.agent.record.paused_ms,
            held=None if held is None else Held(code=held.code, text=held.text),
        )

    def infer(self, prompt: Prompt) -> str:
        """Answer with the model that serves now; a swap in between is not noticed.

        Raises:
            EngineError: There is no model, or it did not answer.
        """
        with self.executor.leases.lease() as lease:
            return lease.model.answer(prompt)

    def _look_around(self) -> None:
        """Tell the agent how the machine stands, now and every so often; only where a policy asks."""
        if self._conditions is None or self._is_stopped:
            return
        self.handle(self._conditions.read())
        held = self.agent.held
        code = "" if held is None else held.code
        if code != self._held:
            self._held = code
            text = "nothing holds updates" if held is None else f"updates wait: {held.text} ({code})"
            _LOG.info("%s: %s", self.config.agent.device, text)
        self._loop.call_later(PERIOD_S, self._look_around)

    def _connected(self) -> None:
        self.transport.publish(self._link_topic, encode_message(Link(online=True)), 1, retain=True)
        self.handle(events.Connected())
        if self._renewer is not None:
            self._renewer.connected()

    def _disconnected(self) -> None:
        if self._renewer is not None:
            self._renewer.disconnected()
        self.handle(events.Disconnected())

    def _heard(self, topic: str, payload: bytes) -> None:
        if self._renewer is None or not self._renewer.heard(topic, payload):
            self.handle(events.MessageReceived(topic, payload))

    def _post(self, event: events.Event) -> None:
        if threading.get_ident() == self._thread:  # workers post too, but only from their own threads
            self._has_failed = isinstance(event, events.EffectFailed)
        self._loop.call_soon_threadsafe(partial(self.handle, event))

    def _arm(self) -> None:
        deadline_ms = self.agent.deadline()
        if deadline_ms is None or deadline_ms == self._armed_ms:
            return
        self._armed_ms = deadline_ms
        delay_s = max(0, deadline_ms - self._clock.now_ms()) / 1000
        self._loop.call_later(delay_s, partial(self._deadline_reached, deadline_ms))

    def _deadline_reached(self, deadline_ms: int) -> None:
        if deadline_ms == self._armed_ms:
            self._armed_ms = None
            self.handle(events.DeadlineReached())

    def _observe(self, effect: effects.Effect, now_ms: int) -> None:
        if isinstance(effect, effects.Trace):
            if self._on_trace is not None:
                self._on_trace(effect, now_ms)
            source, trigger, target = effect.row
            reason = f": {effect.code}" if effect.code else ""
            _LOG.info(
                "%s: %s %s -> %s%s",
                self.config.agent.device,
                effect.version,
                source.value,
                target.value,
                reason,
            )
            fields = {"from": source.value, "trigger": trigger.value, "to": target.value}
            self._note("transition", {**fields, "version": effect.version, "code": effect.code})
        elif isinstance(effect, effects.AnswerOperator):
            answer = self._answers.pop(effect.serial, None)
            if answer is not None:
                answer(effect.code, effect.text)
        elif isinstance(effect, effects.PointCurrent):
            self._swapped(effect.slot)
        elif isinstance(effect, effects.WriteChunk):
            self._note("chunk", {"blob": effect.blob, "index": effect.index})

    def _swapped(self, slot: SlotName) -> None:
        record = self.agent.record.slots[slot]
        folder = self.config.folder.absolute() / CURRENT_LINK
        self._hook.run(
            {
                "WHIMBREL_REASON": "swap" if self._has_served else "start",
                "WHIMBREL_DEVICE": self.config.agent.device,
                "WHIMBREL_FAMILY": self.config.agent.family,
                "WHIMBREL_VERSION": record.version,
                "WHIMBREL_MODEL": str(folder / record.main_file),
                "WHIMBREL_ADAPTER": str(folder / record.adapter_file) if record.adapter_file else "",
            }
        )
        self._has_served = True

    def _note(self, kind: str, fields: dict[str, object]) -> None:
        if self._trace is not None:
            self._trace.write({"t": self._clock.now_ms(), "kind": kind, **fields})


class _TraceFile:
    """A file of JSON lines, each written with one system call, so that a kill tears none."""

    def __init__(self, path: Path, device: str) -> None:
        self._device = device
        try:
            self._descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RequestError(
                f"{path}: {error.strerror}", hint="choose another file for the trace"
            ) from error

    def write(self, fields: dict[str, object]) -> None:
        os.write(self._descriptor, json.dumps({**fields, "device": self._device}).encode() + b"\n")

    def close(self) -> None:
        os.close(self._descriptor)


def install_factory(
    config: DeviceConfig, release: Release, files: Mapping[str, Path | BinaryIO], root: bytes
) -> None:
    """What an installer does before the device is shipped: a first version, and the start of trust.

    Args:
        config: The device.
        release: Description of the version.
        files: Where each file of the release is now, or the file, opened.
        root: The server's root document.

    Raises:
        RequestError: The device was provisioned before, or a file is not the one that the release names.
        TrustError: The root document is none.
    """
    disk = RealDisk(config.folder)
    disk.prepare()
    check_root(root)
    journal = Journal(disk)
    if journal.load() is not None:
        raise RequestError(f"{config.folder}: this device is provisioned", hint="use an empty state folder")
    try:
        for file in release.files:
            _install_file(disk, file, files.get(file.name))
    except WhimbrelError:
        empty_slot(disk, SlotName.A)
        raise
    disk.create(ROOT_FILE, len(root))
    disk.write(ROOT_FILE, 0, root)
    disk.sync(ROOT_FILE)
    disk.point(CURRENT_LINK, slot_folder(SlotName.A))
    slot = SlotRecord(
        health=SlotHealth.GOOD,
        version=release.version,
        runtime=release.runtime,
        main_file=release.files[0].name,
        adapter_file=release.adapter.name if release.adapter else "",
        files={file.name: file.sha256 for file in release.files},
        release_sha256=release_digest(release),
        memory_bytes=model_bytes(release),
    )
    journal.save(Record(active=SlotName.A, slots={SlotName.A: slot, SlotName.B: SlotRecord()}))


def _install_file(disk: RealDisk, file: ReleaseFile, source: Path | BinaryIO | None) -> None:
    if source is None:
        raise RequestError(f"file {file.name} of the release is not given", hint="give it with --file")
    name = slot_file(SlotName.A, file.name)
    _copy(disk, source, name)
    if measure_file(disk, name) != file.sha256:
        path = source if isinstance(source, Path) else source.name
        raise RequestError(f"{path} is not the file {file.name} that the release names")


def _copy(disk: RealDisk, source: Path | BinaryIO, name: str) -> None:
    try:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            disk.create(name, os.fstat(file.fileno()).st_size)
            offset = 0
            while piece := file.read(READ_BYTES):
                disk.write(name, offset, piece)
                offset += len(piece)
    except OSError as error:
        raise RequestError(f"{source}: {error.strerror}") from error
    disk.sync(name)


def _raise(error: Exception) -> None:
    raise error


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
