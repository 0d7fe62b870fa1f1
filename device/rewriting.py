"""Turning files of the active slot into those of the new version themselves, where the disk has no room for both.

A file moves to the other slot by a rename and is rewritten there by `protocol/delta/inplace.py`, so that measuring, trial and commit work
as they do with two copies. Before anything moves, a manifest says durably what moves where. It stays until the version before is given
up for good; until then everything can be put back. Where a file is, the disk itself says: it has moved once its old name is gone.

Works on the `Disk` port only, so the simulator runs this very code. What decodes deltas is a `Decoder`; what else of it is needed is imported
where it is used: an agent at rest does without numpy and the tables of the coder.
"""

import logging
from typing import Final

import msgspec
from msgspec import Struct

from device.blobs import blob_file
from device.decoding import IN_PROCESS, Decoder, DiskFile, RewriteJob
from device.journal import InstallItem
from device.ports import Disk
from device.slots import SlotName, slot_file
from protocol.delta.format import Header
from protocol.errors import DamagedJournalError, PatchError, WrongBaseError
from protocol.ids import Digest
from protocol.release import InPlaceNeeds

_FOLDER: Final = "inplace"
_MANIFEST: Final = f"{_FOLDER}/manifest"
_MANIFEST_TEMPORARY: Final = f"{_FOLDER}/manifest.new"
_MANIFEST_BYTES_MAX: Final = 64 << 10
_MANIFEST_VERSION: Final = 1

_INVERSE_SPREAD: Final = 64
_INVERSE_SLACK_BYTES: Final = 4096
"""An inverse may be longer than its server found by a 64th and this, with other steps or another compression library."""

_LOG: Final = logging.getLogger(__name__)


class Rewriting(Struct, frozen=True, kw_only=True):
    """One file that moves to the other slot and is rewritten there."""

    base_name: str  # in the slot that it comes from
    name: str  # in the other one
    header: bytes  # of the delta: what putting back must know when the delta is gone

    @property
    def journal(self) -> str:
        """File that keeps what is being overwritten."""
        return f"{_FOLDER}/{self.name}.journal"

    @property
    def inverse(self) -> str:
        """File that takes the delta back."""
        return f"{_FOLDER}/{self.name}.inverse"


class Manifest(Struct, frozen=True, kw_only=True):
    """What moves from one slot to the other; without files there is nothing to put back."""

    version: int = _MANIFEST_VERSION
    plan: str = ""  # digest of the items that are installed
    source: SlotName = SlotName.A
    target: SlotName = SlotName.B
    files: tuple[Rewriting, ...] = ()


_decoder = msgspec.msgpack.Decoder(Manifest)


def inverse_bytes_max(needs: InPlaceNeeds) -> int:
    """Room that an inverse is given: for its length and, to turn round on the way, for what was not coded yet."""
    spread_bytes = needs.inverse_bytes // _INVERSE_SPREAD + _INVERSE_SLACK_BYTES
    return needs.inverse_bytes + needs.reach_bytes + spread_bytes


def room_bytes(needs: InPlaceNeeds, result_bytes: int) -> int:
    """Space that rewriting a file takes beside the file and the delta, at most."""
    from protocol.delta.undo_journal import journal_bytes_max  # noqa: PLC0415 - see the top

    journal = journal_bytes_max(needs.reach_bytes, max(needs.base_bytes, result_bytes))
    return journal + inverse_bytes_max(needs) + max(0, result_bytes - needs.base_bytes)


def is_begun(disk: Disk, active: SlotName, slot: SlotName, plan: str) -> bool:
    """Whether the manifest is that of a plan."""
    manifest = _load(disk)
    return (manifest.plan, manifest.source, manifest.target) == (plan, active, slot)


def begin(disk: Disk, active: SlotName, slot: SlotName, plan: str) -> None:
    """Say durably that files are going to move, once everything that was in the way is settled.

    Args:
        disk: The state folder.
        active: Slot that they come from.
        slot: Slot that they move to.
        plan: Digest of the plan.
    """
    _save(disk, Manifest(plan=plan, source=active, target=slot))


def rewrite_step(
    disk: Disk, active: SlotName, slot: SlotName, item: InstallItem, memory_bytes_max: int, decoder: Decoder
) -> bool:
    """Go on with one file of a plan that was begun.

    Args:
        disk: The state folder.
        active: Slot that the file comes from.
        slot: Slot that it moves to.
        item: What it becomes, and by which delta.
        memory_bytes_max: What applying the delta may take.
        decoder: Applies it.

    Returns:
        Whether the file is the new one.

    Raises:
        PatchError: The delta is unusable.
        InverseFullError: There is less room for the inverse than it takes.
        StorageError: The disk failed; calling again goes on.
    """
    from protocol.delta.undo_journal import journal_bytes  # noqa: PLC0415 - see the top

    manifest, needs = _load(disk), item.in_place
    assert needs is not None
    patch = blob_file(Digest(item.blob))
    header = _checked_header(DiskFile(disk, patch), item, needs)
    rewriting = Rewriting(base_name=item.base_name, name=item.name, header=header.pack())
    if rewriting not in manifest.files:
        disk.create(rewriting.journal, journal_bytes(header))
        disk.create(rewriting.inverse, inverse_bytes_max(needs))
        _save(disk, msgspec.structs.replace(manifest, files=(*manifest.files, rewriting)))
    old, new = slot_file(active, item.base_name), slot_file(slot, item.name)
    if disk.length(old) is not None:
        disk.remove(new)  # a second name of the same file would make the rename do nothing
        disk.replace(old, new)
    job = RewriteJob(
        target=new,
        patch=patch,
        header=rewriting.header,
        journal=rewriting.journal,
        inverse=rewriting.inverse,
        is_back=False,
        memory_bytes_max=memory_bytes_max,
        inverse_bytes_max=inverse_bytes_max(needs),
    )
    return decoder.rewrite(disk, job)


