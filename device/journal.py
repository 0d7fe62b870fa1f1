"""The durable record: everything that has to survive a power cut, in two checksummed copies.

Invariants:
- the copy with the highest sequence among those whose checksum holds is the record;
- a write goes to the *other* copy and is synced before anything relies on it, so a torn write leaves the old record;
- the count of boots never goes back; floors and the desired sequence only with the keys that they hold for (SPEC section 8.2);
- names of states and of fields are a format of their own (`RECORD_VERSION`), whatever the code calls them.
"""

import hashlib
import struct
from typing import Final, Literal

import msgspec
from msgspec import Struct

from device.ports import Disk
from device.slots import SlotHealth, SlotName
from device.states import State
from protocol.errors import StorageError
from protocol.messages import Desired, ReceivedDesired, TrialEvidence
from protocol.release import ChunkTree, InPlaceNeeds, Release, RuntimeName
from protocol.trust import Floors

RECORD_VERSION: Final = 1
RECORD_BYTES_MAX: Final = 4 << 20
"""A record holds one release description (1 MiB at most) and little else."""

HISTORY_MAX: Final = 32
"""Updates that are over and are remembered, 300 bytes each; the oldest is forgotten first."""

QUARANTINE_MAX: Final = 64
"""Releases that failed their trial here and are remembered; the oldest is forgotten first."""

READ_TRIES: Final = 5
"""Attempts to read a copy before it counts as damaged: the other copy is older, and floors would go back by it."""

_COPIES: Final = ("record.0", "record.1")
_MAGIC: Final = b"WBRECORD"
_HEADER: Final = struct.Struct("<8sIQI32s")  # magic, version, sequence, length, SHA-256 of sequence and body


class SlotRecord(Struct, frozen=True, kw_only=True):
    """What is installed in a slot."""

    health: SlotHealth = SlotHealth.EMPTY
    version: str = ""
    runtime: RuntimeName = "onnx"
    main_file: str = ""
    adapter_file: str = ""  # that the runtime adds to the weights of the main one; empty for none
    files: dict[str, str] = {}  # name to SHA-256, as signed
    release_sha256: str = ""  # of its description; empty in records of older agents
    memory_bytes: int = 0  # what it takes while it runs: measured by its trial, or else what its release says; 0 in older records


class InstallLink(Struct, frozen=True, kw_only=True):
    """One file that is made from what was fetched, and from the file before it."""

    base_sha256: str  # empty for a whole file
    sha256: str
    length: int
    blob: str
    blob_length: int
    tree: ChunkTree
    key: str = ""  # name of the content key of the blob, where it is encrypted


class InstallItem(Struct, frozen=True, kw_only=True):
    """How one file of the new version comes about."""

    name: str
    sha256: str
    length: int
    action: Literal[
        "keep", "delta", "full"
    ]  # link the active file | apply a delta, or several | take the fetched file
    base_name: str = ""  # file of the active slot, for keep, and for a delta that applies to one
    base_sha256: str = ""  # for delta: digest of what the last one applies to
    blob: str = ""  # what is fetched, for delta and full
    blob_length: int = 0
    tree: ChunkTree | None = None
    key: str = ""  # name of the content key of the blob, where it is encrypted
    earlier: tuple[InstallLink, ...] = ()  # files on the way, in order; the first is made from the active one
    in_place: InPlaceNeeds | None = None  # for a delta that rewrites the active file itself

    @property
    def links(self) -> tuple[InstallLink, ...]:
        """Everything that is made, the file itself last; nothing for a file that is kept."""
        if self.tree is None:
            return ()
        last = InstallLink(
            base_sha256=self.base_sha256,
            sha256=self.sha256,
            length=self.length,
            blob=self.blob,
            blob_length=self.blob_length,
            tree=self.tree,
            key=self.key,
        )
        return (*self.earlier, last)


class Counters(Struct, frozen=True, kw_only=True):
    """What an update has cost so far; carried over restarts."""

    received_bytes: int = 0
    received_chunks: int = 0
    redundant_chunks: int = 0
    invalid_chunks: int = 0
    resumes: int = 0


class DirectorKey(Struct, frozen=True, kw_only=True):
    """A key of the director, and the highest `sequence` that it has signed for this device."""

    key: bytes  # Ed25519, 32 bytes
    sequence: int = 0


class Director(Struct, frozen=True, kw_only=True):
    """Who may wish, as the metadata said that was verified last (SPEC section 8.4)."""

    is_named: bool  # else wishes are not signed
    keys: tuple[DirectorKey, ...] = ()


