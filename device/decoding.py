"""Turning deltas into files: the port, and the code that does it, step by step, on the `Disk` port.

Whatever is decoded was signed, and is hostile all the same: on a device this code runs in a child process without rights (`adapters/decoder.py`,
ADR 26); the simulator and tests run it where they are. Between two steps everything is on the disk or in a state of a few hundred
kilobytes, so a process that dies costs a step. What decodes is imported where it is used: an agent at rest does without.
"""

from typing import TYPE_CHECKING, Final, Protocol

from msgspec import Struct

from device.ports import Disk
from device.slots import measure_file
from protocol.errors import PatchError, WrongBaseError

if TYPE_CHECKING:
    from protocol.delta.reader import DeltaReader

STEP_BYTES: Final = 8 << 20
"""Result bytes between two checkpoints: what a power cut may cost, against four syncs per checkpoint."""

FEED_BYTES: Final = 256 << 10
"""Bytes of the delta read at a time."""

REWRITE_STEPS: Final = 4
"""Steps of an application in place between two answers: 16 MiB of the result, about."""


class DeltaJob(Struct, frozen=True, kw_only=True, tag="delta"):
    """One file that a delta makes beside its base.

    Attributes:
        base: Name of the file that the delta applies to.
        patch: Of the delta.
        result: Of the file that is made; it is there, as long as it shall be.
        base_sha256: What the signed path of the delta says about the base.
        sha256: About the result.
        length: Likewise, in bytes.
        memory_bytes_max: What decoding may take.
    """

    base: str
    patch: str
    result: str
    base_sha256: str
    sha256: str
    length: int
    memory_bytes_max: int


class RewriteJob(Struct, frozen=True, kw_only=True, tag="rewrite"):
    """One file that becomes another, or the old one again.

    Attributes:
        target: Name of the file.
        patch: Of the delta; "" where it is gone, on the way back.
        header: Of the delta.
        journal: Name of the file that keeps what is being overwritten.
        inverse: Of the file that takes the way back.
        is_back: Whether the file shall be the old one.
        memory_bytes_max: What decoding may take.
        inverse_bytes_max: Room for the inverse.
    """

    target: str
    patch: str
    header: bytes
    journal: str
    inverse: str
    is_back: bool
    memory_bytes_max: int
    inverse_bytes_max: int


class Decoded(Struct, frozen=True, kw_only=True, tag="decoded"):
    """How far a file has come.

    Attributes:
        state: Where to go on; empty once it is finished.
        is_finished: Whether all of it is written. Its digest is the caller's to measure.
    """

    state: bytes = b""
    is_finished: bool = False


class Decoder(Protocol):
    """Decodes deltas; one caller at a time."""

    def decode(self, disk: Disk, job: DeltaJob, state: bytes) -> Decoded:
        """Write the next `STEP_BYTES` of a result, or the rest of it; nothing is synced.

        Args:
            disk: Where the files are.
            job: What is made.
            state: From the call before; empty at the beginning.

        Raises:
            PatchError: The delta is unusable, or ended the process that decoded it.
            StorageError: The disk failed; calling again with the same state goes on.
        """

    def rewrite(self, disk: Disk, job: RewriteJob) -> bool:
        """Go on with a file for some steps, all of them durable.

        Returns:
            Whether the file is what it shall be.

        Raises:
            PatchError: The delta is unusable, or ended the process that decoded it.
            InverseFullError: There is less room for the inverse than it takes.
            StorageError: The disk failed; calling again goes on.
        """


class DiskFile:
    """A file of the disk, as `InPlace` and readers of deltas see it."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk = disk
        self._name = name

    @property
    def length(self) -> int:
        """In bytes; 0 where there is no file."""
        return self._disk.length(self._name) or 0

    def read_at(self, offset: int, length: int) -> bytes:
        """As `Disk.read`."""
        return self._disk.read(self._name, offset, length)

    def write_at(self, offset: int, data: bytes) -> None:
        """As `Disk.write`."""
        self._disk.write(self._name, offset, data)

    def sync(self) -> None:
        """As `Disk.sync`."""
        self._disk.sync(self._name)

    def resize(self, length: int) -> None:
        """As `Disk.resize`."""
        self._disk.resize(self._name, length)


class LocalDecoder:
    """The `Decoder` that works in the process of its caller."""

    def decode(self, disk: Disk, job: DeltaJob, state: bytes) -> Decoded:
        """See `Decoder.decode`."""
        from protocol.delta.reader import DeltaReader  # noqa: PLC0415 - see the top

        base = DiskFile(disk, job.base)
        if state:
            reader = DeltaReader.restore(base, state, memory_limit_bytes=job.memory_bytes_max)
        else:
            reader = DeltaReader(base, memory_limit_bytes=job.memory_bytes_max)
        _advance(disk, reader, job)
        if not reader.is_finished:
            return Decoded(state=reader.dump())
        reader.finish()
        return Decoded(is_finished=True)

    def rewrite(self, disk: Disk, job: RewriteJob) -> bool:
        """See `Decoder.rewrite`."""
        from protocol.delta.inplace import Files, InPlace  # noqa: PLC0415 - see the top
        from protocol.delta.undo_journal import Phase  # noqa: PLC0415 - likewise
        from protocol.tensors import BytesSource  # noqa: PLC0415 - likewise

        files = Files(
            DiskFile(disk, job.target),
            DiskFile(disk, job.patch) if job.patch else BytesSource(job.header),
            DiskFile(disk, job.journal),
            DiskFile(disk, job.inverse),
        )
        work = InPlace(
            files, memory_limit_bytes=job.memory_bytes_max, inverse_bytes_max=job.inverse_bytes_max
        )
        if work.phase is Phase.NEW:
            if job.is_back:
                return True
            work.begin(bytes.fromhex(measure_file(disk, job.target)))
        if job.is_back:
            work.undo()
        for _ in range(REWRITE_STEPS):
            if work.step():
                return True
        work.checkpoint()
        return False


IN_PROCESS: Final = LocalDecoder()
"""For whoever has no process to spare: it keeps nothing between two calls."""


def _advance(disk: Disk, reader: "DeltaReader", job: DeltaJob) -> None:
    """Feed the delta until a step's worth of the result is written, or all of it."""
    position, stop = reader.patch_offset, reader.result_offset + STEP_BYTES
    while not reader.is_finished and reader.result_offset < stop:
        data = disk.read(job.patch, position, FEED_BYTES)
        if not data:
            reader.finish()
            return
        position += len(data)
        for piece in reader.feed(data):
            _check_header(reader, job)
            disk.write(job.result, piece.offset, piece.data)
            if reader.result_offset >= stop:
                return


def _check_header(reader: "DeltaReader", job: DeltaJob) -> None:
    """The signed path of a delta names its base and its result; so must the file itself."""
    header = reader.header
    assert header is not None
    if header.base_sha256.hex() != job.base_sha256:
        raise WrongBaseError("the delta was made for another base than the file at hand")
    if header.result_sha256.hex() != job.sha256 or header.result_length != job.length:
        raise PatchError("the delta leads to another file than its signed name says")