def put_back(disk: Disk, active: SlotName, decoder: Decoder = IN_PROCESS) -> None:
    """Make the files of a slot what they were, and give them their names back, if an installation in place has taken them.

    Does nothing on a device that never rewrites its files, and nothing to a version that was committed.

    Args:
        disk: The state folder.
        active: The slot that shall be whole.
        decoder: Applies the inverses.

    Raises:
        StorageError: The disk failed; calling again goes on.
    """
    manifest = _load(disk)
    if manifest.files and manifest.source is active:
        _put_back(disk, manifest, decoder)


def settle(disk: Disk, slot: SlotName, decoder: Decoder = IN_PROCESS) -> None:
    """Before a slot is emptied: what was rewritten into it goes back, and what was rewritten out of it never will.

    Raises:
        StorageError: The disk failed; nothing may be removed from the slot.
    """
    manifest = _load(disk)
    if manifest.files and manifest.target is slot:
        _put_back(disk, manifest, decoder)
    elif manifest.files:
        _forget(disk, manifest)


def remove_leftovers(disk: Disk) -> None:
    """Remove journals and inverses that lead nowhere: a power cut came before the manifest named them, or brought them back."""
    kept = {_MANIFEST, *(name for each in _load(disk).files for name in (each.journal, each.inverse))}
    for name in disk.names(_FOLDER):
        if name not in kept:
            disk.remove(name)


def remains_bytes(disk: Disk, slot: SlotName) -> int:
    """Space that is taken by what leads back to the version that was in a slot."""
    manifest = _load(disk)
    if manifest.source is not slot:
        return 0
    names = [name for each in manifest.files for name in (each.journal, each.inverse)]
    return sum(disk.length(name) or 0 for name in names)


def _checked_header(patch: DiskFile, item: InstallItem, needs: InPlaceNeeds) -> Header:
    """The header of the delta, which must be what its signed target says."""
    from protocol.delta.inplace import read_header  # noqa: PLC0415 - see the top

    header = read_header(patch)
    assert header.reach is not None
    if header.base_sha256.hex() != item.base_sha256:
        raise WrongBaseError("the delta was made for another base than the file at hand")
    reach_bytes = max(header.reach.behind_bytes, header.reach.ahead_bytes)
    said = (item.sha256, item.length, needs.base_bytes, needs.reach_bytes)
    if (header.result_sha256.hex(), header.result_length, header.base_length, reach_bytes) != said:
        raise PatchError("the delta is another one than its signed target says")
    return header


def _put_back(disk: Disk, manifest: Manifest, decoder: Decoder) -> None:
    for each in reversed(manifest.files):
        old, new = slot_file(manifest.source, each.base_name), slot_file(manifest.target, each.name)
        if disk.length(old) is not None:
            continue
        try:
            _undo(disk, each, new, decoder)
        except (PatchError, DamagedJournalError) as error:
            # It stays where it is, as garbage of that slot: a whole file can still take the place of the old one.
            _LOG.warning("%s cannot be put back: %s", each.base_name, error)
            continue
        disk.replace(new, old)
    _forget(disk, manifest)


def _undo(disk: Disk, rewriting: Rewriting, name: str, decoder: Decoder) -> None:
    from protocol.delta.reader import DEFAULT_MEMORY_LIMIT_BYTES  # noqa: PLC0415 - see the top

    job = RewriteJob(
        target=name,
        patch="",
        header=rewriting.header,
        journal=rewriting.journal,
        inverse=rewriting.inverse,
        is_back=True,
        memory_bytes_max=DEFAULT_MEMORY_LIMIT_BYTES,
        inverse_bytes_max=disk.length(rewriting.inverse) or 0,
    )
    while not decoder.rewrite(disk, job):
        pass


def _forget(disk: Disk, manifest: Manifest) -> None:
    """Give up what would lead back: durably first, then the room that it takes."""
    _save(disk, Manifest())
    for each in manifest.files:
        disk.remove(each.journal)
        disk.remove(each.inverse)


def _load(disk: Disk) -> Manifest:
    """The manifest; a damaged one leads nowhere, and what it spoke of will be found missing."""
    if disk.length(_MANIFEST) is None:
        return Manifest()
    try:
        manifest = _decoder.decode(disk.read(_MANIFEST, 0, _MANIFEST_BYTES_MAX))
    except msgspec.MsgspecError as error:
        _LOG.warning("%s: %s", _MANIFEST, error)
        return Manifest()
    return manifest if manifest.version == _MANIFEST_VERSION else Manifest()


def _save(disk: Disk, manifest: Manifest) -> None:
    data = msgspec.msgpack.encode(manifest)
    disk.create(_MANIFEST_TEMPORARY, len(data))
    disk.write(_MANIFEST_TEMPORARY, 0, data)
    disk.sync(_MANIFEST_TEMPORARY)
    disk.replace(_MANIFEST_TEMPORARY, _MANIFEST)