class UpdateRecord(Struct, frozen=True, kw_only=True):
    """The update under way, or the last one."""

    desired: Desired
    started_ms: int
    signer: bytes = b""  # key of the director that signed the wish; empty where it was not signed
    expires_ms: int | None = None  # until when the wish may be acted upon
    unproven: ReceivedDesired | None = None  # the wish as it came, while it is not known who may wish
    finished_ms: int | None = None
    release: Release | None = None  # known once the signed description was read
    release_sha256: str = ""
    slot: SlotName | None = None  # where it is built; of a recall, what is given up
    is_recall: bool = False  # no update: the operator goes back to the version before
    items: tuple[InstallItem, ...] = ()
    current_until_ms: int = (
        0  # when the first of the documents ends that the plan relies on; 0 in older records
    )
    full_only: bool = False  # a delta proved unusable; whole files from now on
    tries: int = 0  # trials begun; counted before each start
    attempts: int = 1  # times the update was begun, after retryable failures
    retry: bool = False  # failed for now; another attempt is due
    writes: int = 0  # state changes recorded; a loop ends at a limit
    outcome: Literal["running", "committed", "rolled_back", "rejected", "failed"] = "running"
    code: str = ""
    detail: str = ""
    counters: Counters = Counters()
    states_ms: dict[str, int] = {}
    evidence: TrialEvidence | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether files of the active slot are rewritten, so that nothing can be served meanwhile."""
        return any(item.in_place is not None for item in self.items)


class PastUpdate(Struct, frozen=True, kw_only=True):
    """An update that is over, as `whimbrel-device history` shows it."""

    version: str
    rollout: str
    outcome: str
    code: str
    detail: str
    started_ms: int
    finished_ms: int
    received_bytes: int
    tries: int
    active: str  # the version that runs since


class Record(Struct, frozen=True, kw_only=True):
    """Everything durable about this device but files and metadata documents."""

    state: State = State.IDLE
    active: SlotName | None = None
    slots: dict[SlotName, SlotRecord] = msgspec.field(
        default_factory=lambda: dict.fromkeys(SlotName, SlotRecord())
    )
    floors: Floors = Floors()
    desired_sequence: int = (
        0  # the highest that counts: it goes back when the director's keys are exchanged, and never else
    )
    director: Director | None = (
        None  # none in records of older agents, and before metadata was looked at for the first time
    )
    boots: int = 0  # upper half of the report sequence
    quarantine: tuple[str, ...] = ()  # digests of releases
    update: UpdateRecord | None = None
    history: tuple[PastUpdate, ...] = ()  # oldest first
    paused_ms: int | None = None  # since when the operator wants no updates

    @property
    def active_slot(self) -> SlotRecord:
        """What is installed and active; an empty slot where nothing is."""
        return self.slots[self.active] if self.active is not None else SlotRecord()


class DamagedRecordError(StorageError):
    """Both copies of the record are unreadable."""

    code = "record.damaged"
    is_retryable = False


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class Journal:
    """Reads and writes the record.

    Args:
        disk: Where it lives.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._sequence = 0

    def load(self) -> Record | None:
        """The newest intact record; `None` on a device that never had one.

        Raises:
            DamagedRecordError: There were records, and none is intact.
        """
        lengths = [self._disk.length(name) for name in _COPIES]
        found = [copy for name in _COPIES if (copy := self._read(name)) is not None]
        if not found:
            if any(lengths):
                raise DamagedRecordError(
                    "both copies of the durable record are damaged",
                    hint="install the device anew; the model files are untouched",
                )
            return None
        self._sequence, record = max(found, key=lambda copy: copy[0])
        return record

    def save(self, record: Record) -> None:
        """Make `record` durable. On an error the record before is still the record."""
        body = _encoder.encode(record)
        if len(body) > RECORD_BYTES_MAX:
            raise StorageError(f"durable record of {len(body)} bytes, allowed are {RECORD_BYTES_MAX}")
        sequence = self._sequence + 1
        name = _COPIES[sequence % 2]
        data = _HEADER.pack(_MAGIC, RECORD_VERSION, sequence, len(body), _checksum(sequence, body)) + body
        if (self._disk.length(name) or 0) < len(data):
            self._disk.create(name, _rounded(len(data)))
        self._disk.write(name, 0, data)
        self._disk.sync(name)
        self._sequence = sequence

    def _read(self, name: str) -> tuple[int, Record] | None:
        """A copy; `None` where it is not there or damaged. A read that fails once may succeed the next time."""
        if self._disk.length(name) is None:
            return None
        for _ in range(READ_TRIES):
            try:
                return self._decoded(name)
            except StorageError:
                continue
        return None

    def _decoded(self, name: str) -> tuple[int, Record] | None:
        try:
            header = self._disk.read(name, 0, _HEADER.size)
            if len(header) < _HEADER.size:
                return None
            magic, version, sequence, length, checksum = _HEADER.unpack(header)
            if magic != _MAGIC or version != RECORD_VERSION or length > RECORD_BYTES_MAX:
                return None
            body = self._disk.read(name, _HEADER.size, length)
            if len(body) != length or _checksum(sequence, body) != checksum:
                return None
            return sequence, _decoder.decode(body)
        except msgspec.MsgspecError:
            return None


def _checksum(sequence: int, body: bytes) -> bytes:
    return hashlib.sha256(sequence.to_bytes(8, "little") + body).digest()


def _rounded(length: int) -> int:
    """Room to grow, so that most writes need no new file."""
    return -(-length * 2 // 65_536) * 65_536
