"""Chunks on disk: one file per blob, at full length from the start. Which chunks are there is never written down.

What is on disk is found out by comparing it with the signed digests. So there is no bitmap that could promise
more than the disk holds, and a chunk that reached the disk before a power cut or a kill is never fetched again.

An encrypted blob lies here as what it decrypts to: it is complete when it is fetched, takes no room twice, and whoever applies a delta needs
no key. Signed digests are those of what travels, so that what is found is encrypted again to be compared.
"""

from typing import Final

from device.ports import Cipher, Disk
from protocol.chunks import Bitmap, BlobPlan
from protocol.constants import CHUNK_BYTES
from protocol.errors import StorageError
from protocol.ids import Digest

FOLDER: Final = "blobs"


def blob_file(blob: Digest) -> str:
    """File that holds a blob."""
    return f"{FOLDER}/{blob}"


def as_it_is(_offset: int, data: bytes) -> bytes:
    """The cipher of a blob that is not encrypted."""
    return data


def open_blob(disk: Disk, plan: BlobPlan, cipher: Cipher = as_it_is) -> Bitmap:
    """Prepare the file of a blob and find the chunks that are there.

    Args:
        disk: Where it lies.
        plan: The blob and the digests of its chunks.
        cipher: Of the blob.

    Raises:
        StorageFullError: There is no room for the whole blob.
    """
    name = blob_file(plan.name)
    present = Bitmap(plan.count)
    if disk.length(name) != plan.length:
        disk.create(name, plan.length)
        return present
    for index in range(plan.count):
        offset = index * CHUNK_BYTES
        if plan.accepts(index, cipher(offset, disk.read(name, offset, plan.chunk_length(index)))):
            present.add(index)
    return present


def write_chunk(disk: Disk, blob: Digest, index: int, payload: bytes, cipher: Cipher = as_it_is) -> None:
    """Store a chunk that was checked against its digest."""
    offset = index * CHUNK_BYTES
    disk.write(blob_file(blob), offset, cipher(offset, payload))


def read_blob(disk: Disk, blob: Digest, length: int) -> bytes:
    """Read a complete small blob."""
    data = disk.read(blob_file(blob), 0, length)
    if len(data) != length:
        raise StorageError(f"blob {blob[:16]} has {len(data)} bytes on disk, {length} expected")
    return data


def remove_blobs(disk: Disk, keep: frozenset[Digest]) -> None:
    """Remove every blob but those named."""
    for name in disk.names(FOLDER):
        if name.rpartition("/")[2] not in keep:
            disk.remove(name)
