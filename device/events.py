"""What can happen to an agent: the vocabulary of its inputs. Events are facts; none of them is an order."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from device.journal import Record
from protocol.chunks import Bitmap
from protocol.messages import TrialEvidence


@dataclass(frozen=True, slots=True)
class Booted:
    """The agent starts, for the first time or after anything.

    Attributes:
        record: The durable record; `None` on a device that has none yet.
        root: The newest root document that was trusted, or the one that the installer put there.
        runtimes: Installed runtimes and versions.
        memory_bytes: Memory of the device.
        is_clock_set: Whether somebody who knows the time has set the device's clock since it started.
    """

    record: Record | None
    root: bytes
    runtimes: dict[str, str]
    memory_bytes: int
    is_clock_set: bool = True


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us; it remembers nothing of us."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone, for whatever reason."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """The broker delivered something; nothing about it is believed."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class KeysOpened:
    """Content keys are open and kept.

    Attributes:
        names: Of those that are.
        trouble: What was wrong with one that is not; empty if nothing was.
    """

    names: frozenset[str]
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class BlobOpened:
    """Storage for a blob is ready; `present` are the chunks that are on disk and match their digests."""

    serial: int
    present: Bitmap


@dataclass(frozen=True, slots=True)
class BlobRead:
    """Content of a complete blob."""

    serial: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Probed:
    """What the device measured about itself just now.

    Attributes:
        files: SHA-256 of every file of the active slot, read now.
        disk_free_bytes: Space for new files.
        inactive_bytes: Space that emptying the inactive slot would give back.
        active_bytes: Length of the files of the active slot.
    """

    serial: int
    files: dict[str, str]
    disk_free_bytes: int
    inactive_bytes: int
    active_bytes: int = 0


@dataclass(frozen=True, slots=True)
class InstallProgressed:
    """A step of the installation is durable."""

    serial: int
    done: bool


@dataclass(frozen=True, slots=True)
class SlotMeasured:
    """SHA-256 of every file of a slot, read back from the medium."""

    serial: int
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """What the trial measured."""

    serial: int
    evidence: TrialEvidence


@dataclass(frozen=True, slots=True)
class ServingStarted:
    """The engine answers with the model of a slot."""

    serial: int


@dataclass(frozen=True, slots=True)
class EffectFailed:
    """An effect could not be carried out; the effects after it in its tuple were dropped.

    Attributes:
        serial: Of the effect, 0 for effects that carry none.
        code: Stable error code.
        detail: One line for the operator.
        is_retryable: Whether another try can help.
    """

    serial: int
    code: str
    detail: str
    is_retryable: bool


class Wish(Enum):
    """What an operator at the device may ask for. The values are what `whimbrel-device` sends."""

    PAUSE = "pause"
    RESUME = "resume"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class OperatorAsked:
    """Somebody at the device asked for something; `AnswerOperator` with this serial says what became of it."""

    serial: int
    wish: Wish


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How the device stands: what its policy asks about and what could be read; everything else is `None`.

    Attributes:
        local: Local time, by the clock on the wall: it may jump, and in a change to or from summer time it does.
        is_metered: Whether every byte costs.
        is_on_battery: Whether nothing charges it.
        battery_percent: How full the batteries are.
        temperature_c: Of the hottest part.
        load: Processes that run or wait, per core, mean of a minute.
        pressure_percent: Share of the last minute in which something waited for processor, memory or disk.
        memory_available_bytes: What new programs can have.
    """

    local: datetime | None = None
    is_metered: bool | None = None
    is_on_battery: bool | None = None
    battery_percent: float | None = None
    temperature_c: float | None = None
    load: float | None = None
    pressure_percent: float | None = None
    memory_available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The instant that `deadline()` named has come."""


Event = (
    Booted
    | Connected
    | Disconnected
    | MessageReceived
    | KeysOpened
    | BlobOpened
    | BlobRead
    | Probed
    | InstallProgressed
    | SlotMeasured
    | TrialFinished
    | ServingStarted
    | EffectFailed
    | OperatorAsked
    | Conditions
    | DeadlineReached
)
