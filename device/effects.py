"""What an agent orders: the vocabulary of its outputs.

`handle` returns an ordered tuple. The executor carries effects out in that order, and `Persist` is a barrier: what stands
after it happens only once the record is durable. If an effect fails, those after it are dropped and the agent
hears `EffectFailed`. Effects with a `serial` take long; they run on a worker and answer with an event that carries
the same serial, so that an answer to a question that is no longer asked is recognised.
"""

from dataclasses import dataclass

from device.journal import InstallItem, Record
from device.ports import TrialOrder
from device.slots import SlotName
from device.states import Row
from protocol.chunks import BlobPlan
from protocol.ids import Digest
from protocol.messages import WrappedKey
from protocol.release import RuntimeName


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the record durable. Nothing after this happens before it is."""

    record: Record


@dataclass(frozen=True, slots=True)
class SaveRoot:
    """Keep a newer root document as the start of trust; losing it costs time only, the floors are in the record."""

    root: bytes


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Subscribe to at most `GROUP_CHUNKS` filters."""

    filters: tuple[str, ...]
    qos: int


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Unsubscribe."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Send a message; `is_signed` with the key of the device beside it, where it has one."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    is_signed: bool = False


@dataclass(frozen=True, slots=True)
class OpenKeys:
    """Open wrapped content keys with the device's private key, and keep those with one of these names; answers `KeysOpened`."""

    keys: tuple[WrappedKey, ...]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class ForgetKeys:
    """Keep no content key any longer."""


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """Prepare storage for a blob and find out which of its chunks are there already; answers `BlobOpened`.

    With the name of a key, what lies on the disk is what the blob decrypts to, and it is encrypted again to be compared.
    """

    serial: int
    plan: BlobPlan
    key: str = ""


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """Store a chunk that was checked against the signed index; with the name of a key, decrypted."""

    blob: Digest
    index: int
    payload: bytes
    key: str = ""


@dataclass(frozen=True, slots=True)
class SyncBlob:
    """Make all chunks written so far durable."""

    blob: Digest


@dataclass(frozen=True, slots=True)
class ReadBlob:
    """Read a whole small blob (an index, a release description); answers `BlobRead`."""

    serial: int
    blob: Digest
    length: int


@dataclass(frozen=True, slots=True)
class RemoveBlobs:
    """Remove every blob but those named, and what led back to a version that was given up; garbage of any earlier life included.

    Not ordered while files are rewritten in place.
    """

    keep: frozenset[Digest]


@dataclass(frozen=True, slots=True)
class Probe:
    """Measure the active slot and the disk; answers `Probed`.

    What an update in place has taken from the slot is put back first, however far it had come, so this is not
    ordered while such an update goes on.
    """

    serial: int
    active: SlotName | None


@dataclass(frozen=True, slots=True)
class EmptySlot:
    """Remove the files of a slot, the checkpoint of their installation, and what leads back to them; never an only copy."""

    slot: SlotName


@dataclass(frozen=True, slots=True)
class InstallStep:
    """Go on with the installation for one checkpoint; answers `InstallProgressed`."""

    serial: int
    active: SlotName | None
    slot: SlotName
    items: tuple[InstallItem, ...]
    memory_bytes_max: int


@dataclass(frozen=True, slots=True)
class MeasureSlot:
    """Read every file of a slot back from the medium; answers `SlotMeasured`."""

    serial: int
    slot: SlotName


@dataclass(frozen=True, slots=True)
class StartTrial:
    """Try the model of a slot in a process of its own; answers `TrialFinished`."""

    serial: int
    slot: SlotName
    file: str
    order: TrialOrder
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Serve:
    """Answer with the model of a slot from now on, and let go of the one before once nobody uses it; answers `ServingStarted`."""

    serial: int
    slot: SlotName
    runtime: RuntimeName
    file: str
    version: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class LetGo:
    """Close the model, in bounded time whoever uses it: its file is going to be rewritten."""


@dataclass(frozen=True, slots=True)
class PointCurrent:
    """Let the `current` link name a slot, for applications that open the files themselves."""

    slot: SlotName


@dataclass(frozen=True, slots=True)
class AnswerOperator:
    """Tell whoever asked what became of it; what was promised is durable by then.

    Attributes:
        serial: Of the `OperatorAsked`.
        code: Stable code of a refusal, empty where it is done.
        text: One line.
    """

    serial: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Trace:
    """A transition was taken; for logs and displays."""

    row: Row
    version: str
    code: str


Effect = (
    Persist
    | SaveRoot
    | Subscribe
    | Unsubscribe
    | Publish
    | OpenKeys
    | ForgetKeys
    | OpenBlob
    | WriteChunk
    | SyncBlob
    | ReadBlob
    | RemoveBlobs
    | Probe
    | EmptySlot
    | InstallStep
    | MeasureSlot
    | StartTrial
    | Serve
    | LetGo
    | PointCurrent
    | AnswerOperator
    | Trace
)
