"""Building the new version in the inactive slot, checkpoint by checkpoint.

A step writes a bounded part of the result, makes it durable, and then writes down how far it came; a power cut costs
one step. Where several deltas lead to a file one after the other, each gives a whole file beside the fetched blobs,
which is read back and compared with its signed digest before the next is applied to it. Works on the `Disk` port
only, so the simulator runs this very code. What decodes deltas is a `Decoder`.
"""

from typing import Final

import msgspec
from msgspec import Struct

from device import rewriting
from device.blobs import FOLDER, blob_file
from device.decoding import IN_PROCESS, Decoder, DeltaJob
from device.journal import InstallItem, InstallLink
from device.ports import Disk
from device.slots import SlotName, empty_slot, measure_file, slot_file
from protocol.errors import PatchError, StorageError, WhimbrelError
from protocol.ids import Digest, digest_of

_STATE_FILE: Final = "install.state"
_STATE_TEMPORARY: Final = "install.state.new"
_STATE_BYTES_MAX: Final = 512 << 10
_STATE_VERSION: Final = 1
_INTERMEDIATE: Final = f"{FOLDER}/intermediate."
"""Files on the way lie beside the blobs: whatever ends an update removes both."""


class Checkpoint(Struct, frozen=True, kw_only=True):
    """How far an installation has come."""

    version: int = _STATE_VERSION
    plan: str  # digest of the items: a checkpoint of another plan is worth nothing
    item: int = 0
    link: int = 0  # of the item's chain
    reader: bytes = b""  # state of the delta reader; empty before its first step


_decoder = msgspec.msgpack.Decoder(Checkpoint)


def install_step(
    disk: Disk,
    active: SlotName | None,
    slot: SlotName,
    items: tuple[InstallItem, ...],
    memory_bytes_max: int,
    decoder: Decoder = IN_PROCESS,
) -> bool:
    """Do one step.

    Args:
        disk: The state folder.
        active: Slot that deltas apply to and kept files come from; files that are rewritten in place move out of it.
        slot: Slot that is built.
        items: The plan.
        memory_bytes_max: What applying a delta may take.
        decoder: Applies it.

    Returns:
        Whether everything is built and durable.

    Raises:
        PatchError: A delta is unusable.
        StorageError: The disk failed; calling again goes on at the last checkpoint.
    """
    plan = digest_of(msgspec.msgpack.encode(items))
    if any(item.in_place for item in items):
        assert active is not None
        if not rewriting.is_begun(disk, active, slot, plan):
            discard_installation(disk, slot, decoder)
            rewriting.begin(disk, active, slot, plan)
    checkpoint = _load(disk, plan)
    while checkpoint.item < len(items):
        item = items[checkpoint.item]
        if item.in_place is not None:
            assert active is not None
            if rewriting.rewrite_step(disk, active, slot, item, memory_bytes_max, decoder):
                _save(disk, Checkpoint(plan=plan, item=checkpoint.item + 1))
            return False
        if item.action == "delta":
            _delta_step(disk, active, slot, item, checkpoint, memory_bytes_max, decoder)
            return False
        _place(disk, active, slot, item)
        checkpoint = Checkpoint(plan=plan, item=checkpoint.item + 1)
        _save(disk, checkpoint)
    _remove_intermediates(disk, keep="")
    return True


def discard_installation(disk: Disk, slot: SlotName, decoder: Decoder = IN_PROCESS) -> None:
    """Empty a slot, and first forget what was written down about building it.

    What was rewritten into the slot goes back where it came from: it may be the only copy.

    Raises:
        StorageError: The disk failed; nothing is lost, and calling again goes on.
    """
    rewriting.settle(disk, slot, decoder)
    if disk.length(_STATE_FILE) is not None and ((before := _read(disk)) is None or before.plan):
        _save(disk, Checkpoint(plan=""))  # durable, as a removal need not be
    empty_slot(disk, slot)


