"""What the core needs from the world. A real adapter and a simulated twin implement each port and pass one suite.

Names of files are relative POSIX paths below the device's state folder, built by `slots.py`, `journal.py` and
`blobs.py` only. Every method raises `StorageError` or a subclass when the disk fails, `EngineError` when a model does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from protocol.errors import EngineError, Fault
from protocol.messages import TrialEvidence, WrappedKey
from protocol.release import HealthPlan, Prompt, RuntimeName

if TYPE_CHECKING:  # children that decode or try a model do without tuf: half of the time in which they start
    from protocol.trust import Documents, Floors, Followed, Verified


class Disk(Protocol):
    """Files with the durability rules of a POSIX file system, and no others.

    What `write` wrote is lost, kept or torn by a power cut until `sync` of that file returned; a name that `create`,
    `replace` or `link` made is lost or kept until they returned: they make it durable themselves.
    """

    def length(self, name: str) -> int | None:
        """Length of a file in bytes; `None` where there is none."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Read up to `length` bytes; fewer only at the end of the file."""

    def create(self, name: str, length: int) -> None:
        """Make a new file of `length` zero bytes with its space reserved, in place of an old one of that name.

        Raises:
            StorageFullError: There is no room; nothing is left behind.
        """

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write into an existing file."""

    def resize(self, name: str, length: int) -> None:
        """Cut a file, or make it longer with zeros whose space is reserved; durable on return, with everything written before.

        Raises:
            StorageFullError: There is no room; the file is as it was.
        """

    def sync(self, name: str) -> None:
        """Make everything written to a file durable. After an error the file's content is unknown: write it anew."""

    def replace(self, source: str, target: str) -> None:
        """Rename, in place of an old `target`; durable on return."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, in place of an old `target`; durable on return."""

    def remove(self, name: str) -> None:
        """Remove a file; none of that name is no error."""

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, sorted, as paths from the state folder."""

    def forget_cached(self, name: str) -> None:
        """Ask that the next reads come from the medium and not from memory."""

    def free_bytes(self) -> int:
        """Space that new files may take."""

    def path(self, name: str) -> str:
        """The path under which an engine opens the file."""

    def point(self, name: str, target: str) -> None:
        """Make the symbolic link `name` point to the folder `target`, in one step, durable on return."""


class Transport(Protocol):
    """A connection to the broker, which comes and goes by itself; nothing is promised about delivery."""

    def subscribe(self, filters: tuple[str, ...], qos: int) -> None:
        """Subscribe to at most `GROUP_CHUNKS` filters."""

    def unsubscribe(self, filters: tuple[str, ...]) -> None:
        """Unsubscribe."""

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Send; dropped silently while there is no connection."""

    def progressed(self) -> None:
        """Take note that something came which will not have to come again: even if it is lost soon, the connection was good for something."""


Cipher = Callable[[int, bytes], bytes]
"""Encrypts the bytes that begin at an offset, or decrypts them: it is the same."""


class OpenedKey(NamedTuple):
    """A content key, by what it does."""

    name: str
    cipher: Cipher


class KeyOpener(Protocol):
    """Has the private key of the device."""

    def __call__(self, wrapped: WrappedKey) -> OpenedKey | None:
        """Open a content key; `None` where it was wrapped for another private key.

        Raises:
            ContentKeyError: It was not made for this device and this artifact.
            RequestError: The private key cannot be read.
        """


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as an engine loads it.

    Attributes:
        runtime: Which one loads it.
        path: The file that it opens.
        adapter: Path of the low-rank adapter that it adds to the weights; empty for none.
    """

    runtime: RuntimeName
    path: str
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class TrialOrder:
    """A trial: the model, what it must show, and the limit of the tier."""

    model: ModelSource
    health: HealthPlan
    memory_bytes_max: int


class Model(Protocol):
    """A loaded model that answers."""

    def answer(self, prompt: Prompt) -> str:
        """Answer one prompt: a class number, or the greedy continuation.

        Raises:
            EngineError: It did not answer.
        """

    def close(self) -> None:
        """Give the memory back."""


class QuestionError(EngineError):
    """What was asked does not fit the model; it would answer something else."""

    code = "engine.question"
    fault = Fault.REQUEST


@dataclass(frozen=True, slots=True)
class Classified:
    """What a classifier says about one input.

    Attributes:
        label: Number of the class with the highest score, or the label that the model names.
        scores: The model's first output as it is, one per class; empty where the model names a label only.
    """

    label: str
    scores: tuple[float, ...]


@runtime_checkable
class ClassModel(Model, Protocol):
    """A model that classifies lists of numbers."""

    def classify(self, values: Sequence[float]) -> Classified:
        """Classify one input.

        Raises:
            QuestionError: A wrong number of values.
            EngineError: It did not answer.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a text goes on.

    Attributes:
        tokens_max: Longest continuation; `None` for what the context has room for.
        temperature: 0 takes the most likely token.
        top_p: Share of the probability that tokens are drawn from.
        seed: Makes the draw the same every time; `None` for chance.
        stop: The text ends before the first of these.
    """

    tokens_max: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """How a continuation ended, and what it took."""

    prompt_tokens: int
    tokens: int
    ending: Literal["stop", "length"]


@runtime_checkable
class TextModel(Model, Protocol):
    """A model that continues text."""

    def chat_prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation of (role, content) as this model was taught to read one, up to where its answer begins.

        Raises:
            QuestionError: The model has no template for conversations, or it refuses this one.
        """

    def write(self, prompt: str, sampling: Sampling, tell: Callable[[str], None]) -> Written:
        """Continue a text, from an empty context.

        Args:
            prompt: Its special tokens are read as such.
            sampling: How.
            tell: Takes the text piece by piece. It is called before the first token and after each, with nothing where nothing is
                to be said yet, and ends the text by raising.

        Raises:
            QuestionError: A prompt without tokens, or with as many as the context has.
            EngineError: It did not answer.
        """


class Engine(Protocol):
    """Local inference: the runtimes that this device has."""

    def versions(self) -> dict[str, str]:
        """Installed runtimes and their versions."""

    def load(self, source: ModelSource) -> Model:
        """Load a model.

        Raises:
            EngineError: The runtime is missing, or refuses the file.
        """

    def trial(self, order: TrialOrder) -> TrialEvidence:
        """Run a trial in a process of its own, with its limits enforced from outside.

        Never raises because of the model: a crash, a hang or a refusal is evidence.
        """


class Trust(Protocol):
    """Verification of signed metadata: pure functions of their arguments, as `protocol.trust` has them.

    Whoever runs many agents over the same documents may remember what they gave.
    """

    def check_root(self, root: bytes) -> int:
        """As `protocol.trust.check_root`."""

    def follow(self, root: bytes, successor: bytes, floors: "Floors") -> "Followed":
        """As `protocol.trust.follow`."""

    def verify(
        self,
        root: bytes,
        documents: "Documents",
        floors: "Floors",
        now_ms: int,
        roles: tuple[str, ...] | None = None,
    ) -> "Verified":
        """As `protocol.trust.verify`."""

    def verify_time(self, root: bytes, statement: bytes, signatures: Mapping[str, str]) -> None:
        """As `protocol.trust.verify_time`."""

    def is_signed(self, key: bytes, statement: bytes, signature: bytes) -> bool:
        """As `protocol.trust.is_signed`."""


class Workers(Protocol):
    """Runs what takes long away from the loop that answers the network."""

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` soon; work of one device runs in the order it was submitted, one at a time."""
