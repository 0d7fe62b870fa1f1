"""Carries effects out against the ports, in order: this code, on a Pi and in the simulator.

Short effects are done at once; `Persist` among them is the barrier, since it returns only when the record is durable. Long
ones, and those that remove files, go to the device's worker, which does one after the other; those with a serial answer
with an event. The first short effect that fails ends its tuple, and the agent hears `EffectFailed`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from device import blobs, effects, events, rewriting
from device.decoding import IN_PROCESS, Decoder
from device.effects import Effect
from device.install import discard_installation, install_step
from device.journal import Journal
from device.leases import Leases
from device.ports import (
    Cipher,
    Disk,
    Engine,
    KeyOpener,
    Model,
    ModelSource,
    Transport,
    TrialOrder,
    Workers,
)
from device.slots import measure_slot, slot_bytes, slot_file, slot_folder
from protocol.constants import METADATA_BYTES_MAX
from protocol.errors import ContentKeyError, TrustError, WhimbrelError
from protocol.release import RuntimeName

ROOT_FILE: Final = "root.json"
"""The start of trust: put there by the installer, replaced by verified successors."""

_ROOT_TEMPORARY: Final = "root.json.new"
CURRENT_LINK: Final = "current"
"""Symbolic link to the folder of the active slot."""

LET_GO_S_MAX: Final = 10.0
"""How long requests may go on once the file of their model is to be rewritten. Each of them notices between two tokens."""


class Executor:
    """Runs the effects of one device.

    Args:
        disk: Its state folder.
        transport: Its connection.
        engine: Its runtimes.
        workers: Where long work runs.
        post: Takes an event to the agent; called from workers too.
        leases: Of the model that answers; its own where none are given.
        decoder: Applies deltas.
        gently: Does what takes processor and disk and can wait, at a lower priority.
        seal: Signs what is sent on a topic, where the device has a key.
        open_key: Opens content keys, likewise. They are kept here, in memory, and nowhere else.
    """

    def __init__(
        self,
        *,
        disk: Disk,
        transport: Transport,
        engine: Engine,
        workers: Workers,
        post: Callable[[events.Event], None],
        leases: Leases | None = None,
        decoder: Decoder = IN_PROCESS,
        gently: Callable[[Callable[[], Any]], Any] = lambda work: work(),
        seal: Callable[[str, bytes], bytes] | None = None,
        open_key: KeyOpener | None = None,
    ) -> None:
        self._disk = disk
        self._transport = transport
        self._engine = engine
        self._workers = workers
        self._post = post
        self._gently = gently
        self._decoder = decoder
        self._seal = seal
        self._open_key = open_key
        self._ciphers: dict[str, Cipher] = {}
        self._journal = Journal(disk)
        self.leases: Final = leases or Leases()
        self._actions: Final[dict[type, Callable[[Any], None]]] = {
            effects.Persist: lambda effect: self._journal.save(effect.record),
            effects.SaveRoot: self._save_root,
            effects.Subscribe: lambda effect: transport.subscribe(effect.filters, effect.qos),
            effects.Unsubscribe: lambda effect: transport.unsubscribe(effect.filters),
            effects.Publish: self._publish,
            effects.ForgetKeys: lambda _effect: self._ciphers.clear(),
            effects.WriteChunk: self._write_chunk,
            effects.SyncBlob: lambda effect: disk.sync(blobs.blob_file(effect.blob)),
            effects.PointCurrent: lambda effect: disk.point(CURRENT_LINK, slot_folder(effect.slot)),
            effects.AnswerOperator: lambda _effect: None,  # the driver passes it on
            effects.Trace: lambda _effect: None,
        }
        self._jobs: Final[dict[type, Callable[[Any], events.Event | None]]] = {
            effects.RemoveBlobs: self._remove_blobs,
            effects.EmptySlot: lambda effect: discard_installation(disk, effect.slot, self._decoder),
            effects.OpenKeys: self._open_keys,
            effects.OpenBlob: lambda effect: events.BlobOpened(
                effect.serial, gently(partial(blobs.open_blob, disk, effect.plan, self._cipher(effect.key)))
            ),
            effects.ReadBlob: self._read_blob,
            effects.Probe: self._probe,
            effects.InstallStep: self._install_step,
            effects.MeasureSlot: lambda effect: events.SlotMeasured(
                effect.serial, gently(partial(measure_slot, disk, effect.slot))
            ),
            effects.StartTrial: self._trial,
            effects.Serve: self._serve,
            effects.LetGo: lambda _effect: self.leases.let_go(LET_GO_S_MAX),
        }

    @property
    def model(self) -> Model | None:
        """The model that answers now: to look at; whoever asks it something leases it."""
        return self.leases.model

    def boot_event(self, memory_bytes: int, *, is_clock_set: bool = True) -> events.Booted:
        """What the disk knows, as the agent's first event.

        Args:
            memory_bytes: Memory of the device.
            is_clock_set: Whether somebody who knows the time has set its clock.

        Raises:
            DamagedRecordError: The record is lost.
            TrustError: There is no root document.
        """
        root = b""
        if self._disk.length(ROOT_FILE) is not None:
            root = self._disk.read(ROOT_FILE, 0, METADATA_BYTES_MAX["root"] + 1)
        if not root:
            raise TrustError(
                f"{ROOT_FILE} is missing", hint="provision the device with the server's 1.root.json"
            )
        return events.Booted(self._journal.load(), root, self._engine.versions(), memory_bytes, is_clock_set)

    def run(self, ordered: tuple[Effect, ...]) -> None:
        """Carry out the effects of one `handle`, in order."""
        for effect in ordered:
            job = self._jobs.get(type(effect))
            if job is not None:
                self._workers.submit(partial(self._work, job, effect))
                continue
            try:
                self._actions[type(effect)](effect)
            except WhimbrelError as error:
                self._post(events.EffectFailed(0, error.code, str(error), error.is_retryable))
                return

    def close(self) -> None:
        """Let go of the model, whoever uses it."""
        self.leases.let_go()

    def _work(self, job: Callable[[Any], events.Event | None], effect: Any) -> None:
        try:
            answer = job(effect)
        except WhimbrelError as error:
            serial = getattr(effect, "serial", 0)
            answer = events.EffectFailed(serial, error.code, str(error), error.is_retryable)
        if answer is not None:
            self._post(answer)

    def _publish(self, effect: effects.Publish) -> None:
        payload = effect.payload
        if effect.is_signed and self._seal is not None:
            payload = self._seal(effect.topic, payload)
        self._transport.publish(effect.topic, payload, effect.qos, retain=effect.retain)

    def _write_chunk(self, effect: effects.WriteChunk) -> None:
        blobs.write_chunk(self._disk, effect.blob, effect.index, effect.payload, self._cipher(effect.key))
        self._transport.progressed()

    def _save_root(self, effect: effects.SaveRoot) -> None:
        self._disk.create(_ROOT_TEMPORARY, len(effect.root))
        self._disk.write(_ROOT_TEMPORARY, 0, effect.root)
        self._disk.sync(_ROOT_TEMPORARY)
        self._disk.replace(_ROOT_TEMPORARY, ROOT_FILE)

    def _remove_blobs(self, effect: effects.RemoveBlobs) -> None:
        blobs.remove_blobs(self._disk, effect.keep)
        rewriting.remove_leftovers(self._disk)

    def _open_keys(self, effect: effects.OpenKeys) -> events.KeysOpened:
        """Open what can be opened. Anybody may have sent it, so a false key hides no true one, and is not kept."""
        trouble = ""
        found: dict[str, Cipher] = {}
        for wrapped in effect.keys:
            try:
                opened = None if self._open_key is None else self._open_key(wrapped)
            except WhimbrelError as error:
                trouble = str(error)
                continue
            if opened is None:
                trouble = trouble or "the keys are wrapped for another certificate than this device has"
            elif opened.name in effect.names:
                found[opened.name] = opened.cipher
            else:
                trouble = "a content key is not the one that signed metadata names"
        self._ciphers.update(found)
        return events.KeysOpened(frozenset(found), trouble)

    def _cipher(self, key: str) -> Cipher:
        if not key:
            return blobs.as_it_is
        try:
            return self._ciphers[key]
        except KeyError:
            raise ContentKeyError("the content key of an encrypted artifact is not at hand") from None

    def _read_blob(self, effect: effects.ReadBlob) -> events.BlobRead:
        return events.BlobRead(effect.serial, blobs.read_blob(self._disk, effect.blob, effect.length))

    def _probe(self, effect: effects.Probe) -> events.Probed:
        files: dict[str, str] = {}
        active_bytes = inactive_bytes = 0
        if effect.active is not None:
            rewriting.put_back(self._disk, effect.active, self._decoder)
            files = measure_slot(self._disk, effect.active)
            active_bytes = slot_bytes(self._disk, effect.active)
            other = effect.active.other
            inactive_bytes = slot_bytes(self._disk, other) + rewriting.remains_bytes(self._disk, other)
        free_bytes = self._disk.free_bytes()
        return events.Probed(effect.serial, files, free_bytes, inactive_bytes, active_bytes)

    def _install_step(self, effect: effects.InstallStep) -> events.InstallProgressed:
        step = partial(
            install_step,
            self._disk,
            effect.active,
            effect.slot,
            effect.items,
            effect.memory_bytes_max,
            self._decoder,
        )
        done = self._gently(step)
        return events.InstallProgressed(effect.serial, done)

    def _trial(self, effect: effects.StartTrial) -> events.TrialFinished:
        source = self._source(effect.order.model.runtime, effect)
        order = TrialOrder(source, effect.order.health, effect.order.memory_bytes_max)
        return events.TrialFinished(effect.serial, self._engine.trial(order))

    def _serve(self, effect: effects.Serve) -> events.ServingStarted:
        """Load the new model before the old one goes: a request always finds one of them, and keeps the one that it found."""
        model = self._engine.load(self._source(effect.runtime, effect))
        self.leases.swap(model, effect.version)
        return events.ServingStarted(effect.serial)

    def _source(self, runtime: RuntimeName, effect: effects.StartTrial | effects.Serve) -> ModelSource:
        path, adapter = (
            self._disk.path(slot_file(effect.slot, name)) if name else ""
            for name in (effect.file, effect.adapter)
        )
        return ModelSource(runtime, path, adapter)
