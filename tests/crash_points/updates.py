"""The updates whose power is cut: what is published, what is asked of the device, and what must come of it.

Everything is as it is on a device but its size: a model of three chunks, so that installing, rewriting in place and fetching still go in
several steps, and a second file that most updates keep.
"""

import io
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final
from unittest.mock import patch

from device import decoding
from device.executor import CURRENT_LINK, ROOT_FILE
from device.journal import Director, Journal, Record, SlotRecord
from device.slots import SlotHealth, SlotName, slot_file, slot_folder
from device.states import State
from protocol.constants import CHUNK_BYTES
from protocol.delta import undo_journal
from protocol.delta.writer import make_delta
from protocol.ids import digest_of
from protocol.messages import TrialEvidence
from protocol.release import ReleaseFile
from protocol.tensors import BytesSource
from simulator.disk import SimulatedDisk
from tests.device import harness
from tests.device.harness import Cache, good_evidence, model_bytes

SEED: Final = 11
MODEL: Final = "model.onnx"
KEPT: Final = "vocabulary.txt"
STEP_BYTES: Final = 48 << 10


def _trained(model: bytes, seed: int, header: int) -> bytes:
    """The model with changes everywhere, and more or fewer bytes near its beginning."""
    rng = random.Random(seed)
    changed = bytearray(model)
    for at in range(4_000, len(changed) - 500, 20_000):
        changed[at : at + 100] = rng.randbytes(100)
    at = 1000
    return bytes(changed[:at] + rng.randbytes(max(0, header)) + changed[at + max(0, -header) :])


def _damaged(base: bytes, result: bytes) -> bytes:
    """A delta with a wrong byte near its end."""
    sink = io.BytesIO()
    make_delta(BytesSource(base), BytesSource(result), sink, segment_bytes=harness.SEGMENT_BYTES)
    patch = bytearray(sink.getvalue())
    patch[-200] ^= 1
    return bytes(patch)


VOCABULARY: Final = model_bytes(7, 3_000)
V1: Final = model_bytes(1, 2 * CHUNK_BYTES + 17)
V2: Final = _trained(V1, 2, 700)
V3: Final = _trained(V2, 3, -900)
MODELS: Final = {"v1": V1, "v2": V2, "v3": V3}


@contextmanager
def small_steps() -> Iterator[None]:
    """Checkpoints, segments and steps that suit the size of the models."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(harness, "SEGMENT_BYTES", 16 << 10))
        stack.enter_context(patch.object(decoding, "STEP_BYTES", STEP_BYTES))
        stack.enter_context(patch.object(undo_journal, "STEP_BYTES", 16 << 10))
        stack.enter_context(patch.object(decoding, "REWRITE_STEPS", 2))
        yield


@dataclass(frozen=True)
class Update:
    """One course of events, from the factory on.

    Attributes:
        name: Names it on the command line.
        asked: Versions, one after the other; each is asked for when the one before is through, or in a state of it.
        ends: What the device runs in the end of each.
        deltas: Pairs of versions with a signed delta.
        evidence: What a trial measures, by version; good where nothing is said.
        unloadable: Versions that pass their trial and cannot be loaded.
        interrupts: Ask for the next version as soon as the update is in this state.
        is_in_place: The device rewrites its only copy.
        has_new_root: The server's root is renewed before the last version is asked for.
        loses_connection: Now and then.
        damage: A delta that is not what its name says.
    """

    name: str
    asked: tuple[str, ...]
    ends: tuple[str, ...]
    deltas: tuple[tuple[str, str], ...] = ()
    evidence: dict[str, TrialEvidence] = field(default_factory=dict)
    unloadable: tuple[str, ...] = ()
    interrupts: State | None = None
    is_in_place: bool = False
    has_new_root: bool = False
    loses_connection: bool = False
    damage: bool = False

    def cache(self) -> Cache:
        """What the broker holds: the releases and their deltas."""
        cache = Cache(SEED)
        cache.publish("vocabulary", VOCABULARY)  # signs the file
        for version, model in MODELS.items():
            files = [
                ReleaseFile(name=name, length=len(data), sha256=digest_of(data))
                for name, data in ((MODEL, model), (KEPT, VOCABULARY))
            ]
            cache.publish(version, model, changes={"files": files})
        for base, result in self.deltas:
            cache.publish_delta(MODELS[base], MODELS[result], in_place=self.is_in_place)
        if self.damage:
            cache.publish_delta(V1, V2, patch=_damaged(V1, V2))
        return cache


BAD: Final = good_evidence(prompts_passed=1)
BOTH: Final = (("v1", "v2"), ("v2", "v3"))

UPDATES: Final = {
    update.name: update
    for update in (
        Update("whole", ("v2", "v3"), ("v2", "v3"), has_new_root=True),
        Update("delta", ("v2", "v3"), ("v2", "v3"), BOTH),
        Update("chain", ("v3",), ("v3",), BOTH),
        Update("rollback", ("v2", "v3"), ("v2", "v2"), BOTH, evidence={"v3": BAD}),
        Update("unloadable", ("v2",), ("v1",), BOTH, unloadable=("v2",)),
        Update("damaged-delta", ("v2",), ("v2",), BOTH, damage=True),
        Update("replaced", ("v2", "v3"), ("v2", "v3"), BOTH, interrupts=State.INSTALLING),
        Update("withdrawn", ("v2", "v1"), ("v2", "v1"), (), interrupts=State.VERIFYING),
        Update("offline", ("v2",), ("v2",), loses_connection=True),
        Update("in-place", ("v2", "v3"), ("v2", "v3"), BOTH, is_in_place=True),
        Update("in-place-rollback", ("v2",), ("v1",), BOTH, evidence={"v2": BAD}, is_in_place=True),
        Update("in-place-unloadable", ("v2",), ("v1",), BOTH, unloadable=("v2",), is_in_place=True),
        Update(
            "in-place-replaced",
            ("v2", "v3"),
            ("v2", "v3"),
            BOTH,
            interrupts=State.INSTALLING,
            is_in_place=True,
        ),
    )
}


def install_factory(disk: SimulatedDisk, root: bytes, director: Director) -> None:
    """As `device.runtime.install_factory`, of a device that has looked at the metadata before."""
    files = {slot_file(SlotName.A, MODEL): V1, slot_file(SlotName.A, KEPT): VOCABULARY, ROOT_FILE: root}
    for name, data in files.items():
        disk.create(name, len(data))
        disk.write(name, 0, data)
        disk.sync(name)
    disk.point(CURRENT_LINK, slot_folder(SlotName.A))
    slot = SlotRecord(
        health=SlotHealth.GOOD,
        version="v1",
        main_file=MODEL,
        files={MODEL: digest_of(V1), KEPT: digest_of(VOCABULARY)},
    )
    slots = {SlotName.A: slot, SlotName.B: SlotRecord()}
    Journal(disk).save(Record(active=SlotName.A, slots=slots, director=director))