def _place(disk: Disk, active: SlotName | None, slot: SlotName, item: InstallItem) -> None:
    """A whole file moves into the slot; a kept one gets a second name. Both are one durable operation."""
    target = slot_file(slot, item.name)
    if item.action == "keep":
        assert active is not None
        disk.link(slot_file(active, item.base_name), target)
    elif disk.length(blob_file(Digest(item.blob))) is not None:
        # That its chunks are there says nothing: they may be the work of a process that ended before its sync, or of a sync that failed.
        disk.sync(blob_file(Digest(item.blob)))
        disk.replace(blob_file(Digest(item.blob)), target)
    elif disk.length(target) != item.length:
        raise StorageError(f"file {item.name} of the update is neither fetched nor installed")


def _delta_step(
    disk: Disk,
    active: SlotName | None,
    slot: SlotName,
    item: InstallItem,
    checkpoint: Checkpoint,
    memory_bytes_max: int,
    decoder: Decoder,
) -> None:
    links = item.links
    number = checkpoint.link
    if not links[number].base_sha256:
        number += 1  # a whole file on the way is there as it was fetched
    link = links[number]
    is_last = number + 1 == len(links)
    target = slot_file(slot, item.name) if is_last else _intermediate(link)
    base_name = _base_file(active, item, number)
    if not checkpoint.reader:
        _remove_intermediates(disk, keep=base_name)
        disk.create(target, link.length)
    job = DeltaJob(
        base=base_name,
        patch=blob_file(Digest(link.blob)),
        result=target,
        base_sha256=link.base_sha256,
        sha256=link.sha256,
        length=link.length,
        memory_bytes_max=memory_bytes_max,
    )
    decoded = decoder.decode(disk, job, checkpoint.reader)
    disk.sync(target)
    if not decoded.is_finished:
        _save(
            disk,
            Checkpoint(plan=checkpoint.plan, item=checkpoint.item, link=number, reader=decoded.state),
        )
        return
    if is_last:
        _save(disk, Checkpoint(plan=checkpoint.plan, item=checkpoint.item + 1))
        return
    # The next delta would find out only segment by segment. The file itself is measured with its slot.
    if measure_file(disk, target) != link.sha256:
        raise PatchError("a file on the way is not the one that its delta names")
    _save(disk, Checkpoint(plan=checkpoint.plan, item=checkpoint.item, link=number + 1))


def _base_file(active: SlotName | None, item: InstallItem, number: int) -> str:
    """What link `number` applies to: the active file, or what the link before gave."""
    if number == 0:
        assert active is not None
        return slot_file(active, item.base_name)
    before = item.links[number - 1]
    return _intermediate(before) if before.base_sha256 else blob_file(Digest(before.blob))


def _intermediate(link: InstallLink) -> str:
    return f"{_INTERMEDIATE}{link.sha256}"


def _remove_intermediates(disk: Disk, keep: str) -> None:
    """Make room: nothing but the base of what is made now is needed any more."""
    for name in disk.names(FOLDER):
        if name.startswith(_INTERMEDIATE) and name != keep:
            disk.remove(name)


def _load(disk: Disk, plan: str) -> Checkpoint:
    """The checkpoint of this plan, or a fresh start: a damaged one costs time, nothing else."""
    checkpoint = _read(disk)
    if checkpoint is None or checkpoint.plan != plan or checkpoint.version != _STATE_VERSION:
        return Checkpoint(plan=plan)
    return checkpoint


def _read(disk: Disk) -> Checkpoint | None:
    """The checkpoint, of whatever plan; `None` where there is none, or one that cannot be read."""
    try:
        return _decoder.decode(disk.read(_STATE_FILE, 0, _STATE_BYTES_MAX))
    except (msgspec.MsgspecError, WhimbrelError):
        return None


def _save(disk: Disk, checkpoint: Checkpoint) -> None:
    data = msgspec.msgpack.encode(checkpoint)
    disk.create(_STATE_TEMPORARY, len(data))
    disk.write(_STATE_TEMPORARY, 0, data)
    disk.sync(_STATE_TEMPORARY)
    disk.replace(_STATE_TEMPORARY, _STATE_FILE)
